"""Who vouches for a bundle: Ed25519 signatures over the bytes of its manifest, which holds the hashes of its other files.

manifest.sig     one line per signature: ed25519 KEYID SIGNATURE
trusted keys     one line per key: ed25519 PUBLICKEY, then any words, such as whose it is; # begins a comment
private key      PEM (PKCS #8, without a password), mode 0600

KEYID is the beginning of the sha256 of the public key. Signatures and public keys are base64. Without configured keys
nothing is asked of a bundle, and `cryptography`, which belongs to the service, is not imported.
"""

import base64
import binascii
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from seqfraud.errors import BundleError, ConfigError

SIGNATURE = "manifest.sig"
SIGNATURE_BYTES = 64 * 1024
KEYS_BYTES = 1024 * 1024
ALGORITHM = "ed25519"


@dataclass(frozen=True)
class TrustedKeys:
    """Whose signatures count: public keys (32 bytes) by key id, and the file that says so."""

    file: Path
    keys: dict[str, bytes]


def key_id(public: bytes) -> str:
    """16 hexadecimal digits that stand for a public key."""
    return hashlib.sha256(public).hexdigest()[:16]


def read_trusted_keys(file: Path) -> TrustedKeys:
    """The public keys of a file, at least one. Raises ConfigError that names the line."""
    try:
        with file.open("rb") as stream:
            content = stream.read(KEYS_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text") from error
    if len(content) > KEYS_BYTES:
        raise ConfigError(f"{file}: more than {KEYS_BYTES} bytes; expected a few public keys")
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        public = _decoded(words[1]) if len(words) > 1 and words[0] == ALGORITHM else b""
        if len(public) != 32:
            raise ConfigError(f"{file}: line {number}: expected {ALGORITHM} and a public key of 32 bytes in base64")
        keys[key_id(public)] = public
    if not keys:
        raise ConfigError(f"{file}: holds no key; with none, no bundle could be opened")
    return TrustedKeys(file, keys)


def require_signature(manifest: bytes, signatures: bytes | None, trusted: TrustedKeys) -> str:
    """The id of a trusted key that signed a manifest. Raises BundleError where none did.

    Args:
        manifest: the file's bytes.
        signatures: those of manifest.sig; None where there is no such file.
    """
    _require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if signatures is None:
        raise BundleError(f"not signed: there is no {SIGNATURE}; {trusted.file} asks for a signature")
    wrong, strangers = [], []
    for line in signatures.decode("ascii", "replace").splitlines():
        words = line.split()
        if len(words) != 3 or words[0] != ALGORITHM:
            raise BundleError(f"{SIGNATURE}: {line!r:.80} is no signature; expected {ALGORITHM} KEYID SIGNATURE")
        public = trusted.keys.get(words[1])
        if public is None:
            strangers.append(words[1])
            continue
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(_decoded(words[2]), manifest)
        except (InvalidSignature, ValueError):
            wrong.append(words[1])
        else:
            return words[1]
    if wrong:
        raise BundleError(f"{SIGNATURE}: the signature of key {wrong[0]:.40} is not one of this manifest")
    raise BundleError(
        f"{SIGNATURE}: signed by {', '.join(strangers) or 'nobody':.200}; none of them is in {trusted.file}"
    )


def new_key(file: Path) -> str:
    """Write a new private key (mode 0600) and beside it FILE.pub, a line for a file of trusted keys; the key's id.

    Raises ConfigError where one of them is there: a key is never overwritten.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    encoded = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = private.public_key().public_bytes_raw()
    line = f"{ALGORITHM} {base64.b64encode(public).decode()} {file.name}\n"
    for path, content, mode in ((file, encoded, 0o600), (file.with_name(file.name + ".pub"), line.encode(), 0o644)):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be made: {error.strerror}") from error
        with open(descriptor, "wb") as stream:
            stream.write(content)
            os.fsync(stream.fileno())
    return key_id(public)


@dataclass(frozen=True)
class SigningKey:
    """A private key that was read; `seed` is its 32 secret bytes."""

    seed: bytes

    def __repr__(self) -> str:
        return "SigningKey(...)"

    def sign(self, manifest: bytes) -> tuple[str, str]:
        """The key's id and the line of manifest.sig for a manifest's bytes."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        private = Ed25519PrivateKey.from_private_bytes(self.seed)
        identity = key_id(private.public_key().public_bytes_raw())
        return identity, f"{ALGORITHM} {identity} {base64.b64encode(private.sign(manifest)).decode()}\n"


def read_signing_key(file: Path) -> SigningKey:
    """A private key from its file. Raises ConfigError, also where others than its owner may read it."""
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode & 0o777
            content = stream.read(KEYS_BYTES)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"{file}: mode {mode:04o} lets others read a private key; expected 0600: chmod 600 {file}")
    try:
        private = load_pem_private_key(content, password=None)
    except Exception as error:  # cryptography has several kinds
        raise ConfigError(f"{file}: is no private key in PEM without a password") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"{file}: is not an Ed25519 key; `seqfraud sign --new-key FILE` makes one")
    return SigningKey(private.private_bytes_raw())


def _require_cryptography() -> None:
    if importlib.util.find_spec("cryptography") is None:
        raise ConfigError(
            "signatures need the package cryptography, which is not installed: pip install 'seqfraud[serve]'"
        )


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
