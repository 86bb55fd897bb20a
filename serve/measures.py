"""What scoring, labels and the state folder are measured by; how metrics are kept and shown is `serve/metrics.py`.

No label of a metric holds a user, a transaction or anything else that a client could fill with one: fields and rules come
from the owner, and of the sources of labels only a few plain words are told apart.
"""

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import seqfraud
from seqfraud.bundle import Manifest
from seqfraud.policy import DECISIONS
from seqfraud.vocabulary import UNSEEN
from serve.answers import Answer
from serve.decoding import Transaction
from serve.metrics import Number, Registry
from serve.outbox import Outbox
from serve.rulebook import RuleBook
from serve.snapshot import newest_file

__all__ = ["MONITOR", "Figures", "HeardLabel", "Measures", "declare_state"]

STAGES = ("decode", "lookup", "context", "graph", "decide", "journal", "commit", "wait", "encode")
"""In their order. `lookup` includes waiting for the service's lock, `decide` rules and reasons."""
STAGE_SECONDS = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.025, 0.1, 0.5, 2.5)
SCORES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 0.99, 0.997, 0.999)
"""About even steps of the log-odds."""
HOUR, DAY = 3600.0, 86400.0
DELAYS = (HOUR, 6 * HOUR, 12 * HOUR, *(n * DAY for n in (1, 2, 3, 5, 7, 10, 14, 21, 30, 45, 60, 90, 120, 180)))
SOURCES = 20
"""Sources of labels that are told apart; clients name them."""
OTHER = "other"

MONITOR = "monitor.prom"
"""File of the state folder whose metrics are shown behind the service's own."""

_PLAIN_WORD = re.compile(r"[a-z][a-z_-]{0,31}")


@dataclass(slots=True, frozen=True)
class Figures:
    """How things stand, read at a scrape without the service's lock."""

    users: int
    entities: int
    early_labels: int
    journal_records: int
    journal_bytes: int
    unsynced: int
    unindexed: int
    snapshot_behind: int
    journal_failed: bool
    model: str


_GAUGES = {
    "seqfraud_users": ("users", "Users in memory."),
    "seqfraud_entities": ("entities", "Values of context columns in memory."),
    "seqfraud_labels_early": ("early_labels", "Transactions that were labelled and have not come yet."),
    "seqfraud_journal_records": ("journal_records", "Sequence number of the journal's newest record."),
    "seqfraud_journal_bytes": ("journal_bytes", "Size of the journal's log."),
    "seqfraud_journal_unsynced_records": ("unsynced", "Records that a power cut could still take."),
    "seqfraud_journal_unindexed_records": ("unindexed", "Records that the index does not have yet."),
    "seqfraud_journal_failed": ("journal_failed", "1 where nothing can be stored until the service is started again."),
    "seqfraud_snapshot_behind_records": ("snapshot_behind", "Records after the newest snapshot."),
}


@dataclass(slots=True, frozen=True)
class HeardLabel:
    """What became of a label: `new`, `changed`, `unchanged` or `unknown`; `delay` (ms) from its transaction to known_at."""

    source: str
    outcome: str
    delay: int | None


class Measures:
    """What scoring and labels count, under the service's lock; `answered` is for any thread."""

    def __init__(self, registry: Registry, manifest: Manifest, causes: Iterable[str]) -> None:
        """Declare all of it; `causes` are those for which a transaction may not be scored."""
        stages = registry.histogram(
            "seqfraud_stage_seconds",
            "Time in a stage: decode, wait and encode of a request, the others of a transaction.",
            STAGE_SECONDS,
            ("stage",),
        )
        self._stages = [stages.of(stage) for stage in STAGES]
        self._under_lock = self._stages[1:7]
        self._decode, (self._wait, self._encode) = self._stages[0], self._stages[7:]
        self._lock = threading.Lock()
        decisions = registry.counter("seqfraud_decisions_total", "Transactions scored, by decision.", ("decision",))
        self._decisions = {decision: decisions.of(decision) for decision in DECISIONS}
        self._scores = registry.histogram(
            "seqfraud_score_ratio", "Fraud probabilities of the transactions scored.", SCORES
        ).of()
        self._flagged = registry.counter("seqfraud_transactions_flagged_total", "Scored, and is_fraud.").of()
        self._late = registry.counter(
            "seqfraud_transactions_late_total", "Scored, and older than the user's newest one."
        ).of()
        self.duplicates = registry.counter(
            "seqfraud_transactions_duplicate_total", "Answered as before: the same id and content."
        ).of()
        self.conflicts = registry.counter(
            "seqfraud_transactions_conflicting_total", "Refused: the same id with other content."
        ).of()
        failures = registry.counter(
            "seqfraud_scoring_failures_total", "Transactions that the model or the journal could not take.", ("cause",)
        )
        self._failures = {cause: failures.of(cause) for cause in causes}
        self._unseen = registry.counter(
            "seqfraud_categories_unseen_total",
            "Values that the model's vocabulary lacks, missing ones too.",
            ("field",),
        )
        self._fields: list[Number] = []
        self.use(manifest)
        self._labels = registry.counter("seqfraud_labels_total", "Labels, by what they were.", ("source", "outcome"))
        self._delays = registry.histogram(
            "seqfraud_label_delay_seconds", "From a transaction to when its label is known, of those in force.", DELAYS
        ).of()
        registry.counter("seqfraud_users_evicted_total", "Users moved out of memory, which has no bound yet.").of()
        self._sources: set[str] = set()

    def use(self, manifest: Manifest) -> None:
        """Count for the model of this manifest from now on."""
        self._fields = [self._unseen.of(vocabulary.column) for vocabulary in manifest.vocabularies]

    def scored(self, transaction: Transaction, answer: Answer, marks: Sequence[float]) -> None:
        """A transaction was accepted.

        Args:
            marks: perf_counter before, between and after the stages from `lookup` to `commit`, in seconds.
        """
        for stage, begin, end in zip(self._under_lock, marks, marks[1:], strict=False):
            stage.observe(end - begin)
        assert answer.fraud_probability is not None
        self._scores.observe(answer.fraud_probability)
        self._decisions[answer.decision].value += 1
        if answer.is_fraud:
            self._flagged.value += 1
        if answer.late:
            self._late.value += 1
        if UNSEEN in transaction.categories:
            for field, category in zip(self._fields, transaction.categories, strict=True):
                if category == UNSEEN:
                    field.value += 1

    def failed(self, cause: str) -> None:
        """A transaction could not be scored."""
        self._failures[cause].value += 1

    def answered(self, decode: float, wait: float, encode: float) -> None:
        """A request for scores was answered; seconds."""
        with self._lock:
            self._decode.observe(decode)
            self._wait.observe(wait)
            self._encode.observe(encode)

    def heard(self, labels: Sequence[HeardLabel]) -> None:
        """Labels were stored."""
        for label in labels:
            self._labels.of(self._source(label.source), label.outcome).value += 1
            if label.delay is not None:
                self._delays.observe(label.delay / 1000)

    def _source(self, given: str) -> str:
        """A source of labels as it may be shown: a plain word, one of the first few."""
        if given not in self._sources:
            if len(self._sources) == SOURCES or not _PLAIN_WORD.fullmatch(given):
                return OTHER
            self._sources.add(given)
        return given


def declare_state(
    registry: Registry,
    figures: Callable[[], Figures],
    ready: Callable[[], bool],
    rules: Callable[[], RuleBook],
    unexplained: Callable[[], int],
    outbox: Outbox | None,
    degraded: Mapping[str, int],
    state: Path,
) -> None:
    """What is read at a scrape: memory, the journal, rules, what leaves for the webhook, the snapshot.

    Args:
        rules: the book in force.
        unexplained: answers whose reasons the model in force could not work out.
        degraded: degraded answers so far, by cause.
        state: the service's state folder.
    """

    def reading(field: str) -> Callable[[], float]:
        return lambda: int(getattr(figures(), field))

    for name, (field, words) in _GAUGES.items():
        registry.gauge(name, words, read=reading(field))
    registry.gauge("seqfraud_ready", "1 where a transaction posted now would be answered.", read=lambda: int(ready()))
    registry.gauge("seqfraud_model_info", "The bundle in force.", ("model",), lambda: {(figures().model,): 1})
    registry.gauge("seqfraud_build_info", "The version.", ("version",), lambda: {(seqfraud.__version__,): 1})
    registry.counter(
        "seqfraud_degraded_answers_total",
        "Answers by the limits of [fallback].",
        ("cause",),
        lambda: {(cause,): count for cause, count in degraded.items()},
    )
    registry.counter(
        "seqfraud_unexplained_answers_total", "Answers without their reasons, for a graph failed.", read=unexplained
    )
    registry.counter(
        "seqfraud_rule_hits_total",
        "How often a rule was true, since it was made, changed or the start.",
        ("rule",),
        lambda: {(rule.name,): rule.matched for rule in list(rules().rules.values())},
    )
    registry.counter(
        "seqfraud_rule_failures_total",
        "How often a rule could not be evaluated.",
        ("rule",),
        lambda: {(rule.name,): rule.failed for rule in list(rules().rules.values())},
    )
    registry.counter(
        "seqfraud_list_hits_total",
        "How often a list decided.",
        ("list",),
        lambda: {(held.name,): held.matched for held in list(rules().lists.values())},
    )
    if outbox is not None:
        registry.gauge(
            "seqfraud_outbox_events",
            "Alerts and their changes that are not with the webhook: waiting, or dead letters.",
            ("state",),
            lambda: {(name,): count for name, count in outbox.undelivered().items()},
        )
        registry.counter(
            "seqfraud_outbox_delivered_total", "Alerts and their changes taken by it.", read=lambda: outbox.delivered
        )
    registry.gauge(
        "seqfraud_snapshot_timestamp_seconds",
        "When the newest snapshot was written; none, no sample.",
        read=lambda: _written(newest_file(state)),
    )
    registry.gauge(
        "seqfraud_monitor_timestamp_seconds",
        "When the monitor last wrote its figures; never, no sample.",
        read=lambda: _written(state / MONITOR),
    )


def _written(file: Path | None) -> dict[tuple[str, ...], float]:
    try:
        return {} if file is None else {(): file.stat().st_mtime}
    except OSError:  # gone meanwhile, or never there
        return {}
