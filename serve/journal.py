"""The journal: every accepted transaction with its answer, every label, in one arrival sequence. SQLite in WAL mode.

What is in memory is a fold of this. One connection, used under the service's lock.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from seqfraud.errors import RunError

VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS transactions (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL, user TEXT NOT NULL, time INTEGER NOT NULL, content BLOB NOT NULL,
    raw BLOB NOT NULL, context BLOB NOT NULL, answer BLOB NOT NULL, bundle TEXT NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS transactions_id ON transactions (id);
CREATE INDEX IF NOT EXISTS transactions_user ON transactions (user, time);
CREATE TABLE IF NOT EXISTS labels (
    seq INTEGER PRIMARY KEY, transaction_id TEXT NOT NULL, is_fraud INTEGER NOT NULL, known_at INTEGER NOT NULL,
    said_at INTEGER NOT NULL, source TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS labels_transaction ON labels (transaction_id);
"""


@dataclass(slots=True, frozen=True)
class TransactionRecord:
    """An accepted transaction. `context` is float32 [K] as read; `answer` the JSON that was given."""

    seq: int
    id: str
    user: str
    time: int
    content: bytes
    raw: bytes
    context: bytes
    answer: bytes
    bundle: str


@dataclass(slots=True, frozen=True)
class LabelRecord:
    """A label as it was said."""

    seq: int
    transaction_id: str
    is_fraud: bool
    known_at: int
    said_at: int
    source: str


_TRANSACTION = "seq, id, user, time, content, raw, context, answer, bundle"
_LABEL = "seq, transaction_id, is_fraud, known_at, said_at, source"


class Journal:
    """Append and look up; sequence numbers start at 1 and count transactions and labels alike."""

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
        except sqlite3.Error as error:
            raise RunError(f"{path}: {error}") from error
        try:
            self._open(path)
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.Error):
                raise RunError(f"{path}: not readable as a journal: {error}") from error
            raise

    def _open(self, path: Path) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        version = self.meta("version")
        if version is None:
            self.set_meta("version", str(VERSION))
        elif version != str(VERSION):
            raise RunError(f"{path}: journal format {version}; this version reads format {VERSION}")
        last = self._db.execute(
            "SELECT max(coalesce((SELECT max(seq) FROM transactions), 0), coalesce((SELECT max(seq) FROM labels), 0))"
        ).fetchone()
        self.last_seq: int = last[0]

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def meta(self, key: str) -> str | None:
        """A setting kept in the journal."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        """Keep a setting."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def begin(self) -> None:
        """Start a group: its records become durable together."""
        self._db.execute("BEGIN")

    def commit(self) -> None:
        """End a group."""
        self._db.execute("COMMIT")

    def append_transaction(self, record: TransactionRecord) -> None:
        """Add a transaction; sqlite3.Error where it cannot be stored."""
        self._db.execute(
            f"INSERT INTO transactions ({_TRANSACTION}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.seq, record.id, record.user, record.time, record.content,
                record.raw, record.context, record.answer, record.bundle,
            ),
        )  # fmt: skip
        self.last_seq = record.seq

    def append_labels(self, records: list[LabelRecord]) -> None:
        """Add labels, all or none; sqlite3.Error where they cannot be stored."""
        rows = [(r.seq, r.transaction_id, r.is_fraud, r.known_at, r.said_at, r.source) for r in records]
        outer = self._db.in_transaction
        if not outer:
            self._db.execute("BEGIN")
        try:
            self._db.executemany(f"INSERT INTO labels ({_LABEL}) VALUES (?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.Error:
            if not outer:
                self._db.execute("ROLLBACK")
            raise
        if not outer:
            self._db.execute("COMMIT")
        if records:
            self.last_seq = records[-1].seq

    def transaction(self, identity: str) -> TransactionRecord | None:
        """The record of a transaction id."""
        row = self._db.execute(f"SELECT {_TRANSACTION} FROM transactions WHERE id = ?", (identity,)).fetchone()
        return None if row is None else TransactionRecord(*row)

    def transaction_at(self, seq: int) -> TransactionRecord:
        """The record of a sequence number; KeyError where it is no transaction."""
        row = self._db.execute(f"SELECT {_TRANSACTION} FROM transactions WHERE seq = ?", (seq,)).fetchone()
        if row is None:
            raise KeyError(seq)
        return TransactionRecord(*row)

    def seq_of(self, identity: str) -> tuple[int, int] | None:
        """Sequence number and time of a transaction id."""
        row = self._db.execute("SELECT seq, time FROM transactions WHERE id = ?", (identity,)).fetchone()
        return None if row is None else (row[0], row[1])

    def last_label(self, identity: str) -> LabelRecord | None:
        """The newest label said of a transaction."""
        row = self._db.execute(
            f"SELECT {_LABEL} FROM labels WHERE transaction_id = ? ORDER BY seq DESC LIMIT 1", (identity,)
        ).fetchone()
        return None if row is None else _label(row)

    def events_before(self, user: str, time: int) -> int:
        """Number of accepted transactions of a user at or before a time."""
        row = self._db.execute(
            "SELECT count(*) FROM transactions WHERE user = ? AND time <= ?", (user, time)
        ).fetchone()
        return int(row[0])

    def recent(self, user: str, limit: int) -> list[TransactionRecord]:
        """The newest transactions of a user by time, newest first."""
        rows = self._db.execute(
            f"SELECT {_TRANSACTION} FROM transactions WHERE user = ? ORDER BY time DESC, seq DESC LIMIT ?",
            (user, limit),
        )
        return [TransactionRecord(*row) for row in rows]

    def after(self, seq: int) -> Iterator[TransactionRecord | LabelRecord]:
        """Every record after a sequence number, in arrival order."""
        rows = self._db.execute(f"SELECT {_TRANSACTION} FROM transactions WHERE seq > ? ORDER BY seq", (seq,))
        transactions = (TransactionRecord(*row) for row in rows)
        labels = map(_label, self._db.execute(f"SELECT {_LABEL} FROM labels WHERE seq > ? ORDER BY seq", (seq,)))
        a, b = next(transactions, None), next(labels, None)
        while a is not None or b is not None:
            if b is None or (a is not None and a.seq < b.seq):
                assert a is not None
                yield a
                a = next(transactions, None)
            else:
                yield b
                b = next(labels, None)


def _label(row: tuple[int, str, int, int, int, str]) -> LabelRecord:
    return LabelRecord(row[0], row[1], bool(row[2]), row[3], row[4], row[5])
