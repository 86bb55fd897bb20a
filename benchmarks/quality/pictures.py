"""What the model sees, drawn: a few customers and terminals of a fold as static SVG files.

    python -m benchmarks.quality.pictures [--setting week|all] [--fold 2018-07-25] [--seed 0]

Fits the GRU on the fold, writes docs/quality/*.svg and benchmarks/results/handbook_pictures.json, which says what each file
shows and by which rule it was chosen. `--fold 2018-07-04` is the week that settings were chosen on.

Nothing is picked by hand. Customers: those with no fraud, with one and with three or more among their test rows; of each
group the one with the median number of transactions in the time shown (the lower one of two). Terminals: those with three or more frauds in the
test days, by the time of the first fraud that is shown; those at a tenth, a half and nine tenths of that order.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter, DayLocator
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from benchmarks.processes import ROOT, write_result
from benchmarks.quality.fitting import FittedGru, fit_gru
from benchmarks.quality.handbook import FOLDS, VALIDATION_FOLD, Fold, read_fold
from benchmarks.quality.results import HANDBOOK_PICTURES, HandbookPictures, Picture
from seqfraud.config import DAY_MS
from seqfraud.files import replaced_file
from seqfraud.nn.model import LOG_PRECISION, Forecast, SequenceModel
from training.charts import CARD, FRAUD, HONEST, INK, LINE, MODEL, MUTED, OTHERS, log_odds, log_odds_ticks, standalone
from training.loop import DeviceData, walk
from training.prepare import Prepared

FOLDER = ROOT / "docs" / "quality"
DAYS = 60
"""The days before the end of the test that are shown."""
FRAUDS = 3
"""The frauds in the test days that make a terminal, or a customer of the last group, worth a picture."""
PLACES = (0.1, 0.5, 0.9)
"""Where in the order of terminals the three are."""
SPREADS = 2.0
"""Half the width of the forecast's band."""
LEAST_RANGE = (0.001, 0.999)
"""Probabilities that every picture's axis reaches to, so that pictures can be compared."""
WIDTH = 8.6
"""Inches."""

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Periods:
    """When what was known, in ms: labels of transactions from `learned_from` to `learned_until` were learned from."""

    since: int
    learned_from: int
    learned_until: int
    test_start: int
    test_end: int


@dataclass(frozen=True)
class Events:
    """The N transactions of a customer or a terminal in the time shown, in order.

    Attributes:
        time: int64 [N] ms.
        amount, probability: float64 [N].
        fraud: bool [N].
        known_at: int64 [N] ms, when the label became known.
        run: float64 [N, 4], what the terminal's context read: age of the run (days), its length, days since the last
            known fraud and the last known honest transaction; -1 where there is none.
    """

    time: Int64
    amount: Float64
    probability: Float64
    fraud: Mask
    known_at: Int64
    run: Float64

    def __len__(self) -> int:
        return len(self.time)

    @property
    def after_known_fraud(self) -> Mask:
        """bool [N]: the newest known transaction of the terminal was a fraud when this one was scored."""
        mask: Mask = (self.run[:, 2] >= 0) & ((self.run[:, 3] < 0) | (self.run[:, 2] < self.run[:, 3]))
        return mask


def periods(prepared: Prepared) -> Periods:
    """The stretches of the time shown."""
    split = prepared.split
    since = split.test_end - DAYS * DAY_MS
    return Periods(since, max(since, split.train_start), split.train_end, split.test_start, split.test_end)


def terminals_of(prepared: Prepared) -> npt.NDArray[np.int32]:
    """int32 [N]: the code of the first context column's value, over encoded rows."""
    return prepared.table.entities()[0].codes[prepared.encoded.arrival]


def events_of(fold: Fold, fitted: FittedGru, rows: Int64) -> Events:
    """The transactions in some encoded rows, in order of arrival."""
    prepared = fold.prepared
    rows = rows[np.argsort(prepared.encoded.arrival[rows])]
    arrival = prepared.encoded.arrival[rows]
    amount, known_at = prepared.table.amount(), prepared.table.known_at
    assert amount is not None
    time = prepared.encoded.time[rows]
    logit = torch.from_numpy(fitted.logit[rows]).to(fitted.model.scale.device)
    probability = fitted.model.calibrated(logit).double().cpu().numpy()
    run = prepared.context.numbers_of(0).start + prepared.context.places(0)["run"].start
    return Events(
        time=time,
        amount=amount[arrival],
        probability=probability,
        fraud=prepared.label[rows] == 1,
        known_at=time + prepared.context.label_delay if known_at is None else known_at[arrival],
        run=prepared.encoded.context[rows, run : run + 4].astype(np.float64),
    )


# --- Who is shown ---------------------------------------------------------------------------------


def shown_rows(prepared: Prepared) -> Mask:
    """bool [N], encoded rows in the time shown."""
    when = periods(prepared)
    mask: Mask = (prepared.encoded.time >= when.since) & (prepared.encoded.time < when.test_end)
    return mask


def choose_customers(fold: Fold) -> list[tuple[int, str]]:
    """Users by number and the rule that each was chosen by; a group without anybody gives nobody."""
    users = len(fold.prepared.encoded.begin)
    frauds = np.bincount(fold.user[fold.test & (fold.prepared.label == 1)], minlength=users)
    tested = np.bincount(fold.user[fold.test], minlength=users) > 0
    shown = np.bincount(fold.user[shown_rows(fold.prepared)], minlength=users)
    groups = (
        ("without a fraud", tested & (frauds == 0)),
        ("with one fraud", frauds == 1),
        (f"with {FRAUDS} frauds or more", frauds >= FRAUDS),
    )
    out = []
    for name, mask in groups:
        group = np.flatnonzero(mask)
        if len(group):
            order = group[np.argsort(shown[group], kind="stable")]
            rule = (
                f"of the customers {name} among their test rows, the one with the median number of transactions shown"
            )
            out.append((int(order[(len(order) - 1) // 2]), rule))
    return out


def choose_terminals(fold: Fold) -> list[tuple[int, str]]:
    """Terminals by code and the rule that each was chosen by."""
    prepared = fold.prepared
    terminal = terminals_of(prepared)
    count = int(terminal.max(initial=-1)) + 1
    fraud = shown_rows(prepared) & (prepared.label == 1) & (terminal >= 0)
    first = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(first, terminal[fraud], prepared.encoded.time[fraud])
    tested = fraud & (prepared.encoded.time >= prepared.split.test_start)
    group = np.flatnonzero(np.bincount(terminal[tested], minlength=count) >= FRAUDS)
    order = group[np.argsort(first[group], kind="stable")]
    rule = f"of the terminals with {FRAUDS} frauds or more in the test days, by the first fraud shown, the one at {{}} of the order"
    places = {round(place * (len(order) - 1)): place for place in PLACES} if len(order) else {}
    return [(int(order[at]), rule.format(f"{place:g}")) for at, place in places.items()]


# --- What the state forecast ------------------------------------------------------------------------


def forecast_bands(model: SequenceModel, prepared: Prepared, user: int) -> tuple[Float64, Float64]:
    """float64 [T] each: the lower and upper end of the amount's band before each of a user's events, in its currency.

    The forecast is of the standardised signed logarithm: a normal distribution of the mean and the precision that the
    state before the event gives. The band is two spreads to both sides, taken back to amounts.
    """
    forecast = model.networks[0].forecast
    assert isinstance(forecast, Forecast)
    assert prepared.schema.amount is not None
    column = prepared.schema.numeric_inputs.index(prepared.schema.amount)
    said: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Tensor) -> None:
        said.append(out[0].detach().double().cpu())

    hook = forecast.linear.register_forward_hook(keep)
    model.eval()
    device = next(model.parameters()).device
    events = prepared.config.training.events_per_chunk
    users = np.array([user])
    try:
        with torch.no_grad():
            for _ in walk(
                model, DeviceData(prepared.encoded, device), prepared.encoded, users, events, lambda _: False, False
            ):
                pass
    finally:
        hook.remove()
    mean, log_precision = torch.cat(said).chunk(2, dim=-1)
    spread = torch.exp(-torch.clamp(log_precision[:, column], *LOG_PRECISION))
    value = int(forecast.which[column])
    centre, scale = model.encoder.mean[value].double().cpu(), model.encoder.inverse_std[value].double().cpu()
    low, high = ((mean[:, column] + side * SPREADS * spread) / scale + centre for side in (-1, 1))
    return signed_exp(low.numpy()), signed_exp(high.numpy())


def signed_log(amount: Float64) -> Float64:
    """The scale on which the model sees amounts."""
    out: Float64 = np.sign(amount) * np.log1p(np.abs(amount))
    return out


def signed_exp(value: Float64) -> Float64:
    """Its inverse."""
    out: Float64 = np.sign(value) * np.expm1(np.abs(value))
    return out


# --- Drawing ----------------------------------------------------------------------------------------

AMOUNTS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)


def dates(ms: Int64 | int) -> Any:
    """Times as matplotlib takes them."""
    return np.asarray(ms).astype("datetime64[ms]")


def draw_customer(
    key: str, title: str, words: str, events: Events, band: tuple[Float64, Float64], when: Periods
) -> str:
    """SVG of a customer: amounts [N] over the band that was forecast [N], and the probability of each event."""
    low, high = band
    known = events.known_at <= when.test_start

    def paint(figure: Figure) -> None:
        above, below = panels(figure, title, [3, 2])
        at = dates(events.time)
        above.fill_between(
            at, low, high, color=MODEL, alpha=0.16, linewidth=0, label=f"forecast: mean ± {SPREADS:g} spreads"
        )
        marks(above, at, events.amount, events.fraud, known, "when the test week began")
        amounts_axis(above, np.r_[events.amount, high])
        ring = events.after_known_fraud
        odds = log_odds(events.probability)
        marks(below, at, odds, events.fraud, known, None)
        below.plot(
            at[ring], odds[ring], "o", color=OTHERS[0], markersize=8.5, markerfacecolor="none", linestyle="none",
            label="newest known label of its terminal: fraud",
        )  # fmt: skip
        probability_axis(below, odds)
        finish(figure, [above, below], when)

    return standalone(key, title, words, paint, (WIDTH, 5.0))


def draw_terminal(key: str, title: str, words: str, events: Events, when: Periods) -> str:
    """SVG of a terminal: its transactions, what its context read of known frauds, and the probability of each."""
    known = events.known_at <= when.test_start

    def paint(figure: Figure) -> None:
        above, middle, below = panels(figure, title, [3, 2, 2])
        at = dates(events.time)
        begins, becomes, height = events.time[events.fraud], events.known_at[events.fraud], events.amount[events.fraud]
        # one broken line: an element for each would be most of the file
        ends = np.stack([begins, np.minimum(becomes, when.test_end), begins], axis=1).ravel()
        heights = np.stack([height, height, np.full(len(height), np.nan)], axis=1).ravel()
        look: dict[str, Any] = {"color": FRAUD, "linewidth": 0.8, "alpha": 0.55, "zorder": 1}
        above.plot(dates(ends), heights, label="until its label is known", **look)
        inside = becomes < when.test_end
        above.plot(dates(becomes[inside]), height[inside], "|", color=FRAUD, markersize=6)
        marks(above, at, events.amount, events.fraud, known, "when the test week began")
        amounts_axis(above, events.amount)
        age, length, since = (np.where(events.run[:, k] < 0, np.nan, events.run[:, k]) for k in (0, 1, 2))
        lines: list[tuple[Float64, str, Any, str, str]] = [
            (age, MODEL, "-", "o", "days since the run of known frauds began"),
            (since, OTHERS[1], (0, (5, 2)), "s", "days since the last known fraud"),
            (length, OTHERS[2], (0, (1.5, 1.5)), "^", "frauds in the run"),
        ]
        for y, colour, dashes, marker, name in lines:
            middle.plot(at, y, color=colour, linestyle=dashes, linewidth=1, marker=marker, markersize=2.5, label=name)
        middle.set_ylabel("known frauds\n(days, number)")
        top = 1.08 * max(10.0, float(events.run[:, :3].max(initial=0)))
        middle.set_ylim(-0.04 * top, top)
        middle.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        odds = log_odds(events.probability)
        marks(below, at, odds, events.fraud, known, None)
        probability_axis(below, odds)
        finish(figure, [above, middle, below], when)

    return standalone(key, title, words, paint, (WIDTH, 6.4))


def customer_words(events: Events, band: tuple[Float64, Float64]) -> str:
    """What a customer's picture shows."""
    inside = (events.amount >= band[0]) & (events.amount <= band[1])
    return (
        "Upper panel: amount of each transaction over time, logarithmic, over the band that the state forecast before it: "
        f"{int(inside.sum())} of {len(events)} amounts are inside. Lower panel: the probability of fraud that the model gave: "
        f"{probability_words(events, inside, ('inside the band', 'outside it'))}"
    )


def terminal_words(events: Events) -> str:
    """What a terminal's picture shows."""
    unknown = events.run[:, 1] == 0
    return (
        "Upper panel: amount of each transaction over time, logarithmic; a line goes from each fraud to the moment its label "
        "is known. Middle panel: what the context read at each transaction: days since the run of known frauds began, its "
        "length, days since the last known fraud. Lower panel: the probability of fraud that the model gave: "
        f"{probability_words(events, unknown, ('while no fraud of the terminal was known', 'after that'))}"
    )


def probability_words(events: Events, first: Mask, names: tuple[str, str]) -> str:
    """The lowest and highest probability of frauds, by whether they are among the first [N], and of honest ones."""
    groups = (
        (events.fraud & first, "fraud", f" {names[0]}"),
        (events.fraud & ~first, "fraud", f" {names[1]}"),
        (~events.fraud, "honest transaction", ""),
    )
    parts = []
    for mask, what, where in groups:
        count, said = int(mask.sum()), events.probability[mask]
        if count:
            between = f"{said.min():.3f} to {said.max():.3f}" if count > 1 else f"{said[0]:.3f}"
            parts.append(f"{count} {what}{'s' if count > 1 else ''}{where}, {between}")
    return "; ".join(parts) + "."


def panels(figure: Figure, title: str, heights: Sequence[int]) -> list[Axes]:
    """Panels over one another with one axis of time."""
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    return list(rows)


def marks(axes: Axes, at: Any, y: Float64, fraud: Mask, known: Mask, moment: str | None) -> None:
    """Honest transactions, and frauds by whether they were known; in the legend where `moment` says when."""
    looks: list[tuple[Mask, str, dict[str, Any]]] = [
        (~fraud, "honest", {"marker": "o", "color": HONEST, "markersize": 3}),
        (fraud & known, f"fraud, known {moment}", {"marker": "D", "color": FRAUD, "markersize": 5}),
        (
            fraud & ~known,
            "fraud, not yet known then",
            {"marker": "D", "color": FRAUD, "markersize": 5, "markerfacecolor": CARD, "markeredgewidth": 1.4},
        ),
    ]
    for mask, name, look in looks:
        axes.plot(at[mask], y[mask], linestyle="none", label=name if moment else None, zorder=3, **look)


def amounts_axis(axes: Axes, shown: Float64) -> None:
    """The model's own scale of amounts, labelled with amounts."""
    axes.set_yscale("function", functions=(signed_log, signed_exp))
    low, high = min(0.0, float(shown.min())), 1.25 * float(shown.max())
    axes.set_ylim(low, high)
    axes.set_yticks([a for a in AMOUNTS if a <= high], [f"{a:,}" for a in AMOUNTS if a <= high])
    axes.set_ylabel("amount (currency of the data)")


def probability_axis(axes: Axes, odds: Float64) -> None:
    """Log-odds, labelled in percent."""
    least, most = log_odds(np.array(LEAST_RANGE))
    low, high = min(least, float(odds.min())) - 0.8, max(most, float(odds.max())) + 1.2
    axes.set_ylim(low, high)
    log_odds_ticks(axes.yaxis, low, high)
    axes.set_ylabel("probability of fraud")


def finish(figure: Figure, rows: Sequence[Axes], when: Periods) -> None:
    """The periods behind all panels with their names over the first one, the axis of time, and one legend below."""
    for axes in rows:
        axes.axvspan(dates(when.learned_until), dates(when.test_start), color=LINE, alpha=0.35, linewidth=0, zorder=0)
        axes.axvspan(dates(when.test_start), dates(when.test_end), color=LINE, alpha=0.8, linewidth=0, zorder=0)
        axes.grid(visible=False, axis="x")
    top = rows[0]
    names = (
        (when.since, when.learned_from, "history only"),
        (when.learned_from, when.learned_until, "learned from"),
        (when.learned_until, when.test_start, "label delay"),
        (when.test_start, when.test_end, "test"),
    )
    for begin, end, name in names:
        if begin < end:
            look: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8, "color": MUTED}
            top.text(dates((begin + end) // 2), 1.02, name, transform=top.get_xaxis_transform(), **look)
    last = rows[-1]
    last.set_xlim(dates(when.since), dates(when.test_end))
    last.xaxis.set_major_locator(DayLocator(bymonthday=(1, 8, 15, 22)))  # type: ignore[no-untyped-call]
    last.xaxis.set_major_formatter(DateFormatter("%Y-%m-%d"))  # type: ignore[no-untyped-call]
    last.set_xlabel("day (UTC)")
    figure.align_ylabels(list(rows))
    handles = [h for axes in rows for h in axes.get_legend_handles_labels()[0]]
    labels = [name for axes in rows for name in axes.get_legend_handles_labels()[1]]
    figure.legend(handles, labels, loc="outside lower left", ncols=3, labelcolor=INK)


# --- All of them ------------------------------------------------------------------------------------


def draw_all(folder: Path, fold: Fold, fitted: FittedGru) -> list[Picture]:
    """Write the pictures of a fold; what they show."""
    prepared = fold.prepared
    when = periods(prepared)
    shown = shown_rows(prepared)
    terminal = terminals_of(prepared)
    folder.mkdir(parents=True, exist_ok=True)
    out: list[Picture] = []

    def write(picture: Picture, svg: str) -> None:
        with replaced_file(folder / picture["file"]) as temporary:
            temporary.write_text(svg, encoding="utf-8")
        out.append(picture)

    for number, (user, rule) in enumerate(choose_customers(fold), 1):
        begin, end = int(prepared.encoded.begin[user]), int(prepared.encoded.end[user])
        mine = shown[begin:end]
        low, high = forecast_bands(fitted.model, prepared, user)
        events, band = events_of(fold, fitted, np.arange(begin, end)[mine]), (low[mine], high[mine])
        code = prepared.table.user.codes[prepared.encoded.arrival[begin]]
        title = (
            f"Customer {prepared.table.user.values[code]}: amounts, the forecast of each, and the probability of fraud"
        )
        picture = Picture(
            file=f"customer-{number}.svg", title=title, rule=rule, description=customer_words(events, band)
        )
        write(picture, draw_customer(f"customer-{number}", title, picture["description"], events, band, when))
    for number, (code, rule) in enumerate(choose_terminals(fold), 1):
        events = events_of(fold, fitted, np.flatnonzero(shown & (terminal == code)))
        name = prepared.table.entities()[0].values[code]
        title = f"Terminal {name}: transactions, known frauds, and the probability of fraud"
        picture = Picture(file=f"terminal-{number}.svg", title=title, rule=rule, description=terminal_words(events))
        write(picture, draw_terminal(f"terminal-{number}", title, picture["description"], events, when))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=("week", "all"), default="all")
    parser.add_argument("--fold", choices=(VALIDATION_FOLD, *FOLDS), default=FOLDS[0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fold = read_fold(options.setting, options.fold, options.seed)
    pictures = draw_all(FOLDER, fold, fit_gru(fold.prepared))
    result: HandbookPictures = {
        "setting": fold.setting,
        "fold": fold.first,
        "seed": fold.seed,
        "pictures": pictures,
    }
    print(write_result(HANDBOOK_PICTURES, {**result}))


if __name__ == "__main__":
    main()
