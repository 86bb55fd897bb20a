"""Probabilities survive drawing and weighting: the shift of the log-odds is known, and Platt scaling finds it."""

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from benchmarks.quality.calibrating import Platt, calibrations, chosen_over, unshifted

CELLS = np.array([0.02, 0.1, 0.3, 0.6])
"""Share of fraud in four kinds of rows, of 1,000 rows each."""


def cell_odds(honest_weight: float, fraud_weight: float) -> np.ndarray:
    """Logits [4] of an unregularised logistic regression with a parameter for each kind of row."""
    x = np.repeat(np.eye(4), 2, axis=0)
    y = np.tile([0, 1], 4)
    rows = np.stack([1000 * (1 - CELLS) * honest_weight, 1000 * CELLS * fraud_weight], axis=1).ravel()
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(x, y, sample_weight=rows)
    return np.asarray(model.decision_function(np.eye(4)))


@pytest.mark.parametrize(("honest", "fraud", "weight"), [(1.0, 7.0, 7.0), (0.05, 1.0, 20.0), (1.0, 1.0, 1.0)])
def test_the_known_shift_restores_the_odds_exactly(honest: float, fraud: float, weight: float) -> None:
    """Frauds weighted up by 7, or one honest row in 20 drawn: in each kind of row the odds are weight times too high."""
    stated = cell_odds(honest, fraud)
    truth = np.log(CELLS / (1 - CELLS))
    assert np.abs(stated - truth).max() == pytest.approx(math.log(weight), abs=1e-3)
    np.testing.assert_allclose(unshifted(stated, weight), truth, atol=1e-3)


def test_drawn_honest_rows_weighted_up_shift_nothing() -> None:
    """What the baselines do: one honest row in 20, each counted 20 times."""
    np.testing.assert_allclose(cell_odds(0.05 * 20, 1.0), np.log(CELLS / (1 - CELLS)), atol=1e-3)


def test_platt_finds_the_shift_of_undersampling_and_the_scale_of_overconfidence() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(-3, 1.5, 60_000)
    label = (rng.random(60_000) < 1 / (1 + np.exp(-truth))).astype(np.int8)
    rows = np.arange(60_000) % 2 == 0
    # rows that are not calibrated on have no logits there
    logits = {"drawn": truth + math.log(20), "sharp": 2 * truth}
    found = calibrations({name: np.where(rows, logit, np.nan) for name, logit in logits.items()}, label, rows)
    assert (found["drawn"].scale, found["drawn"].shift) == pytest.approx((1.0, -math.log(20)), abs=0.1)
    assert (found["sharp"].scale, found["sharp"].shift) == pytest.approx((0.5, 0.0), abs=0.1)
    for name, one in found.items():
        later = one.probability(logits[name][~rows])
        assert later.mean() == pytest.approx(label[~rows].mean(), rel=0.03)


def test_a_probability_is_finite_far_out_and_missing_where_the_logit_is() -> None:
    p = Platt(2.0, -1.0).probability(np.array([0.5, 1e9, -1e9, np.nan]))
    np.testing.assert_allclose(p, [0.5, 1.0, 0.0, np.nan], atol=1e-300)


def drawn(rng: np.random.Generator, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """A week whose logits are twice too far out, and off by a shift."""
    truth = rng.normal(-2, 1.5, 20_000)
    return 2 * truth + shift, (rng.random(20_000) < 1 / (1 + np.exp(-truth))).astype(np.int8)


def test_what_weeks_have_in_common_is_fitted_and_what_they_do_not_is_left() -> None:
    """A scale holds in every week; a shift that comes and goes does worse on the week left out than none."""
    rng = np.random.default_rng(0)
    alike = chosen_over([drawn(rng, 1.5) for _ in range(3)])
    assert alike.kind == "platt"
    assert (alike.platt.scale, alike.platt.shift) == pytest.approx((0.5, -0.75), abs=0.05)
    apart = chosen_over([drawn(rng, shift) for shift in (-2.0, 2.0, 0.0)])
    assert apart.kind == "scale"
    assert apart.platt.shift == 0.0
    assert apart.log_loss["scale"] < apart.log_loss["none"] and apart.log_loss["scale"] < apart.log_loss["platt"]
