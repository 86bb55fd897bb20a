"""What can be said of a model in service: whether its inputs and scores are what they were, and how good it still is.

Pure functions of arrays: `monitor_rows` reads them from a journal, `monitor_page` shows what comes out. A verdict is "unknown"
where the rows do not allow one, and then says why. Letters: N rows, K bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seqfraud.bundle import Manifest
from seqfraud.config import DAY_MS, HOUR_MS, duration_words, format_instant
from seqfraud.drift import (
    ALARM,
    LEAST_ROWS,
    SURE,
    WATCH,
    Distribution,
    Moved,
    Share,
    compare,
    counts_of,
    groups_of,
    share_of,
)
from seqfraud.fingerprint import WINDOWS, DriftReference, Groupings, View, flag_view, read_reference, views
from seqfraud.policy import flag_many
from seqfraud.vocabulary import UNSEEN
from seqfraud.watched import KEY, Between, Expected, Watched, expected_quality
from serve.monitor_quality import assess, estimate
from serve.verdicts import Compared, Labels, Level, Rows, Segment, Span, Topic, worst

LEAST_SILENCE = 6 * HOUR_MS
SILENT_ROWS = 100
"""No data: nothing came for so long, and for a time in which so many transactions would have come in the training time."""
MORE_ALERTS = {"watch": 1.5, "alarm": 2.0}
"""Times the share of alerts that the decision was chosen for, or as many times less."""


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
    labels, quality, average, segments, judged = assess(manifest, known, rows, span)
    topics += judged
    expected = None
    if len(own) >= LEAST_ROWS:
        flagged = flag_many(own.probability, manifest.thresholds)
        expected = expected_quality(own.probability, flagged, own.columns.user)
    topics.append(estimate(expected, topics))
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
        days=tuple(_days(rows, span, manifest.context.label_delay)),
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


def _days(rows: Rows, span: Span, delay: int) -> list[dict[str, Any]]:
    """Counts and means of each day that is looked at, by UTC; the first and the last may be cut."""
    time = rows.columns.time
    inside = (time < span.now) & (time >= span.now - max(span.window, span.mature + delay))
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
    groupings = Groupings(columns)
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
        view = View("score", "number", own.probability)
        score = _compared(view, reference.score, Groupings(own.columns), window, together)
    return (
        tuple(_compared(view, found, groupings, window, together) for view, found in inputs),
        tuple(_compared(view, found, groupings, window, together) for view, found in flags),
        score,
    )


def _compared(view: View, reference: Distribution, groupings: Groupings, window: int, together: int) -> Compared:
    bins, k = view.binned(reference.edges)
    if k != len(reference.share):  # another vocabulary than the fingerprint's
        bins, k = np.full(len(bins), -1), len(reference.share)
    found = [compare(reference, counts_of(bins, group, k)) for group in groupings.of(view)]
    moved = max(found, key=lambda one: (2.0 if one.chance is None else one.chance, -one.low))
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
