"""A baseline without a state as a bundle: the same contract, gate, commands and service as the GRU's."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from export.bundle import export_baseline
from export.reference import LONG_EVENTS, LONG_USERS, RAGGED_LENGTHS
from seqfraud.bulk import read_for_bundle, score_table
from seqfraud.bundle import Bundle
from seqfraud.cli import main
from seqfraud.config import DecisionConfig, parse_config
from seqfraud.context import context_spec
from seqfraud.errors import ParityError, RunError
from seqfraud.graph import gru_graph
from seqfraud.nn.baseline import CLASSIFIER, Baseline, RowFeatures, RowSpec, inputs_id, row_names, write_baseline
from seqfraud.nn.checkpoint import Run
from seqfraud.nn.model import ModelSpec, SequenceModel
from seqfraud.policy import Costs, Policy, Thresholds
from seqfraud.registry import Registry
from seqfraud.runtime import SequenceGraph, StepGraph
from seqfraud.schema import schema_of
from seqfraud.vocabulary import Vocabulary
from serve.arrivals import arrivals
from serve.load import load
from serve.service import Service
from serve.shadow import read_shadow
from training.baselines import FAMILIES
from training.history import Features
from training.portable import Portable, as_onnx, round_thresholds

HOUR = 3_600_000
START = 1_735_689_600_000
KINDS = ("food", "fuel", "travel")
CONFIG = """
[data]
transaction = "id"
user = "user"
time = "time"
time_unit = "ms"
label = "fraud"
label_delay = "2h"
amount = "amount"
[features]
numeric = ["amount", "age"]
categorical = ["kind"]
context = ["shop"]
half_lives = ["1d"]
[serve]
window = 3
max_batch = 50
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "logistic_regression": {"C": 1.0, "class_weight": None},
    "random_forest": {"min_samples_leaf": 5, "class_weight": None},
}
Raw = dict[str, npt.NDArray[Any]]


def raw_rows(count: int, context: int, seed: int) -> Raw:
    """Numbers with missing ones among them, ids with padding and unseen ones, unknown ages in the contexts."""
    rng = np.random.default_rng(seed)
    numeric = rng.lognormal(3, 1.5, (count, 2)).astype(np.float32)
    numeric[rng.random((count, 2)) < 0.1] = np.nan
    return {
        "event_time": START + rng.integers(-2 * 10**12, 10**10, count),
        "numeric": numeric,
        "categorical": rng.integers(0, 2 + len(KINDS), (count, 1)),
        "context": rng.choice([-1.0, 0.0, 0.3, 2.0, 50.0], (count, context)).astype(np.float32),
    }


def fitted(kind: str, context: int) -> Portable:
    """A family of `training.baselines` on random rows whose frauds are large amounts at busy shops on some days."""
    family = next(family for family in FAMILIES if family.name == kind)
    spec = RowSpec(2, 1, context, 0.0, True) if kind == "logistic_regression" else RowSpec(2, 1, context, -1.0)
    rows = raw_rows(3000, context, 0)
    values = RowFeatures(spec)({k: torch.from_numpy(v) for k, v in rows.items()}).numpy()
    logit = (
        np.nan_to_num(rows["numeric"][:, 0]) / 30 + rows["context"][:, 0] / 20 + (rows["categorical"][:, 0] == 2) - 3
    )
    fraud = np.random.default_rng(1).random(3000) < 1 / (1 + np.exp(-logit))
    names = tuple(map(str, range(spec.width)))
    model = family.build(SETTINGS[kind], Features(names, values, (spec.width - 1,)))
    model.fit(values, fraud.astype(np.int8))
    return Portable(kind, spec, family.bounds, model, family.score, 1.2, -0.5)


def write(run: Run, portable: Portable) -> None:
    rows = raw_rows(2500, portable.spec.context, 2)
    logit, probability = portable.outputs(rows)
    rows |= {"logit": logit.astype(np.float32), "probability": probability.astype(np.float32)}
    context = context_spec(run.config, run.schema)
    baseline = Baseline(
        kind=portable.kind,
        rows=portable.spec,
        features=row_names(run.schema, context),
        bounds=portable.bounds,
        calibration={"method": "platt", "scale": portable.scale, "shift": portable.shift},
        policy=Policy(Thresholds(0.5, 0.3, 0.9), costs=Costs(4.0, insult_cost=9.0)),
        decided_by=asdict(run.config.decision),
        fingerprint={"rows": 3000},
        metrics={"test": {"average_precision": 0.5}},
        versions={"scikit-learn": "1"},
        made_for=inputs_id(run.schema, context, run.vocabularies),
    )
    write_baseline(run.path, baseline, as_onnx(portable.model, portable.spec.width), rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with both baselines; the GRU's weights are never looked at."""
    config = parse_config(CONFIG, "config.toml")
    schema = schema_of(config)
    context = context_spec(config, schema)
    graph = gru_graph(schema, context, layers=1, hidden=4)
    spec = ModelSpec(2, 0, graph.context, (2 + len(KINDS),), (0, 1), 0, 4, 1, 4, 4, 2)
    made = Run(
        path=tmp_path_factory.mktemp("run"),
        data=Path("data.parquet"),
        config=config,
        schema=schema,
        graph=graph,
        model=SequenceModel(spec, graph),
        vocabularies=(Vocabulary("kind", KINDS),),
        calibration={"method": "platt", "scale": 9.0, "shift": 9.0},
        policy=Policy(Thresholds(0.9, 0.8, 0.95)),
        fingerprint={"rows": 1},
        metrics={"test": {"average_precision": 0.9}},
    )
    for kind in SETTINGS:
        write(made, fitted(kind, graph.context))
    models: dict[str, Any] = {kind: {} for kind in (*SETTINGS, "boosted_trees", "isolation_forest")}
    (made.path / "baselines.json").write_text(json.dumps({"models": models}))
    return made


@pytest.fixture(scope="module")
def bundles(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {kind: export_baseline(run, kind, folder / kind) for kind in SETTINGS}


@pytest.fixture(scope="module", params=list(SETTINGS))
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Bundle]) -> Bundle:
    return bundles[request.param]


# ---- the bundle


def test_the_manifest_is_the_baselines_own(bundles: dict[str, Bundle]) -> None:
    for kind, bundle in bundles.items():
        manifest = bundle.manifest
        assert manifest.kind == kind
        assert manifest.graph.states == ()
        assert manifest.policy == Policy(Thresholds(0.5, 0.3, 0.9), costs=Costs(4.0, insult_cost=9.0))
        assert manifest.calibration["scale"] == 1.2
        assert manifest.metrics == {"test": {"average_precision": 0.5}}
        assert manifest.missing == ("amount", "age")
        assert "scikit-learn" in manifest.versions
    assert bundles["logistic_regression"].id != bundles["random_forest"].id


def test_a_baseline_that_decides_by_another_section_is_refused(run: Run) -> None:
    """`seqfraud decide` chose anew for the GRU only."""
    changed = replace(run, config=replace(run.config, decision=DecisionConfig(alert_share=0.02)))
    with pytest.raises(RunError, match=r"decides by another \[decision\]; run `seqfraud baselines"):
        export_baseline(changed, "random_forest", run.path / "bundle")


def test_every_check_was_made_and_found_next_to_nothing(bundle: Bundle) -> None:
    measured = {k: v for k, v in bundle.manifest.parity.measured.items() if k != "probabilities visited"}
    assert len(measured) == 8 + LONG_USERS
    assert all(figures["probability"] < 1e-6 and figures["logit"] < 1e-4 for figures in measured.values())
    visited = bundle.manifest.parity.measured["probabilities visited"]
    assert visited["lowest"] < 0.05
    assert visited["highest"] > 0.9


def test_cases_hold_every_reference_row(run: Run, bundle: Bundle) -> None:
    """Rows of a model without a state may stand anywhere: none is checked twice while there are others."""
    with np.load(bundle.path / "reference.npz") as cases:
        seen = np.r_[cases["ragged/event_time"].ravel(), cases["long/event_time"].ravel()]
        real = np.arange(max(RAGGED_LENGTHS))[None] < np.array(RAGGED_LENGTHS)[:, None]
        assert cases["ragged/out.logit"].shape == real.shape
    with np.load(run.path / "baselines" / bundle.manifest.kind / "reference.npz") as rows:
        assert set(rows["event_time"].tolist()) == set(seen.tolist())
        assert len(seen) == LONG_USERS * LONG_EVENTS + real.size


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_both_graphs_give_what_scikit_learn_gives(run: Run, bundles: dict[str, Bundle], kind: str) -> None:
    """20,000 rows other than those of the reference, missing numbers, unseen ids and times before 1970 among them."""
    bundle, portable = bundles[kind], fitted(kind, run.graph.context)
    rows = raw_rows(20_000, run.graph.context, 7)
    rows["context"][:500] *= np.float32(1e35)
    logit, probability = portable.outputs(rows)
    if kind == "logistic_regression":
        # from a probability, which is 1 in float64 from 37 on, a logit became infinite
        assert logit.max() > 50
    spec = bundle.manifest.graph
    got = SequenceGraph(bundle.sequence, spec).run(
        {**{k: v.reshape(100, 200, *v.shape[1:]) for k, v in rows.items()}, "length": np.full(100, 200)}
    )
    np.testing.assert_allclose(got["logit"].ravel(), logit, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(got["probability"].ravel(), probability, atol=1e-6)
    packed = {
        "integers": np.c_[rows["event_time"], rows["categorical"]],
        "values": np.c_[rows["numeric"], rows["context"]],
    }
    step = StepGraph(bundle.step, spec).run(packed)
    np.testing.assert_array_equal(step["logit"], got["logit"].ravel())
    np.testing.assert_array_equal(step["probability"], got["probability"].ravel())


def test_a_feature_at_a_threshold_goes_to_the_side_that_scikit_learn_chose(
    run: Run, bundles: dict[str, Bundle]
) -> None:
    """Thresholds half-way between two float32 values were rounded up to the upper one, and sent it to the other side.

    Rows stand on both sides of every threshold of the amount, as near as float32 comes.
    """
    forest = fitted("random_forest", run.graph.context)
    exact = np.concatenate(
        [t.tree_.threshold[(t.tree_.feature == 0) & (t.tree_.children_left >= 0)] for t in forest.model.estimators_]
    )
    assert (exact.astype(np.float32) > exact).sum() > 20  # what rounding to the nearest would have got wrong
    below = exact.astype(np.float32)
    below = np.where(below > exact, np.nextafter(below, np.float32(-np.inf)), below)
    amounts = np.r_[below, np.nextafter(below, np.float32(np.inf))]
    rows = raw_rows(len(amounts), run.graph.context, 8)
    rows["numeric"][:, 0] = amounts
    _, probability = forest.outputs(rows)
    bundle = bundles["random_forest"]
    columns = {k: v[None] for k, v in rows.items()}
    got = SequenceGraph(bundle.sequence, bundle.manifest.graph).run({**columns, "length": np.array([len(amounts)])})
    np.testing.assert_allclose(got["probability"][0], probability, atol=1e-6)
    round_thresholds(forest.model)
    # threads add the trees up in any order
    np.testing.assert_allclose(forest.outputs(rows)[1], probability, atol=1e-12)


# ---- refusals


def changed_run(run: Run, to: Path) -> Run:
    shutil.copytree(run.path, to)
    return Run(**{**vars(run), "path": to})


def test_a_classifier_that_computes_something_else_is_refused(run: Run, tmp_path: Path) -> None:
    other = changed_run(run, tmp_path / "run")
    portable = fitted("logistic_regression", run.graph.context)
    portable.model[-1].coef_[0, 0] += 0.01
    (other.path / "baselines" / "logistic_regression" / CLASSIFIER).write_bytes(
        as_onnx(portable.model, portable.spec.width)
    )
    with pytest.raises(ParityError, match=r"export refused: parity check .* differs by .*; allowed is"):
        export_baseline(other, "logistic_regression", tmp_path / "out" / "bundle")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_with_history_features_is_refused_with_the_reason(run: Run, tmp_path: Path) -> None:
    for kind in ("boosted_trees", "isolation_forest"):
        with pytest.raises(
            RunError, match=rf"{kind}: not exportable: .*history.*gru, logistic_regression, random_forest"
        ):
            export_baseline(run, kind, tmp_path / "bundle")
    with pytest.raises(RunError, match="--model trees: the run has no such model; can be exported: gru, logistic"):
        export_baseline(run, "trees", tmp_path / "bundle")


def test_before_the_baselines_ran_the_command_is_named(run: Run, tmp_path: Path) -> None:
    empty = Run(**{**vars(run), "path": tmp_path})
    with pytest.raises(RunError, match=r"holds no baselines yet; `seqfraud baselines .*` makes them"):
        export_baseline(empty, "logistic_regression", tmp_path / "bundle")


def test_baselines_of_another_training_are_refused(run: Run, tmp_path: Path) -> None:
    """Ids mean other categories after a training with other vocabularies; the graphs alone would not show it."""
    other = Run(**{**vars(run), "vocabularies": (Vocabulary("kind", KINDS[::-1]),)})
    with pytest.raises(RunError, match="fitted before the run's last training"):
        export_baseline(other, "logistic_regression", tmp_path / "bundle")


def test_an_unreadable_description_is_one_line(run: Run, tmp_path: Path) -> None:
    other = changed_run(run, tmp_path / "run")
    (other.path / "baselines" / "random_forest" / "baseline.json").write_text('{"kind": "random_forest"}')
    with pytest.raises(RunError, match="not readable, run `seqfraud baselines` again"):
        export_baseline(other, "random_forest", tmp_path / "bundle")


# ---- the service and the commands, unchanged


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 transactions of 5 users over 60 hours, in arrival order, with frauds."""
    rng = np.random.default_rng(3)
    count = 240
    table = {
        "id": [f"t{i}" for i in range(count)],
        "user": [f"u{i}" for i in rng.integers(0, 5, count)],
        "time": (START + np.arange(count) // 2 * HOUR // 2).tolist(),
        "amount": rng.lognormal(3, 1.5, count).round(2),
        "age": [None if rng.random() < 0.2 else float(rng.integers(18, 80)) for _ in range(count)],
        "kind": rng.choice([*KINDS, "other"], count),
        "shop": rng.choice(["a", "b"], count),
        "fraud": rng.integers(0, 2, count),
    }
    file = tmp_path_factory.mktemp("data") / "rows.parquet"
    parquet.write_table(pa.table(table), file)
    return file


@pytest.fixture
def served(bundle: Bundle, tmp_path: Path) -> Callable[[str], Service]:
    return lambda name: Service(bundle, tmp_path / name, clock=lambda: START)


def test_live_and_batch_and_loaded_scores_are_the_bulk_scores(
    bundle: Bundle, data: Path, served: Callable[[str], Service], memory_of: Callable[[Service], dict[str, Any]]
) -> None:
    table = read_for_bundle(bundle, data)
    bulk = dict(zip(table.id_texts(), score_table(bundle, table).tolist(), strict=True))
    assert np.std(list(bulk.values())) > 0.05
    half = int(table.time[len(table) // 2])
    with served("one by one") as live, served("loaded") as loaded:
        load(loaded, table, until=half)
        answers: dict[str, float] = {}
        for arrival in arrivals(table, 2 * HOUR, None, None):
            for service in (live, loaded):
                if arrival.labels:
                    service.add_labels(json.dumps([vars(said) for said in arrival.labels]).encode())
            if arrival.row is None:
                continue
            body = json.dumps(arrival.transaction).encode()
            if table.time[arrival.row] < half:
                answer = json.loads(live.score(body))
            else:
                (answer,) = json.loads(live.score_batch(b"[" + body + b"]"))["results"]
                assert json.loads(loaded.score(body))["fraud_probability"] == answer["fraud_probability"]
            assert answer["model"] == bundle.id
            answers[answer["transaction_id"]] = answer["fraud_probability"]
        assert memory_of(live) == memory_of(loaded)
    assert answers == pytest.approx(bulk, abs=1e-6)


def test_a_late_event_is_scored_inserted_and_remembered(bundle: Bundle, served: Callable[[str], Service]) -> None:
    """Without a state a row's score depends on the row and its contexts only; order and the ring work as ever."""

    def row(n: int, hour: int) -> dict[str, Any]:
        return {"id": n, "user": "ann", "time": START + hour * HOUR, "amount": 10.0 * n, "age": 30.0, "kind": "fuel"}

    hours = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    with served("in order") as service:
        in_order = [json.loads(service.score(json.dumps(row(n, h)).encode())) for n, h in enumerate(hours)]
    shuffled = [0, 1, 2, 4, 3, 8, 6, 5, 7]  # W = 3: an anchor moves meanwhile
    with served("late") as service:
        answers = {n: json.loads(service.score(json.dumps(row(n, hours[n])).encode())) for n in shuffled}
        assert json.loads(service.user("ann"))["history"] == 9
    assert [answers[n]["late"] for n in range(9)] == [False, False, False, True, False, True, True, True, False]
    for n, answer in answers.items():
        assert answer["fraud_probability"] == in_order[n]["fraud_probability"]


def test_a_service_goes_on_from_its_snapshot_and_from_its_journal(
    bundle: Bundle,
    data: Path,
    tmp_path: Path,
    memory_of: Callable[[Service], dict[str, Any]],
    crash: Callable[[Service], None],
) -> None:
    table = read_for_bundle(bundle, data)
    service = Service(bundle, tmp_path / "state", clock=lambda: START)
    load(service, table, until=int(table.time[100]))
    for row in list(table.raw_rows())[100:140]:
        service.score(json.dumps(row).encode())
    before = memory_of(service)
    crash(service)
    with Service(bundle, tmp_path / "state", clock=lambda: START) as again:
        assert memory_of(again) == before


def test_one_scores_in_shadow_and_comes_into_force(bundles: dict[str, Bundle], data: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models")
    champion, challenger = (registry.add(bundles[kind].path, "ann") for kind in SETTINGS)
    registry.promote(champion, "ann", "the first")

    def change(service: Service, action: str) -> Any:
        body = {"action": action, "model": challenger, "reason": "better or not"}
        return json.loads(service.change_model(json.dumps(body).encode(), "ann"))

    table = read_for_bundle(bundles["random_forest"], data)
    table = table.replaced(table.numbers, None, None)  # nothing is ever said of them
    bulk = dict(zip(table.id_texts(), score_table(bundles["random_forest"], table).tolist(), strict=True))
    rows = list(table.raw_rows())
    with Service(registry.open(champion), tmp_path / "state", clock=lambda: START, registry=registry) as service:
        for row in rows[:20]:
            service.score(json.dumps(row).encode())
        change(service, "shadow")
        for row in rows[20:60]:
            assert json.loads(service.score(json.dumps(row).encode()))["model"] == champion
        deadline = time.monotonic() + 30
        while json.loads(service.model())["shadow"][0]["behind"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert change(service, "promote")["model"] == challenger
        after = [json.loads(service.score(json.dumps(row).encode())) for row in rows[60:80]]
    shadow = read_shadow(tmp_path / "state")
    assert shadow["id"].to_pylist() == [row["id"] for row in rows[20:60]]
    found = dict(zip(shadow["id"].to_pylist(), shadow["probability"].to_pylist(), strict=True))
    found |= {answer["transaction_id"]: answer["fraud_probability"] for answer in after}
    assert {answer["model"] for answer in after} == {challenger}
    assert found == pytest.approx({key: bulk[key] for key in found}, abs=1e-6)


def test_the_commands(
    run: Run,
    bundle: Bundle,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`export --model`, `verify`, `score` and `load` by name."""
    kind = bundle.manifest.kind
    monkeypatch.setattr("export.commands.load_run", lambda path: run)
    out = str(tmp_path / "bundle")
    assert main(["export", "runs/any", "--model", kind, "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == bundle.id
    assert main(["verify", out]) == 0
    assert "checks passed" in capsys.readouterr().out
    assert main(["score", out, str(data), "--out", str(tmp_path / "scores.parquet")]) == 0
    table = read_for_bundle(bundle, data)
    scores = parquet.read_table(tmp_path / "scores.parquet")
    np.testing.assert_array_equal(scores["fraud_probability"].to_numpy(), score_table(bundle, table))
    assert main(["load", str(data), "--bundle", out, "--state", str(tmp_path / "state")]) == 0
    capsys.readouterr()
    assert main(["export", "runs/any", "--model", "boosted_trees", "--out", out]) == 2
    assert "hand-made features of the user's history" in capsys.readouterr().err
