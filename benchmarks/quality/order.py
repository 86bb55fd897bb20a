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
from benchmarks.quality.variants import WithoutRecurrence
from seqfraud.config import load_config
from seqfraud.metrics import average_precision, bootstrap_interval, paired_bootstrap
from seqfraud.nn.model import SequenceModel
from training.baselines import Material
from training.history import Features, Past
from training.loop import DeviceData, fit, pick_device, score_logits
from training.prepare import Prepared, fit_scaling, prepare
from training.simulate import Simulation, simulate_to

CONFIG = ROOT / "configs" / "simulator.toml"
SIMULATION = Simulation(
    users=600,
    seed=5,
    purchases_per_day=2.0,
    fraud_share=0.015,
    only_kind="order",
    order_gap=(360.0, 2160.0),
)
EPOCHS = 24
PATIENCE = 6
"""The validation days have some two hundred frauds: their figure goes up and down."""
ITERATIONS = 250
GRID: dict[str, tuple[Any, ...]] = {"learning_rate": (0.03, 0.08), "max_leaf_nodes": (4, 7, 15)}
NETWORKS: dict[str, type[SequenceModel]] = {"gru": SequenceModel, "without_recurrence": WithoutRecurrence}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chosen:
    """A model as it came out best on the validation rows.

    Attributes:
        score: float64 [N], over encoded rows, NaN where it was not needed.
        details: what was chosen, and its figure on the validation rows.
    """

    score: Floats
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
        logit.astype(np.float64),
        {"seed": seed, "epoch": fitted.best_epoch, "of": len(fitted.history), "validation_average_precision": figure},
    )


def trees(prepared: Prepared, material: Material, features: Features, iterations: int = ITERATIONS) -> Chosen:
    """Boosted trees on every train row; settings and the number of iterations are chosen on the validation rows."""
    ends = [len(material.train), len(material.train) + len(material.validation)]
    train, validation, test = np.split(features.values, ends)
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
        model.fit(train, label[material.train])
        staged = [stage[:, 1] for stage in model.staged_predict_proba(validation)]
        figures = [average_precision(label[material.validation], stage) or 0.0 for stage in staged]
        at = int(np.argmax(figures))
        trials.append({**parameters, "iterations": at + 1, "validation_average_precision": figures[at]})
        if figures[at] > best:
            best, details = figures[at], trials[-1]
            score[material.validation] = staged[at]
            score[material.test] = next(itertools.islice(model.staged_predict_proba(test), at, None))[:, 1]
    return Chosen(score, {**details, "features": len(features.names), "trials": trials})


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


def compared(
    prepared: Prepared, rows: npt.NDArray[np.int64], seeds: int, iterations: int = ITERATIONS
) -> dict[str, Any]:
    """Fit everything and measure it on some encoded rows, of the validation or the test."""
    label, users = prepared.label[rows], prepared.table.user.codes[prepared.encoded.arrival[rows]]

    def figures(chosen: Chosen) -> dict[str, Any]:
        return {**_plain(bootstrap_interval("average_precision", label, chosen.score[rows], users)), **chosen.details}

    def lead(a: Chosen, b: Chosen) -> dict[str, Any]:
        return _plain(paired_bootstrap("average_precision", label, a.score[rows], b.score[rows], users))

    material = Material(prepared)
    features = material.binned()
    boosted: dict[str, Chosen] = {}
    for name, seen in {"trees": features, "told_trees": told(prepared, material, features)}.items():
        boosted[name] = trees(prepared, material, seen, iterations)
        _say(name, figures(boosted[name]))
    runs = []
    for seed in range(seeds):
        fitted = {name: network(prepared, kind, seed) for name, kind in NETWORKS.items()}
        others = {**boosted, "without_recurrence": fitted["without_recurrence"]}
        run = {
            **{name: figures(chosen) for name, chosen in fitted.items()},
            "gru_minus": {name: lead(fitted["gru"], other) for name, other in others.items()},
        }
        _say(f"seed {seed}", run)
        runs.append(run)
    return {
        "rows": len(rows),
        "frauds": int((label == 1).sum()),
        "summary": {
            **{name: float(np.mean([run[name]["estimate"] for run in runs])) for name in NETWORKS},
            **{name: figures(chosen)["estimate"] for name, chosen in boosted.items()},
            "least_lead": {name: min(run["gru_minus"][name]["difference"] for run in runs) for name in others},
        },
        **{name: figures(chosen) for name, chosen in boosted.items()},
        "runs": runs,
    }


def _plain(interval: Any) -> dict[str, Any]:
    assert interval is not None  # both classes are among the rows
    return dict(vars(interval))


def _say(name: str, figures: dict[str, Any]) -> None:
    print(json.dumps({name: figures}), flush=True)


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
        compared(prepared, np.flatnonzero(prepared.rows.validation), options.seeds)
        return
    result = compared(prepared, np.flatnonzero(prepared.rows.test), options.seeds)
    print(json.dumps(result["summary"], indent=1))
    seconds = round(time.perf_counter() - began, 1)
    write_result(
        "order_quality",
        {"simulation": asdict(SIMULATION), "split": prepared.split.as_dict(), **result, "seconds": seconds},
    )


if __name__ == "__main__":
    main()
