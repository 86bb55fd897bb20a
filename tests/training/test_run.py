"""From a configuration to a run folder, to a bundle, to scores: the same figures and probabilities throughout."""

import csv
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

import training.run
from export.bundle import export_run
from seqfraud.bulk import read_for_bundle, score_table
from seqfraud.bundle import Bundle
from seqfraud.config import parse_instant
from seqfraud.errors import ConfigError, DataError, RunError
from seqfraud.metrics import average_precision
from seqfraud.nn.checkpoint import load_run
from seqfraud.nn.model import SequenceModel
from seqfraud.policy import flag_many
from seqfraud.verification import verify_bundle
from training.prepare import prepare
from training.run import all_logits, calibrated, decide_run, evaluate_run, train_run

torch.set_num_threads(1)

HOUR = 3_600_000
DAY = 24 * HOUR
START = 1_735_689_600_000  # 2025-01-01
CPU = torch.device("cpu")
CONFIG = """# comments stay: the file is kept byte for byte, ü included
[data]
path = "data/transactions.parquet"
transaction = "id"
user = "user"
time = "time"
time_unit = "ms"
label = "fraud"
label_delay = "1d"
amount = "amount"

[features]
numeric = ["amount", "age"]
categorical = ["kind"]
context = ["shop"]
geo = [["lat", "long"]]
half_lives = ["1d", "7d"]
bins = 6

[split]
train_start = 2025-01-03
train_end = 2025-01-21
validation = "5d"

[model]
hidden = 12
input_width = 12
head_width = 12

[training]
epochs = 3
learning_rate = 1e-2
users_per_batch = 16
events_per_chunk = 16
"""


def make_data(rows: int = 2400, seed: int = 0) -> pa.Table:
    """Thirty days; large amounts at shop s0 or right after a tiny one are fraud; some ages and places are missing."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, 40, rows)
    time = np.sort(rng.integers(START, START + 30 * DAY, rows))
    amount = rng.choice([1.0, 20.0, 300.0], rows, p=[0.2, 0.5, 0.3]) * rng.lognormal(0, 0.1, rows)
    shop = rng.integers(0, 6, rows)
    fraud = np.zeros(rows, dtype=np.int64)
    last: dict[int, float] = {}
    for i in range(rows):
        fraud[i] = amount[i] > 100 and (shop[i] == 0 or last.get(int(user[i]), 99) < 5)
        last[int(user[i])] = amount[i]
    return pa.table(
        {
            "id": [f"t{i}" for i in range(rows)],
            "user": [f"user {u}" for u in user],
            "time": time,
            "amount": amount,
            "age": [None if x < 0.1 else 20 + 50 * x for x in rng.random(rows)],
            "kind": [("grocery", "travel", "rare")[k] for k in rng.choice(3, rows, p=[0.6, 0.39, 0.01])],
            "shop": [f"s{s}" for s in shop],
            "lat": [None if x < 0.05 else 50 + x for x in rng.random(rows)],
            "long": 8 + rng.random(rows),
            "fraud": fraud,
        }
    )


@dataclass(frozen=True)
class Trained:
    """A training as it was, to be compared with what is on disk."""

    config: Path
    data: Path
    run: Path
    metrics: dict[str, Any]
    logits: npt.NDArray[np.float32]
    """Uncalibrated, by encoded row."""
    probability: npt.NDArray[np.float64]
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run trained by a configuration whose data.path is relative to it."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "configs" / "small.toml"
    data = folder / "configs" / "data" / "transactions.parquet"
    data.parent.mkdir(parents=True)
    config.write_text(CONFIG, encoding="utf-8")
    pq.write_table(make_data(), data)
    seen: dict[str, Any] = {}

    def watched(model: SequenceModel, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        probability = calibrated(model, logits)
        seen.update(state=model.state_dict(), logits=logits, probability=probability)
        return probability

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.run, "calibrated", watched)
        metrics = train_run(config, None, folder / "runs" / "small", "cpu")
    return Trained(config, data, folder / "runs" / "small", metrics, **seen)


@pytest.fixture(scope="module")
def bundle(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_run(load_run(trained.run), tmp_path_factory.mktemp("exported") / "bundle")


def spoil(trained: Trained, folder: Path) -> Path:
    """A copy of the run folder to be changed."""
    return Path(shutil.copytree(trained.run, folder / "run"))


# --- The run folder ----------------------------------------------------------------------------------------------


def test_the_folder_holds_its_six_files_and_the_configuration_byte_for_byte(trained: Trained) -> None:
    assert sorted(f.name for f in trained.run.iterdir()) == [
        "config.toml", "metrics.json", "model.json", "model.safetensors", "reference.npz", "report.html"
    ]  # fmt: skip
    assert (trained.run / "config.toml").read_bytes() == trained.config.read_bytes()


def test_metrics_json_is_what_training_returned_and_says_how_it_came_about(trained: Trained) -> None:
    metrics = json.loads((trained.run / "metrics.json").read_text())
    assert metrics == trained.metrics
    assert metrics["model"] == "gru"
    assert metrics["device"] == "cpu"
    assert metrics["split"] == {
        "train_start": "2025-01-03T00:00:00Z",
        "validation_start": "2025-01-16T00:00:00Z",
        "train_end": "2025-01-21T00:00:00Z",
        "test_start": "2025-01-22T00:00:00Z",
        "test_end": metrics["split"]["test_end"],
    }
    time = pq.read_table(trained.data)["time"].to_numpy()
    bounds = {name: parse_instant(text) for name, text in metrics["split"].items()}
    assert bounds["test_end"] == time[-1] + 1
    for part, begin, end in (
        ("train", "train_start", "validation_start"),
        ("before_validation", "train_start", "validation_start"),
        ("validation", "validation_start", "train_end"),
        ("test", "test_start", "test_end"),
    ):
        assert metrics["rows"][part] == ((time >= bounds[begin]) & (time < bounds[end])).sum()
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2, 3]
    figures = [epoch["validation_average_precision"] for epoch in metrics["epochs"]]
    assert metrics["best_epoch"] == 1 + int(np.argmax(figures))
    # of the best epoch's weights; Platt scaling keeps the ranking, rounding may join scores
    assert metrics["validation"]["average_precision"] == pytest.approx(max(figures), abs=1e-3)
    assert metrics["cleaning"]["rows_used"] == 2400
    assert {"reason": "missing number", "column": "age"}.items() <= metrics["cleaning"]["findings"][0].items()


def test_figures_are_those_of_the_probabilities(trained: Trained) -> None:
    prepared = prepare(load_run(trained.run).config, trained.data)
    for part in ("validation", "test"):
        mask = getattr(prepared.rows, part)
        label, probability = prepared.label[mask], trained.probability[mask]
        figures = trained.metrics[part]
        assert (figures["rows"], figures["frauds"]) == (mask.sum(), (label == 1).sum())
        assert figures["average_precision"] == pytest.approx(average_precision(label, probability))
        flagged = flag_many(probability, load_run(trained.run).policy.thresholds)
        assert figures["flagged"] == flagged.sum() > 0
        assert figures["precision"] == pytest.approx((label[flagged] == 1).mean())
        assert figures["recall"] == pytest.approx(flagged[label == 1].mean())
        assert figures["money_caught"] is not None


def test_probabilities_are_calibrated_on_the_validation_rows(trained: Trained) -> None:
    """Platt scaling makes their mean the share of frauds (but for its smoothing) and their slope 1."""
    validation = trained.metrics["validation"]
    prepared = prepare(load_run(trained.run).config, trained.data)
    mean = trained.probability[prepared.rows.validation].mean()
    assert mean == pytest.approx(validation["frauds"] / validation["rows"], rel=0.05)
    assert validation["calibration_slope"] == pytest.approx(1, abs=0.15)


def test_the_model_that_is_read_has_the_weights_and_logits_that_were_trained(trained: Trained) -> None:
    run = load_run(trained.run)
    assert not run.model.training
    state = run.model.state_dict()
    assert state.keys() == trained.state.keys()
    assert all(torch.equal(value, trained.state[name]) for name, value in state.items())
    prepared = prepare(run.config, trained.data, run.vocabularies)
    np.testing.assert_array_equal(all_logits(run.model, prepared, CPU), trained.logits)
    assert run.calibration == {"method": "platt", "scale": float(run.model.scale), "shift": float(run.model.shift)}
    assert run.model.scale != 1
    assert run.policy.as_dict() == {name: trained.metrics[name] for name in ("thresholds", "decision")}
    assert run.data == trained.data


def test_reference_rows_are_of_the_training_time_and_hold_no_identifier(trained: Trained) -> None:
    with np.load(trained.run / "reference.npz", allow_pickle=False) as stored:
        rows = {name: stored[name] for name in stored.files}
    assert set(rows) == {"event_time", "numeric", "categorical", "context"}
    assert {name: value.dtype.name for name, value in rows.items()} == {
        "event_time": "int64", "numeric": "float32", "categorical": "int64", "context": "float32"
    }  # fmt: skip
    assert rows["event_time"].max() < parse_instant("2025-01-21")
    prepared = prepare(load_run(trained.run).config, trained.data)
    early = np.flatnonzero(prepared.encoded.time < prepared.split.train_end)
    highest = early[trained.probability[early].argmax()]
    at = np.flatnonzero(rows["event_time"] == prepared.encoded.time[highest])
    assert any(np.array_equal(rows["numeric"][i], prepared.encoded.numeric[highest], equal_nan=True) for i in at)


def test_the_fingerprint_says_what_the_training_rows_looked_like(trained: Trained) -> None:
    table = pq.read_table(trained.data)
    begin, end = parse_instant("2025-01-03"), parse_instant("2025-01-16")
    train = table.filter(pc.and_(pc.greater_equal(table["time"], begin), pc.less(table["time"], end)))
    found = load_run(trained.run).fingerprint
    assert found["rows"] == len(train)
    assert found["frauds"] == pc.sum(train["fraud"]).as_py()
    assert found["users"] == pc.count_distinct(train["user"]).as_py()
    assert parse_instant(found["first"]) == pc.min(train["time"]).as_py()
    assert parse_instant(found["last"]) == pc.max(train["time"]).as_py()
    amounts = train["amount"].to_numpy()
    deciles = np.quantile(amounts, np.linspace(0, 1, 11))
    np.testing.assert_allclose(found["numeric_deciles"]["amount"], deciles, rtol=1e-5)
    gaps = [
        later - earlier
        for user in set(table["user"].to_pylist())
        for times in [sorted(pc.filter(table["time"], pc.equal(table["user"], user)).to_pylist())]
        for earlier, later in itertools.pairwise(times)
        if begin <= later < end
    ]
    np.testing.assert_allclose(found["gap_deciles_s"], np.quantile(gaps, np.linspace(0, 1, 11)) / 1000)
    hours = np.bincount(train["time"].to_numpy() // 3_600_000 % 24, minlength=24)
    assert hours[found["hour"]] == hours.max()
    prepared = prepare(load_run(trained.run).config, trained.data)
    ages = prepared.encoded.context[prepared.rows.before_validation]
    for k, name in enumerate(prepared.context.names()):
        np.testing.assert_allclose(found["context_deciles"][name], np.quantile(ages[:, k], np.linspace(0, 1, 11)))
    assert found["numeric_missing"]["age"] == pytest.approx(train["age"].null_count / len(train))
    assert found["numeric_missing"]["amount"] == 0
    json.dumps(found, allow_nan=False)


# --- Evaluating --------------------------------------------------------------------------------------------------


def test_evaluation_gives_the_figures_of_the_training(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from another working folder and for a moved run: data.path is relative to the configuration that was given
    to `train`, of which the run folder holds only a copy."""
    monkeypatch.chdir(tmp_path)
    moved = spoil(trained, tmp_path / "elsewhere")
    evaluated = evaluate_run(load_run(moved), None, "cpu")
    parts = ("split", "rows", "cleaning", "worth", "validation", "test")
    assert evaluated == {name: trained.metrics[name] for name in parts}


def test_evaluation_on_other_data_fits_nothing(trained: Trained, tmp_path: Path) -> None:
    """The other file's most frequent kind is the run's second one: a vocabulary fitted anew would swap their ids."""
    other = make_data(seed=1)
    swapped = ["travel" if kind == "grocery" else "grocery" for kind in other["kind"].to_pylist()]
    path = tmp_path / "other.parquet"
    pq.write_table(other.set_column(other.schema.get_field_index("kind"), "kind", pa.array(swapped)), path)
    run = load_run(trained.run)
    evaluated = evaluate_run(run, path, "cpu")
    prepared = prepare(run.config, path, run.vocabularies)
    assert prepare(run.config, path).vocabularies[0].values == ("travel", "grocery")
    assert run.vocabularies[0].values[:2] == ("grocery", "travel")
    probability = calibrated(run.model, all_logits(run.model, prepared, CPU))[prepared.rows.test]
    expected = average_precision(prepared.label[prepared.rows.test], probability)
    assert evaluated["test"]["average_precision"] == pytest.approx(expected, abs=1e-12)
    flagged = flag_many(probability, run.policy.thresholds)
    assert evaluated["test"]["flagged"] == flagged.sum()
    assert all(torch.equal(v, trained.state[k]) for k, v in run.model.state_dict().items())


def test_data_given_to_train_is_what_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative --data is relative to the working folder, and remembered for good."""
    (tmp_path / "a").mkdir()
    pq.write_table(make_data(seed=2), tmp_path / "a" / "given.parquet")
    quick = tmp_path / "quick.toml"
    quick.write_text(CONFIG.replace("epochs = 3", "epochs = 1"), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "a")
    metrics = train_run(quick, Path("given.parquet"), tmp_path / "run", "cpu")
    monkeypatch.chdir(tmp_path)
    run = load_run(tmp_path / "run")
    assert run.data == tmp_path / "a" / "given.parquet"
    assert evaluate_run(run, None, "cpu")["test"] == metrics["test"]


def test_neither_path_nor_data_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.replace('path = "data/transactions.parquet"', ""), encoding="utf-8")
    with pytest.raises(RunError, match=r"data\.path is missing and no --data is given"):
        train_run(config, None, tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()


# --- Training ----------------------------------------------------------------------------------------------------


def quick_run(trained: Trained, folder: Path, change: Callable[[str], str] = str) -> Path:
    """One epoch on the same data."""
    folder.mkdir()
    config = folder / "config.toml"
    config.write_text(change(CONFIG.replace("epochs = 3", "epochs = 1")), encoding="utf-8")
    train_run(config, trained.data, folder / "run", "cpu")
    return folder / "run"


def test_a_seed_fixes_the_run_and_another_one_gives_another(trained: Trained, tmp_path: Path) -> None:
    def seeded(text: str) -> str:
        return text + "seed = 9\n"

    first, again = (quick_run(trained, tmp_path / name) for name in ("a", "b"))
    for name in ("model.safetensors", "reference.npz"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    other = quick_run(trained, tmp_path / "c", seeded)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_without_calibration_the_probability_is_the_plain_sigmoid(trained: Trained, tmp_path: Path) -> None:
    run = load_run(quick_run(trained, tmp_path / "a", lambda text: text + '[calibration]\nmethod = "none"\n'))
    assert run.calibration == {"method": "none", "scale": 1.0, "shift": 0.0}
    assert (float(run.model.scale), float(run.model.shift)) == (1.0, 0.0)


def test_a_number_missing_only_after_training_is_an_error_that_names_the_row(trained: Trained, tmp_path: Path) -> None:
    """The model would answer NaN for it; the service refuses such a transaction with 422."""
    table = pq.read_table(trained.data)
    amounts = table["amount"].to_pylist()
    amounts[2300] = None
    broken = table.set_column(table.schema.get_field_index("amount"), "amount", pa.array(amounts))
    pq.write_table(broken, tmp_path / "broken.parquet")
    message = r"column 'amount': no number in 1 of 2400 rows, first in row 2301, but none was missing"
    with pytest.raises(DataError, match=message):
        train_run(trained.config, tmp_path / "broken.parquet", tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=message):
        evaluate_run(load_run(trained.run), tmp_path / "broken.parquet", "cpu")


@pytest.mark.parametrize("name", ["config.toml", "model.json", "model.safetensors", "reference.npz", "metrics.json"])
def test_a_run_that_lacks_a_file_is_an_error(trained: Trained, tmp_path: Path, name: str) -> None:
    run = spoil(trained, tmp_path)
    (run / name).unlink()
    with pytest.raises(RunError, match=f"{name} is missing; expected a run folder written by `seqfraud train`"):
        load_run(run)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('numeric = ["amount", "age"]', 'numeric = ["age", "amount"]', "schema"),
        ('half_lives = ["1d", "7d"]', 'half_lives = ["1d", "8d"]', "context"),
        ('label_delay = "1d"', 'label_delay = "2d"', "context"),
    ],
)
def test_a_configuration_that_was_changed_after_training_is_refused(
    trained: Trained, tmp_path: Path, old: str, new: str, what: str
) -> None:
    """Two numbers swapped in config.toml would have exported a bundle that reads the amount as an age."""
    run = spoil(trained, tmp_path)
    assert old in CONFIG
    (run / "config.toml").write_text(CONFIG.replace(old, new), encoding="utf-8")
    with pytest.raises(RunError, match=f"config.toml was changed after training: its {what} is not that of model.json"):
        load_run(run)


def test_what_the_weights_do_not_depend_on_may_be_changed(trained: Trained, tmp_path: Path) -> None:
    run = spoil(trained, tmp_path)
    (run / "config.toml").write_text(CONFIG + "[serve]\nwindow = 77\n", encoding="utf-8")
    assert load_run(run).config.serve.window == 77


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.json", b"{"),
        ("model.json", b"[]"),
        ("model.json", b'{"schema": 1}'),
        ("model.safetensors", b"not weights"),
        ("metrics.json", b""),
    ],
)
def test_a_file_of_the_run_that_is_spoilt_is_an_error(
    trained: Trained, tmp_path: Path, name: str, content: bytes
) -> None:
    run = spoil(trained, tmp_path)
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=r"not readable as a run|was changed"):
        load_run(run)


def test_weights_of_another_shape_are_an_error(trained: Trained, tmp_path: Path) -> None:
    run = spoil(trained, tmp_path)
    raw = json.loads((run / "model.json").read_text())
    raw["model"]["hidden"] = 13
    (run / "model.json").write_text(json.dumps(raw))
    with pytest.raises(RunError, match="not readable as a run of this version, train it again: RuntimeError"):
        load_run(run)


def test_a_run_from_before_models_had_several_networks_is_read(trained: Trained, tmp_path: Path) -> None:
    run = spoil(trained, tmp_path)
    raw = json.loads((run / "model.json").read_text())
    assert raw["model"].pop("members") == 1
    (run / "model.json").write_text(json.dumps(raw))
    weights = safetensors.torch.load_file(run / "model.safetensors")
    old = {name.removeprefix("networks.0."): value for name, value in weights.items()}
    assert sum(name.startswith(("input.", "cells.", "output.", "encoder.")) for name in old) > 8
    safetensors.torch.save_file(old, run / "model.safetensors")
    read = load_run(run).model.state_dict()
    assert {name: value.tolist() for name, value in read.items()} == {n: v.tolist() for n, v in weights.items()}


def test_an_unknown_device_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    with pytest.raises(ConfigError, match="--device: 'tpu'"):
        train_run(config, tmp_path / "absent.parquet", tmp_path / "run", "tpu")


# --- Decisions ---------------------------------------------------------------------------------------------------

COST = """
[decision]
by = "cost"
review_cost = 4.0
insult_cost = 3.0
insult_share = 0.1
fraud_cost = 15.0
"""


@pytest.fixture(scope="module")
def by_cost(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run after its [decision] was changed and `seqfraud decide` chose by it."""
    run = spoil(trained, tmp_path_factory.mktemp("decided"))
    with (run / "config.toml").open("a", encoding="utf-8") as file:
        file.write(COST)
    for refused in (lambda: load_run(run), lambda: export_run(load_run(run), run / "bundle")):
        with pytest.raises(RunError, match=r"the \[decision\] of config.toml was changed; `seqfraud decide "):
            refused()
    decide_run(load_run(run, decided=False), None, "cpu")
    return run


def test_another_policy_needs_no_training_and_reaches_the_bundle(trained: Trained, by_cost: Path) -> None:
    run = load_run(by_cost)
    assert (by_cost / "model.safetensors").read_bytes() == (trained.run / "model.safetensors").read_bytes()
    assert run.policy.by == "cost"
    assert run.policy.thresholds.is_fraud == load_run(trained.run).policy.thresholds.is_fraud
    metrics = json.loads((by_cost / "metrics.json").read_text())
    assert run.policy.as_dict() == {name: metrics[name] for name in ("thresholds", "decision")}
    assert metrics["choice"]["chosen_on"] == "validation rows"
    assert export_run(run, by_cost.parent / "bundle").manifest.policy == run.policy
    assert "Decided is by the least expected cost" in (by_cost / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("part", ["validation", "test"])
def test_what_decisions_are_worth_is_what_counting_gives(trained: Trained, by_cost: Path, part: str) -> None:
    run = load_run(by_cost)
    worth = json.loads((by_cost / "metrics.json").read_text())["worth"]
    prepared = prepare(run.config, trained.data)
    mask = getattr(prepared.rows, part)
    fraud, arrival = prepared.label[mask] == 1, prepared.encoded.arrival[mask]
    amount = prepared.table.amount()
    assert amount is not None
    decisions = [run.policy.decide(p, a) for p, a in zip(trained.probability[mask], amount[arrival], strict=True)]
    lost = insulted = reviewed = without = 0.0
    for decision, is_fraud, money in zip(decisions, fraud, amount[arrival], strict=True):
        without += (15 + money) * is_fraud
        lost += (15 + money) * (is_fraud and decision == "approve")
        reviewed += 4 * (decision == "review")
        insulted += (3 + 0.1 * money) * (not is_fraud and decision == "decline")
    days, found = worth[part]["days"], worth[part]["policies"]
    mine = found["this policy"]
    assert days == pytest.approx(5 if part == "validation" else 9, rel=0.01)
    assert mine["fraud_lost"] == pytest.approx(lost / days)
    assert mine["review_costs"] == pytest.approx(reviewed / days)
    assert mine["insult_costs"] == pytest.approx(insulted / days)
    assert mine["cost"]["estimate"] == pytest.approx((lost + reviewed + insulted) / days)
    assert found["no model"]["cost"]["estimate"] == pytest.approx(without / days)
    assert mine["saved"]["estimate"] == pytest.approx((without - lost - reviewed - insulted) / days)
    assert mine["saved"]["low"] < mine["saved"]["estimate"] < mine["saved"]["high"]
    assert mine["alerts"] == pytest.approx(sum(d != "approve" for d in decisions) / days)
    assert mine["less_than_this"] == {"estimate": 0, "low": 0, "high": 0}
    assert list(found)[:2] == ["no model", "this policy"]
    for name in list(found)[2:]:
        other = found[name]
        assert other["less_than_this"]["estimate"] == pytest.approx(
            mine["cost"]["estimate"] - other["cost"]["estimate"]
        )


def test_the_policies_of_comparison_are_chosen_on_the_validation_days_once(
    trained: Trained, by_cost: Path, tmp_path: Path
) -> None:
    """On other data they are measured as they are, whatever the labels of those say."""
    chosen = json.loads((by_cost / "metrics.json").read_text())["choice"]["alternatives"]
    table = make_data(seed=9)
    turned = pa.array(1 - table["fraud"].to_numpy())
    path = tmp_path / "turned.parquet"
    pq.write_table(table.set_column(table.schema.get_field_index("fraud"), "fraud", turned), path)
    run = load_run(by_cost)
    found = evaluate_run(run, path, "cpu")["worth"]["test"]["policies"]
    assert list(found) == ["no model", "this policy", *chosen]
    assert json.loads((by_cost / "metrics.json").read_text())["choice"]["alternatives"] == chosen
    assert load_run(by_cost).policy == run.policy


# --- Export and bulk scoring -------------------------------------------------------------------------------------


def test_bulk_scores_of_the_bundle_are_the_probabilities_of_the_module(trained: Trained, bundle: Bundle) -> None:
    table = read_for_bundle(bundle, trained.data)
    scores = score_table(bundle, table, threads=1)
    prepared = prepare(load_run(trained.run).config, trained.data)
    expected = np.empty(len(table))
    expected[prepared.encoded.arrival] = trained.probability
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert expected.max() - expected.min() > 0.3
    assert verify_bundle(bundle.path)


def test_the_manifest_carries_what_training_found(trained: Trained, bundle: Bundle) -> None:
    run, manifest = load_run(trained.run), bundle.manifest
    assert manifest.schema == run.schema
    assert (manifest.label.column, manifest.label.known_at) == ("fraud", None)
    assert manifest.context.half_lives == (DAY, 7 * DAY)
    assert manifest.context.label_delay == DAY
    assert manifest.missing == ("age", "lat", "long")
    assert manifest.vocabularies[0].column == "kind"
    assert set(manifest.vocabularies[0].values) >= {"grocery", "travel"}
    assert manifest.policy == run.policy
    assert manifest.calibration == run.calibration
    assert manifest.fingerprint == run.fingerprint
    assert manifest.metrics == {part: trained.metrics[part] for part in ("validation", "test", "watched")}
    assert (manifest.serve.window, manifest.serve.max_batch) == (32, 1000)
    assert {"python", "torch", "onnx", "onnxruntime", "numpy", "seqfraud"} <= manifest.versions.keys()


def test_exporting_twice_gives_the_same_bundle(trained: Trained, bundle: Bundle, tmp_path: Path) -> None:
    assert export_run(load_run(trained.run), tmp_path / "again").id == bundle.id


def test_scores_do_not_depend_on_the_order_of_rows_or_the_kind_of_file(
    trained: Trained, bundle: Bundle, tmp_path: Path
) -> None:
    table = read_for_bundle(bundle, trained.data)
    expected = dict(zip(table.id_texts(), score_table(bundle, table, threads=1).tolist(), strict=True))
    raw = pq.read_table(trained.data)
    shuffled = raw.take(np.random.default_rng(0).permutation(len(raw)))
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, raw.column_names)
        writer.writeheader()
        writer.writerows(shuffled.to_pylist())
    other = read_for_bundle(bundle, tmp_path / "data.csv")
    got = dict(zip(other.id_texts(), score_table(bundle, other, threads=1).tolist(), strict=True))
    assert got.keys() == expected.keys()
    assert max(abs(got[key] - p) for key, p in expected.items()) < 2e-6


def test_a_score_depends_only_on_what_came_before(trained: Trained, bundle: Bundle, tmp_path: Path) -> None:
    """The file cut off at any time: the scores up to there are the same."""
    table = read_for_bundle(bundle, trained.data)
    whole = score_table(bundle, table, threads=1)
    for rows in (1, 500, 1501):
        part = score_table(bundle, table.take(np.arange(rows)), threads=1)
        np.testing.assert_allclose(part, whole[:rows], atol=2e-6)


def test_unknown_labels_of_the_last_days_leave_earlier_scores_alone(
    trained: Trained, bundle: Bundle, tmp_path: Path
) -> None:
    """A label is heard one day later: of a file without labels in its last days only the end may differ."""
    raw = pq.read_table(trained.data)
    cut = START + 20 * DAY
    labels = pc.if_else(pc.less(raw["time"], cut), raw["fraud"], pa.scalar(None, pa.int64()))
    unlabelled = raw.set_column(raw.schema.get_field_index("fraud"), "fraud", labels)
    pq.write_table(unlabelled, tmp_path / "unlabelled.parquet")
    table = read_for_bundle(bundle, trained.data)
    expected = score_table(bundle, table, threads=1)
    got = score_table(bundle, read_for_bundle(bundle, tmp_path / "unlabelled.parquet"), threads=1)
    before = table.time < cut + DAY
    np.testing.assert_allclose(got[before], expected[before], atol=2e-6)
    assert np.abs(got[~before] - expected[~before]).max() > 1e-3  # known frauds do matter


def test_a_missing_number_without_a_place_is_an_error_in_bulk_too(
    trained: Trained, bundle: Bundle, tmp_path: Path
) -> None:
    """onnxruntime's GRU swallows NaN: without this check the scores would be finite and wrong."""
    raw = pq.read_table(trained.data)
    amounts = raw["amount"].to_pylist()
    amounts[7] = None
    broken = raw.set_column(raw.schema.get_field_index("amount"), "amount", pa.array(amounts))
    pq.write_table(broken, tmp_path / "broken.parquet")
    table = read_for_bundle(bundle, tmp_path / "broken.parquet")
    with pytest.raises(DataError, match=r"column 'amount': no number in 1 of 2400 rows, first in row 8, but"):
        score_table(bundle, table)


def test_evaluation_on_later_data_needs_no_training_rows(trained: Trained) -> None:
    """A file of the days from the test's start on: all of its labelled rows are measured."""
    run = load_run(trained.run)
    raw = pq.read_table(trained.data)
    begin = parse_instant(run.metrics["split"]["test_start"])
    later = trained.data.parent / "later.parquet"
    pq.write_table(raw.filter(pc.greater_equal(raw["time"], begin)), later)
    figures = evaluate_run(run, later, "cpu")
    assert "validation" not in figures
    assert figures["test"]["rows"] == pc.sum(pc.greater_equal(raw["time"], begin)).as_py()
    assert (trained.run / "report-later.html").is_file()
    earlier = trained.data.parent / "earlier.parquet"
    pq.write_table(raw.filter(pc.less(raw["time"], begin)), earlier)
    with pytest.raises(DataError, match="there is no labelled row from 2025-01-22"):
        evaluate_run(run, earlier, "cpu")
