"""Platt scaling: it finds what made the labels, keeps the ranking and stays finite."""

import numpy as np
import pytest

from training.calibrate import RIDGE, SMALLEST_SCALE, Kind, calibrated, platt


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def labels_of(probability: np.ndarray, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(len(probability)) < probability).astype(np.int8)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.4, -3.0), (2.5, 1.0), (1.3, -4.5), (0.2, 0.7)])
def test_scale_and_shift_that_made_the_labels_are_recovered(scale: float, shift: float) -> None:
    """Within four standard errors of the maximum-likelihood estimate (inverse Fisher information)."""
    logit = np.random.default_rng(1).normal(0, 2, 100_000)
    p = sigmoid(scale * logit + shift)
    x = np.stack([logit, np.ones_like(logit)], axis=1)
    error = np.sqrt(np.diag(np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x)))
    found = platt(logit, labels_of(p, seed=2))
    assert error.max() < 0.04
    assert np.abs(np.array(found) - [scale, shift]).max() / error.max() < 4


def test_the_fit_is_the_optimum_of_the_smoothed_likelihood_with_its_prior() -> None:
    """The gradient at the outcome is 0, written out independently."""
    logit = np.array([-3.0, -1.0, -0.5, 0.0, 0.2, 1.0, 2.5, 4.0])
    label = np.array([0, 0, 1, 0, 1, 0, 1, 1], dtype=np.int8)
    scale, shift = platt(logit, label)
    target = np.where(label == 1, 5 / 6, 1 / 6)
    p = sigmoid(scale * logit + shift)
    assert ((p - target) * logit).sum() + RIDGE * (scale - 1) == pytest.approx(0, abs=1e-8)
    assert (p - target).sum() + RIDGE * shift == pytest.approx(0, abs=1e-8)


def test_overconfident_logits_are_drawn_in_and_the_mean_fits() -> None:
    rng = np.random.default_rng(3)
    honest = rng.normal(-3, 1.5, 20_000)
    label = labels_of(sigmoid(honest), seed=4)
    scale, shift = platt(3 * honest + 2, label)
    assert scale == pytest.approx(1 / 3, rel=0.05)
    assert shift == pytest.approx(-2 / 3, abs=0.1)
    assert sigmoid(scale * (3 * honest + 2) + shift).mean() == pytest.approx(label.mean(), rel=1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_the_ranking_never_turns_round(seed: int) -> None:
    """Even where validation says that higher logits are more honest: the scale stays above 0."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 2, 500)
    scale, shift = platt(logit, labels_of(sigmoid(-2 * logit - 1), seed))
    assert scale == SMALLEST_SCALE
    assert np.isfinite(shift)
    random = platt(logit, labels_of(np.full(500, 0.1), seed))
    assert random[0] >= SMALLEST_SCALE
    order = np.argsort(logit)
    assert (np.diff(sigmoid(scale * logit + shift)[order]) >= 0).all()


@pytest.mark.parametrize(
    "label",
    [np.r_[1, np.zeros(9999)], np.r_[0, np.ones(9999)], np.zeros(10_000), np.ones(10_000)],
    ids=["one fraud", "one honest", "no fraud", "no honest"],
)
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0, 300.0])
def test_extreme_classes_stay_finite(label: np.ndarray, spread: float) -> None:
    logit = spread * np.random.default_rng(0).normal(0, 1, 10_000) - 5
    scale, shift = platt(logit, label.astype(np.int8))
    p = sigmoid(np.clip(scale * logit + shift, -700, 700))
    assert SMALLEST_SCALE <= scale < 50
    assert abs(shift) < 300
    assert 0 < p.mean() < 1
    if spread <= 1:  # where logits say nothing, the mean is the (smoothed) share
        frauds = label.sum()
        target = (frauds * (frauds + 1) / (frauds + 2) + (10_000 - frauds) / (10_002 - frauds)) / 10_000
        assert p.mean() == pytest.approx(target, rel=0.05, abs=2e-6)


def test_separable_classes_stay_finite() -> None:
    """Without smoothing the best scale is infinite."""
    logit = np.r_[np.full(990, -4.0), np.full(10, 4.0)]
    scale, shift = platt(logit, (logit > 0).astype(np.int8))
    low, high = sigmoid(np.array([scale * -4 + shift, scale * 4 + shift]))
    assert low == pytest.approx(1 / 992, rel=1e-2)
    assert high == pytest.approx(11 / 12, rel=1e-2)


def test_hardly_any_rows_stay_near_the_module_as_trained() -> None:
    """Two events say little: the smoothed targets are 1/3 and 2/3."""
    scale, shift = platt(np.array([-2.0, 2.0]), np.array([0, 1], dtype=np.int8))
    assert sigmoid(np.array([2 * scale + shift]))[0] == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "expected"), [("none", (1.0, 0.0)), ("scale", (0.5, 0.0)), ("shift", (1.0, -2.0)), ("platt", (0.5, -2.0))]
)
def test_only_what_the_kind_names_is_fitted(kind: Kind, expected: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1.5, 40_000)
    label = (rng.random(40_000) < 1 / (1 + np.exp(-truth))).astype(np.int8)
    scale, shift = expected
    assert calibrated(kind, (truth - shift) / scale, label) == pytest.approx(expected, abs=0.05)


def test_a_scale_alone_never_turns_the_ranking_round() -> None:
    logit = np.array([-2.0, -1.0, 1.0, 2.0])
    assert calibrated("scale", logit, np.array([1, 1, 0, 0], dtype=np.int8))[0] > 0
