"""Baselines: same rows as the GRU, six trials each, chosen on validation days, known-good data are learned."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from export.bundle import export_baseline
from seqfraud.bulk import read_for_bundle, score_table
from seqfraud.metrics import average_precision
from seqfraud.nn.checkpoint import load_run
from training.baselines import BINS, FAMILIES, Material, drawn_rows, run_baselines
from training.history import history_features
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


@pytest.mark.parametrize("kind", ["logistic_regression", "random_forest"])
def test_an_exported_baseline_gives_the_scores_that_were_measured(
    compared: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    """Every test row, scored from the file by the bundle alone, as scikit-learn scored it before the export."""
    run = load_run(compared[0])
    bundle = export_baseline(run, kind, tmp_path / kind)
    found = compared[1]["models"][kind]
    assert bundle.manifest.thresholds.as_dict() == found["thresholds"]
    assert bundle.manifest.metrics == {part: found[part] for part in ("validation", "test")}
    assert bundle.manifest.fingerprint["rows"] == run.fingerprint["rows"]
    assert bundle.manifest.fingerprint["probability_deciles"] != run.fingerprint["probability_deciles"]
    table = read_for_bundle(bundle, run.data)
    scored = dict(zip(table.id_texts(), score_table(bundle, table).tolist(), strict=True))
    measured = pq.read_table(compared[0] / "test_scores.parquet")
    assert measured.num_rows > 2000
    got = [scored[i] for i in measured["transaction_id"].to_pylist()]
    np.testing.assert_allclose(got, measured[kind].to_numpy(), atol=1e-6)


def test_only_models_without_history_are_kept_and_nothing_is_pickled(compared: tuple[Path, dict[str, Any]]) -> None:
    kept = sorted(str(file.relative_to(compared[0] / "baselines")) for file in (compared[0] / "baselines").rglob("*.*"))
    assert kept == [
        f"{name}/{file}"
        for name in ("logistic_regression", "random_forest")
        for file in ("baseline.json", "classifier.onnx", "reference.npz")
    ]


def test_boosted_trees_see_ranks_in_the_order_of_the_values(compared: tuple[Path, dict[str, Any]]) -> None:
    """At most 255 values per column, missing ones stay missing, and no two rows change places."""
    run = load_run(compared[0])
    prepared = prepare(run.config, run.data, run.vocabularies)
    material = Material(prepared, np.flatnonzero(prepared.rows.train), np.flatnonzero(prepared.rows.test))
    before, after = material.history.values, material.binned().values
    assert before.shape == after.shape == (len(material.rows), len(material.history.names))
    past = history_features(prepared.table, prepared.encoded, material.rows)
    np.testing.assert_array_equal(before[:, -len(past.names) :], past.values)
    coarser = 0
    for i, name in enumerate(material.history.names):
        assert (np.isnan(before[:, i]) == np.isnan(after[:, i])).all(), name
        train = after[: len(material.train), i]
        assert len(np.unique(train[~np.isnan(train)])) <= BINS, name
        order = np.argsort(before[:, i], kind="stable")
        ranks = after[order, i]
        assert (np.diff(ranks[~np.isnan(ranks)]) >= 0).all(), name
        coarser += not np.array_equal(before[:, i], after[:, i], equal_nan=True)
    assert coarser > 20
