"""Baselines: same rows as the GRU, six trials each, chosen on validation days, known-good data are learned."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from seqfraud.metrics import average_precision
from seqfraud.nn.checkpoint import load_run
from training.baselines import FAMILIES, drawn_rows, run_baselines
from training.prepare import prepare
from training.run import train_run
from training.simulate import Simulation, simulate_to

CONFIG = """
[data]
path = "data.parquet"
transaction = "transaction_id"
user = "user_id"
time = "time"
label = "is_fraud"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["category"]
context = ["merchant_id"]
[split]
train_end = "2025-03-01"
validation = "10d"
[model]
hidden = 8
input_width = 8
head_width = 8
[training]
epochs = 1
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("baselines")
    simulate_to(Simulation(users=150, days=80, fraud_share=0.04), folder / "data.parquet")
    (folder / "config.toml").write_text(CONFIG)
    torch.set_num_threads(1)
    train_run(folder / "config.toml", None, folder / "run", "cpu")
    return folder / "run", run_baselines(load_run(folder / "run"))


def test_every_family_has_six_trials_and_the_best_is_chosen(compared: tuple[Path, dict[str, Any]]) -> None:
    _, result = compared
    assert list(result["models"]) == [family.name for family in FAMILIES]
    for found in result["models"].values():
        assert len(found["trials"]) == 6
        best = max(found["trials"], key=lambda trial: trial["validation_average_precision"])
        assert found["parameters"] == best["parameters"]


def test_scores_are_of_the_test_rows_and_give_the_figures(compared: tuple[Path, dict[str, Any]]) -> None:
    run, result = compared
    scores = pq.read_table(run / "test_scores.parquet")
    assert scores.num_rows == result["gru"]["test"]["rows"]
    label = scores["label"].to_numpy()
    for name, found in result["models"].items():
        assert found["test"]["frauds"] == label.sum()
        figure = average_precision(label, scores[name].to_numpy())
        assert found["test"]["average_precision"] == pytest.approx(figure)
    assert json.loads((run / "baselines.json").read_text()) == json.loads(json.dumps(result))


def test_models_with_history_learn(compared: tuple[Path, dict[str, Any]]) -> None:
    """At 4 % fraud boosted trees rank far better than at random; the unsupervised one at least above it."""
    models = compared[1]["models"]
    prevalence = compared[1]["gru"]["test"]["frauds"] / compared[1]["gru"]["test"]["rows"]
    assert models["boosted_trees"]["test"]["average_precision"] > 5 * prevalence
    assert models["logistic_regression"]["test"]["average_precision"] > 2 * prevalence
    assert models["isolation_forest"]["test"]["roc_auc"] > 0.5


def test_the_report_compares(compared: tuple[Path, dict[str, Any]]) -> None:
    page = (compared[0] / "report.html").read_text()
    for family in FAMILIES:
        assert family.name.replace("_", " ") in page


def test_drawn_rows_keep_every_fraud(compared: tuple[Path, dict[str, Any]]) -> None:
    run = load_run(compared[0])
    prepared = prepare(run.config, run.data, run.vocabularies)
    train = np.flatnonzero(prepared.rows.train)
    frauds = train[prepared.label[train] == 1]
    drawn = drawn_rows(prepared, train, len(frauds) + 100)
    assert len(drawn) == len(frauds) + 100
    assert np.isin(frauds, drawn).all()
    assert np.isin(drawn, train).all()
    assert (drawn_rows(prepared, train, len(train)) == train).all()
