"""The GRU's peers: fitted on the rows it is fitted on, settings from other rows than they are measured on."""

from typing import Any

import numpy as np
import pytest

from benchmarks.quality import peers
from benchmarks.quality.peers import PeerSettings, choose, fit_peers, fitted_rows
from seqfraud.metrics import roc_auc
from training.baselines import FAMILIES, Material
from training.prepare import Prepared

SMALL = {
    "logistic_regression": PeerSettings({"C": 1.0}),
    "random_forest": PeerSettings({"n_estimators": 8}),
    "boosted_trees": PeerSettings({"max_iter": 20, "max_leaf_nodes": 7}),
    "isolation_forest": PeerSettings({"max_samples": 64}),
}


@pytest.fixture
def prepared(small_split: Prepared) -> Prepared:
    return small_split


def test_every_family_scores_the_rows_asked_for_and_no_other(prepared: Prepared) -> None:
    test = np.flatnonzero(prepared.rows.test)
    found = fit_peers(prepared, SMALL, test)
    assert list(found) == [family.name for family in FAMILIES]
    for logit in found.values():
        np.testing.assert_array_equal(np.flatnonzero(~np.isnan(logit)), test)
    auc = {name: roc_auc(prepared.label[test], logit[test]) or 0.0 for name, logit in found.items()}
    assert auc["boosted_trees"] > 0.7
    assert min(auc.values()) > 0.5


def test_a_row_is_scored_alike_whatever_else_is_scored(prepared: Prepared) -> None:
    test = np.flatnonzero(prepared.rows.test)
    trees = {"boosted_trees": SMALL["boosted_trees"]}
    whole, few = (fit_peers(prepared, trees, rows)["boosted_trees"] for rows in (test, test[::5]))
    np.testing.assert_array_equal(whole[test[::5]], few[test[::5]])


def test_fitted_rows_are_those_of_the_refitted_gru_and_weights_make_up_for_the_drawing(prepared: Prepared) -> None:
    fitted = fitted_rows(prepared)
    assert len(fitted) == prepared.rows.train.sum() + prepared.rows.validation.sum()
    assert not prepared.rows.test[fitted].any()
    frauds = int((prepared.label[fitted] == 1).sum())
    material = Material(prepared, fitted, np.flatnonzero(prepared.rows.test), most=frauds + 500)
    drawn = material.train[material.drawn(frauds + 100)]
    for rows, honest in ((material.train, 500), (drawn, 100)):
        weight, fraud = material.weights(rows), prepared.label[rows] == 1
        assert (int(fraud.sum()), int((~fraud).sum())) == (frauds, honest)
        assert (weight[fraud] == 1).all()
        assert weight[~fraud].sum() == pytest.approx(len(fitted) - frauds)


def test_settings_are_the_best_of_the_trials(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "FAMILIES", tuple(f for f in FAMILIES if f.name in ("boosted_trees", "random_forest")))
    monkeypatch.setattr(peers, "MOST_TREES", 40)
    monkeypatch.setattr(peers, "SEARCH", (("max_leaf_nodes", (7,)), ("learning_rate", (0.1,))))
    trials: list[dict[str, Any]] = []
    train, validation = np.flatnonzero(prepared.rows.train), np.flatnonzero(prepared.rows.validation)
    chosen = choose(prepared, train, validation, trials.append)
    for name, settings in chosen.items():
        best = max((t for t in trials if t["family"] == name), key=lambda t: t["average_precision"])
        assert best["parameters"].items() <= settings.parameters.items()
    assert chosen["boosted_trees"].parameters["max_iter"] in (20, 40)
    assert chosen["random_forest"].parameters["n_estimators"] == peers.FOREST_TREES
