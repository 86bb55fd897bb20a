"""The control share: declined transactions that are let through at random, so that what they were becomes known.

Which ones is a keyed hash of the id; the key is a note of the journal, and so is the share of every bundle that had one. So a
retry, a rebuild and `seqfraud replay --decision` come to the same, and whoever reads the journal knows what a transaction
that was let through stands for.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from seqfraud.bundle import Bundle
from seqfraud.policy import let_through
from serve.answers import Answer
from serve.journal import Journal

KEY = "control key"
"""Key of the journal's note with the key, hexadecimal."""
KEY_BYTES = 32
_SHARE = "control share of "


@dataclass(slots=True, frozen=True)
class Control:
    """A share and a key."""

    key: bytes
    share: float

    def spares(self, answer: Answer) -> bool:
        """Whether a transaction that is declined is let through; one that a rule or a list speaks of never is.

        Called before the model's reasons are added.
        """
        return (
            answer.decision == "decline"
            and not answer.reasons
            and let_through(self.key, answer.transaction_id, self.share)
        )


def open_control(journal: Journal, bundle: Bundle) -> Control | None:
    """The control share of a bundle on a journal, noted there before it is used; None where it is 0. JournalError."""
    share = bundle.manifest.policy.control_share
    if not share:
        return None
    key = journal.meta(KEY)
    if key is None:
        key = secrets.token_hex(KEY_BYTES)
        journal.set_meta(KEY, key)
    journal.set_meta(_SHARE + bundle.id, repr(share))
    return Control(bytes.fromhex(key), share)


def control_shares(notes: Mapping[str, str]) -> dict[str, float]:
    """By bundle id, from the journal's notes; those without one are not there."""
    return {name.removeprefix(_SHARE): float(share) for name, share in notes.items() if name.startswith(_SHARE)}
