"""Which identifier policy and key a state folder is written with, and whether a bundle and a key fit it.

The journal's notes keep the treatment of every column and a check of the key. A stored value stays as it is for good,
so a value has to be stored the same way as long as the journal lives: another key, or a policy that would store one of
the journal's values in another way, would split its user in two, and is refused.
"""

from pathlib import Path
from typing import Any

import msgspec

from seqfraud.bundle import Manifest
from seqfraud.canonical import canonical_text
from seqfraud.config import Treatment
from seqfraud.errors import RunError
from seqfraud.identifiers import Identifiers, is_hashed, is_stored_form, key_check, make_key, read_key, treatments
from serve.journal import Journal, TransactionRecord

KEY_FILE = "identifier.key"
POLICY = "identifiers"
"""Key of the journal's note with the treatment of every column."""
CHECK = "identifier key"
"""Key of the journal's note that tells its key from others."""


def open_identifiers(state: Path, journal: Journal, manifest: Manifest, key_file: Path | None) -> Identifiers:
    """The identifiers of a state folder; a key is made where none was ever used.

    Args:
        key_file: the key; None: `identifier.key` in the state folder.

    Raises:
        RunError: the policy or the key is not the journal's, or the key is gone.
        ConfigError: the key's file cannot be used.
        OSError: a key cannot be written.
    """
    wanted = treatments(manifest.schema, manifest.identifiers)
    _require_policy(state, journal, wanted)
    key = None
    if any(treatment != "keep" for treatment in wanted.values()):
        key = _key(state, journal, key_file)
        journal.set_meta(CHECK, key_check(key))
    journal.set_meta(POLICY, msgspec.json.encode(dict(sorted(wanted.items()))).decode())
    return Identifiers(manifest.schema, manifest.identifiers, key)


def _key(state: Path, journal: Journal, key_file: Path | None) -> bytes:
    path = key_file or state / KEY_FILE
    noted = journal.meta(CHECK) if journal.last_seq else None
    if key_file is None and not path.exists():
        if noted is None:
            return make_key(path)
        raise RunError(
            f"{path}: the identifier key is gone. The {journal.last_seq:,} records of the journal were hashed with it, "
            "and with a new one every user would begin anew: put the file back from a copy, or name it with "
            "--identifier-key"
        )
    key = read_key(path)
    if noted is not None and noted != key_check(key):
        raise RunError(
            f"{path}: not the identifier key that the journal of {state} is written with; with another one every user "
            "would begin anew"
        )
    return key


def _require_policy(state: Path, journal: Journal, wanted: dict[str, Treatment]) -> None:
    """Raises RunError where stored values would be stored in another way now."""
    if not journal.last_seq:
        return
    noted = journal.meta(POLICY)
    # a journal from before there was a policy kept everything
    before: dict[str, Treatment] = msgspec.json.decode(noted) if noted is not None else dict.fromkeys(wanted, "keep")
    changed = {c: t for c, t in wanted.items() if before.get(c) != t}
    for column, treatment in changed.items():
        if "hash" in (treatment, before.get(column)):
            raise _other_policy(state, column, f'"{before.get(column)}"', treatment)
    if not changed:
        return
    # between "keep" and "cards" the difference is in the values
    for record in journal.after(0):
        if isinstance(record, TransactionRecord):
            row: dict[str, Any] = msgspec.json.decode(record.raw)
            for column, treatment in changed.items():
                value = row.get(column)
                if value is not None and not _stored_alike(treatment, canonical_text(value)):
                    words = f'"{before.get(column)}", record {record.seq} among them'
                    raise _other_policy(state, column, words, treatment)


def _stored_alike(treatment: Treatment, text: str) -> bool:
    """Whether a stored value is what "cards", or "keep", would have stored."""
    if treatment == "keep":
        return not is_stored_form(text)
    return is_stored_form(text) or not is_hashed(treatment, text)


def _other_policy(state: Path, column: str, before: str, treatment: Treatment) -> RunError:
    return RunError(
        f"{state}: the journal holds values of {column} stored by the identifier policy {before}; the bundle says "
        f'"{treatment}", by which their users and entities would begin anew. Say so in [identifiers] of the '
        "configuration and export again, or load the history into a new state folder"
    )
