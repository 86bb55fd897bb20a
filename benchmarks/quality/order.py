"""Where only the order of events tells: the GRU beside boosted trees and beside itself without the recurrence.

    python -m benchmarks.quality.order [--seeds 3] [--validation]

The simulator's kind of fraud `order`, and no other: a small online payment, fuel, electronics in this order, the last is fraud;
each of the five other orders of the three is as frequent and honest. The steps are 6 to 36 hours apart, so that the user's own
purchases, about two a day, come in between, some of them in these categories. With the simulator's usual gaps of 20
minutes to 2.5 hours the two rows before hold the whole pattern, and trees that see three rows back have it as well.

Compared, on the test rows of configs/simulator.toml's split:

    gru                 the model by configs/simulator.toml
    without_recurrence  the same layers, context and head, each event by itself with its gap to the one before
    trees               histogram boosting on the row, its contexts and `training.history`: gaps, amounts and categories of the three
                        rows before, windows, habits, familiarity
    told_trees          the same and the seconds since the user's last purchase in each category: what someone would add who knows
                        the pattern already

The trees' settings and iterations and the networks' epochs are chosen by average precision on the validation days. Writes
benchmarks/results/order_quality.json; `--validation` prints the figures of the validation days and writes nothing.
"""

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

from benchmarks.processes import ROOT, write_result
from benchmarks.quality.measures import compared, scored_rows
from benchmarks.quality.variants import WithoutRecurrence
from seqfraud.config import load_config
from seqfraud.metrics import average_precision
from seqfraud.nn.model import SequenceModel
from training.baselines import Material
from training.history import Features, Past
from training.loop import DeviceData, fit, pick_device, score_logits
from training.prepare import Prepared, fit_scaling, prepare
from training.simulate import Simulation, simulate_to

CONFIG = ROOT / "configs" / "simulator.toml"
SIMULATION = Simulation(
    users=600,
    seed=17,
    purchases_per_day=2.0,
    fraud_share=0.015,
    only_kind="order",
    order_gap=(360.0, 2160.0),
)
EPOCHS = 24
PATIENCE = 6
"""The validation days have some two hundred frauds: their figure goes up and down."""
ITERATIONS = 250
WHAT = {
    "without_recurrence": "the same layers, context and head, each event by itself",
    "trees": "boosted trees with gaps, amounts and categories of the three rows before, windows and habits",
    "told_trees": "the same, told the seconds since the last purchase in each category",
}
GRID: dict[str, tuple[Any, ...]] = {"learning_rate": (0.03, 0.08), "max_leaf_nodes": (4, 7, 15)}
NETWORKS: dict[str, type[SequenceModel]] = {"gru": SequenceModel, "without_recurrence": WithoutRecurrence}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chosen:
    """A model as it came out best on the validation rows.

    Attributes:
        probability: float64 [N], over encoded rows, not calibrated; NaN where it was not needed.
        details: what was chosen, and its figure on the validation rows.
    """

    probability: Floats
    details: dict[str, Any]


def read_data(simulation: Simulation, folder: Path, epochs: int = EPOCHS) -> Prepared:
    """Simulate into a folder, read and encode."""
    data = folder / "transactions.parquet"
    simulate_to(simulation, data)
    config = load_config(CONFIG)
    return prepare(replace(config, training=replace(config.training, epochs=epochs, patience=PATIENCE)), data)


def network(prepared: Prepared, kind: type[SequenceModel], seed: int) -> Chosen:
    """Fit a network; the epoch is chosen on the validation rows."""
    settings = replace(prepared.config.training, seed=seed)
    torch.manual_seed(seed)
    scaling, spec, graph = fit_scaling(prepared)
    model = kind(spec, graph)
    scaling.apply(model.encoder)
    device = pick_device("auto")
    fitted = fit(model, prepared, device, settings)
    data = DeviceData(prepared.encoded, device)
    logit = score_logits(model, data, prepared.encoded, settings.events_per_chunk)
    figure = max(epoch.validation_average_precision for epoch in fitted.history)
    return Chosen(
        1 / (1 + np.exp(-logit.astype(np.float64))),
        {"seed": seed, "epoch": fitted.best_epoch, "of": len(fitted.history), "validation_average_precision": figure},
    )


def trees(prepared: Prepared, material: Material, features: Features, iterations: int = ITERATIONS) -> Chosen:
    """Boosted trees on every train row; settings and the number of iterations are chosen on the validation rows."""
    fitted, chosen_on, measured = material.train, *parts_of(prepared)[1:]
    train, validation, test = np.split(features.values, [len(fitted), len(fitted) + len(chosen_on)])
    label = prepared.label
    best, score = -1.0, np.full(len(label), np.nan)
    details: dict[str, Any] = {}
    trials = []
    for values in itertools.product(*GRID.values()):
        parameters = dict(zip(GRID, values, strict=True))
        model = HistGradientBoostingClassifier(
            max_iter=iterations,
            l2_regularization=10.0,
            early_stopping=False,
            categorical_features=list(features.categorical),
            random_state=0,
            **parameters,
        )
        model.fit(train, label[fitted])
        staged = [stage[:, 1] for stage in model.staged_predict_proba(validation)]
        figures = [average_precision(label[chosen_on], stage) or 0.0 for stage in staged]
        at = int(np.argmax(figures))
        trials.append({**parameters, "iterations": at + 1, "validation_average_precision": figures[at]})
        if figures[at] > best:
            best, details = figures[at], trials[-1]
            score[chosen_on] = staged[at]
            score[measured] = next(itertools.islice(model.staged_predict_proba(test), at, None))[:, 1]
    return Chosen(score, {**details, "features": len(features.names), "trials": trials})


def parts_of(prepared: Prepared) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Train, validation and test rows, int64 into the encoded rows."""
    rows = prepared.rows
    return np.flatnonzero(rows.train), np.flatnonzero(rows.validation), np.flatnonzero(rows.test)


def told(prepared: Prepared, material: Material, features: Features) -> Features:
    """The features and the seconds since the user's last purchase in each category, NaN where there was none."""
    encoded = prepared.encoded
    past = Past(encoded.time, encoded.begin, encoded.end)
    names, columns = [], []
    for c, vocabulary in enumerate(prepared.vocabularies):
        for code in np.unique(encoded.categorical[:, c]).tolist():
            newest = np.maximum.accumulate(np.where(encoded.categorical[:, c] == code, past.row, -1))
            before = np.r_[-1, newest[:-1]]
            age = np.where(before >= past.begin, (past.time - past.time[np.maximum(before, 0)]) / 1000, np.nan)
            names.append(f"seconds since {vocabulary.column} {code}")
            columns.append(age[material.rows].astype(np.float32))
    return Features((*features.names, *names), np.column_stack([features.values, *columns]), features.categorical)


def comparison(
    prepared: Prepared, rows: npt.NDArray[np.int64], seeds: int, iterations: int = ITERATIONS
) -> dict[str, Any]:
    """Fit everything and measure it on some encoded rows, of the validation or the test; figures are means over seeds."""
    train, validation, test = parts_of(prepared)
    material = Material(prepared, train, np.r_[validation, test], most=len(train))
    features = material.binned()
    fitted: dict[str, list[Chosen]] = {name: [] for name in NETWORKS}
    for seed in range(seeds):
        for name, kind in NETWORKS.items():
            fitted[name].append(network(prepared, kind, seed))
            _say(name, fitted[name][-1])
    for name, seen in {"trees": features, "told_trees": told(prepared, material, features)}.items():
        fitted[name] = [trees(prepared, material, seen, iterations)]
        _say(name, fitted[name][0])
    probabilities = {name: [one.probability for one in each] for name, each in fitted.items()}
    return {
        **compared([scored_rows(prepared, rows, probabilities)]),
        "what": WHAT,
        "chosen": {name: [one.details for one in each] for name, each in fitted.items()},
    }


def _say(name: str, chosen: Chosen) -> None:
    print(json.dumps({name: chosen.details}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--validation", action="store_true", help="the days that settings are chosen on; writes nothing"
    )
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        prepared = read_data(SIMULATION, Path(folder))
    if options.validation:
        print(json.dumps(comparison(prepared, np.flatnonzero(prepared.rows.validation), options.seeds)["differences"]))
        return
    result = comparison(prepared, np.flatnonzero(prepared.rows.test), options.seeds)
    print(json.dumps(result["differences"], indent=1))
    seconds = round(time.perf_counter() - began, 1)
    write_result(
        "order_quality",
        {"simulation": asdict(SIMULATION), "split": prepared.split.as_dict(), **result, "seconds": seconds},
    )


if __name__ == "__main__":
    main()
