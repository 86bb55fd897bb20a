"""Decisions at and around their thresholds, by expected loss and by expected cost, one by one and many at once."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfraud.errors import BundleError
from seqfraud.policy import DECISIONS, NEVER, Costs, Policy, Thresholds, flag_many, let_through

THRESHOLDS = Thresholds(is_fraud=0.5, review=0.3, decline=0.8)
USUAL = Policy(THRESHOLDS)
COSTS = Costs(review_cost=4.0, insult_cost=2.0, insult_share=0.1, fraud_cost=15.0, fraud_share=1.0, review_catches=0.8)


# --- Deciding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probability", "decision"),
    [
        (0.0, "approve"),
        (np.nextafter(0.3, 0), "approve"),
        (0.3, "review"),
        (np.nextafter(0.8, 0), "review"),
        (0.8, "decline"),
        (1.0, "decline"),
        (float("nan"), "review"),
    ],
)
def test_a_threshold_belongs_to_its_consequence(probability: float, decision: str) -> None:
    assert USUAL.decide(probability, None) == decision
    assert DECISIONS[USUAL.decide_many([probability], None)[0]] == decision


def test_equal_thresholds_leave_no_review_and_never_is_never() -> None:
    assert Policy(Thresholds(0.5, 0.5, 0.5)).decide(0.5, 12.0) == "decline"
    assert Policy(Thresholds(0.5, 0.5, NEVER)).decide(1.0, 12.0) == "review"
    assert Policy(Thresholds(NEVER, NEVER, NEVER)).decide(1.0, 12.0) == "approve"
    assert not flag_many([1.0], Thresholds(NEVER, NEVER, NEVER)).any()


def test_float32_probabilities_meet_the_threshold_of_the_service() -> None:
    # In float32 both sides would round to the same number, and bulk scoring would decline what the
    # service, which compares in float64, approves.
    probability = np.float32(0.1)
    above = float(np.nextafter(float(probability), 1))
    assert np.asarray([probability]) >= above  # what numpy does by itself
    policy = Policy(Thresholds(above, above, above))
    assert policy.decide(float(probability), None) == "approve"
    assert policy.decide(probability, None) == "approve"  # type: ignore[arg-type]
    assert DECISIONS[policy.decide_many(np.array([probability]), None)[0]] == "approve"
    assert not flag_many(np.array([probability]), policy.thresholds)[0]


# --- By the amount --------------------------------------------------------------------------------

probabilities = st.floats(0, 1) | st.just(float("nan"))
amounts = st.floats(-1e6, 1e9) | st.sampled_from([0.0, -0.0, float("nan")])
costs = st.builds(
    Costs,
    review_cost=st.floats(0, 100),
    insult_cost=st.floats(0, 100),
    insult_share=st.floats(0, 2),
    fraud_cost=st.floats(0, 100),
    fraud_share=st.floats(0, 2),
    review_catches=st.floats(0, 1),
    margin=st.floats(0.01, 100),
)
thresholds = st.lists(st.floats(0, 1) | st.just(NEVER), min_size=2, max_size=2).map(
    lambda pair: Thresholds(0.5, *sorted(pair))
)
policies = st.one_of(
    st.builds(Policy, thresholds),
    st.builds(Policy, thresholds, review_loss=st.floats(0, 1e6)),
    st.builds(Policy, thresholds, costs=costs),
)


@given(policies, st.lists(st.tuples(probabilities, amounts)))
def test_many_decisions_are_those_one_by_one(policy: Policy, rows: list[tuple[float, float]]) -> None:
    p, a = [row[0] for row in rows], [row[1] for row in rows]
    codes = policy.decide_many(p, a)
    assert codes.dtype == np.uint8
    assert [DECISIONS[code] for code in codes] == [policy.decide(*row) for row in rows]
    without = policy.decide_many(p, None)
    assert [DECISIONS[code] for code in without] == [policy.decide(row, None) for row in p]


@given(policies, amounts, st.lists(st.floats(0, 1), min_size=2))
def test_a_higher_probability_is_never_decided_more_mildly(policy: Policy, amount: float, several: list[float]) -> None:
    if (
        policy.costs is not None
    ):  # where approving and reviewing cost the same but for rounding, either may be the least
        several = [round(p, 2) for p in several]
    codes = policy.decide_many(sorted(several), np.full(len(several), amount))
    assert all(a <= b for a, b in pairwise(codes.tolist()))


@given(policies, probabilities)
def test_without_an_amount_the_thresholds_decide(policy: Policy, probability: float) -> None:
    wanted = Policy(policy.thresholds).decide(probability, None)
    assert policy.decide(probability, None) == policy.decide(probability, float("nan")) == wanted


@pytest.mark.parametrize(
    ("probability", "amount", "decision"),
    [
        # of 100: approving costs 115 p, a review 4 + 23 p, declining 12 (1 - p)
        (0.04, 100.0, "approve"),  # 4.60 against 4.92 and 11.52
        (0.05, 100.0, "review"),  # 5.75, 5.15, 11.40
        (0.22, 100.0, "review"),  # 25.3, 9.06, 9.36
        (0.24, 100.0, "decline"),  # 27.6, 9.52, 9.12
        # of nothing: 15 p, 4 + 3 p, 2 (1 - p): a review is never the cheapest
        (0.11, 0.0, "approve"),  # 1.65, 4.33, 1.78
        (0.13, 0.0, "decline"),  # 1.95, 4.39, 1.74
        (0.13, -50.0, "decline"),  # a refund is worth nothing
        # of 10,000: 10,015 p, 4 + 2,003 p, 1,002 (1 - p)
        (0.0004, 1e4, "approve"),  # 4.006, 4.8, 1001.6
        (0.0006, 1e4, "review"),  # 6.009, 5.2, 1001.4
        (float("nan"), 100.0, "review"),
    ],
)
def test_the_decision_is_the_one_of_least_expected_cost(probability: float, amount: float, decision: str) -> None:
    policy = Policy(THRESHOLDS, costs=COSTS)
    assert policy.decide(probability, amount) == decision
    assert policy.decide(probability, np.float32(amount)) == decision  # type: ignore[arg-type]


def test_what_is_done_has_to_promise_the_margin_times_what_it_costs() -> None:
    # a review of 100 saves 92 p and costs 4
    for margin in (0.5, 1.0, 2.0):
        policy = Policy(THRESHOLDS, costs=replace(COSTS, margin=margin))
        assert policy.decide(0.99 * margin * 4 / 92, 100.0) == "approve"
        assert policy.decide(1.01 * margin * 4 / 92, 100.0) == "review"


def test_what_costs_the_same_is_approved() -> None:
    assert Policy(THRESHOLDS, costs=Costs(review_cost=0.0)).decide(0.5, 0.0) == "approve"
    assert Policy(THRESHOLDS, costs=Costs(review_cost=5.0, insult_cost=50.0)).decide(0.5, 10.0) == "approve"


@given(costs, st.lists(st.tuples(st.booleans(), st.floats(0, 1e4), st.integers(0, 2)), min_size=1))
def test_realised_costs_are_the_expected_ones_of_certainties(costs: Costs, rows: list[tuple[bool, float, int]]) -> None:
    """At margin 1; what a review costs and what it misses are two entries."""
    fraud, amount, codes = (np.array(column) for column in zip(*rows, strict=True))
    got = costs.of(fraud, amount, codes.astype(np.uint8)).sum(axis=0)
    expected = replace(costs, margin=1.0)._expected(fraud.astype(float), amount)
    wanted = [float(np.broadcast_to(expected[code], len(rows))[i]) for i, code in enumerate(codes)]
    assert got.tolist() == pytest.approx(wanted)


def test_by_expected_loss_the_sure_ones_are_declined_whatever_they_are_worth() -> None:
    policy = Policy(THRESHOLDS, review_loss=20.0)
    assert policy.decide(0.1, 199.0) == "approve"
    assert policy.decide(0.1, 200.0) == "review"
    assert policy.decide(0.79, 1.0) == "approve"
    assert policy.decide(0.8, 1.0) == "decline"
    assert policy.decide(0.8, 1e6) == "decline"
    assert policy.decide(float("nan"), 1e6) == "review"


@pytest.mark.parametrize("share", [0.0, 0.01])
@pytest.mark.parametrize("policy", [USUAL, Policy(THRESHOLDS, review_loss=1 / 3), Policy(THRESHOLDS, costs=COSTS)])
def test_a_policy_survives_json_to_the_last_digit(policy: Policy, share: float) -> None:
    policy = replace(policy, control_share=share)
    plain = json.loads(json.dumps(policy.as_dict()))
    assert Policy.from_dict({**plain, "other": 1}) == policy
    assert plain["decision"]["by"] == policy.by
    assert ("control_share" in plain["decision"]) == (share > 0)  # without one a bundle is what it was


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (None, "decision: seen None; expected an object"),
        ({}, "decision.by: seen None; expected one of thresholds, expected_loss, cost"),
        ({"by": ["cost"]}, "decision.by: seen .'cost'.; expected one of"),
        ({"by": "thresholds", "review": 0.5}, "decision.review: unknown; by thresholds there is nothing more to say"),
        (
            {"by": "thresholds", "control_share": 0.06},
            "decision.control_share: seen 0.06; expected a number from 0 to 0.05",
        ),
        ({"by": "thresholds", "control_share": True}, "decision.control_share: seen True"),
        ({"by": "expected_loss"}, "decision.review: missing; expected a number"),
        ({"by": "expected_loss", "review": -1.0}, "decision.review: seen -1.0; expected a number from 0 to 1e.12"),
        ({"by": "expected_loss", "review": True}, "decision.review: seen True"),
        (
            {"by": "expected_loss", "review": 1.0, "margin": 1.0},
            "decision.margin: unknown; the nearest valid key is review",
        ),
        ({"by": "cost", "margin": 2.0}, "decision.review_cost: missing"),
        ({"margin": 0.0}, "decision.margin: seen 0.0; expected a number from 0.001 to 1000"),
        ({"review_catches": 1.5}, "decision.review_catches: seen 1.5; expected a number from 0 to 1"),
        ({"fraud_cost": float("nan")}, "decision.fraud_cost: seen nan"),
        ({"insult_share": "0.1"}, "decision.insult_share: seen '0.1'; expected a number"),
        ({"review_costs": 1.0}, "decision.review_costs: unknown; the nearest valid key is review_cost"),
    ],
)
def test_a_decision_that_cannot_be_meant_is_refused(decision: Any, message: str) -> None:
    plain = Policy(THRESHOLDS, costs=COSTS).as_dict()
    whole = decision if decision is None or not decision or "by" in decision else {**plain["decision"], **decision}
    with pytest.raises(BundleError, match=message):
        Policy.from_dict({**plain, "decision": whole})


def test_a_share_is_let_through_by_key_and_id_alone() -> None:
    ids = [f"t{n}" for n in range(20_000)]
    drawn = [let_through(b"k" * 32, one, 0.01) for one in ids]
    assert 140 < sum(drawn) < 260  # 200 expected, 14 the standard deviation
    assert drawn == [let_through(b"k" * 32, one, 0.01) for one in ids]
    assert drawn != [let_through(b"l" * 32, one, 0.01) for one in ids]
    more = [let_through(b"k" * 32, one, 0.05) for one in ids]
    assert all(b for a, b in zip(drawn, more, strict=True) if a)
    assert not any(let_through(b"k" * 32, one, 0.0) for one in ids)


def test_a_policy_decides_by_one_thing() -> None:
    with pytest.raises(BundleError, match="expected one of them"):
        Policy(THRESHOLDS, review_loss=1.0, costs=COSTS)
    with pytest.raises(BundleError, match="decision: missing"):
        Policy.from_dict({"thresholds": THRESHOLDS.as_dict()})


# --- Thresholds as data ---------------------------------------------------------------------------


def test_thresholds_survive_json_to_the_last_digit() -> None:
    thresholds = Thresholds(is_fraud=0.1 + 0.2, review=1 / 3, decline=NEVER)
    assert Thresholds.from_dict(json.loads(json.dumps(thresholds.as_dict()))) == thresholds


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"is_fraud": 0.5, "review": 0.5}, "thresholds.decline: missing"),
        (
            {"is_fraud": 0.5, "review": 0.5, "declin": 0.5},
            "thresholds.declin: unknown; the nearest valid key is decline",
        ),
        ({"is_fraud": "0.5", "review": 0.5, "decline": 0.5}, "is_fraud: seen '0.5'; expected a nu"),
        ({"is_fraud": True, "review": 0.5, "decline": 0.5}, "is_fraud: seen True; expected a nu"),
        ({"is_fraud": None, "review": 0.5, "decline": 0.5}, "is_fraud: seen None; expected a nu"),
        ({"is_fraud": 0.5, "review": -0.1, "decline": 0.5}, "review: seen -0.1; expected 0..1"),
        ({"is_fraud": 0.5, "review": 0.5, "decline": 1.2}, "decline: seen 1.2; .* or 1.01 for nev"),
        ({"is_fraud": float("nan"), "review": 0.5, "decline": 0.5}, "is_fraud: seen nan"),
        (
            {"is_fraud": 0.5, "review": 0.6, "decline": 0.5},
            "review: seen 0.6; expected at most thresholds.decline, which is 0.5",
        ),
        ([0.5, 0.5, 0.5], "thresholds: seen .*; expected an object"),
    ],
)
def test_a_manifest_that_cannot_be_meant_is_refused(values: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Thresholds.from_dict(values)
