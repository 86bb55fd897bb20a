"""A look at a service's state folder: every model given, its verdicts, and what a scheduler and Prometheus are told."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqfraud.bundle import Bundle
from seqfraud.config import format_instant
from seqfraud.drift import groups_of
from seqfraud.errors import RunError
from seqfraud.metrics import PairedDifference, paired_bootstrap
from serve.journalled import Journalled
from serve.metrics import Gauge
from serve.monitor import ModelReport, examine
from serve.monitor_quality import LEAST_FRAUDS
from serve.monitor_rows import read_rows, rows_of
from serve.shadow import read_shadow
from serve.verdicts import SEVERITY, Level, Rows, Span, Topic

ESSENTIAL = ("traffic", "inputs", "scores", "labels")
"""Where one of these is unknown, so is the whole. Of the others nothing may be known for weeks: labels take their time."""
CODES: dict[Level, int] = {"ok": 0, "watch": 0, "alarm": 3, "unknown": 4}
"""Exit codes; 2 is bad input."""
SHADOW = "shadow"
"""Folder of a state folder in which challengers' scores are."""


@dataclass(frozen=True)
class Agreement:
    """A challenger beside the model in service, on the same transactions.

    `difference` is the challenger's average precision minus that of the model in service on matured rows.
    """

    rows: int
    same_decision: float | None
    mean_difference: float | None
    """Of the probabilities, without their signs."""
    matured: int
    frauds: int
    difference: PairedDifference | None


@dataclass(frozen=True)
class Report:
    """What was found at a moment."""

    now: int
    window: int
    mature: int
    state: str
    service: str | None
    """Id of the model that scored the newest transaction."""
    topics: tuple[Topic, ...]
    """Of none of the models."""
    models: tuple[ModelReport, ...]
    agreement: Mapping[str, Agreement]

    @property
    def level(self) -> Level:
        """Of the model in service: an alarm before what is unknown, where that is essential, before what is to be watched."""
        topics = [*self.topics, *(t for m in self.models if m.role == "in service" for t in m.topics)]
        levels = {t.level for t in topics if t.level != "unknown"}
        if "alarm" in levels:
            return "alarm"
        if any(t.level == "unknown" and (t.name in ESSENTIAL or t in self.topics) for t in topics):
            return "unknown"
        return "watch" if "watch" in levels else "ok"

    @property
    def code(self) -> int:
        """For a scheduler."""
        return CODES[self.level]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for report.json."""
        return {
            "at": format_instant(self.now),
            "level": self.level,
            "exit_code": self.code,
            "state": self.state,
            "window_ms": self.window,
            "quality_window_ms": self.mature,
            "model_in_service": self.service,
            "topics": [asdict(topic) for topic in self.topics],
            "models": [asdict(model) for model in self.models],
            "agreement": {model: asdict(found) for model, found in self.agreement.items()},
        }


def look(state: Path, bundles: Sequence[Bundle], span: Span) -> Report:
    """Everything that the journal, and the challengers' scores, say of some bundles. Raises RunError.

    A bundle with other declared fields than the journal's is refused, whichever of them it is.
    """
    for bundle in bundles[1:]:
        if bundle.manifest.schema.fields != bundles[0].manifest.schema.fields:
            raise RunError(
                f"{bundle.path}: the fields {', '.join(bundle.manifest.schema.fields)}; expected those of "
                f"{bundles[0].path}, {', '.join(bundles[0].manifest.schema.fields)}"
            )
    journal = read_rows(state, bundles, span)
    shadow = read_shadow(state)
    table = journal.table
    service = table["model"][-1].as_py() if len(table) else None
    models, agreement = [], {}
    for bundle in bundles:
        alike = [b.id for b in bundles if b.manifest.context == bundle.manifest.context]
        rows = rows_of(journal, bundle, alike)
        role = "in service" if bundle.id == service or (service is None and bundle is bundles[0]) else "before"
        if role == "before":
            scores = shadow.filter(pc.equal(shadow["model"], bundle.id))
            if len(scores):
                role = SHADOW
                agreement[bundle.id] = _agreement(journal, rows, scores, bundle, span)
                rows = _shadowed(rows, journal, scores)
        models.append(examine(bundle.manifest, bundle.id, role, rows, span))
    topics = []
    if service is not None and service not in [bundle.id for bundle in bundles]:
        words = f"the newest transaction was scored by {service}, which is none of the bundles given"
        topics.append(Topic("model", "unknown", words))
    return Report(span.now, span.window, span.mature, str(state), service, tuple(topics), tuple(models), agreement)


# ---- challengers


def _places(journal: Journalled, scores: pa.Table) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Indices of scores and, of the same transactions, of the journal's rows; of scores for others, nothing."""
    seq = journal.table["seq"].to_numpy()
    wanted = scores["seq"].to_numpy()
    at = np.minimum(np.searchsorted(seq, wanted), max(len(seq) - 1, 0))
    found = np.flatnonzero(seq[at] == wanted) if len(seq) else np.zeros(0, dtype=np.int64)
    return found, at[found]


def _shadowed(rows: Rows, journal: Journalled, scores: pa.Table) -> Rows:
    """The same rows as a challenger scored them; what happened to them stays what happened."""
    found, at = _places(journal, scores)
    own = np.zeros(len(rows), dtype=bool)
    probability, alerted = np.full(len(rows), np.nan), np.zeros(len(rows), dtype=bool)
    own[at] = True
    probability[at] = scores["probability"].to_numpy()[found]
    alerted[at] = pc.is_in(scores["decision"], pa.array(["review", "decline"])).to_numpy()[found]
    return Rows(rows.columns, own, probability, alerted, rows.declined, rows.control, rows.amount, rows.label)


def _agreement(journal: Journalled, rows: Rows, scores: pa.Table, bundle: Bundle, span: Span) -> Agreement:
    found, at = _places(journal, scores)
    theirs, ours = scores["probability"].to_numpy()[found], rows.probability[at]
    said = pc.equal(scores["decision"].take(pa.array(found)), journal.table["decision"].take(pa.array(at)))
    time = rows.columns.time[at]
    delay = bundle.manifest.context.label_delay
    old = (time + delay <= span.now) & (time >= span.now - delay - span.mature) & ~np.isnan(ours)
    if rows.control.any():  # of the declined only those let through show what they were; see `Rows.control`
        old &= ~rows.declined[at] | rows.control[at]
    fraud = rows.label[at][old] == 1
    difference = None
    if fraud.sum() >= LEAST_FRAUDS:
        group = groups_of(rows.columns.user[at][old])
        difference = paired_bootstrap("average_precision", fraud, theirs[old], ours[old], group)
    known = ~np.isnan(ours)
    return Agreement(
        rows=len(found),
        same_decision=float(pc.mean(said.cast(pa.float64())).as_py()) if len(found) else None,
        mean_difference=float(np.abs(theirs - ours)[known].mean()) if known.any() else None,
        matured=int(old.sum()),
        frauds=int(fraud.sum()),
        difference=difference,
    )


# ---- Prometheus


FAMILIES = {
    "seqfraud_monitor_level": ("Verdict: 0 ok, 1 unknown, 2 watch, 3 alarm.", ("model", "role", "topic")),
    "seqfraud_monitor_run_timestamp_seconds": ("The moment that the figures are of.", ()),
    "seqfraud_monitor_psi": ("Shift of an input or of the scores, sampling noise taken off.", ("model", "input")),
    "seqfraud_monitor_psi_low": ("Lower end of its 95 % interval.", ("model", "input")),
    "seqfraud_monitor_js_distance": ("Jensen-Shannon distance, sampling noise taken off.", ("model", "input")),
    "seqfraud_monitor_alert_ratio": ("Share of alerts by the model.", ("model",)),
    "seqfraud_monitor_quality": ("A figure of matured rows.", ("model", "figure", "bound")),
    "seqfraud_monitor_expected_quality": ("A figure by the probabilities alone.", ("model", "figure", "bound")),
    "seqfraud_monitor_rows": ("Rows of a model by what is known of them.", ("model", "kind")),
}
"""What stands in `monitor.prom`: help and labels by name."""


def gauges(report: Report) -> str:
    """The figures in Prometheus's text format, for `<state>/monitor.prom`."""
    made = {name: Gauge(name, words, labels) for name, (words, labels) in FAMILIES.items()}
    level, run, shift, low, distance, alerts, quality, expected, labels = made.values()
    run.of().value = report.now / 1000
    level.of("", "", "all").value = SEVERITY[report.level]
    for model in report.models:
        for topic in model.topics:
            level.of(model.model, model.role, topic.name).value = SEVERITY[topic.level]
        for one in (*model.inputs, *model.values, *(() if model.score is None else (model.score,))):
            shift.of(model.model, one.name).value = one.moved.moved
            low.of(model.model, one.name).value = one.moved.low
            distance.of(model.model, one.name).value = one.moved.js
        if model.alerts is not None:
            alerts.of(model.model).value = model.alerts.share
        for name, found in model.quality.figures.items() if model.quality is not None else ():
            for bound, value in asdict(found).items():
                quality.of(model.model, name, bound).value = value
        if model.expected is not None:
            for name in ("frauds", "average_precision", "precision", "recall"):
                for bound, value in asdict(f).items() if (f := getattr(model.expected, name)) is not None else ():
                    expected.of(model.model, name, bound).value = value
        for name in ("matured", "frauds", "silent", "unseen", "waiting"):
            labels.of(model.model, name).value = getattr(model.labels, name)
    return "".join(gauge.render() for gauge in made.values())
