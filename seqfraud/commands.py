"""`seqfraud verify`."""

from pathlib import Path
from typing import Annotated

import typer

from seqfraud.console import print_json
from seqfraud.verification import verify_bundle


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.", metavar="BUNDLE")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check a bundle's files and the parity of its graphs with the trained module's reference vectors.

    Example: seqfraud verify bundle
    """
    measured = verify_bundle(bundle)
    if json:
        print_json(measured)
        return
    width = max(map(len, measured))
    for name, figures in measured.items():
        print(f"{name:{width}}  " + "  ".join(f"{what} {value:.2g}" for what, value in figures.items()))
    print(f"{bundle}: {len(measured)} checks passed")
