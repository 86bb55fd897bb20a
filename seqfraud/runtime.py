"""The exported graphs under onnxruntime on the CPU."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from seqfraud.errors import BundleError
from seqfraud.graph import NEXT, GraphSpec, TensorSpec, check_tensors
from seqfraud.onnxfile import with_outputs

Array = npt.NDArray[Any]


GRAPH_MEMORY = 2 * 1024**3
"""Bytes that all graphs of a process may hold, weights and results together; beyond it a call fails and nothing else."""


@cache
def _bounded_memory() -> None:
    """Give onnxruntime one arena for all sessions: a small file may ask for any amount of memory when it runs."""
    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(kind, ort.OrtArenaCfg({"max_mem": GRAPH_MEMORY}))


def open_session(model: bytes, name: str = "the graph", threads: int = 1) -> ort.InferenceSession:
    """A session with the thread count said; the default count stalls small calls. Raises BundleError.

    Args:
        model: a checked file's bytes, not its path: what is loaded is what was checked.
        name: what a message calls it.
    """
    _bounded_memory()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common root
        words = (str(error).splitlines() or ["no words"])[0]
        raise BundleError(f"onnxruntime cannot load {name}: {words}") from error


def check_signature(
    session: ort.InferenceSession, name: str, inputs: list[TensorSpec], outputs: list[TensorSpec]
) -> None:
    """Names, types and axes of a graph against its specification. Raises BundleError."""
    check_tensors(name, "input", inputs, session.get_inputs())
    check_tensors(name, "output", outputs, session.get_outputs())


class SequenceGraph:
    """sequence.onnx: many events per call, for bulk scoring and for rebuilding a state."""

    def __init__(self, model: bytes, spec: GraphSpec, threads: int = 1) -> None:
        self.spec = spec
        self.session = open_session(model, "sequence.onnx", threads)
        inputs = [*spec.sequence_inputs(), *spec.state_inputs()]
        outputs = [*spec.sequence_outputs(), *spec.state_outputs()]
        check_signature(self.session, "sequence.onnx", inputs, outputs)
        self._outputs = [o.name for o in outputs]
        self._next = [o.name for o in spec.state_outputs()]
        self._carry = open_session(with_outputs(model, self._next), "sequence.onnx", threads) if self._next else None
        """The same graph without what only scores need, which is a good part of its nodes."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs (states included) by name."""
        return dict(zip(self._outputs, self.session.run(self._outputs, dict(inputs)), strict=True))

    def states_after(self, integers: Array, values: Array, states: Mapping[str, Array]) -> dict[str, Array]:
        """The states, as graph inputs of batch 1, after events [T, 1 + C], [T, F + K], from those before them."""
        if self._carry is None:
            return {}
        inputs = {**unpacked(self.spec, integers[None], values[None]), "length": np.array([len(integers)]), **states}
        after = self._carry.run(self._next, inputs)
        return {s.name: value for s, value in zip(self.spec.states, after, strict=True)}


class StepGraph:
    """step.onnx: one event per user. `score_one` uses fixed buffers and binds them once."""

    def __init__(self, model: bytes, spec: GraphSpec) -> None:
        self.spec = spec
        self.session = open_session(model, "step.onnx")
        inputs = [*spec.step_inputs(), *spec.state_inputs()]
        outputs = [*spec.step_outputs(), *spec.state_outputs()]
        check_signature(self.session, "step.onnx", inputs, outputs)
        self._outputs = [o.name for o in outputs]
        self._binding = self.session.io_binding()
        self.inputs = {s.name: np.zeros(s.shape(B=1), dtype=s.dtype) for s in inputs}
        self.outputs = {s.name: np.zeros(s.shape(B=1), dtype=s.dtype) for s in outputs}
        for name, buffer in self.inputs.items():
            self._binding.bind_input(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
        for name, buffer in self.outputs.items():
            self._binding.bind_output(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
        self._run = self.session.run_with_iobinding

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for any batch."""
        return dict(zip(self._outputs, self.session.run(self._outputs, dict(inputs)), strict=True))

    def logits(self, inputs: Mapping[str, Array]) -> Array:
        """float32 [B]: the uncalibrated logits alone, for any batch; leaves the fixed buffers as they are. Thread-safe."""
        logit: Array = self.session.run(["logit"], dict(inputs))[0]
        return logit

    def run_bound(self) -> None:
        """Run on the fixed buffers of batch 1: fill `inputs`, call, read `outputs`. Not thread-safe."""
        self._run(self._binding)


def unpacked(spec: GraphSpec, integers: Array, values: Array) -> dict[str, Array]:
    """Inputs of sequence.onnx, without length and states, from those of step.onnx.

    Args:
        integers: int64 [B, T, 1 + C], time (ms) and category ids.
        values: float32 [B, T, F + K], numbers and context.
    """
    parts = {
        "event_time": integers[..., 0],
        "categorical": integers[..., 1:],
        "numeric": values[..., : spec.numeric],
        "context": values[..., spec.numeric :],
    }
    return {t.name: np.ascontiguousarray(parts[t.name]) for t in spec.sequence_inputs() if t.name in parts}


def next_states(spec: GraphSpec, outputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
    """The states of the first `batch` users as inputs of the next call."""
    return {
        s.name: np.ascontiguousarray(np.take(outputs[s.name + NEXT], range(batch), axis=s.batch_axis))
        for s in spec.states
    }


def initial_states(spec: GraphSpec, batch: int) -> dict[str, Array]:
    """States of users without history, as inputs."""
    return {s.name: s.to_batch(s.initial_rows(batch)) for s in spec.states}
