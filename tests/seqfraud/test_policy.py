"""Decisions at and around their thresholds, and thresholds against a search over every cut."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from seqfraud.errors import BundleError, ConfigError, DataError
from seqfraud.policy import (
    DECISIONS,
    NEVER,
    Thresholds,
    choose_thresholds,
    decide,
    decide_many,
    flag_many,
)

Array = NDArray[Any]

USUAL = Thresholds(is_fraud=0.5, review=0.3, decline=0.8)


def validation_rows(seed: int, rows: int = 4000) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    label = random.random(rows) < 0.08
    return label, 1 / (1 + np.exp(-(random.normal(size=rows) + 4 * label - 4)))


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
    assert decide(probability, USUAL) == decision
    assert DECISIONS[decide_many([probability], USUAL)[0]] == decision


def test_equal_thresholds_leave_no_review_and_never_is_never() -> None:
    assert decide(0.5, Thresholds(0.5, 0.5, 0.5)) == "decline"
    assert decide(1.0, Thresholds(0.5, 0.5, NEVER)) == "review"
    assert decide(1.0, Thresholds(NEVER, NEVER, NEVER)) == "approve"
    assert not flag_many([1.0], Thresholds(NEVER, NEVER, NEVER)).any()


def test_float32_probabilities_meet_the_threshold_of_the_service() -> None:
    # In float32 both sides would round to the same number, and bulk scoring would decline what the
    # service, which compares in float64, approves.
    probability = np.float32(0.1)
    above = float(np.nextafter(float(probability), 1))
    assert np.asarray([probability]) >= above  # what numpy does by itself
    thresholds = Thresholds(above, above, above)
    assert decide(float(probability), thresholds) == "approve"
    assert decide(probability, thresholds) == "approve"  # type: ignore[arg-type]
    assert DECISIONS[decide_many(np.array([probability]), thresholds)[0]] == "approve"
    assert not flag_many(np.array([probability]), thresholds)[0]


@given(
    st.lists(st.floats(0, 1) | st.just(float("nan"))),
    st.lists(st.floats(0, 1) | st.just(NEVER), min_size=2, max_size=2).map(sorted),
)
def test_many_decisions_are_those_one_by_one(probabilities: list[float], pair: list[float]) -> None:
    thresholds = Thresholds(0.5, *pair)
    codes = decide_many(probabilities, thresholds)
    assert codes.dtype == np.uint8
    assert [DECISIONS[code] for code in codes] == [decide(p, thresholds) for p in probabilities]


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
    assert np.array_equal(decide_many(p + noise, chosen), decide_many(p, chosen))


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
    declined = decide_many(p, chosen) == DECISIONS.index("decline")
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
