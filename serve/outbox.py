"""The outbox: alerts and their changes leave for a webhook in the order of the journal, each at least once.

The journal's record is the entry; nothing is written when an alert is made. What is kept here, in `outbox.sqlite` of the
state folder, is only how far delivery has come: a cursor that is moved on after the receiver's 2xx, what is being tried,
and the dead letters. A crash between the 2xx and the cursor sends an event again, under the same id; none is left out.

Events come from the journal's index, which holds nothing but what was synced: what leaves has survived a power cut, with
either promise.
"""

import logging
import random
import sqlite3
import threading
import time as clock_time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from seqfraud.config import format_instant
from seqfraud.errors import JournalError, RequestError, RunError
from serve.answers import DeadLetter, OutboxState, Trying
from serve.decoding import decode_object
from serve.webhook import Event, Outcome, Sender, WebhookSettings

__all__ = [
    "OUTBOX",
    "EventSource",
    "Outbox",
    "Settle",
    "Settling",
    "decode_settling",
    "nothing_sent",
    "unknown_dead_letter",
]

_log = logging.getLogger(__name__)

FILE = "outbox.sqlite"
VERSION = 1
OUTBOX = "outbox"
"""Kind of the actions that settle a dead letter."""
SHOWN_DEAD = 100
MOST_DIGITS = 18
RETRY_SECONDS = 1.0
"""Until the journal's index or the outbox's own file is tried again."""
STOP_SECONDS = 2.0
"""A stop waits so long for an attempt that cannot be cut off: a name being resolved, a handshake."""
MOST_DOUBLINGS = 30

Settle = Literal["retry", "drop"]

_TABLES = """
CREATE TABLE cursor (one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL);
CREATE TABLE trying (
    one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL, attempts INTEGER NOT NULL,
    rejections INTEGER NOT NULL, since REAL NOT NULL, due REAL NOT NULL, status INTEGER, words TEXT NOT NULL);
CREATE TABLE dead (
    seq INTEGER PRIMARY KEY, attempts INTEGER NOT NULL, since REAL NOT NULL, at REAL NOT NULL, status INTEGER,
    words TEXT NOT NULL, retry INTEGER NOT NULL DEFAULT 0);
"""


class Settling(msgspec.Struct):
    """What is to become of a dead letter."""

    action: Settle


_decode_settling = msgspec.json.Decoder(Settling)


def decode_settling(body: bytes) -> Settle:
    """What a request wants with a dead letter. Raises RequestError."""
    return decode_object(body, _decode_settling, {"action": "retry or drop"}).action


def unknown_dead_letter() -> RequestError:
    """There is none of that number."""
    return RequestError(404, "unknown_dead_letter", "no dead letter has this sequence number")


class EventSource(Protocol):
    """Where events come from. Called by the outbox's thread alone; sqlite3.Error and JournalError are tried again."""

    def next_event(self, after: int) -> Event | None:
        """The first event after a sequence number, None where there is none yet."""

    def event(self, seq: int) -> Event | None:
        """The event of a sequence number."""

    def waiting(self, after: int) -> int:
        """How many events come after a sequence number. Also called by requests."""


@dataclass(frozen=True, slots=True)
class _Attempts:
    """What was tried of the event whose turn it is; times in seconds since the epoch."""

    seq: int
    attempts: int
    rejections: int
    since: float
    due: float
    status: int | None
    words: str


class _Store:
    """`outbox.sqlite`. Thread-safe; sqlite3.Error."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")  # what a power cut takes back is only sent again

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def version(self) -> int:
        return int(self._rows("PRAGMA user_version")[0][0])

    def _rows(self, sql: str, *values: object) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _change(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for sql, values in statements:
                    self._db.execute(sql, values)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def make(self, seq: int) -> None:
        """Tables, with the cursor there; on disk when this returns, for "now" must not become later."""
        with self._lock:
            self._db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version={VERSION};")
            self._db.execute("INSERT INTO cursor VALUES (1, ?)", (seq,))
            self._db.execute("COMMIT")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def cursor(self) -> int:
        return int(self._rows("SELECT seq FROM cursor")[0][0])

    def set_cursor(self, seq: int) -> None:
        self._change(_move(seq), _NOTHING_TRIED)

    def trying(self) -> _Attempts | None:
        rows = self._rows("SELECT seq, attempts, rejections, since, due, status, words FROM trying")
        return _Attempts(*rows[0]) if rows else None

    def failed(self, t: _Attempts) -> None:
        values = (t.seq, t.attempts, t.rejections, t.since, t.due, t.status, t.words)
        self._change(("INSERT OR REPLACE INTO trying VALUES (1, ?, ?, ?, ?, ?, ?, ?)", values))

    def bury(self, t: _Attempts, at: float) -> None:
        dead = (t.seq, t.attempts, t.since, at, t.status, t.words)
        self._change(("INSERT OR REPLACE INTO dead VALUES (?, ?, ?, ?, ?, ?, 0)", dead), _move(t.seq), _NOTHING_TRIED)

    def dead(self, limit: int) -> list[DeadLetter]:
        rows = self._rows("SELECT seq, attempts, since, at, status, words, retry FROM dead ORDER BY seq LIMIT ?", limit)
        return [
            DeadLetter(seq, attempts, _iso(since), _iso(at), status, words, bool(retry))
            for seq, attempts, since, at, status, words, retry in rows
        ]

    def count_dead(self) -> int:
        return int(self._rows("SELECT count(*) FROM dead")[0][0])

    def to_retry(self) -> int | None:
        rows = self._rows("SELECT seq FROM dead WHERE retry ORDER BY seq LIMIT 1")
        return rows[0][0] if rows else None

    def is_dead(self, seq: int) -> bool:
        return bool(self._rows("SELECT 1 FROM dead WHERE seq = ?", seq))

    def mark(self, seq: int) -> None:
        self._change(("UPDATE dead SET retry = 1 WHERE seq = ?", (seq,)))

    def forget(self, seq: int) -> None:
        self._change(("DELETE FROM dead WHERE seq = ?", (seq,)))

    def failed_again(self, seq: int, at: float, outcome: Outcome) -> None:
        values = (at, outcome.status, outcome.words, seq)
        self._change(
            ("UPDATE dead SET retry = 0, attempts = attempts + 1, at = ?, status = ?, words = ? WHERE seq = ?", values)
        )


_NOTHING_TRIED: tuple[str, tuple[object, ...]] = ("DELETE FROM trying", ())


def _move(seq: int) -> tuple[str, tuple[object, ...]]:
    return "UPDATE cursor SET seq = ?", (seq,)


class Outbox:
    """A thread that delivers one event at a time. `state`, `settle`, `wake` are for any thread."""

    def __init__(
        self,
        state: Path,
        settings: WebhookSettings,
        source: EventSource,
        last_seq: int,
        clock: Callable[[], float] = clock_time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Open or make the outbox of a state folder; `start` begins to deliver.

        Args:
            last_seq: of the journal: where an outbox begins that begins now.
            chance: from 0 to below 1, for the delays.

        Raises:
            RunError: its file cannot be used.
            ConfigError: the secret cannot be used.
        """
        self._settings = settings
        self._source = source
        self._clock = clock
        self._chance = chance
        self._sender = Sender(settings, clock)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._gone = False
        self._failing = ""
        self._said = ""
        self.delivered = 0
        """Since the start."""
        path = state / FILE
        try:
            self._store = _Store(path)
            self._open(path, last_seq)
        except sqlite3.Error as error:
            raise RunError(f"{path}: {error}; without this file the outbox begins anew") from error
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def _open(self, path: Path, last_seq: int) -> None:
        version = self._store.version()
        if version > VERSION:
            raise RunError(f"{path}: format {version}; this version reads format {VERSION}")
        if version == 0:
            self._store.make(last_seq if self._settings.begin == "now" else 0)
        elif self._store.cursor() > last_seq:
            _log.warning("the outbox had come to %d of a journal that now ends with %d", self._store.cursor(), last_seq)
            self._store.set_cursor(last_seq)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self) -> None:
        """Deliver no more; an attempt that is being made is cut off, and made again after the next start."""
        self._stopping.set()
        self._wake.set()
        self._sender.stop()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
        self._store.close()

    def wake(self) -> None:
        """Perhaps there is something to deliver."""
        self._wake.set()

    # ---- the thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                pause = self._step()
                self._failing = ""
            except (sqlite3.Error, JournalError) as error:
                if self._stopping.is_set():
                    return
                if not self._failing:
                    _log.error("the outbox cannot go on: %s", error)
                self._failing = str(error)
                pause = RETRY_SECONDS
            if pause is None or pause > 0:
                self._wake.wait(pause)
                self._wake.clear()

    def _step(self) -> float | None:
        """Make one attempt where one is due; seconds until the next, None: until something happens."""
        if self._gone:
            return None
        again = self._store.to_retry()
        if again is not None:
            self._try_dead(again)
            return 0
        before = self._store.trying()
        if before is not None and (early := before.due - self._clock()) > 0:
            # a clock that was set back must not make it wait for ever
            return min(early, self._settings.give_up_seconds)
        event = self._source.next_event(self._store.cursor())
        if event is None:
            return None
        self._try(event, before if before is not None and before.seq == event.seq else None)
        return 0

    def _try(self, event: Event, before: _Attempts | None) -> None:
        began = self._clock()
        outcome = self._sender.send(event)
        if self._stopping.is_set() and not outcome.delivered:
            return
        if outcome.delivered:
            self._store.set_cursor(event.seq)
            self._succeeded()
            return
        self._tell(outcome)
        attempts = 1 + (before.attempts if before else 0)
        rejections = int(outcome.rejected) + (before.rejections if before else 0)
        since, now = before.since if before else began, self._clock()
        due = now + self._delay(attempts, outcome)
        tried = _Attempts(event.seq, attempts, rejections, since, due, outcome.status, outcome.words)
        if outcome.gone:
            self._stop_for_good()
            self._store.failed(tried)
        elif rejections >= self._settings.rejected_attempts or now - since >= self._settings.give_up_seconds:
            self._store.bury(tried, now)
            _log.error("event %d is a dead letter after %d attempts: %s", event.seq, attempts, outcome.words)
        else:
            self._store.failed(tried)

    def _try_dead(self, seq: int) -> None:
        event = self._source.event(seq)
        if event is None:
            self._store.forget(seq)  # of a part of the journal that was cut off
            return
        outcome = self._sender.send(event)
        if outcome.delivered:
            self._store.forget(seq)
            self._succeeded()
        elif not self._stopping.is_set():
            self._store.failed_again(seq, self._clock(), outcome)
            if outcome.gone:
                self._stop_for_good()

    def _delay(self, attempts: int, outcome: Outcome) -> float:
        """Seconds to the next attempt."""
        s = self._settings
        longest = min(s.longest_delay_seconds, s.first_delay_seconds * 2.0 ** min(attempts - 1, MOST_DOUBLINGS))
        asked = min(outcome.retry_after or 0.0, s.give_up_seconds)
        return max(longest * (1 + self._chance()) / 2, asked)

    def _stop_for_good(self) -> None:
        self._gone = True
        _log.error("the receiver of alerts answered 410: nothing is sent to it until the service is started again")

    def _succeeded(self) -> None:
        self.delivered += 1
        if self._said:
            _log.warning("the receiver of alerts takes them again")
            self._said = ""

    def _tell(self, outcome: Outcome) -> None:
        """One line per outage."""
        if not self._said:
            self._said = outcome.words
            _log.warning("%s does not take alerts: %s", self._settings.origin, outcome.words)

    # ---- for requests; JournalError

    def state(self, last_seq: int) -> OutboxState:
        """How far delivery has come, and what did not arrive."""
        with _readable():
            return self._state(last_seq)

    def undelivered(self) -> dict[str, int]:
        """How many events wait, and how many are dead letters."""
        with _readable():
            return {"waiting": self._source.waiting(self._store.cursor()), "dead": self._store.count_dead()}

    def _state(self, last_seq: int) -> OutboxState:
        cursor, tried = self._store.cursor(), self._store.trying()
        return OutboxState(
            status="stopped" if self._gone else "failing" if tried or self._failing else "sending",
            receiver=self._settings.origin,
            delivered_to=cursor,
            journal=last_seq,
            waiting=self._source.waiting(cursor),
            trying=None
            if tried is None
            else Trying(tried.seq, tried.attempts, _iso(tried.since), _iso(tried.due), tried.status, tried.words),
            dead_letters=self._store.count_dead(),
            dead=self._store.dead(SHOWN_DEAD),
        )

    def require_dead(self, text: str) -> int:
        """The number of a dead letter as an address spells it. Raises RequestError 404 where there is none."""
        if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS:
            with _readable():
                if self._store.is_dead(int(text)):
                    return int(text)
        raise unknown_dead_letter()

    def settle(self, seq: int, action: Settle) -> None:
        """Try a dead letter once more, before what waits, or let it go."""
        with _readable():
            if action == "retry":
                self._store.mark(seq)
                self.wake()
            else:
                self._store.forget(seq)


def nothing_sent(last_seq: int) -> OutboxState:
    """Of a service without a webhook."""
    return OutboxState("off", "", 0, last_seq, 0, None, 0, [])


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise JournalError(f"the outbox cannot be read: {error}") from error


def _iso(seconds: float) -> str:
    return format_instant(int(seconds * 1000))
