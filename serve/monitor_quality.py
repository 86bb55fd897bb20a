"""How good a model still is where labels have matured, and what its probabilities say before they have."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from seqfraud.bundle import Manifest
from seqfraud.config import DAY_MS, duration_words
from seqfraud.drift import Floats, groups_of
from seqfraud.metrics import Mask, bootstrap_interval
from seqfraud.policy import flag_many
from seqfraud.vocabulary import UNSEEN
from seqfraud.watched import (
    ALERT_SHARE,
    Between,
    Expected,
    Watched,
    as_common_as,
    measure_precision,
    measure_watched,
    ratio,
)
from serve.verdicts import Labels, Level, Rows, Segment, Span, Topic, worst

LEAST_FRAUDS = 30
"""With fewer known frauds nothing is said of quality."""
LEAST_DUE = 20
"""Frauds that the scores expect, of which not one was labelled: then labels do not come."""
LOST = {"watch": 0.9, "alarm": 0.75}
"""Of a figure of the validation days: a watch where it is surely lower and below this share, an alarm where it is surely below."""
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


def assess(
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
    comparable = dict(quality.figures)
    if known is not None and "fraud_share" in known.figures:
        alike = as_common_as(fraud, known.figures["fraud_share"].estimate, weight)
        comparable |= measure_precision(fraud, seen.probability, day, seen.columns.user, budget, alike)
    segments = tuple(_segments(manifest, seen, weight))
    topics += [_quality_topic(known, comparable, labels), _calibration(quality, segments)]
    return labels, quality, comparable.get("average_precision"), segments, topics


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


def _quality_topic(known: Watched | None, figures: Mapping[str, Between], labels: Labels) -> Topic:
    if known is None:
        return Topic("quality", "unknown", "the figures of the validation days are not in this bundle")
    if labels.frauds < LEAST_FRAUDS:
        return Topic(
            "quality", "unknown", f"{labels.frauds} known frauds are too few; expected at least {LEAST_FRAUDS}"
        )
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
    """Whether a figure is clearly below what it was, by the interval of the quotient of both, which are not sure themselves.

    That of independent quantities from their intervals by the square-root rule on the logarithms (Zou and Donner, "Construction
    of confidence limits about effect measures", Statistics in Medicine 27 (2008)).
    """
    if then.low <= 0:  # nothing that could surely be lost
        return "ok"
    if now.estimate <= 0:
        most = now.high / then.low
    else:
        unsure = np.hypot(np.log(then.estimate / then.low), np.log(now.high / now.estimate))
        most = now.estimate / then.estimate * float(np.exp(unsure))
    if most < LOST["alarm"]:
        return "alarm"
    return "watch" if most < 1 and now.estimate < LOST["watch"] * then.estimate else "ok"


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


def estimate(expected: Expected | None, topics: Sequence[Topic]) -> Topic:
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
