"""How good scores are: ranking, calibration, card precision, alert budgets, bootstrap intervals.

Letters: N rows (transactions), S segments of a ranking, G groups (users). A label is 1 for fraud
and 0 for honest; a score is any number that ranks, higher is more suspicious; a probability is a
score in 0..1. Amounts are in whatever currency the data use. Every figure is exact where scores are
tied, so the order of the rows does not matter. A figure that the rows do not define (no fraud, no
honest row) is None, never NaN.

Long sums are `(a * b).sum()`, not `a @ b`: BLAS threads wait for each other, which made a bootstrap
round about three times slower on 2 cores, and their number changes the last digits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqfraud.errors import DataError

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Codes = NDArray[np.intp]

MetricName = Literal["average_precision", "roc_auc", "recall_at_1pct_fpr", "brier", "log_loss"]

LOGIT_LIMIT = 1e-7
"""Before a logit, probabilities are cut to this distance from 0 and 1: float32 rounds there."""

DAY_MS = 86_400_000

Z95 = 1.959963984540054
"""Of a 95 % interval."""

NEWTON_STEPS = 100
SMALLEST_STEP = 1e-9
CONVERGED = 1e-12


# --- What the inputs have to be -------------------------------------------------------------------


def as_labels(label: ArrayLike, field: str = "label") -> Mask:
    """Labels [N] as a mask, True for fraud; anything but 0 and 1 is a DataError."""
    values = _column(label, field, "0 (honest) or 1 (fraud)")
    if values.dtype == np.bool_:
        return values
    fraud: Mask = values == 1
    _require(fraud | (values == 0), values, field, "0 (honest) or 1 (fraud)")
    return fraud


def as_scores(score: ArrayLike, rows: int, field: str = "score") -> Floats:
    """Scores [N] as float64; NaN is a DataError, infinities rank like any other number."""
    values = _floats(score, rows, field, "a number")
    _require(~np.isnan(values), values, field, "a number")
    return values


def as_probabilities(probability: ArrayLike, rows: int, field: str = "probability") -> Floats:
    """Probabilities [N] as float64; NaN and anything outside 0..1 is a DataError."""
    values = _floats(probability, rows, field, "a probability in 0..1")
    _require((values >= 0) & (values <= 1), values, field, "a probability in 0..1")
    return values


def _as_weights(weight: ArrayLike | None, rows: int) -> Floats:
    if weight is None:
        return np.ones(rows)
    values = _floats(weight, rows, "weight", "a finite weight >= 0")
    _require((values >= 0) & np.isfinite(values), values, "weight", "a finite weight >= 0")
    return values


def _as_money(amount: ArrayLike, rows: int) -> Floats:
    """Amounts [N]; a negative one (a refund) counts as 0: there is nothing to be saved."""
    values = _floats(amount, rows, "amount", "a finite amount")
    _require(np.isfinite(values), values, "amount", "a finite amount")
    return np.maximum(values, 0.0)


def _as_codes(values: ArrayLike, rows: int, field: str) -> tuple[Codes, int]:
    """Any values [N] as codes [N] that sort like the values, and the number of distinct ones."""
    array = np.asarray(values)
    _require_rows(array, rows, field)
    if array.dtype == object:
        # A dictionary is far faster than sorting N Python objects, and does not mind mixed types.
        items = array.tolist()
        distinct = sorted(set(items), key=lambda value: (str(value), type(value).__name__))
        code_of = {value: code for code, value in enumerate(distinct)}
        codes = np.fromiter((code_of[value] for value in items), np.intp, rows)
        return codes, len(code_of)
    values_in_order, inverse = np.unique(array, return_inverse=True)
    return inverse, len(values_in_order)


def _column(values: ArrayLike, field: str, expected: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1:
        _refuse(field, f"an array of shape {array.shape}", "one value per row, shape (N,)")
    if array.dtype.kind not in "biuf":
        seen = f"{array[0]!r}, of type {array.dtype}" if len(array) else f"type {array.dtype}"
        _refuse(field, seen, expected)
    return array


def _floats(values: ArrayLike, rows: int, field: str, expected: str) -> Floats:
    array = _column(values, field, expected)
    _require_rows(array, rows, field)
    return array.astype(np.float64, copy=False)


def _require_rows(array: NDArray[Any], rows: int, field: str) -> None:
    if array.shape != (rows,):
        _refuse(field, f"an array of shape {array.shape}", f"one value per label, shape ({rows},)")


def _require(good: Mask, values: NDArray[Any], field: str, expected: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        _refuse(field, f"{values[row].item()!r} in row {row}", expected)


def _require_share(value: float, field: str) -> None:
    if not 0 <= value <= 1:
        _refuse(field, repr(value), "a share in 0..1")


def _require_positive(value: int, field: str) -> None:
    if value < 1:
        _refuse(field, repr(value), "at least 1")


def _refuse(field: str, seen: str, expected: str) -> NoReturn:
    raise DataError(f"{field}: seen {seen}; expected {expected}")


# --- Ranking --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """Weights of fraud and of honest rows in each segment [S], from the highest scores down."""

    fraud: Floats
    honest: Floats

    @property
    def has_fraud(self) -> bool:
        return bool(self.fraud.any())

    @property
    def has_both(self) -> bool:
        return self.has_fraud and bool(self.honest.any())


class _Ranking:
    """Rows sorted once by descending score and cut into segments, so that weights change cheaply.

    A segment is either all rows of one score that at least one fraud has, or all rows between two
    such scores. Nothing finer is needed: average precision, ROC AUC and recall at a false positive
    rate change only where a fraud is.
    """

    order: Codes
    """The rows [N] in descending order of their score."""
    threshold: Floats
    """The lowest score of each segment [S]."""

    def __init__(self, fraud: Mask, score: Floats) -> None:
        self.order = np.argsort(score)[::-1]
        ranked = score[self.order]
        fraud_position = np.flatnonzero(fraud[self.order])
        is_start = np.ones(len(ranked), dtype=np.bool_)
        is_start[1:] = ranked[1:] != ranked[:-1]
        tie_start = np.flatnonzero(is_start)
        tie_end = np.append(tie_start[1:], len(ranked))
        with_fraud = np.unique(np.searchsorted(tie_start, fraud_position, side="right") - 1)
        edges = np.unique(np.concatenate(([0], tie_start[with_fraud], tie_end[with_fraud], [len(ranked)])))
        self._start = edges[:-1]
        self.threshold = ranked[edges[1:] - 1] if len(self._start) else np.zeros(0)
        self._fraud_position = fraud_position
        self._fraud_segment = np.searchsorted(self._start, fraud_position, side="right") - 1

    def curve(self, ranked_weight: Floats) -> _Curve:
        """The curve under weights [N] given in the order of `order`."""
        if not len(self._start):
            return _Curve(np.zeros(0), np.zeros(0))
        fraud_weight = ranked_weight[self._fraud_position]
        fraud = np.bincount(self._fraud_segment, weights=fraud_weight, minlength=len(self._start))
        # Zeroed, not subtracted from the sum of all, which would round for fractional weights.
        honest_weight = ranked_weight.copy()
        honest_weight[self._fraud_position] = 0.0
        return _Curve(fraud.astype(np.float64), np.add.reduceat(honest_weight, self._start))


def _ranked(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None) -> tuple[_Ranking, _Curve]:
    fraud = as_labels(label)
    ranking = _Ranking(fraud, as_scores(score, len(fraud)))
    return ranking, ranking.curve(_as_weights(weight, len(fraud))[ranking.order])


def _average_precision(curve: _Curve) -> float | None:
    if not curve.has_fraud:
        return None
    rises = curve.fraud > 0
    caught = np.cumsum(curve.fraud)[rises]
    false = np.cumsum(curve.honest)[rises]
    return float((curve.fraud[rises] * (caught / (caught + false))).sum() / caught[-1])


def _roc_auc(curve: _Curve) -> float | None:
    if not curve.has_both:
        return None
    caught, false = np.cumsum(curve.fraud), np.cumsum(curve.honest)
    pairs_won = (curve.fraud * (false[-1] - false + 0.5 * curve.honest)).sum()
    return float(pairs_won / (caught[-1] * false[-1]))


def _recall_at_fpr(curve: _Curve, fpr: float) -> float | None:
    if not curve.has_both:
        return None
    caught, false = np.cumsum(curve.fraud), np.cumsum(curve.honest)
    allowed = false / false[-1] <= fpr
    return float(caught[allowed].max(initial=0.0) / caught[-1])


def average_precision(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Average precision of scores [N]: sum over thresholds of precision times the rise in recall.

    No interpolation, the definition of scikit-learn's `average_precision_score`. Equal scores are
    one threshold. `weight` [N] counts a row that often. None without fraud.
    """
    return _average_precision(_ranked(label, score, weight)[1])


def roc_auc(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Probability that a fraud scores above an honest row, a tie counting half; scores [N].

    Hanley & McNeil, Radiology 143 (1982). `weight` [N] counts a row that often. None without fraud
    or without honest rows.
    """
    return _roc_auc(_ranked(label, score, weight)[1])


def recall_at_fpr(
    label: ArrayLike, score: ArrayLike, fpr: float = 0.01, weight: ArrayLike | None = None
) -> float | None:
    """Highest share of frauds caught by a threshold whose false positive rate is at most `fpr`.

    No interpolation between thresholds of the scores [N]. `weight` [N] counts a row that often.
    None without fraud or without honest rows.
    """
    _require_share(fpr, "fpr")
    return _recall_at_fpr(_ranked(label, score, weight)[1], fpr)


@dataclass(frozen=True)
class PrecisionRecallCurve:
    """Points [P] from the highest threshold down; a point's alerts are the rows at or above it."""

    threshold: Floats
    precision: Floats
    recall: Floats


def precision_recall_curve(
    label: ArrayLike, score: ArrayLike, points: int = 200, weight: ArrayLike | None = None
) -> PrecisionRecallCurve | None:
    """At most `points` points of the precision-recall curve of scores [N], spread evenly by recall.

    Both ends are kept. Only thresholds at which recall rises count: between them precision can but
    fall. None without fraud.
    """
    if points < 2:
        _refuse("points", repr(points), "at least 2, for both ends of the curve")
    ranking, curve = _ranked(label, score, weight)
    if not curve.has_fraud:
        return None
    rises = curve.fraud > 0
    caught = np.cumsum(curve.fraud)[rises]
    precision = caught / (caught + np.cumsum(curve.honest)[rises])
    recall = caught / caught[-1]
    kept = np.unique(np.searchsorted(recall, np.linspace(recall[0], 1.0, points)))
    return PrecisionRecallCurve(ranking.threshold[rises][kept], precision[kept], recall[kept])


# --- Probabilities --------------------------------------------------------------------------------


def _log_losses(fraud: Mask, probability: Floats) -> Floats:
    # Cut like scikit-learn's `log_loss`: one certain error costs 36 nats, not infinitely many.
    limit = np.finfo(np.float64).eps
    right = np.where(fraud, probability, 1.0 - probability)
    losses: Floats = -np.log(np.clip(right, limit, 1.0 - limit))
    return losses


def _brier_losses(fraud: Mask, probability: Floats) -> Floats:
    return np.square(probability - fraud)


def _mean_loss(
    losses: Callable[[Mask, Floats], Floats],
    label: ArrayLike,
    probability: ArrayLike,
    weight: ArrayLike | None,
) -> float | None:
    fraud = as_labels(label)
    per_row = losses(fraud, as_probabilities(probability, len(fraud)))
    weights = _as_weights(weight, len(fraud))
    total = weights.sum()
    return float((weights * per_row).sum() / total) if total else None


def log_loss(label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Mean negative log likelihood of labels [N], in nats, probabilities cut to eps..1 - eps.

    eps is that of float64. `weight` [N] counts a row that often. None without rows.
    """
    return _mean_loss(_log_losses, label, probability, weight)


def brier(label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Mean squared difference of probability and label over N rows (Brier 1950, for two classes).

    `weight` [N] counts a row that often. None without rows.
    """
    return _mean_loss(_brier_losses, label, probability, weight)


@dataclass(frozen=True)
class Calibration:
    """`logit P(fraud) = intercept + slope * logit(probability)`, 0 and 1 where calibrated.

    A slope under 1: the probabilities are too extreme. An intercept under 0 at slope 1: they are
    too high.
    """

    intercept: float
    slope: float


def calibration_slope(label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None) -> Calibration | None:
    """Logistic regression of label [N] on logit(probability) [N], both parameters fitted together.

    Cox, "Two further applications of a model for binary regression", Biometrika 45 (1958);
    recommended in Van Calster et al., "Calibration: the Achilles heel of predictive analytics", BMC
    Medicine 17:230 (2019). Maximum likelihood by Newton's method with step halving.

    None where no finite maximum exists: with one regressor exactly when the scores of frauds and of
    honest rows do not overlap (Albert & Anderson, Biometrika 71 (1984)), which includes a constant
    score, no fraud and no honest rows; or where they overlap too little to find it in float64.
    `weight` [N] counts a row that often.
    """
    fraud = as_labels(label)
    p = np.clip(as_probabilities(probability, len(fraud)), LOGIT_LIMIT, 1.0 - LOGIT_LIMIT)
    w = _as_weights(weight, len(fraud))
    if not w.all():
        counted = w > 0
        fraud, p, w = fraud[counted], p[counted], w[counted]
    x = np.log(p) - np.log1p(-p)
    if fraud.all() or not fraud.any():
        return None
    of_fraud, of_honest = x[fraud], x[~fraud]
    if of_fraud.min() >= of_honest.max() or of_fraud.max() <= of_honest.min():
        return None
    # Standardised, the two parameters hardly correlate and Newton's steps are well conditioned.
    center, scale = float(x.mean()), float(x.std())
    x = (x - center) / scale

    def loss(level: float, slope: float) -> float:
        z = level + slope * x
        return float((w * np.logaddexp(0.0, z)).sum() - (w * z)[fraud].sum())

    rate = float(w[fraud].sum() / w.sum())
    level, slope = math.log(rate / (1.0 - rate)), 0.0
    current = loss(level, slope)
    for _ in range(NEWTON_STEPS):
        expected = np.exp(-np.logaddexp(0.0, -(level + slope * x)))
        residual: Floats = w * (fraud - expected)
        variance = w * expected * (1.0 - expected)
        gradient = np.array([residual.sum(), (residual * x).sum()])
        cross = (variance * x).sum()
        hessian = np.array([[variance.sum(), cross], [cross, (variance * x * x).sum()]])
        try:
            step = np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:
            return None
        size = 1.0
        while size > SMALLEST_STEP:
            proposed = loss(level + size * step[0], slope + size * step[1])
            if proposed <= current:
                break
            size /= 2
        else:  # only rounding is left to gain
            break
        level, slope, current = level + size * step[0], slope + size * step[1], proposed
        # Half the squared Newton decrement is what is left to gain (Boyd & Vandenberghe 9.5).
        if gradient @ step < CONVERGED:
            break
    return Calibration(intercept=float(level - slope / scale * center), slope=float(slope / scale))


def calibration_in_the_large(label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """What has to be added to logit(probability) [N] so that as many frauds are expected as came; 0 is calibrated.

    The calibration intercept with the slope held at 1, as Van Calster et al. define it (see
    `calibration_slope`, whose own intercept is where the fitted line crosses even odds, far from most
    rows). None without a fraud or without an honest row. `weight` [N] counts a row that often.
    """
    fraud = as_labels(label)
    p = np.clip(as_probabilities(probability, len(fraud)), LOGIT_LIMIT, 1.0 - LOGIT_LIMIT)
    w = _as_weights(weight, len(fraud))
    if not w[fraud].any() or not w[~fraud].any():
        return None
    x, wanted = np.log(p) - np.log1p(-p), float(w[fraud].sum())
    low, high = -float(x.max()) - 40.0, -float(x.min()) + 40.0
    # monotone in what is added; halved until float64 cannot tell the ends apart
    while low < (middle := (low + high) / 2) < high:
        if (w * np.exp(-np.logaddexp(0.0, -(x + middle)))).sum() < wanted:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class CalibrationBin:
    """Rows of neighbouring probabilities: how many, what was said, what came."""

    count: int
    mean_probability: float
    observed_rate: float


def calibration_bins(
    label: ArrayLike, probability: ArrayLike, bins: int = 10, top: float | None = None
) -> tuple[CalibrationBin, ...]:
    """Rows [N] in at most `bins` bins of about equal mass, from the lowest probability up.

    `top`: only the highest share of the rows (0.01: one in a hundred), where frauds are and
    decisions fall. Equal probabilities always share a bin and are in or out of the top together;
    that can make bins fewer and unequal.
    """
    _require_positive(bins, "bins")
    fraud = as_labels(label)
    p = as_probabilities(probability, len(fraud))
    if not len(p):
        return ()
    order = np.argsort(p)
    if top is not None:
        _require_share(top, "top")
        rows = max(1, round(top * len(p)))
        order = order[np.searchsorted(p[order], p[order[-rows]]) :]
    ranked = p[order]
    inner = ranked[np.arange(1, bins) * len(ranked) // bins]
    start = np.unique(np.append(0, np.searchsorted(ranked, inner)))
    count = np.diff(np.append(start, len(ranked)))
    mean = np.add.reduceat(ranked, start) / count
    observed = np.add.reduceat(fraud[order].astype(np.float64), start) / count
    return tuple(
        CalibrationBin(int(n), float(said), float(came)) for n, said, came in zip(count, mean, observed, strict=True)
    )


def expected_calibration_error(
    label: ArrayLike, probability: ArrayLike, bins: int = 10, top: float | None = None
) -> float | None:
    """Mean over N rows of |mean probability - observed rate| of a row's bin in `calibration_bins`.

    Naeini et al., AAAI 2015, with bins of equal mass (Nixon et al., CVPR workshops 2019). Small for
    any constant where fraud is rare: read it with `calibration_slope` and `top`. None without rows.
    """
    parts = calibration_bins(label, probability, bins, top)
    if not parts:
        return None
    rows = sum(part.count for part in parts)
    return sum(p.count * abs(p.mean_probability - p.observed_rate) for p in parts) / rows


# --- Alerts ---------------------------------------------------------------------------------------


def card_precision_at_k(
    label: ArrayLike, score: ArrayLike, user: ArrayLike, day: ArrayLike, k: int = 100
) -> float | None:
    """Card precision@k over N rows: `card_precision_top_k` of the Fraud-Detection-Handbook.

    Days in order: drop users already detected; per user the highest score and label of the day; the
    k users of highest score; hits = frauds among them, divided by k even where a day has fewer
    users; hits are detected from then on. The mean over days. The handbook leaves ties at the k-th
    place to its sort; here the smaller user id goes first, which is blind to the label. None
    without rows.
    """
    _require_positive(k, "k")
    fraud = as_labels(label)
    scores = as_scores(score, len(fraud))
    users, user_count = _as_codes(user, len(fraud), "user")
    days, day_count = _as_codes(day, len(fraud), "day")
    if not len(fraud):
        return None
    pair, row_pair = np.unique(days * user_count + users, return_inverse=True)
    best = np.full(len(pair), -np.inf)
    np.maximum.at(best, row_pair, scores)
    is_fraud = np.bincount(row_pair, weights=fraud) > 0
    pair_day, pair_user = np.divmod(pair, user_count)
    order = np.lexsort((pair_user, -best, pair_day))
    first = np.searchsorted(pair_day, np.arange(day_count + 1))
    detected = np.zeros(user_count, dtype=np.bool_)
    hits = 0
    for d in range(day_count):
        of_day = order[first[d] : first[d + 1]]
        shown = of_day[~detected[pair_user[of_day]]][:k]
        found = pair_user[shown[is_fraud[shown]]]
        detected[found] = True
        hits += len(found)
    return hits / (k * day_count)


@dataclass(frozen=True)
class DailyShare:
    """A share under a daily alert budget."""

    mean: float
    """Mean over the days that define it."""
    total: float
    """The share over all days together."""
    days: int
    """How many days define it."""


def money_caught(
    label: ArrayLike,
    score: ArrayLike,
    amount: ArrayLike,
    day: ArrayLike,
    *,
    alerts_per_day: int | None = None,
    alert_share: float | None = None,
) -> DailyShare | None:
    """Share of a day's fraud amount that lies in the day's highest-scored rows, N rows in all.

    The budget of a day is `alerts_per_day` rows, or `alert_share` of the day's rows (rounded, at
    least one). Where ties straddle its end, each tied row counts with the probability of being
    picked at random. `mean` is over the days with fraud money, `total` over all money. Negative
    amounts count as 0. None without fraud money.
    """
    fraud = as_labels(label)
    lost = np.where(fraud, _as_money(amount, len(fraud)), 0.0)
    days, alerted = _alerted(len(fraud), score, day, alerts_per_day, alert_share)
    return _daily_share(days, lost * alerted, lost)


def precision_at_budget(
    label: ArrayLike,
    score: ArrayLike,
    day: ArrayLike,
    *,
    alerts_per_day: int | None = None,
    alert_share: float | None = None,
) -> DailyShare | None:
    """Share of frauds among a day's highest-scored rows, N rows in all.

    Budget and ties are those of `money_caught`. A day with fewer rows than its budget is divided by
    its rows. None without rows.
    """
    fraud = as_labels(label)
    days, alerted = _alerted(len(fraud), score, day, alerts_per_day, alert_share)
    return _daily_share(days, alerted * fraud, alerted)


def alerted(score: ArrayLike, day: ArrayLike, alert_share: float) -> Floats:
    """[N]: the probability of each row to be among its day's highest-scored `alert_share`; ties as in `money_caught`."""
    return _alerted(len(np.asarray(score)), score, day, None, alert_share)[1]


def _alerted(
    rows: int,
    score: ArrayLike,
    day: ArrayLike,
    alerts_per_day: int | None,
    alert_share: float | None,
) -> tuple[Codes, Floats]:
    """Day codes [N], and for each row [N] the probability that it is among its day's alerts."""
    scores = as_scores(score, rows)
    days, day_count = _as_codes(day, rows, "day")
    per_day = np.bincount(days, minlength=day_count)
    if alert_share is not None and alerts_per_day is None:
        _require_share(alert_share, "alert_share")
        budget = np.maximum(1, np.rint(alert_share * per_day).astype(np.intp))
    elif alerts_per_day is not None and alert_share is None:
        _require_positive(alerts_per_day, "alerts_per_day")
        budget = np.full(day_count, alerts_per_day)
    else:
        seen = f"alerts_per_day={alerts_per_day!r}, alert_share={alert_share!r}"
        _refuse("alert budget", seen, "exactly one of the two")
    order = np.lexsort((-scores, days))
    ranked, ranked_day = scores[order], days[order]
    is_start = np.ones(rows, dtype=np.bool_)
    is_start[1:] = (ranked[1:] != ranked[:-1]) | (ranked_day[1:] != ranked_day[:-1])
    tie_start = np.flatnonzero(is_start)
    tie_size = np.diff(np.append(tie_start, rows))
    tie_day = ranked_day[tie_start]
    before = tie_start - (np.cumsum(per_day) - per_day)[tie_day]
    taken = np.clip(budget[tie_day] - before, 0, tie_size)
    alerted = np.empty(rows)
    alerted[order] = np.repeat(taken / tie_size, tie_size)
    return days, alerted


def _daily_share(days: Codes, part: Floats, whole: Floats) -> DailyShare | None:
    part_of_day, whole_of_day = np.bincount(days, weights=part), np.bincount(days, weights=whole)
    defined = whole_of_day > 0
    if not defined.any():
        return None
    shares = part_of_day[defined] / whole_of_day[defined]
    total = part_of_day.sum() / whole_of_day.sum()
    return DailyShare(float(shares.mean()), float(total), int(defined.sum()))


# --- Shares ---------------------------------------------------------------------------------------


def wilson(hits: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a binomial share (Wilson 1927), which stays inside 0..1 and is honest for few rows."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = hits / count, Z95 * Z95
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # at the ends the formula gives the end itself, less a rounding
    return (0.0 if hits <= 0 else middle - half), (1.0 if hits >= count else middle + half)


# --- Bootstrap ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A figure on all rows and its percentile interval; `rounds` counts those that define it."""

    estimate: float
    low: float
    high: float
    level: float
    rounds: int


@dataclass(frozen=True)
class PairedDifference:
    """a - b on all rows and its percentile interval; `rounds` counts those that define it."""

    difference: float
    low: float
    high: float
    level: float
    rounds: int
    share_a_higher: float
    """Share of the rounds in which a was the higher, a tie counting half."""


def bootstrap_interval(
    metric: MetricName,
    label: ArrayLike,
    score: ArrayLike,
    group: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    rounds: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """Percentile bootstrap that resamples groups, not rows: the rows of one user hang together.

    Efron & Tibshirani, An Introduction to the Bootstrap (1993), ch. 13. `group` [N] names the group
    (user) of each row; a round draws as many groups as there are, with replacement, and weighs each
    row by how often its group was drawn. Same seed, same interval. `weight` [N] counts a row that often
    besides. None where the metric is undefined on all rows or in every round.
    """
    _require_bootstrap(metric, rounds, level)
    fraud = as_labels(label)
    groups, group_count = _as_codes(group, len(fraud), "group")
    figure = _grouped_metric(metric, fraud, score, "score", groups, group_count, _as_weights(weight, len(fraud)))
    estimate = figure(np.ones(group_count))
    if estimate is None:
        return None
    values = _resampled(figure, group_count, rounds, seed)
    if not len(values):
        return None
    low, high = _percentiles(values, level)
    return Interval(estimate, low, high, level, len(values))


def paired_bootstrap(
    metric: MetricName,
    label: ArrayLike,
    score_a: ArrayLike,
    score_b: ArrayLike,
    group: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    rounds: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference | None:
    """Interval of metric(a) - metric(b) on the same rows [N] and draws; see `bootstrap_interval`.

    For "brier" and "log_loss" lower is better: there a is better where the difference is negative. `weight` [N] counts a
    row that often.
    """
    _require_bootstrap(metric, rounds, level)
    fraud = as_labels(label)
    groups, group_count = _as_codes(group, len(fraud), "group")
    weights = _as_weights(weight, len(fraud))
    figure_a = _grouped_metric(metric, fraud, score_a, "score_a", groups, group_count, weights)
    figure_b = _grouped_metric(metric, fraud, score_b, "score_b", groups, group_count, weights)

    def difference(weight: Floats) -> float | None:
        a, b = figure_a(weight), figure_b(weight)
        return None if a is None or b is None else a - b

    estimate = difference(np.ones(group_count))
    if estimate is None:
        return None
    values = _resampled(difference, group_count, rounds, seed)
    return _paired(estimate, values, level) if len(values) else None


def bootstrap_figure(
    figure: Callable[[Floats], float | None],
    group: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    rounds: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """Interval of any figure that is a function of the weights of N rows; see `bootstrap_interval`.

    A difference of two figures is paired. None where it is undefined on all rows or in every round.
    """
    _require_positive(rounds, "rounds")
    rows = len(np.asarray(group))
    groups, group_count = _as_codes(group, rows, "group")
    own = _as_weights(weight, rows)
    estimate = figure(own)
    if estimate is None:
        return None
    values = _resampled(lambda drawn: figure(drawn[groups] * own), group_count, rounds, seed)
    return Interval(estimate, *_percentiles(values, level), level, len(values)) if len(values) else None


def bootstrap_sums(
    values: ArrayLike, group: ArrayLike, *, rounds: int = 200, seed: int = 0, level: float = 0.95
) -> list[Interval]:
    """Sums over N rows of each column of `values` [N, M], all on the same draws of groups; see `bootstrap_interval`.

    For differences give their rows as a column: then they are paired.
    """
    _require_positive(rounds, "rounds")
    columns = np.asarray(values, dtype=np.float64)
    groups, group_count = _as_codes(group, len(columns), "group")
    sums = np.stack([np.bincount(groups, weights=c, minlength=group_count) for c in columns.T], axis=1)
    drawn = _resampled(lambda weight: (weight[:, None] * sums).sum(axis=0), group_count, rounds, seed)
    return [
        Interval(float(sums[:, i].sum()), *_percentiles(drawn[:, i], level), level, rounds)
        for i in range(columns.shape[1])
    ]


@dataclass(frozen=True)
class Part:
    """One of several sets of rows whose figures are averaged, such as a fold; N differs between parts.

    `label` [N]; `group` [N], a group may have rows in several parts; `scores` by model, one or more
    [N] each (such as one per seed), whose figures are averaged too.
    """

    label: ArrayLike
    group: ArrayLike
    scores: Mapping[str, Sequence[ArrayLike]]


@dataclass(frozen=True)
class MeanFigures:
    """Means over parts: of each model, and of the first model minus each other one."""

    of: dict[str, Interval]
    first_minus: dict[str, PairedDifference]


def bootstrap_means(
    metric: MetricName,
    parts: Sequence[Part],
    *,
    rounds: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> MeanFigures | None:
    """Intervals of the mean of a metric over parts, all models on the same draws; see `bootstrap_interval`.

    A round draws groups once for all parts: a group's rows in every part come equally often, since
    what is unusual about a user is so in each of them. All parts have the same models. None where
    the metric is undefined on some part or in every round.
    """
    _require_bootstrap(metric, rounds, level)
    names = list(parts[0].scores) if parts else []
    if not names:
        _refuse("parts", "no scores", "at least one part with the scores of at least one model")
    for part in parts:
        if set(part.scores) != set(names) or not all(map(len, part.scores.values())):
            _refuse("parts", f"scores of {list(part.scores)}", f"one or more of each of {names}")
    lengths = [len(np.asarray(part.group)) for part in parts]
    every_group = np.concatenate([np.asarray(part.group) for part in parts])
    codes, group_count = _as_codes(every_group, len(every_group), "group")
    figures: dict[str, list[list[Callable[[Floats], float | None]]]] = {name: [] for name in names}
    for part, groups in zip(parts, np.split(codes, np.cumsum(lengths)[:-1]), strict=True):
        fraud = as_labels(part.label)
        _require_rows(groups, len(fraud), "group")
        own = np.ones(len(fraud))
        for name in names:
            figures[name].append(
                [_grouped_metric(metric, fraud, score, name, groups, group_count, own) for score in part.scores[name]]
            )

    def means(weight: Floats) -> Floats | None:
        out = np.zeros(len(names))
        for i, name in enumerate(names):
            for of_part in figures[name]:
                values = [figure(weight) for figure in of_part]
                defined = [value for value in values if value is not None]
                if len(defined) < len(values):
                    return None
                out[i] += sum(defined) / (len(values) * len(parts))
        return out

    estimate = means(np.ones(group_count))
    if estimate is None:
        return None
    drawn = _resampled(means, group_count, rounds, seed)
    if not len(drawn):
        return None
    of = {
        name: Interval(float(estimate[i]), *_percentiles(drawn[:, i], level), level, len(drawn))
        for i, name in enumerate(names)
    }
    first_minus = {
        name: _paired(float(estimate[0] - estimate[i]), drawn[:, 0] - drawn[:, i], level)
        for i, name in enumerate(names)
        if i
    }
    return MeanFigures(of, first_minus)


def _paired(estimate: float, values: Floats, level: float) -> PairedDifference:
    low, high = _percentiles(values, level)
    higher = (values > 0).mean() + 0.5 * (values == 0).mean()
    return PairedDifference(estimate, low, high, level, len(values), float(higher))


def _require_bootstrap(metric: str, rounds: int, level: float) -> None:
    if metric not in get_args(MetricName):
        _refuse("metric", repr(metric), f"one of {', '.join(get_args(MetricName))}")
    _require_positive(rounds, "rounds")
    if not 0 < level < 1:
        _refuse("level", repr(level), "a share strictly between 0 and 1")


def _resampled(figure: Callable[[Floats], float | Floats | None], group_count: int, rounds: int, seed: int) -> Floats:
    """The figure or figures under resampled group weights, one row for each round that defines them."""
    random = np.random.default_rng(seed)
    values = []
    for _ in range(rounds):
        drawn = random.integers(0, group_count, group_count)
        value = figure(np.bincount(drawn, minlength=group_count).astype(np.float64))
        if value is not None:
            values.append(value)
    return np.array(values)


def _percentiles(values: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _grouped_metric(
    metric: MetricName,
    fraud: Mask,
    score: ArrayLike,
    field: str,
    groups: Codes,
    group_count: int,
    own: Floats,
) -> Callable[[Floats], float | None]:
    """The metric as a function of weights per group [G], times each row's own [N]; what needs no weights is done once."""
    if metric == "brier" or metric == "log_loss":
        losses = _brier_losses if metric == "brier" else _log_losses
        per_row = losses(fraud, as_probabilities(score, len(fraud), field))
        loss_of_group = np.bincount(groups, weights=own * per_row, minlength=group_count)
        rows_of_group = np.bincount(groups, weights=own, minlength=group_count)

        def mean_loss(weight: Floats) -> float | None:
            rows = (rows_of_group * weight).sum()
            return float((loss_of_group * weight).sum() / rows) if rows else None

        return mean_loss

    ranking = _Ranking(fraud, as_scores(score, len(fraud), field))
    ranked_group, ranked_own = groups[ranking.order], own[ranking.order]

    def ranked(weight: Floats) -> float | None:
        curve = ranking.curve(weight[ranked_group] * ranked_own)
        if metric == "average_precision":
            return _average_precision(curve)
        return _roc_auc(curve) if metric == "roc_auc" else _recall_at_fpr(curve, 0.01)

    return ranked


def calibration_intervals(
    label: ArrayLike, probability: ArrayLike, group: ArrayLike, weight: ArrayLike | None = None
) -> tuple[Interval, Interval] | None:
    """95 % intervals of the calibration in the large and of the calibration slope, over N rows.

    Of the estimating equations of both at their solution, with the variance of their sums over groups (Liang & Zeger,
    Biometrika 73 (1986)): rows of one group hang together. `weight` [N] counts a row that often. None where either is
    undefined.
    """
    fraud = as_labels(label)
    weights = _as_weights(weight, len(fraud))
    kept = weights > 0
    fraud, weights = fraud[kept], weights[kept]
    p = np.clip(as_probabilities(probability, len(kept))[kept], LOGIT_LIMIT, 1.0 - LOGIT_LIMIT)
    groups, count = _as_codes(np.asarray(group)[kept], len(fraud), "group")
    x = np.log(p) - np.log1p(-p)
    fitted = calibration_slope(fraud, p, weights)
    shift = calibration_in_the_large(fraud, p, weights)
    if fitted is None or shift is None or count < 2:
        return None

    def interval(columns: Floats, z: Floats, estimate: float) -> Interval:
        """Of the last coefficient; `columns` [N, P] are the regressors and z [N] the fitted logit."""
        expected = np.exp(-np.logaddexp(0.0, -z))
        residual = weights * (fraud - expected)
        variance = weights * expected * (1.0 - expected)
        bread = np.linalg.inv((columns[:, :, None] * columns[:, None, :] * variance[:, None, None]).sum(axis=0))
        sums = np.stack([np.bincount(groups, weights=c * residual, minlength=count) for c in columns.T], axis=1)
        meat = (sums[:, :, None] * sums[:, None, :]).sum(axis=0) * count / (count - 1)
        spread = Z95 * math.sqrt((bread @ meat @ bread)[-1, -1])
        return Interval(estimate, estimate - spread, estimate + spread, 0.95, 0)

    ones = np.ones((len(x), 1))
    # the slope's regressor is centred, or the matrices are close to singular
    both = np.column_stack([ones[:, 0], x - x.mean()])
    return (
        interval(ones, x + shift, shift),
        interval(both, fitted.intercept + fitted.slope * x, fitted.slope),
    )


# --- All of it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """The figures of a report; None where the rows, or the columns given, do not define one."""

    rows: int
    frauds: int
    average_precision: float | None
    roc_auc: float | None
    recall_at_1pct_fpr: float | None
    log_loss: float | None
    brier: float | None
    calibration_slope: float | None
    calibration_intercept: float | None
    card_precision_at_100: float | None
    """Needs users and times."""
    alerts_per_day: int | None
    """The budget of the figures below; one of the two is set."""
    alert_share: float | None
    precision_at_budget: float | None
    """Mean over days; needs times."""
    money_caught: float | None
    """Share of a day's fraud amount in its alerts, mean over days; needs times and amounts."""
    money_caught_total: float | None
    """The same over the money of all days."""

    def as_dict(self) -> dict[str, int | float | None]:
        """Field names and figures, ready for JSON."""
        return asdict(self)


def measure_quality(
    label: ArrayLike,
    probability: ArrayLike,
    *,
    user: ArrayLike | None = None,
    time_ms: ArrayLike | None = None,
    amount: ArrayLike | None = None,
    alerts_per_day: int | None = None,
    alert_share: float | None = None,
) -> Quality:
    """Every figure that N rows define.

    Days are UTC days of `time_ms` (milliseconds since the epoch). The alert budget is
    `alerts_per_day` or `alert_share`, 100 a day where neither is given.
    """
    if alerts_per_day is None and alert_share is None:
        alerts_per_day = 100
    fraud = as_labels(label)
    p = as_probabilities(probability, len(fraud))
    ranking = _Ranking(fraud, p)
    curve = ranking.curve(np.ones(len(fraud)))
    calibration = calibration_slope(fraud, p)
    card_precision = precision = money = None
    if time_ms is not None:
        day = _utc_day(time_ms, len(fraud))
        precision = precision_at_budget(fraud, p, day, alerts_per_day=alerts_per_day, alert_share=alert_share)
        if user is not None:
            card_precision = card_precision_at_k(fraud, p, user, day, k=100)
        if amount is not None:
            money = money_caught(fraud, p, amount, day, alerts_per_day=alerts_per_day, alert_share=alert_share)
    return Quality(
        rows=len(fraud),
        frauds=int(fraud.sum()),
        average_precision=_average_precision(curve),
        roc_auc=_roc_auc(curve),
        recall_at_1pct_fpr=_recall_at_fpr(curve, 0.01),
        log_loss=log_loss(fraud, p),
        brier=brier(fraud, p),
        calibration_slope=calibration.slope if calibration else None,
        calibration_intercept=calibration.intercept if calibration else None,
        card_precision_at_100=card_precision,
        alerts_per_day=alerts_per_day,
        alert_share=alert_share,
        precision_at_budget=precision.mean if precision else None,
        money_caught=money.mean if money else None,
        money_caught_total=money.total if money else None,
    )


def _utc_day(time_ms: ArrayLike, rows: int) -> NDArray[np.int64]:
    values = np.asarray(time_ms)
    _require_rows(values, rows, "time_ms")
    if values.dtype.kind not in "iu":
        _refuse("time_ms", f"values of type {values.dtype}", "integer milliseconds since the epoch")
    return values.astype(np.int64, copy=False) // DAY_MS
