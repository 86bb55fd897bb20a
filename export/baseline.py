"""A baseline without a state as the two graphs of a bundle: its features, the fitted model, its calibration.

    raw inputs -> RowFeatures -> x [N, D] -> classifier.onnx -> scores [N, 2] -> Calibrated -> logit, probability

The ends are exported from torch, the middle is what skl2onnx made of the scikit-learn model right after its fit.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx.compose
import torch
from torch import Tensor, nn

from export.graphs import export_module
from seqfraud.bundle import SEQUENCE, STEP
from seqfraud.graph import TensorSpec
from seqfraud.nn.baseline import CLASSIFIER, Baseline, RowFeatures, RowSpec


class Rows(nn.Module):
    """The features of every event as rows, and the times, from whose shape the answers get theirs."""

    def __init__(self, spec: RowSpec) -> None:
        super().__init__()
        self.features = RowFeatures(spec)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """x float64 [N, D] and times int64 [B, T] of the inputs of sequence.onnx."""
        x = self.features(inputs)
        return {"x": x.reshape(-1, x.shape[-1]), "times": inputs["event_time"] + 0}


class StepRows(nn.Module):
    """The same of packed inputs."""

    def __init__(self, spec: RowSpec) -> None:
        super().__init__()
        self.features = RowFeatures(spec)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """x float64 [B, D] and times int64 [B] of the inputs of step.onnx."""
        spec, integers = self.features.spec, inputs["integers"]
        raw = {"event_time": integers[:, 0]}
        if spec.categorical:
            raw["categorical"] = integers[:, 1:]
        if spec.numeric:
            raw["numeric"] = inputs["values"][:, : spec.numeric]
        if spec.context:
            raw["context"] = inputs["values"][:, spec.numeric :]
        return {"x": self.features(raw), "times": integers[:, 0] + 0}


class Calibrated(nn.Module):
    """Scores of both classes to the logit and the calibrated probability."""

    def __init__(self, baseline: Baseline) -> None:
        super().__init__()
        self.bounds = baseline.bounds
        self.scale = float(baseline.calibration["scale"])
        self.shift = float(baseline.calibration["shift"])

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """logit and probability float32, in the shape of `times`, of scores float [N, 2]."""
        honest, fraud = inputs["scores"].double().unbind(1)
        logit = fraud
        if self.bounds is not None:
            low, high = self.bounds
            # of both: log(p / (1 - p)) would lose the digits of a p near 1
            logit = torch.log(torch.clamp(fraud, low, high)) - torch.log(torch.clamp(honest, 1 - high, 1 - low))
        logit = logit.reshape(inputs["times"].shape)
        return {"logit": logit.float(), "probability": torch.sigmoid(self.scale * logit + self.shift).float()}


def baseline_graphs(baseline: Baseline, folder: Path, out: Path) -> None:
    """Write sequence.onnx and step.onnx from the folder of a baseline."""
    spec, graph = baseline.rows, baseline.rows.graph
    classifier = onnx.load(str(folder / CLASSIFIER))
    kind = classifier.graph.output[1].type.tensor_type.elem_type
    dtype = "float64" if kind == onnx.TensorProto.DOUBLE else "float32"
    tail = Calibrated(baseline)
    parts = (
        (SEQUENCE, Rows(spec), graph.sequence_inputs(), graph.sequence_outputs(), "N", ("B", "T")),
        (STEP, StepRows(spec), graph.step_inputs(), graph.step_outputs(), "B", ("B",)),
    )
    for name, head, inputs, outputs, rows, axes in parts:
        times = TensorSpec("times", "int64", axes)
        scores = TensorSpec("scores", dtype, (rows, 2))
        with TemporaryDirectory() as temporary:
            first, last = Path(temporary) / "first.onnx", Path(temporary) / "last.onnx"
            export_module(head, inputs, [TensorSpec("x", "float64", (rows, spec.width)), times], first)
            export_module(tail, [scores, times], outputs, last)
            joined = join(onnx.load(str(first)), classifier, onnx.load(str(last)))
        declare(joined, inputs)
        onnx.save(joined, str(out / name))


def declare(model: onnx.ModelProto, inputs: list[TensorSpec]) -> None:
    """Give a graph the inputs that it does not use, `length` among them: the exporter leaves them out."""
    there = {node.name for node in model.graph.input}
    for spec in inputs:
        if spec.name not in there:
            kind = onnx.TensorProto.INT64 if spec.dtype == "int64" else onnx.TensorProto.FLOAT
            model.graph.input.append(onnx.helper.make_tensor_value_info(spec.name, kind, spec.axes))


def join(first: onnx.ModelProto, classifier: onnx.ModelProto, last: onnx.ModelProto) -> onnx.ModelProto:
    """One model of three; the classifier's label is dropped."""
    middle = onnx.compose.add_prefix(classifier, "model_")
    # merged are only models of one IR version; skl2onnx names a domain more than once
    middle.ir_version = first.ir_version
    versions = {domain.domain: domain.version for domain in middle.opset_import}
    del middle.opset_import[:]
    middle.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in versions.items())
    scores = middle.graph.output[1].name
    front = onnx.compose.merge_models(
        onnx.compose.add_prefix(first, "first_", rename_inputs=False, rename_outputs=False),
        middle,
        io_map=[("x", middle.graph.input[0].name)],
        outputs=["times", scores],
    )
    return onnx.compose.merge_models(
        front,
        onnx.compose.add_prefix(last, "last_", rename_outputs=False),
        io_map=[(scores, "last_scores"), ("times", "last_times")],
    )
