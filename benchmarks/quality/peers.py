"""The GRU's peers on one split: fitted on the same rows as the GRU, with the same contexts, without a sequence.

Logistic regression and random forest see the row and its contexts, boosted trees and isolation forest also the hand-made
features of the user's history (`training.history`).

    python -m benchmarks.quality.peers --choose [--setting week|all]

prints the settings that `CHOSEN` holds: each family's grid, and for boosted trees one setting after the other, by average
precision on the handbook's validation week (train week 2018-07-04), on which the GRU's settings were chosen too. The
number of trees is read off one long fit of each trial.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.quality.handbook import VALIDATION_FOLD, read_fold
from seqfraud.metrics import average_precision
from training.baselines import FAMILIES, FIT_ROWS, Family, Material, Parameters
from training.history import Features
from training.prepare import Prepared

MOST_TREES = 400
TREES_STEP = 20
FOREST_TREES = 128
"""A power of two, see `training.baselines`; more than the exported forest has, to be a fair peer."""
SEARCH = (
    ("max_leaf_nodes", (7, 31)),
    ("min_samples_leaf", (10, 200)),
    ("l2_regularization", (1.0, 100.0)),
    ("max_features", (0.3,)),
    ("learning_rate", (0.025, 0.1)),
)
"""Of boosted trees, one after the other, from START on; what is better stays."""
START: Parameters = {
    "max_leaf_nodes": 15,
    "min_samples_leaf": 50,
    "l2_regularization": 10.0,
    "max_features": 1.0,
    "learning_rate": 0.05,
}
ROWS = (30_000, 300_000)
"""Rows to fit boosted trees on that are tried beside FIT_ROWS."""

Floats = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class PeerSettings:
    """Parameters of a family, and at most about how many rows it is fitted on: every fraud, honest ones drawn."""

    parameters: Parameters
    most: int = FIT_ROWS


Chosen = Mapping[str, PeerSettings]
"""By the name of the family."""


def fit_peers(prepared: Prepared, chosen: Chosen, scored: Int64) -> dict[str, Floats]:
    """Fit every chosen family on train and validation rows.

    Args:
        scored: int64 [n], into the encoded rows.

    Returns:
        float64 [N] by family: logits, of the isolation forest a strangeness, before calibration; NaN but for `scored`.
    """
    material = Material(prepared, fitted_rows(prepared), scored, max(settings.most for settings in chosen.values()))
    out = {}
    for family in FAMILIES:
        if family.name in chosen:
            trial = _Trial(family, material)
            model = trial.fit(chosen[family.name])
            out[family.name] = np.full(len(prepared.encoded), np.nan)
            out[family.name][scored] = family.score(model, trial.scored)
    return out


def fitted_rows(prepared: Prepared) -> Int64:
    """int64: train and validation rows, on both of which the GRU is refitted."""
    return np.flatnonzero(prepared.rows.train | prepared.rows.validation)


def choose(prepared: Prepared, fitted: Int64, validation: Int64, progress: Progress) -> dict[str, PeerSettings]:
    """Settings of every family by average precision on validation rows, fitted on others, int64 into encoded rows."""
    material = Material(prepared, fitted, validation, max(FIT_ROWS, *ROWS))
    label = prepared.label[validation]
    chosen = {}
    for family in FAMILIES:
        trial = _Trial(family, material)
        if family.name == "boosted_trees":
            settings = _choose_boosted(trial, label, progress)
        else:
            settings = _choose_from_grid(trial, label, progress)
        chosen[family.name] = settings
    return chosen


class _Trial:
    """A family and its view of the rows; fits of different settings.

    Attributes:
        scored: [n, D], features of the rows to be scored.
    """

    def __init__(self, family: Family, material: Material) -> None:
        self.family = family
        self.material = material
        self.features: Features = family.inputs(material)[1]
        self.train, self.scored = np.split(self.features.values, [len(material.train)])

    def fit(self, settings: PeerSettings) -> Any:
        at = self.material.drawn(settings.most)
        rows = self.material.train[at]
        label = self.material.prepared.label[rows]
        return self.family.fit(settings.parameters, self.features, self.train[at], label, self.material.weights(rows))


def _choose_from_grid(trial: _Trial, label: npt.NDArray[np.int8], progress: Progress) -> PeerSettings:
    best, chosen = -1.0, PeerSettings({})
    for parameters in trial.family.trials():
        settings = PeerSettings(parameters)
        figure = average_precision(label, trial.family.score(trial.fit(settings), trial.scored)) or 0.0
        progress({"family": trial.family.name, "average_precision": figure, **asdict(settings)})
        if figure > best:
            best, chosen = figure, settings
    if trial.family.name == "random_forest":
        return replace(chosen, parameters={"n_estimators": FOREST_TREES, **chosen.parameters})
    return chosen


def _choose_boosted(trial: _Trial, label: npt.NDArray[np.int8], progress: Progress) -> PeerSettings:
    def tried(settings: PeerSettings) -> tuple[float, PeerSettings]:
        long = {**settings.parameters, "max_iter": MOST_TREES}
        model = trial.fit(replace(settings, parameters=long))
        best, trees = -1.0, 0
        for i, logit in enumerate(model.staged_decision_function(trial.scored), start=1):
            if i % TREES_STEP == 0 and (figure := average_precision(label, logit.ravel()) or 0.0) > best:
                best, trees = figure, i
        found = replace(settings, parameters={**settings.parameters, "max_iter": trees})
        progress({"family": trial.family.name, "average_precision": best, **asdict(found)})
        return best, found

    best = tried(PeerSettings(START))
    for name, values in SEARCH:
        here = best[1]
        others = [tried(replace(here, parameters={**here.parameters, name: value})) for value in values]
        best = max(best, *others, key=lambda found: found[0])
    for most in ROWS:
        # where there are fewer rows they are all fitted already
        if len(trial.material.train) > min(most, FIT_ROWS):
            best = max(best, tried(replace(best[1], most=most)), key=lambda found: found[0])
    return best[1]


CHOSEN: Mapping[str, Chosen] = {
    "week": {
        "logistic_regression": PeerSettings({"C": 1.0, "class_weight": None}),
        "random_forest": PeerSettings({"n_estimators": FOREST_TREES, "min_samples_leaf": 20, "class_weight": None}),
        "boosted_trees": PeerSettings({**START, "learning_rate": 0.1, "max_iter": 60}),
        "isolation_forest": PeerSettings({"max_samples": 4096, "max_features": 0.3}),
    },
    "all": {
        "logistic_regression": PeerSettings({"C": 1.0, "class_weight": None}),
        "random_forest": PeerSettings({"n_estimators": FOREST_TREES, "min_samples_leaf": 5, "class_weight": None}),
        "boosted_trees": PeerSettings({**START, "min_samples_leaf": 10, "max_iter": 380}),
        "isolation_forest": PeerSettings({"max_samples": 4096, "max_features": 0.3}),
    },
}
"""For the handbook, by setting; see the command above."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", required=True)
    parser.add_argument("--setting", choices=("week", "all"), action="append")
    for setting in parser.parse_args().setting or ["week", "all"]:
        fold = read_fold(setting, VALIDATION_FOLD, 0)

        def say(trial: dict[str, Any], setting: str = setting) -> None:
            print(json.dumps({"setting": setting, **trial}), flush=True)

        chosen = choose(fold.prepared, fitted_rows(fold.prepared), np.flatnonzero(fold.test), say)
        print(json.dumps({"setting": setting, "chosen": {k: asdict(v) for k, v in chosen.items()}}), flush=True)


if __name__ == "__main__":
    main()
