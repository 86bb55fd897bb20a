"""The scoring service: decode -> look up -> context -> graph -> journal -> commit to memory.

The journal is the truth and memory its fold: a transaction changes memory only after its record is stored, and
`Service.open` rebuilds memory from the newest snapshot and the records after it by the same code that scores live.
"""

import copy
import fcntl
import logging
import os
import threading
import time as clock_time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Bundle, Manifest
from seqfraud.config import format_instant
from seqfraud.errors import JournalError, ModelError, RequestError, RunError, SeqfraudError
from seqfraud.identifiers import Identifiers
from seqfraud.registry import Registry as ModelRegistry
from serve.alertindex import ALERT
from serve.alerts import ANALYST, SAYS, Alerts, Events, decode_change
from serve.answers import Answer, Explanation, GivenAnswer, GivenLabel, PastEvent, Reason
from serve.capture import Capture
from serve.catchup import CLOSE, CatchUp
from serve.challenger import Challenger, ShadowSettings
from serve.control import open_control
from serve.decoding import InputSettings, Limits, SaidLabel, Transaction, TransactionDecoder, decode_labels
from serve.desk import Desk
from serve.engine import Engine, ReadsAlike, context_key, graphs_may_fail, require_same_fields
from serve.fallback import FallbackSettings
from serve.identity import open_identifiers
from serve.journal import ActionRecord, Journal, LabelRecord, Promise, TransactionRecord
from serve.log import SYSTEM_DISK, Disk
from serve.measures import MONITOR, Figures, HeardLabel, Measures, declare_state
from serve.metrics import Registry, foreign_text
from serve.models import MODEL as MODEL_ACTION
from serve.models import Models
from serve.outbox import OUTBOX, Outbox, decode_settling, nothing_sent, unknown_dead_letter
from serve.reasons import Situation
from serve.records import ANONYMOUS
from serve.rulebook import KINDS, RuleBook
from serve.shadow import shadow_folder
from serve.snapshot import Pause, Snapshotter, read_newest, remove_unfinished, write_snapshot
from serve.webhook import WebhookSettings

_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

SNAPSHOT_S = 300.0
"""Seconds between snapshots."""
SNAPSHOT_RECORDS = 5000
"""Fewer records are not worth one; a start folds them in within a second."""


MODEL = "model_unavailable"
STORAGE = "storage_unavailable"
"""Why an answer may be degraded; the codes of the errors, too."""
_CANNOT = {
    MODEL: "the model could not answer; nothing changed",
    STORAGE: "the transaction could not be stored; nothing changed",
}

_PERHAPS_STORED = "what was asked may be stored or not; ask again when the service has been started again"

FIELDS = "fields"
"""Key of the journal's note that says which fields its transactions have."""
FOLD_ABOVE = 5_000
"""As many as a snapshot is worth (SNAPSHOT_RECORDS): one by one they are still quick."""
IDLE_S = 1.0
"""Where nothing was stored for so long, work beside scoring does not rest."""
REFUSE = FallbackSettings()


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
        fallback: FallbackSettings = REFUSE,
        identifier_key: Path | None = None,
        inputs: InputSettings | None = None,
        webhook: WebhookSettings | None = None,
        metrics: Registry | None = None,
        registry: ModelRegistry | None = None,
        shadow: ShadowSettings | None = None,
    ) -> None:
        """Open the state folder and rebuild memory. Raises RunError where another process has it.

        Args:
            promise: with `disk`, what answers `score`, `score_batch` and `add_labels` is on disk before they return.
            disk: what writes and syncs.
            snapshot_every: seconds between snapshots taken while the service runs; None: only `close` takes one.
            snapshot_records: such a snapshot is taken only if so many records came since the last.
            fold_above: more records than this are folded into memory in batches, which is quicker, and exact to the
                parity of the two graphs; fewer one by one, which gives the bits that scoring gave.
            fallback: what is answered while the model or the journal cannot.
            identifier_key: file of the key that identifiers are hashed with; None: one in the state folder, which is
                made if no record was hashed yet.
            inputs: limits of what a client may send, `[input]`; its defaults where None.
            webhook: where alerts go, if anywhere.
            metrics: where it declares what it measures; None: nothing is measured.
            registry: where other models come from, if any may come into force.
            shadow: how challengers score, `[shadow]`; its defaults where None.
        """
        self._clock = clock
        manifest = bundle.manifest
        self._limits = Limits(inputs)
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._rested_at = (clock_time.monotonic(), -1)
        """When the journal was last seen to have grown, and its last record then."""
        self._policies = {bundle.id: manifest.policy}
        """Of the models that have been in force since the start."""
        self._shadow = shadow or ShadowSettings()
        self.models = Models(self, registry, self._shadow.most)
        self._snapshot_every = snapshot_every
        self._snapshotting = threading.RLock()
        """Held while a snapshot is taken, which is before the service's lock, never after it."""
        self._snapshot_records = snapshot_records
        self._snapshot_wanted = False
        """Of the model in force there is none yet."""
        self._fold_above = fold_above
        self._state = state
        self._encode = msgspec.json.Encoder().encode
        self._ready = False
        self._fallback = fallback
        self._folds: dict[str, tuple[Callable[[ActionRecord], None], ...]] = {}
        """Who follows the actions of a kind."""
        self._failing = ""
        """Why the last transaction that was tried could not be scored; empty where it could."""
        self.degraded_answers = {MODEL: 0, STORAGE: 0}
        """How many there were, by what failed."""
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
            self._identifiers = open_identifiers(state, self._journal, manifest, identifier_key)
            self.engine = Engine(bundle, self._journal, self._identifiers, self._limits)
            """Of the bundle in force."""
            self.engine.control = open_control(self._journal, bundle)
            self._alerts = Alerts(self._journal, self._identifiers, manifest.schema)
            opened.callback(self._alerts.close)
            self._outbox = None if webhook is None else self._open_outbox(webhook, manifest, opened)
            self._rebuild()
            self.follow(KINDS, lambda action: self.engine.rules.fold(action))
            opened.pop_all()
        self.desk = Desk(self, self.engine, self._limits, state)
        self._metrics = metrics
        self._measures = None if metrics is None else self._measured(metrics)
        if self._outbox is not None:
            self._outbox.start()
        _log.info("%s at the start", _head_words(self._journal.head))
        self._snapshotter = (
            None if snapshot_every is None else Snapshotter(self.snapshot, self._snapshot_due, snapshot_every)
        )
        self.models.start()

    # ---- start and stop

    def _open_outbox(self, webhook: WebhookSettings, manifest: Manifest, opened: ExitStack) -> Outbox:
        events = Events(self._journal, manifest.schema.amount)
        opened.callback(events.close)
        outbox = Outbox(self._state, webhook, events, self._journal.last_seq)
        opened.callback(outbox.stop)
        self._journal.after_fold = outbox.wake
        return outbox

    def _measured(self, registry: Registry) -> Measures:
        measures = Measures(registry, self.engine.bundle.manifest, self.degraded_answers)
        declare_state(
            registry,
            self._figures,
            self.ready,
            lambda: self.engine.rules,
            lambda: self.engine.explainer.failures,
            self._outbox,
            self.degraded_answers,
            self._state,
        )
        self.models.declare(registry)
        return measures

    def _figures(self) -> Figures:
        """For a scrape, without the lock."""
        unsynced, unindexed = self._journal.behind
        records = self._journal.last_seq
        engine = self.engine
        return Figures(
            users=len(engine.users.slots),
            entities=len(engine.context.rows),
            early_labels=len(engine.memory.early),
            journal_records=records,
            journal_bytes=self._journal.size,
            unsynced=unsynced,
            unindexed=unindexed,
            snapshot_behind=records - self._snapshot_seq,
            journal_failed=bool(self._journal.failed),
            model=engine.bundle.id,
        )

    def _rebuild(self) -> None:
        """Memory from the newest snapshot of this bundle and the records after it."""
        engine, journal = self.engine, self._journal
        _note_context(journal, engine.bundle)
        reads_alike = ReadsAlike(journal, engine.bundle.id)
        remove_unfinished(self._state)
        for folder in (self._state, shadow_folder(self._state, engine.bundle.id)):
            since = read_newest(folder, engine.bundle.id, journal.last_seq, engine.remember)
            if since is not None:
                break
        else:
            since = 0
            engine.remember(())
        self._snapshot_seq = since
        began, count = clock_time.perf_counter(), journal.last_seq - since
        if count > self._fold_above:
            for _ in engine.memory.fold(journal.after(since), reads_alike.__getitem__, engine.sequence):
                pass
        else:
            for record in journal.after(since):
                engine.replay(record, reads_alike)
        if count:
            seconds = clock_time.perf_counter() - began
            _log.info("%d journal records after %d folded into memory in %.1f s", count, since, seconds)
        self._ready = True

    def close(self) -> None:
        """Write a snapshot and let the state folder go."""
        self._closing.set()
        self._stop_snapshots()
        self.models.stop(snapshots=True)
        with self._snapshotting, self._lock:
            if self._ready:
                try:
                    self.snapshot(pause=_no_pause)
                except (OSError, SeqfraudError) as error:  # it only saves time
                    _log.error("no snapshot: %s", error)
                self.abandon()

    def abandon(self) -> None:
        """Let the state folder go without a snapshot, as a crash would."""
        self._closing.set()
        self.models.stop(snapshots=False)
        with self._lock:
            if not self._ready:
                return
            self._ready = False  # a snapshot that is being taken gets no name any more
            if self._outbox is not None:
                self._outbox.stop()
            self._alerts.close()
            self._journal.close()
            _log.info("%s at the end", _head_words(self._journal.head))
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
                seq, head = self._journal.last_seq, self._journal.head
                bundle, memory = self.engine.bundle.id, self.engine.memory
                capture = Capture(self._lock, memory.users, memory.context, memory.labels, memory.early, pause)
            try:
                write_snapshot(self._state, bundle, seq, capture.pieces(), self._wait_synced, head)
            finally:
                with self._lock:
                    capture.end()
            self._snapshot_seq, self._snapshot_wanted = seq, False
            _log.info("%s at a snapshot", _head_words(head))

    def _snapshot_due(self) -> bool:
        return self._snapshot_wanted or self._journal.last_seq - self._snapshot_seq >= self._snapshot_records

    def _wait_synced(self, seq: int) -> None:
        """Return once the journal is sure to have a record; a snapshot may not know more than the journal."""
        self._journal.wait_durable(seq)
        if not self._ready:
            raise RunError(f"{self._state}: the service was abandoned while a snapshot was being taken")

    # ---- scoring

    def score(self, body: bytes) -> bytes:
        """One transaction as JSON -> its answer as JSON. Raises RequestError."""
        began = perf_counter()
        transaction = self.engine.decoder.decode(body)
        decoded = perf_counter()
        answer = self.score_one(transaction)
        scored = perf_counter()
        (answer,) = self._promised([(transaction, answer)])
        promised = perf_counter()
        encoded = self._encode(answer)
        if self._measures is not None:
            self._measures.answered(decoded - began, promised - scored, perf_counter() - promised)
        return encoded

    def score_batch(self, body: bytes) -> bytes:
        """A JSON array of transactions -> `{"results": [...]}`: what its items posted one by one would be."""
        began = perf_counter()
        engine = self.engine
        items = engine.decoder.decode_batch(body)
        if len(items) > engine.max_batch:
            raise RequestError(
                413, "batch_too_large", f"{len(items)} transactions; at most {engine.max_batch} per batch"
            )
        results: list[Answer | dict[str, Any]] = []
        scored: list[tuple[Transaction, Answer]] = []
        places: list[int] = []
        decode = perf_counter() - began
        for place, item in enumerate(items):
            try:
                began = perf_counter()
                transaction = engine.decoder.decode(item)
                decode += perf_counter() - began
                answer = self.score_one(transaction)
            except RequestError as error:
                results.append({"error": {"code": error.code, "message": error.message, "field": error.field}})
            else:
                scored.append((transaction, answer))
                places.append(place)
                results.append(answer)
        began = perf_counter()
        for place, answer in zip(places, self._promised(scored), strict=True):
            results[place] = answer
        promised = perf_counter()
        encoded = self._encode({"results": results})
        if self._measures is not None:
            self._measures.answered(decode, promised - began, perf_counter() - promised)
        return encoded

    def score_one(self, transaction: Transaction) -> Answer:
        """Score, store and commit one transaction; a known id gives the answer of the first time.

        Where the model or the journal cannot, nothing changes, and the fallback answers: RequestError 503 by default.
        """
        asked = perf_counter()
        try:
            with self._lock:
                self._require_ready()
                self.check_deadline()
                if transaction.decoder is not self.engine.decoder:
                    transaction = self.engine.decoder.decode_again(transaction)
                known = self._journal.transaction(transaction.id)
                return self._score_new(transaction, asked) if known is None else self._again(known, transaction)
        except JournalError as error:
            return self._fall_back(transaction, STORAGE, _CANNOT[STORAGE], error)
        except ModelError as error:
            return self._fall_back(transaction, MODEL, _CANNOT[MODEL], error)

    def _fall_back(self, transaction: Transaction, code: str, words: str, error: Exception) -> Answer:
        """The degraded answer to a transaction, or RequestError 503, as the owner chose."""
        with self._lock:
            if self._failing != code:
                self._failing = code
                _log.error("%s: %s", code, error, exc_info=error.__cause__)
            if self._measures is not None:
                self._measures.failed(code)
            if self._fallback.mode == "refuse":
                raise RequestError(503, code, words) from None
            self.degraded_answers[code] += 1
            engine = self.engine
            slot = engine.users.slots.get(transaction.user)
            history = 0 if slot is None else int(engine.users.accepted[slot])
            late = slot is not None and engine.users.is_late(slot, transaction.time)
        decision, limit = self._fallback.decide(engine.decoder.amount_of(transaction))
        return Answer(
            transaction_id=transaction.shown_id,
            fraud_probability=None,
            is_fraud=decision == "decline",
            decision=decision,
            reasons=[Reason("degraded", f"{code}: {limit}", None)],
            model=engine.bundle.id,
            history=history,
            late=late,
            duplicate=False,
            degraded=True,
        )

    def _recovered(self) -> None:
        if self._failing:
            _log.warning("%s: transactions are scored again", self._failing)
            self._failing = ""

    def _promised(self, scored: list[tuple[Transaction, Answer]]) -> list[Answer]:
        """Answers that may leave: once what they stand on is durable, or else by the fallback."""
        if all(answer.degraded for _, answer in scored):
            return [answer for _, answer in scored]
        try:
            self._journal.wait_durable(self._journal.last_seq, self.before_waiting)
        except JournalError as error:
            return [
                answer if answer.degraded else self._fall_back(transaction, STORAGE, _PERHAPS_STORED, error)
                for transaction, answer in scored
            ]
        return [answer for _, answer in scored]

    def _score_new(self, transaction: Transaction, asked: float) -> Answer:
        """Score and store a transaction of an id that is not there; `asked` for at this moment of perf_counter."""
        begun = perf_counter()
        engine = self.engine
        users, entities = len(engine.users.slots), len(engine.context.rows)
        undo = engine.labels.advance(transaction.time)
        try:
            rows = engine.context.rows_of(transaction.entities)
            context = engine.context.read(rows, transaction.time, transaction.amount).astype(np.float32)
            read = perf_counter()
            scored, answer = engine.judge(transaction, context)
            decided = perf_counter()
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
                    bundle=engine.bundle.id,
                )
            )
        except BaseException:
            engine.labels.take_back(undo)
            engine.users.forget_newest(users)
            engine.context.forget_newest(entities)
            raise
        stored = perf_counter()
        scored.commit()
        engine.memory.settle(seq, transaction, rows)
        if self._measures is not None:
            marks = (asked, begun, read, engine.judged, decided, stored, perf_counter())
            self._measures.scored(transaction, answer, marks)
        answer.transaction_id = transaction.shown_id
        self._recovered()
        return answer

    def judge_again(self, record: TransactionRecord) -> Answer:
        """The answer to a stored transaction if it came now and read the context that was recorded; nothing is changed."""
        with self._lock:
            engine = self.engine
            users = len(engine.users.slots)
            try:
                transaction = engine.decoder.decode_stored(record)
                return engine.judge(transaction, np.frombuffer(record.context, dtype=np.float32))[1]
            finally:
                engine.users.forget_newest(users)

    def _again(self, known: TransactionRecord, transaction: Transaction) -> Answer:
        if known.content != transaction.content:
            if self._measures is not None:
                self._measures.conflicts.value += 1
            raise RequestError(
                409,
                "conflict",
                "a transaction of this id was scored before with other content",
                self.bundle.manifest.schema.transaction or "",
            )
        answer = msgspec.json.decode(known.answer, type=Answer)
        answer.transaction_id, answer.duplicate = transaction.shown_id, True
        if self._measures is not None:
            self._measures.duplicates.value += 1
        return answer

    def _wait_durable(self, seq: int) -> None:
        """Keep the promise for every record up to `seq`; outside the lock, so that others come to share the sync."""
        try:
            self._journal.wait_durable(seq, self.before_waiting)
        except JournalError as error:
            raise RequestError(503, STORAGE, _PERHAPS_STORED) from error

    # ---- labels

    def add_labels(self, body: bytes, author: str = ANONYMOUS) -> bytes:
        """A JSON array of labels -> how many were new, changed, unchanged, and of unknown transactions."""
        answer = self._encode(self.hear_labels(decode_labels(body, self._limits), author))
        self._wait_durable(self._journal.last_seq)
        return answer

    def hear_labels(self, labels: list[SaidLabel], author: str = ANONYMOUS) -> dict[str, int]:
        """Store labels, all or none, and let them wait for their time. Labels of unknown transactions are kept."""
        column, hidden = self.bundle.manifest.schema.transaction, self._identifiers
        labels = [
            SaidLabel(
                hidden.named(column, said.transaction_id),
                said.is_fraud,
                said.known_at,
                hidden.without_cards(said.source),
            )
            for said in labels
        ]
        with self._lock:
            self._require_ready()
            self.check_deadline()
            try:
                heard, records = self._store_labels(labels, author)
            except JournalError as error:
                _log.error("journal: %s", error)
                message = "the labels could not be stored; nothing changed"
                raise RequestError(503, "storage_unavailable", message) from None
            for record in records:
                self.engine.memory.hear(record)
            self._count_labels(heard)
            outcomes = [label.outcome for label in heard]
            return {outcome: outcomes.count(outcome) for outcome in ("new", "changed", "unchanged", "unknown")}

    def _store_labels(self, labels: list[SaidLabel], author: str) -> tuple[list[HeardLabel], list[LabelRecord]]:
        heard, records = self._new_labels(labels, author, self._journal.last_seq + 1)
        self._journal.append_labels(records)
        return heard, records

    def _new_labels(
        self, labels: list[SaidLabel], author: str, first: int
    ) -> tuple[list[HeardLabel], list[LabelRecord]]:
        """What labels of stored ids are to what was said before, and the records of those that say something new.

        Args:
            first: sequence number of the first record.
        """
        heard: list[HeardLabel] = []
        now = self._clock()
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
                heard.append(HeardLabel(label.source, "unchanged", None))
                continue
            found = self._journal.seq_of(identity)
            newest[identity] = label.is_fraud
            known_at = now if label.known_at is None else label.known_at
            outcome = "unknown" if found is None else "new" if before is None else "changed"
            heard.append(HeardLabel(label.source, outcome, None if found is None else known_at - found[1]))
            seq = first + len(records)
            records.append(LabelRecord(seq, identity, label.is_fraud, known_at, now, label.source, author))
        return heard, records

    def _count_labels(self, heard: list[HeardLabel]) -> None:
        """Labels were stored; under the lock."""
        if self._measures is not None:
            self._measures.heard(heard)

    # ---- actions

    def follow(self, kinds: Sequence[str], fold: Callable[[ActionRecord], None]) -> None:
        """Give `fold` the actions of some kinds in order: now those that the journal holds, then each as it is stored.

        It is called under the lock and must not fail. Raises JournalError where the journal cannot be read.
        """
        with self._lock:
            for record in self._journal.actions(kinds):
                fold(record)
            for kind in kinds:
                self._folds[kind] = (*self._folds.get(kind, ()), fold)

    def act(self, kind: str, author: str, body: bytes, require: Callable[[], None] = lambda: None) -> ActionRecord:
        """Store what somebody did, a JSON text, and give it to those who follow its kind; returned once durable.

        Args:
            require: called under the lock before anything is stored; raises RequestError where it may not be done now.

        Raises:
            RequestError: what `require` raises; 503 where nothing can be stored.
        """
        with self._lock:
            self._require_ready()
            self.check_deadline()
            require()
            record = self._append_action(kind, author, body)
        self._wait_durable(record.seq)
        return record

    def store_action(self, kind: str, author: str, body: bytes) -> ActionRecord:
        """The same for what took its time: no deadline is looked at."""
        with self._lock:
            self._require_ready()
            record = self._append_action(kind, author, body)
        self._wait_durable(record.seq)
        return record

    def _append_action(self, kind: str, author: str, body: bytes) -> ActionRecord:
        record = ActionRecord(self._journal.last_seq + 1, kind, self._clock(), author, body)
        try:
            self._journal.append_action(record)
        except JournalError as error:
            _log.error("journal: %s", error)
            raise RequestError(503, STORAGE, "what was done could not be stored; nothing changed") from None
        for fold in self._folds.get(kind, ()):
            fold(record)
        return record

    def actions(self, kind: str) -> list[ActionRecord]:
        """What was done of a kind, in order. Raises RequestError 503."""
        with self._lock, _readable():
            return self._journal.actions((kind,))

    def reading(self) -> threading.RLock:
        """What is held while the rule book is read."""
        return self._lock

    # ---- alerts

    def alerts(self, query: str) -> bytes:
        """Some alerts by the parameters of a query string. Raises RequestError."""
        with _readable():
            return self._encode(self._alerts.page(query, self.before_waiting))

    def alert(self, transaction_id: str) -> bytes:
        """An alert with its whole life. Raises RequestError 404."""
        with self._lock, _readable():
            return self._encode(self._alerts.detail(transaction_id))

    def change_alert(self, transaction_id: str, body: bytes, author: str) -> bytes:
        """Change an alert's state -> the alert. Closing it says what its transaction was, in one frame of the journal.

        Raises RequestError.
        """
        asked = decode_change(body)
        with self._lock:
            self._require_ready()
            self.check_deadline()
            try:
                action = self._alerts.decide(transaction_id, asked, author)
                if action is not None:
                    seq, now = self._journal.last_seq + 1, self._clock()
                    fraud = SAYS.get(asked.state)
                    said = [] if fraud is None else [SaidLabel(action.transaction_id, fraud, None, ANALYST)]
                    heard, labels = self._new_labels(said, author, seq + 1)
                    record = ActionRecord(seq, ALERT, now, author, self._encode(action))
                    self._journal.append_action(record, labels)
                    for label in labels:
                        self.engine.memory.hear(label)
                    self._count_labels(heard)
                answer = self._encode(self._alerts.detail(transaction_id))
                last = self._journal.last_seq
            except JournalError as error:
                _log.error("journal: %s", error)
                raise RequestError(503, STORAGE, "the alert could not be changed; nothing changed") from None
        self._wait_durable(last)
        return answer

    def outbox(self) -> bytes:
        """How far alerts have come on their way to the webhook."""
        last = self._journal.last_seq
        with _readable():
            return self._encode(nothing_sent(last) if self._outbox is None else self._outbox.state(last))

    def settle_dead_letter(self, seq: str, body: bytes, author: str) -> bytes:
        """Try a dead letter once more, or let it go -> the outbox. Raises RequestError."""
        action = decode_settling(body)
        outbox = self._outbox
        if outbox is None:
            raise unknown_dead_letter()
        with _readable():
            number = outbox.require_dead(seq)
            self.act(OUTBOX, author, self._encode({"seq": number, "action": action}))
            outbox.settle(number, action)
        return self.outbox()

    # ---- looking

    def transaction(self, transaction_id: str) -> bytes:
        """The answer as it was given, and the labels said since. Raises RequestError 404."""
        stored = self._identifiers.named(self.bundle.manifest.schema.transaction, transaction_id)
        with self._lock, _readable():
            record = self._journal.transaction(stored)
            labels = self._journal.labels_of(stored)
        if record is None:
            raise RequestError(404, "unknown_transaction", "no transaction of this id was scored here")
        answer = msgspec.json.decode(record.answer, type=Answer)
        answer.transaction_id = transaction_id
        given = [GivenLabel(r.is_fraud, r.known_at, r.said_at, r.source, r.author) for r in labels]
        return self._encode(GivenAnswer(**msgspec.structs.asdict(answer), labels=given))

    def explanation(self, transaction_id: str) -> bytes:
        """What a transaction's score is made of. Raises RequestError 404, or 409 where it is no longer in memory.

        Under the lock its user's events are copied, nothing more: working it out takes tens of milliseconds.
        """
        stored = self._identifiers.named(self.bundle.manifest.schema.transaction, transaction_id)
        with self._lock, _readable():
            engine = self.engine
            record = self._journal.transaction(stored)
            if record is None:
                raise RequestError(404, "unknown_transaction", "no transaction of this id was scored here")
            users = engine.users
            slot = users.slots[record.user]
            held = int(users.held[slot])
            # by time, then arrival: the order of the ring, in which the last ones are
            records = self._journal.recent(record.user, held)[::-1]
            place = next((i for i, other in enumerate(records) if other.id == stored), None)
            if place is None:
                raise RequestError(
                    409,
                    "too_old",
                    f"the user's last {held} transactions can be explained, and this one is older; its answer has the "
                    "reasons that were given then",
                )
            past = copy.deepcopy(users.before(slot, place))
            integers, values = users.integers[slot, place].copy(), users.values[slot, place].copy()
        amount = engine.decoder.decode_stored(record).amount
        try:
            with graphs_may_fail():
                states = engine.explainer.states_before(past)
                explained = engine.explainer.explain(Situation(integers, values, amount, states, past))
        except ModelError as error:
            raise RequestError(503, MODEL, _CANNOT[MODEL]) from error
        events = [
            PastEvent(before.id, format_instant(before.time), round(contribution, 4))
            for before, contribution in zip(records[:place], explained.events, strict=True)
        ]
        answer = msgspec.json.decode(record.answer, type=Answer)
        answer.transaction_id = transaction_id
        return self._encode(
            Explanation(
                transaction_id=transaction_id,
                model=engine.bundle.id,
                fraud_probability=explained.probability,
                answer=answer,
                log_odds=round(explained.log_odds, 4),
                base=round(explained.base, 4),
                inputs=explained.inputs,
                without_history=round(explained.without_history, 4),
                events=events[::-1],
            )
        )

    def user(self, user: str) -> bytes:
        """The recent events of a user, newest first, with scores and decisions. Raises RequestError 404."""
        user = self._identifiers.named(self.bundle.manifest.schema.user, user)
        with self._lock, _readable():
            users = self.engine.users
            slot = users.slots.get(user)
            if slot is None or not users.accepted[slot]:
                raise RequestError(404, "unknown_user", "no transaction of this user was scored here")
            accepted = int(users.accepted[slot])
            records = self._journal.recent(user, 2 * users.window)
        events = [{"transaction": msgspec.Raw(record.raw), "answer": msgspec.Raw(record.answer)} for record in records]
        return self._encode({"user": user, "history": accepted, "events": events})

    def model(self) -> bytes:
        """The bundle in force."""
        with self._lock:
            bundle = self.engine.bundle
            users, records = len(self.engine.users.slots), self._journal.last_seq
        manifest = bundle.manifest
        return self._encode(
            {
                "model": bundle.id,
                "kind": manifest.kind,
                "schema": manifest.schema.as_dict(),
                "label": msgspec.to_builtins(manifest.label),
                "cleaning": msgspec.to_builtins(manifest.cleaning),
                "identifiers": msgspec.to_builtins(manifest.identifiers),
                "context": msgspec.to_builtins(manifest.context),
                **manifest.policy.as_dict(),
                "metrics": dict(manifest.metrics),
                "versions": dict(manifest.versions),
                "shadow": self.models.shown(),
                "changing": self.models.changing,
                "users": users,
                "journal_records": records,
            }
        )

    # ---- another model

    def change_model(self, body: bytes, author: str) -> bytes:
        """Promote, roll back, begin or end a challenge -> the model in force. Raises RequestError."""
        self.models.change(body, author)
        return self.model()

    def new_engine(self, bundle: Bundle) -> Engine:
        """An engine beside the one in force, on this journal.

        Raises:
            RunError: the bundle reads or stores transactions in another way.
            BundleError: its graphs cannot be loaded.
            JournalError: nothing can be stored.
        """
        require_same_fields(bundle.manifest, self.engine.bundle.manifest)
        with self._lock:
            self._require_ready()
            _note_context(self._journal, bundle)
        return Engine(bundle, self._journal, self._identifiers, self._limits)

    def bind_rules(self, engine: Engine) -> None:
        """Give an engine the rules and lists as they are now; later ones come with `put_in_force`.

        Raises RunError where a rule that can be evaluated now could not be any more.
        """
        with self._lock:
            actions = self._journal.actions(KINDS)
            before = {rule.name for rule in self.engine.rules.rules.values() if rule.broken}
        engine.rules = RuleBook.as_of(engine.bundle.manifest, self._identifiers, actions)
        for name, why in engine.rules.broken().items():
            if name not in before:
                raise RunError(f"the rule {name} does not fit it, and would not be evaluated any more: {why}")

    def catch_up(self, engine: Engine) -> CatchUp:
        """Begin to bring an engine into step with the journal. Raises RunError where the service is closed meanwhile."""
        folders = shadow_folder(self._state, engine.bundle.id), self._state
        return CatchUp(engine, self._journal, folders, self.rest, len(self.engine.users.slots))

    def challenge(self, engine: Engine) -> Challenger:
        """Let an engine score in shadow."""
        every, records = self._snapshot_every, self._snapshot_records
        policy_of, settings = self._policies.get, self._shadow
        return Challenger(engine, self._journal, self._state, policy_of, settings, every, records)

    @property
    def closing(self) -> bool:
        """It was told to stop."""
        return self._closing.is_set()

    def rest(self, seconds: float) -> None:
        """Give up the processor, for work beside scoring, unless nothing is scored anyway.

        Raises RunError where the service is being closed.
        """
        now, seq = clock_time.monotonic(), self._journal.last_seq
        if seq != self._rested_at[1]:
            self._rested_at = now, seq
        if self._closing.wait(seconds if now - self._rested_at[0] < IDLE_S else 0):
            raise RunError("the service is stopping")

    def put_in_force(self, ready: CatchUp, author: str, body: bytes) -> Engine:
        """Let an engine that has its rules change places with the one in force, between two transactions.

        Returns:
            the engine that was in force; nobody uses it any more.

        Raises:
            RunError, ModelError, JournalError, RequestError: nothing is changed, but `ready` is of no use any more.
        """
        engine = ready.engine
        with self._snapshotting:  # a snapshot that is being taken reads the engine in force
            ready.follow_to(CLOSE)
            with self._lock:
                self._require_ready()
                ready.finish()
                old = self.engine
                for action in self._journal.actions(KINDS, engine.rules.seq):
                    engine.rules.fold(action)
                engine.rules.count_on(old.rules)
                engine.control = open_control(self._journal, engine.bundle)
                record = self._append_action(MODEL_ACTION, author, body)
                self._policies[engine.bundle.id] = engine.policy
                self.engine = engine
                self.desk = Desk(self, engine, self._limits, self._state)
                if self._measures is not None:
                    self._measures.use(engine.bundle.manifest)
                self._recovered()
                self._snapshot_wanted = True
        if self._snapshotter is not None:
            self._snapshotter.soon()
        self._wait_durable(record.seq)
        return old

    def ready(self) -> bool:
        """Whether a transaction posted now would get an answer, a degraded one included."""
        return self._ready and (self._fallback.mode == "limits" or not self.degraded())

    def degraded(self) -> bool:
        """Whether a transaction posted now would get the fallback's answer, as far as that can be known."""
        if self._journal.failed:
            return True
        return self._failing == MODEL and not self._model_answers()

    def _model_answers(self) -> bool:
        """Whether the graph answers again: perhaps nothing is posted meanwhile."""
        with self._lock:
            if not self.engine.answers():
                return False
            self._recovered()
            return True

    def metrics(self) -> bytes:
        """What is measured here, and behind it what the monitor wrote. Raises RequestError 404 where nothing is."""
        if self._metrics is None:
            raise RequestError(404, "not_measured", "this service measures nothing")
        own = self._metrics.render()
        return (own + foreign_text(self._state / MONITOR, self._metrics.names)).encode()

    def _require_ready(self) -> None:
        if not self._ready:
            raise RequestError(503, "not_ready", "the service is starting or stopping; try again")

    # ---- bulk

    @property
    def bundle(self) -> Bundle:
        """The one in force."""
        return self.engine.bundle

    @property
    def decoder(self) -> TransactionDecoder:
        """That of the bundle in force."""
        return self.engine.decoder

    @property
    def journal(self) -> Journal:
        """For backfills that group records."""
        return self._journal

    @property
    def identifiers(self) -> Identifiers:
        """What hashes identifiers here."""
        return self._identifiers

    def decode(self, row: dict[str, Any]) -> Transaction:
        """A transaction from plain data, through the decoder that requests go through."""
        return self.decoder.decode(self._encode(row))


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except JournalError as error:
        _log.error("journal: %s", error)
        raise RequestError(503, "storage_unavailable", "the journal cannot be read now") from error


def _head_words(head: str) -> str:
    """For the log, which is kept where nobody who may write the state folder can change it."""
    return f"journal head {head}"


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
    journal.set_meta(context_key(bundle.id), msgspec.json.encode(bundle.manifest.context).decode())
