"""The queue of alerts: what people ask of it, what may become of an alert, and the events that leave for the webhook.

    open -> in_review, confirmed, dismissed
    in_review -> open, in_review (somebody else takes it over), confirmed, dismissed
    confirmed, dismissed -> in_review

Closing an alert says what its transaction was: it is stored in one frame of the journal with that label. Opening it
again takes no label back; closing it in the other way says the opposite.
"""

import base64
import difflib
import hashlib
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args
from urllib.parse import parse_qsl

import msgspec

from seqfraud.config import format_instant, parse_instant
from seqfraud.errors import JournalError, RequestError
from seqfraud.identifiers import Identifiers
from seqfraud.schema import Schema
from serve.alertindex import (
    ALERT,
    AMOUNT,
    BACKFILLS,
    AlertAction,
    AlertReader,
    Filters,
    Place,
    Range,
    Sort,
    change,
    decode_action,
    is_backfilled,
    label_of,
    opened,
    ranges_of,
)
from serve.answers import Alert, AlertChange, AlertDetail, AlertPage, AlertRecord, AlertState
from serve.decoding import SHOWN, decode_object
from serve.journal import ActionRecord, Journal, TransactionRecord
from serve.records import encode_action, encode_transaction
from serve.webhook import Event

__all__ = ["AlertQuery", "Alerts", "ChangeAlert", "Events", "decode_change"]

ANALYST = "analyst"
"""Source of the labels that closing an alert gives."""
SAYS: dict[AlertState, bool] = {"confirmed": True, "dismissed": False}
"""Whether the transaction of a closed alert was fraud."""
MOST_ALERTS = 200
MOST_NOTE = 2000
INDEX_SECONDS = 10.0
"""How long a question waits for the index, which is a moment behind."""

_FOLLOWS: dict[AlertState, tuple[AlertState, ...]] = {
    "open": ("in_review", "confirmed", "dismissed"),
    "in_review": ("open", "in_review", "confirmed", "dismissed"),
    "confirmed": ("in_review",),
    "dismissed": ("in_review",),
}


# ---- what is asked


class ChangeAlert(msgspec.Struct):
    """What is to become of an alert."""

    state: AlertState
    note: Annotated[str, msgspec.Meta(max_length=MOST_NOTE)] = ""
    expected: AlertState | None = None


_STATES = ", ".join(get_args(AlertState))
_CHANGE_WORDS = {
    "state": f"one of {_STATES}",
    "note": f"a string of at most {MOST_NOTE} characters",
    "expected": f"one of {_STATES}, or null",
}
_decode_change = msgspec.json.Decoder(ChangeAlert)


def decode_change(body: bytes) -> ChangeAlert:
    """The change that a request asks for. Raises RequestError."""
    return decode_object(body, _decode_change, _CHANGE_WORDS)


def _asked(description: str, **constraints: Any) -> msgspec.Meta:
    return msgspec.Meta(description=description, **constraints)


_DATE_TIME = {"format": "date-time"}


class AlertQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The parameters of a page, all of which may be left out."""

    state: Annotated[AlertState | None, _asked("Only those in this state.")] = None
    decision: Annotated[Literal["review", "decline"] | None, _asked("Only those so decided.")] = None
    user: Annotated[str | None, _asked("Only those of this user.")] = None
    since: Annotated[str | None, _asked("Transactions at or after it.", extra_json_schema=_DATE_TIME)] = msgspec.field(
        name="from", default=None
    )
    to: Annotated[str | None, _asked("Transactions before it.", extra_json_schema=_DATE_TIME)] = None
    min_probability: Annotated[float, _asked("The least one.", ge=0, le=1)] | None = None
    min_amount: Annotated[float, _asked("The least one, in the currency of the data.", ge=-1e30, le=1e30)] | None = None
    reason: Annotated[str | None, _asked("Only those with a reason of this code, such as `rule:NAME`.")] = None
    model: Annotated[str | None, _asked("Only those scored by this bundle.")] = None
    assigned_to: Annotated[str | None, _asked("Only those taken up with this API key, by its id.")] = None
    sort: Annotated[Sort, _asked("Newest, most probable, or most money at risk (probability times amount) first.")] = (
        "newest"
    )
    limit: Annotated[int, _asked("How many at most.", ge=1, le=MOST_ALERTS)] = 50
    cursor: Annotated[str | None, _asked("`next` of the page before.")] = None


_QUERY_WORDS = {
    "state": f"one of {_STATES}",
    "decision": "review or decline",
    "from": "an ISO 8601 time, percent-encoded",
    "to": "an ISO 8601 time, percent-encoded",
    "min_probability": "a number from 0 to 1",
    "min_amount": "a number from -1e30 to 1e30",
    "sort": f"one of {', '.join(get_args(Sort))}",
    "limit": f"a whole number from 1 to {MOST_ALERTS}",
    "cursor": "`next` of a page with the same filters and order",
}
_NUMBERS = ("min_probability", "min_amount", "limit")
_NAMES = tuple(field.encode_name for field in msgspec.structs.fields(AlertQuery))


def decode_query(text: str) -> AlertQuery:
    """A query string. Raises RequestError 422 that names the parameter."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), errors="strict")
    except ValueError:  # UnicodeDecodeError is one
        raise RequestError(422, "invalid_field", "the query: expected NAME=VALUE&..., percent-encoded UTF-8") from None
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.0)[0]
            raise RequestError(
                422, "invalid_field", f"{name[:SHOWN]!r}: no such parameter; the nearest is {near}", name
            )
        if name in given:
            raise RequestError(422, "duplicate_field", f"{name}: stands twice; expected once", name)
        given[name] = _number(name, value) if name in _NUMBERS else value
    try:
        return msgspec.convert(given, AlertQuery)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].rstrip("`")
        raise _wrong(name, str(given.get(name))) from None


def _number(name: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text, type=int | float)
    except (msgspec.DecodeError, UnicodeEncodeError):
        raise _wrong(name, text) from None


def _wrong(name: str, seen: str) -> RequestError:
    return RequestError(422, "invalid_field", f"{name}: {seen[:SHOWN]!r}; expected {_QUERY_WORDS[name]}", name)


def _time(name: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_instant(text)
    except (ValueError, OverflowError):
        raise _wrong(name, text or "") from None


# ---- cursors


class _Cursor(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Where a page ended, and which question it is of."""

    question: bytes
    until: Annotated[int, msgspec.Meta(ge=0)]
    value: float
    seq: Annotated[int, msgspec.Meta(ge=0)]


_decode_cursor = msgspec.msgpack.Decoder(_Cursor).decode


def _write_cursor(question: bytes, place: Place) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(_Cursor(question, *place))).decode().rstrip("=")


def _read_cursor(text: str, question: bytes) -> Place:
    try:
        cursor = _decode_cursor(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (ValueError, msgspec.DecodeError):
        raise _wrong("cursor", text) from None
    if cursor.question != question or math.isnan(cursor.value):
        raise _wrong("cursor", text)
    return Place(cursor.until, cursor.value, cursor.seq)


# ---- the queue


class Alerts:
    """The alerts of a journal. `page` is for any thread, the rest for whoever holds the service's lock."""

    def __init__(self, journal: Journal, identifiers: Identifiers, schema: Schema) -> None:
        """Notes in the journal where the amount is, and ends a backfill that was interrupted. JournalError."""
        self._journal = journal
        self._identifiers = identifiers
        self._schema = schema
        if schema.amount is not None or journal.meta(AMOUNT) is not None:
            journal.set_meta(AMOUNT, schema.amount or "")
        end_backfill(journal)
        self._reader = AlertReader(journal.index_path)

    def close(self) -> None:
        """Let the index go."""
        self._reader.close()

    def page(self, query: str, before_waiting: Callable[[], None]) -> AlertPage:
        """Some alerts, of those that were there when the first page was asked for.

        What pages are sorted by never changes, so that none is left out or comes twice while alerts are added; one that
        comes to fit a filter or ceases to, because its state changed meanwhile, is there or not by its state at its page.

        Raises RequestError; JournalError.
        """
        asked = decode_query(query)
        hidden, schema = self._identifiers, self._schema
        filters = Filters(
            state=asked.state,
            decision=asked.decision,
            user=None if asked.user is None else hidden.named(schema.user, asked.user),
            begin=_time("from", asked.since),
            end=_time("to", asked.to),
            min_probability=asked.min_probability,
            min_amount=asked.min_amount,
            reason=asked.reason,
            model=asked.model,
            assigned_to=asked.assigned_to,
        )
        question = hashlib.sha256(msgspec.msgpack.encode((asked.sort, *filters))).digest()[:8]
        place = None if asked.cursor is None else _read_cursor(asked.cursor, question)
        last = self._journal.last_seq
        self._journal.wait_indexed(last, INDEX_SECONDS, before_waiting)
        until = last if place is None else place.until
        alerts = self._reader.page(filters, asked.sort, asked.limit + 1, until, place)
        more = len(alerts) > asked.limit
        alerts = alerts[: asked.limit]
        following = (
            _write_cursor(question, Place(until, _value(alerts[-1], asked.sort), alerts[-1].seq)) if more else None
        )
        return AlertPage(alerts, following)

    def detail(self, transaction_id: str) -> AlertDetail:
        """An alert with its whole life. Raises RequestError 404; JournalError."""
        alert = self._opened(transaction_id)
        changes = self._changes(alert.seq)
        for record in changes:
            change(alert, record)
        shown = [_change(record) for record in changes]
        label = label_of(self._journal.last_label(alert.transaction_id))
        return AlertDetail(**msgspec.structs.asdict(alert), label=label, changes=shown)

    def _opened(self, transaction_id: str) -> AlertRecord:
        """An alert as it was at first. Raises RequestError 404."""
        identity = self._identifiers.named(self._schema.transaction, transaction_id)
        record = self._journal.transaction(identity)
        alert = None if record is None else opened(record, self._schema.amount)
        if alert is None or is_backfilled(ranges_of(self._journal.meta(BACKFILLS)), alert.seq):
            raise RequestError(404, "unknown_alert", "no transaction of this id is an alert here")
        return alert

    def _changes(self, alert: int) -> list[ActionRecord]:
        """What was done with an alert, oldest first: what the index has, and what it does not have yet."""
        held = [record for record in self._journal.held_actions(ALERT) if decode_action(record.body).alert == alert]
        stored = self._reader.changes(alert)
        last = stored[-1].seq if stored else 0
        return [*stored, *(record for record in held if record.seq > last)]

    def decide(self, transaction_id: str, asked: ChangeAlert, author: str) -> AlertAction | None:
        """The body of the action that does what is asked; None where the same author did just that last.

        Raises RequestError 404, 409; JournalError.
        """
        alert = self.detail(transaction_id)
        note = self._identifiers.without_cards(asked.note)
        if (alert.state, alert.author, alert.note) == (asked.state, author, note):
            return None
        whose = "" if alert.author is None else f", by {alert.author}"
        if asked.expected is not None and asked.expected != alert.state:
            message = f"the alert is {alert.state}{whose}; expected {asked.expected}"
            raise RequestError(409, "conflict", message, "expected")
        possible = _FOLLOWS[alert.state]
        if asked.state not in possible:
            message = f"the alert is {alert.state}{whose}; from there it becomes {' or '.join(possible)}"
            raise RequestError(409, "conflict", message, "state")
        taken = {"open": None, "in_review": author}.get(asked.state, alert.assigned_to or author)
        return AlertAction(alert.seq, alert.transaction_id, asked.state, taken, note)


def _value(alert: Alert, sort: Sort) -> float:
    return {"newest": float(alert.seq), "probability": alert.fraud_probability, "risk": alert.risk}[sort]


def _change(record: ActionRecord) -> AlertChange:
    said = decode_action(record.body)
    return AlertChange(record.seq, said.state, said.assigned_to, record.author, said.note, format_instant(record.at))


# ---- backfills


def begin_backfill(journal: Journal) -> None:
    """What comes from now on makes no alerts. JournalError."""
    ranges: list[Range] = ranges_of(journal.meta(BACKFILLS))
    begin = journal.last_seq
    if ranges and ranges[-1][1] == begin:
        begin = ranges.pop()[0]
    _note_backfills(journal, [*ranges, (begin, None)])


def end_backfill(journal: Journal) -> None:
    """What comes from now on makes alerts again. JournalError."""
    ranges = ranges_of(journal.meta(BACKFILLS))
    if ranges and ranges[-1][1] is None:
        _note_backfills(journal, [*ranges[:-1], (ranges[-1][0], journal.last_seq)])


def _note_backfills(journal: Journal, ranges: list[Range]) -> None:
    journal.set_meta(BACKFILLS, msgspec.json.encode(ranges).decode())


# ---- events


class Events:
    """The alerts of a journal and their changes as what leaves for the webhook: the same bytes whenever it is asked.

    Only what the index has is here, and so only what was synced. For the outbox's thread; `waiting` is for any.
    """

    def __init__(self, journal: Journal, amount_field: str | None) -> None:
        self._journal = journal
        self._amount_field = amount_field
        self._reader = AlertReader(journal.index_path)

    def close(self) -> None:
        """Let the index go."""
        self._reader.close()

    def next_event(self, after: int) -> Event | None:
        """The first event after a sequence number. JournalError."""
        seq = self._reader.next_event(after)
        return None if seq is None else self.event(seq)

    def waiting(self, after: int) -> int:
        """How many there are after a sequence number. JournalError."""
        return self._reader.count_events(after)

    def event(self, seq: int) -> Event | None:
        """The event of a record: an alert was opened, or it was changed. JournalError."""
        if self._reader.is_alert(seq):
            record, alert = self._alert(seq)
            return _event("alert.opened", record.seq, alert.time, alert, encode_transaction(record))
        action = self._reader.action(seq)
        if action is None:
            return None
        _, alert = self._alert(decode_action(action.body).alert)
        change(alert, action)
        return _event("alert.changed", seq, format_instant(action.at), alert, encode_action(action))

    def _alert(self, seq: int) -> tuple[TransactionRecord, AlertRecord]:
        position = self._reader.position(seq)
        record = None if position is None else self._journal.read(position)
        alert = None if record is None else opened(record, self._amount_field)
        if record is None or alert is None:
            raise JournalError(f"the index says that record {seq} is an alert; remove the index")
        return record, alert


def _event(kind: str, seq: int, timestamp: str, alert: AlertRecord, content: bytes) -> Event:
    """An event; its id tells it from any other of that number, should a journal ever have been cut."""
    body = msgspec.json.encode({"type": kind, "timestamp": timestamp, "seq": seq, "data": alert})
    return Event(seq, f"msg_{seq}_{hashlib.sha256(content).hexdigest()[:16]}", body)
