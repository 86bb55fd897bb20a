"""What is watched of a model's quality, with intervals: training measures it on its validation days, and monitoring on weeks
whose labels have matured, by the same code.

Letters: N rows, G groups of users (`seqfraud.drift.groups_of`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.drift import LEVEL, ROUNDS, Codes, Floats, drawn_groups, groups_of
from seqfraud.errors import BundleError
from seqfraud.metrics import (
    Interval,
    Mask,
    alerted,
    bootstrap_interval,
    calibration_intervals,
)

KEY = "watched"
"""Of a bundle's metrics."""
ALERT_SHARE = 0.01
"""The budget of a model that alerts on nothing."""


@dataclass(frozen=True)
class Between:
    """A figure and its 95 % interval by users."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Watched:
    """Figures of N rows whose labels are known.

    Attributes:
        rows, frauds: how many.
        alert_share: the budget of alerts, a share of the transactions of a day.
        figures: by name, those that the rows define: average_precision, recall_at_1pct_fpr, precision_at_budget,
            money_caught (share of the fraud's amount in the budget), fraud_share, calibration_in_the_large (what is to
            be added to the log-odds, 0 where calibrated), calibration_slope (1 where calibrated).
    """

    rows: int
    frauds: int
    alert_share: float
    figures: Mapping[str, Between]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "Watched":
        """The inverse of `as_dict`. Raises BundleError."""
        try:
            figures = {
                str(name): Between(*(float(f[k]) for k in ("estimate", "low", "high")))
                for name, f in raw["figures"].items()
            }
            return Watched(int(raw["rows"]), int(raw["frauds"]), float(raw["alert_share"]), figures)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(f"manifest: metrics.{KEY}: not readable: {type(error).__name__}: {error}") from error


def measure_watched(
    label: npt.NDArray[Any],
    probability: Floats,
    day: npt.NDArray[np.int64],
    user: npt.NDArray[Any],
    amount: Floats | None,
    alert_share: float,
    weight: Floats | None = None,
    rounds: int = ROUNDS,
) -> Watched:
    """The figures of N rows; `weight` [N] counts a row that often, `amount` [N] may be NaN, which is no money."""
    fraud = np.asarray(label) == 1
    group = groups_of(user)
    weights = np.ones(len(fraud)) if weight is None else weight
    figures = measure_precision(fraud, probability, day, user, alert_share, weight, rounds)

    def keep(name: str, found: Interval | Between | None) -> None:
        if found is not None:
            figures[name] = Between(found.estimate, found.low, found.high)

    keep(
        "recall_at_1pct_fpr",
        bootstrap_interval("recall_at_1pct_fpr", fraud, probability, group, weight=weight, rounds=rounds),
    )
    if len(fraud):
        taken = alerted(probability, day, alert_share) * weights
        keep("fraud_share", ratio(weights * fraud, weights, group, rounds))
        if amount is not None:
            lost = np.where(fraud, np.maximum(np.nan_to_num(amount), 0.0), 0.0)
            keep("money_caught", ratio(taken * lost, weights * lost, group, rounds))
        calibration = calibration_intervals(fraud, probability, group, weight)
        if calibration is not None:
            keep("calibration_in_the_large", calibration[0])
            keep("calibration_slope", calibration[1])
    return Watched(len(fraud), int(fraud.sum()), alert_share, figures)


def measure_precision(
    label: npt.NDArray[Any],
    probability: Floats,
    day: npt.NDArray[np.int64],
    user: npt.NDArray[Any],
    alert_share: float,
    weight: Floats | None = None,
    rounds: int = ROUNDS,
) -> dict[str, Between]:
    """Average precision, and precision at the budget: the figures that depend on how common fraud is (`as_common_as`)."""
    fraud, group = np.asarray(label) == 1, groups_of(user)
    figures = {}
    average = bootstrap_interval("average_precision", fraud, probability, group, weight=weight, rounds=rounds)
    if average is not None:
        figures["average_precision"] = Between(average.estimate, average.low, average.high)
    if len(fraud):
        taken = alerted(probability, day, alert_share) * (np.ones(len(fraud)) if weight is None else weight)
        precision = ratio(taken * fraud, taken, group, rounds)
        if precision is not None:
            figures["precision_at_budget"] = precision
    return figures


def ratio(part: Floats, whole: Floats, group: Codes, rounds: int = ROUNDS) -> Between | None:
    """Sum of `part` [N] over sum of `whole` [N], its interval by drawing groups; None where there is nothing whole."""
    if not whole.sum() > 0:
        return None
    a, b = np.bincount(group, weights=part), np.bincount(group, weights=whole)
    weight = drawn_groups(len(a), rounds)
    above, below = weight @ a, weight @ b
    drawn = above[below > 0] / below[below > 0]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Between(float(part.sum() / whole.sum()), float(low), float(high))


def as_common_as(fraud: Mask, share: float, weight: Floats | None) -> Floats:
    """Weights [N] under which the share of fraud is `share`: honest rows count more or less often.

    Precision depends on how common fraud is; so weighted, it can be compared with that of other weeks.
    """
    weights = np.ones(len(fraud)) if weight is None else weight
    frauds, honest = float(weights[fraud].sum()), float(weights[~fraud].sum())
    if not frauds or not honest or not 0 < share < 1:
        return weights
    return np.where(fraud, weights, weights * (frauds / honest) * (1 - share) / share)


@dataclass(frozen=True)
class Expected:
    """What N probabilities say of their own quality, if they are right; nothing is known of labels.

    Confidence-based performance estimation: every row counts as fraud with its probability (CBPE, as Białek,
    Kivimäki, Kuberski and Perrakis describe it in "Estimating model performance under covariate shift without labels",
    arXiv 2401.08348). It sees that
    scores are less certain than they were; it does not see a new kind of fraud, which the model takes for honest.
    """

    rows: int
    frauds: Between
    average_precision: Between | None
    precision: Between | None
    """Of the rows at or above the threshold of `is_fraud`."""
    recall: Between | None


def expected_quality(probability: Floats, flagged: Mask, user: npt.NDArray[Any], rounds: int = 100) -> Expected:
    """The estimates of N rows, of which `flagged` [N] are at or above the threshold; intervals by drawing users."""
    group = groups_of(user)
    ones = np.ones(len(probability))
    share = ratio(probability, ones, group, rounds) or Between(0.0, 0.0, 0.0)
    frauds = Between(*(x * len(probability) for x in (share.estimate, share.low, share.high)))
    order = np.argsort(-probability, kind="stable")
    p, ranked = probability[order], group[order]

    def precision(weight: Floats) -> float:
        hits, rows = np.cumsum(weight * p), np.cumsum(weight)
        inside = weight > 0
        return float((weight * p * np.divide(hits, rows, out=np.zeros(len(p)), where=inside)).sum() / hits[-1])

    average = None
    if len(p) and p.sum() > 0:
        drawn = [precision(w[ranked]) for w in drawn_groups(int(group.max()) + 1, rounds)]
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        average = Between(precision(ones), float(low), float(high))
    return Expected(
        rows=len(p),
        frauds=frauds,
        average_precision=average,
        precision=ratio(probability * flagged, ones * flagged, group, rounds),
        recall=ratio(probability * flagged, probability, group, rounds),
    )
