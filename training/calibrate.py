"""Logits to probabilities: Platt scaling on the validation rows."""

import numpy as np
import numpy.typing as npt

ITERATIONS = 50
RIDGE = 1e-3
"""Weight of the prior (scale 1, shift 0), in events; it matters only where validation has hardly any fraud."""
SMALLEST_SCALE = 0.05
"""A negative or vanishing scale would turn the ranking round."""


def platt(logit: npt.NDArray[np.float64], label: npt.NDArray[np.int8]) -> tuple[float, float]:
    """Scale and shift such that sigmoid(scale * logit + shift) fits the labels; Newton's method.

    Targets are smoothed as in Platt (1999), "Probabilistic outputs for support vector machines".

    Args:
        logit: float64 [N].
        label: int8 [N], 0 or 1.
    """
    frauds, honest = int((label == 1).sum()), int((label == 0).sum())
    target = np.where(label == 1, (frauds + 1) / (frauds + 2), 1 / (honest + 2))
    x = np.stack([logit, np.ones_like(logit)], axis=1)
    prior = np.array([1.0, 0.0])
    beta = prior.copy()
    for _ in range(ITERATIONS):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -50, 50)))
        gradient = x.T @ (p - target) + RIDGE * (beta - prior)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        # damped: far from the optimum a full Newton step can overshoot
        beta -= step * min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return max(float(beta[0]), SMALLEST_SCALE), float(beta[1])
