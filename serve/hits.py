"""What a rule would have hit: a draft against the last transactions of a journal, without the service's lock.

It reads the log's files and the index on its own, so that scoring goes on; between two small blocks it leaves the processor
for as long as it had it. What the user's ring held at each transaction is derived again in arrival order. Probability and
decision are those that were answered.
"""

import sqlite3
import time as clock_time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from seqfraud.errors import RunError
from seqfraud.policy import DECISIONS, Decision
from serve.answers import Answer
from serve.decoding import Transaction, TransactionDecoder
from serve.expressions import Expression, activation, holds
from serve.facts import Case, Facts, Recent
from serve.log import HEADER_BYTES, BadFrameError, read_header, walk
from serve.records import LabelRecord, Record, TransactionRecord, decode_records
from serve.rule_bodies import Hits, RuleTest
from serve.rulebook import values_of

__all__ = ["MOST", "SECONDS", "rule_hits"]

MOST = 100_000
"""Transactions that are gone over by default, and at most."""
SECONDS = 30.0
BLOCK = 50
"""Transactions between two pauses: a few milliseconds."""

_answer = msgspec.json.Decoder(Answer).decode
_RECENT = "SELECT id, time, raw FROM transactions WHERE user = ? AND seq < ? ORDER BY time DESC, seq DESC LIMIT ?"


class _Ring:
    """One user's ring as `UserTable` would hold it: (time, numbers, categories) of at most 2 W events."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.events: list[tuple[int, list[float], list[int]]] = []
        self._anchor: int | None = None

    def restore(self, events: list[tuple[int, list[float], list[int]]], anchor: int | None) -> None:
        """What it held at some time: events oldest first, and the time of the newest that was dropped."""
        self.events, self._anchor = events, anchor

    def recent(self, transaction: Transaction) -> Recent:
        """As `facts.recent_of`, before a transaction's place."""
        end = bisect_right(self.events, transaction.time, key=_time_of)
        some = self.events[max(0, end - self.window) : end]
        integers = np.array([(at, *categories) for at, _, categories in some], dtype=np.int64)
        numbers = np.array([numbers for _, numbers, _ in some], dtype=np.float32)
        return Recent(
            integers.reshape(len(some), 1 + len(transaction.categories)),
            numbers.reshape(len(some), len(transaction.numbers)),
        )

    def take(self, transaction: Transaction) -> None:
        """Append an event, insert a late one, or pass over one that is older than the ring."""
        w, events = self.window, self.events
        event = (transaction.time, transaction.numbers, transaction.categories)
        if events and transaction.time < events[-1][0]:
            if self._anchor is not None and transaction.time < self._anchor:
                return
            events.insert(bisect_right(events, transaction.time, key=_time_of), event)
            if len(events) > 2 * w:
                self._drop()
            return
        if len(events) == 2 * w:
            self._drop()
        events.append(event)

    def _drop(self) -> None:
        self._anchor = self.events[self.window - 1][0]
        del self.events[: self.window]


def _time_of(event: tuple[int, list[float], list[int]]) -> int:
    return event[0]


class _Index:
    """The journal's index, read only, while the service may be writing to it."""

    def __init__(self, path: Path, decoder: TransactionDecoder, window: int) -> None:
        self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        self._decoder = decoder
        self._window = window

    def close(self) -> None:
        self._db.close()

    def first_of_last(self, count: int) -> int:
        """Sequence number of the first of the last `count` transactions; 1 where there are not so many."""
        row = self._db.execute(
            "SELECT seq FROM transactions ORDER BY seq DESC LIMIT 1 OFFSET ?", (count - 1,)
        ).fetchone()
        return 1 if row is None else int(row[0])

    def ring_before(self, user: str, seq: int) -> _Ring:
        """A user's ring before a sequence number, as if no event had been late beyond it."""
        w, ring = self._window, _Ring(self._window)
        (accepted,) = self._db.execute(
            "SELECT count(*) FROM transactions WHERE user = ? AND +seq < ?", (user, seq)
        ).fetchone()
        held = accepted if accepted <= 2 * w else w + 1 + (accepted - 2 * w - 1) % w
        rows = self._db.execute(_RECENT, (user, seq, held + 1)).fetchall()
        events = []
        for identity, time, raw in reversed(rows[:held]):
            record = TransactionRecord(0, identity, user, time, b"", raw.encode(), b"", b"", "")
            transaction = self._decoder.decode_stored(record)
            events.append((time, transaction.numbers, transaction.categories))
        ring.restore(events, rows[held][1] if len(rows) > held else None)
        return ring

    def labels_before(self, seq: int) -> Iterator[tuple[str, bool]]:
        """Labels said before a sequence number, in order."""
        for identity, is_fraud in self._db.execute(
            "SELECT transaction_id, is_fraud FROM labels WHERE seq < ? ORDER BY seq", (seq,)
        ):
            yield identity, bool(is_fraud)


def _records_since(folder: Path, seq: int) -> Iterator[Record]:
    """The log's records from a sequence number on, up to what is torn off or being written."""
    files = sorted(folder.glob("*.log"))
    first = max(0, bisect_right(files, seq, key=lambda file: int(file.stem)) - 1)
    for file in files[first:]:
        data = file.read_bytes()
        try:
            head = read_header(data[:HEADER_BYTES], file.name)
            for frame in walk(data, HEADER_BYTES, head.seq):
                if frame.seq + frame.taken > seq:
                    for record in decode_records(frame.seq, frame.payload):
                        if isinstance(record, Record) and record.seq >= seq:
                            yield record
        except BadFrameError as bad:
            if file != files[-1]:
                raise RunError(f"{file}, byte {bad.offset}: {bad.reason}") from bad


class _Examined(NamedTuple):
    """A transaction that was gone over; `hit` is None where the expression failed."""

    time: int
    amount: float
    hit: bool | None
    caught: bool
    changed: bool


class _Counts:
    """Hits by what is known of them."""

    def __init__(self) -> None:
        self.transactions = 0
        self.amount = 0.0

    def add(self, amount: float) -> None:
        self.transactions += 1
        self.amount += amount

    def said(self) -> Hits:
        return Hits(self.transactions, round(self.amount, 2))


def rule_hits(
    state: Path,
    decoder: TransactionDecoder,
    facts: Facts,
    window: int,
    expression: Expression,
    decision: Decision,
    last: int = MOST,
    seconds: float = SECONDS,
    pause: Callable[[float], None] = clock_time.sleep,
) -> RuleTest:
    """Go over the last transactions of a state folder; one that a service has open, too.

    Args:
        window: W of the bundle.
        decision: what the rule would say.
        last: how many transactions, the newest; of users seen in them earlier events are looked up where windows need them.
        seconds: it stops after that, and says that it did.
        pause: gives up the processor for so many seconds.

    Raises:
        RunError: there is no journal, or it cannot be read.
    """
    began = block = clock_time.monotonic()
    if not (state / "journal").is_dir() or not (state / "journal.sqlite").is_file():
        raise RunError(f"{state}: there is no journal here")
    getters = facts.getters(expression.names)
    with_events = facts.needs_events(expression.names)
    rings: dict[str, _Ring] = {}
    examined: dict[str, _Examined] = {}
    fraud: dict[str, bool] = {}
    complete = True
    try:
        with closing(_Index(state / "journal.sqlite", decoder, window)) as index:
            first = index.first_of_last(last)
            for record in _records_since(state / "journal", first):
                if isinstance(record, LabelRecord):
                    fraud[record.transaction_id] = record.is_fraud
                if not isinstance(record, TransactionRecord):
                    continue
                if len(examined) % BLOCK == 0:
                    now = clock_time.monotonic()
                    if now - began > seconds:
                        complete = False
                        break
                    pause(now - block)
                    block = clock_time.monotonic()
                transaction, answer = decoder.decode_stored(record), _answer(record.answer)
                ring = _Ring(window)
                if with_events:
                    known = rings.get(record.user)
                    ring = rings[record.user] = index.ring_before(record.user, first) if known is None else known
                case = _case(transaction, answer, ring)
                hit = holds(expression.program, activation(values_of(getters, case)))
                if with_events:
                    ring.take(transaction)
                changed = bool(hit) and _stricter(decision, answer.decision) != answer.decision
                caught = answer.decision != "approve"
                examined[record.id] = _Examined(transaction.time, transaction.amount, hit, caught, changed)
            for old in list(islice(examined, max(0, len(examined) - last))):  # the index is a moment behind the log
                del examined[old]
            for identity, is_fraud in index.labels_before(first):
                if identity in examined:
                    fraud.setdefault(identity, is_fraud)
    except (sqlite3.Error, OSError) as error:
        raise RunError(f"{state}: the journal cannot be read: {error}") from error
    counts = {name: _Counts() for name in ("hits", "fraud", "honest", "unknown", "missed", "missed_fraud", "all_fraud")}
    for identity, one in examined.items():
        label = fraud.get(identity)
        names = ["all_fraud"] if label else []
        if one.hit:
            names += ["hits", "unknown" if label is None else "fraud" if label else "honest"]
            names += [] if one.caught else ["missed", "missed_fraud"] if label else ["missed"]
        for name in names:
            counts[name].add(one.amount)
    said = {name: count.said() for name, count in counts.items()}
    words = (
        f"would have hit {said['hits'].transactions:,} of the last {len(examined):,}, "
        f"{said['fraud'].transactions:,} of them fraud"
    )
    return RuleTest(
        words=words,
        expression=expression.text,
        examined=len(examined),
        since=next((one.time for one in examined.values()), None),
        hits=said["hits"],
        fraud=said["fraud"],
        honest=said["honest"],
        unknown=said["unknown"],
        not_caught=said["missed"],
        fraud_not_caught=said["missed_fraud"],
        all_fraud=said["all_fraud"],
        changed=sum(one.changed for one in examined.values()),
        failed=sum(one.hit is None for one in examined.values()),
        complete=complete,
        seconds=round(clock_time.monotonic() - began, 3),
    )


def _case(transaction: Transaction, answer: Answer, ring: _Ring) -> Case:
    probability = answer.fraud_probability
    assert probability is not None  # a degraded answer is not stored
    return Case(transaction, probability, answer.history, answer.late, lambda: ring.recent(transaction))


def _stricter(rule: Decision, given: Decision) -> Decision:
    """What a rule of this decision alone makes of one that was given."""
    return "approve" if rule == "approve" else DECISIONS[max(DECISIONS.index(rule), DECISIONS.index(given))]
