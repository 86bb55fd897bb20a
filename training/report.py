"""`report.html`: one file that says in words, tables and charts whether a model can be trusted.

`render_report(content)` is a pure function of the content: the same content gives the same bytes. The colours of the
charts are the page's CSS variables, so that they follow it into the dark and onto paper. Nothing is loaded from outside
and no script runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from seqfraud.choosing import DECLINE_PRECISION
from seqfraud.config import DAY_MS, DecisionConfig, duration_words, parse_instant
from seqfraud.files import replaced_file
from seqfraud.look import style
from seqfraud.metrics import Interval, precision_recall_curve, wilson
from seqfraud.policy import NEVER, Costs
from training.charts import (
    ABOVE,
    CARD,
    DASHES,
    FRAUD,
    HONEST,
    INK,
    LINE,
    MODEL,
    MUTED,
    OTHERS,
    SMALL,
    inline,
    log_odds,
    log_odds_ticks,
    shares,
)
from training.importance import Importance
from training.report_data import (
    GRU,
    TOP,
    Assessment,
    Baselines,
    Between,
    Bin,
    Floats,
    Labels,
    Mask,
    Miss,
    ReportContent,
    ScoredModel,
    assess,
    bins_with_intervals,
    money_text,
    read_baselines,
    report_content,
)
from training.worth import CHOSEN, NO_MODEL

__all__ = [
    "Baselines",
    "ReportContent",
    "ScoredModel",
    "read_baselines",
    "render_report",
    "report_content",
    "write_report",
]

TEMPLATE = Path(__file__).with_name("report_template.html")

LITTLE_FRAUD = 100
"""Below so many frauds every figure is uncertain, and the report says so."""
TOO_LITTLE_FRAUD = 30
"""Below so many frauds a comparison means nothing."""


def write_report(path: Path, content: ReportContent) -> None:
    """Write the page under a temporary name, then rename."""
    page = render_report(content)
    with replaced_file(path) as file:
        file.write_text(page, encoding="utf-8")


def render_report(content: ReportContent) -> str:
    """The page as HTML."""
    found = assess(content)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=percent, decimal=decimal, money=money_text, count=count_text, moment=moment_text, gap=gap_text
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        content=content,
        found=found,
        verdict=verdict_on(content, found),
        tiles=_tiles(content, found),
        columns=_model_columns(content, found),
        choices=_choices(content),
        worth=_worth(content),
        periods=_periods(content),
        charts=_charts(content, found),
        timelines=[_timeline(content, i, miss) for i, miss in enumerate(content.misses)],
        span=span,
        little_fraud=TOO_LITTLE_FRAUD,
        style=Markup(style()),
    )


# --- Words ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """`level` is one of good, mixed, bad, unknown; `cautions` are what to keep in mind."""

    level: str
    headline: str
    paragraphs: tuple[str, ...]
    cautions: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """Something chosen on the validation days, and what it came to there and on the test days."""

    what: str
    value: str
    how: str
    measured: str
    validation: str
    test: str


def percent(value: float | None) -> str:
    """A share in words: 0.0090 is 0.90 %."""
    if value is None:
        return "–"
    shown = 100 * value
    digits = 0 if shown in (0.0, 100.0) else 1 if abs(shown) >= 9.95 else 2 if abs(shown) >= 0.1 else 4
    if digits == 1 and shown < 100:
        shown = min(shown, 99.9)  # 100 % is said only of all of them
    return f"{shown:.{digits}f} %"


def decimal(value: float | None, digits: int = 3) -> str:
    """A figure without a unit."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def span(between: Between | Interval | None, words: Callable[[float], str]) -> str:
    """An interval as text; an empty text where there is none."""
    return "" if between is None else f"{words(between.low)} to {words(between.high)}"


def threshold_text(value: float) -> str:
    """A threshold as a probability, or never."""
    return "never" if value == NEVER else f"{value:.4f}"


def budget_text(figures: Mapping[str, Any]) -> str:
    """The alert budget of figures, in words."""
    if figures.get("alerts_per_day") is not None:
        return f"{figures['alerts_per_day']:,} alerts a day"
    return f"alerts on {percent(figures.get('alert_share') or TOP)} of a day's transactions"


def _choices(content: ReportContent) -> tuple[Choice, ...]:
    """What was chosen on the validation days, with its figures there and on the test days."""
    metrics, config = content.metrics, content.config
    parts = [metrics.get(name, {}) for name in ("validation", "test")]
    ap = [decimal(part.get("average_precision")) for part in parts]
    slope = [decimal(part.get("calibration_slope"), 2) for part in parts]
    out = []
    if content.epochs:
        out.append(
            Choice(
                "epochs",
                f"{metrics.get('best_epoch', '–')} of {len(content.epochs)}",
                "highest average precision on the validation days",
                "average precision",
                *ap,
            )
        )
    if "selection" in metrics:
        kept, dropped = (len(metrics["selection"][key]) for key in ("kept", "dropped"))
        how = "the fewest whose average precision on the validation days is about that of all"
        out.append(Choice("inputs", f"{kept} of {kept + dropped}", how, "average precision", *ap))
    method = {"platt": "Platt scaling", "none": "none"}[config.calibration.method]
    out.append(
        Choice("calibration", method, "log-loss on the validation days", "slope (1 is calibrated)", *slope)
        if config.calibration.method != "none"
        else Choice("calibration", method, "switched off", "slope (1 is calibrated)", *slope)
    )
    return (*out, *_decision_choices(content))


def _decision_choices(content: ReportContent) -> list[Choice]:
    """What decides, with the rows that it takes in on validation and on test days."""
    policy = content.policy
    cuts, words = policy.thresholds, _decision_words(content.config.decision)
    scored = (
        (content.validation_label, content.validation_probability, content.validation_amount),
        (content.held_out.label, content.models[0].probability, content.held_out.amount),
    )

    def choice(what: str, value: str, how: str, taken: Callable[[Floats, Floats | None], Mask]) -> Choice:
        texts = [_taken_text(label, taken(score, amount)) for label, score, amount in scored]
        return Choice(what, value, how, "share of rows, precision, recall", *texts)

    out = [choice("“is fraud” from", threshold_text(cuts.is_fraud), "best F1", lambda p, _: p >= cuts.is_fraud)]
    if policy.by == "thresholds":
        out.append(choice("review from", threshold_text(cuts.review), words["review"], lambda p, _: p >= cuts.review))
    elif policy.review_loss is not None:
        value = f"an expected loss of {money_text(policy.review_loss)}"
        out.append(choice("review from", value, words["review"], lambda p, a: policy.decide_many(p, a) > 0))
    if policy.costs is None:
        out.append(
            choice("decline from", threshold_text(cuts.decline), words["decline"], lambda p, _: p >= cuts.decline)
        )
        return out
    for code, what in ((1, "review or decline"), (2, "decline")):
        how = "least expected cost of the three decisions, by probability and amount"
        least = "least expected cost" if code == 1 else "the same"
        out.append(choice(what, least, how, lambda p, a, code=code: policy.decide_many(p, a) >= code))  # type: ignore[misc]
    margin = "given" if content.config.decision.margin is not None else words["margin"]
    out.append(choice("margin", f"{policy.costs.margin:g}", margin, lambda p, a: policy.decide_many(p, a) > 0))
    without = f"review from {threshold_text(cuts.review)}, decline from {threshold_text(cuts.decline)}"
    out.append(
        choice("where there is no amount", without, "least cost of flat thresholds", lambda p, _: p >= cuts.review)
    )
    return out


def _decision_words(decision: DecisionConfig) -> dict[str, str]:
    """How what decides was chosen."""
    precision = DECLINE_PRECISION if decision.decline_precision is None else decision.decline_precision
    review, decline = "like “is fraud”", f"lowest cut with a precision of at least {percent(precision)}"
    if decision.by == "budget":
        review = f"a mean of {decision.alerts_per_day:g} alerts a day"
    elif decision.alert_share is not None:
        review = f"alerts nearest to {percent(decision.alert_share)} of the rows"
    elif decision.review is not None:
        review = "given"
    if decision.decline is not None:
        decline = "given"
    elif decision.declines_per_day is not None:
        decline = f"a mean of {decision.declines_per_day:g} declines a day"
    return {"review": review, "decline": decline, "margin": "1, unless another cost less beyond chance"}


def _taken_text(label: Labels, taken: Mask) -> str:
    if not len(label):
        return "–"
    if not taken.any():
        return "no row"
    fraud = label == 1
    recall = percent(float(taken[fraud].mean())) if fraud.any() else "–"
    return f"{percent(float(taken.mean()))}, {percent(float(fraud[taken].mean()))}, {recall}"


@dataclass(frozen=True)
class WorthRow:
    """What a policy does and costs a day."""

    name: str
    cells: tuple[tuple[str, str], ...]
    """Texts, and what stands below them."""


@dataclass(frozen=True)
class Worth:
    """What the decisions are worth: sentences, and a table per part of the split."""

    words: tuple[str, ...]
    tables: tuple[tuple[str, tuple[WorthRow, ...]], ...]


def _worth(content: ReportContent) -> Worth | None:
    """The money that decisions lose and save a day; None where metrics.json does not say it."""
    found = content.metrics.get("worth")
    if found is None:
        return None
    decision, has_money = content.config.decision, content.held_out.amount is not None
    prices = found["prices"]
    if found["priced"]:
        fraud = [f"{prices['fraud_share']:g} × its amount"] if prices["fraud_share"] else []
        insult = [f"{prices['insult_share']:g} × its amount"] if prices["insult_share"] else []
        fraud += [money_text(prices["fraud_cost"])] if prices["fraud_cost"] or not fraud else []
        insult += [money_text(prices["insult_cost"])] if prices["insult_cost"] or not insult else []
        counted = (
            f"Counted by the costs of [decision]: a fraud that goes through {' + '.join(fraud)}, a review "
            f"{money_text(prices['review_cost'])} (it recognises {percent(prices['review_catches'])} of the frauds), an "
            f"honest transaction declined {' + '.join(insult)}."
        )
    else:
        counted = (
            f"[decision] names no costs: counted is the {'amount' if has_money else 'number'} of frauds that go through, as "
            "if a review recognised every fraud and cost nothing. With review_cost and insult_cost there the table "
            "counts them too, and compares with deciding by expected cost."
        )
    how = {
        "thresholds": "Decided is by thresholds of the probability",
        "budget": f"Decided is by a budget of {decision.alerts_per_day or 0:g} alerts a day",
        "cost": "Decided is by the least expected cost",
    }[decision.by]
    words = [f"{how}, chosen on the validation days alone, as was every policy below.", counted]
    tried = content.metrics.get("choice", {}).get("tried", ())
    if tried:
        texts = [
            f"{one['setting']} {money_text(one['per_day'])}{' (chosen)' if one['chosen'] else ''}" for one in tried
        ]
        words.append(f"Tried on the validation days, {content.metrics['choice']['measured']}: {'; '.join(texts)}.")
    if "test" in found:
        mine, none = (found["test"]["policies"][name] for name in (CHOSEN, NO_MODEL))
        saved = mine["saved"]
        words.insert(
            0,
            f"On the test days frauds would cost {money_text(none['cost']['estimate'])} a day without a model and cost "
            f"{money_text(mine['cost']['estimate'])} with this policy, alerts included: it saves "
            f"{money_text(saved['estimate'])} a day (95 % interval {money_text(saved['low'])} to "
            f"{money_text(saved['high'])}).",
        )
    tables = tuple(
        (part, tuple(_worth_row(name, of) for name, of in found[part]["policies"].items()))
        for part in ("validation", "test")
        if part in found
    )
    return Worth(tuple(words), tables)


def _worth_row(name: str, of: Mapping[str, Any]) -> WorthRow:
    def between(figure: Mapping[str, float]) -> str:
        return f"{money_text(figure['low'])} to {money_text(figure['high'])}"

    days, less = of["alerts_by_day"], of["less_than_this"]
    cells = [
        (f"{of['alerts']:,.1f}", f"{days['least']:,.0f} to {days['most']:,.0f}, median {days['median']:,.0f}"),
        (f"{of['declines']:,.1f}", ""),
        (percent(of["precision"]), "" if of["decline_precision"] is None else f"declines {percent(of['decline_precision'])}"),
        (percent(of["recall"]), ""),
        (money_text(of["fraud_lost"]), ""),
        (money_text(of["review_costs"]), ""),
        (money_text(of["insult_costs"]), ""),
        (money_text(of["cost"]["estimate"]), between(of["cost"])),
        ("–", "") if name == NO_MODEL else (money_text(of["saved"]["estimate"]), between(of["saved"])),
        ("–", "") if name == CHOSEN else (money_text(0 - less["estimate"]), f"{money_text(0 - less['high'])} to {money_text(0 - less['low'])}"),
    ]  # fmt: skip
    return WorthRow(name, tuple(cells))


def verdict_on(content: ReportContent, found: Assessment) -> Verdict:
    """The findings in plain words, by rules; every figure in it stands elsewhere in the report too."""
    held, metrics = content.held_out, content.metrics
    if not len(held):
        return Verdict(
            "unknown",
            "Not tested",
            (
                "The data hold no labelled rows in the test days, so nothing here says how good the model is on days "
                "it has not seen. The figures of the validation days flatter: epochs, calibration and thresholds were "
                "chosen on them.",
            ),
            content.notes,
        )
    test = metrics["test"]
    days = len(np.unique(held.day))
    words = [
        f"On {days} test day{'s' if days > 1 else ''}, none of them used for any choice, with {len(held):,} "
        f"transactions and {test['frauds']:,} frauds ({percent(test['frauds'] / len(held))}),"
    ]
    if test["average_precision"] is None:
        words.append("no figure of detection is defined, because there is no fraud.")
        return Verdict("unknown", "No fraud in the test days", (" ".join(words),), content.notes)
    words.append(f"the {GRU} reaches an average precision of {decimal(test['average_precision'])}")
    words.append(f"(95 % interval {span(found.rows[0].interval, decimal)};")
    words.append(f"ranking at random would give {decimal(test['frauds'] / len(held))}).")
    level, headline, comparison = _compared(found, test["frauds"])
    paragraphs = (" ".join([*words, comparison]), _use(content, found), _calibration_words(found))
    return Verdict(level, headline, tuple(part for part in paragraphs if part), _cautions(content, found))


def _compared(found: Assessment, frauds: int) -> tuple[str, str, str]:
    """Level, headline and sentence: the GRU against the best baseline by average precision."""
    others = [row for row in found.rows[1:] if row.figures["average_precision"] is not None]
    if not others:
        text = "There is no baseline beside it, so this report cannot say whether a simpler model would do as well."
        return "unknown", "No baseline to compare with", text
    best = max(others, key=lambda row: float(row.figures["average_precision"]))
    name, gap, mine = best.model.name, best.difference, found.rows[0].interval
    words = f"The best baseline is {name} with {decimal(best.figures['average_precision'])}"
    if gap is None or mine is None or best.interval is None:
        return "unknown", "The baselines cannot be compared", f"{words}."
    overlap = mine.low <= best.interval.high and best.interval.low <= mine.high
    words += f" ({span(best.interval, decimal)}); the two intervals {'overlap' if overlap else 'do not overlap'}."
    words += (
        f" On the same rows and draws the {GRU} is {decimal(abs(gap.difference))} "
        f"{'higher' if gap.difference >= 0 else 'lower'} (95 % interval of the difference {decimal(gap.low)} to "
        f"{decimal(gap.high)}), "
    )
    if frauds < TOO_LITTLE_FRAUD:
        return "unknown", "Too little fraud to judge", words + "which so few frauds leave open."
    if gap.low > 0:
        return "good", "Better than every baseline", words + "more than chance explains."
    if gap.high < 0:
        return "bad", f"Worse than {name}", words + f"more than chance explains: use {name}."
    return "mixed", f"No clear difference from {name}", words + "so these test days do not tell the two apart."


def _use(content: ReportContent, found: Assessment) -> str:
    """What an alert budget and the threshold bring."""
    words = []
    if found.precision_at_budget is not None:
        between = found.precision_at_budget
        text = f"With {budget_text(found.rows[0].figures)}, {percent(between.value)} of the alerts are fraud"
        text += f" ({span(between, percent)} over days)"
        if found.money_caught is not None:
            text += f" and {percent(found.money_caught.value)} of a day's fraud money is in them"
            text += f" ({span(found.money_caught, percent)})"
        words.append(text + ".")
    if found.recall is not None:
        text = f"At the threshold for “is fraud”, {threshold_text(content.thresholds.is_fraud)}, it catches"
        text += f" {percent(found.recall.value)} of the frauds ({span(found.recall, percent)})"
        if found.precision is not None:
            right = f"{percent(found.precision.value)} of what it flags is fraud ({span(found.precision, percent)})"
            text += f", and {right}"
        words.append(text + ".")
    return " ".join(words)


def pooled(bins: Sequence[Bin]) -> tuple[float, Between]:
    """Mean probability of all rows of some bins, and the observed rate with its binomial interval."""
    count = sum(b.bin.count for b in bins)
    said = sum(b.bin.count * b.bin.mean_probability for b in bins) / count
    hits = round(sum(b.bin.count * b.bin.observed_rate for b in bins))
    return said, Between(hits / count, *wilson(hits, count))


def _calibration_words(found: Assessment) -> str:
    """Whether the probabilities can be taken at their word."""
    parts = []
    fine = True
    for bins, where in ((found.calibration, "over all rows"), (found.calibration_top, "in the highest-scored 1 %")):
        said, came = pooled(bins)
        # a binomial interval of very many rows is narrower than what matters
        off = not came.low <= said <= came.high and abs(said - came.value) > 0.1 * max(said, came.value)
        fine &= not off
        verb = "" if not off else ", too low" if said < came.value else ", too high"
        parts.append(f"{where} it says {percent(said)} and {percent(came.value)} came ({span(came, percent)}){verb}")
    slope = found.rows[0].figures.get("calibration_slope")
    tilt = ""
    if slope is not None and not 0.8 <= slope <= 1.25:
        fine = False
        extreme = "too extreme: low ones are too low, high ones too high" if slope < 1 else "not extreme enough"
        tilt = f"; the slope of {decimal(slope, 2)} says that they are {extreme}"
    start = "Its probabilities can be taken at their word" if fine else "Calibration is off"
    end = "" if fine else "; the ranking does not suffer, but thresholds and expected losses do"
    return f"{start}: {'; '.join(parts)}{tilt}{end}."


def _cautions(content: ReportContent, found: Assessment) -> tuple[str, ...]:
    """What to keep in mind, by rules."""
    metrics, test = content.metrics, content.metrics["test"]
    out = list(content.notes)
    if test["frauds"] < LITTLE_FRAUD:
        out.append(f"Only {test['frauds']:,} frauds are in the test days: every figure here is uncertain.")
    mine = found.rows[0].interval
    if mine is not None and mine.low <= 1.5 * test["frauds"] / test["rows"]:
        out.append("The interval of the average precision reaches down to what ranking at random would give.")
    before = metrics.get("validation", {}).get("average_precision")
    if before is not None and mine is not None and before > mine.high:
        out.append(
            f"The test days are worse than the validation days ({decimal(test['average_precision'])} against "
            f"{decimal(before)}): fraud has changed since, or the choices fit the validation days too closely."
        )
    frauds = int((content.validation_label == 1).sum())
    if 0 < frauds < LITTLE_FRAUD:
        what = "The choice of inputs, thresholds" if "selection" in metrics else "Thresholds"
        out.append(f"{what} and calibration rest on {frauds:,} frauds in the validation days.")
    decision = content.config.decision
    if content.thresholds.decline == NEVER and decision.by != "cost" and decision.declines_per_day is None:
        precision = DECLINE_PRECISION if decision.decline_precision is None else decision.decline_precision
        out.append(
            f"Nothing is declined: no cut on the validation days reached a precision of {percent(precision)} with "
            "enough rows."
        )
    if content.epochs and metrics.get("best_epoch") == len(content.epochs) > 1:
        out.append("The best epoch is the last one: more epochs may bring more.")
    if len(content.models) == 1:
        out.append("`seqfraud baselines RUN` puts simpler models beside this one.")
    weak = [
        f"{part.name} {segment.name}"
        for part in found.segmentations
        for segment in part.segments
        if segment.recall is not None
        and found.recall is not None
        and segment.frauds >= TOO_LITTLE_FRAUD
        and segment.recall.high < 0.6 * found.recall.value
    ]
    if weak:
        out.append(f"Far fewer frauds than on average are caught here: {'; '.join(weak)}.")
    return tuple(out)


# --- What the page shows beside the words -----------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A key figure with its interval and what it means."""

    label: str
    value: str
    interval: str
    hint: str


@dataclass(frozen=True)
class Cell:
    """A cell of the table of models; `value` is the exact figure."""

    text: str
    value: float | None
    below: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A column of the table of models, one cell per model."""

    header: str
    below: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Period:
    """A stretch of the split; `days` is its length, `rows` how many of its rows are used for what it is for."""

    name: str
    kind: str
    first: str
    until: str
    days: float
    rows: int | None


@dataclass(frozen=True)
class Chart:
    """A drawn chart; `alt` says in words what it shows."""

    title: str
    svg: Markup
    caption: str
    wide: bool = False


def count_text(value: int) -> str:
    """A whole number with separated thousands."""
    return f"{value:,}"


def moment_text(ms: int) -> str:
    """A moment in UTC to the minute."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def gap_text(ms: int | None) -> str:
    """The time since the event before."""
    return "first" if ms is None else duration_words(ms)


def _tiles(content: ReportContent, found: Assessment) -> list[Tile]:
    if not found.rows:
        return []
    figures = found.rows[0].figures
    budget = budget_text(figures)
    tiles = [
        Tile(
            "Average precision",
            decimal(figures["average_precision"]),
            span(found.rows[0].interval, decimal),
            f"at random it would be {decimal(figures['frauds'] / figures['rows'])}",
        )
    ]
    if found.precision_at_budget is not None:
        between = found.precision_at_budget
        tiles.append(Tile("Alerts that are fraud", percent(between.value), span(between, percent), f"with {budget}"))
    if found.money_caught is not None:
        between = found.money_caught
        tiles.append(Tile("Fraud money caught", percent(between.value), span(between, percent), f"with {budget}"))
    if found.recall is not None:
        between = found.recall
        hint = f"at the threshold {threshold_text(content.thresholds.is_fraud)}"
        tiles.append(Tile("Frauds flagged", percent(between.value), span(between, percent), hint))
    return tiles


def _model_columns(content: ReportContent, found: Assessment) -> list[Column]:
    """The table of models, column by column; the best figure of a column is marked where there is a choice."""
    rows = found.rows
    if not rows:
        return []

    def column(header: str, below: str, key: str, words: Callable[[float | None], str], least: bool = False) -> Column:
        values = [row.figures.get(key) for row in rows]
        known = [value for value in values if value is not None]
        best = None if len(known) < 2 else min(known) if least else max(known)
        return Column(header, below, tuple(Cell(words(v), v, best=v is not None and v == best) for v in values))

    first = column("Average precision", "95 % interval by user", "average_precision", decimal)
    with_intervals = [
        Cell(cell.text, cell.value, span(row.interval, decimal), cell.best)
        for cell, row in zip(first.cells, rows, strict=True)
    ]
    columns = [Column(first.header, first.below, tuple(with_intervals))]
    if len(rows) > 1:
        cells = [Cell("", None)]
        for row in rows[1:]:
            gap = row.difference
            text = "–" if gap is None else f"{'+' if gap.difference >= 0 else ''}{decimal(gap.difference)}"
            below = "" if gap is None else f"{decimal(gap.low)} to {decimal(gap.high)}"
            cells.append(Cell(text, None if gap is None else gap.difference, below))
        columns.append(Column(f"{GRU} minus this", "same rows and draws", tuple(cells)))
    budget = budget_text(rows[0].figures)
    columns += [
        column("ROC AUC", "", "roc_auc", decimal),
        column("Recall", "at 1 % false positives", "recall_at_1pct_fpr", percent),
        column("Precision", budget, "precision_at_budget", percent),
    ]
    if content.held_out.amount is not None:
        columns.append(column("Money caught", budget, "money_caught", percent))
    columns.append(column("Brier score", "lower is better", "brier", lambda value: decimal(value, 5), least=True))
    return columns


def _periods(content: ReportContent) -> list[Period]:
    """The split as stretches of time."""
    split, rows = content.split, content.metrics.get("rows", {})
    at = {name: parse_instant(text) for name, text in split.items()}
    stretches = [
        ("training", "train", "train_start", "validation_start", rows.get("train")),
        ("validation", "validation", "validation_start", "train_end", rows.get("validation")),
        ("labels not known yet", "gap", "train_end", "test_start", None),
        ("test", "test", "test_start", "test_end", rows.get("test")),
    ]
    return [
        Period(name, kind, split[low][:10], split[high][:10], (at[high] - at[low]) / DAY_MS, count)
        for name, kind, low, high, count in stretches
        if low in at and high in at and at[high] > at[low]
    ]


# --- Charts ---------------------------------------------------------------------------------------


def _looks(content: ReportContent) -> list[dict[str, Any]]:
    """How each model's line looks."""
    first: dict[str, Any] = {"color": MODEL, "linewidth": 2.2, "zorder": 3}
    others = [
        {"color": OTHERS[i % len(OTHERS)], "linestyle": DASHES[i % len(DASHES)]} for i in range(len(content.models) - 1)
    ]
    return [first, *others]


def _charts(content: ReportContent, found: Assessment) -> dict[str, Chart]:
    charts = {}
    if found.rows and content.held_out.fraud.any():
        charts["precision_recall"] = _precision_recall(content, found)
        charts["money"], charts["precision"] = _budgets(content, found)
    if found.rows:
        charts["calibration"] = _calibration(content, found)
        charts["calibration_top"] = _calibration_top(content, found)
        charts["scores"] = _scores(content)
        if "test" in content.metrics.get("worth", {}):
            charts["worth"] = _cost_curve(content)
    if content.epochs:
        charts["loss"], charts["epochs"] = _training(content)
    if content.importance is not None:
        charts["importance"] = _importance(content.importance)
    return charts


def _precision_recall(content: ReportContent, found: Assessment) -> Chart:
    held = content.held_out
    rate = float(held.fraud.mean())

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for model, row, look in zip(content.models, found.rows, _looks(content), strict=True):
            curve = precision_recall_curve(held.label, model.probability)
            if curve is not None:
                name = f"{model.name}  {decimal(row.figures['average_precision'])}"
                axes.plot(curve.recall, curve.precision, label=name, **look)
        axes.axhline(rate, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), label=f"at random  {decimal(rate)}")
        for value, names, marker in _cuts(content):
            above = content.models[0].probability >= value
            if above.any():
                x, y = float(above[held.fraud].mean()), float(held.fraud[above].mean())
                axes.plot([x], [y], marker, color=MODEL, markeredgecolor=CARD, markersize=7, zorder=4)
                axes.annotate(names, (x, y), xytext=(7, 5), textcoords="offset points", color=INK, fontsize=8.5)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="recall: share of the frauds caught", ylabel="precision")
        for axis in (axes.xaxis, axes.yaxis):
            shares(axis)
        axes.legend(title="average precision", **ABOVE, ncols=2)

    alt = f"Precision against recall on the test rows for {', '.join(model.name for model in content.models)}."
    caption = (
        "Each point is a threshold: the share of frauds it catches and the share of its alerts that are fraud. "
        f"Marked on the {GRU}'s curve: the thresholds chosen on the validation days."
    )
    return Chart("Precision and recall", inline("precision_recall", alt, paint), caption)


def _cuts(content: ReportContent) -> list[tuple[float, str, str]]:
    """Thresholds that something can reach, with their names and a marker; equal ones together."""
    names = {"is_fraud": "is fraud", "review": "review", "decline": "decline"}
    by_value: dict[float, list[str]] = {}
    for key, value in content.thresholds.as_dict().items():
        if value != NEVER:
            by_value.setdefault(value, []).append(names[key])
    markers = {"is fraud": "o", "review": "s", "decline": "D"}
    return [(value, " = ".join(found), markers[found[0]]) for value, found in by_value.items()]


def _calibration(content: ReportContent, found: Assessment) -> Chart:
    earlier = bins_with_intervals(content.validation_label, content.validation_probability)
    shown = [v for b in (*found.calibration, *earlier) for v in (b.bin.mean_probability, b.bin.observed_rate)]
    positive = [value for value in shown if value > 0]
    floor = 10.0 ** math.floor(math.log10(max(min(positive, default=1e-4), 1e-6)) - 0.01)
    highest = max((max(b.bin.mean_probability, b.high) for b in found.calibration), default=1.0)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log")
        _bins(axes, found.calibration, earlier, floor)
        limits = (floor * 0.8, min(1.2, highest * 2))
        axes.set(xlim=limits, ylim=limits)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
            axis.set_minor_locator(NullLocator())

    alt = (
        "Calibration over all test rows in ten bins of equal mass, logarithmic axes: mean probability, observed share."
    )
    caption = (
        "Ten bins with about equally many rows. On the diagonal the model keeps its word; above it, more fraud came than "
        "it said. Bars: binomial 95 % intervals. A triangle at the bottom: no fraud came in that bin."
    )
    return Chart("Calibration over all rows", inline("calibration", alt, paint), caption)


def _calibration_top(content: ReportContent, found: Assessment) -> Chart:
    earlier = bins_with_intervals(content.validation_label, content.validation_probability, top=TOP)
    every = [v for b in found.calibration_top for v in (b.bin.mean_probability, b.high)]
    highest = min(1.0, max([*every, *(b.bin.mean_probability for b in earlier)], default=1.0) * 1.05)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _bins(axes, found.calibration_top, earlier, 0.0)
        axes.set(xlim=(0, highest), ylim=(-0.02 * highest, highest))

    rows = sum(b.bin.count for b in found.calibration_top)
    alt = "Calibration inside the highest-scored one percent of the test rows, in ten bins of equal mass."
    caption = (
        f"The same inside the {rows:,} highest-scored test rows, where decisions fall. The hollow points are the "
        "validation days, on which the calibration was fitted: they cannot disprove it."
    )
    return Chart("Calibration in the top 1 %", inline("calibration_top", alt, paint), caption)


def _bins(axes: Axes, bins: Sequence[Bin], earlier: Sequence[Bin], floor: float) -> None:
    """Test bins with their intervals and validation bins, hollow; what is not above `floor` stands on it."""
    axes.plot([max(floor, 1e-9), 1], [max(floor, 1e-9), 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    if earlier:
        x, y = _points(earlier, floor)
        axes.plot(x, y, "o", color=MUTED, markerfacecolor="none", markersize=4.5, label="validation")
    x, y = _points(bins, floor)
    low = np.array([min(max(b.low, floor), v) for b, v in zip(bins, y, strict=True)])
    high = np.array([max(b.high, v) for b, v in zip(bins, y, strict=True)])
    axes.errorbar(x, y, yerr=[y - low, high - y], fmt="none", ecolor=MODEL, elinewidth=1.2)
    none_came = np.array([b.bin.observed_rate == 0 for b in bins])
    axes.plot(x[~none_came], y[~none_came], "o", color=MODEL, markersize=5.5, label="test")
    axes.plot(x[none_came], y[none_came], "v", color=MODEL, markersize=5.5)
    axes.set(xlabel="what it said: mean probability", ylabel="what came: share of frauds")
    for axis in (axes.xaxis, axes.yaxis):
        shares(axis)
    axes.legend(loc="upper left")


def _points(bins: Sequence[Bin], floor: float) -> tuple[Floats, Floats]:
    said = np.array([max(b.bin.mean_probability, floor) for b in bins])
    return said, np.array([max(b.bin.observed_rate, floor) for b in bins])


def _scores(content: ReportContent) -> Chart:
    odds = log_odds(content.models[0].probability)
    fraud = content.held_out.fraud
    low, high = math.floor(odds.min()) - 0.5, math.ceil(odds.max()) + 0.5
    edges = np.linspace(low, high, 61)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for mask, colour, name in ((~fraud, HONEST, "honest"), (fraud, FRAUD, "fraud")):
            if mask.any():
                share = np.histogram(odds[mask], edges)[0] / mask.sum()
                label = f"{name} ({int(mask.sum()):,})"
                axes.stairs(share, edges, fill=True, color=colour, alpha=0.3)
                axes.stairs(share, edges, color=colour, linewidth=1.3, label=label)
        top = 1.3 * axes.get_ylim()[1]  # room for the names of the thresholds
        for value, names, _ in _cuts(content):
            at = float(log_odds(np.array(value)))
            axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
            axes.text(at - 0.08, top, names, rotation=90, va="top", ha="right", fontsize=8)
        axes.set(xlim=(low, high), ylim=(0, top), xlabel="probability (log-odds axis)", ylabel="share of the class")
        log_odds_ticks(axes.xaxis, low, high)
        shares(axes.yaxis)
        axes.legend(**ABOVE, ncols=2)

    alt = "Distribution of the test probabilities of honest transactions and of frauds on a log-odds axis."
    caption = (
        "How far apart the model puts the classes. Each class adds up to 100 %, although frauds are far fewer. "
        "Frauds left of the dashed line of “is fraud” are missed."
    )
    return Chart("Scores by class", inline("scores", alt, paint), caption)


def _budgets(content: ReportContent, found: Assessment) -> tuple[Chart, Chart]:
    marked = found.rows[0].figures.get("alerts_per_day")
    what = "fraud money" if content.held_out.amount is not None else "frauds"

    def chart(key: str, title: str, ylabel: str, caption: str) -> Chart:
        def paint(figure: Figure) -> None:
            axes = figure.add_subplot()
            for model, curve, look in zip(content.models, found.curves, _looks(content), strict=True):
                axes.plot(curve.budgets, getattr(curve, key), label=model.name, **look)
            if marked is not None:
                axes.axvline(marked, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
            axes.set(xscale="log", ylim=(0, 1.02), xlabel="alerts a day", ylabel=ylabel)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            shares(axes.yaxis)
            axes.legend(**ABOVE, ncols=2)

        alt = f"{title}: {ylabel} against alerts a day for {', '.join(m.name for m in content.models)}."
        return Chart(title, inline(f"budget_{key}", alt, paint), caption)

    line = "" if marked is None else f" The dashed line is the budget of the tables, {marked:,} alerts a day."
    return (
        chart(
            "caught",
            f"Alerts against {what} caught",
            f"share of a day's {what} caught",
            f"A day's budget goes to its highest scores; the mean over days of the share of {what} among them.{line}",
        ),
        chart(
            "precision",
            "Alerts against precision",
            "share of alerts that are fraud",
            "The price of a larger budget: the mean over days of the share of a day's alerts that are fraud.",
        ),
    )


def _cost_curve(content: ReportContent) -> Chart:
    """Cost a day against reviews a day, by two orders; the policies as points."""
    held, found = content.held_out, content.metrics["worth"]
    costs, days, money = Costs(**found["prices"]), found["test"]["days"], held.money()
    p = content.models[0].probability
    amount = np.zeros(len(p)) if money is None else money
    approved, reviewed = (
        costs.of(held.fraud, amount, np.full(len(p), code, dtype=np.uint8)).sum(axis=0) for code in (0, 1)
    )
    orders = {"highest probabilities": p}
    if money is not None:
        orders["highest expected losses"] = p * amount
    at = np.unique(np.rint(np.geomspace(1, max(len(p) // 2, 1), 200)).astype(np.int64))
    policies = {name: of for name, of in found["test"]["policies"].items() if of["alerts"] > 0}

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        looks = ({"color": MODEL}, {"color": OTHERS[0], "linestyle": DASHES[0]})
        for (name, rank), look in zip(orders.items(), looks, strict=False):
            order = np.argsort(-rank, kind="stable")
            cost = approved.sum() + np.cumsum((reviewed - approved)[order])
            axes.plot(at / days, cost[at - 1] / days, label=name, **look)
        for number, (name, of) in enumerate(policies.items()):
            look = {"color": FRAUD if name == CHOSEN else OTHERS[1 + number % 4], "markersize": 7, "zorder": 4}
            axes.plot(
                [of["alerts"]], [of["cost"]["estimate"]], "oDs^vPX"[number % 7], linestyle="none", label=name, **look
            )
        axes.axhline(approved.sum() / days, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), label=NO_MODEL)
        axes.set(xscale="log", xlabel="reviews a day; of the points, alerts a day", ylabel="cost a day")
        axes.set_ylim(0, 1.3 * approved.sum() / days or 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.legend(**ABOVE, ncols=2)

    alt = f"Cost a day on the test days against reviews a day, with points for {', '.join(policies)}."
    caption = (
        "Lines: what the test days would have cost if so many transactions a day were reviewed and none declined, in two "
        "orders; their lowest points were not known before. Points: the policies as chosen on the validation days."
    )
    return Chart("Cost against reviews", inline("worth", alt, paint), caption)


def _training(content: ReportContent) -> tuple[Chart, Chart]:
    epochs = [int(epoch["epoch"]) for epoch in content.epochs]
    best = content.metrics.get("best_epoch")

    def chart(key: str, title: str, ylabel: str, caption: str) -> Chart:
        values = [float(epoch[key]) for epoch in content.epochs]

        def paint(figure: Figure) -> None:
            axes = figure.add_subplot()
            axes.plot(epochs, values, "o-", color=MODEL, markersize=4)
            if best in epochs:
                y = values[epochs.index(best)]
                axes.plot([best], [y], "o", markersize=11, markerfacecolor="none", markeredgecolor=FRAUD)
                axes.annotate(
                    f"epoch {best}: {y:.4f}",
                    (best, y),
                    xytext=(0, 11),
                    textcoords="offset points",
                    ha="right" if best > sum(epochs) / len(epochs) else "left",
                    fontsize=8.5,
                )
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
            axes.margins(y=0.22)
            axes.set(xlabel="epoch", ylabel=ylabel)

        alt = f"{title}: {', '.join(f'{value:.4f}' for value in values)}."
        return Chart(title, inline(f"training_{key}", alt, paint, (4.7, 2.7)), caption)

    return (
        chart("loss", "Loss on the training days", "loss per event", "The mean over the labelled training events."),
        chart(
            "validation_average_precision",
            "Average precision on the validation days",
            "average precision",
            "Ringed: the epoch whose weights were kept. The figure flatters, because it was the one that chose.",
        ),
    )


def _importance(importance: Importance) -> Chart:
    figures = importance.figures[::-1]  # the first bar is drawn at the bottom

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        names = [str(f.input) for f in figures]
        error = {"ecolor": INK, "elinewidth": 1.2}
        axes.barh(
            names, [f.mean for f in figures], 0.6, xerr=[f.deviation for f in figures], color=MODEL, error_kw=error
        )
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set(xlabel="fall of the average precision")

    alt = f"Fall of the average precision by permuted input: {', '.join(f'{f.input} {f.mean:.4f}' for f in figures[::-1])}."
    caption = (
        f"How far the average precision on the validation days, {decimal(importance.average_precision)}, falls when the "
        "values of one input are shuffled among their rows. Lines: one standard deviation over the repeats."
    )
    size = (SMALL[0], 0.9 + 0.27 * len(figures))
    return Chart("Permutation importance", inline("importance", alt, paint, size), caption)


def _timeline(content: ReportContent, number: int, miss: Miss) -> Chart:
    """The probabilities and amounts of a user's events around a missed fraud, in order."""
    events = miss.events
    known = [(i, event.probability) for i, event in enumerate(events) if event.probability is not None]
    odds = log_odds(np.array([p for _, p in known]))
    cut = float(log_odds(np.array(min(content.thresholds.is_fraud, 1.0))))
    low, high = min(odds.min(), cut) - 0.8, max(odds.max(), cut) + 0.8
    amounts = [event.amount for event in events]
    has_amounts = any(amount is not None for amount in amounts)

    def paint(figure: Figure) -> None:
        heights = [3, 2] if has_amounts else [1]
        rows = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        axes = rows[0][0]
        axes.axvspan(miss.at - 0.5, miss.at + 0.5, color=FRAUD, alpha=0.12, linewidth=0)
        axes.axhline(cut, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.plot([i for i, _ in known], odds, color=LINE, linewidth=1, zorder=1)
        looks = {
            0: ("honest", {"marker": "o", "color": HONEST}),
            1: ("fraud", {"marker": "D", "color": FRAUD}),
            -1: ("label not known", {"marker": "x", "color": MUTED}),
        }
        for label, (name, look) in looks.items():
            at = [k for k, (i, _) in enumerate(known) if events[i].label == label]
            if at:
                axes.plot([known[k][0] for k in at], odds[at], linestyle="none", markersize=5, label=name, **look)
        axes.set(ylim=(low, high), ylabel="probability")
        log_odds_ticks(axes.yaxis, low, high)
        axes.legend(**ABOVE, ncols=3)
        if has_amounts:
            below = rows[1][0]
            below.axvspan(miss.at - 0.5, miss.at + 0.5, color=FRAUD, alpha=0.12, linewidth=0)
            colours = [{1: FRAUD, 0: HONEST}.get(event.label, MUTED) for event in events]
            below.bar(range(len(events)), [amount or 0 for amount in amounts], width=0.55, color=colours)
            below.set_ylabel("amount")
            below.yaxis.set_major_locator(MaxNLocator(3))
            below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        last = rows[-1][0]
        last.set_xticks(range(len(events)), [gap_text(event.gap).replace(" ", "\n") for event in events], fontsize=7.5)
        last.set_xlabel("time since the event before")
        last.grid(visible=False, axis="x")
        last.set_xlim(-0.7, len(events) - 0.3)

    alt = f"Probabilities and amounts of {miss.user} around the missed fraud; the table below has the figures."
    return Chart(miss.user, inline(f"timeline_{number}", alt, paint, (8.2, 3.3 if has_amounts else 2.4)), "", wide=True)
