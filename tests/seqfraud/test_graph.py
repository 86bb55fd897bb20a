"""What goes in and out of the graphs, and onnxruntime's side of it, without torch."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from seqfraud.context import NEVER, ContextSpec
from seqfraud.errors import BundleError
from seqfraud.graph import GraphSpec, StateSpec, TensorSpec, gru_graph
from seqfraud.runtime import (
    SequenceGraph,
    StepGraph,
    check_signature,
    initial_states,
    next_states,
    open_session,
)
from seqfraud.schema import Schema

DAY = 86_400_000
H = StateSpec("h", "float32", (2, "B", 3), 0.0)
LAST_TIME = StateSpec("last_time", "int64", ("B",), NEVER)
PLACE = StateSpec("last_place", "float32", ("B", 4), -1.5)
SPEC = GraphSpec(numeric=2, categorical=1, context=8, states=(H, LAST_TIME, PLACE))


def names(tensors: list[TensorSpec]) -> dict[str, tuple[str, tuple[str | int, ...]]]:
    return {t.name: (t.dtype, t.axes) for t in tensors}


# --- Specifications ----------------------------------------------------------------------------------------------


def test_inputs_and_outputs_by_name_type_and_axes() -> None:
    assert names([*SPEC.sequence_inputs(), *SPEC.state_inputs()]) == {
        "event_time": ("int64", ("B", "T")),
        "numeric": ("float32", ("B", "T", 2)),
        "categorical": ("int64", ("B", "T", 1)),
        "context": ("float32", ("B", "T", 8)),
        "length": ("int64", ("B",)),
        "h": ("float32", (2, "B", 3)),
        "last_time": ("int64", ("B",)),
        "last_place": ("float32", ("B", 4)),
    }
    assert names(SPEC.step_inputs()) == {"integers": ("int64", ("B", 2)), "values": ("float32", ("B", 10))}
    assert names([*SPEC.sequence_outputs(), *SPEC.state_outputs()]) == {
        "logit": ("float32", ("B", "T")),
        "probability": ("float32", ("B", "T")),
        "h_next": ("float32", (2, "B", 3)),
        "last_time_next": ("int64", ("B",)),
        "last_place_next": ("float32", ("B", 4)),
    }
    assert names(SPEC.step_outputs()) == {"logit": ("float32", ("B",)), "probability": ("float32", ("B",))}


def test_inputs_of_width_0_do_not_exist() -> None:
    bare = GraphSpec(numeric=0, categorical=0, context=0, states=(H,))
    assert list(names(bare.sequence_inputs())) == ["event_time", "length"]
    assert names(bare.step_inputs()) == {"integers": ("int64", ("B", 1))}
    only_context = GraphSpec(numeric=0, categorical=0, context=3, states=())
    assert names(only_context.step_inputs())["values"] == ("float32", ("B", 3))


def test_a_shape_puts_sizes_for_letters() -> None:
    assert H.axes == (2, "B", 3)
    assert TensorSpec("h", "float32", H.axes).shape(B=7, T=5) == (2, 7, 3)
    assert TensorSpec("numeric", "float32", ("B", "T", 2)).shape(B=7, T=5) == (7, 5, 2)


def test_specification_survives_json() -> None:
    assert GraphSpec.from_dict(json.loads(json.dumps(SPEC.as_dict()))) == SPEC
    with pytest.raises(KeyError):
        GraphSpec.from_dict({"numeric": 1, "categorical": 0, "context": 0})


def test_the_gru_has_a_place_only_where_the_schema_has_one() -> None:
    context = ContextSpec(("shop", "terminal"), (DAY, 7 * DAY), DAY)
    schema = Schema("user", "time", numeric=("amount",), categorical=("kind",), context=("shop", "terminal"))
    spec = gru_graph(schema, context, layers=2, hidden=3)
    assert (spec.numeric, spec.categorical, spec.context) == (1, 1, 2 * (4 * 2 + 1 + 4))
    assert spec.states == (H, LAST_TIME)
    places = Schema("user", "time", geo=(("lat", "long"), ("shop_lat", "shop_long")))
    with_places = gru_graph(places, ContextSpec((), (DAY,), DAY), layers=1, hidden=3)
    assert with_places.numeric == 4
    assert with_places.states[-1] == StateSpec("last_place", "float32", ("B", 4), 0.0)


# --- States ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", SPEC.states)
def test_rows_of_users_to_the_graph_and_back(state: StateSpec) -> None:
    """A ramp: element i of user b is 100 b + i, wherever B stands in the axes."""
    size = int(np.prod(state.row_shape))
    rows = (100 * np.arange(4)[:, None] + np.arange(size)).reshape(4, *state.row_shape).astype(state.dtype)
    batch = state.to_batch(rows)
    assert batch.shape == TensorSpec(state.name, state.dtype, state.axes).shape(B=4)
    assert batch.flags.c_contiguous
    for user in range(4):
        assert np.take(batch, user, axis=state.batch_axis).ravel().tolist() == (100 * user + np.arange(size)).tolist()
    np.testing.assert_array_equal(state.to_rows(batch), rows)


def test_initial_states_have_the_declared_values_types_and_shapes() -> None:
    states = initial_states(SPEC, 5)
    assert {k: (v.dtype.name, v.shape) for k, v in states.items()} == {
        "h": ("float32", (2, 5, 3)),
        "last_time": ("int64", (5,)),
        "last_place": ("float32", (5, 4)),
    }
    assert states["last_time"].tolist() == [-(2**62)] * 5
    assert set(states["last_place"].ravel().tolist()) == {-1.5}
    assert initial_states(GraphSpec(1, 0, 0, ()), 3) == {}


def test_next_states_are_those_of_the_users_that_go_on() -> None:
    ramp = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    outputs = {
        "logit": np.zeros((4, 9), np.float32),
        "h_next": ramp,
        "last_time_next": np.array([10, 11, 12, 13]),
        "last_place_next": np.arange(16, dtype=np.float32).reshape(4, 4),
    }
    states = next_states(SPEC, outputs, 2)
    assert states["h"].tolist() == [[[0, 1, 2], [3, 4, 5]], [[12, 13, 14], [15, 16, 17]]]
    assert states["last_time"].tolist() == [10, 11]
    assert states["last_place"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(state.flags.c_contiguous for state in states.values())


# --- onnxruntime -------------------------------------------------------------------------------------------------


def session(inputs: dict[str, tuple[str, list[Any]]], outputs: dict[str, tuple[str, list[Any]]]) -> Any:
    """Something with the signature of an InferenceSession."""

    def nodes(spec: dict[str, tuple[str, list[Any]]]) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, type=f"tensor({kind})", shape=shape) for name, (kind, shape) in spec.items()]

    return SimpleNamespace(get_inputs=lambda: nodes(inputs), get_outputs=lambda: nodes(outputs))


WANTED_INPUTS = [TensorSpec("event_time", "int64", ("B", "T")), TensorSpec("numeric", "float32", ("B", "T", 2))]
WANTED_OUTPUTS = [TensorSpec("logit", "float32", ("B", "T"))]
INPUTS: dict[str, tuple[str, list[Any]]] = {"event_time": ("int64", ["B", "T"]), "numeric": ("float", ["B", "T", 2])}
OUTPUTS: dict[str, tuple[str, list[Any]]] = {"logit": ("float", ["B", "T"])}


def test_a_signature_that_fits_passes_and_undeclared_output_shapes_too() -> None:
    check_signature(session(INPUTS, OUTPUTS), "x.onnx", WANTED_INPUTS, WANTED_OUTPUTS)
    loose = {"logit": ("float", ["whatever", None])}
    check_signature(session(INPUTS, loose), "x.onnx", WANTED_INPUTS, WANTED_OUTPUTS)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"numeric": None}, {}, r"x.onnx: inputs are \['event_time'\].*'numeric'"),
        ({"extra": ("float", ["B"])}, {}, r"x.onnx: inputs are .*'extra'"),
        ({}, {"score": ("float", ["B", "T"])}, r"x.onnx: outputs are .*'score'"),
        ({"event_time": ("float", ["B", "T"])}, {}, r"input event_time has type tensor\(float\), expected int64"),
        ({}, {"logit": ("double", ["B", "T"])}, r"output logit has type tensor\(double\), expected float32"),
        ({"event_time": ("int64", ["B", 5])}, {}, r"the axis T of input event_time is frozen at \['B', 5\]"),
        ({"numeric": ("float", [3, "T", 2])}, {}, r"the axis B of input numeric is frozen at \[3, 'T', 2\]"),
        ({"numeric": ("float", ["B", "T", 4])}, {}, r"input numeric has shape \['B', 'T', 4\], expected .*2"),
        ({"event_time": ("int64", ["B"])}, {}, r"input event_time has shape \['B'\]"),
        ({}, {"logit": ("float", ["B", "T", 1])}, r"output logit has shape \['B', 'T', 1\]"),
    ],
)
def test_a_signature_that_does_not_fit_is_refused_with_what_was_seen(
    inputs: dict[str, Any], outputs: dict[str, Any], message: str
) -> None:
    changed = {name: node for name, node in {**INPUTS, **inputs}.items() if node is not None}
    seen = session(changed, outputs or OUTPUTS)
    with pytest.raises(BundleError, match=message):
        check_signature(seen, "x.onnx", WANTED_INPUTS, WANTED_OUTPUTS)


def test_bytes_that_are_no_graph_are_a_bundle_error() -> None:
    with pytest.raises(BundleError, match=r"onnxruntime cannot load sequence\.onnx"):
        open_session(b"not a graph", "sequence.onnx")
    with pytest.raises(BundleError, match="onnxruntime cannot load the graph"):
        open_session(b"")


def test_a_graph_that_asks_for_more_memory_than_all_may_have_fails_and_nothing_else_does() -> None:
    """32 times the same twice: 1,000 numbers become 17 terabytes. The file has a few hundred bytes."""
    nodes = [helper.make_node("Concat", [f"x{i}", f"x{i}"], [f"x{i + 1}"], axis=0) for i in range(32)]
    content = node_graph(nodes, [TensorSpec("x0", "float32", ("B",))], [TensorSpec("x32", "float32", ("B",))], {})
    session = open_session(content)
    with pytest.raises(Exception, match="smaller than requested"):
        session.run(None, {"x0": np.zeros(1000, np.float32)})
    step = counter()
    step.run_bound()
    assert step.outputs["probability"].tolist() == [0.5]


def node_graph(
    nodes: list[Any], inputs: list[TensorSpec], outputs: list[TensorSpec], constants: dict[str, Any]
) -> bytes:
    """A graph written by hand."""
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], list(t.axes)) for t in inputs],
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], list(t.axes)) for t in outputs],
        [onnx.numpy_helper.from_array(np.asarray(value, dtype=np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


LOGISTIC = GraphSpec(numeric=2, categorical=0, context=0, states=())


def test_a_logistic_regression_without_a_state_fits_the_same_contract() -> None:
    """Any model of the declared names and axes can be served; here logit = x0 + 10 x1 - 1."""
    nodes = [
        helper.make_node("MatMul", ["numeric", "w"], ["score"]),
        helper.make_node("Squeeze", ["score", "last"], ["plain"]),
        helper.make_node("Sub", ["plain", "one"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["probability"]),
    ]
    graph = node_graph(nodes, LOGISTIC.sequence_inputs(), LOGISTIC.sequence_outputs(), {"w": [[1], [10]], "one": 1})
    model = onnx.load_from_string(graph)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "last"))
    sequence = SequenceGraph(model.SerializeToString(), LOGISTIC)
    numeric = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    times = np.zeros((2, 3), dtype=np.int64)
    out = sequence.run({"event_time": times, "numeric": numeric, "length": np.array([3, 3])})
    assert out["logit"].tolist() == [[9, 31, 53], [75, 97, 119]]
    np.testing.assert_allclose(out["probability"][0, 0], 1 / (1 + np.exp(-9)))
    assert next_states(LOGISTIC, out, 2) == {}


COUNTER = GraphSpec(numeric=1, categorical=0, context=0, states=(StateSpec("total", "float32", ("B", 2), 0.5),))


def counter() -> StepGraph:
    """total += value, for both elements; logit is the new total's first element."""
    nodes = [
        helper.make_node("Add", ["total", "values"], ["total_next"]),
        helper.make_node("Gather", ["total_next", "first"], ["logit"], axis=1),
        helper.make_node("Sigmoid", ["logit"], ["probability"]),
    ]
    inputs = [*COUNTER.step_inputs(), *COUNTER.state_inputs()]
    outputs = [*COUNTER.step_outputs(), *COUNTER.state_outputs()]
    model = onnx.load_from_string(node_graph(nodes, inputs, outputs, {}))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "first"))
    return StepGraph(model.SerializeToString(), COUNTER)


def test_fixed_buffers_are_read_and_written_in_place_at_every_call() -> None:
    step = counter()
    step.inputs["total"][...] = COUNTER.states[0].initial_rows(1)
    for value, total in ((1.0, 1.5), (2.0, 3.5), (-4.0, -0.5)):
        step.inputs["values"][...] = value
        step.run_bound()
        assert step.outputs["total_next"].tolist() == [[total, total]]
        assert step.outputs["logit"].tolist() == [total]
        step.inputs["total"][...] = step.outputs["total_next"]


def test_the_same_step_for_a_batch_leaves_the_buffers_alone() -> None:
    step = counter()
    step.inputs["values"][...] = 7.0
    step.run_bound()
    values = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    inputs = {"integers": np.zeros((3, 1), np.int64), "values": values, **initial_states(COUNTER, 3)}
    assert step.run(inputs)["logit"].tolist() == [1.5, 2.5, 3.5]
    assert step.outputs["logit"].tolist() == [7.0]
