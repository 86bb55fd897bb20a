"""The journal: every accepted transaction with its answer, every label and action, in one arrival sequence.

The log (`log.py`) is the truth: a record is accepted once its frame is written. SQLite (`index.py`) follows a moment
behind. Until it has, the records of that moment are looked up in memory, so that together they are always complete.
Two threads of the journal's own do what may take long: one syncs the log, one folds what is synced into the index.
"""

import logging
import sqlite3
import threading
import time as clock_time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from seqfraud.errors import JournalError, RunError
from seqfraud.files import sync_folder
from serve.index import Batch, Folded, Index, build_index, open_index
from serve.log import SEGMENT_BYTES, SYSTEM_DISK, BadFrameError, Disk, Frame, Log, spell_head
from serve.records import (
    ActionRecord,
    LabelRecord,
    Note,
    Record,
    TransactionRecord,
    decode_records,
    encode_action,
    encode_labels,
    encode_note,
    encode_transaction,
)
from serve.recovery import recover

__all__ = ["ActionRecord", "Journal", "LabelRecord", "Promise", "TransactionRecord"]

_log = logging.getLogger(__name__)

Promise = Literal["process", "disk"]
"""What an answer stands on: `process` survives the death of the process, `disk` a power cut too."""

_R = TypeVar("_R", LabelRecord, ActionRecord)

SYNC_MS = 50.0
TAIL_RECORDS = 20_000
FOLDED_AT_ONCE = 5_000
RETRY_SECONDS = 1.0


class _Tail:
    """The records that the index does not have yet. Changed under the journal's lock, read by anybody."""

    def __init__(self) -> None:
        self.by_seq: dict[int, tuple[Record, int]] = {}
        """With the position of the frame."""
        self.by_id: dict[str, TransactionRecord] = {}
        self.labels: dict[str, LabelRecord] = {}
        self.notes: list[tuple[Note, int]] = []

    def add(self, record: Record, position: int) -> None:
        self.by_seq[record.seq] = (record, position)
        if isinstance(record, TransactionRecord):
            self.by_id[record.id] = record
        elif isinstance(record, LabelRecord):
            self.labels[record.transaction_id] = record

    def forget(self, seq: int) -> None:
        record, _ = self.by_seq.pop(seq)
        if isinstance(record, TransactionRecord):
            del self.by_id[record.id]
        elif isinstance(record, LabelRecord) and self.labels[record.transaction_id] is record:
            del self.labels[record.transaction_id]

    def take_back(self, seqs: range, position: int) -> None:
        for seq in seqs:
            self.forget(seq)
        kept = [record for record, _ in self.by_seq.values() if isinstance(record, LabelRecord)]
        self.labels = {record.transaction_id: record for record in kept}
        self.notes = [(note, at) for note, at in self.notes if at < position]

    def transactions_of(self, user: str) -> list[TransactionRecord]:
        held = list(self.by_id.values())  # a copy: records come and go meanwhile
        return [record for record in held if record.user == user]

    def labels_of(self, identity: str) -> list[LabelRecord]:
        if identity not in self.labels:
            return []
        held = list(self.by_seq.values())
        return [record for record, _ in held if isinstance(record, LabelRecord) and record.transaction_id == identity]

    def actions(self, kinds: Sequence[str], after_seq: int) -> list[ActionRecord]:
        held = list(self.by_seq.values())
        return [r for r, _ in held if isinstance(r, ActionRecord) and r.seq > after_seq and r.kind in kinds]

    def items(self, seqs: range, position: int) -> list[tuple[Record | Note, int]]:
        """What is to be folded: the records of these numbers, and the notes before a position."""
        notes = [(note, at) for note, at in list(self.notes) if at < position]
        return [*notes, *(self.by_seq[seq] for seq in seqs)]


class Journal:
    """Append and look up; sequence numbers start at 1 and count transactions, labels and actions alike, notes not.

    Appending and looking up are for one thread at a time (the service's lock); `wait_durable` is for any. Whatever
    cannot be stored or read raises JournalError and changes nothing.
    """

    def __init__(
        self,
        state: Path,
        promise: Promise = "process",
        *,
        sync_ms: float = SYNC_MS,
        disk: Disk = SYSTEM_DISK,
        segment_bytes: int = SEGMENT_BYTES,
        tail_records: int = TAIL_RECORDS,
    ) -> None:
        """Open or make the journal of a state folder.

        Args:
            state: the folder; the log is in its `journal`, the index is its `journal.sqlite`.
            promise: what `wait_durable` waits for.
            sync_ms: the log is synced at most so many milliseconds after a record; at once with `disk`.
            disk: what writes and syncs.
            segment_bytes: size at which a new file is begun.
            tail_records: appending waits where the index is so many records behind.

        Raises:
            RunError: damaged, of a newer format, or it cannot be opened; the message says what to do.
        """
        self._waits_for_disk = promise == "disk"
        self._sync_seconds = 0.0 if self._waits_for_disk else sync_ms / 1000
        self._fold_seconds = sync_ms / 1000
        self._tail = _Tail()
        self._tail_records = tail_records
        self._grouped = False
        self._oldest: float | None = None
        self._sync_error = self._fold_error = ""
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._to_sync, self._to_fold, self._room = (threading.Condition(self._lock) for _ in range(3))
        self._durable, self._indexed = threading.Condition(), threading.Condition()
        self.index_path = state / "journal.sqlite"
        """For readers with connections of their own: it holds nothing but what was synced."""
        self.after_fold: Callable[[], None] = lambda: None
        """Called by the thread that folds, when the index has more."""
        with ExitStack() as opened:
            try:
                self._open(state, disk, segment_bytes, opened)
            except (OSError, sqlite3.Error, BadFrameError) as error:
                raise RunError(f"{state}: the journal cannot be opened: {error}") from error
            opened.pop_all()
        self._indexed_seq = self._synced.seq
        self._syncing = threading.Thread(target=self._sync_again, name="journal-sync", daemon=True)
        self._folding = threading.Thread(target=self._fold_again, name="journal-fold", daemon=True)
        self._syncing.start()
        self._folding.start()

    def _open(self, state: Path, disk: Disk, segment_bytes: int, opened: ExitStack) -> None:
        index = open_index(state / "journal.sqlite")
        if index is not None:
            opened.callback(index.close)
        folder = state / "journal"
        if not folder.is_dir():
            folder.mkdir()
            sync_folder(state)
        folded = None if index is None else index.folded
        found = recover(folder, folded)
        begin = 0 if folded is None else folded.position
        self._log = Log(folder, found.segments, found.end, begin, disk, segment_bytes)
        opened.callback(self._log.close)
        self._synced = self._log.sync()
        if index is not None and folded is not None and self._log.head_before(begin) != folded.head:
            _log.warning("the index holds records up to %d that are not the log's; it is built again", folded.seq - 1)
            index.close()
            index = None
        if index is None:
            index = build_index(state / "journal.sqlite", self._batches(0))
            opened.callback(index.close)
        else:
            for batch in self._batches(begin):
                index.fold(batch)
        self._index: Index = index
        self._notes = index.notes()

    def _batches(self, position: int) -> Iterator[Batch]:
        """What the log holds from a position on; the last batch ends where the log does."""
        items: list[tuple[Record | Note, int]] = []
        for frame in self._log.frames(position):
            if len(items) >= FOLDED_AT_ONCE:
                yield Batch(items, self._folded_at(frame.position, frame.seq))
                items = []
            items += [(record, frame.position) for record in decode_records(frame.seq, frame.payload)]
        yield Batch(items, self._folded_at(self._synced.position, self._synced.seq))

    def _folded_at(self, position: int, seq: int) -> Folded:
        head = self._log.head_before(position)
        assert head is not None
        return Folded(seq, position, head, self._log.segment_at(position - 1).seq)

    def close(self) -> None:
        """Sync, fold what is left, and close the files."""
        with self._lock:
            self._closing.set()
            self._to_sync.notify()
        self._syncing.join()
        with self._lock:
            self._to_fold.notify()
        self._folding.join()
        self._index.close()
        self._log.close()

    @property
    def last_seq(self) -> int:
        """Sequence number of the newest record, 0 where there is none."""
        return self._log.head.seq - 1

    @property
    def head(self) -> str:
        """Of the chain of everything stored so far, as `SEQ:HASH`; note it elsewhere, for `seqfraud verify --state`."""
        return spell_head(self._log.written)

    @property
    def size(self) -> int:
        """Bytes of the log."""
        return self._log.written.position

    @property
    def behind(self) -> tuple[int, int]:
        """How many records are not on disk yet, and how many the index does not have yet; for any thread."""
        synced, indexed = self._synced.seq, self._indexed_seq
        end = self._log.written.seq
        return end - synced, end - indexed

    @property
    def failed(self) -> str:
        """Why nothing can be stored any more until the journal is opened anew; empty where it can."""
        return self._log.failed

    # ---- appending

    def append_transaction(self, record: TransactionRecord) -> None:
        """Add a transaction with the number after `last_seq` and an id that is not there. JournalError."""
        payload = encode_transaction(record)
        with self._lock:
            self._tail.add(record, self._append(record.seq, 1, payload))

    def append_labels(self, records: list[LabelRecord]) -> None:
        """Add labels with the numbers after `last_seq`, all or none. JournalError."""
        if not records:
            return
        payload = encode_labels(records)
        with self._lock:
            position = self._append(records[0].seq, len(records), payload)
            for record in records:
                self._tail.add(record, position)

    def append_action(self, record: ActionRecord, labels: Sequence[LabelRecord] = ()) -> None:
        """Add an action with the number after `last_seq`, and labels with the numbers after that, all or none.

        Raises JournalError.
        """
        payload = encode_action(record, labels)
        with self._lock:
            position = self._append(record.seq, 1 + len(labels), payload)
            self._tail.add(record, position)
            for label in labels:
                self._tail.add(label, position)

    def meta(self, key: str) -> str | None:
        """A setting kept in the journal."""
        return self._notes.get(key)

    def set_meta(self, key: str, value: str) -> None:
        """Keep a setting: a note in the log, where it is not kept already. JournalError."""
        if self._notes.get(key) != value:
            note = Note(key, value)
            with self._lock:
                self._tail.notes.append((note, self._append(self._log.head.seq, 0, encode_note(note))))
            self._notes[key] = value

    @contextmanager
    def group(self) -> Iterator[None]:
        """What is appended inside is written at once on leaving, also on an error; JournalError: none of it is there."""
        with self._lock:
            try:
                self._wait_for_room()
                self._log.begin_group()
            except OSError as error:
                raise _cannot_write(error) from error
        self._grouped = True
        try:
            yield
        finally:
            self._grouped = False
            with self._lock:
                self._end_group()

    def _end_group(self) -> None:
        held = range(self._log.written.seq, self._log.head.seq)
        position = self._log.written.position
        try:
            self._log.end_group()
        except BaseException as error:
            self._tail.take_back(held, position)
            if isinstance(error, OSError):
                raise _cannot_write(error) from error
            raise
        self._was_written()

    def _append(self, seq: int, count: int, payload: bytes) -> int:
        if seq != self._log.head.seq:
            raise ValueError(f"record {seq}: the next is {self._log.head.seq}")
        try:
            if self._grouped:
                return self._log.append(count, payload)
            self._wait_for_room()
            position = self._log.append(count, payload)
        except OSError as error:
            raise _cannot_write(error) from error
        self._was_written()
        return position

    def _was_written(self) -> None:
        if self._oldest is None:
            self._oldest = clock_time.monotonic()
            self._to_sync.notify()

    def _wait_for_room(self) -> None:
        while len(self._tail.by_seq) >= self._tail_records:
            if self._fold_error or self._log.failed:
                raise OSError(f"the index is {len(self._tail.by_seq)} records behind: {self._fold_error}")
            self._room.wait()

    # ---- durability

    def wait_durable(self, seq: int, before_waiting: Callable[[], None] = lambda: None) -> None:
        """Return once the promise holds for every record up to `seq`; many may wait for one sync.

        `before_waiting` is called first where there is something to wait for. JournalError where the promise cannot
        be kept: the record may be there after the next start, or not.
        """
        if not self._waits_for_disk or self._synced.seq > seq:
            return
        before_waiting()
        with self._durable:
            while self._synced.seq <= seq:
                if self._sync_error:
                    raise JournalError(self._sync_error)
                self._durable.wait()

    def _sync_again(self) -> None:
        """Sync what was written, each time `sync_ms` after the oldest of it; the last time when the journal closes."""
        while True:
            with self._lock:
                while self._oldest is None and not self._closing.is_set():
                    self._to_sync.wait()
                if self._oldest is None:
                    return
                wait = self._oldest + self._sync_seconds - clock_time.monotonic()
            if wait > 0:
                self._closing.wait(wait)
            self._oldest = None
            try:
                end = self._log.sync()
            except OSError:
                _log.error("the journal stores nothing more: %s", self._log.failed)
                with self._durable:
                    self._sync_error = self._log.failed
                    self._durable.notify_all()
                with self._indexed:
                    self._indexed.notify_all()
                with self._lock:
                    self._room.notify()
                return
            with self._durable:
                self._synced = end
                self._durable.notify_all()
            with self._lock:
                self._to_fold.notify()

    # ---- the index

    def _fold_again(self) -> None:
        """Fold what was synced; ends once the journal closes and nothing is left."""
        folded = self._synced
        while True:
            with self._lock:
                while self._synced.position == folded.position and self._syncing.is_alive():
                    self._to_fold.wait()
                end = self._synced
            if end.position == folded.position:
                return
            try:
                self._fold(range(folded.seq, end.seq), end.position)
            except Exception as error:  # of any kind: appending must not wait for a thread that is gone
                if not self._fold_error:
                    _log.error("the index falls behind: %s", error, exc_info=not isinstance(error, sqlite3.Error))
                self._fold_error = str(error)
                with self._lock:
                    self._room.notify()
                with self._indexed:
                    self._indexed.notify_all()
                if self._closing.wait(RETRY_SECONDS):
                    return
                continue
            self._fold_error = ""
            folded = end
            with self._indexed:
                self._indexed_seq = end.seq
                self._indexed.notify_all()
            self.after_fold()
            if len(self._tail.by_seq) < self._tail_records / 2:
                self._closing.wait(self._fold_seconds)

    def _fold(self, seqs: range, position: int) -> None:
        folded = self._folded_at(position, seqs.stop)
        self._index.fold(Batch(self._tail.items(seqs, position), folded))
        for seq in seqs:
            with self._lock:
                self._tail.forget(seq)
        with self._lock:
            self._tail.notes = [(note, at) for note, at in self._tail.notes if at >= position]
            self._room.notify()

    def wait_indexed(self, seq: int, seconds: float, before_waiting: Callable[[], None] = lambda: None) -> None:
        """Return once the index has every record up to `seq`; for any thread.

        `before_waiting` is called first where there is something to wait for. JournalError where the index cannot follow,
        or not within so many seconds.
        """
        if self._indexed_seq > seq:
            return
        before_waiting()
        with self._indexed:
            done = self._indexed.wait_for(
                lambda: self._indexed_seq > seq or bool(self._fold_error or self._sync_error), seconds
            )
            if self._indexed_seq <= seq:
                reason = (self._fold_error or self._sync_error) if done else f"not within {seconds:g} s"
                raise JournalError(f"the index falls behind: {reason}")

    # ---- looking up: the tail first, for what leaves it is in the index by then

    def transaction(self, identity: str) -> TransactionRecord | None:
        """The record of a transaction id."""
        record = self._tail.by_id.get(identity)
        if record is None:
            position = self._index.position_of(identity)
            if position is not None:
                return self.read(position)
        return record

    def transaction_at(self, seq: int) -> TransactionRecord:
        """The record of a sequence number; KeyError where it is no transaction."""
        held = self._tail.by_seq.get(seq)
        if held is None:
            position = self._index.position_at(seq)
            if position is None:
                raise KeyError(seq)
            return self.read(position)
        if not isinstance(held[0], TransactionRecord):
            raise KeyError(seq)
        return held[0]

    def seq_of(self, identity: str) -> tuple[int, int] | None:
        """Sequence number and time of a transaction id."""
        record = self._tail.by_id.get(identity)
        return self._index.seq_of(identity) if record is None else (record.seq, record.time)

    def last_label(self, identity: str) -> LabelRecord | None:
        """The newest label said of a transaction."""
        return self._tail.labels.get(identity) or self._index.last_label(identity)

    def labels_of(self, identity: str) -> list[LabelRecord]:
        """Every label said of a transaction, as they were said."""
        held = self._tail.labels_of(identity)
        return _together(held, self._index.labels_of(identity))

    def actions(self, kinds: Sequence[str], after_seq: int = 0) -> list[ActionRecord]:
        """Actions of some kinds after a sequence number, in order."""
        held = self._tail.actions(kinds, after_seq)
        return _together(held, self._index.actions(kinds, after_seq))

    def held_actions(self, kind: str) -> list[ActionRecord]:
        """Actions of a kind that the index may not have yet, in order."""
        return self._tail.actions((kind,), 0)

    def events_before(self, user: str, time: int) -> int:
        """Number of accepted transactions of a user at or before a time."""
        held = self._tail.transactions_of(user)
        first = held[0].seq if held else self._log.head.seq
        return self._index.count_before(user, time, first) + sum(record.time <= time for record in held)

    def recent(self, user: str, limit: int) -> list[TransactionRecord]:
        """The newest transactions of a user by time, newest first."""
        held = {record.seq: record for record in self._tail.transactions_of(user)}
        stored = (self.read(position) for position in self._index.newest_of(user, limit))
        found = {record.seq: record for record in stored} | held
        return sorted(found.values(), key=lambda record: (record.time, record.seq), reverse=True)[:limit]

    def after(self, seq: int) -> Iterator[Record]:
        """Every record after a sequence number, in arrival order, read from the log and verified."""
        try:
            for frame in self._log.frames(self._log.position_before(seq + 1)):
                if frame.seq + frame.taken > seq + 1:
                    for record in decode_records(frame.seq, frame.payload):
                        if not isinstance(record, Note) and record.seq > seq:
                            yield record
        except (OSError, BadFrameError) as error:
            raise JournalError(f"the log cannot be read: {error}") from error

    # ---- for whoever follows it on a thread of its own, with connections of its own

    def frames(self, position: int) -> Iterator[Frame]:
        """Every frame from a position to what is the end now. JournalError."""
        try:
            yield from self._log.frames(position)
        except (OSError, BadFrameError) as error:
            raise JournalError(f"the log cannot be read: {error}") from error

    def position_before(self, seq: int) -> int:
        """A position of the log, before the frame that holds a sequence number or would."""
        return self._log.position_before(seq)

    def held(self, identity: str) -> TransactionRecord | None:
        """The record of a transaction id that the index may not have yet."""
        return self._tail.by_id.get(identity)

    def held_at(self, seq: int) -> Record | None:
        """The record of a sequence number that the index may not have yet."""
        found = self._tail.by_seq.get(seq)
        return None if found is None else found[0]

    def read(self, position: int) -> TransactionRecord:
        """The transaction at a position of the log; for any thread. JournalError."""
        try:
            frame = self._log.read(position)
        except (OSError, BadFrameError) as error:
            raise JournalError(f"the log cannot be read at {position}: {error}") from error
        (record,) = decode_records(frame.seq, frame.payload)
        if not isinstance(record, TransactionRecord):
            raise JournalError(f"the index says that a transaction is at {position} of the log; remove the index")
        return record


def _together(held: list[_R], stored: list[_R]) -> list[_R]:
    """What the tail held a moment before the index had what it has now, in order and each once."""
    last = stored[-1].seq if stored else 0
    return stored + [record for record in held if record.seq > last]


def _cannot_write(error: OSError) -> JournalError:
    return JournalError(f"the journal cannot be written: {error}")
