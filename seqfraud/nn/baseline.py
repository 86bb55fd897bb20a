"""Baselines without a state: the features of a row alone, and what a run folder keeps of a fitted model.

`RowFeatures` computes from the raw inputs of `seqfraud.graph` what such a model is fitted on; the same module is
exported in front of the model, so that there is one definition of these features.

baselines/NAME/classifier.onnx   the fitted model, features to a score of both classes, as skl2onnx wrote it
baselines/NAME/baseline.json     features, calibration, thresholds, fingerprint, metrics
baselines/NAME/reference.npz     raw rows with scikit-learn's logits and probabilities (no identifiers)

Letters: B users, T events, F numeric inputs, C categorical inputs, K context inputs, N rows, D = F + K + 2 + C features.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from seqfraud.bundle import content_id
from seqfraud.config import DAY_MS, HOUR_MS, WEEK_MS
from seqfraud.context import ContextSpec, context_spec
from seqfraud.errors import RunError
from seqfraud.files import replaced_file
from seqfraud.graph import GraphSpec
from seqfraud.nn.checkpoint import Run, described
from seqfraud.nn.model import signed_log
from seqfraud.policy import Policy
from seqfraud.schema import Schema
from seqfraud.vocabulary import Vocabulary

FOLDER = "baselines"
CLASSIFIER = "classifier.onnx"
DESCRIPTION = "baseline.json"
REFERENCE = "reference.npz"
COMPARISON = "baselines.json"
"""What `seqfraud baselines` says of every model; in the run folder."""
SINCE_MONDAY = 3 * DAY_MS
"""The epoch was a Thursday."""


@dataclass(frozen=True)
class RowSpec:
    """Which features a row has and in what form a model takes them."""

    numeric: int
    categorical: int
    context: int
    missing: float | None = None
    """What a missing number counts as; None: it stays NaN."""
    logarithm: bool = False
    """Numbers as sign(x) log(1 + |x|), the clock's among them."""

    @property
    def numbers(self) -> int:
        """Features that are no ids; they stand in front."""
        return self.numeric + self.context + 2

    @property
    def width(self) -> int:
        """D."""
        return self.numbers + self.categorical

    @property
    def graph(self) -> GraphSpec:
        """The graphs of a bundle: the same inputs as the GRU's, and no state."""
        return GraphSpec(self.numeric, self.categorical, self.context, ())


def row_names(schema: Schema, context: ContextSpec) -> tuple[str, ...]:
    """Names of the D features."""
    return (
        *schema.numeric_inputs,
        *context.names(),
        "hour",
        "weekday",
        *(f"{name} id" for name in schema.categorical),
    )


class RowFeatures(nn.Module):
    """Raw inputs to the features of each row: numbers, contexts, hour and weekday (UTC), ids."""

    def __init__(self, spec: RowSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features float64 [..., D] of event_time int64 [...] ms, numeric [..., F], categorical [..., C], context [..., K].

        Those of width 0 are absent. Every feature is a float32 value before the logarithm: a forest compares float32.
        """
        time = inputs["event_time"][..., None]
        # int64 until it is reduced; whole hours and days since Monday are counted in float64
        hour = ((time % DAY_MS).double() / HOUR_MS).float()
        weekday = torch.floor(((time + SINCE_MONDAY) % WEEK_MS).double() / DAY_MS)
        parts = [inputs[name].double() for name in ("numeric", "context") if name in inputs]
        numbers = torch.cat([*parts, hour.double(), weekday], dim=-1)
        if self.spec.missing is not None:
            numbers = torch.where(torch.isnan(numbers), torch.full_like(numbers, self.spec.missing), numbers)
        if self.spec.logarithm:
            numbers = signed_log(numbers)
        if "categorical" not in inputs:
            return numbers
        return torch.cat([numbers, inputs["categorical"].double()], dim=-1)


@dataclass(frozen=True)
class Baseline:
    """A fitted model without a state, as its folder holds it.

    A model with `bounds` scores probabilities, logit = log p1 - log p0 with both cut off there; one without scores the
    logit itself. probability = sigmoid(scale * logit + shift).
    """

    kind: str
    rows: RowSpec
    features: tuple[str, ...]
    bounds: tuple[float, float] | None
    """Least and largest probability of fraud, before calibration."""
    calibration: Mapping[str, Any]
    """method, scale, shift."""
    policy: Policy
    decided_by: Mapping[str, Any]
    """The [decision] that the policy was chosen by."""
    fingerprint: Mapping[str, Any]
    metrics: Mapping[str, Any]
    versions: Mapping[str, str]
    made_for: str
    """`inputs_id` of the run."""


def inputs_id(schema: Schema, context: ContextSpec, vocabularies: tuple[Vocabulary, ...]) -> str:
    """What the ids and columns of the inputs mean, as a digest: another training may have other vocabularies."""
    return content_id({**described(schema, context), "vocabularies": [asdict(v) for v in vocabularies]})


def write_baseline(run: Path, baseline: Baseline, classifier: bytes, reference: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write baselines/KIND in a run folder."""
    folder = run / FOLDER / baseline.kind
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(folder / CLASSIFIER) as file:
        file.write_bytes(classifier)
    with replaced_file(folder / REFERENCE) as file, file.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **reference)
    content = {**asdict(baseline), **baseline.policy.as_dict()}
    del content["policy"]
    with replaced_file(folder / DESCRIPTION) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def baseline_folder(run: Path, kind: str) -> Path:
    """Where the exportable form of a baseline lies. Raises RunError where there is none, with the reason."""
    folder = run / FOLDER / kind
    there = sorted(file.parent.name for file in (run / FOLDER).glob(f"*/{DESCRIPTION}"))
    if kind in there:
        return folder
    try:
        models = json.loads((run / COMPARISON).read_text(encoding="utf-8"))["models"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{run}: holds no baselines yet; `seqfraud baselines {run}` makes them") from error
    names = ", ".join(there) or "none; run `seqfraud baselines` again"
    if kind in models:
        raise RunError(
            f"--model {kind}: not exportable: it is fitted on hand-made features of the user's history, which are no part "
            f"of a graph and which the service does not compute; can be exported: gru, {names}"
        )
    raise RunError(f"--model {kind}: the run has no such model; can be exported: gru, {names}")


def load_baseline(run: Run, kind: str) -> Baseline:
    """Read baselines/KIND of a run folder. Raises RunError."""
    file = baseline_folder(run.path, kind) / DESCRIPTION
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        bounds = raw["bounds"]
        policy = Policy.from_dict({name: raw.pop(name) for name in ("thresholds", "decision")})
        baseline = Baseline(
            **{
                **raw,
                "rows": RowSpec(**raw["rows"]),
                "features": tuple(raw["features"]),
                "bounds": None if bounds is None else (float(bounds[0]), float(bounds[1])),
                "policy": policy,
            }
        )
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file}: not readable, run `seqfraud baselines` again: {error}") from error
    if baseline.made_for != inputs_id(run.schema, context_spec(run.config, run.schema), run.vocabularies):
        raise RunError(f"{file}: fitted before the run's last training; run `seqfraud baselines {run.path}` again")
    if baseline.decided_by != asdict(run.config.decision):
        raise RunError(f"{file}: decides by another [decision]; run `seqfraud baselines {run.path}` again")
    return baseline
