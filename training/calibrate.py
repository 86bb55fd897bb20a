"""Logits to probabilities: Platt scaling on the validation rows."""

from typing import Literal

import numpy as np
import numpy.typing as npt

ITERATIONS = 100
NOTHING = 1e-12
"""A fall of the loss that float64 hardly shows, relative to the loss."""
RIDGE = 1e-3
"""Weight of the prior (scale 1, shift 0), in events; it matters only where validation has hardly any fraud."""
SMALLEST_SCALE = 0.05
"""A negative or vanishing scale would turn the ranking round."""

Floats = npt.NDArray[np.float64]
Kind = Literal["none", "scale", "shift", "platt"]
"""What is fitted: nothing, the scale or the shift alone, or both."""


def platt(logit: Floats, label: npt.NDArray[np.int8]) -> tuple[float, float]:
    """Scale and shift such that sigmoid(scale * logit + shift) fits the labels.

    Targets are smoothed as in Platt (1999), "Probabilistic outputs for support vector machines".

    Args:
        logit: float64 [N].
        label: int8 [N], 0 or 1.
    """
    target, one = _targets(label), np.ones_like(logit)
    scale, shift = _fit(np.stack([logit, one], axis=1), 0 * logit, target, np.array([1.0, 0.0])).tolist()
    if scale < SMALLEST_SCALE:
        scale = SMALLEST_SCALE
        (shift,) = _fit(one[:, None], scale * logit, target, np.zeros(1)).tolist()
    return scale, shift


def calibrated(kind: Kind, logit: Floats, label: npt.NDArray[np.int8]) -> tuple[float, float]:
    """Scale and shift as in `platt`, of which only those of the kind are fitted; the others are 1 and 0."""
    if kind == "platt":
        return platt(logit, label)
    if kind == "scale":
        return max(_fit(logit[:, None], 0 * logit, _targets(label), np.ones(1)).item(), SMALLEST_SCALE), 0.0
    if kind == "shift":
        return 1.0, _fit(np.ones((len(logit), 1)), logit, _targets(label), np.zeros(1)).item()
    return 1.0, 0.0


def _targets(label: npt.NDArray[np.int8]) -> Floats:
    """Smoothed labels [N]."""
    frauds, honest = int((label == 1).sum()), int((label == 0).sum())
    return np.where(label == 1, (frauds + 1) / (frauds + 2), 1 / (honest + 2))


def _fit(x: Floats, offset: Floats, target: Floats, prior: Floats) -> Floats:
    """Weights [P] of x [N, P] in sigmoid(x @ weights + offset), by Newton's method from the prior.

    The step is halved until the loss falls (Lin, Lin and Weng 2007, "A note on Platt's probabilistic outputs for
    support vector machines"): full steps swing to and fro where the first guess is far off.
    """

    def loss(at: Floats) -> float:
        z = x @ at + offset
        return float((np.logaddexp(0, z) - target * z).sum() + RIDGE / 2 * ((at - prior) ** 2).sum())

    weights = prior.copy()
    for _ in range(ITERATIONS):
        p = 1 / (1 + np.exp(-np.clip(x @ weights + offset, -500, 500)))
        gradient = x.T @ (p - target) + RIDGE * (weights - prior)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(len(prior))
        step = np.linalg.solve(curvature, gradient)
        here, fall = loss(weights), float(gradient @ step)
        if fall < NOTHING * max(here, 1.0):
            return weights - step
        while loss(weights - step) > here - 1e-4 * fall and fall > NOTHING * max(here, 1.0):
            step, fall = step / 2, fall / 2
        weights = weights - step
    return weights
