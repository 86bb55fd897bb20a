"""`seqfraud sign`."""

from pathlib import Path
from typing import Annotated

import typer

from seqfraud.bundle import sign_bundle
from seqfraud.errors import ConfigError
from seqfraud.signature import TrustedKeys, new_key, read_signing_key, read_trusted_keys

TrustedKeysOption = Annotated[
    Path | None,
    typer.Option("--trusted-keys", help="File of public keys; a bundle that none of them signed is refused."),
]


def trusted_keys(file: Path | None) -> TrustedKeys | None:
    """The keys of an option or a setting; None where it is not set."""
    return None if file is None else read_trusted_keys(file)


def sign(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle folder.", metavar="BUNDLE")] = None,
    key: Annotated[Path | None, typer.Option(help="The private key to sign with.")] = None,
    make: Annotated[Path | None, typer.Option("--new-key", help="Make a key here, and FILE.pub beside it.")] = None,
) -> None:
    """Sign a bundle's manifest (Ed25519), and so the hashes in it of every other file; or make a key for that.

    Whoever sets --trusted-keys, or trusted_keys in the service's settings, opens only what a key in that file signed.

    Example: seqfraud sign bundle --key release.key
    """
    if make is not None:
        if bundle is not None or key is not None:
            raise ConfigError("sign: --new-key makes a key and signs nothing; sign with --key afterwards")
        print(f"key {new_key(make)}: {make} (keep it secret), {make}.pub (a line for a file of trusted keys)")
        return
    if bundle is None or key is None:
        raise ConfigError("sign: expected BUNDLE and --key, or --new-key")
    print(f"{bundle}: signed by key {sign_bundle(bundle, read_signing_key(key))}")
