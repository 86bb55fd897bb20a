"""What a report shows, as data: the content of a run, and the figures that are worked out from it.

`report_content` takes what a training has at its end; `assess` works out everything that needs arithmetic: the table
of models with intervals, curves over alert budgets, calibration, segments. `training.report` puts it into words, charts
and a page.

N are the test rows, M all encoded rows, D days. Identifiers of users, merchants, devices and networks become codes
here; none of them reaches the content.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from seqfraud.canonical import canonical_text
from seqfraud.config import Config
from seqfraud.errors import RunError
from seqfraud.metrics import (
    DAY_MS,
    CalibrationBin,
    Interval,
    PairedDifference,
    average_precision,
    bootstrap_interval,
    calibration_bins,
    measure_quality,
    paired_bootstrap,
    roc_auc,
    wilson,
)
from seqfraud.policy import Policy, Thresholds
from seqfraud.schema import Schema
from seqfraud.table import MISSING, Coded, Transactions
from training.importance import Importance
from training.prepare import Prepared

Floats = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]

GRU = "GRU"
TOP = 0.01
"""The share of rows in which decisions fall; calibration is looked at there too."""
TOP_VALUES = 8
"""Values of a category that get a row of their own."""
AMOUNT_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
HISTORY_BANDS = (0, 1, 5, 20, 100, 500)
"""Least number of earlier events in each band."""
MISSES = 5
DEAREST_MISSES = 3
"""So many of the misses are those with the highest amounts; the others those with the lowest scores."""
EVENTS_BEFORE = 15
EVENTS_AFTER = 4
BOOTSTRAP_ROWS = 100_000_000
"""Rows times rounds of one bootstrap: 200 rounds up to half a million rows, fewer beyond, never under 50."""
EARTH_KM = 6371.0
LONGEST_TEXT = 40


# --- The content ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredModel:
    """A model's scores float64 [N] of the test rows; probabilities, or for some models only a ranking."""

    name: str
    probability: Floats
    note: str = ""

    @property
    def is_probability(self) -> bool:
        """Whether every score lies in 0..1; otherwise only ranking figures are defined."""
        return bool(((self.probability >= 0) & (self.probability <= 1)).all())


@dataclass(frozen=True)
class HeldOut:
    """The N test rows.

    Attributes:
        label: int8 [N], 1 fraud, 0 honest.
        time: int64 [N], milliseconds since the epoch.
        user: codes [N].
        amount: float64 [N], NaN where missing; None where no amount is declared.
        history: int64 [N], events of the user before this one.
        categories: columns by which figures are broken down.
    """

    label: Labels
    time: Int64
    user: npt.NDArray[np.int32]
    amount: Floats | None
    history: Int64
    categories: Mapping[str, Coded] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def fraud(self) -> Mask:
        """Mask [N]."""
        fraud: Mask = self.label == 1
        return fraud

    @property
    def day(self) -> Int64:
        """UTC days since the epoch [N]."""
        return self.time // DAY_MS

    def money(self) -> Floats | None:
        """Amounts [N], 0 where missing or negative; None where no amount is declared."""
        return None if self.amount is None else np.maximum(np.nan_to_num(self.amount), 0.0)


@dataclass(frozen=True)
class Event:
    """A transaction in a timeline.

    Attributes:
        time: ms since the epoch.
        gap: ms since the user's event before it; None for the user's first.
        texts: categories as they are, entities as numbers in the order in which they appear.
        distance: km since the user's event before it; None where unknown.
        probability: None for events later than the test.
        label: 1 fraud, 0 honest, -1 unknown.
    """

    time: int
    gap: int | None
    amount: float | None
    texts: tuple[str, ...]
    distance: float | None
    probability: float | None
    label: int


@dataclass(frozen=True)
class Miss:
    """A fraud below the threshold, and the user's events around it; `events[at]` is the fraud."""

    user: str
    transaction: str
    why: str
    history: int
    columns: tuple[str, ...]
    events: tuple[Event, ...]
    at: int


@dataclass(frozen=True)
class ReportContent:
    """Everything that a report shows.

    Attributes:
        metrics: what `training.run.train_run` returns.
        split: ISO times by name.
        epochs: one dict per epoch: epoch, loss, validation_average_precision.
        cleaning: what `seqfraud.cleaning.clean` returns.
        models: the GRU first, then the baselines, which may be none.
        policy: what decides.
        validation_label, validation_probability, validation_amount: int8 and float64 of the validation rows.
        notes: what the reader has to know about how the report came about.
        importance: what the model uses, where that was measured.
    """

    title: str
    config: Config
    config_text: str
    command: tuple[str, ...]
    split: Mapping[str, str]
    metrics: Mapping[str, Any]
    epochs: tuple[Mapping[str, Any], ...]
    cleaning: Mapping[str, Any]
    held_out: HeldOut
    models: tuple[ScoredModel, ...]
    policy: Policy
    validation_label: Labels
    validation_probability: Floats
    validation_amount: Floats | None = None
    misses: tuple[Miss, ...] = ()
    notes: tuple[str, ...] = ()
    importance: Importance | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def thresholds(self) -> Thresholds:
        """Those of the policy."""
        return self.policy.thresholds


@dataclass(frozen=True)
class Baselines:
    """What `seqfraud baselines` left in a run folder; R rows.

    Attributes:
        ids: texts [R], or int64 [R].
        scores: float64 [R] by model.
        details: figures and settings by model.
    """

    ids: list[str] | Int64
    scores: Mapping[str, Floats]
    details: Mapping[str, Mapping[str, Any]]


def read_baselines(run: Path) -> Baselines | None:
    """The baselines' scores of a run folder; None where there are none. Raises RunError."""
    path, described = run / "test_scores.parquet", run / "baselines.json"
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        raw = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
        ids = table.column("transaction_id")
        whole = ids.null_count == 0 and str(ids.type).startswith(("int", "uint"))
        return Baselines(
            ids=ids.to_numpy().astype(np.int64) if whole else [canonical_text(value) for value in ids.to_pylist()],
            scores={
                name: np.asarray(table.column(name).to_numpy(), dtype=np.float64)
                for name in table.column_names
                if str(table.schema.field(name).type) in ("double", "float")
            },
            details=raw.get("models", raw),
        )
    except (KeyError, OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: cannot be read as scores of the test rows: {error}") from error


def report_content(
    prepared: Prepared,
    probability: Floats,
    metrics: Mapping[str, Any],
    policy: Policy,
    *,
    title: str,
    config_text: str,
    command: Sequence[str] = (),
    baselines: Baselines | None = None,
    importance: Importance | None = None,
    versions: Mapping[str, str] | None = None,
) -> ReportContent:
    """The content of a report from what a training or an evaluation has at its end.

    Args:
        prepared: the data, split and encoded.
        probability: float64 [M], calibrated, of the encoded rows; NaN later than the test.
        metrics: what `train_run` returns; "epochs" may be missing.
        policy: what decides.
        title: what the report calls the run.
        config_text: the TOML as used.
        command: lines that make this report again.
        baselines: scores of other models; those that do not cover the test rows are left out with a note.
        importance: of the model's inputs.
        versions: of what made the model.
    """
    table, encoded = prepared.table, prepared.encoded
    test, validation = np.flatnonzero(prepared.rows.test), np.flatnonzero(prepared.rows.validation)
    arrival = encoded.arrival[test]
    amount = table.amount()
    held_out = HeldOut(
        label=prepared.label[test],
        time=encoded.time[test],
        user=table.user.codes[arrival],
        amount=None if amount is None else amount[arrival],
        history=_events_before(prepared)[test],
        categories={column: table.text(column).take(arrival) for column in _shown_categories(prepared.schema)},
    )
    others, notes = _matched(baselines, table, arrival) if baselines is not None and len(test) else ((), ())
    return ReportContent(
        title=title,
        config=prepared.config,
        config_text=config_text,
        command=tuple(command),
        split=prepared.split.as_dict(),
        metrics=metrics,
        epochs=tuple(metrics.get("epochs", ())),
        cleaning=_without_identifiers(prepared.cleaning, {prepared.schema.user, *prepared.schema.entities}),
        held_out=held_out,
        models=(ScoredModel(GRU, probability[test]), *others),
        policy=policy,
        validation_label=prepared.label[validation],
        validation_probability=probability[validation],
        validation_amount=None if amount is None else amount[encoded.arrival[validation]],
        misses=_worst_misses(prepared, probability, policy.thresholds),
        notes=notes,
        importance=importance,
        versions=dict(versions or {}),
    )


def _shown_categories(schema: Schema) -> list[str]:
    """Categories whose values may be shown; a user who is a category too stays unnamed."""
    return [column for column in schema.categorical if column != schema.user]


def _events_before(prepared: Prepared) -> Int64:
    """int64 [M]: events of the user before each encoded row."""
    lengths = prepared.encoded.lengths()
    before: Int64 = np.arange(len(prepared.encoded)) - np.repeat(prepared.encoded.begin, lengths)
    return before


def _matched(
    baselines: Baselines, table: Transactions, arrival: Int64
) -> tuple[tuple[ScoredModel, ...], tuple[str, ...]]:
    """The baselines' scores in the order of the test rows, and notes on those that do not cover them."""
    place = _places(baselines, table, arrival)
    if place is None:
        return (), ("The run folder's baselines scored other rows and are left out: run seqfraud baselines again.",)
    models, notes = [], []
    for name, scores in baselines.scores.items():
        mine = scores[place]
        if np.isnan(mine).any():
            notes.append(f"The baseline {name} has test rows without a score and is left out.")
        else:
            models.append(ScoredModel(name.replace("_", " "), mine, _note(baselines.details.get(name))))
    return tuple(models), tuple(notes)


def _places(baselines: Baselines, table: Transactions, arrival: Int64) -> Int64 | None:
    """Where each test row [N] is among the baselines' rows; None where one is not there."""
    if isinstance(baselines.ids, np.ndarray) and isinstance(table.ids, np.ndarray):
        order = np.argsort(baselines.ids, kind="stable")
        wanted = table.ids[arrival]
        at = np.searchsorted(baselines.ids[order], wanted)
        found = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(0, dtype=np.int64)
        return found if len(order) and bool((baselines.ids[found] == wanted).all()) else None
    place = {text: i for i, text in enumerate(map(str, baselines.ids))}
    rows = [place.get(text, -1) for text in table.take(arrival).id_texts()]
    return None if -1 in rows else np.array(rows, dtype=np.int64)


def _note(details: Mapping[str, Any] | None) -> str:
    """Settings and training time of a baseline, in one line."""
    if not isinstance(details, Mapping):
        return ""
    parts = [f"{key} {value}" for key, value in (details.get("parameters") or {}).items()]
    if isinstance(details.get("seconds"), int | float):
        parts.append(f"fitted in {details['seconds']:.0f} s")
    return ", ".join(parts)


def _without_identifiers(cleaning: Mapping[str, Any], private: set[str]) -> dict[str, Any]:
    """The cleaning report without examples from columns that hold identifiers."""
    findings = [{**f, "examples": [] if f["column"] in private else f["examples"]} for f in cleaning["findings"]]
    return {**cleaning, "findings": findings}


# --- The worst misses -----------------------------------------------------------------------------


def _worst_misses(prepared: Prepared, probability: Floats, thresholds: Thresholds) -> tuple[Miss, ...]:
    """Missed test frauds of different users: those with the highest amounts, then those with the lowest scores."""
    encoded, table = prepared.encoded, prepared.table
    missed = np.flatnonzero(prepared.rows.test & (prepared.label == 1) & (probability < thresholds.is_fraud))
    owner = np.repeat(np.arange(len(encoded.begin)), encoded.lengths())
    amount = table.amount()
    chosen: list[tuple[int, str]] = []
    users: set[int] = set()

    def choose(rows: Int64, why: str, until: int) -> None:
        for row in rows.tolist():
            if len(chosen) >= until:
                return
            if int(owner[row]) not in users:
                users.add(int(owner[row]))
                chosen.append((row, why))

    if amount is not None:
        lost = np.nan_to_num(amount[encoded.arrival[missed]])
        choose(missed[np.argsort(-lost, kind="stable")], "among the highest amounts missed", DEAREST_MISSES)
    choose(missed[np.argsort(probability[missed], kind="stable")], "among the lowest scores of a fraud", MISSES)
    return tuple(
        _miss(prepared, probability, row, f"User {chr(ord('A') + i)}", why) for i, (row, why) in enumerate(chosen)
    )


def _miss(prepared: Prepared, probability: Floats, row: int, user: str, why: str) -> Miss:
    encoded, table, schema = prepared.encoded, prepared.table, prepared.schema
    u = int(np.searchsorted(encoded.begin, row, side="right")) - 1
    begin, end = int(encoded.begin[u]), int(encoded.end[u])
    rows = np.arange(max(begin, row - EVENTS_BEFORE), min(end, row + EVENTS_AFTER + 1))
    part = table.take(encoded.arrival[rows])
    categories = _shown_categories(schema)
    entities = [c for c in schema.entities if c not in schema.categorical]
    texts = [_short(part.text(column).texts()) for column in categories]
    networks = dict(zip(schema.entities, part.entities(), strict=True))
    texts += [_numbered(networks[column].codes) for column in entities]
    amount = part.amount()
    distance = _distances(part)
    events = []
    for i, r in enumerate(rows.tolist()):
        events.append(
            Event(
                time=int(encoded.time[r]),
                gap=None if r == begin else int(encoded.time[r] - encoded.time[r - 1]),
                amount=None if amount is None or math.isnan(amount[i]) else float(amount[i]),
                texts=tuple(column[i] for column in texts),
                distance=distance[i],
                probability=None if math.isnan(probability[r]) else float(probability[r]),
                label=int(prepared.label[r]),
            )
        )
    at = int(row - rows[0])
    names = (*categories, *entities)
    return Miss(user, part.take(np.array([at])).id_texts()[0], why, row - begin, names, tuple(events), at)


def _short(texts: Sequence[str | None]) -> list[str]:
    shown = ["–" if text is None else text for text in texts]
    return [text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…" for text in shown]


def _numbered(codes: npt.NDArray[np.int32]) -> list[str]:
    """Entities as numbers in the order in which they appear, so that a repeated one is seen and none is named."""
    numbers: dict[int, int] = {}
    return ["–" if c == MISSING else f"#{numbers.setdefault(c, len(numbers) + 1)}" for c in codes.tolist()]


def _distances(part: Transactions) -> list[float | None]:
    """Kilometres between neighbouring rows by the first declared place; None for the first and where unknown."""
    if not part.schema.geo or len(part) == 0:
        return [None] * len(part)
    columns = [part.numbers[:, part.schema.numbers.index(name)] for name in part.schema.geo[0]]
    lat, long = (np.radians(column) for column in columns)
    half = np.sin(np.diff(lat) / 2) ** 2 + np.cos(lat[1:]) * np.cos(lat[:-1]) * np.sin(np.diff(long) / 2) ** 2
    km = 2 * EARTH_KM * np.arcsin(np.sqrt(np.clip(half, 0, 1)))
    return [None, *(None if math.isnan(value) else value for value in km.tolist())]


# --- What is worked out ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Between:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ModelRow:
    """A line of the table of models.

    Attributes:
        figures: test figures by the names of `seqfraud.metrics.Quality`; None where not defined.
        interval: of the average precision, by user.
        difference: of the average precision, the GRU's less this model's, on the same draws.
    """

    model: ScoredModel
    figures: Mapping[str, Any]
    interval: Interval | None
    difference: PairedDifference | None


@dataclass(frozen=True)
class BudgetCurve:
    """What alert budgets [B] bring, means over days [B]; `caught` is of money, or of frauds without amounts."""

    budgets: Int64
    caught: Floats
    precision: Floats


@dataclass(frozen=True)
class Bin:
    """A bin of the calibration with its binomial 95 % interval."""

    bin: CalibrationBin
    low: float
    high: float


@dataclass(frozen=True)
class Segment:
    """Figures of some test rows; `said` is their mean probability. Figures that they do not define are None."""

    name: str
    rows: int
    frauds: int
    average_precision: float | None
    roc_auc: float | None
    recall: Between | None
    precision: float | None
    said: float | None


@dataclass(frozen=True)
class Segmentation:
    """The test rows divided by one property."""

    name: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Assessment:
    """Everything that is worked out of a content; what the test rows do not define is None or empty."""

    rows: tuple[ModelRow, ...]
    rounds: int
    curves: tuple[BudgetCurve, ...]
    precision_at_budget: Between | None
    money_caught: Between | None
    recall: Between | None
    precision: Between | None
    calibration: tuple[Bin, ...]
    calibration_top: tuple[Bin, ...]
    segmentations: tuple[Segmentation, ...]


def assess(content: ReportContent) -> Assessment:
    """Work out every figure of a report. The same content gives the same figures."""
    held = content.held_out
    rounds = max(50, min(200, BOOTSTRAP_ROWS // max(len(held), 1)))
    rows = _model_rows(content, rounds)
    precision_daily = money_daily = recall = precision = None
    curves: tuple[BudgetCurve, ...] = ()
    bins: tuple[Bin, ...] = ()
    top: tuple[Bin, ...] = ()
    if len(held):
        score = content.models[0].probability
        figures = rows[0].figures
        ranked = _DailyRanking(held, score)
        budget = _budget(figures, ranked)
        precision_daily = _agreeing(_over_days(ranked.precision(budget)), figures["precision_at_budget"])
        if held.amount is not None:
            money_daily = _agreeing(_over_days(ranked.caught(budget)), figures["money_caught"])
        flagged = score >= content.thresholds.is_fraud
        recall = _by_user(flagged & held.fraud, held.fraud, held.user)
        precision = _by_user(flagged & held.fraud, flagged, held.user)
        shown = _shown_budgets(ranked.rows_per_day, figures.get("alerts_per_day"))
        curves = tuple(_budget_curve(_DailyRanking(held, m.probability), shown) for m in content.models)
        bins = bins_with_intervals(held.label, score)
        top = bins_with_intervals(held.label, score, top=TOP)
    return Assessment(
        rows=rows,
        rounds=rounds,
        curves=curves,
        precision_at_budget=precision_daily,
        money_caught=money_daily,
        recall=recall,
        precision=precision,
        calibration=bins,
        calibration_top=top,
        segmentations=_segmentations(content) if len(held) else (),
    )


def bins_with_intervals(label: Labels, probability: Floats, top: float | None = None) -> tuple[Bin, ...]:
    """Equal-mass bins of the calibration, overall or inside the top share, each with its binomial interval."""
    bins = calibration_bins(label, probability, bins=10, top=top)
    return tuple(Bin(b, *wilson(round(b.observed_rate * b.count), b.count)) for b in bins)


def _model_rows(content: ReportContent, rounds: int) -> tuple[ModelRow, ...]:
    held, models = content.held_out, content.models
    if not len(held):
        return ()
    gru = models[0]
    rows = []
    for model in models:
        figures = content.metrics["test"] if model is gru else _figures(content, model)
        interval = bootstrap_interval("average_precision", held.label, model.probability, held.user, rounds=rounds)
        difference = None
        if model is not gru:
            difference = paired_bootstrap(
                "average_precision", held.label, gru.probability, model.probability, held.user, rounds=rounds
            )
        rows.append(ModelRow(model, figures, interval, difference))
    return tuple(rows)


def _figures(content: ReportContent, model: ScoredModel) -> dict[str, Any]:
    """A baseline's figures on the test rows, under the alert budget of the GRU's."""
    held, gru = content.held_out, content.metrics["test"]
    score = model.probability
    if not model.is_probability:
        # any increasing map into 0..1 leaves the ranking figures as they are
        distinct, rank = np.unique(score, return_inverse=True)
        score = rank / max(len(distinct), 2)
    money = held.money()
    budget = {name: gru.get(name) for name in ("alerts_per_day", "alert_share")}
    figures = measure_quality(held.label, score, user=held.user, time_ms=held.time, amount=money, **budget).as_dict()
    if not model.is_probability:
        figures.update(dict.fromkeys(("brier", "log_loss", "calibration_slope", "calibration_intercept")))
    return figures


class _DailyRanking:
    """The test rows sorted once by day and descending score, so that any alert budget is a look-up.

    Within equal scores each row counts as the mean of its tie, which is what `seqfraud.metrics.money_caught` and
    `precision_at_budget` do: the tests compare.
    """

    rows_per_day: Int64
    """[D]"""

    def __init__(self, held: HeldOut, score: Floats) -> None:
        day = held.day
        order = np.lexsort((-score, day))
        ranked, ranked_day = score[order], day[order]
        first_of_day = np.r_[True, ranked_day[1:] != ranked_day[:-1]]
        tie = np.cumsum(first_of_day | np.r_[True, ranked[1:] != ranked[:-1]]) - 1
        size = np.bincount(tie)
        fraud = held.fraud[order].astype(np.float64)
        money = held.money()
        lost = fraud if money is None else fraud * money[order]
        self._first = np.flatnonzero(first_of_day)
        self.rows_per_day = np.diff(np.r_[self._first, len(order)])
        self._frauds = np.r_[0.0, np.cumsum((np.bincount(tie, weights=fraud) / size)[tie])]
        self._lost = np.r_[0.0, np.cumsum((np.bincount(tie, weights=lost) / size)[tie])]

    def _until(self, total: Floats, count: Int64) -> Floats:
        until: Floats = total[self._first + count] - total[self._first]
        return until

    def precision(self, budget: Int64) -> Floats:
        """Share of frauds among each day's alerts [D] under budgets [D]."""
        alerts = np.minimum(budget, self.rows_per_day)
        return self._until(self._frauds, alerts) / alerts

    def caught(self, budget: Int64) -> Floats:
        """Share of the fraud money (of the frauds, without amounts) in each day's alerts, for the days with some."""
        whole = self._until(self._lost, self.rows_per_day)
        some = whole > 1e-9
        return self._until(self._lost, np.minimum(budget, self.rows_per_day))[some] / whole[some]


def _budget(figures: Mapping[str, Any], ranked: _DailyRanking) -> Int64:
    """Alerts of each day [D] under the budget of the figures."""
    if figures.get("alerts_per_day") is not None:
        return np.full(len(ranked.rows_per_day), int(figures["alerts_per_day"]))
    share = float(figures.get("alert_share") or TOP)
    alerts: Int64 = np.maximum(1, np.rint(share * ranked.rows_per_day)).astype(np.int64)
    return alerts


def _shown_budgets(rows_per_day: Int64, marked: int | None) -> Int64:
    """Budgets from one alert a day to a fifth of a day's rows, evenly on a log scale, and the marked one."""
    most = int(rows_per_day.max())
    end = min(most, max(10 * (marked or 10), most // 5))
    budgets: Int64 = np.unique(np.r_[np.rint(np.geomspace(1, end, 40)), min(marked or 1, most)]).astype(np.int64)
    return budgets


def _budget_curve(ranked: _DailyRanking, budgets: Int64) -> BudgetCurve:
    days = np.ones(len(ranked.rows_per_day), dtype=np.int64)
    caught = [ranked.caught(b * days) for b in budgets]
    return BudgetCurve(
        budgets,
        np.array([part.mean() if len(part) else np.nan for part in caught]),
        np.array([ranked.precision(b * days).mean() for b in budgets]),
    )


def _resampled(part: Floats, whole: Floats) -> Between | None:
    """sum(part) / sum(whole) over G groups and its percentile interval when the groups are drawn anew."""
    if not whole.sum() > 0:
        return None
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        weight = np.bincount(rng.integers(0, len(whole), len(whole)), minlength=len(whole))
        total = (weight * whole).sum()
        if total > 0:
            shares.append((weight * part).sum() / total)
    low, high = np.quantile(shares, [0.025, 0.975])
    return Between(float(part.sum() / whole.sum()), float(low), float(high))


def _over_days(shares: Floats) -> Between | None:
    """The mean of daily shares and its interval over days."""
    return _resampled(shares, np.ones(len(shares)))


def _agreeing(between: Between | None, figure: float | None) -> Between | None:
    """The same with the figure as `metrics.json` has it, which sums in another order."""
    return None if between is None or figure is None else Between(figure, between.low, between.high)


def _by_user(part: Mask, whole: Mask, user: npt.NDArray[np.int32]) -> Between | None:
    """Share of `part` in `whole`, masks [N], and its interval by user."""
    # users without such a row change nothing but the number of draws
    code = np.unique(user[whole], return_inverse=True)[1]
    count = int(code.max(initial=-1)) + 1
    hits: Floats = np.bincount(code, weights=part[whole].astype(np.float64), minlength=count).astype(np.float64)
    return _resampled(hits, np.bincount(code, minlength=count).astype(np.float64))


# --- Segments -------------------------------------------------------------------------------------


def _segmentations(content: ReportContent) -> tuple[Segmentation, ...]:
    held = content.held_out
    parts: list[tuple[str, list[tuple[str, Mask]]]] = []
    if held.amount is not None:
        parts.append((_named("Amount", content.config.data.amount or ""), amount_bands(held.amount)))
    parts.append(("Events of the user before", history_bands(held.history)))
    parts.extend((_named("Category", column), top_values(coded)) for column, coded in held.categories.items())
    return tuple(
        Segmentation(name, tuple(_segment(content, label, mask) for label, mask in masks if mask.any()))
        for name, masks in parts
    )


def _named(what: str, column: str) -> str:
    """A property and its column, once where the column is called so."""
    return what if column.lower() in ("", what.lower()) else f"{what} {column}"


def amount_bands(amount: Floats) -> list[tuple[str, Mask]]:
    """Masks [N] of bands between quantiles; closed at the lower end, the last one at both."""
    known = amount[~np.isnan(amount)]
    bands: list[tuple[str, Mask]] = []
    if len(known):
        edges = np.unique(np.quantile(known, AMOUNT_QUANTILES))
        if len(edges) == 1:
            bands.append((money_text(edges[0]), amount == edges[0]))
        for i, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            last = i == len(edges) - 2
            mask = (amount >= low) & ((amount <= high) if last else (amount < high))
            text = f"{money_text(low)} and more" if last and i else f"{money_text(low)} to {money_text(high)}"
            bands.append((text, mask))
    bands.append(("missing", np.isnan(amount)))
    return bands


def history_bands(history: Int64) -> list[tuple[str, Mask]]:
    """Masks [N] by the number of the user's earlier events."""
    bands = []
    for low, after in zip(HISTORY_BANDS, (*HISTORY_BANDS[1:], None), strict=True):
        mask = history >= low
        if after is None:
            bands.append((f"{low:,} and more", mask))
        else:
            text = str(low) if after == low + 1 else f"{low:,} to {after - 1:,}"
            bands.append((text, mask & (history < after)))
    return bands


def top_values(coded: Coded) -> list[tuple[str, Mask]]:
    """Masks [N] of the most frequent values, of all others and of the missing."""
    count = np.bincount(coded.codes[coded.codes != MISSING], minlength=len(coded.values))
    top = [c for c in np.argsort(-count, kind="stable")[:TOP_VALUES].tolist() if count[c]]
    rest = ~np.isin(coded.codes, [*top, MISSING])
    names = _short([coded.values[c] for c in top])
    parts = [(name, coded.codes == c) for name, c in zip(names, top, strict=True)]
    others = int((count > 0).sum()) - len(top)
    return [*parts, (f"{others:,} other values", rest), ("missing", coded.codes == MISSING)]


def _segment(content: ReportContent, name: str, mask: Mask) -> Segment:
    score = content.models[0].probability[mask]
    label = content.held_out.label[mask]
    fraud = label == 1
    flagged = score >= content.thresholds.is_fraud
    frauds = int(fraud.sum())
    hits = int((flagged & fraud).sum())
    return Segment(
        name=name,
        rows=len(label),
        frauds=frauds,
        average_precision=average_precision(label, score),
        roc_auc=roc_auc(label, score),
        recall=Between(hits / frauds, *wilson(hits, frauds)) if frauds else None,
        precision=hits / int(flagged.sum()) if flagged.any() else None,
        said=float(score.mean()) if len(score) else None,
    )


def money_text(value: float | None) -> str:
    """An amount in the data's currency."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.2f}"
