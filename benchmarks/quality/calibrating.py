"""Logits to probabilities where a fold is refitted on all its labels: by earlier weeks, before the test folds.

A fold has no labelled days left on which to calibrate it. So models are fitted to three earlier train weeks (EARLIER, the last of
them the validation fold), and what is fitted to the logits of their test weeks is applied to the logits of the same kind of
model on every test fold and seed: nothing, a scale, a shift, or both (Platt), whichever has the least log-loss on a week
when it was fitted to the two others. Elsewhere `calibrations` takes the validation days of the configuration.

Drawing honest rows, or weighting frauds, multiplies the odds that a model states; `unshifted` takes that back.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from benchmarks.quality.fitting import fit_gru
from benchmarks.quality.handbook import VALIDATION_FOLD, read_fold
from benchmarks.quality.peers import CHOSEN, fit_peers
from seqfraud.metrics import log_loss
from training.calibrate import Kind, calibrated, platt

GRU = "gru"
EARLIER = ("2018-06-20", "2018-06-27", VALIDATION_FOLD)
"""First days of train weeks."""

Floats = npt.NDArray[np.float64]
Week = tuple[Floats, npt.NDArray[np.int8]]
"""Logits and labels of the rows of a test week."""


@dataclass(frozen=True)
class Platt:
    """probability = sigmoid(scale * logit + shift)."""

    scale: float
    shift: float

    def probability(self, logit: Floats) -> Floats:
        """float64 [...]; NaN stays NaN."""
        # of at most 700 in size: exp stays finite
        return 1 / (1 + np.exp(-np.clip(self.scale * logit + self.shift, -700, 700)))


@dataclass(frozen=True)
class ChosenPlatt:
    """What was fitted to all weeks, of which kind, and the mean log-loss of every kind on the weeks left out."""

    kind: Kind
    platt: Platt
    log_loss: Mapping[Kind, float]


def handbook_calibrations(setting: str) -> dict[str, ChosenPlatt]:
    """By model, the GRU and the peers of a setting, week or all."""
    weeks: dict[str, list[Week]] = {}
    for first in EARLIER:
        fold = read_fold(setting, first, 0)
        rows = np.flatnonzero(fold.test)
        logits = {GRU: fit_gru(fold.prepared).logit, **fit_peers(fold.prepared, CHOSEN[setting], rows)}
        for name, logit in logits.items():
            weeks.setdefault(name, []).append((logit[rows], fold.prepared.label[rows]))
    return {name: chosen_over(each) for name, each in weeks.items()}


def chosen_over(weeks: Sequence[Week]) -> ChosenPlatt:
    """The kind by weeks left out, fitted to all of them."""
    losses: dict[Kind, float] = {}
    for kind in get_args(Kind):
        left_out = []
        for at, (logit, label) in enumerate(weeks):
            fitted = Platt(*calibrated(kind, *_pooled([*weeks[:at], *weeks[at + 1 :]])))
            loss = log_loss(label, fitted.probability(logit))
            assert loss is not None
            left_out.append(loss)
        losses[kind] = float(np.mean(left_out))
    best = min(losses, key=losses.__getitem__)
    return ChosenPlatt(best, Platt(*calibrated(best, *_pooled(weeks))), losses)


def _pooled(weeks: Sequence[Week]) -> Week:
    return np.concatenate([logit for logit, _ in weeks]), np.concatenate([label for _, label in weeks])


def calibrations(
    logits: Mapping[str, Floats], label: npt.NDArray[np.int8], rows: npt.NDArray[np.bool_]
) -> dict[str, Platt]:
    """Scale and shift of each model's logits [N], fitted to the labels [N] of the rows, a mask [N] without missing logits."""
    return {name: Platt(*platt(logit[rows], label[rows])) for name, logit in logits.items()}


def unshifted(logit: Floats, weight: float) -> Floats:
    """Log-odds of all rows from those of a fit in which a fraud counted `weight` times as much as an honest row.

    That is a weight in the loss (`training.positive_weight`), or honest rows of which one in `weight` was drawn and none
    weighted up. It multiplies every odds by the weight: Elkan, "The foundations of cost-sensitive learning", IJCAI 2001,
    theorem 2; King & Zeng, "Logistic regression in rare events data", Political Analysis 9 (2001), prior correction.
    Exact for a model that can state the odds of every kind of row; a regularised one is off by what holds it back, which
    `platt` sees and this does not.
    """
    return logit - math.log(weight)
