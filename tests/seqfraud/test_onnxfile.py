"""The reader of graphs: what export writes passes, and everything else is a BundleError, whatever the bytes are."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from seqfraud import onnxfile
from seqfraud.bundle import Bundle
from seqfraud.errors import BundleError
from seqfraud.graph import NEXT
from seqfraud.onnxfile import check_graph, with_outputs
from seqfraud.runtime import SequenceGraph, initial_states, unpacked


def specs(bundle: Bundle, which: str = "step") -> tuple[list[Any], list[Any]]:
    graph = bundle.manifest.graph
    inputs = graph.step_inputs() if which == "step" else graph.sequence_inputs()
    outputs = graph.step_outputs() if which == "step" else graph.sequence_outputs()
    return [*inputs, *graph.state_inputs()], [*outputs, *graph.state_outputs()]


@pytest.fixture(scope="module")
def good(cards: Bundle) -> onnx.ModelProto:
    """step.onnx of a real bundle, to be copied and changed."""
    return onnx.load_from_string(cards.step)


@pytest.fixture
def check(cards: Bundle) -> Callable[[bytes], None]:
    inputs, outputs = specs(cards)
    return lambda content: check_graph(content, "step.onnx", inputs, outputs, features=5)


def test_what_export_writes_passes(cards: Bundle, plain: Bundle, rich: Bundle) -> None:
    for bundle in (cards, plain, rich):
        for which, content in (("step", bundle.step), ("sequence", bundle.sequence)):
            check_graph(content, which, *specs(bundle, which), features=0)


def test_the_other_graph_of_the_same_bundle_is_refused(cards: Bundle, check: Callable[[bytes], None]) -> None:
    with pytest.raises(BundleError, match=r"step\.onnx: inputs are \['categorical', .* the manifest says .*'integers'"):
        check(cards.sequence)


# --- one thing changed -------------------------------------------------------------------------------------------


def tensor(**fields: Any) -> TensorProto:
    return TensorProto(name="evil", **fields)


def external(model: onnx.ModelProto) -> None:
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../../etc/passwd")


def external_without_data(model: onnx.ModelProto) -> None:
    external(model)
    model.graph.initializer[0].ClearField("raw_data")


def an_operator(name: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node(name, ["h"], ["made"], domain=domain))

    return change


def a_tensor(**fields: Any) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.initializer.append(tensor(**fields))


def a_shape(operator: str, sizes: list[int], constant: bool = False) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        shape = numpy_helper.from_array(np.array(sizes, np.int64), "size")
        if constant:
            model.graph.node.append(helper.make_node("Constant", [], ["size"], value=shape))
        else:
            model.graph.initializer.append(shape)
        inputs = ["size"] if operator == "ConstantOfShape" else ["h", "size"]
        model.graph.node.append(helper.make_node(operator, inputs, ["made"]))

    return change


def an_attribute(**fields: Any) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.node[0].attribute.append(AttributeProto(name="evil", **fields))


def a_subgraph(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("body", body))


def trees(features: list[int], values: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = helper.make_node("TreeEnsembleClassifier", ["values"], ["a", "b"], domain="ai.onnx.ml")
        node.attribute.append(helper.make_attribute("nodes_featureids", features))
        node.attribute.append(helper.make_attribute("nodes_values", [0.5] * values))
        model.graph.node.append(node)
        model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))

    return change


CHANGED: dict[str, tuple[Callable[[onnx.ModelProto], Any], str]] = {
    "external data": (external, "has a tensor in another file"),
    "external data instead": (external_without_data, "has a tensor in another file"),
    "an unknown operator": (an_operator("Loop"), "the operator 'Loop' of the domain ''"),
    "an operator that reads files": (an_operator("StringNormalizer"), "the operator 'StringNormalizer'"),
    "another domain": (an_operator("Add", "com.microsoft"), "the operator 'Add' of the domain 'com.microsoft'"),
    "another domain's opset": (
        lambda m: m.opset_import.append(helper.make_opsetid("com.evil", 1)),
        "operators of the domain 'com.evil'",
    ),
    "another opset": (lambda m: setattr(m.opset_import[0], "version", 99), "opset 99 of ''; expected 17"),
    "another IR": (lambda m: setattr(m, "ir_version", 2), "IR version 2; expected 3 to 10"),
    "functions": (lambda m: m.functions.append(onnx.FunctionProto(name="f")), "has functions of its own"),
    "training": (lambda m: m.training_info.append(onnx.TrainingInfoProto()), "has training information"),
    "metadata": (lambda m: m.metadata_props.add(key="a", value="b"), "has metadata"),
    "a graph in a node": (a_subgraph, "has a graph inside of a node"),
    "no graph": (lambda m: m.ClearField("graph"), "there is no graph"),
    "2**40 elements": (
        a_tensor(data_type=1, dims=[2**20, 2**20]),
        r"declares \[1048576, 1048576\], 1099511627776 elem",
    ),
    "2**70 elements": (a_tensor(data_type=1, dims=[2**40, 2**30]), "declares .*; at most 2147483647 along an axis"),
    "negative elements": (a_tensor(data_type=1, dims=[-1]), "at most 2147483647 along an axis"),
    "too few bytes": (
        a_tensor(data_type=1, dims=[2], raw_data=b"1234567"),
        "declares .* 2 elements, and holds 7 bytes",
    ),
    "too many bytes": (a_tensor(data_type=1, dims=[], raw_data=b"12345678"), "1 elements, and holds 8 bytes"),
    "too few numbers": (a_tensor(data_type=7, dims=[3], int64_data=[1, 2]), "declares .3., 3 elements"),
    "two kinds of data": (a_tensor(data_type=1, dims=[1], raw_data=b"1234", float_data=[1]), "with float_data and raw"),
    "data of another type": (a_tensor(data_type=1, dims=[1], int64_data=[1]), r"a tensor\(float\) with int64_data"),
    "strings": (a_tensor(data_type=8, dims=[1], string_data=[b"x"]), "has a tensor of strings"),
    "another type": (a_tensor(data_type=16, dims=[1], raw_data=b"12"), "data type 16 is not one"),
    "a segment": (lambda m: m.graph.initializer[0].segment.SetInParent(), "has a tensor in segments"),
    "many axes": (a_tensor(data_type=1, dims=[1] * 9, raw_data=b"1234"), "9 axes; at most 8"),
    "a sparse tensor": (lambda m: m.graph.sparse_initializer.add(), "has sparse tensors"),
    "a name twice": (
        lambda m: m.graph.initializer.append(m.graph.initializer[0]),
        "an initializer is named .* is taken",
    ),
    "an input with a value": (
        lambda m: m.graph.initializer.append(numpy_helper.from_array(np.float32(1), "values")),
        "an initializer is named 'values', which is taken",
    ),
    "no name": (lambda m: m.graph.initializer.append(numpy_helper.from_array(np.float32(1))), "which is no name"),
    "a value made twice": (lambda m: m.graph.node.append(m.graph.node[-1]), "is taken"),
    "an input that nobody makes": (
        lambda m: m.graph.node.append(helper.make_node("Abs", ["nobody"], ["made"])),
        "Abs: its input 'nobody' is made by nothing before it",
    ),
    "an output that nobody makes": (
        lambda m: m.graph.output.append(helper.make_tensor_value_info("x", 1, ["B"])),
        "output 'x': no node makes it",
    ),
    "another output": (lambda m: m.graph.output.pop(), "outputs are .* the manifest says"),
    "another type of input": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 1),
        r"input integers has type tensor\(float\), expected int64",
    ),
    "a frozen axis": (
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 3),
        r"axis B of input integers is frozen at \[3, 2\]",
    ),
    "a sequence": (lambda m: m.graph.input[0].type.sequence_type.elem_type.SetInParent(), "that export does not write"),
    "a huge axis": (
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 2**40),
        "has the size 1099511627776",
    ),
    "a huge constant": (a_shape("ConstantOfShape", [2**20, 2**20]), r"ConstantOfShape: makes \[1048576, 1048576\]"),
    "a huge constant's constant": (a_shape("ConstantOfShape", [2**40], constant=True), "ConstantOfShape: makes"),
    "zero times huge": (a_shape("ConstantOfShape", [0, 2**40]), "ConstantOfShape: makes"),
    "a negative shape": (a_shape("ConstantOfShape", [-5]), "ConstantOfShape: makes"),
    "a huge Expand": (a_shape("Expand", [2**15, 2**15, 1]), "Expand: makes"),
    "Tile": (an_operator("Tile"), "the operator 'Tile'"),
    "Range": (an_operator("Range"), "the operator 'Range'"),
    "a reference to an attribute": (an_attribute(ref_attr_name="x", type=1), "a field 21 that export does not write"),
    "an attribute without a type": (an_attribute(i=3), "an attribute of type None"),
    "an attribute of two types": (an_attribute(i=3, f=1.0, type=2), "says that it holds i, and holds f"),
    "a cast to text": (
        lambda m: m.graph.node.append(helper.make_node("Cast", ["h"], ["made"], to=8)),
        "Cast: to the type 8",
    ),
    "an attribute twice": (
        lambda m: m.graph.node[-1].attribute.extend([helper.make_attribute("a", 1)] * 2),
        "the attribute 'a' is there twice",
    ),
    "a tree beyond the row": (trees([0, 1, 5], 3), "trees look at feature 5; a row has at most 5"),
    "a tree far beyond the row": (trees([2**33], 1), "trees look at feature 8589934592"),
    "a tree before the row": (trees([-1], 1), "trees look at feature 18446744073709551615"),
    "trees of different lengths": (trees([0, 1, 2], 2), "lists of different lengths: .*'nodes_featureids': 3"),
}


@pytest.mark.parametrize("form", CHANGED)
def test_one_change_is_refused_with_words(good: onnx.ModelProto, check: Callable[[bytes], None], form: str) -> None:
    change, message = CHANGED[form]
    model = copy.deepcopy(good)
    change(model)
    with pytest.raises(BundleError, match=message) as caught:
        check(model.SerializeToString())
    assert str(caught.value).startswith("step.onnx: ")


def test_trees_within_the_row_pass(good: onnx.ModelProto, check: Callable[[bytes], None]) -> None:
    model = copy.deepcopy(good)
    trees([0, 4, 2], 3)(model)
    check(model.SerializeToString())


# --- protobuf itself ---------------------------------------------------------------------------------------------


def field(number: int, content: bytes) -> bytes:
    size, out = len(content), bytearray([number << 3 | 2])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes([*out, size]) + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "IR version None"),
        (b"\x08", "a number is cut off or too long, at byte 1"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "a number is cut off or too long"),  # 70 bits
        (b"\x08\x88\x00", "a number is cut off or too long"),  # 8, in two bytes
        (b"\x08\x08\x08\x08", "ir_version is there twice, at byte 2"),  # protobuf takes the last
        (field(7, b"") + field(7, b""), "graph is there twice"),  # protobuf merges both
        (b"\x0a\x01\x08", "ir_version has the wire type 2"),
        (b"\x3b\x3c", "graph has the wire type 3"),  # a group
        (b"\x3a\xff\xff\xff\xff\x0f", "graph says 4294967295 bytes, 0 are left"),
        (b"\x08\x08" + field(7, field(1, field(4, b"\xff"))), "an operator is not UTF-8"),
        (b"\x08\x08" + field(7, field(1, field(4, b"x" * 1025))), "an operator has 1025 bytes"),
        (b"\x08\x08" + field(7, field(1, field(4, b"Add") + field(5, b"\x3d12"))), "a number is cut off"),
        (b"\x08\x08" + field(7, field(1, b"") * 10_001), "10001 nodes; at most 10000"),
    ],
)
def test_bytes_that_are_no_model_are_refused(content: bytes, message: str, check: Callable[[bytes], None]) -> None:
    with pytest.raises(BundleError, match=message):
        check(content)


def test_many_small_fields_are_not_read_for_ever(
    check: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxfile, "MAX_FIELDS", 1000)
    with pytest.raises(BundleError, match="more than 1000 fields"):
        check(b"\x08\x08" + field(7, field(5, b"") * 1001))


# --- whatever the bytes are --------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_graphs_pass_or_are_bundle_errors(cards: Bundle, data: st.DataObject) -> None:
    """No other exception, and none that takes long: the test has a limit of time."""
    content = bytearray(data.draw(st.sampled_from([cards.step, cards.sequence])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "remove", "move"])):
            case "set":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[max(at, 1) :]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=12))
            case "remove":
                if len(content) > 64:
                    del content[at : at + data.draw(st.integers(1, 40))]
            case "move":
                content[at:at] = content[: data.draw(st.integers(1, 200))]
    try:
        check_graph(bytes(content), "step.onnx", *specs(cards), features=5)
    except BundleError as error:
        assert str(error).startswith("step.onnx: ")


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_bundle_errors(content: bytes) -> None:
    with pytest.raises(BundleError):
        check_graph(content, "x", [], [], features=0)


# --- a model cut down to some of its outputs ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cards", "plain", "rich"])
def test_the_states_alone_come_out_as_with_the_scores(name: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    spec = bundle.manifest.graph
    inputs, _ = specs(bundle, "sequence")
    wanted = [t.name for t in spec.state_outputs()]
    cut = with_outputs(bundle.sequence, wanted)
    check_graph(cut, "sequence.onnx", inputs, spec.state_outputs(), features=0)
    onnx.checker.check_model(onnx.load_from_string(cut), full_check=True)
    whole = onnx.load_from_string(bundle.sequence)
    assert len(onnx.load_from_string(cut).graph.node) < 0.95 * len(whole.graph.node)
    assert onnx.load_from_string(with_outputs(bundle.sequence, [o.name for o in whole.graph.output])).graph.output == (
        whole.graph.output
    )
    rng = np.random.default_rng(0)
    integers = rng.integers(2, 4, (5, 1 + spec.categorical))
    integers[:, 0] = 1_700_000_000_000 + np.arange(5) * 1_000_000
    values = rng.lognormal(1, 1, (5, spec.numeric + spec.context)).astype(np.float32)
    graph, before = SequenceGraph(bundle.sequence, spec), initial_states(spec, 1)
    got = graph.states_after(integers, values, before)
    full = graph.run({**unpacked(spec, integers[None], values[None]), "length": np.array([5]), **before})
    for state in spec.states:
        np.testing.assert_allclose(got[state.name], full[state.name + NEXT], atol=1e-6)
