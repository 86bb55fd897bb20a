"""Alerts in the journal's index: a fold of its records like the rest of it, and the questions that are asked of them.

An alert is a transaction that was answered with anything but approve. What came by a backfill is none: its labels are
known, and nobody waits for it. Its state is what the newest action of kind `alert` says of it.
"""

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from seqfraud.config import format_instant
from seqfraud.errors import JournalError
from seqfraud.policy import Decision
from serve.answers import Alert, AlertLabel, AlertRecord, AlertState, Reason
from serve.records import ActionRecord, LabelRecord, Note, Record, TransactionRecord

ALERT = "alert"
"""Kind of the actions that change an alert."""
AMOUNT = "amount field"
"""Key of the journal's note that names the column of the amount."""
BACKFILLS = "backfills"
"""Key of the journal's note with the ranges of records that a backfill brought: [[after, up to or null]]."""

TABLES = """
CREATE TABLE alerts (
    seq INTEGER PRIMARY KEY, transaction_id TEXT NOT NULL, user TEXT NOT NULL, time INTEGER NOT NULL,
    decision TEXT NOT NULL, probability REAL NOT NULL, amount REAL, risk REAL NOT NULL, reasons TEXT NOT NULL,
    model TEXT NOT NULL, state TEXT NOT NULL, assigned_to TEXT, author TEXT, note TEXT NOT NULL, changed_at INTEGER);
CREATE TABLE alert_reasons (code TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (code, seq)) WITHOUT ROWID;
"""
INDEXES = """
CREATE INDEX alerts_state ON alerts (state);
CREATE INDEX alerts_probability ON alerts (state, probability);
CREATE INDEX alerts_risk ON alerts (state, risk);
CREATE INDEX alerts_user ON alerts (user);
CREATE INDEX actions_alert ON actions (json_extract(body, '$.alert')) WHERE kind = 'alert';
"""

Sort = Literal["newest", "probability", "risk"]
Range = tuple[int, int | None]

_OPEN = ("open", None, None, "", None)
_INSERT = f"INSERT INTO alerts VALUES ({', '.join('?' * 15)})"
_UPDATE = "UPDATE alerts SET state = ?, assigned_to = ?, author = ?, note = ?, changed_at = ? WHERE seq = ?"


class AlertAction(msgspec.Struct):
    """The body of an action of kind `alert`: what is true of the alert from now on."""

    alert: int
    """Number of the transaction's record."""
    transaction_id: str
    state: AlertState
    assigned_to: str | None
    note: str


class _Said(msgspec.Struct):
    """What an answer says of interest."""

    decision: Decision | None = None
    fraud_probability: float | None = None
    reasons: list[Reason] = []


decode_action = msgspec.json.Decoder(AlertAction).decode
_decode_said = msgspec.json.Decoder(_Said).decode
_decode_row = msgspec.json.Decoder(dict[str, Any]).decode
_decode_reasons = msgspec.json.Decoder(list[Reason]).decode
_decode_ranges = msgspec.json.Decoder(list[Range]).decode


def opened(record: TransactionRecord, amount_field: str | None) -> AlertRecord | None:
    """The alert that a transaction is at first, None where it was approved."""
    said = _decode_said(record.answer)
    decision = said.decision
    if decision is None or decision == "approve" or said.fraud_probability is None:
        return None
    amount = amount_of(record.raw, amount_field)
    return AlertRecord(
        transaction_id=record.id,
        seq=record.seq,
        user=record.user,
        time=format_instant(record.time),
        decision=decision,
        fraud_probability=said.fraud_probability,
        amount=amount,
        risk=_risk(said.fraud_probability, amount),
        reasons=said.reasons,
        model=record.bundle,
        state="open",
        assigned_to=None,
        author=None,
        note="",
        changed_at=None,
    )


def change(alert: AlertRecord, record: ActionRecord) -> None:
    """Let an action take effect on an alert."""
    action = decode_action(record.body)
    alert.state, alert.assigned_to, alert.note = action.state, action.assigned_to, action.note
    alert.author, alert.changed_at = record.author, format_instant(record.at)


def label_of(record: LabelRecord | None) -> AlertLabel | None:
    """A label as an alert shows it."""
    if record is None:
        return None
    known_at, said_at = format_instant(record.known_at), format_instant(record.said_at)
    return AlertLabel(record.is_fraud, record.source, record.author, known_at, said_at)


def amount_of(raw: bytes, field: str | None) -> float | None:
    """The amount of a stored transaction."""
    value = None if field is None else _decode_row(raw).get(field)
    return float(value) if isinstance(value, int | float) else None


def _risk(probability: float, amount: float | None) -> float:
    return 0.0 if amount is None else probability * amount


def ranges_of(note: str | None) -> list[Range]:
    """The ranges of records that backfills brought."""
    return [] if note is None else _decode_ranges(note)


def is_backfilled(ranges: Iterable[Range], seq: int) -> bool:
    """Whether a record came by a backfill; one that has no end yet goes on."""
    return any(after < seq and (end is None or seq <= end) for after, end in ranges)


# ---- the fold


def fold_alerts(db: sqlite3.Connection, records: Sequence[Record | Note]) -> None:
    """Take records in, inside of the index's transaction, when it has their notes and transactions. sqlite3.Error."""
    if any(isinstance(r, Note) and r.key == AMOUNT for r in records):
        _read_amounts_again(db)
    transactions = [r for r in records if isinstance(r, TransactionRecord)]
    if transactions:
        _insert(db, transactions)
    actions = [(decode_action(r.body), r) for r in records if isinstance(r, ActionRecord) and r.kind == ALERT]
    if actions:
        changes = ((a.state, a.assigned_to, r.author, a.note, r.at, a.alert) for a, r in actions)
        db.executemany(_UPDATE, changes)


def _insert(db: sqlite3.Connection, transactions: Sequence[TransactionRecord]) -> None:
    field, ranges = _note(db, AMOUNT), ranges_of(_note(db, BACKFILLS))
    rows: list[tuple[object, ...]] = []
    codes: set[tuple[str, int]] = set()
    for record in transactions:
        alert = opened(record, field)
        if alert is None or is_backfilled(ranges, record.seq):
            continue
        reasons = msgspec.json.encode(alert.reasons).decode()
        rows.append((
            record.seq, record.id, record.user, record.time, alert.decision, alert.fraud_probability, alert.amount,
            alert.risk, reasons, record.bundle, *_OPEN,
        ))  # fmt: skip
        codes.update((reason.code, record.seq) for reason in alert.reasons)
    db.executemany(_INSERT, rows)
    db.executemany("INSERT INTO alert_reasons VALUES (?, ?)", codes)


def _note(db: sqlite3.Connection, key: str) -> str | None:
    rows = db.execute("SELECT value FROM notes WHERE key = ?", (key,)).fetchall()
    return rows[0][0] if rows else None


def _read_amounts_again(db: sqlite3.Connection) -> None:
    """Another column is the amount now, or it was not known which one is."""
    field = _note(db, AMOUNT)
    held = db.execute("SELECT a.seq, a.probability, t.raw FROM alerts a JOIN transactions t USING (seq)").fetchall()
    amounts = [(seq, probability, amount_of(raw.encode(), field)) for seq, probability, raw in held]
    values = ((amount, _risk(probability, amount), seq) for seq, probability, amount in amounts)
    db.executemany("UPDATE alerts SET amount = ?, risk = ? WHERE seq = ?", values)


# ---- the questions


class Filters(NamedTuple):
    """What a page is asked for; times in milliseconds, None: any."""

    state: str | None = None
    decision: str | None = None
    user: str | None = None
    begin: int | None = None
    end: int | None = None
    min_probability: float | None = None
    min_amount: float | None = None
    reason: str | None = None
    model: str | None = None
    assigned_to: str | None = None


class Place(NamedTuple):
    """Where a page ended: the sort's value and the number of its last alert; `until` is the newest that belongs."""

    until: int
    value: float
    seq: int


_CONDITIONS = {
    "state": "state = ?",
    "decision": "decision = ?",
    "user": "user = ?",
    "begin": "time >= ?",
    "end": "time < ?",
    "min_probability": "probability >= ?",
    "min_amount": "amount >= ?",
    "reason": "seq IN (SELECT seq FROM alert_reasons WHERE code = ?)",
    "model": "model = ?",
    "assigned_to": "assigned_to = ?",
}
_VALUES: dict[Sort, str] = {"newest": "seq", "probability": "probability", "risk": "risk"}
_ALERT = (
    "a.seq, a.transaction_id, a.user, a.time, a.decision, a.probability, a.amount, a.risk, a.reasons, a.model, a.state, "
    "a.assigned_to, a.author, a.note, a.changed_at"
)
_LABEL = "l.seq, l.transaction_id, l.is_fraud, l.known_at, l.said_at, l.source, l.author"


class AlertReader:
    """A connection of its own to the index, so that a long question holds up nobody else. Thread-safe; JournalError."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA query_only=1")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _rows(self, sql: str, *values: object) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise JournalError(f"the journal's index cannot be read: {error}") from error

    def page(self, filters: Filters, sort: Sort, limit: int, until: int, place: Place | None) -> list[Alert]:
        """Alerts up to the record `until`, in order after a place, the newest label of each with it."""
        wanted = {name: value for name, value in filters._asdict().items() if value is not None}
        conditions = ["+seq <= ?", *(_CONDITIONS[name] for name in wanted)]
        values: list[object] = [until, *wanted.values()]
        column = _VALUES[sort]
        if place is not None:
            conditions.append("seq < ?" if sort == "newest" else f"({column}, seq) < (?, ?)")
            values += [place.seq] if sort == "newest" else [place.value, place.seq]
        order = "seq DESC" if sort == "newest" else f"{column} DESC, seq DESC"
        rows = self._rows(
            f"SELECT {_ALERT}, {_LABEL} FROM (SELECT * FROM alerts WHERE {' AND '.join(conditions)} ORDER BY {order} "
            f"LIMIT ?) a LEFT JOIN labels l ON l.seq = (SELECT max(seq) FROM labels WHERE transaction_id = "
            f"a.transaction_id) ORDER BY {', '.join(f'a.{term}' for term in order.split(', '))}",
            *values,
            limit,
        )
        return [_alert(row) for row in rows]

    def changes(self, alert: int) -> list[ActionRecord]:
        """The actions on the alert of a transaction's number, oldest first."""
        rows = self._rows(
            "SELECT seq, kind, at, author, body FROM actions WHERE kind = 'alert' AND json_extract(body, '$.alert') = ? "
            "ORDER BY seq",
            alert,
        )
        return [_action(row) for row in rows]

    # ---- events, by the number of their record: an alert is opened, or it is changed

    def next_event(self, after: int) -> int | None:
        """Number of the first event after a number."""
        rows = self._rows(
            "SELECT min(seq) FROM (SELECT min(seq) AS seq FROM alerts WHERE seq > ?1 UNION ALL "
            "SELECT min(seq) FROM actions WHERE kind = 'alert' AND seq > ?1)",
            after,
        )
        seq: int | None = rows[0][0]
        return seq

    def count_events(self, after: int) -> int:
        """How many there are after a number."""
        rows = self._rows(
            "SELECT (SELECT count(*) FROM alerts WHERE seq > ?1) + "
            "(SELECT count(*) FROM actions WHERE kind = 'alert' AND seq > ?1)",
            after,
        )
        return int(rows[0][0])

    def action(self, seq: int) -> ActionRecord | None:
        """The action of kind `alert` that has a number."""
        rows = self._rows("SELECT seq, kind, at, author, body FROM actions WHERE seq = ? AND kind = 'alert'", seq)
        return _action(rows[0]) if rows else None

    def is_alert(self, seq: int) -> bool:
        """Whether the transaction of a number is one."""
        return bool(self._rows("SELECT 1 FROM alerts WHERE seq = ?", seq))

    def position(self, seq: int) -> int | None:
        """Position of a transaction's frame."""
        rows = self._rows("SELECT position FROM transactions WHERE seq = ?", seq)
        return rows[0][0] if rows else None


def _action(row: Any) -> ActionRecord:
    seq, kind, at, author, body = row
    return ActionRecord(seq, kind, at, author, body.encode())


def _alert(row: Any) -> Alert:
    (
        seq, identity, user, time, decision, probability, amount, risk, reasons, model, state, assigned_to, author, note,
        changed_at, *label,
    ) = row  # fmt: skip
    return Alert(
        transaction_id=identity,
        seq=seq,
        user=user,
        time=format_instant(time),
        decision=decision,
        fraud_probability=probability,
        amount=amount,
        risk=risk,
        reasons=_decode_reasons(reasons),
        model=model,
        state=state,
        assigned_to=assigned_to,
        author=author,
        note=note,
        changed_at=None if changed_at is None else format_instant(changed_at),
        label=None if label[0] is None else label_of(LabelRecord(label[0], label[1], bool(label[2]), *label[3:])),
    )
