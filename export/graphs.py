"""The module as ONNX files.

The legacy exporter: it exports both graphs in one process, in any order and from any example, and writes
`linear_before_reset` and dynamic axes faithfully; `seqfraud.verification` checks that rather than trusting it.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from seqfraud.graph import TensorSpec
from seqfraud.nn.model import SequenceModel, StepModel

OPSET = 17
EXAMPLE_USERS = 3
EXAMPLE_EVENTS = 5


class Positional(nn.Module):
    """A module over named tensors with the positional signature that the exporter wants."""

    def __init__(self, module: nn.Module, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> None:
        super().__init__()
        self.module = module
        self.inputs = [spec.name for spec in inputs]
        self.outputs = [spec.name for spec in outputs]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors in the order of `inputs` to tensors in the order of `outputs`."""
        out: Mapping[str, Tensor] = self.module(dict(zip(self.inputs, tensors, strict=True)))
        return tuple(out[name] for name in self.outputs)


def export_module(module: nn.Module, inputs: list[TensorSpec], outputs: list[TensorSpec], file: Path) -> None:
    """Export a module over named tensors; letters in the axes become dynamic axes. N is B * T."""
    sizes = {"B": EXAMPLE_USERS, "T": EXAMPLE_EVENTS, "N": EXAMPLE_USERS * EXAMPLE_EVENTS}
    example = []
    for spec in inputs:
        value = 2 if spec.name == "length" else 0
        example.append(torch.full(spec.shape(**sizes), value, dtype=getattr(torch, spec.dtype)))
    axes = {
        spec.name: {i: axis for i, axis in enumerate(spec.axes) if isinstance(axis, str)}
        for spec in (*inputs, *outputs)
    }
    wrapped = Positional(module, inputs, outputs).eval()
    with warnings.catch_warnings():
        # the tracer and the legacy exporter warn about constants and deprecation on every call
        warnings.simplefilter("ignore")
        torch.onnx.export(
            wrapped,
            tuple(example),
            str(file),
            dynamo=False,
            opset_version=OPSET,
            input_names=wrapped.inputs,
            output_names=wrapped.outputs,
            dynamic_axes=axes,
        )


def export_graphs(model: SequenceModel, folder: Path) -> None:
    """Write sequence.onnx and step.onnx into a folder."""
    graph = model.graph
    model = model.cpu().eval()
    states_in, states_out = graph.state_inputs(), graph.state_outputs()
    export_module(
        model,
        [*graph.sequence_inputs(), *states_in],
        [*graph.sequence_outputs(), *states_out],
        folder / "sequence.onnx",
    )
    export_module(
        StepModel(model),
        [*graph.step_inputs(), *states_in],
        [*graph.step_outputs(), *states_out],
        folder / "step.onnx",
    )
