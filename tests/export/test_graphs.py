"""The exported files compute what the module computes, for every combination of inputs, batch and length."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export.graphs import export_graphs
from export.reference import RAGGED_LENGTHS, SPAN, pick_users, reference_cases
from seqfraud.context import NEVER, ContextSpec
from seqfraud.graph import GraphSpec, gru_graph
from seqfraud.nn.model import ModelSpec, SequenceModel
from seqfraud.onnxfile import check_graph
from seqfraud.runtime import SequenceGraph, StepGraph, initial_states
from seqfraud.schema import Schema
from seqfraud.verification import differences, event_by_event, run_through_binding

torch.set_num_threads(1)

DAY = 86_400_000
JUNE_2025 = 1_748_736_000_123
CONTEXT = ContextSpec(("shop",), (DAY,), DAY)
Arrays = dict[str, np.ndarray]

VARIETIES: dict[str, dict[str, Any]] = {
    "everything": {"numbers": 2, "places": 1, "context": True, "vocabularies": (7, 4), "missing": (1,), "layers": 2},
    "everything, one layer": {"numbers": 3, "places": 2, "context": True, "vocabularies": (5,), "missing": (0, 2)},
    "only time": {},
    "numbers": {"numbers": 2, "layers": 2},
    "numbers that may be missing": {"numbers": 2, "missing": (0, 1)},
    "categories": {"vocabularies": (7, 4)},
    "context": {"context": True},
    "places": {"places": 1},
    "numbers and categories": {"numbers": 1, "vocabularies": (3,)},
    "context and categories": {"context": True, "vocabularies": (9,), "layers": 2},
    "three networks": {"numbers": 2, "places": 1, "context": True, "vocabularies": (7, 4), "layers": 2, "members": 3},
}


def make_model(
    numbers: int = 0,
    places: int = 0,
    context: bool = False,
    vocabularies: tuple[int, ...] = (),
    missing: tuple[int, ...] = (),
    layers: int = 1,
    members: int = 1,
) -> SequenceModel:
    """A small model with random weights, scaling, bins and calibration."""
    schema = Schema(
        "user",
        "time",
        numeric=tuple(f"number{i}" for i in range(numbers)),
        categorical=tuple(f"category{i}" for i in range(len(vocabularies))),
        context=CONTEXT.columns if context else (),
        geo=tuple((f"lat{i}", f"long{i}") for i in range(places)),
    )
    kept = CONTEXT if context else ContextSpec((), CONTEXT.half_lives, CONTEXT.label_delay)
    values = numbers + kept.width + 1 + 2 * places
    spec = ModelSpec(
        numeric=numbers + 2 * places,
        places=places,
        context=kept.width,
        vocabularies=vocabularies,
        missing=missing,
        bins=2 * values,
        hidden=6,
        layers=layers,
        input_width=7,
        head_width=5,
        forecast=True,
        embedding=3,
        members=members,
    )
    torch.manual_seed(5)
    model = SequenceModel(spec, gru_graph(schema, kept, layers, spec.state_width))
    encoder = model.encoder
    encoder.mean.uniform_(-1, 1)
    encoder.inverse_std.uniform_(0.2, 0.5)
    encoder.bin_value.copy_(torch.arange(spec.bins) // 2)
    encoder.bin_scale.uniform_(0.2, 1.0)
    encoder.bin_low.uniform_(-0.2, 1.0)
    encoder.fill.uniform_(-3, 3)
    model.scale.fill_(1.7)
    model.shift.fill_(-0.4)
    return model.eval()


def make_case(model: SequenceModel, lengths: list[int], events: int, fresh: bool, seed: int = 0) -> Arrays:
    """Inputs with everything that may be missing missing somewhere, and torch's outputs as `out.NAME`."""
    rng = np.random.default_rng(seed)
    spec, batch = model.spec, len(lengths)
    gaps = rng.choice([0, 1, 900, 47_000, 18_000_000, 3 * DAY], (batch, events))
    case: Arrays = {"event_time": JUNE_2025 + np.cumsum(gaps, axis=1), "length": np.array(lengths)}
    if spec.numeric:
        case["numeric"] = rng.normal(0, 20, (batch, events, spec.numeric)).astype(np.float32)
        for i in (*spec.missing, *range(spec.numeric - 2 * spec.places, spec.numeric)):
            case["numeric"][..., i][rng.random((batch, events)) < 0.2] = np.nan
    if spec.vocabularies:
        case["categorical"] = np.stack([rng.integers(0, n, (batch, events)) for n in spec.vocabularies], axis=-1)
    if spec.context:
        case["context"] = rng.exponential(3, (batch, events, spec.context)).astype(np.float32) - 1
    case |= initial_states(model.graph, batch)
    if not fresh:
        case["h"] = rng.uniform(-0.8, 0.8, case["h"].shape).astype(np.float32)
        case["last_time"] = case["event_time"][:, 0] - rng.integers(-50, DAY, batch)
        if "last_place" in case:
            case["last_place"] = rng.uniform(-60, 60, case["last_place"].shape).astype(np.float32)
    with torch.no_grad():
        out = model({k: torch.from_numpy(v) for k, v in case.items()})
    return {**case, **{f"out.{k}": v.numpy() for k, v in out.items()}}


def inputs_of(spec: GraphSpec, case: Arrays) -> Arrays:
    return {t.name: case[t.name] for t in (*spec.sequence_inputs(), *spec.state_inputs())}


def assert_close(spec: GraphSpec, got: Arrays, case: Arrays) -> None:
    figures = differences(spec, got, case, case["length"])
    assert figures["logit"] < 1e-5
    assert figures["probability"] < 5e-6
    assert figures["state"] < 1e-5
    assert figures["integer state"] == 0


@dataclass(frozen=True)
class Exported:
    """A model and its two graphs as onnxruntime reads them from disk."""

    model: SequenceModel
    folder: Path
    sequence: SequenceGraph
    step: StepGraph


@pytest.fixture(scope="module", params=VARIETIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = make_model(**VARIETIES[request.param])
    folder = tmp_path_factory.mktemp("graphs")
    export_graphs(model, folder)
    sequence, step = folder / "sequence.onnx", folder / "step.onnx"
    graph, contents = model.graph, [sequence.read_bytes(), step.read_bytes()]
    for content, inputs, outputs in (
        (contents[0], graph.sequence_inputs(), graph.sequence_outputs()),
        (contents[1], graph.step_inputs(), graph.step_outputs()),
    ):  # whatever is exported is what the reader of bundles lets pass
        states = [*inputs, *graph.state_inputs()], [*outputs, *graph.state_outputs()]
        check_graph(content, "a graph", *states, features=0)
    return Exported(model, folder, SequenceGraph(contents[0], graph), StepGraph(contents[1], graph))


# The export's example has 3 users, 5 events and length 2; none of these has all three.
SHAPES = [([1], 1), ([0], 1), ([4, 0, 9, 1, 9, 2, 3], 9), ([5, 5, 5], 5), ([130, 64], 130)]


@pytest.mark.parametrize("fresh", [True, False], ids=["new users", "known users"])
@pytest.mark.parametrize(("lengths", "events"), SHAPES, ids=lambda value: str(value))
def test_sequence_graph_is_the_module(exported: Exported, lengths: list[int], events: int, fresh: bool) -> None:
    model, sequence = exported.model, exported.sequence
    case = make_case(model, lengths, events, fresh)
    assert_close(model.graph, sequence.run(inputs_of(model.graph, case)), case)
    assert_close(model.graph, run_through_binding(sequence, inputs_of(model.graph, case)), case)


@pytest.mark.parametrize("fresh", [True, False], ids=["new users", "known users"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_step_graph_is_the_module_event_by_event(exported: Exported, batch: int, fresh: bool) -> None:
    model, step = exported.model, exported.step
    case = make_case(model, [20] * batch, 20, fresh, seed=batch)
    assert_close(model.graph, event_by_event(step, case, range(batch), bound=False), case)
    if batch == 1:
        assert_close(model.graph, event_by_event(step, case, range(1), bound=True), case)


def test_sequence_graph_ignores_what_padding_holds(exported: Exported) -> None:
    model, sequence = exported.model, exported.sequence
    case = make_case(model, [5, 0, 3], 5, fresh=False)
    for user, length in enumerate([5, 0, 3]):
        case["event_time"][user, length:] = NEVER
        for name, garbage in (("numeric", np.nan), ("context", np.inf), ("categorical", 0)):
            if name in case:
                case[name][user, length:] = garbage
    assert_close(model.graph, sequence.run(inputs_of(model.graph, case)), case)


def test_clock_of_times_before_1970_in_the_graph(exported: Exported) -> None:
    """ONNX has two remainders; with the other one these times would have negative phases."""
    model, sequence, step = exported.model, exported.sequence, exported.step
    case = make_case(model, [6], 6, fresh=True)
    case["event_time"] = -3 * DAY + np.cumsum(np.full((1, 6), 10 * 3_600_000 + 1), axis=1)
    with torch.no_grad():
        out = model({k: torch.from_numpy(v) for k, v in case.items() if not k.startswith("out.")})
    case |= {f"out.{k}": v.numpy() for k, v in out.items()}
    assert_close(model.graph, sequence.run(inputs_of(model.graph, case)), case)
    assert_close(model.graph, event_by_event(step, case, range(1), bound=False), case)


def test_files_are_whole_with_weights_inside_and_dynamic_axes(exported: Exported) -> None:
    graph = exported.model.graph
    assert sorted(f.name for f in exported.folder.iterdir()) == ["sequence.onnx", "step.onnx"]
    for name, tensors in (("sequence.onnx", graph.sequence_inputs()), ("step.onnx", graph.step_inputs())):
        file = onnx.load(exported.folder / name, load_external_data=False)
        onnx.checker.check_model(file)
        assert not any(tensor.external_data for tensor in file.graph.initializer)
        shapes = {i.name: i.type.tensor_type.shape.dim for i in file.graph.input}
        declared = {n: [axis.dim_param or axis.dim_value for axis in shape] for n, shape in shapes.items()}
        assert declared == {t.name: list(t.axes) for t in (*tensors, *graph.state_inputs())}


def test_exporting_leaves_no_trace_in_the_module(tmp_path: Path) -> None:
    model = make_model(**VARIETIES["everything"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_graphs(model, tmp_path)
    first = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    export_graphs(model, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == first
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- Reference vectors -------------------------------------------------------------------------------------------


def reference_rows(model: SequenceModel, count: int = 400) -> Arrays:
    case = make_case(model, [count], count, fresh=True, seed=9)
    empty = np.empty((count, 0), np.float32)
    columns = ("event_time", "numeric", "categorical", "context")
    return {name: case[name][0] if name in case else empty for name in columns}


def test_reference_cases_hold_torchs_outputs_for_their_inputs() -> None:
    model = make_model(**VARIETIES["everything"])
    cases, span = reference_cases(model, reference_rows(model))
    for name, batch, events in (("ragged", 7, 37), ("long", 3, 1000)):
        case = {k.removeprefix(f"{name}/"): v for k, v in cases.items() if k.startswith(f"{name}/")}
        assert case["event_time"].shape == (batch, events)
        assert (np.diff(case["event_time"], axis=1) >= 0).all()
        with torch.no_grad():
            out = model({k: torch.from_numpy(v) for k, v in inputs_of(model.graph, case).items()})
        outputs = [spec.name for spec in (*model.graph.sequence_outputs(), *model.graph.state_outputs())]
        assert {key.removeprefix("out.") for key in case if key.startswith("out.")} == set(outputs)
        for key in outputs:
            np.testing.assert_array_equal(case[f"out.{key}"], out[key].numpy())
    assert cases["ragged/length"].tolist() == list(RAGGED_LENGTHS)
    assert 0 in RAGGED_LENGTHS
    assert (cases["ragged/last_time"] == NEVER).any()
    assert (cases["ragged/last_time"] != NEVER).any()
    real = np.arange(37)[None] < cases["ragged/length"][:, None]
    visited = np.r_[cases["ragged/out.probability"][real], cases["long/out.probability"].ravel()]
    assert span == {"lowest": float(visited.min()), "highest": float(visited.max())}


def test_reference_cases_are_the_same_for_the_same_model() -> None:
    model = make_model(**VARIETIES["context and categories"])
    first, again = (reference_cases(model, reference_rows(model))[0] for _ in range(2))
    assert first.keys() == again.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])


def test_the_candidates_with_the_ends_of_the_range_are_picked() -> None:
    """Candidate i has probability i / 100 but for one peak and one low; a peak counts only where the row reaches it."""
    probability = np.repeat(np.arange(40)[:, None] / 100 + 0.1, 8, axis=1).astype(np.float32)
    probability[17, 7] = 0.995  # the last event of the longest row
    probability[23, 5] = 0.0005
    probability[30, 7] = 0.0001  # beyond the second longest row
    picked = pick_users(probability, np.array([2, 8, 0, 6, 1]))
    assert picked.tolist() == [9, 17, 30, 23, 20]


def test_probabilities_visited_span_both_ends_where_the_model_reaches_them() -> None:
    """A model that is sure for one category and sure of the opposite for another."""
    model = make_model(vocabularies=(4,))
    with torch.no_grad():
        model.networks[0].embeddings[0].weight.copy_(torch.tensor([[0.0], [8.0], [-8.0], [0.0]]).expand(4, 2))
        model.networks[0].head.weight.mul_(0.1)
    model.scale.fill_(20.0)
    rows = reference_rows(model)
    _, span = reference_cases(model, rows)
    assert span["lowest"] <= SPAN[0]
    assert span["highest"] >= SPAN[1]
