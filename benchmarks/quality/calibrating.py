"""Logits to probabilities where a fold is refitted on all its labels: by the validation fold, before the test folds.

A fold has no labelled days left on which to calibrate it. A scale and a shift (Platt) are fitted for each model and setting
on the test week of the validation fold (train week 2018-07-04, seed 0) to the logits of a model that was fitted there, and
applied to the logits of the same kind of model on every test fold and seed. Elsewhere `calibrations` takes the validation
days of the configuration.

Drawing honest rows, or weighting frauds, multiplies the odds that a model states; `unshifted` takes that back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.quality.fitting import fit_gru
from benchmarks.quality.handbook import VALIDATION_FOLD, read_fold
from benchmarks.quality.peers import CHOSEN, fit_peers
from training.calibrate import platt

GRU = "gru"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Platt:
    """probability = sigmoid(scale * logit + shift)."""

    scale: float
    shift: float

    def probability(self, logit: Floats) -> Floats:
        """float64 [...]; NaN stays NaN."""
        # of at most 700 in size: exp stays finite
        return 1 / (1 + np.exp(-np.clip(self.scale * logit + self.shift, -700, 700)))


def handbook_calibrations(setting: str) -> dict[str, Platt]:
    """By model, the GRU and the peers of a setting, week or all."""
    fold = read_fold(setting, VALIDATION_FOLD, 0)
    rows = np.flatnonzero(fold.test)
    logits = {GRU: fit_gru(fold.prepared).logit, **fit_peers(fold.prepared, CHOSEN[setting], rows)}
    return calibrations(logits, fold.prepared.label, fold.test)


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
