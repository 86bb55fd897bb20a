"""The index: SQLite over what the log holds, for lookups and for whoever asks questions with SQL.

It is a fold of the log and as such can be thrown away: a missing, damaged or older one is built again. How far it is
folded is stored with the head that the log has there, so that the index of another log is not taken for this one's.
"""

import logging
import os
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from seqfraud.errors import JournalError, RunError
from seqfraud.files import replaced_file
from serve.alertindex import INDEXES, TABLES, fold_alerts
from serve.records import ActionRecord, LabelRecord, Note, Record, TransactionRecord

_log = logging.getLogger(__name__)

VERSION = 3
"""1 was a journal in SQLite alone."""

_TABLES = """
CREATE TABLE folded (one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER, position INTEGER, head BLOB,
    segment INTEGER);
CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE transactions (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL, user TEXT NOT NULL, time INTEGER NOT NULL, position INTEGER NOT NULL,
    raw TEXT NOT NULL, probability REAL, is_fraud INTEGER, decision TEXT, history INTEGER, late INTEGER,
    bundle TEXT NOT NULL);
CREATE TABLE labels (
    seq INTEGER PRIMARY KEY, transaction_id TEXT NOT NULL, is_fraud INTEGER NOT NULL, known_at INTEGER NOT NULL,
    said_at INTEGER NOT NULL, source TEXT NOT NULL, author TEXT NOT NULL);
CREATE TABLE actions (
    seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, at INTEGER NOT NULL, author TEXT NOT NULL, body TEXT NOT NULL);
"""
_INDEXES = """
CREATE UNIQUE INDEX transactions_id ON transactions (id);
CREATE INDEX transactions_user ON transactions (user, time);
CREATE INDEX labels_transaction ON labels (transaction_id);
CREATE INDEX actions_kind ON actions (kind);
"""


_LABELS_OF = (
    "SELECT seq, transaction_id, is_fraud, known_at, said_at, source, author FROM labels WHERE transaction_id = ?"
)


class Folded(NamedTuple):
    """How far an index is: everything before a position and a sequence number of the log.

    `head` is the log's there; `segment` the first sequence number of the segment that holds the byte before.
    """

    seq: int
    position: int
    head: bytes
    segment: int


@dataclass(frozen=True)
class Batch:
    """Records with the positions of their frames, to be folded together, and how far the index then is."""

    records: Sequence[tuple[Record | Note, int]]
    folded: Folded


class _Said(msgspec.Struct):
    """What an answer says, as columns."""

    fraud_probability: float | None = None
    is_fraud: bool | None = None
    decision: str | None = None
    history: int | None = None
    late: bool | None = None


_said = msgspec.json.Decoder(_Said).decode


class IndexReader:
    """Lookups in an index that may be written meanwhile, for one thread. JournalError where the file cannot be read."""

    def __init__(self, path: Path) -> None:
        """Open one that is there. sqlite3.Error."""
        self._reader = _connect(path)
        self._reader.execute("PRAGMA query_only=1")

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def _rows(self, sql: str, *values: object) -> list[Any]:
        try:
            return self._reader.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise JournalError(f"the journal's index cannot be read: {error}") from error

    def notes(self) -> dict[str, str]:
        """Every note, the newest of its key."""
        return dict(self._rows("SELECT key, value FROM notes"))

    def position_of(self, identity: str) -> int | None:
        """Position of a transaction id's frame."""
        rows = self._rows("SELECT position FROM transactions WHERE id = ?", identity)
        return rows[0][0] if rows else None

    def position_at(self, seq: int) -> int | None:
        """Position of a transaction's frame by its sequence number."""
        rows = self._rows("SELECT position FROM transactions WHERE seq = ?", seq)
        return rows[0][0] if rows else None

    def seq_of(self, identity: str) -> tuple[int, int] | None:
        """Sequence number and time of a transaction id."""
        rows = self._rows("SELECT seq, time FROM transactions WHERE id = ?", identity)
        return rows[0] if rows else None

    def last_label(self, identity: str) -> LabelRecord | None:
        """The newest label said of a transaction."""
        rows = self._rows(f"{_LABELS_OF} ORDER BY seq DESC LIMIT 1", identity)
        return _label(rows[0]) if rows else None

    def labels_of(self, identity: str) -> list[LabelRecord]:
        """Every label said of a transaction, as they were said."""
        return [_label(row) for row in self._rows(f"{_LABELS_OF} ORDER BY seq", identity)]

    def actions(self, kinds: Sequence[str], after_seq: int) -> list[ActionRecord]:
        """Actions of some kinds after a sequence number, in order."""
        marks = ", ".join("?" * len(kinds))
        rows = self._rows(
            f"SELECT seq, kind, at, author, body FROM actions WHERE kind IN ({marks}) AND seq > ? ORDER BY seq",
            *kinds,
            after_seq,
        )
        return [ActionRecord(seq, kind, at, author, body.encode()) for seq, kind, at, author, body in rows]

    def count_before(self, user: str, time: int, seq: int) -> int:
        """Number of a user's transactions at or before a time with sequence numbers below `seq`."""
        return int(
            self._rows("SELECT count(*) FROM transactions WHERE user = ? AND time <= ? AND +seq < ?", user, time, seq)[
                0
            ][0]
        )

    def newest_of(self, user: str, limit: int) -> list[int]:
        """Positions of a user's newest transactions by time, newest first."""
        rows = self._rows(
            "SELECT position FROM transactions WHERE user = ? ORDER BY time DESC, seq DESC LIMIT ?", user, limit
        )
        return [position for (position,) in rows]


class Index(IndexReader):
    """An open index. `fold` belongs to one thread, the lookups to another; neither waits for the other."""

    def __init__(self, path: Path) -> None:
        """Open one that is there. sqlite3.Error."""
        self._writer = _connect(path)
        self._writer.execute("PRAGMA journal_mode=WAL")
        self._writer.execute("PRAGMA synchronous=NORMAL")
        super().__init__(path)
        self.folded = Folded(*self._reader.execute("SELECT seq, position, head, segment FROM folded").fetchone())
        """As of the opening."""

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._writer.close()

    def fold(self, batch: Batch) -> None:
        """Take records in, all or none. sqlite3.Error."""
        _fold(self._writer, batch)


def read_folded(path: Path) -> Folded:
    """How far an index is, which another process may be writing to. sqlite3.Error where that cannot be read."""
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1.0)
    try:
        row = db.execute("SELECT seq, position, head, segment FROM folded").fetchone()
    finally:
        db.close()
    if row is None:
        raise sqlite3.DatabaseError("it is not finished")
    return Folded(*row)


def open_index(path: Path) -> Index | None:
    """The index at `path`; None where it has to be built: it is missing, damaged or of an older version.

    Raises RunError where it is newer, a journal of before the log, or cannot be opened at all.
    """
    if not path.exists():
        return None
    try:
        db = _connect(path)
        try:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        finally:
            db.close()
        if version > VERSION:
            raise RunError(f"{path}: index format {version}; this version reads format {VERSION}")
        if version == 0 and "meta" in tables:
            raise RunError(f"{path}: a journal from before there was a log; load its data into a new state folder")
        if version == VERSION:
            return Index(path)
        _log.warning("%s is built again: it is not finished, or of an older format", path)
    except sqlite3.OperationalError as error:
        raise RunError(f"{path}: {error}; if it stays, remove the file: it is built again from the log") from error
    except (sqlite3.Error, TypeError) as error:
        _log.warning("%s is built again: %s", path, error)
    return None


def build_index(path: Path, batches: Iterable[Batch]) -> Index:
    """A new index in place of whatever is there: whole under its name, or not there. sqlite3.Error, OSError."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink()
    with replaced_file(path) as temporary:
        db = _connect(temporary)
        try:
            db.execute("PRAGMA journal_mode=OFF")
            db.execute("PRAGMA synchronous=OFF")
            db.executescript(_TABLES + TABLES)
            for batch in batches:
                _fold(db, batch)
            db.executescript(_INDEXES + INDEXES)  # sorted once: far quicker than kept while rows come in
            db.execute(f"PRAGMA user_version={VERSION}")
        finally:
            db.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        remove_index(path)
    return Index(path)


def remove_index(path: Path) -> None:
    """Remove an index, the file itself first: without its WAL it would not be what it seems."""
    for name in ("", "-wal", "-shm"):
        path.with_name(path.name + name).unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def _fold(db: sqlite3.Connection, batch: Batch) -> None:
    records = batch.records
    transactions = (_row(r, position) for r, position in records if isinstance(r, TransactionRecord))
    labels = (
        (r.seq, r.transaction_id, r.is_fraud, r.known_at, r.said_at, r.source, r.author)
        for r, _ in records
        if isinstance(r, LabelRecord)
    )
    actions = ((r.seq, r.kind, r.at, r.author, r.body.decode()) for r, _ in records if isinstance(r, ActionRecord))
    notes = ((r.key, r.value) for r, _ in records if isinstance(r, Note))
    db.execute("BEGIN")
    try:
        db.executemany("INSERT INTO transactions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", transactions)
        db.executemany("INSERT INTO labels VALUES (?, ?, ?, ?, ?, ?, ?)", labels)
        db.executemany("INSERT INTO actions VALUES (?, ?, ?, ?, ?)", actions)
        db.executemany("INSERT OR REPLACE INTO notes VALUES (?, ?)", notes)
        fold_alerts(db, [record for record, _ in records])
        db.execute("INSERT OR REPLACE INTO folded VALUES (1, ?, ?, ?, ?)", batch.folded)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _label(row: Any) -> LabelRecord:
    seq, identity, is_fraud, known_at, said_at, source, author = row
    return LabelRecord(seq, identity, bool(is_fraud), known_at, said_at, source, author)


def _row(r: TransactionRecord, position: int) -> tuple[object, ...]:
    said = _said(r.answer)
    return (
        r.seq, r.id, r.user, r.time, position, r.raw.decode(), said.fraud_probability, said.is_fraud, said.decision,
        said.history, said.late, r.bundle,
    )  # fmt: skip
