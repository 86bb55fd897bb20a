"""What a graph's file holds, read without onnx and before onnxruntime sees a byte of it.

A small strict reader of the part of ONNX's protobuf that export writes. Everything else is refused: a field that is not in
the tables below, one that is there twice, operators and domains that export does not use, functions, graphs inside of
nodes, tensors in other files, and tensors whose data are not as long as their shape says. So nothing is declared that
is not in the file, and reading takes time and memory in proportion to the file.

Protobuf takes the last of a field that is there twice, merges messages, and cuts wide numbers off; a reader that took the
first would check something else than what onnxruntime then loads. Here such a file is simply refused.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from seqfraud.errors import BundleError
from seqfraud.graph import TensorSpec, check_tensors

MAX_FIELDS = 1_000_000
"""Fields that are read one by one, some microseconds each; runs of numbers in an attribute count as one."""
MAX_NODES = 10_000
MAX_RANK = 8
MAX_SIZE = 2**31 - 1
MAX_FIXED_SHAPE = 2**24
"""Elements that a shape written in the file may ask an operator to make."""
MAX_NAME = 1024

IR_VERSIONS = range(3, 11)
OPSETS = {"": range(17, 18), "ai.onnx.ml": range(1, 4)}
STANDARD = """
Abs Add Asin Cast Clip Concat Constant ConstantOfShape Cos Div Equal Exp Expand Floor GRU Gather GatherElements Gemm
GreaterOrEqual Identity
IsNaN Log MatMul Mod Mul Or Pow ReduceSum Relu Reshape Shape Sigmoid Sign Sin Slice Split Sqrt Squeeze Sub Transpose
Unsqueeze Where
"""
OPERATORS = {
    "": frozenset(STANDARD.split()),
    "ai.onnx.ml": frozenset(("ArrayFeatureExtractor", "OneHotEncoder", "TreeEnsembleClassifier")),
}
"""By domain, what the exporters write for the GRU, the logistic regression and the forest."""
SHAPE_INPUT = {"ConstantOfShape": 0, "Expand": 1}
"""Operators whose output is as large as one of their inputs says."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Field:
    """A field of a message that may be there."""

    name: str
    wire: int
    repeated: bool = False


Message = Mapping[int, Field]

MODEL: Message = {
    1: Field("ir_version", VARINT),
    2: Field("producer_name", BYTES),
    3: Field("producer_version", BYTES),
    4: Field("domain", BYTES),
    5: Field("model_version", VARINT),
    6: Field("doc_string", BYTES),
    7: Field("graph", BYTES),
    8: Field("opset_import", BYTES, True),
}
OPSET: Message = {1: Field("domain", BYTES), 2: Field("version", VARINT)}
GRAPH: Message = {
    1: Field("node", BYTES, True),
    2: Field("name", BYTES),
    5: Field("initializer", BYTES, True),
    10: Field("doc_string", BYTES),
    11: Field("input", BYTES, True),
    12: Field("output", BYTES, True),
    13: Field("value_info", BYTES, True),
}
NODE: Message = {
    1: Field("input", BYTES, True),
    2: Field("output", BYTES, True),
    3: Field("name", BYTES),
    4: Field("op_type", BYTES),
    5: Field("attribute", BYTES, True),
    6: Field("doc_string", BYTES),
    7: Field("domain", BYTES),
}
ATTRIBUTE: Message = {
    1: Field("name", BYTES),
    2: Field("f", FIXED32),
    3: Field("i", VARINT),
    4: Field("s", BYTES),
    5: Field("t", BYTES),
    7: Field("floats", FIXED32, True),
    8: Field("ints", VARINT, True),
    9: Field("strings", BYTES, True),
    13: Field("doc_string", BYTES),
    20: Field("type", VARINT),
}
TENSOR: Message = {
    1: Field("dims", VARINT, True),
    2: Field("data_type", VARINT),
    4: Field("float_data", BYTES),
    5: Field("int32_data", BYTES),
    7: Field("int64_data", BYTES),
    8: Field("name", BYTES),
    9: Field("raw_data", BYTES),
    10: Field("double_data", BYTES),
    12: Field("doc_string", BYTES),
}
VALUE: Message = {1: Field("name", BYTES), 2: Field("type", BYTES), 3: Field("doc_string", BYTES)}
TYPE: Message = {1: Field("tensor_type", BYTES)}
TENSOR_TYPE: Message = {1: Field("elem_type", VARINT), 2: Field("shape", BYTES)}
SHAPE: Message = {1: Field("dim", BYTES, True)}
DIM: Message = {1: Field("dim_value", VARINT), 2: Field("dim_param", BYTES)}

REFUSED = {
    (id(MODEL), 14): "metadata",
    (id(MODEL), 20): "training information",
    (id(MODEL), 25): "functions of its own",
    (id(GRAPH), 15): "sparse tensors",
    (id(ATTRIBUTE), 6): "a graph inside of a node",
    (id(ATTRIBUTE), 11): "graphs inside of a node",
    (id(TENSOR), 3): "a tensor in segments",
    (id(TENSOR), 6): "a tensor of strings",
    (id(TENSOR), 13): "a tensor in another file",
    (id(TENSOR), 14): "a tensor in another file",
}
"""Words for what is refused most interestingly; all of it is refused because it is not in the tables."""

ATTRIBUTE_KINDS = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}
FLOAT, INT32, INT64, BOOL, DOUBLE = 1, 6, 7, 9, 11
ELEMENT_BYTES = {FLOAT: 4, INT32: 4, INT64: 8, BOOL: 1, DOUBLE: 8}
TYPE_WORDS = {
    FLOAT: "tensor(float)",
    INT32: "tensor(int32)",
    INT64: "tensor(int64)",
    BOOL: "tensor(bool)",
    DOUBLE: "tensor(double)",
}
TYPED_DATA = {FLOAT: "float_data", INT32: "int32_data", INT64: "int64_data", BOOL: "int32_data", DOUBLE: "double_data"}

_RUNS = {
    (7 << 3) | FIXED32: re.compile(rb"(?:\x3d.{4})++", re.DOTALL),
    (8 << 3) | VARINT: re.compile(rb"(?:\x40[\x80-\xff]{0,9}[\x00-\x7f])++"),
}
"""Numbers of an attribute, one field each: a forest has hundred thousands of them."""
_ONE_INT = re.compile(rb"\x40([\x80-\xff]{0,9}[\x00-\x7f])")

Span = tuple[int, int]


@dataclass(frozen=True)
class Value:
    """An input or output as the file declares it; `shape` has a number, a name or None per axis."""

    name: str
    type: str
    shape: list[int | str | None]


def check_graph(
    data: bytes, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], features: int
) -> None:
    """Read a graph's file whole and refuse what export would not write.

    Args:
        name: what messages call the file.
        inputs, outputs: what the graph has to declare, by name, type and axes.
        features: D, the features that a row can have; trees look at no others.

    Raises:
        BundleError: says what is wrong and at which byte or node.
    """
    seen_inputs, seen_outputs = _File(data, name, features).model()
    check_tensors(name, "input", inputs, seen_inputs)
    check_tensors(name, "output", outputs, seen_outputs)


def with_outputs(data: bytes, outputs: Collection[str]) -> bytes:
    """A checked model with these of its outputs alone, and only the nodes and constants that they need."""
    file = _File(data, "the model", 0)
    model = file.read(MODEL, "the model", (0, len(data)))
    begin, end = model["graph"]
    graph = file.read(GRAPH, "the graph", (begin, end))
    needed, nodes = set(outputs), []
    for span in reversed(graph["node"]):
        node = file.read(NODE, "a node", span)
        if any(data[slice(*s)].decode() in needed for s in node["output"]):
            needed |= {data[slice(*s)].decode() for s in node["input"]}
            nodes.append(span)
    kept = {"node": nodes[::-1], "input": graph["input"]}
    for name, message in (("initializer", TENSOR), ("output", VALUE)):
        named = [(span, file.read(message, "a name", span)["name"]) for span in graph[name]]
        kept[name] = [span for span, s in named if data[slice(*s)].decode() in needed]
    parts = [_field(GRAPH, name, data[slice(*span)]) for name, spans in kept.items() for span in spans]
    parts.append(_field(GRAPH, "name", data[slice(*graph["name"])]))
    before = data[: begin - len(_field(MODEL, "graph", data[begin:end])) + end - begin]
    return before + _field(MODEL, "graph", b"".join(parts)) + data[end:]


def _field(message: Message, name: str, content: bytes) -> bytes:
    """A field of bytes as protobuf has it."""
    number = next(number for number, field in message.items() if field.name == name)
    return _number(number << 3 | BYTES) + _number(len(content)) + content


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class _File:
    """One file that is being read."""

    def __init__(self, data: bytes, name: str, features: int) -> None:
        self._data = data
        self._name = name
        self._features = features
        self._fields = 0

    def model(self) -> tuple[list[Value], list[Value]]:
        """The inputs and outputs of a model that passes."""
        model = self.read(MODEL, "the model", (0, len(self._data)))
        if model.get("ir_version") not in IR_VERSIONS:
            raise self._error(f"IR version {model.get('ir_version')}; expected {_words(IR_VERSIONS)}")
        for span in model["opset_import"]:
            opset = self.read(OPSET, "an opset", span)
            domain, version = self._text(opset.get("domain", (0, 0)), "a domain"), opset.get("version")
            if domain not in OPSETS:
                raise self._error(f"operators of the domain {domain!r:.80}; known are {sorted(OPSETS)}")
            if version not in OPSETS[domain]:
                raise self._error(f"opset {version} of {domain!r}; expected {_words(OPSETS[domain])}")
        if "graph" not in model:
            raise self._error("there is no graph in it")
        return self._graph(model["graph"])

    def _graph(self, span: Span) -> tuple[list[Value], list[Value]]:
        graph = self.read(GRAPH, "the graph", span)
        if len(graph["node"]) > MAX_NODES:
            raise self._error(f"{len(graph['node'])} nodes; at most {MAX_NODES}")
        inputs = [self._value(s) for s in graph["input"]]
        outputs = [self._value(s) for s in graph["output"]]
        for s in graph["value_info"]:
            self._value(s)
        known: set[str] = set()
        for value in inputs:
            self._add(known, value.name, "an input")
        shapes: dict[str, list[int]] = {}
        for s in graph["initializer"]:
            name, integers = self._tensor(s, "an initializer")
            self._add(known, name, "an initializer")
            if integers is not None:
                shapes[name] = integers
        for s in graph["node"]:
            self._node(s, known, shapes)
        names: set[str] = set()
        for value in outputs:
            self._add(names, value.name, "an output")
            if value.name not in known:
                raise self._error(f"output {value.name!r}: no node makes it")
        return inputs, outputs

    def _add(self, names: set[str], name: str, what: str) -> None:
        if not name or name in names:
            raise self._error(f"{what} is named {name!r:.80}, which {'is taken' if name else 'is no name'}")
        names.add(name)

    def _node(self, span: Span, known: set[str], shapes: dict[str, list[int]]) -> None:
        """Check a node; add what it gives to `known`, and to `shapes` if it is a few constant integers."""
        node = self.read(NODE, "a node", span)
        domain = self._text(node.get("domain", (0, 0)), "a domain")
        operator = self._text(node.get("op_type", (0, 0)), "an operator")
        if operator not in OPERATORS.get(domain, ()):
            raise self._error(
                f"the operator {operator!r:.80} of the domain {domain!r:.80} is not one that export writes"
            )
        inputs = [self._text(s, "an input") for s in node["input"]]
        for name in inputs:
            if name and name not in known:
                raise self._error(f"{operator}: its input {name!r:.80} is made by nothing before it")
        outputs = [self._text(s, "an output") for s in node["output"]]
        for name in outputs:
            if name:  # an optional output that is left out has none
                self._add(known, name, f"what {operator} gives")
        counts: dict[str, int] = {}
        for s in node["attribute"]:
            name, count, integers = self._attribute(s, operator)
            if name in counts:
                raise self._error(f"{operator}: the attribute {name!r:.80} is there twice")
            counts[name] = count
            if integers is not None and operator == "Constant" and outputs:
                shapes[outputs[0]] = integers
        at = SHAPE_INPUT.get(operator)
        if at is not None and at < len(inputs):
            shape = shapes.get(inputs[at], [])
            if prod(shape) > MAX_FIXED_SHAPE or any(size > MAX_FIXED_SHAPE for size in shape):
                raise self._error(f"{operator}: makes {shape!r:.80}; at most {MAX_FIXED_SHAPE} elements")
        if operator == "TreeEnsembleClassifier":
            self._trees(counts)

    def _attribute(self, span: Span, operator: str) -> tuple[str, int, list[int] | None]:
        """Name of an attribute, how many values it holds, and these where it is a tensor of a few integers."""
        read = self.read(ATTRIBUTE, f"an attribute of {operator}", span)
        name = self._text(read.get("name", (0, 0)), "an attribute's name")
        kind = ATTRIBUTE_KINDS.get(read.get("type", 0))
        if kind is None:
            raise self._error(
                f"{operator}.{name:.80}: an attribute of type {read.get('type')} is not one that export writes"
            )
        for other in ATTRIBUTE_KINDS.values():
            if other != kind and read.get(other, []) != []:
                raise self._error(f"{operator}.{name:.80}: says that it holds {kind}, and holds {other}")
        if operator == "TreeEnsembleClassifier" and name == "nodes_featureids":
            self._feature_ids(read["ints"])
        if operator == "Cast" and read.get("i") not in ELEMENT_BYTES:
            raise self._error(f"Cast: to the type {read.get('i')}, which is none that export writes")
        integers = self._tensor(read["t"], f"{operator}.{name:.80}")[1] if kind == "t" and "t" in read else None
        held = read.get(kind, [])
        if kind == "strings":
            return name, len(held), integers
        if kind in ("floats", "ints"):
            return name, sum(self._count(s, kind) for s in held), integers
        return name, 1, integers

    def _count(self, run: Span, kind: str) -> int:
        if kind == "floats":
            return (run[1] - run[0]) // 5
        return len(_ONE_INT.findall(self._data, *run))

    def _feature_ids(self, runs: list[Span]) -> None:
        distinct = {text for run in runs for text in _ONE_INT.findall(self._data, *run)}
        largest = max((sum((b & 127) << 7 * i for i, b in enumerate(text)) for text in distinct), default=0)
        if largest >= self._features:  # a negative one is a large one here
            raise self._error(f"trees look at feature {largest}; a row has at most {self._features}")

    def _trees(self, counts: Mapping[str, int]) -> None:
        for prefix in ("nodes_", "class_"):
            lengths = {name: n for name, n in counts.items() if name.startswith(prefix)}
            if len(set(lengths.values())) > 1:
                raise self._error(f"TreeEnsembleClassifier: lists of different lengths: {lengths!r:.200}")

    def _value(self, span: Span) -> Value:
        value = self.read(VALUE, "an input or output", span)
        name = self._text(value.get("name", (0, 0)), "the name of an input or output")
        kind = self.read(TYPE, f"the type of {name!r:.80}", value.get("type", (0, 0)))
        tensor = self.read(TENSOR_TYPE, f"the type of {name!r:.80}", kind.get("tensor_type", (0, 0)))
        word = TYPE_WORDS.get(tensor.get("elem_type", 0))
        if word is None:
            raise self._error(f"{name!r:.80} is no tensor of a type that export writes")
        shape: list[int | str | None] = []
        dims = self.read(SHAPE, f"the shape of {name!r:.80}", tensor.get("shape", (0, 0)))["dim"]
        if len(dims) > MAX_RANK:
            raise self._error(f"{name!r:.80} has {len(dims)} axes; at most {MAX_RANK}")
        for s in dims:
            dim = self.read(DIM, f"an axis of {name!r:.80}", s)
            if len(dim) > 1:
                raise self._error(f"an axis of {name!r:.80} has a size and a name")
            if dim.get("dim_value", 0) > MAX_SIZE:
                raise self._error(f"an axis of {name!r:.80} has the size {dim['dim_value']}; at most {MAX_SIZE}")
            shape.append(self._text(dim["dim_param"], "an axis") if "dim_param" in dim else dim.get("dim_value"))
        return Value(name, word, shape)

    def _tensor(self, span: Span, what: str) -> tuple[str, list[int] | None]:
        """Name of a tensor that holds all its elements, and these where they are a few integers."""
        tensor = self.read(TENSOR, what, span)
        name = self._text(tensor.get("name", (0, 0)), "a tensor's name")
        kind, dims = tensor.get("data_type"), tensor["dims"]
        if kind not in ELEMENT_BYTES:
            raise self._error(f"{what} {name!r:.80}: data type {kind} is not one that export writes")
        if len(dims) > MAX_RANK:
            raise self._error(f"{what} {name!r:.80}: {len(dims)} axes; at most {MAX_RANK}")
        held = [field.name for field in TENSOR.values() if field.name.endswith("_data") and field.name in tensor]
        if len(held) > 1 or not {*held} <= {"raw_data", TYPED_DATA[kind]}:
            raise self._error(f"{what} {name!r:.80}: a {TYPE_WORDS[kind]} with {' and '.join(held)}")
        if any(size > MAX_SIZE for size in dims):
            raise self._error(f"{what} {name!r:.80}: declares {dims!r:.80}; at most {MAX_SIZE} along an axis")
        count = prod(dims)
        begin, end = tensor[held[0]] if held else (0, 0)
        packed = bool(held) and held[0] in ("int32_data", "int64_data")
        if packed:
            values = self._packed(begin, end, what)
            elements = len(values)
        else:
            values = []
            elements, rest = divmod(end - begin, ELEMENT_BYTES[kind])
            elements = -1 if rest else elements
        if elements != count:
            raise self._error(
                f"{what} {name!r:.80}: declares {dims!r:.80}, {count} elements, and holds {end - begin} bytes"
            )
        if kind != INT64 or count > MAX_RANK:
            return name, None
        if not packed:
            values = [int.from_bytes(self._data[i : i + 8], "little") for i in range(begin, end, 8)]
        return name, values

    def _packed(self, begin: int, end: int, what: str) -> list[int]:
        out = []
        while begin < end:
            value, begin = self._varint(begin, end, what)
            out.append(value)
        self._spend(len(out))
        return out

    # ---- protobuf

    def read(self, message: Message, what: str, span: Span) -> dict[str, Any]:
        """The fields of a message by name: a number, or where the bytes are; repeated ones as a list, perhaps empty."""
        at, end = span
        out: dict[str, Any] = {field.name: [] for field in message.values() if field.repeated}
        while at < end:
            self._spend(1)
            start = at
            tag, at = self._varint(at, end, what)
            run = _RUNS.get(tag) if message is ATTRIBUTE else None
            if run is not None:
                found = run.match(self._data, start, end)
                if found is None:
                    raise self._error(f"{what}: a number is cut off", start)
                out[message[tag >> 3].name].append(found.span())
                at = found.end()
                continue
            number, wire = tag >> 3, tag & 7
            field = message.get(number)
            if field is None:
                words = REFUSED.get((id(message), number), f"a field {number} that export does not write")
                raise self._error(f"{what}: has {words}", start)
            if field.wire != wire:
                raise self._error(f"{what}: {field.name} has the wire type {wire}", start)
            value: int | Span
            if wire == VARINT:
                value, at = self._varint(at, end, what)
            else:
                size = 4
                if wire == BYTES:
                    size, at = self._varint(at, end, what)
                if size > end - at:
                    raise self._error(f"{what}: {field.name} says {size} bytes, {end - at} are left", start)
                value, at = (at, at + size), at + size
            if field.repeated:
                out[field.name].append(value)
            elif field.name in out:
                raise self._error(f"{what}: {field.name} is there twice", start)
            else:
                out[field.name] = value
        return out

    def _varint(self, at: int, end: int, what: str) -> tuple[int, int]:
        """An unsigned number and where it ends; one that is written longer than need be is refused."""
        value = shift = 0
        start = at
        while at < end and shift < 70:
            byte = self._data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                if value >> 64 or (byte == 0 and shift):
                    break
                return value, at
            shift += 7
        raise self._error(f"{what}: a number is cut off or too long", start)

    def _text(self, span: Span, what: str) -> str:
        begin, end = span
        if end - begin > MAX_NAME:
            raise self._error(f"{what} has {end - begin} bytes; at most {MAX_NAME}", begin)
        try:
            return self._data[begin:end].decode()
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8", begin) from None

    def _spend(self, fields: int) -> None:
        self._fields += fields
        if self._fields > MAX_FIELDS:
            raise self._error(f"more than {MAX_FIELDS} fields")

    def _error(self, words: str, at: int | None = None) -> BundleError:
        return BundleError(f"{self._name}: {words}" + ("" if at is None else f", at byte {at}"))


def _words(numbers: range) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
