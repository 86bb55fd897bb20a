"""Names, types and axes of what goes in and out of the exported graphs, once, as data.

Letters: B users in a batch, T events in a sequence, F numeric inputs, C categorical inputs, K context inputs, L layers,
H hidden units, G places (pairs of latitude and longitude).

A state `x` comes in as `x` and goes out as `x_next`. Inputs of width 0 do not exist.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from seqfraud.context import NEVER, ContextSpec
from seqfraud.errors import BundleError
from seqfraud.schema import Schema

NEXT = "_next"
LAST_TIME = "last_time"
"""The state that holds the time of a user's last event (ms)."""
LAST_PLACE = "last_place"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output; a letter in `axes` is dynamic, a number is fixed."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    def shape(self, **sizes: int) -> tuple[int, ...]:
        """The shape for the given sizes of the dynamic axes."""
        return tuple(a if isinstance(a, int) else sizes[a] for a in self.axes)


@dataclass(frozen=True)
class StateSpec:
    """One declared state: its tensor, its value before anything happened, and whose it is."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]
    initial: float | int
    key: str = "user"

    @property
    def batch_axis(self) -> int:
        """Where B stands in the axes."""
        return self.axes.index("B")

    @cached_property
    def _to_batch(self) -> tuple[int, ...]:
        """Axes of rows in the order of a batch, worked out once: numpy.moveaxis does it at every call."""
        return (*range(1, self.batch_axis + 1), 0, *range(self.batch_axis + 1, len(self.axes)))

    @cached_property
    def _to_rows(self) -> tuple[int, ...]:
        """Axes of a batch in the order of rows."""
        return (self.batch_axis, *(i for i in range(len(self.axes)) if i != self.batch_axis))

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape for one user."""
        return tuple(a for a in self.axes if isinstance(a, int))

    def initial_rows(self, count: int) -> npt.NDArray[Any]:
        """[count, *row_shape]: the value before anything happened."""
        return np.full((count, *self.row_shape), self.initial, dtype=self.dtype)

    def to_batch(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[B, *row_shape] as the graph wants it."""
        return np.ascontiguousarray(rows.transpose(self._to_batch))

    def to_rows(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What the graph gives as [B, *row_shape]."""
        return batch.transpose(self._to_rows)


@dataclass(frozen=True)
class GraphSpec:
    """Both graphs of a bundle."""

    numeric: int
    categorical: int
    context: int
    states: tuple[StateSpec, ...]

    def sequence_inputs(self) -> list[TensorSpec]:
        """Inputs of sequence.onnx without the states."""
        specs = [
            TensorSpec("event_time", "int64", ("B", "T")),
            TensorSpec("numeric", "float32", ("B", "T", self.numeric)),
            TensorSpec("categorical", "int64", ("B", "T", self.categorical)),
            TensorSpec("context", "float32", ("B", "T", self.context)),
            TensorSpec("length", "int64", ("B",)),
        ]
        return [s for s in specs if s.axes[-1] != 0]

    def step_inputs(self) -> list[TensorSpec]:
        """Inputs of step.onnx without the states: time and category ids, numeric and context packed."""
        specs = [
            TensorSpec("integers", "int64", ("B", 1 + self.categorical)),
            TensorSpec("values", "float32", ("B", self.numeric + self.context)),
        ]
        return [s for s in specs if s.axes[-1] != 0]

    def state_inputs(self) -> list[TensorSpec]:
        """The states as inputs."""
        return [TensorSpec(s.name, s.dtype, s.axes) for s in self.states]

    def state_outputs(self) -> list[TensorSpec]:
        """The states as outputs."""
        return [TensorSpec(s.name + NEXT, s.dtype, s.axes) for s in self.states]

    def sequence_outputs(self) -> list[TensorSpec]:
        """Outputs of sequence.onnx without the states."""
        return [TensorSpec(name, "float32", ("B", "T")) for name in ("logit", "probability")]

    def step_outputs(self) -> list[TensorSpec]:
        """Outputs of step.onnx without the states."""
        return [TensorSpec(name, "float32", ("B",)) for name in ("logit", "probability")]

    def to_batch(self, rows: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """States [B, *row_shape] by name as the graph wants them."""
        return {s.name: s.to_batch(rows[s.name]) for s in self.states}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> "GraphSpec":
        """The specification of a manifest; KeyError or TypeError where it is not one."""
        states = tuple(StateSpec(**{**s, "axes": tuple(s["axes"])}) for s in raw["states"])
        return GraphSpec(int(raw["numeric"]), int(raw["categorical"]), int(raw["context"]), states)


def gru_graph(schema: Schema, context: ContextSpec, layers: int, hidden: int) -> GraphSpec:
    """The graphs of the GRU: its state is h, the time of the last event and, with `geo`, the last place."""
    states = [
        StateSpec("h", "float32", (layers, "B", hidden), 0.0),
        StateSpec(LAST_TIME, "int64", ("B",), NEVER),
    ]
    if schema.geo:
        states.append(StateSpec(LAST_PLACE, "float32", ("B", 2 * len(schema.geo)), 0.0))
    return GraphSpec(len(schema.numeric_inputs), len(schema.categorical), context.width, tuple(states))


_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


class SeenTensor(Protocol):
    """An input or output as a graph's file, or a session over it, says."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def type(self) -> str:
        """Such as tensor(float)."""

    @property
    def shape(self) -> Sequence[int | str | None]:
        """A number where an axis is fixed, a name or None where it is dynamic."""


def check_tensors(name: str, side: str, specs: Iterable[TensorSpec], tensors: Iterable[SeenTensor]) -> None:
    """Names, types and axes of a graph's inputs or outputs (`side`) against the specification. Raises BundleError."""
    seen = {tensor.name: tensor for tensor in tensors}
    wanted = {spec.name: spec for spec in specs}
    if seen.keys() != wanted.keys():
        raise BundleError(f"{name}: {side}s are {sorted(seen)}, the manifest says {sorted(wanted)}")
    for spec in wanted.values():
        tensor = seen[spec.name]
        if _TYPES.get(tensor.type) != spec.dtype:
            raise BundleError(f"{name}: {side} {spec.name} has type {tensor.type}, expected {spec.dtype}")
        shape = list(tensor.shape)
        fits = len(shape) == len(spec.axes) and all(
            not isinstance(axis, int) or not isinstance(size, int) or size == axis
            for axis, size in zip(spec.axes, shape, strict=False)
        )
        frozen = [
            axis
            for axis, size in zip(spec.axes, shape, strict=False)
            if isinstance(axis, str) and isinstance(size, int)
        ]
        if side == "input" and frozen:
            raise BundleError(f"{name}: the axis {frozen[0]} of input {spec.name} is frozen at {shape}")
        if not fits:
            raise BundleError(f"{name}: {side} {spec.name} has shape {shape}, expected {list(spec.axes)}")
