"""Whether a challenger may take the champion's place: criteria on the same matured transactions, each with its words.

It passes only if all of them do. What is measured is compared in pairs, on the same rows and on the same draws of users, so
that luck which both had counts for neither. Nothing is read, trained or scored here: rows and figures come in.

Letters: N rows (matured transactions that neither was fitted on).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Parity
from seqfraud.config import format_instant
from seqfraud.metrics import (
    LOGIT_LIMIT,
    Floats,
    Interval,
    Mask,
    PairedDifference,
    average_precision,
    bootstrap_figure,
    calibration_in_the_large,
    calibration_slope,
    log_loss,
    paired_bootstrap,
)

__all__ = ["USUAL", "Compared", "Criterion", "GateReport", "GateSettings", "Latency", "Period", "judge"]

ENOUGH = "enough to compare"
UNSEEN = "unseen"
BETTER = "average precision"
SEGMENTS = "segments"
CALIBRATION = "calibration"
PARITY = "parity"
LATENCY = "latency"

SCREEN_ROUNDS = 200
GRID = 0.02
"""Log-odds."""
SHOWN = 3
"""Segments that the words name."""
VISITED = "probabilities visited"
"""Not a difference: how far the parity checks reached."""


@dataclass(frozen=True)
class GateSettings:
    """What a challenger has to show.

    - level: of every interval; for segments the chance of one false refusal among all of them is 1 - level (Bonferroni).
    - rounds: of the bootstrap.
    - fewest_frauds: fewer decide nothing.
    - fewest_in_segment: frauds; a segment with fewer is not looked at.
    - amount_bands: of about equally many frauds.
    - calibration_slack: of the slope and of the intercept in the large (log-odds); a sure difference below that is none.
    - most_latency: of one step, relative to the champion's.
    """

    level: float = 0.95
    rounds: int = 500
    fewest_frauds: int = 30
    fewest_in_segment: int = 20
    amount_bands: int = 4
    calibration_slack: float = 0.1
    most_latency: float = 1.5
    seed: int = 0


USUAL = GateSettings()


@dataclass(frozen=True)
class Compared:
    """N matured transactions, scored by both.

    Attributes:
        fraud: mask [N].
        champion, challenger: probabilities float64 [N].
        user: codes [N].
        weight: how many transactions each stands for [N].
        amount: float64 [N], NaN where missing; None where no amount is declared.
        categories: texts [N] by column, None where missing.
    """

    fraud: Mask
    champion: Floats
    challenger: Floats
    user: npt.NDArray[Any]
    weight: Floats
    amount: Floats | None = None
    categories: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    def of(self, rows: Mask) -> "Compared":
        """Some of them, without their segments."""
        return Compared(
            self.fraud[rows], self.champion[rows], self.challenger[rows], self.user[rows], self.weight[rows]
        )


@dataclass(frozen=True)
class Period:
    """Times in ms: what is compared is from `begin` on and before `end`; labels known until `labels_until` were fitted."""

    begin: int
    end: int
    labels_until: int


@dataclass(frozen=True)
class Latency:
    """Microseconds of one step, the median of calls that took turns."""

    champion: float
    challenger: float


@dataclass(frozen=True)
class Criterion:
    """One thing that was asked: the answer, why in words, and the figures behind it."""

    name: str
    passed: bool
    words: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class GateReport:
    """What came out: passed if every criterion did.

    `compared` says on what: for people and programs that read it later. `let_through` counts those that stand for others
    that were declined.
    """

    champion: str
    challenger: str
    compared: Mapping[str, Any]
    criteria: tuple[Criterion, ...]

    @property
    def passed(self) -> bool:
        """Whether the challenger may be promoted."""
        return all(criterion.passed for criterion in self.criteria)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as gate.json holds it."""
        criteria = [
            {"name": c.name, "passed": c.passed, "words": c.words, "figures": dict(c.figures)} for c in self.criteria
        ]
        return {
            "passed": self.passed,
            "champion": self.champion,
            "challenger": self.challenger,
            "compared": dict(self.compared),
            "criteria": criteria,
        }

    def text(self) -> str:
        """One line for the outcome and one for each criterion."""
        refused = [c.name for c in self.criteria if not c.passed]
        outcome = "passed" if self.passed else f"refused: {', '.join(refused)}"
        width = max(len(c.name) for c in self.criteria)
        lines = [f"challenger {self.challenger} against champion {self.champion}: {outcome}"]
        lines += [f"  {'ok' if c.passed else 'NO':2}  {c.name:{width}}  {c.words}" for c in self.criteria]
        return "\n".join(lines)


def judge(
    champion: str,
    challenger: str,
    rows: Compared,
    parity: Parity,
    latency: Latency,
    period: Period,
    settings: GateSettings = USUAL,
) -> GateReport:
    """Every criterion, also after one failed: all the reasons are worth knowing.

    Args:
        champion, challenger: ids of the bundles.
        parity: of the challenger's bundle, as measured at its export.
        period: which time the rows are from.
    """
    counted = rows.weight > 0
    frauds = int((rows.fraud & counted).sum())
    enough = _enough(rows, frauds, settings)
    measured: list[Criterion] = []
    if enough.passed:
        measured = [_better(rows, settings), _segments(rows, settings), _calibration(rows, settings)]
    compared = {
        "from": format_instant(period.begin),
        "to": format_instant(period.end),
        "rows": int(counted.sum()),
        "frauds": frauds,
        "users": len(np.unique(rows.user[counted])),
        "let_through": int((rows.weight > 1).sum()),
    }
    criteria = (_unseen(period), enough, *measured, _parity(parity), _latency(latency, settings))
    return GateReport(champion, challenger, compared, criteria)


def _unseen(period: Period) -> Criterion:
    until, begin = format_instant(period.labels_until), format_instant(period.begin)
    passed = period.labels_until <= period.begin
    words = f"fitted on labels known until {until}, compared from {begin} on"
    if not passed:
        words += ": what it learnt by heart would count for it"
    return Criterion(UNSEEN, passed, words, {"labels_until": until, "from": begin})


def _enough(rows: Compared, frauds: int, settings: GateSettings) -> Criterion:
    total = int((rows.weight > 0).sum())
    passed = frauds >= settings.fewest_frauds and frauds < total
    words = f"{frauds:,} frauds in {total:,} matured transactions"
    if not passed:
        words += f"; expected {settings.fewest_frauds} or more, and honest ones: compare more weeks, or wait"
    return Criterion(ENOUGH, passed, words, {"frauds": frauds, "rows": total, "fewest_frauds": settings.fewest_frauds})


def _better(rows: Compared, settings: GateSettings) -> Criterion:
    own, others = (average_precision(rows.fraud, p, rows.weight) for p in (rows.challenger, rows.champion))
    found = _difference(rows, settings.level, settings.rounds, settings.seed)
    assert own is not None  # there is a fraud that counts
    assert others is not None
    assert found is not None
    passed = found.low > 0
    sure = "surely better" if passed else "surely worse" if found.high < 0 else "no sure difference"
    words = f"{own:.4f}, the champion's {others:.4f}: {_between(found.difference, found.low, found.high, settings.level)}, {sure}"
    figures = {"challenger": own, "champion": others, **vars(found)}
    return Criterion(BETTER, passed, words, figures)


def _between(difference: float, low: float, high: float, level: float) -> str:
    return f"{difference:+.4f} ({100 * level:g} %: {low:+.4f} to {high:+.4f})"


# --- Segments -------------------------------------------------------------------------------------


def _parts(rows: Compared, settings: GateSettings) -> Iterator[tuple[str, Mask]]:
    """Names and rows of the segments with enough frauds, and honest rows, to be looked at."""
    counted = rows.fraud & (rows.weight > 0)
    for name, part in (*_values(rows), *_bands(rows, counted, settings.amount_bands)):
        frauds = int((counted & part).sum())
        if frauds >= settings.fewest_in_segment and frauds < int((part & (rows.weight > 0)).sum()):
            yield name, part


def _values(rows: Compared) -> Iterator[tuple[str, Mask]]:
    for column, texts in rows.categories.items():
        values = np.array(["" if text is None else text for text in texts], dtype=object)
        for value in sorted(set(values[rows.fraud].tolist())):
            yield f"{column} = {value or 'missing'}", values == value


def _bands(rows: Compared, counted: Mask, bands: int) -> Iterator[tuple[str, Mask]]:
    """Bands of the amount between quantiles of the frauds' amounts; equal quantiles make fewer."""
    if rows.amount is None:
        return
    of_frauds = rows.amount[counted & ~np.isnan(rows.amount)]
    if not len(of_frauds):
        return
    inner = np.unique(np.quantile(of_frauds, np.linspace(0, 1, bands + 1)[1:-1])).tolist()
    for low, high in zip([-np.inf, *inner], [*inner, np.inf], strict=True):
        if not np.isfinite(low) and not np.isfinite(high):
            return
        name = f"amount below {high:g}" if not np.isfinite(low) else f"amount from {low:g}"
        if np.isfinite(low) and np.isfinite(high):
            name = f"amount {low:g} to {high:g}"
        yield name, (rows.amount >= low) & (rows.amount < high)


def _segments(rows: Compared, settings: GateSettings) -> Criterion:
    """No segment whose interval lies wholly below 0, at a level corrected for how many are looked at.

    An interval at the plain level screens: only where that lies below 0 is the wider one, from more rounds, worked out.
    """
    parts = list(_parts(rows, settings))
    corrected = 1 - (1 - settings.level) / max(len(parts), 1)
    found: list[dict[str, Any]] = []
    for name, part in parts:
        some = rows.of(part)
        plain = _difference(some, settings.level, min(settings.rounds, SCREEN_ROUNDS), settings.seed)
        if plain is None:
            continue
        sure = plain
        if plain.high < 0:
            # both tails have to hold some ten rounds
            rounds = max(settings.rounds, round(20 / (1 - corrected)))
            sure = _difference(some, corrected, rounds, settings.seed) or plain
        found.append({
            "segment": name, "rows": len(some.fraud), "frauds": int(some.fraud.sum()), "difference": plain.difference,
            "low": plain.low, "high": plain.high, "worse": sure.high < 0,
        })  # fmt: skip
    worse = sorted((s for s in found if s["worse"]), key=lambda s: s["difference"])
    if worse:
        named = ", ".join(f"{s['segment']} ({s['difference']:+.4f})" for s in worse[:SHOWN])
        more = f" and {len(worse) - SHOWN} more" if len(worse) > SHOWN else ""
        words = f"surely worse in {len(worse)} of {len(found)}: {named}{more}"
    elif found:
        least = min(found, key=lambda s: s["difference"])
        words = f"none of {len(found)} is surely worse; the least gain: {least['segment']} ({least['difference']:+.4f})"
    else:
        words = f"none has {settings.fewest_in_segment} frauds: none was looked at"
    return Criterion(SEGMENTS, not worse, words, {"level": corrected, "segments": found})


def _difference(rows: Compared, level: float, rounds: int, seed: int) -> PairedDifference | None:
    return paired_bootstrap(
        "average_precision",
        rows.fraud,
        rows.challenger,
        rows.champion,
        rows.user,
        weight=rows.weight,
        rounds=rounds,
        seed=seed,
        level=level,
    )


# --- Calibration ----------------------------------------------------------------------------------


def _slope_error(fraud: Mask, p: Floats, weight: Floats) -> float | None:
    found = calibration_slope(fraud, p, weight)
    return None if found is None else abs(found.slope - 1)


def _level_error(fraud: Mask, p: Floats, weight: Floats) -> float | None:
    found = calibration_in_the_large(fraud, p, weight)
    return None if found is None else abs(found)


Measure = Callable[[Mask, Floats, Floats], float | None]


class _Counted:
    """A model's rows counted on a grid of log-odds, so that a figure of calibration takes no pass over all of them.

    Rounded to 0.02, a probability of 0.1 moves by less than 0.001, up as often as down.
    """

    def __init__(self, fraud: Mask, p: Floats) -> None:
        clipped = np.clip(p, LOGIT_LIMIT, 1 - LOGIT_LIMIT)
        steps, codes = np.unique(np.round((np.log(clipped) - np.log1p(-clipped)) / GRID), return_inverse=True)
        self._codes = codes + len(steps) * fraud
        self._p = np.tile(1 / (1 + np.exp(-steps * GRID)), 2)
        self._fraud = np.arange(2 * len(steps)) >= len(steps)

    def figure(self, measure: Measure, weight: Floats) -> float | None:
        """A measure under weights of the rows [N]."""
        counts = np.bincount(self._codes, weights=weight, minlength=len(self._p))
        return measure(self._fraud, self._p, counts.astype(np.float64))


def _calibration(rows: Compared, settings: GateSettings) -> Criterion:
    """Log loss, distance of the slope from 1 and of the intercept in the large from 0: none surely larger."""
    own, others = _Counted(rows.fraud, rows.challenger), _Counted(rows.fraud, rows.champion)

    def interval(measure: Measure) -> Interval | None:
        def difference(weight: Floats) -> float | None:
            a, b = own.figure(measure, weight), others.figure(measure, weight)
            return None if a is None or b is None else a - b

        return bootstrap_figure(
            difference,
            rows.user,
            weight=rows.weight,
            rounds=min(settings.rounds, SCREEN_ROUNDS),
            seed=settings.seed,
            level=settings.level,
        )

    measures: tuple[tuple[str, Measure, float], ...] = (
        ("log loss", log_loss, 0.0),
        ("slope off 1", _slope_error, settings.calibration_slack),
        ("intercept off 0", _level_error, settings.calibration_slack),
    )
    figures: dict[str, Any] = {}
    worse: list[str] = []
    said: list[str] = []
    for name, measure, slack in measures:
        a, b = (measure(rows.fraud, p, rows.weight) for p in (rows.challenger, rows.champion))
        found = None if a is None or b is None else interval(measure)
        figures[name] = {"challenger": a, "champion": b, **({} if found is None else vars(found))}
        if a is None or b is None or found is None:
            said.append(f"{name} is not defined here")
            continue
        words = f"{name} {a:.4f}, the champion's {b:.4f}"
        said.append(words)
        if found.low > slack:
            worse.append(f"{words}: {_between(found.estimate, found.low, found.high, settings.level)}")
    words = f"surely worse: {'; '.join(worse)}" if worse else f"not surely worse: {'; '.join(said)}"
    return Criterion(CALIBRATION, not worse, words, figures)


# --- The bundle -----------------------------------------------------------------------------------


def _parity(parity: Parity) -> Criterion:
    checks = {name: figures for name, figures in parity.measured.items() if name != VISITED}
    worst = {
        what: max((figures[what] for figures in checks.values() if what in figures), default=0.0)
        for what in ("probability", "logit")
    }
    # NaN is beyond a limit too
    beyond = [
        name
        for name, figures in checks.items()
        if not (
            figures.get("probability", 0.0) <= parity.probability
            and figures.get("logit", 0.0) <= parity.logit
            and figures.get("integer state", 0.0) <= 0
        )
    ]
    tolerance = f"tolerance {parity.probability:g} and {parity.logit:g}"
    if not checks:
        words = "the bundle's manifest has no parity check"
    elif beyond:
        words = f"the graphs are not what was trained: {beyond[0]} ({tolerance})"
    else:
        words = (
            f"{len(checks)} checks, largest difference of a probability {worst['probability']:.1e}, "
            f"of a logit {worst['logit']:.1e} ({tolerance})"
        )
    return Criterion(PARITY, bool(checks) and not beyond, words, {**worst, "checks": len(checks), "beyond": beyond})


def _latency(latency: Latency, settings: GateSettings) -> Criterion:
    ratio = latency.challenger / latency.champion
    words = (
        f"{latency.challenger:.1f} us a step, the champion {latency.champion:.1f}: {ratio:.2f} times as long, at most "
        f"{settings.most_latency:g} allowed"
    )
    passed = ratio <= settings.most_latency
    return Criterion(LATENCY, passed, words, {**vars(latency), "ratio": ratio, "most": settings.most_latency})
