"""What can be said of a model in service: whether its inputs and scores are what they were, and how good it still is.

Pure functions of arrays: `monitor_rows` reads them from a journal, `monitor_page` shows what comes out. A verdict is "unknown"
where the rows do not allow one, and then says why. Letters: N rows, K bins.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Manifest
from seqfraud.config import DAY_MS, HOUR_MS, duration_words, format_instant
from seqfraud.drift import (
    ALARM,
    LEAST_ROWS,
    SURE,
    WATCH,
    Codes,
    Distribution,
    Floats,
    Moved,
    Share,
    compare,
    counts_of,
    groups_of,
    share_of,
)
from seqfraud.fingerprint import WINDOWS, Columns, DriftReference, View, flag_view, read_reference, views
from seqfraud.metrics import Mask, bootstrap_interval
from seqfraud.policy import flag_many
from seqfraud.vocabulary import UNSEEN
from seqfraud.watched import (
    ALERT_SHARE,
    KEY,
    Between,
    Expected,
    Watched,
    as_common_as,
    expected_quality,
    measure_watched,
    ratio,
)

Level = Literal["ok", "watch", "alarm", "unknown"]
SEVERITY: dict[Level, int] = {"ok": 0, "unknown": 1, "watch": 2, "alarm": 3}

LEAST_SILENCE = 6 * HOUR_MS
SILENT_ROWS = 100
"""No data: nothing came for so long, and for a time in which so many transactions would have come in the training time."""
LEAST_FRAUDS = 30
"""With fewer known frauds nothing is said of quality."""
LEAST_DUE = 20
"""Frauds that the scores expect, of which not one was labelled: then labels do not come."""
LOST = {"watch": 0.9, "alarm": 0.75}
"""Of a figure of the validation days: quality is clearly below where the intervals lie apart and the figure below this."""
MORE_ALERTS = {"watch": 1.5, "alarm": 2.0}
"""Times the share of alerts that the decision was chosen for, or as many times less."""
OFF = {"watch": float(np.log(1.5)), "alarm": float(np.log(2.5))}
"""Log-odds by which the probabilities are too low or too high: so many times the frauds that were expected."""
STEEP = {"watch": 1.3, "alarm": 2.0}
"""A calibration slope beyond this, or below its inverse."""
SEGMENT_OFF = 2.5
"""Times the frauds that were expected, or as many times fewer: a segment to be watched."""
SEGMENT_FRAUDS = 20
SEGMENTS = 8
"""Values of a category, the most frequent ones."""
COMPARED = ("average_precision", "recall_at_1pct_fpr", "precision_at_budget", "money_caught")
HEAVY = "money_caught"
"""A few large amounts decide it, and its intervals are too narrow for an alarm."""


@dataclass(frozen=True)
class Topic:
    """One verdict and, in plain words, why."""

    name: str
    level: Level
    words: str


@dataclass(frozen=True)
class Rows:
    """N accepted transactions in arrival order, as one bundle sees them.

    Attributes:
        columns: what the model reads; contexts that another model with other contexts read are NaN.
        own: mask, scored by this bundle.
        probability: NaN where none was given.
        alerted: mask, answered with review or decline, rules included.
        declined: mask.
        control: mask, let through at random though the model would have declined.
        amount: NaN where missing; None where the schema has none.
        label: int8, 1 fraud, 0 honest, -1 where nothing was said yet.
    """

    columns: Columns
    own: Mask
    probability: Floats
    alerted: Mask
    declined: Mask
    control: Mask
    amount: Floats | None
    label: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.own)

    def take(self, rows: Mask) -> "Rows":
        """Some of the rows."""
        c = self.columns
        return Rows(
            Columns(
                c.time[rows],
                c.user[rows],
                c.numeric[rows],
                c.categorical[rows],
                c.context[rows],
                c.gap[rows],
                {name: mask[rows] for name, mask in c.absent.items()},
            ),
            self.own[rows],
            self.probability[rows],
            self.alerted[rows],
            self.declined[rows],
            self.control[rows],
            None if self.amount is None else self.amount[rows],
            self.label[rows],
        )


@dataclass(frozen=True)
class Span:
    """What is looked at, ms: inputs and scores from `window` before `now`; quality of `mature` before what has matured."""

    now: int
    window: int
    mature: int


@dataclass(frozen=True)
class Compared:
    """An input, or the scores, beside the reference."""

    name: str
    kind: str
    level: Level
    moved: Moved
    quiet: float
    """How far it moved in the quiet weeks of the training time."""
    reference: tuple[float, ...]
    edges: tuple[float, ...]


@dataclass(frozen=True)
class Segment:
    """A part of the matured rows: how often it was fraud, and how often the scores said so."""

    column: str
    name: str
    rows: int
    frauds: int
    expected: float
    more: Between | None
    """Frauds that came for each that was expected."""
    average_precision: Between | None
    flagged: float | None
    """Share of the frauds at or above the threshold of `is_fraud`."""


@dataclass(frozen=True)
class Labels:
    """What is known of the rows whose label delay is over.

    `silent` of them were never labelled and count as honest; `unseen` were declined and so never show what they were.
    `waiting` rows are not that old yet. `control` were let through at random and stand for the declined.
    """

    matured: int
    frauds: int
    silent: int
    unseen: int
    control: int
    waiting: int
    expected: float


@dataclass(frozen=True)
class ModelReport:
    """Everything that is said of one model."""

    model: str
    role: str
    topics: tuple[Topic, ...]
    inputs: tuple[Compared, ...]
    values: tuple[Compared, ...]
    """Missing and unseen values."""
    score: Compared | None
    alerts: Share | None
    given_alerts: Share | None
    """As answered, rules included; `alerts` are the model's own."""
    labels: Labels
    quality: Watched | None
    average_precision: Between | None
    """With fraud as common as on the validation days, and so comparable with those."""
    reference: Watched | None
    segments: tuple[Segment, ...]
    expected: Expected | None
    days: tuple[dict[str, Any], ...]

    @property
    def level(self) -> Level:
        """The worst of its topics."""
        return worst(topic.level for topic in self.topics)


def worst(levels: Iterable[Level]) -> Level:
    """The most severe; "ok" of none."""
    return max(levels, key=SEVERITY.__getitem__, default="ok")


def examine(manifest: Manifest, model: str, role: str, rows: Rows, span: Span) -> ModelReport:
    """Everything that the rows say of a bundle.

    Args:
        model: the bundle's id.
        rows: of the window and of the matured days at least; later ones are left out.
    """
    reference = read_reference(manifest.fingerprint)
    raw = manifest.metrics.get(KEY)
    known = None if raw is None else Watched.from_dict(raw)
    time = rows.columns.time
    recent = rows.take((time >= span.now - span.window) & (time < span.now))
    own = recent.take(recent.own & ~np.isnan(recent.probability))
    topics = [_traffic(rows, recent, span, reference)]
    inputs: tuple[Compared, ...] = ()
    values: tuple[Compared, ...] = ()
    score = None
    if reference is None:
        missing = Topic(
            "inputs", "unknown", "the distributions of the training time are not in this bundle's fingerprint"
        )
        topics += [missing, Topic("scores", "unknown", missing.words)]
    else:
        inputs, values, score = _drift(manifest, reference, recent, own, span.window)
        topics += [
            _drift_topic("inputs", inputs, reference),
            _drift_topic("values", values, reference),
            _drift_topic("scores", () if score is None else (score,), reference),
        ]
    alerts, given = _alert_shares(manifest, own)
    topics.append(_alerts(alerts, given, None if raw is None else raw.get("alerts")))
    labels, quality, average, segments, judged = _quality(manifest, known, rows, span)
    topics += judged
    expected = None
    if len(own) >= LEAST_ROWS:
        flagged = flag_many(own.probability, manifest.thresholds)
        expected = expected_quality(own.probability, flagged, own.columns.user)
    topics.append(_estimate(expected, topics))
    return ModelReport(
        model=model,
        role=role,
        topics=tuple(topics),
        inputs=inputs,
        values=values,
        score=score,
        alerts=alerts,
        given_alerts=given,
        labels=labels,
        quality=quality,
        average_precision=average,
        reference=known,
        segments=segments,
        expected=expected,
        days=tuple(_days(rows, span)),
    )


# ---- data


def _traffic(rows: Rows, recent: Rows, span: Span, reference: DriftReference | None) -> Topic:
    """Whether data come."""
    if not len(rows):
        return Topic("traffic", "unknown", "no transaction has come in the time that is looked at")
    newest = int(rows.columns.time.max())
    silence = span.now - newest
    a_day = reference.rows_per_day if reference is not None else 0.0
    allowed = max(LEAST_SILENCE, SILENT_ROWS / a_day * DAY_MS) if a_day else float(DAY_MS)
    words = f"{len(recent):,} transactions of {len(np.unique(recent.columns.user)):,} users in {duration_words(span.window)}"
    if a_day:
        words += f", {len(recent) / (span.window / DAY_MS):,.0f} a day; {a_day:,.0f} a day in the training time"
    if silence > allowed:
        return Topic(
            "traffic",
            "unknown",
            f"nothing has come for {duration_words(silence)}, since {format_instant(newest)}; {words}",
        )
    if len(recent) < LEAST_ROWS:
        return Topic("traffic", "unknown", f"{words}: too few to say anything")
    return Topic("traffic", "ok", words)


def _days(rows: Rows, span: Span) -> list[dict[str, Any]]:
    """Counts and means of each day that is looked at."""
    time = rows.columns.time
    inside = time < span.now
    day = time // DAY_MS
    out = []
    for one in np.unique(day[inside]).tolist():
        of_day = inside & (day == one)
        own = of_day & rows.own & ~np.isnan(rows.probability)
        out.append(
            {
                "day": format_instant(one * DAY_MS)[:10],
                "transactions": int(of_day.sum()),
                "alerts": float(rows.alerted[of_day].mean()),
                "expected_fraud": float(rows.probability[own].mean()) if own.any() else None,
                "labelled_fraud": float((rows.label[of_day] == 1).mean()),
            }
        )
    return out


# ---- drift


def _drift(
    manifest: Manifest, reference: DriftReference, recent: Rows, own: Rows, window: int
) -> tuple[tuple[Compared, ...], tuple[Compared, ...], Compared | None]:
    """Inputs, missing and unseen values, and scores beside the reference."""
    columns = recent.columns
    group = groups_of(columns.user)
    seen = views(manifest.schema, manifest.context, manifest.vocabularies, columns)
    inputs = [(v, reference.inputs[v.name]) for v in seen if v.name in reference.inputs]
    flags = [
        (View(f"{column} missing", "category", None, mask.astype(np.intp), 2), reference.absent[column])
        for column, mask in columns.absent.items()
        if column in reference.absent
    ]
    for c, vocabulary in enumerate(manifest.vocabularies):
        if vocabulary.column in reference.unseen:
            unseen = columns.categorical[:, c] == UNSEEN
            flags.append((flag_view(f"{vocabulary.column} unseen", unseen), reference.unseen[vocabulary.column]))
    together = len(inputs) + len(flags) + 1
    score = None
    if reference.score is not None:
        own_group = groups_of(own.columns.user)
        score = _compared(View("score", "number", own.probability), reference.score, own_group, window, together)
    return (
        tuple(_compared(view, found, group, window, together) for view, found in inputs),
        tuple(_compared(view, found, group, window, together) for view, found in flags),
        score,
    )


def _compared(view: View, reference: Distribution, group: Codes, window: int, together: int) -> Compared:
    bins, k = view.binned(reference.edges)
    if k != len(reference.share):  # another vocabulary than the fingerprint's
        bins, k = np.full(len(bins), -1), len(reference.share)
    moved = compare(reference, counts_of(bins, group, k))
    quiet = quiet_for(reference, window)
    return Compared(
        view.name, view.kind, judged(moved, quiet, together), moved, quiet, reference.share, reference.edges
    )


def quiet_for(reference: Distribution, window: int) -> float:
    """How far a window of this length (ms) moved at most where nothing was wrong; of the longest one that is not longer."""
    shorter = [name for name, length in WINDOWS.items() if length <= window] or list(WINDOWS)[:1]
    return reference.quiet.get(shorter[-1], 0.0)


def judged(moved: Moved, quiet: float, together: int) -> Level:
    """The band that a shift is surely in, beyond twice what quiet weeks do; one of so many comparisons made together."""
    if moved.chance is None:
        return "unknown"
    if moved.chance * together >= SURE:
        return "ok"
    return "alarm" if moved.low > ALARM + 2 * quiet else "watch" if moved.low > WATCH + 2 * quiet else "ok"


def _drift_topic(name: str, found: Sequence[Compared], reference: DriftReference) -> Topic:
    what = {"inputs": "inputs", "values": "shares of missing or unseen values", "scores": "the scores"}[name]
    if not found:
        words = "nothing to compare" if name == "values" else f"{what} of the training time are not in the fingerprint"
        return Topic(name, "ok" if name == "values" else "unknown", words)
    told = [one for one in found if one.level != "unknown"]
    if not told:
        return Topic(name, "unknown", f"too few transactions to say whether {what} have changed")
    since = f"since {reference.first[:10]} to {reference.last[:10]}"
    changed = sorted((c for c in told if c.level in ("watch", "alarm")), key=lambda c: -c.moved.moved)
    if not changed:
        most = max(told, key=lambda c: c.moved.moved)
        words = f"as they were {since[6:]}; the largest shift is {most.moved.moved:.3f} ({most.name})"
        return Topic(name, "ok", words if len(found) > 1 else f"as {since[6:]}: shift {most.moved.moved:.3f}")
    shown = "; ".join(f"{c.name} {c.moved.moved:.2f} ({c.moved.low:.2f} to {c.moved.high:.2f})" for c in changed[:4])
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    count = f"{len(changed)} of {len(told)} have" if len(found) > 1 else "they have"
    return Topic(
        name, worst(c.level for c in changed), f"{count} changed {since} (shift, 95 % interval): {shown}{more}"
    )


# ---- alerts


def _alert_shares(manifest: Manifest, own: Rows) -> tuple[Share | None, Share | None]:
    group = groups_of(own.columns.user)
    acts = manifest.policy.decide_many(own.probability, own.amount) > 0
    return share_of(acts, group), share_of(own.alerted, group)


def _alerts(now: Share | None, given: Share | None, chosen: Any) -> Topic:
    """The share of alerts against what the decision was chosen for."""
    if chosen is None:
        return Topic("alerts", "unknown", "the share of alerts on the validation days is not in this bundle")
    if now is None or given is None or now.rows < LEAST_ROWS:
        return Topic("alerts", "unknown", "too few transactions of this model")
    then = float(chosen["share"])
    words = (
        f"{now.share:.2%} of the transactions ({now.low:.2%} to {now.high:.2%}); the decision was chosen for {then:.2%}"
        f" ({float(chosen['low']):.2%} to {float(chosen['high']):.2%})"
    )
    if abs(given.share - now.share) > 0.1 * max(now.share, 1e-9):
        words += f"; with rules {given.share:.2%} were answered so"
    for level in ("alarm", "watch"):
        times = MORE_ALERTS[level]
        if now.low > times * float(chosen["high"]) or now.high * times < float(chosen["low"]):
            return Topic("alerts", level, words)
    return Topic("alerts", "ok", words)


# ---- quality


def _quality(
    manifest: Manifest, known: Watched | None, rows: Rows, span: Span
) -> tuple[Labels, Watched | None, Between | None, tuple[Segment, ...], list[Topic]]:
    """Quality on the rows whose label delay is over: labels of younger ones are mostly those of frauds."""
    delay = manifest.context.label_delay
    time = rows.columns.time
    scored = rows.own & ~np.isnan(rows.probability) & (time < span.now)
    mature = scored & (time + delay <= span.now) & (time >= span.now - delay - span.mature)
    waiting = int((scored & (time + delay > span.now)).sum())
    old = rows.take(mature)
    logged = bool(old.control.any())
    # where some of the declined are let through, the others never show what they were
    unseen = old.declined & ~old.control if logged else np.zeros(len(old), dtype=bool)
    seen = old.take(~unseen)
    stands = (int(unseen.sum()) + int(old.control.sum())) / max(int(old.control.sum()), 1)
    weight = np.where(seen.control, stands, 1.0) if logged else None
    fraud = seen.label == 1
    labels = Labels(
        matured=len(seen),
        frauds=int(fraud.sum()),
        silent=int((seen.label < 0).sum()),
        unseen=int(unseen.sum()),
        control=int(seen.control.sum()),
        waiting=waiting,
        expected=float(seen.probability.sum()),
    )
    topics = [_labels(labels, delay)]
    if topics[0].level == "unknown" or not len(seen):
        words = topics[0].words
        return (
            labels,
            None,
            None,
            (),
            [*topics, Topic("quality", "unknown", words), Topic("calibration", "unknown", words)],
        )
    budget = ALERT_SHARE if known is None else known.alert_share
    day = seen.columns.time // DAY_MS
    quality = measure_watched(fraud, seen.probability, day, seen.columns.user, seen.amount, budget, weight)
    average = quality.figures.get("average_precision")
    if known is not None and "fraud_share" in known.figures:
        found = bootstrap_interval(
            "average_precision",
            fraud,
            seen.probability,
            groups_of(seen.columns.user),
            weight=as_common_as(fraud, known.figures["fraud_share"].estimate, weight),
        )
        average = None if found is None else Between(found.estimate, found.low, found.high)
    segments = tuple(_segments(manifest, seen, weight))
    topics += [_quality_topic(known, quality, average, labels), _calibration(quality, segments)]
    return labels, quality, average, segments, topics


def _labels(labels: Labels, delay: int) -> Topic:
    """Whether labels come."""
    if not labels.matured:
        return Topic(
            "labels", "ok", f"no transaction of this model is older than the label delay of {duration_words(delay)} yet"
        )
    words = (
        f"{labels.matured:,} transactions are older than the label delay: {labels.frauds:,} are known as fraud, "
        f"{labels.expected:,.0f} were expected; {labels.silent / labels.matured:.0%} were never labelled and count as honest"
    )
    if labels.unseen:
        words += (
            f"; {labels.unseen:,} more were declined and never show what they were, {labels.control:,} let through at random "
            "stand for them"
        )
    if labels.waiting:
        words += f"; {labels.waiting:,} wait"
    if not labels.frauds and labels.expected >= LEAST_DUE:
        return Topic("labels", "unknown", f"no label of a fraud has come, do labels arrive at all? {words}")
    return Topic("labels", "ok", words)


def _quality_topic(known: Watched | None, now: Watched, average: Between | None, labels: Labels) -> Topic:
    if known is None:
        return Topic("quality", "unknown", "the figures of the validation days are not in this bundle")
    if labels.frauds < LEAST_FRAUDS:
        return Topic(
            "quality", "unknown", f"{labels.frauds} known frauds are too few; expected at least {LEAST_FRAUDS}"
        )
    figures = {**now.figures, **({} if average is None else {"average_precision": average})}
    pairs = [
        (name, figures[name], known.figures[name]) for name in COMPARED if name in figures and name in known.figures
    ]
    found = [(_capped(below(a, b), name), name, a, b) for name, a, b in pairs]
    lost = [one for one in found if one[0] != "ok"]
    shown = "; ".join(
        f"{name.replace('_', ' ')} {a.estimate:.3f} ({a.low:.3f} to {a.high:.3f}), {b.estimate:.3f} on the validation days"
        for _, name, a, b in (lost or found[:1])
    )
    if not lost:
        return Topic("quality", "ok", f"not clearly below the validation days: {shown}")
    return Topic("quality", worst(level for level, *_ in lost), f"clearly below the validation days: {shown}")


def _capped(level: Level, name: str) -> Level:
    return "watch" if level == "alarm" and name == HEAVY else level


def below(now: Between, then: Between) -> Level:
    """Whether a figure is clearly below what it was: by the interval of the difference for a watch, for an alarm with both
    intervals apart, and by so much that it matters."""
    lost = then.estimate - now.estimate
    unsure = float(np.hypot(then.estimate - then.low, now.high - now.estimate))
    if now.high < then.low and now.estimate < LOST["alarm"] * then.estimate:
        return "alarm"
    return "watch" if lost > unsure and now.estimate < LOST["watch"] * then.estimate else "ok"


def _calibration(now: Watched, segments: Sequence[Segment]) -> Topic:
    large, slope = now.figures.get("calibration_in_the_large"), now.figures.get("calibration_slope")
    if large is None or slope is None or now.frauds < LEAST_FRAUDS:
        return Topic("calibration", "unknown", "too few known frauds")
    times = float(np.exp(large.estimate))
    words = (
        f"{times:.2f} times as many frauds as the probabilities say "
        f"({np.exp(large.low):.2f} to {np.exp(large.high):.2f}); slope {slope.estimate:.2f} ({slope.low:.2f} to {slope.high:.2f})"
    )
    bad = [s for s in segments if s.more is not None and (s.more.low > SEGMENT_OFF or s.more.high < 1 / SEGMENT_OFF)]
    if bad:
        words += "; most off: " + ", ".join(
            f"{s.column} {s.name} ({s.frauds} came, {s.expected:.0f} expected)" for s in bad[:3]
        )
    for level in ("alarm", "watch"):
        off = large.low > OFF[level] or large.high < -OFF[level]
        if off or slope.low > STEEP[level] or slope.high < 1 / STEEP[level]:
            return Topic("calibration", level, words)
    return Topic("calibration", "watch" if bad else "ok", words)


def _segments(manifest: Manifest, rows: Rows, weight: Floats | None) -> Iterable[Segment]:
    """By the values of each category and by amount; those with enough frauds, or with so many expected."""
    flagged = flag_many(rows.probability, manifest.thresholds)
    group = groups_of(rows.columns.user)
    weights = np.ones(len(rows)) if weight is None else weight
    fraud = rows.label == 1

    def segment(column: str, name: str, mask: Mask) -> Segment | None:
        expected = float((weights * rows.probability)[mask].sum())
        frauds = int(fraud[mask].sum())
        if max(expected, frauds) < SEGMENT_FRAUDS:
            return None
        average = bootstrap_interval(
            "average_precision", fraud[mask], rows.probability[mask], group[mask], weight=weights[mask]
        )
        return Segment(
            column=column,
            name=name,
            rows=int(mask.sum()),
            frauds=frauds,
            expected=expected,
            more=ratio(weights * fraud * mask, weights * rows.probability * mask, group),
            average_precision=None if average is None else Between(average.estimate, average.low, average.high),
            flagged=float(flagged[mask & fraud].mean()) if frauds else None,
        )

    for c, vocabulary in enumerate(manifest.vocabularies):
        ids = rows.columns.categorical[:, c]
        values, count = np.unique(ids, return_counts=True)
        for value in values[np.argsort(-count, kind="stable")][:SEGMENTS].tolist():
            name = "unseen or missing" if value <= UNSEEN else vocabulary.values[value - UNSEEN - 1]
            found = segment(vocabulary.column, name, ids == value)
            if found is not None:
                yield found
    if rows.amount is not None and manifest.schema.amount is not None and len(rows):
        amount = np.nan_to_num(rows.amount)
        edges = np.unique(np.quantile(amount, (0.5, 0.9, 0.99)))
        band = np.searchsorted(edges, amount, side="left")
        names = [f"up to {edges[0]:,.2f}", *(f"{a:,.2f} to {b:,.2f}" for a, b in pairwise(edges.tolist()))]
        for i, name in enumerate([*names, f"above {edges[-1]:,.2f}"]):
            found = segment(manifest.schema.amount, name, band == i)
            if found is not None:
                yield found


def _estimate(expected: Expected | None, topics: Sequence[Topic]) -> Topic:
    """What the probabilities say of the newest rows, before their labels come; it is no verdict."""
    if expected is None or expected.average_precision is None:
        return Topic("estimate", "unknown", "too few transactions of this model")
    a = expected.average_precision
    words = (
        f"if the probabilities are right: {expected.frauds.estimate:,.0f} frauds among {expected.rows:,} transactions, average "
        f"precision {a.estimate:.3f} ({a.low:.3f} to {a.high:.3f})"
    )
    calibration = next((t.level for t in topics if t.name == "calibration"), "unknown")
    if calibration == "alarm":
        return Topic(
            "estimate",
            "unknown",
            f"the probabilities are off on the matured days, so that this cannot be trusted; {words}",
        )
    return Topic("estimate", "ok", words)
