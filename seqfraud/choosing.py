"""How a policy is chosen from validation rows; never from test rows, whose figures it would flatter."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqfraud.config import DecisionConfig
from seqfraud.errors import ConfigError, DataError
from seqfraud.metrics import Floats, Mask, as_labels, as_probabilities, bootstrap_sums
from seqfraud.policy import MOST_MONEY, NEVER, Costs, Policy, Thresholds

DECLINE_PRECISION = 0.9
MINIMUM_DECLINES = 20
"""A precision on fewer rows is not relied on."""
MARGINS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Tried on the validation days where the configuration gives no margin."""


@dataclass(frozen=True)
class ScoredDays:
    """N scored transactions of some days.

    Attributes:
        label: int8 [N], 1 fraud, 0 honest, -1 unknown.
        probability: float64 [N].
        amount: float64 [N], NaN where missing; None where no amount is declared.
        day: int64 [N], days since the first began.
        user: codes [N].
        days: how many there are, the last perhaps in part.
        share: of the days' transactions that are among the N.
    """

    label: NDArray[np.int8]
    probability: Floats
    amount: Floats | None
    day: NDArray[np.int64]
    user: NDArray[np.int32]
    days: float
    share: float = 1.0

    @property
    def fraud(self) -> Mask:
        """Mask [N] of the known frauds."""
        fraud: Mask = self.label == 1
        return fraud

    @property
    def known(self) -> Mask:
        """Mask [N] of the rows with a label."""
        known: Mask = self.label >= 0
        return known

    def money(self) -> Floats:
        """Amounts [N], 0 where missing, negative or not declared."""
        return np.zeros(len(self.label)) if self.amount is None else np.maximum(np.nan_to_num(self.amount), 0.0)

    def costs(self, policy: Policy, prices: Costs) -> Floats:
        """What the policy's decisions come to [N]; 0 for rows without a label."""
        decisions = policy.decide_many(self.probability, self.amount)
        cost: Floats = prices.of(self.fraud, self.money(), decisions).sum(axis=0) * self.known
        return cost


@dataclass(frozen=True)
class Tried:
    """A setting that was measured on the validation days, a figure per day."""

    setting: str
    per_day: float
    chosen: bool


@dataclass(frozen=True)
class Choice:
    """A policy, and between what it was chosen where the configuration left that open."""

    policy: Policy
    measured: str = ""
    """What the figures of `tried` are."""
    tried: tuple[Tried, ...] = ()


def prices(settings: DecisionConfig, amounts: bool = True) -> Costs:
    """The costs that a configuration names. Those it does not are 0, and reviews find every fraud; a fraud costs its amount,
    or 1 where no amounts are declared."""
    given = {name: value for name in Costs.__dataclass_fields__ if (value := getattr(settings, name)) is not None}
    return Costs(**{"review_cost": 0.0, "fraud_cost": 0.0 if amounts else 1.0, **given})


def choose_policy(settings: DecisionConfig, rows: ScoredDays) -> Choice:
    """The policy of a configuration from the rows of the validation days. Raises DataError where there is no fraud."""
    choice = _chosen(settings, rows)
    return replace(choice, policy=replace(choice.policy, control_share=settings.control_share))


def _chosen(settings: DecisionConfig, rows: ScoredDays) -> Choice:
    precision = DECLINE_PRECISION if settings.decline_precision is None else settings.decline_precision
    if settings.by == "cost":
        return _by_cost(settings, rows)
    if settings.by == "thresholds":
        thresholds = choose_thresholds(
            rows.label[rows.known],
            rows.probability[rows.known],
            decline_precision=precision,
            alert_share=settings.alert_share,
            review=settings.review,
            decline=settings.decline,
        )
        return Choice(Policy(thresholds))
    assert settings.alerts_per_day is not None  # the configuration was checked
    limits = Declines(settings.decline, settings.declines_per_day, precision)
    ranked = {rank: budget(rows, settings.alerts_per_day, limits, money=rank == "money") for rank in _ranks(rows)}
    if settings.rank is not None:
        return Choice(ranked[settings.rank])
    caught = {rank: _caught(rows, policy) for rank, policy in ranked.items()}
    best = max(caught, key=lambda rank: caught[rank])
    tried = tuple(Tried(f'rank = "{rank}"', figure, rank == best) for rank, figure in caught.items())
    return Choice(ranked[best], "fraud money in the alerts a day", tried)


def alternatives(settings: DecisionConfig, rows: ScoredDays, policy: Policy) -> dict[str, Policy]:
    """Policies to compare one with, by what they are, each chosen on the same rows.

    The budgets have the alerts and declines a day that the policy has on these rows; flat thresholds and expected cost are
    the cheapest by the configuration's costs, and only there where it names some. Those that decide as the policy does, or
    as one before them, are left out.
    """
    decisions = policy.decide_many(rows.probability, rows.amount)
    alerts, declines = (float((decisions >= code).sum()) / rows.days / rows.share for code in (1, 2))
    found: dict[str, Policy] = {}
    if settings.review_cost is not None:
        costs = prices(settings, rows.amount is not None)
        found["flat thresholds of least cost"] = Policy(cheapest_thresholds(rows, costs))
        if rows.amount is not None and costs.insult_cost + costs.insult_share > 0 and costs.review_cost > 0:
            found["expected cost"] = _by_cost(settings, rows).policy
    if alerts > 0:
        limits = Declines(declines_per_day=declines)
        words = {"probability": "alert budget by probability", "money": "alert budget by expected loss"}
        found |= {words[rank]: budget(rows, alerts, limits, money=rank == "money") for rank in _ranks(rows)}
    seen, out = [decisions], {}
    for name, other in found.items():
        codes = other.decide_many(rows.probability, rows.amount)
        if not any(np.array_equal(codes, before) for before in seen):
            out[name] = other
            seen.append(codes)
    return out


def _ranks(rows: ScoredDays) -> tuple[str, ...]:
    return ("probability",) if rows.amount is None else ("probability", "money")


def _caught(rows: ScoredDays, policy: Policy) -> float:
    """Fraud money a day that is not approved; of frauds, without amounts."""
    alerted = policy.decide_many(rows.probability, rows.amount) > 0
    worth = np.ones(len(rows.label)) if rows.amount is None else rows.money()
    return float(worth[alerted & rows.fraud].sum()) / rows.days


# --- Thresholds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cuts:
    """The D ways to cut rows between distinct probabilities, from the fewest alerts to all rows."""

    threshold: Floats
    """Where to cut so that a cut's alerts are the rows at or above it [D]."""
    lowest: Floats
    """The lowest probability at or above the cut [D]."""
    alerts: NDArray[np.int64]
    """Rows at or above the cut [D]."""
    known: NDArray[np.int64]
    """Those of them that have a label [D]."""
    frauds: NDArray[np.int64]
    """Frauds among them [D]."""
    ends_in_fraud: Mask
    """Whether the lowest probability above the cut belongs to a fraud [D]."""

    def is_fraud(self) -> tuple[int, float]:
        """The cut of the best F1, with the fewest alerts among equals, and its threshold."""
        best = int(np.argmax(2 * self.frauds / (self.known + self.frauds[-1])))
        return best, float(self.threshold[best])


def _cuts(rows_known: Mask, fraud: Mask, probability: Floats) -> _Cuts:
    if not fraud.any():
        raise DataError(
            f"label: seen no fraud in {int(rows_known.sum())} validation rows; expected at least one to "
            "choose thresholds by: lengthen [split] validation"
        )
    distinct, code, count = np.unique(probability, return_inverse=True, return_counts=True)
    frauds_at = np.bincount(code[fraud], minlength=len(distinct))
    return _Cuts(
        _between(distinct)[::-1],
        distinct[::-1],
        np.cumsum(count[::-1]),
        np.cumsum(np.bincount(code[rows_known], minlength=len(distinct))[::-1]),
        np.cumsum(frauds_at[::-1]),
        frauds_at[::-1] > 0,
    )


def _between(distinct: Floats) -> Floats:
    """Where to cut below each of some ascending numbers [D]: midway to the next lower one, 0 below the lowest."""
    below = np.append(0.0, distinct[:-1])
    middle = below + (distinct - below) / 2
    # Between neighbouring floats there is no middle; rounded down it would take in the lower row.
    cut: Floats = np.where(middle > below, middle, distinct)
    return cut


def choose_thresholds(
    label: ArrayLike,
    probability: ArrayLike,
    *,
    decline_precision: float = DECLINE_PRECISION,
    alert_share: float | None = None,
    review: float | None = None,
    decline: float | None = None,
    minimum_declines: int = MINIMUM_DECLINES,
) -> Thresholds:
    """Thresholds from N labelled validation rows.

    `is_fraud` has the best F1, with the fewest alerts among equals.

    `review` is the same, unless it is given. Given `alert_share` it is the cut that comes nearest to that share of the
    rows (review and decline together, at least one row); NEVER where even the first tied block is
    so large that no alert at all comes nearer.

    `decline` is, unless given, the lowest probability of a fraud, at or above `review`, such that of the rows from
    there up at least `decline_precision` are frauds and there are at least `minimum_declines`;
    NEVER where none is. Going on below a fraud would only decline more honest rows. Given without `review`, it is the
    upper limit of that.

    Each threshold that is chosen lies midway between the lowest probability that it takes in and the next lower
    one (0 below the lowest), so that float noise between machines flips no row where the gap
    permits.
    """
    _require_setting("decision.decline_precision", decline_precision)
    if alert_share is not None:
        _require_setting("decision.alert_share", alert_share)
    if minimum_declines < 1:
        raise ConfigError(f"minimum_declines: seen {minimum_declines!r}; expected at least 1")
    fraud = as_labels(label)
    p = as_probabilities(probability, len(fraud))
    cuts = _cuts(np.ones(len(p), dtype=np.bool_), fraud, p)
    best, is_fraud = cuts.is_fraud()
    if review is not None:
        last = int((cuts.lowest >= review).sum()) - 1
    else:
        nearest = best if alert_share is None else _nearest_cut(cuts, max(1.0, alert_share * len(p)))
        last = -1 if nearest is None else nearest
        review = NEVER if last < 0 else float(cuts.threshold[last])
        review = review if decline is None else min(review, decline)
    if decline is None:
        strict = _strict_cut(cuts, last, decline_precision, minimum_declines)
        decline = NEVER if strict is None else max(review, float(cuts.threshold[strict]))
    return Thresholds(is_fraud, review, decline)


def _strict_cut(cuts: _Cuts, last: int, precision: float, minimum: int) -> int | None:
    """The widest cut up to `last` that ends in a fraud, has the precision and at least so many labelled rows."""
    known, frauds = cuts.known[: last + 1], cuts.frauds[: last + 1]
    strict = np.flatnonzero(
        (frauds / np.maximum(known, 1) >= precision) & (known >= minimum) & cuts.ends_in_fraud[: last + 1]
    )
    return int(strict[-1]) if len(strict) else None


def _nearest_cut(cuts: _Cuts, alerts: float) -> int | None:
    """The cut with a number of alerts nearest to `alerts`; None where no alert at all is nearer."""
    distance = np.abs(cuts.alerts - alerts)
    nearest = int(np.argmin(distance))
    return nearest if distance[nearest] < alerts else None


def _require_setting(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{name}: seen {value!r}; expected a share above 0 and up to 1")


# --- A budget -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Declines:
    """Which alerts of a budget are declined: from a probability, so many a day, or those of a precision."""

    decline: float | None = None
    declines_per_day: float | None = None
    precision: float = DECLINE_PRECISION


def budget(rows: ScoredDays, alerts_per_day: float, declines: Declines, money: bool) -> Policy:
    """The policy whose mean number of alerts a day, declines included, is nearest to a budget on these rows.

    The alerts are the highest probabilities; with `money` those that are declined, which the probability says, and then
    the highest expected losses, probability times amount. Of all ways to look at so many transactions that one saves the
    most money, if the probabilities are right: what a review saves is in proportion to the expected loss, and each costs
    one place (a knapsack of equal weights).
    """
    known, fraud = rows.known, rows.fraud
    cuts = _cuts(known, fraud, as_probabilities(rows.probability, len(rows.label)))
    _, is_fraud = cuts.is_fraud()
    total = alerts_per_day * rows.days * rows.share
    last = _nearest_cut(cuts, max(1.0, total))
    if last is None:
        thresholds = Thresholds(is_fraud, NEVER, NEVER)
    else:
        review = float(cuts.threshold[last])
        if declines.decline is not None:
            decline = declines.decline
        else:
            if declines.declines_per_day is None:
                strict = _strict_cut(cuts, last, declines.precision, MINIMUM_DECLINES)
            else:
                strict = _nearest_cut(cuts, declines.declines_per_day * rows.days * rows.share)
            decline = NEVER if strict is None else float(cuts.threshold[strict])
        thresholds = Thresholds(is_fraud, review, max(review, decline))
    return Policy(thresholds, review_loss=_loss_cut(rows, thresholds, total) if money else None)


def _loss_cut(rows: ScoredDays, thresholds: Thresholds, total: float) -> float:
    """The expected loss from which so many rows are alerts that with those which the probability alone decides there are
    nearest to `total`."""
    assert rows.amount is not None
    p, missing = rows.probability, np.isnan(rows.amount)
    settled = (p >= thresholds.decline) | (missing & (p >= thresholds.review))
    loss = (p * rows.money())[~settled & ~missing]
    distinct, count = np.unique(loss[loss > 0], return_counts=True)
    if not len(distinct):
        return MOST_MONEY
    # from none of them, at twice the highest, to all
    threshold = np.append(2 * distinct[-1], _between(distinct)[::-1])
    alerts = settled.sum() + np.append(0, np.cumsum(count[::-1]))
    return min(float(threshold[np.argmin(np.abs(alerts - total))]), MOST_MONEY)


# --- Expected cost --------------------------------------------------------------------------------


def _by_cost(settings: DecisionConfig, rows: ScoredDays) -> Choice:
    """By the configuration's costs, and the margin that costs least on these rows.

    With right probabilities no margin but 1 can be expected to cost less. Another is chosen only where it did so beyond
    chance (95 % interval of the difference, by user), so that a few lucky frauds do not choose.
    """
    costs = prices(settings)
    thresholds = cheapest_thresholds(rows, costs)
    if settings.margin is not None:
        return Choice(Policy(thresholds, costs=costs))
    policies = {margin: Policy(thresholds, costs=replace(costs, margin=margin)) for margin in MARGINS}
    per_row = {margin: rows.costs(policy, costs) for margin, policy in policies.items()}
    gains = bootstrap_sums(np.stack([per_row[1.0] - per_row[margin] for margin in MARGINS], axis=1), rows.user)
    sure = {margin: gain.estimate for margin, gain in zip(MARGINS, gains, strict=True) if gain.low > 0}
    best = max(sure, key=lambda margin: sure[margin]) if sure else 1.0
    tried = tuple(Tried(f"margin = {m:g}", float(per_row[m].sum()) / rows.days, m == best) for m in MARGINS)
    return Choice(policies[best], "cost a day", tried)


def cheapest_thresholds(rows: ScoredDays, costs: Costs) -> Thresholds:
    """The flat thresholds that cost least on these rows, with the fewest alerts among equals; `is_fraud` by F1.

    The sum over rows splits into one term for each of the two cuts, so that one pass over each finds the best pair.
    """
    known = rows.known
    fraud, p, money = (
        rows.fraud[known],
        as_probabilities(rows.probability[known], int(known.sum())),
        rows.money()[known],
    )
    cuts = _cuts(np.ones(len(p), dtype=np.bool_), fraud, p)
    _, is_fraud = cuts.is_fraud()
    order = np.argsort(-p, kind="stable")
    at = np.append(0, cuts.alerts)
    approve, review, decline = (
        np.append(0.0, np.cumsum(costs.of(fraud, money, np.full(len(p), code, np.uint8)).sum(axis=0)[order]))[at]
        for code in range(3)
    )
    strict, mild = decline - review, review - approve
    least = np.minimum.accumulate(strict)
    last = int(np.argmin(least + mild))
    first = int(np.argmin(strict[: last + 1]))
    threshold = np.append(NEVER, cuts.threshold)
    return Thresholds(is_fraud, float(threshold[last]), float(threshold[first]))
