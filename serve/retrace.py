"""A decision gone over again: `seqfraud replay --decision`, from the journal and the bundle that decided.

The user's records before it are given, with the contexts that were recorded, to a service of their own in a temporary
folder, by the code of every start; that service then judges the transaction by the code that judged it live. What its
other entities had been through is worked out anew besides, from every record before it, and compared with what was
recorded. Only the log is read, so that a service may be running on the folder.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Bundle
from seqfraud.errors import RunError
from seqfraud.identifiers import Identifiers, read_key
from serve.answers import Answer
from serve.engine import context_key
from serve.identity import CHECK, KEY_FILE
from serve.journal import Journal
from serve.log import read_frames
from serve.memory import Memory
from serve.offline import Labelled
from serve.records import ActionRecord, LabelRecord, Note, Record, TransactionRecord, decode_records
from serve.service import FIELDS, Service, require_fields

TOLERANCE = 1e-5
"""Of a probability, and of a number of a context relative to its size: the parity of the graphs."""
LOG_ODDS_TOLERANCE = 1e-2
"""Of what a reason contributes: near 0 and 1 a little of a probability is much in log-odds."""

_TOLERANCES = {"reasons": LOG_ODDS_TOLERANCE}

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Retraced:
    """What was answered, and what comes out when it is worked out again.

    Attributes:
        seq: number of the transaction's record.
        answered: the answer as it was given.
        derived: the same anew.
        context_difference: largest of a number of the context, as recorded and worked out anew, relative to its size where
            that is above 1; None where it was not worked out.
        differs: names of what is not the same: fields of the answer, `context`.
    """

    seq: int
    answered: Answer
    derived: Answer
    context_difference: float | None
    differs: tuple[str, ...]


def retrace(
    bundle: Bundle,
    state: Path,
    transaction_id: str,
    key_file: Path | None = None,
    with_context: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Retraced:
    """Work a decision out again.

    Args:
        bundle: which decided.
        state: the service's state folder.
        transaction_id: as it was posted, or as it is stored.
        key_file: the identifier key, where ids are hashed and it is not in the state folder.
        with_context: work the context out too, which takes a walk over every record before.
        progress: called with the number of records that were read.

    Raises:
        RunError: there is no journal, no such transaction, another bundle decided, or the journal is damaged.
        ConfigError: the identifier key cannot be used.
    """
    if not (state / "journal").is_dir():
        raise RunError(f"{state}: there is no journal here")
    past = _Past(bundle, state, _names(bundle, state, transaction_id, key_file))
    target = past.find(progress)
    if target is None:
        raise RunError(f"{state}: no transaction of this id was accepted here; a degraded answer is not stored")
    if target.bundle != bundle.id:
        raise RunError(
            f"the transaction was scored by the bundle {target.bundle}; {bundle.path} is {bundle.id}: name the one that "
            "scored it"
        )
    context, records = past.before(target, with_context)
    difference = None if context is None else _largest(np.frombuffer(target.context, dtype=np.float32), context)
    try:
        answered = msgspec.json.decode(target.answer, type=Answer)
    except msgspec.MsgspecError as error:
        raise RunError(f"{state}: record {target.seq} of the journal holds no answer") from error
    derived = _judge(bundle, records, past.notes, target)
    differs = [
        name
        for name in Answer.__struct_fields__
        if not _alike(getattr(answered, name), getattr(derived, name), _TOLERANCES.get(name, TOLERANCE))
    ]
    if difference is not None and not difference <= TOLERANCE:
        differs.append("context")
    return Retraced(target.seq, answered, derived, difference, tuple(differs))


def _names(bundle: Bundle, state: Path, transaction_id: str, key_file: Path | None) -> set[str]:
    """The ids that the transaction may be stored under."""
    path = key_file or (state / KEY_FILE if (state / KEY_FILE).is_file() else None)
    schema = bundle.manifest.schema
    identifiers = Identifiers(schema, bundle.manifest.identifiers, None if path is None else read_key(path))
    return {transaction_id, identifiers.named(schema.transaction, transaction_id)}


class _Past:
    """The log, read from its beginning as often as it takes; the last record that counts is the transaction's."""

    def __init__(self, bundle: Bundle, state: Path, names: set[str]) -> None:
        self._bundle = bundle
        self._state = state
        self._names = names
        self.notes: dict[str, str] = {}
        """As of the transaction."""
        self._labelled: set[str] = set()
        self._others: set[str] = set()
        """Bundles that scored something before it."""

    def find(self, progress: Callable[[int], None] | None) -> TransactionRecord | None:
        """The transaction's record; the notes and the labels before it are remembered."""
        for frame in read_frames(self._state / "journal"):
            for record in decode_records(frame.seq, frame.payload):
                if isinstance(record, Note):
                    self.notes[record.key] = record.value
                    if record.key == FIELDS:
                        require_fields(record.value, self._bundle, self._state)
                elif isinstance(record, LabelRecord):
                    self._labelled.add(record.transaction_id)
                elif isinstance(record, TransactionRecord):
                    if record.id in self._names:
                        return record
                    self._others.add(record.bundle)
            if progress is not None:
                progress(frame.taken)
        return None

    def _reads_alike(self, bundle_id: str) -> bool:
        return self.notes.get(context_key(bundle_id)) == self.notes.get(context_key(self._bundle.id))

    def _records(self, until: int) -> Iterator[Record]:
        for frame in read_frames(self._state / "journal"):
            for record in decode_records(frame.seq, frame.payload):
                if not isinstance(record, Note):
                    if record.seq >= until:
                        return
                    yield record

    def before(self, target: TransactionRecord, with_context: bool) -> tuple[Float32 | None, list[Record]]:
        """The context of the transaction worked out anew, None where not, and what is needed of the records before it.

        That is the user's transactions and everybody's actions. A context that was recorded by a bundle which defines it
        in another way is replaced, as it is in a service's memory.
        """
        if not with_context and all(map(self._reads_alike, self._others)):
            mine = [r for r in self._records(target.seq) if _concerns(r, target.user)]
            return None, mine
        labelled = Labelled(self._labelled)
        memory = Memory(self._bundle, labelled)
        kept: list[Record] = []
        for record in labelled.watched(self._records(target.seq)):
            if isinstance(record, LabelRecord):
                memory.hear(record)
            elif isinstance(record, TransactionRecord):
                taken = memory.take(record, as_recorded=False)
                memory.settle(record.seq, taken.transaction, taken.rows)
                if record.user == target.user and not self._reads_alike(record.bundle):
                    record = replace(record, context=taken.context.tobytes(), bundle=self._bundle.id)
            if _concerns(record, target.user):
                kept.append(record)
        return memory.take(target, as_recorded=False).context, kept


def _concerns(record: Record, user: str) -> bool:
    return isinstance(record, ActionRecord) or (isinstance(record, TransactionRecord) and record.user == user)


def _judge(bundle: Bundle, records: list[Record], notes: dict[str, str], target: TransactionRecord) -> Answer:
    """What a service answers that knows these records and nothing else."""
    with TemporaryDirectory(prefix="seqfraud-replay-") as name:
        folder = Path(name)
        journal = Journal(folder)
        for key, value in notes.items():
            if key != CHECK:  # what is stored is hashed already: the key is not needed
                journal.set_meta(key, value)
        with journal.group():
            for seq, record in enumerate(records, start=1):
                if isinstance(record, TransactionRecord):
                    journal.append_transaction(replace(record, seq=seq))
                elif isinstance(record, ActionRecord):
                    journal.append_action(replace(record, seq=seq))
        journal.close()
        with Service(bundle, folder, snapshot_every=None) as service:
            return service.judge_again(target)


def _largest(recorded: Float32, derived: Float32) -> float:
    if recorded.shape != derived.shape:
        return float("inf")
    return float(np.max(np.abs(recorded - derived) / np.maximum(1, np.abs(recorded)), initial=0.0))


def _alike(a: Any, b: Any, tolerance: float) -> bool:
    """Equal, numbers within a tolerance."""
    a, b = msgspec.to_builtins(a), msgspec.to_builtins(b)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key], tolerance) for key in a)
    return bool(a == b)
