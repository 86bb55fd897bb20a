"""The scoring service: decode -> look up -> context -> graph -> journal -> commit to memory.

The journal is the truth and memory its fold: a transaction changes memory only after its record is stored, and
`Service.open` rebuilds memory from the newest snapshot and the records after it by the same code that scores live.
"""

import fcntl
import logging
import os
import threading
import time as clock_time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Bundle
from seqfraud.errors import JournalError, RequestError, RunError, SeqfraudError
from seqfraud.policy import decide
from seqfraud.runtime import SequenceGraph, StepGraph
from serve.capture import Capture
from serve.decoding import SaidLabel, Transaction, decode_labels
from serve.journal import Journal, LabelRecord, Promise, TransactionRecord
from serve.log import SYSTEM_DISK, Disk
from serve.memory import Memory
from serve.records import Record
from serve.snapshot import Pause, Piece, Snapshotter, read_newest, write_snapshot

_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

SNAPSHOT_S = 300.0
"""Seconds between snapshots."""
SNAPSHOT_RECORDS = 5000
"""Fewer records are not worth one; a start folds them in within a second."""


FIELDS = "fields"
"""Key of the journal's note that says which fields its transactions have."""
FOLD_ABOVE = 5_000
"""As many as a snapshot is worth (SNAPSHOT_RECORDS): one by one they are still quick."""


class Answer(msgspec.Struct):
    """The answer to one transaction, as HTTP gives it."""

    transaction_id: str
    fraud_probability: float
    is_fraud: bool
    decision: str
    reasons: list[str]
    model: str
    history: int
    late: bool
    duplicate: bool


@dataclass(slots=True, frozen=True)
class Scored:
    """What the graph said of a transaction and what it takes to commit it."""

    probability: float
    history: int
    late: bool
    commit: Callable[[], None]


def system_clock() -> int:
    """Milliseconds since the epoch."""
    return clock_time.time_ns() // 1_000_000


class Service:
    """One bundle over one state folder. Thread-safe: one lock around everything that reads or changes state."""

    def __init__(
        self,
        bundle: Bundle,
        state: Path,
        clock: Callable[[], int] = system_clock,
        promise: Promise = "process",
        disk: Disk = SYSTEM_DISK,
        snapshot_every: float | None = SNAPSHOT_S,
        snapshot_records: int = SNAPSHOT_RECORDS,
        fold_above: int = FOLD_ABOVE,
    ) -> None:
        """Open the state folder and rebuild memory. Raises RunError where another process has it.

        Args:
            promise: with `disk`, what answers `score`, `score_batch` and `add_labels` is on disk before they return.
            disk: what writes and syncs.
            snapshot_every: seconds between snapshots taken while the service runs; None: only `close` takes one.
            snapshot_records: such a snapshot is taken only if so many records came since the last.
            fold_above: more records than this are folded into memory in batches, which is quicker, and exact to the
                parity of the two graphs; fewer one by one, which gives the bits that scoring gave.
        """
        self.bundle = bundle
        self._clock = clock
        manifest = bundle.manifest
        self._thresholds = manifest.thresholds
        self._max_batch = manifest.serve.max_batch
        self._spec = manifest.graph
        self._step = StepGraph(bundle.step, manifest.graph)
        self._sequence = SequenceGraph(bundle.sequence, manifest.graph)
        self._lock = threading.RLock()
        self._snapshotting = threading.RLock()
        """Held while a snapshot is taken, which is before the service's lock, never after it."""
        self._snapshot_records = snapshot_records
        self._fold_above = fold_above
        self._state = state
        self._encode = msgspec.json.Encoder().encode
        self._ready = False
        self.before_waiting: Callable[[], None] = lambda: None
        """Called by a thread that is about to wait for the disk, so that others may be let in meanwhile."""
        self.check_deadline: Callable[[], None] = lambda: None
        """Called before anything is changed; raises RequestError where the request's time is over."""
        with ExitStack() as opened:
            self._folder_lock = lock_folder(state)
            opened.callback(self._folder_lock.release)
            self._journal = Journal(state, promise, disk=disk)
            opened.callback(self._journal.close)
            seen = self._journal.meta(FIELDS)
            if seen is None:
                self._journal.set_meta(FIELDS, ",".join(manifest.schema.fields))
            else:
                require_fields(seen, bundle, state)
            self._rebuild()
            opened.pop_all()
        self._snapshotter = (
            None if snapshot_every is None else Snapshotter(self.snapshot, self._snapshot_due, snapshot_every)
        )

    # ---- start and stop

    def _rebuild(self) -> None:
        """Memory from the newest snapshot of this bundle and the records after it."""
        _note_context(self._journal, self.bundle)
        reads_alike = _ReadsAlike(self._journal, self.bundle.id)
        since = read_newest(self._state, self.bundle.id, self._journal.last_seq, self._remember)
        if since is None:
            since = 0
            self._remember(())
        self._snapshot_seq = since
        began, count = clock_time.perf_counter(), self._journal.last_seq - since
        if count > self._fold_above:
            for _ in self._memory.fold(self._journal.after(since), reads_alike.__getitem__, self._sequence):
                pass
        else:
            for record in self._journal.after(since):
                self._replay(record, reads_alike)
        if count:
            seconds = clock_time.perf_counter() - began
            _log.info("%d journal records after %d folded into memory in %.1f s", count, since, seconds)
        self._ready = True

    def _remember(self, pieces: Iterable[Piece]) -> None:
        """Memory from a snapshot's pieces and nothing else."""
        memory = self._memory = Memory(self.bundle, self._journal, pieces)
        self._users, self._context, self._labels = memory.users, memory.context, memory.labels
        self._decoder = memory.decoder

    def _replay(self, record: Record, reads_alike: "_ReadsAlike") -> None:
        """Fold one record into memory by the graph that scored it; a context as recorded, if it is defined alike."""
        if isinstance(record, LabelRecord):
            self._memory.hear(record)
            return
        taken = self._memory.take(record, reads_alike[record.bundle])
        self._score(taken.transaction, taken.context).commit()
        self._memory.settle(record.seq, taken.transaction, taken.rows)

    def close(self) -> None:
        """Write a snapshot and let the state folder go."""
        self._stop_snapshots()
        with self._snapshotting, self._lock:
            if self._ready:
                try:
                    self.snapshot(pause=_no_pause)
                except (OSError, SeqfraudError) as error:  # it only saves time
                    _log.error("no snapshot: %s", error)
                self.abandon()

    def abandon(self) -> None:
        """Let the state folder go without a snapshot, as a crash would."""
        with self._lock:
            if not self._ready:
                return
            self._ready = False  # a snapshot that is being taken gets no name any more
            self._journal.close()
        self._stop_snapshots()
        with self._snapshotting:
            self._folder_lock.release()

    def _stop_snapshots(self) -> None:
        if self._snapshotter is not None:
            self._snapshotter.stop()

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def snapshot(self, pause: Pause = clock_time.sleep) -> None:
        """Write memory as of the last record, so that the next start replays only what comes after.

        Scoring goes on meanwhile. `pause` gives up the processor for so many seconds between two pieces.
        """
        with self._snapshotting:
            with self._lock:
                seq = self._journal.last_seq
                capture = Capture(self._lock, self._users, self._context, self._labels, self._memory.early, pause)
            try:
                write_snapshot(self._state, self.bundle.id, seq, capture.pieces(), self._wait_synced)
            finally:
                with self._lock:
                    capture.end()
            self._snapshot_seq = seq

    def _snapshot_due(self) -> bool:
        return self._journal.last_seq - self._snapshot_seq >= self._snapshot_records

    def _wait_synced(self, seq: int) -> None:
        """Return once the journal is sure to have a record; a snapshot may not know more than the journal."""
        self._journal.wait_durable(seq)
        if not self._ready:
            raise RunError(f"{self._state}: the service was abandoned while a snapshot was being taken")

    # ---- scoring

    def score(self, body: bytes) -> bytes:
        """One transaction as JSON -> its answer as JSON. Raises RequestError."""
        answer = self._encode(self.score_one(self._decoder.decode(body)))
        self._wait_durable(self._journal.last_seq)
        return answer

    def score_batch(self, body: bytes) -> bytes:
        """A JSON array of transactions -> `{"results": [...]}`: what its items posted one by one would be."""
        items = self._decoder.decode_batch(body)
        if len(items) > self._max_batch:
            raise RequestError(
                413, "batch_too_large", f"{len(items)} transactions; at most {self._max_batch} per batch"
            )
        results: list[Answer | dict[str, Any]] = []
        for item in items:
            try:
                results.append(self.score_one(self._decoder.decode(item)))
            except RequestError as error:
                results.append({"error": {"code": error.code, "message": error.message, "field": error.field}})
        self._wait_durable(self._journal.last_seq)
        return self._encode({"results": results})

    def score_one(self, transaction: Transaction) -> Answer:
        """Score, store and commit one transaction; a known id gives the answer of the first time."""
        try:
            with self._lock:
                self._require_ready()
                self.check_deadline()
                known = self._journal.transaction(transaction.id)
                return self._score_new(transaction) if known is None else self._again(known, transaction)
        except JournalError as error:
            _log.error("journal: %s", error)
            message = "the transaction could not be stored; nothing changed"
            raise RequestError(503, "storage_unavailable", message) from None

    def _score_new(self, transaction: Transaction) -> Answer:
        users, entities = len(self._users.slots), len(self._context.rows)
        undo = self._labels.advance(transaction.time)
        try:
            rows = self._context.rows_of(transaction.entities)
            context = self._context.read(rows, transaction.time).astype(np.float32)
            scored = self._score(transaction, context)
            answer = self._answer(transaction, scored)
            seq = self._journal.last_seq + 1
            self._journal.append_transaction(
                TransactionRecord(
                    seq=seq,
                    id=transaction.id,
                    user=transaction.user,
                    time=transaction.time,
                    content=transaction.content,
                    raw=transaction.raw,
                    context=context.tobytes(),
                    answer=self._encode(answer),
                    bundle=self.bundle.id,
                )
            )
        except BaseException:
            self._labels.take_back(undo)
            self._users.forget_newest(users)
            self._context.forget_newest(entities)
            raise
        scored.commit()
        self._memory.settle(seq, transaction, rows)
        return answer

    def _again(self, known: TransactionRecord, transaction: Transaction) -> Answer:
        if known.content != transaction.content:
            raise RequestError(
                409,
                "conflict",
                f"transaction {transaction.id!r:.80} was scored before with other content",
                self.bundle.manifest.schema.transaction or "",
            )
        answer = msgspec.json.decode(known.answer, type=Answer)
        answer.duplicate = True
        return answer

    def _answer(self, transaction: Transaction, scored: Scored) -> Answer:
        return Answer(
            transaction_id=transaction.id,
            fraud_probability=scored.probability,
            is_fraud=scored.probability >= self._thresholds.is_fraud,
            decision=decide(scored.probability, self._thresholds),
            reasons=[],
            model=self.bundle.id,
            history=scored.history,
            late=scored.late,
            duplicate=False,
        )

    def _score(self, transaction: Transaction, context: npt.NDArray[np.float32]) -> Scored:
        """Run the step graph at the transaction's place in its user's history; memory is changed only by `commit`."""
        users, step, spec = self._users, self._step, self._spec
        slot = users.slot(transaction.user)
        step.inputs["integers"][0, 0] = transaction.time
        step.inputs["integers"][0, 1:] = transaction.categories
        if "values" in step.inputs:
            step.inputs["values"][0, : spec.numeric] = transaction.numbers[: spec.numeric]
            step.inputs["values"][0, spec.numeric :] = context
        if not users.is_late(slot, transaction.time):
            self._run_step({s.name: s.to_batch(users.now[s.name][slot : slot + 1]) for s in spec.states})
            history = int(users.accepted[slot])

            def commit() -> None:
                users.append(slot, transaction.time, step)
                users.count(slot)

            return Scored(float(step.outputs["probability"][0]), history, False, commit)
        history = self._journal.events_before(transaction.user, transaction.time)
        if users.is_too_late(slot, transaction.time):
            self._run_step(users.anchor_states(slot))

            def count() -> None:
                users.count(slot)

            return Scored(float(step.outputs["probability"][0]), history, True, count)
        place = users.place_of(slot, transaction.time)
        self._run_step(users.states_at(slot, place, self._sequence))
        integers = step.inputs["integers"][0].copy()
        values = step.inputs["values"][0].copy() if "values" in step.inputs else None

        def insert() -> None:
            users.insert(slot, place, integers, values, self._sequence)
            users.count(slot)

        return Scored(float(step.outputs["probability"][0]), history, True, insert)

    def _run_step(self, states: dict[str, Array]) -> None:
        for name, value in states.items():
            self._step.inputs[name][...] = value
        self._step.run_bound()

    def _wait_durable(self, seq: int) -> None:
        """Keep the promise for every record up to `seq`; outside the lock, so that others come to share the sync."""
        try:
            self._journal.wait_durable(seq, self.before_waiting)
        except JournalError as error:
            message = "what was asked may be stored or not; ask again when the service has been started again"
            raise RequestError(503, "storage_unavailable", message) from error

    # ---- labels

    def add_labels(self, body: bytes) -> bytes:
        """A JSON array of labels -> how many were new, changed, unchanged, and of unknown transactions."""
        answer = self._encode(self.hear_labels(decode_labels(body)))
        self._wait_durable(self._journal.last_seq)
        return answer

    def hear_labels(self, labels: list[SaidLabel]) -> dict[str, int]:
        """Store labels, all or none, and let them wait for their time. Labels of unknown transactions are kept."""
        with self._lock:
            self._require_ready()
            self.check_deadline()
            try:
                counts, records = self._store_labels(labels)
            except JournalError as error:
                _log.error("journal: %s", error)
                message = "the labels could not be stored; nothing changed"
                raise RequestError(503, "storage_unavailable", message) from None
            for record in records:
                self._memory.hear(record)
            return counts

    def _store_labels(self, labels: list[SaidLabel]) -> tuple[dict[str, int], list[LabelRecord]]:
        counts = {"new": 0, "changed": 0, "unchanged": 0, "unknown": 0}
        now = self._clock()
        seq = self._journal.last_seq
        records: list[LabelRecord] = []
        newest: dict[str, bool] = {}
        for label in labels:
            identity = label.transaction_id
            if identity not in newest:
                said = self._journal.last_label(identity)
                if said is not None:
                    newest[identity] = said.is_fraud
            before = newest.get(identity)
            if before == label.is_fraud:
                counts["unchanged"] += 1
                continue
            if self._journal.seq_of(identity) is None:
                counts["unknown"] += 1
            else:
                counts["new" if before is None else "changed"] += 1
            newest[identity] = label.is_fraud
            seq += 1
            known_at = now if label.known_at is None else label.known_at
            records.append(LabelRecord(seq, identity, label.is_fraud, known_at, now, label.source))
        self._journal.append_labels(records)
        return counts, records

    # ---- looking

    def transaction(self, transaction_id: str) -> bytes:
        """The answer as it was given. Raises RequestError 404."""
        with self._lock, _readable():
            record = self._journal.transaction(transaction_id)
        if record is None:
            raise RequestError(404, "unknown_transaction", f"no transaction {transaction_id!r:.80} was scored here")
        return record.answer

    def user(self, user: str) -> bytes:
        """The recent events of a user, newest first, with scores and decisions. Raises RequestError 404."""
        with self._lock, _readable():
            slot = self._users.slots.get(user)
            if slot is None or not self._users.accepted[slot]:
                raise RequestError(404, "unknown_user", f"no transaction of user {user!r:.80} was scored here")
            accepted = int(self._users.accepted[slot])
            records = self._journal.recent(user, 2 * self._users.window)
        events = [{"transaction": msgspec.Raw(record.raw), "answer": msgspec.Raw(record.answer)} for record in records]
        return self._encode({"user": user, "history": accepted, "events": events})

    def model(self) -> bytes:
        """The bundle in force."""
        manifest = self.bundle.manifest
        with self._lock:
            users, records = len(self._users.slots), self._journal.last_seq
        return self._encode(
            {
                "model": self.bundle.id,
                "kind": manifest.kind,
                "schema": manifest.schema.as_dict(),
                "label": msgspec.to_builtins(manifest.label),
                "cleaning": msgspec.to_builtins(manifest.cleaning),
                "context": msgspec.to_builtins(manifest.context),
                "thresholds": manifest.thresholds.as_dict(),
                "metrics": dict(manifest.metrics),
                "versions": dict(manifest.versions),
                "shadow": [],
                "users": users,
                "journal_records": records,
            }
        )

    def ready(self) -> bool:
        """Whether a transaction posted now would be scored."""
        return self._ready and not self._journal.failed

    def _require_ready(self) -> None:
        if not self._ready:
            raise RequestError(503, "not_ready", "the service is starting or stopping; try again")

    # ---- bulk

    @property
    def journal(self) -> Journal:
        """For backfills that group records."""
        return self._journal

    def decode(self, row: dict[str, Any]) -> Transaction:
        """A transaction from plain data, through the decoder that requests go through."""
        return self._decoder.decode(self._encode(row))


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except JournalError as error:
        _log.error("journal: %s", error)
        raise RequestError(503, "storage_unavailable", "the journal cannot be read now") from error


def _no_pause(seconds: float) -> None:
    """Nobody waits for the processor."""


class FolderLock:
    """Advisory lock of a state folder; the system lets it go when the process ends, however it ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Let another process have the folder."""
        os.close(self._descriptor)


def lock_folder(state: Path) -> FolderLock:
    """Take a state folder for this process. Raises RunError where another has it."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RunError(f"{state}: cannot be used as a state folder: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RunError(f"{state}: another process is using this state folder") from None
    return FolderLock(descriptor)


def require_fields(seen: str, bundle: Bundle, state: Path) -> None:
    """A journal belongs to one set of declared fields. Raises RunError for a bundle with another."""
    declared = ",".join(bundle.manifest.schema.fields)
    if seen != declared:
        raise RunError(f"{state}: the journal holds the fields {seen}; the bundle declares {declared}")


def _note_context(journal: Journal, bundle: Bundle) -> None:
    """Keep a bundle's definition of the context, which outlives the bundle in the records that it wrote."""
    journal.set_meta(_context_key(bundle.id), msgspec.json.encode(bundle.manifest.context).decode())


def _context_key(bundle_id: str) -> str:
    return f"context of {bundle_id}"


class _ReadsAlike(dict[str, bool]):
    """Bundle id -> whether what it read as context is what the bundle `own` would read."""

    def __init__(self, journal: Journal, own: str) -> None:
        self._journal = journal
        self._own = journal.meta(_context_key(own))

    def __missing__(self, bundle_id: str) -> bool:
        self[bundle_id] = self._journal.meta(_context_key(bundle_id)) == self._own
        return self[bundle_id]
