"""What came of `demo_drift`: figures per week and span, by the simulator's truth, a picture and a few lines.

Nothing is matured or estimated here: the truth of every transaction is in the simulated file. N rows (streamed transactions).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter, WeekdayLocator
from matplotlib.figure import Figure

from seqfraud.bundle import Bundle, open_bundle
from seqfraud.console import figure
from seqfraud.metrics import average_precision, bootstrap_interval, paired_bootstrap
from serve.journalled import read_journal
from serve.shadow import read_shadow
from training.charts import ABOVE, FRAUD, INK, LINE, MODEL, MUTED, OTHERS, shares, standalone
from training.simulate import NEW_PATTERN

TOPICS = ("inputs", "scores", "alerts", "labels", "quality", "calibration")
WIDTH = 8.6
"""Inches."""

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Week:
    """A streamed week and the monitor's report at its end."""

    since: date
    report: Mapping[str, Any]

    @property
    def level(self) -> str:
        """The monitor's verdict."""
        return str(self.report["level"])

    @property
    def topics(self) -> dict[str, dict[str, str]]:
        """Of the model in service: level and words by name."""
        (model,) = (m for m in self.report["models"] if m["role"] == "in service")
        return {topic["name"]: topic for topic in model["topics"]}

    @property
    def words(self) -> str:
        """The verdict and what led to it."""
        causes = [t for t in self.topics.values() if t["level"] == self.level and self.level in ("alarm", "watch")]
        return "; ".join([self.level, *(f"{t['name']}: {t['words']}" for t in causes)])


@dataclass
class Told:
    """The story as it went.

    Attributes:
        changes: day, action and the model that answers from then on.
        gates: what the gate said, by challenger.
        lines: for people.
    """

    folder: Path
    live: date
    new_kind: date
    champion: str = ""
    challenger: str = ""
    bad: str = ""
    alarm: date | None = None
    weeks: list[Week] = field(default_factory=list)
    changes: list[tuple[date, str, str]] = field(default_factory=list)
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        """Everything that was simulated."""
        return self.folder / "transactions.parquet"

    @property
    def state(self) -> Path:
        """The service's."""
        return self.folder / "state"

    def bundle(self, model: str) -> Bundle:
        """A model of the registry."""
        return open_bundle(self.folder / "models" / "bundles" / model)

    @property
    def unseen(self) -> date:
        """The first day of which the challenger was fitted on no label."""
        return date.fromisoformat(self.bundle(self.challenger).manifest.fingerprint["labels_until"][:10])

    def scores(self, model: str) -> Path:
        """What a model says of every transaction."""
        return self.folder / f"scores-{model}.parquet"

    @property
    def promoted(self) -> date:
        """When the challenger came into force."""
        return next(day for day, action, model in self.changes if action == "promote" and model == self.challenger)

    @property
    def end(self) -> date:
        """After the last whole week."""
        return self.weeks[-1].since + timedelta(days=7)


@dataclass(frozen=True)
class Streamed:
    """N streamed transactions in arrival order: what was answered, by whom, and what they were.

    Attributes:
        by: what champion and challenger say of them, whoever answered, by id.
    """

    time: npt.NDArray[np.int64]
    user: npt.NDArray[np.int64]
    fraud: Mask
    new: Mask
    model: npt.NDArray[np.str_]
    probability: Floats
    alerted: Mask
    by: Mapping[str, Floats]

    def between(self, since: date, until: date) -> Mask:
        """Rows of some days."""
        return (self.time >= _ms(since)) & (self.time < _ms(until))


def _ms(day: date) -> int:
    return (day - date(1970, 1, 1)).days * 86_400_000


def read_streamed(told: Told) -> Streamed:
    """From the journal, the simulated file and the scores."""
    journal = read_journal(told.state, told.bundle(told.champion).manifest.schema, since=_ms(told.live)).table
    data = pq.read_table(told.data, columns=["transaction_id", "user_id", "is_fraud", "fraud_kind"])
    at = np.searchsorted(data["transaction_id"].to_numpy(), np.array(journal["id"].to_pylist(), dtype=np.int64))
    data = data.take(at)
    by = {}
    for model in (told.champion, told.challenger):
        scores = pq.read_table(told.scores(model))
        found = dict(zip(scores["transaction_id"].to_pylist(), scores["fraud_probability"].to_pylist(), strict=True))
        by[model] = np.array([found[identity] for identity in journal["id"].to_pylist()])
    return Streamed(
        time=journal["time"].to_numpy(),
        user=data["user_id"].to_numpy(),
        fraud=data["is_fraud"].to_numpy() == 1,
        new=np.array([kind == NEW_PATTERN for kind in data["fraud_kind"].to_pylist()]),
        model=np.array(journal["model"].to_pylist()),
        probability=journal["probability"].to_numpy(),
        alerted=np.array([decision != "approve" for decision in journal["decision"].to_pylist()]),
        by=by,
    )


def figures(told: Told) -> dict[str, Any]:
    """Everything that is kept of a story."""
    rows = read_streamed(told)
    unseen = told.unseen
    weeks = [_week(told, rows, week, unseen) for week in told.weeks]
    spans = {
        "before the new kind": (told.live, told.new_kind),
        "the new kind, before the promotion": (told.new_kind, told.promoted),
        "after the promotion": (told.promoted, told.end),
    }
    return {
        "models": {"champion": told.champion, "challenger": told.challenger, "bad": told.bad},
        "alarm": str(told.alarm),
        "changes": [[str(day), action, model] for day, action, model in told.changes],
        "weeks": weeks,
        "spans": {name: _span(told, rows, *span) for name, span in spans.items()},
        "answered": _answered(told, rows),
        "parity": _parity(told, rows),
        "gates": told.gates,
    }


def _week(told: Told, rows: Streamed, week: Week, unseen: date) -> dict[str, Any]:
    """A week; of the challenger nothing where it was fitted on labels of the week."""
    inside = rows.between(week.since, week.since + timedelta(days=7))
    fraud = rows.fraud[inside]
    return {
        "since": str(week.since),
        "monitor": week.level,
        "topics": {name: week.topics[name]["level"] for name in TOPICS},
        "rows": int(inside.sum()),
        "frauds": int(fraud.sum()),
        "of the new kind": int(rows.new[inside].sum()),
        "answered": _by_model(rows.model[inside]),
        "average_precision": {
            "answered": average_precision(fraud, rows.probability[inside]),
            "champion": average_precision(fraud, rows.by[told.champion][inside]),
            "challenger": (
                average_precision(fraud, rows.by[told.challenger][inside]) if week.since >= unseen else None
            ),
        },
        "alerts": float(rows.alerted[inside].mean()),
        "caught": _share(rows.alerted, inside & rows.fraud),
        "caught_of_the_new_kind": _share(rows.alerted, inside & rows.new),
    }


def _share(mask: Mask, among: Mask) -> float | None:
    return float(mask[among].mean()) if among.any() else None


def _by_model(model: npt.NDArray[np.str_]) -> dict[str, int]:
    return {str(name): int(count) for name, count in zip(*np.unique(model, return_counts=True), strict=True)}


def _span(told: Told, rows: Streamed, since: date, until: date) -> dict[str, Any]:
    """What was answered, with an interval by user, and how much better than the champion would have been."""
    inside = rows.between(since, until)
    fraud, user = rows.fraud[inside], rows.user[inside]
    answered, champion = rows.probability[inside], rows.by[told.champion][inside]
    found = bootstrap_interval("average_precision", fraud, answered, user)
    gain = paired_bootstrap("average_precision", fraud, answered, champion, user)
    return {
        "since": str(since),
        "until": str(until),
        "frauds": int(fraud.sum()),
        "average_precision": None if found is None else vars(found),
        "champion": average_precision(fraud, champion),
        "gain": None if gain is None else vars(gain),
        "caught": _share(rows.alerted, inside & rows.fraud),
        "caught_of_the_new_kind": _share(rows.alerted, inside & rows.new),
        "alerts": float(rows.alerted[inside].mean()),
    }


def _answered(told: Told, rows: Streamed) -> list[dict[str, Any]]:
    """Which models answered between two changes."""
    days = sorted({told.live, *(day for day, *_ in told.changes)})
    ends = [*days[1:], date.max]
    spans = [(day, rows.between(day, end)) for day, end in zip(days, ends, strict=True)]
    return [{"since": str(day), **_by_model(rows.model[inside])} for day, inside in spans if inside.any()]


def _parity(told: Told, rows: Streamed) -> dict[str, Any]:
    """Largest difference of a live answer, and of a live shadow score, from the same model's bulk score."""
    live = [
        np.abs(rows.probability - scores)[rows.model == model].max(initial=0.0) for model, scores in rows.by.items()
    ]
    shadow = read_shadow(told.state)
    scores = pq.read_table(told.scores(told.challenger))
    bulk = dict(zip(scores["transaction_id"].to_pylist(), scores["fraud_probability"].to_pylist(), strict=True))
    found = [
        abs(p - bulk[identity])
        for model, identity, p in zip(*(shadow[c].to_pylist() for c in ("model", "id", "probability")), strict=True)
        if model == told.challenger
    ]
    return {"answers": float(max(live)), "shadow": max(found, default=0.0), "shadow_rows": len(found)}


def summary(told: Told, found: Mapping[str, Any]) -> str:
    """The story and its figures in plain lines."""
    lines = ["", "What happened", *(f"  {line}" for line in "\n".join(told.lines).splitlines()), "", "Week by week"]
    lines.append(
        f"  {'from':10} {'monitor':8} {'frauds':>6} {'new':>4}  average precision: answered, champion, challenger"
    )
    for week in found["weeks"]:
        p = week["average_precision"]
        lines.append(
            f"  {week['since']} {week['monitor']:8} {week['frauds']:6} {week['of the new kind']:4}  "
            f"{p['answered']:18.3f} {p['champion']:9.3f} {figure(p['challenger'], 3):>11}"
        )
    lines += ["", "What came out"]
    for name, span in found["spans"].items():
        p, gain = span["average_precision"], span["gain"]
        lines.append(f"  {name}: average precision {p['estimate']:.3f} [{p['low']:.3f}, {p['high']:.3f}]")
        if gain["difference"]:
            lines[-1] += (
                f"; the champion's would be {span['champion']:.3f}, difference {gain['difference']:+.3f} "
                f"[{gain['low']:+.3f}, {gain['high']:+.3f}]"
            )
        if span["caught_of_the_new_kind"] is not None:
            lines[-1] += f"; {span['caught_of_the_new_kind']:.0%} of the new kind alerted"
    for part in found["answered"]:
        who = ", ".join(f"{model[:8]} {n:,}" for model, n in part.items() if model != "since")
        lines.append(f"  from {part['since']} answered: {who}")
    parity = found["parity"]
    lines.append(
        f"  live answers equal bulk scores to {parity['answers']:.1e}; {parity['shadow_rows']:,} shadow scores to "
        f"{parity['shadow']:.1e}"
    )
    return "\n".join(lines)


# ---- the picture


def draw(told: Told, found: Mapping[str, Any]) -> str:
    """SVG: average precision per week of both models and of what was answered; below, what was caught of the new kind."""
    weeks = found["weeks"]
    middle = np.array([np.datetime64(week["since"]) + np.timedelta64(84, "h") for week in weeks])

    def paint(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        series = [
            ("champion", FRAUD, (0, (5, 2)), "o", "champion"),
            ("challenger", OTHERS[0], (0, (1.5, 1.5)), "s", "challenger"),
            ("answered", MODEL, "-", "", "as answered"),
        ]
        for key, colour, dashes, marker, name in series:
            y = np.array([week["average_precision"][key] for week in weeks], dtype=float)
            above.plot(middle, y, color=colour, linestyle=dashes, marker=marker, markersize=4, label=name)
        above.set_ylabel("average precision")
        above.set_ylim(0, None)
        above.legend(ncols=3, **ABOVE)
        caught = [("caught", INK, "-", "all frauds"), ("caught_of_the_new_kind", FRAUD, (0, (5, 2)), "the new kind")]
        for key, colour, dashes, name in caught:
            share = np.array([week[key] for week in weeks], dtype=float)
            below.plot(middle, share, color=colour, linestyle=dashes, marker="o", markersize=4, label=name)
        below.set_ylabel("caught by an alert")
        below.set_ylim(0, 1)
        shares(below.yaxis)
        below.legend(ncols=2, **ABOVE)
        below.xaxis.set_major_locator(WeekdayLocator(told.live.weekday()))  # type: ignore[no-untyped-call]
        below.xaxis.set_major_formatter(DateFormatter("%d %b"))  # type: ignore[no-untyped-call]
        for axes in (above, below):
            _mark(axes, told, words=axes is above)

    title = "A new kind of fraud, an alarm, a challenger"
    words = (
        "Average precision per week of champion, challenger and of what was answered, and the share of frauds alerted."
    )
    return standalone("demo-drift", title, words, paint, (WIDTH, 5.2))


def _mark(axes: Axes, told: Told, words: bool) -> None:
    """When what happened, as upright lines."""
    assert told.alarm is not None
    trained = next(day for day, action, _ in told.changes if action == "challenge")
    for day, what in (
        (told.new_kind, "new kind"), (told.alarm, "alarm"), (trained, "in shadow"), (told.promoted, "promoted")
    ):  # fmt: skip
        axes.axvline(np.datetime64(day), color=LINE if what != "promoted" else MUTED, linewidth=1.2, zorder=0)  # type: ignore[arg-type]
        if words:
            axes.annotate(
                what, (np.datetime64(day), 1), xycoords=("data", "axes fraction"), xytext=(3, -2),
                textcoords="offset points", va="top", fontsize=8, color=MUTED,
            )  # fmt: skip
