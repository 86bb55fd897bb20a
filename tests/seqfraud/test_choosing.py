"""Thresholds against a search over every cut; budgets and costs against counting."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from seqfraud.choosing import (
    MARGINS,
    Declines,
    ScoredDays,
    alternatives,
    budget,
    cheapest_thresholds,
    choose_policy,
    choose_thresholds,
    prices,
)
from seqfraud.config import DecisionConfig
from seqfraud.errors import ConfigError, DataError
from seqfraud.policy import DECISIONS, NEVER, Costs, Policy, Thresholds, flag_many

Array = NDArray[Any]


def validation_rows(seed: int, rows: int = 4000) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    label = random.random(rows) < 0.08
    return label, 1 / (1 + np.exp(-(random.normal(size=rows) + 4 * label - 4)))


# --- Choosing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_is_fraud_has_the_best_f1_of_all_thresholds(seed: int) -> None:
    label, p = validation_rows(seed, rows=800)
    chosen = choose_thresholds(label, p)

    def f1(threshold: float) -> float:
        alert = p >= threshold
        return float(2 * (alert & label).sum() / (alert.sum() + label.sum()))

    assert f1(chosen.is_fraud) == pytest.approx(max(f1(threshold) for threshold in p))
    assert chosen.review == chosen.is_fraud


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 1.0])
def test_review_takes_the_alert_share_whatever_is_fraud_is(share: float) -> None:
    label, p = validation_rows(1)
    chosen = choose_thresholds(label, p, alert_share=share)
    assert (p >= chosen.review).sum() == round(share * len(p))
    assert chosen.is_fraud == choose_thresholds(label, p).is_fraud


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("share", [None, 0.02, 0.2])
def test_decline_is_the_lowest_fraud_that_keeps_the_precision(precision: float, share: float | None) -> None:
    label, p = validation_rows(2)
    chosen = choose_thresholds(label, p, decline_precision=precision, alert_share=share)
    allowed = [
        cut
        for cut in p[label]
        if cut >= chosen.review and label[p >= cut].mean() >= precision and (p >= cut).sum() >= 20
    ]
    assert allowed
    assert np.array_equal(p >= chosen.decline, p >= min(allowed))


def test_decline_is_never_without_enough_alerts_or_precision() -> None:
    label, p = validation_rows(3)
    assert choose_thresholds(label, p, minimum_declines=2000).decline == NEVER
    few = np.arange(100) >= 90  # ten frauds, all on top: precise, but too few to rely on
    score = np.arange(100) / 100
    assert choose_thresholds(few, score).decline == NEVER
    assert choose_thresholds(few, score, minimum_declines=10).decline == pytest.approx(0.895)
    assert choose_thresholds(~few, score, decline_precision=0.95).decline == NEVER


def test_thresholds_lie_midway_so_that_noise_flips_no_row() -> None:
    label = np.array([0] * 50 + [1] * 30)
    p = np.concatenate([np.linspace(0.01, 0.2, 50), np.linspace(0.6, 0.9, 30)])
    chosen = choose_thresholds(label, p)
    assert list(chosen.as_dict().values()) == pytest.approx([0.4] * 3)
    noise = np.random.default_rng(4).uniform(-1e-6, 1e-6, 80)
    assert np.array_equal(Policy(chosen).decide_many(p + noise, None), Policy(chosen).decide_many(p, None))


def test_between_neighbouring_floats_the_threshold_takes_in_the_upper_only() -> None:
    upper = 0.75
    lower = float(np.nextafter(upper, 0))
    chosen = choose_thresholds([0, 1], [lower, upper])
    assert chosen.is_fraud == upper


def test_certain_frauds_beyond_the_alert_share_are_reviewed_all_the_same() -> None:
    # A saturated model: 30 scores of exactly 1, a budget of 20. To look at none would be absurd.
    p = np.append(np.linspace(0, 0.5, 970), np.ones(30))
    chosen = choose_thresholds(p == 1, p, alert_share=0.02)
    assert (p >= chosen.review).sum() == 30


def test_a_model_that_says_the_same_of_all_alerts_nobody_within_a_share() -> None:
    label = np.arange(1000) < 10
    chosen = choose_thresholds(label, np.full(1000, 0.01), alert_share=0.01)
    assert (chosen.review, chosen.decline) == (NEVER, NEVER)


@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.bool_, n),
            hnp.arrays(np.float32, n, elements=st.floats(0, 1, width=32)),
        )
    ),
    st.none() | st.floats(0.01, 1),
    st.floats(0.1, 1),
)
def test_any_rows_with_fraud_give_valid_thresholds(
    rows: tuple[Array, Array], share: float | None, precision: float
) -> None:
    label, p = rows
    label[0] = True
    chosen = choose_thresholds(label, p, alert_share=share, decline_precision=precision, minimum_declines=2)
    assert Thresholds.from_dict(chosen.as_dict()) == chosen
    declined = Policy(chosen).decide_many(p, None) == DECISIONS.index("decline")
    if chosen.decline != NEVER:
        assert declined.sum() >= 2 and label[declined].mean() >= precision
    assert flag_many(p, chosen).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decline_precision": 0.0}, "decision.decline_precision: seen 0.0; expected a share"),
        ({"alert_share": 1.5}, "decision.alert_share: seen 1.5; expected a share above 0 and up"),
        ({"minimum_declines": 0}, "minimum_declines: seen 0; expected at least 1"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_thresholds([0, 1], [0.1, 0.9], **settings)


def test_without_fraud_there_is_nothing_to_choose_by() -> None:
    with pytest.raises(DataError, match=r"no fraud in 2 validation rows.*lengthen \[split\]"):
        choose_thresholds([0, 0], [0.1, 0.9])
    with pytest.raises(DataError, match="probability: seen nan"):
        choose_thresholds([0, 1], [0.1, np.nan])


def test_thresholds_that_are_given_stay_as_they_are() -> None:
    label, p = validation_rows(5)
    chosen = choose_thresholds(label, p)
    both = choose_thresholds(label, p, review=0.3, decline=0.9)
    assert both == Thresholds(chosen.is_fraud, 0.3, 0.9)
    assert choose_thresholds(label, p, review=0.3).decline == choose_thresholds(label, p, review=0.3001).decline
    low = choose_thresholds(label, p, decline=chosen.review / 2)
    assert (low.review, low.decline) == (chosen.review / 2, chosen.review / 2)
    none = choose_thresholds(label, p, review=1.0)
    assert (none.review, none.decline) == (1.0, NEVER)


@pytest.mark.parametrize("review", [0.1, 0.6])
def test_declines_are_chosen_among_the_alerts_of_a_given_review(review: float) -> None:
    label, p = validation_rows(2)
    chosen = choose_thresholds(label, p, review=review, decline_precision=0.8)
    allowed = [cut for cut in p[label] if cut >= review and label[p >= cut].mean() >= 0.8 and (p >= cut).sum() >= 20]
    assert np.array_equal(p >= chosen.decline, p >= min(allowed))


# --- Days ---------------------------------------------------------------------------------------------------------


def scored_days(seed: int = 0, rows: int = 6000, trust: float = 1.0, **changes: Any) -> ScoredDays:
    """Ten days whose probabilities are right (to the power of `trust` in the odds); amounts say nothing of fraud."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-4, 2, rows)
    label = (rng.random(rows) < 1 / (1 + np.exp(-odds))).astype(np.int8)
    made: dict[str, Any] = {
        "label": label,
        "probability": 1 / (1 + np.exp(-trust * odds)),
        "amount": rng.lognormal(3, 1.3, rows),
        "day": np.sort(rng.integers(0, 10, rows)),
        "user": rng.integers(0, 500, rows).astype(np.int32),
        "days": 10.0,
    }
    return ScoredDays(**{**made, **changes})


def decided(rows: ScoredDays, policy: Policy) -> Array:
    return policy.decide_many(rows.probability, rows.amount)


@pytest.mark.parametrize("money", [False, True])
@pytest.mark.parametrize("alerts", [1.0, 12.3, 100.0, 600.0])
def test_a_budget_is_met_on_the_validation_days(alerts: float, money: bool) -> None:
    rows = scored_days()
    for declines in (
        Declines(),
        Declines(decline=0.5),
        Declines(declines_per_day=0.4 * alerts),
        Declines(decline=0.01),
    ):
        codes = decided(rows, budget(rows, alerts, declines, money))
        assert (codes > 0).sum() == round(10 * alerts), declines
        if declines.declines_per_day is not None:
            assert (codes == 2).sum() == round(10 * 0.4 * alerts)
        elif declines.decline is None and (codes == 2).any():
            assert rows.fraud[codes == 2].mean() >= 0.9


def test_alerts_without_a_label_count_too_and_rows_that_were_not_scored_by_their_share() -> None:
    rows = scored_days()
    hidden = rows.label.copy()
    hidden[::3] = -1
    policy = budget(scored_days(label=hidden), 50.0, Declines(), money=True)
    assert (decided(rows, policy) > 0).sum() == 500
    half = budget(scored_days(share=0.5), 50.0, Declines(), money=False)
    assert (decided(rows, half) > 0).sum() == 250


def test_by_money_no_other_choice_of_reviews_promises_more() -> None:
    rows = scored_days()
    policy = budget(rows, 60.0, Declines(declines_per_day=10.0), money=True)
    codes = decided(rows, policy)
    promised = rows.probability * rows.money()
    assert promised[codes == 1].min() >= promised[codes == 0].max()
    assert rows.probability[codes == 2].min() >= rows.probability[codes < 2].max()
    by_probability = decided(rows, budget(rows, 60.0, Declines(declines_per_day=10.0), money=False))
    assert promised[codes > 0].sum() > promised[by_probability > 0].sum()
    assert rows.fraud[by_probability > 0].sum() > rows.fraud[codes > 0].sum()


def test_amounts_that_are_missing_are_alerts_by_their_probability() -> None:
    amount = scored_days().amount
    assert amount is not None
    amount[::4] = np.nan
    rows = scored_days(amount=amount)
    policy = budget(rows, 60.0, Declines(), money=True)
    codes = decided(rows, policy)
    assert (codes > 0).sum() == 600
    missing = np.isnan(amount)
    assert np.array_equal(codes[missing] > 0, rows.probability[missing] >= policy.thresholds.review)


def test_a_budget_of_nothing_worth_anything_reviews_nothing_by_money() -> None:
    rows = scored_days(amount=np.zeros(6000))
    assert not (decided(rows, budget(rows, 60.0, Declines(), money=True)) == 1).any()


def test_the_rank_that_is_left_out_is_the_one_that_caught_more_money() -> None:
    settings = DecisionConfig(by="budget", alerts_per_day=30.0)
    choice = choose_policy(settings, scored_days())
    assert choice.policy.by == "expected_loss"
    figures = {tried.setting: tried.per_day for tried in choice.tried}
    assert figures['rank = "money"'] > figures['rank = "probability"'] > 0
    assert [tried.chosen for tried in choice.tried] == [False, True]
    # amounts at random beside what is nearly certain: the probability catches more
    rng = np.random.default_rng(1)
    fraud = np.arange(6000) % 100 == 0
    sure = scored_days(
        label=fraud.astype(np.int8),
        probability=np.where(fraud, 0.9, 0.1),
        amount=np.where(fraud, 1.0, rng.lognormal(6, 1, 6000)),
    )
    assert choose_policy(settings, sure).policy.by == "thresholds"
    assert (
        choose_policy(DecisionConfig(by="budget", alerts_per_day=30.0), scored_days(amount=None)).policy.by
        == "thresholds"
    )
    assert (
        choose_policy(DecisionConfig(by="budget", alerts_per_day=30.0, rank="probability"), scored_days()).tried == ()
    )


def test_is_fraud_is_the_same_whatever_decides() -> None:
    rows = scored_days()
    settings = (
        DecisionConfig(),
        DecisionConfig(review=0.01, decline=0.02),
        DecisionConfig(by="budget", alerts_per_day=5.0, rank="money"),
        DecisionConfig(by="budget", alerts_per_day=500.0, rank="probability", declines_per_day=3.0),
        DecisionConfig(by="cost", review_cost=3.0, insult_cost=10.0),
    )
    assert len({choose_policy(one, rows).policy.thresholds.is_fraud for one in settings}) == 1


# --- Costs --------------------------------------------------------------------------------------------------------

COSTS = Costs(review_cost=3.0, insult_cost=4.0, insult_share=0.1, fraud_cost=10.0, review_catches=0.9)
BY_COST = DecisionConfig(
    by="cost", review_cost=3.0, insult_cost=4.0, insult_share=0.1, fraud_cost=10.0, review_catches=0.9
)


def test_costs_that_are_not_named_are_nothing_and_a_fraud_its_amount() -> None:
    assert prices(DecisionConfig()) == Costs(0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    assert prices(DecisionConfig(), amounts=False) == Costs(0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    assert prices(BY_COST) == prices(BY_COST, amounts=False) == COSTS


@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_flat_thresholds_are_those_of_a_search_over_every_pair(seed: int) -> None:
    rows = scored_days(seed, rows=60, label=np.random.default_rng(seed).integers(-1, 2, 60).astype(np.int8))
    rows.probability[:] = np.round(rows.probability, 2)  # ties
    found = cheapest_thresholds(rows, COSTS)

    def cost(thresholds: Thresholds) -> float:
        return float(rows.costs(Policy(thresholds), COSTS).sum())

    cuts = [*np.unique(rows.probability), NEVER]
    best = min(cost(Thresholds(0.5, r, d)) for r in cuts for d in cuts if r <= d)
    assert cost(found) == pytest.approx(best)


def test_expected_cost_beats_every_flat_threshold_where_probabilities_are_right() -> None:
    rows = scored_days(rows=40_000)
    policy = choose_policy(BY_COST, rows).policy
    assert policy.costs == COSTS
    flat = Policy(cheapest_thresholds(rows, COSTS))
    assert rows.costs(policy, COSTS).sum() < 0.97 * rows.costs(flat, COSTS).sum()
    assert policy.thresholds == flat.thresholds


def test_another_margin_is_chosen_only_beyond_chance() -> None:
    right, wrong = choose_policy(BY_COST, scored_days()), choose_policy(BY_COST, scored_days(trust=2.5, rows=20_000))
    assert [tried.setting for tried in right.tried] == [f"margin = {m:g}" for m in MARGINS]
    assert [tried.chosen for tried in right.tried] == [m == 1 for m in MARGINS]
    # twice too certain: what seems safe is not, so a smaller promise has to do
    assert wrong.policy.costs is not None
    assert wrong.policy.costs.margin < 1
    chosen, usual = (
        next(t.per_day for t in wrong.tried if t.setting == f"margin = {m:g}") for m in (wrong.policy.costs.margin, 1)
    )
    assert chosen < usual
    given_one = choose_policy(DecisionConfig(**{**BY_COST.__dict__, "margin": 2.0}), scored_days())
    assert given_one.policy.costs is not None
    assert (given_one.policy.costs.margin, given_one.tried) == (2.0, ())


def test_alternatives_have_as_many_alerts_and_decide_otherwise() -> None:
    rows = scored_days()
    policy = choose_policy(BY_COST, rows).policy
    found = alternatives(BY_COST, rows, policy)
    assert list(found) == [
        "flat thresholds of least cost", "alert budget by probability", "alert budget by expected loss"
    ]  # fmt: skip
    codes = decided(rows, policy)
    for name in list(found)[1:]:
        other = decided(rows, found[name])
        assert ((other > 0).sum(), (other == 2).sum()) == ((codes > 0).sum(), (codes == 2).sum())
    by_share = DecisionConfig(alert_share=0.01)
    flat = choose_policy(by_share, rows).policy
    assert list(alternatives(by_share, rows, flat)) == ["alert budget by expected loss"]
    nothing = Policy(Thresholds(0.5, NEVER, NEVER))
    assert alternatives(by_share, rows, nothing) == {}
    assert list(alternatives(by_share, scored_days(amount=None), flat)) == []


def test_rows_without_a_label_cost_nothing() -> None:
    rows = scored_days(label=np.full(6000, -1, dtype=np.int8))
    assert rows.costs(Policy(Thresholds(0.1, 0.1, 0.2)), COSTS).sum() == 0
