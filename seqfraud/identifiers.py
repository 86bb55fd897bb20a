"""Identifiers by keyed hashing: what stands for a card number wherever something is stored.

One policy per column (`[identifiers]` of the configuration, in the manifest), one key per service, one definition for a
value (`stored`) and for a column (`coded`). A hashed value is `hmac:` and 32 hexadecimal digits, the first half of
HMAC-SHA256 of its text: the same value gives the same text in every column, so that what is stored can still be joined,
and probabilities are what they would be without. A hashed IP address also carries the hash of its network, which is its
context entity: `hmac:ADDRESS/NETWORK`.

Hashed is what a client sends, never what is stored. Where values are hashed at all, one that is sent in the form of a
hashed one is hashed like a card number, so that nobody passes for another user by it.
"""

import hmac
import logging
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from seqfraud.canonical import HASHED_PREFIX, network_of
from seqfraud.config import IdentifiersConfig, Treatment
from seqfraud.errors import ConfigError
from seqfraud.files import replaced_file, sync_folder
from seqfraud.schema import Schema
from seqfraud.table import Coded, Int64, Transactions

_log = logging.getLogger(__name__)

KEY_BYTES = 32
HASH_BYTES = 16

FEWEST_DIGITS, MOST_DIGITS = 13, 19
_CARD = re.compile(r"\s*\d(?:[ -]?\d){12,18}\s*")
_MAY_BE_HASHED = re.compile(rf"\s*\d(?:[ -]?\d){{12}}|{HASHED_PREFIX}")
"""What "cards" looks at twice: for all other values this is all they cost."""
_STORED = re.compile(rf"{HASHED_PREFIX}[0-9a-f]{{32}}(?:/[0-9a-f]{{32}})?")
_BETWEEN = b" -\t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"
_FIGURES = bytes.maketrans(b"0123456789", bytes(range(10)))
_DOUBLED = bytes.maketrans(bytes(range(10)), bytes([0, 2, 4, 6, 8, 1, 3, 5, 7, 9]))
"""Sum of the digits of twice a digit."""
_CHECKED = b"the constant that tells whether two keys are the same"


def looks_like_card(text: str) -> bool:
    """Whether a text is 13 to 19 digits that satisfy Luhn's checksum, perhaps with single spaces or hyphens between.

    One number in ten of that length does, whatever it counts.
    """
    if len(text) < FEWEST_DIGITS or not ((text.isdecimal() and len(text) <= MOST_DIGITS) or _CARD.fullmatch(text)):
        return False
    if not text.isascii():  # digits of another script are digits
        text = "".join([str(int(c)) for c in text if c.isdecimal()])
    digits = text.encode().translate(_FIGURES, _BETWEEN)
    return (sum(digits[-1::-2]) + sum(digits[-2::-2].translate(_DOUBLED))) % 10 == 0


def is_stored_form(text: str) -> bool:
    """Whether a text has the form that hashed values are stored in."""
    return _STORED.fullmatch(text) is not None


def is_hashed(treatment: Treatment, text: str) -> bool:
    """Whether a value that is sent in a column of this treatment is hashed."""
    if treatment == "cards":
        return len(text) >= FEWEST_DIGITS and (looks_like_card(text) or text.startswith(HASHED_PREFIX))
    return treatment == "hash"


def treatments(schema: Schema, policy: IdentifiersConfig) -> dict[str, Treatment]:
    """What becomes of the texts of each column that holds some.

    The default is not for the id of a transaction, which may be a counter and would look like a card one time in ten,
    and a categorical column, whose values are in the bundle, is not hashed by default beyond its cards.
    """
    out: dict[str, Treatment] = {}
    for column in (schema.user, *schema.texts):
        default: Treatment = "cards" if policy.default == "hash" and column in schema.categorical else policy.default
        out[column] = policy.columns.get(column, default)
    if schema.transaction is not None:
        out.setdefault(schema.transaction, policy.columns.get(schema.transaction, "keep"))
    return out


class Identifiers:
    """A policy and a key. Without a key nothing is hashed: a file's own spelling, for offline work."""

    def __init__(self, schema: Schema, policy: IdentifiersConfig, key: bytes | None) -> None:
        self._schema = schema
        self._mac = None if key is None else hmac.new(key, digestmod="sha256")
        self.treatments = treatments(schema, policy) if key is not None else {}
        """By column; a column that is not there is kept."""

    def shortest(self, column: str) -> int:
        """Values of fewer characters are kept as they are, as the quickest test there is."""
        return FEWEST_DIGITS if self.treatments.get(column) == "cards" else 0

    def of(self, column: str) -> Callable[[str], str] | None:
        """What makes the stored text of a canonical one of this column; None where all are kept.

        What is kept comes back as the same object.
        """
        treatment = self.treatments.get(column, "keep")
        if treatment == "keep":
            return None
        whole = self.hashed_address if column in self._schema.ip else self.hashed
        return whole if treatment == "hash" else self.without_cards

    def stored(self, column: str, text: str) -> str:
        """The stored text of a canonical one."""
        hashed = self.of(column)
        return text if hashed is None else hashed(text)

    def named(self, column: str | None, text: str) -> str:
        """The stored text of what names something that was stored: as a client sent it, or as answers show it."""
        return text if column is None or is_stored_form(text) else self.stored(column, text)

    def hashed(self, text: str) -> str:
        """The keyed hash of a text in its stored form."""
        return HASHED_PREFIX + self._digest(text)

    def hashed_address(self, text: str) -> str:
        """The keyed hash of an IP address, and behind it that of its network; the former alone for any other text."""
        network = network_of(text)
        return self.hashed(text) if network is None else f"{self.hashed(text)}/{self._digest(network)}"

    def without_cards(self, text: str) -> str:
        """The text itself, or its hash where it looks like a card number or like a hash; always the text without a key."""
        if not (text.isdecimal() or _MAY_BE_HASHED.match(text)) or self._mac is None or not is_hashed("cards", text):
            return text
        return self.hashed(text)

    def _digest(self, text: str) -> str:
        assert self._mac is not None
        mac = self._mac.copy()  # of the key alone: a third quicker than to begin with the key
        mac.update(text.encode("utf-8", "surrogatepass"))
        return mac.digest()[:HASH_BYTES].hex()

    # ---- columns

    def coded(self, column: str, texts: Coded) -> Coded:
        """The stored texts of a column; each distinct value is looked at once."""
        hashed = self.of(column)
        return texts if hashed is None else Coded(texts.codes, [hashed(text) for text in texts.values])

    def table(self, table: Transactions) -> Transactions:
        """A table as the service would have stored it; ids that are derived then are the service's too."""
        schema = self._schema
        texts = tuple(self.coded(c, texts) for c, texts in zip(schema.texts, table.texts, strict=True))
        return replace(table, user=self.coded(schema.user, table.user), texts=texts, ids=self._ids(table.ids))

    def _ids(self, ids: Coded | Int64 | None) -> Coded | Int64 | None:
        column = self._schema.transaction
        if ids is None or column is None or self.of(column) is None:
            return ids
        if isinstance(ids, Coded):
            return self.coded(column, ids)
        values, codes = np.unique(ids, return_inverse=True)
        return self.coded(column, Coded(codes.astype(np.int32), [str(i) for i in values.tolist()]))


# ---- the key


def key_check(key: bytes) -> str:
    """Tells whether two keys are the same, and nothing else about them."""
    return hmac.digest(key, _CHECKED, "sha256").hex()


def read_key(path: Path) -> bytes:
    """The key in a file: 64 hexadecimal digits. Raises ConfigError where there is none or where others may read it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(4096)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such identifier key; make one with: (umask 077; openssl rand -hex {KEY_BYTES} > {path})"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: the identifier key cannot be read: {error.strerror}") from error
    if mode & 0o027:
        raise ConfigError(f"{path}: mode {mode & 0o777:04o}: others may read the identifier key; chmod 600 {path}")
    if mode & 0o040:
        _log.warning("%s: the file's group may read the identifier key", path)
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{path}: not an identifier key; expected {2 * KEY_BYTES} hexadecimal digits")
    return key


def make_key(path: Path) -> bytes:
    """A new key in a file that only its owner may read; on disk under its name when this returns. OSError."""
    key = secrets.token_bytes(KEY_BYTES)
    with replaced_file(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(key.hex() + "\n")
            file.flush()
            os.fsync(descriptor)
    sync_folder(path.parent)
    return key
