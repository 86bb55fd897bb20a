"""What `seqfraud baselines` keeps of a fitted model without a state, so that it can be exported: nothing pickled.

The scikit-learn model is converted to ONNX right after its fit and stored with scikit-learn's own outputs for reference
rows, by which `seqfraud export` checks the graphs that it makes of it.

Letters: N encoded rows, n reference rows, D features.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from skl2onnx import to_onnx
from skl2onnx.common.data_types import DoubleTensorType
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from seqfraud.nn.baseline import Baseline, RowFeatures, RowSpec, inputs_id, row_names, write_baseline
from seqfraud.policy import Policy
from training.prepare import Prepared
from training.run import fingerprint

REFERENCE_ROWS = 4000
OPSETS = {"": 17, "ai.onnx.ml": 3}
"""That of the rest of the graphs; `export.baseline` joins them."""

Floats = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Portable:
    """A fitted model over the features of `RowFeatures(spec)`; probability = sigmoid(scale * score + shift)."""

    kind: str
    spec: RowSpec
    bounds: tuple[float, float] | None
    model: Any
    score: Callable[[Any, Floats], Floats]
    scale: float
    shift: float

    def outputs(self, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[Floats, Floats]:
        """Logits and probabilities, float64 [n], of raw rows by name."""
        features = RowFeatures(self.spec)({k: torch.from_numpy(v) for k, v in inputs.items()}).numpy()
        logit = self.score(self.model, features)
        return logit, sigmoid(self.scale * logit + self.shift)


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -60, 60))))


def keep(
    run: Path,
    portable: Portable,
    prepared: Prepared,
    probability: Floats,
    policy: Policy,
    metrics: Mapping[str, Any],
) -> None:
    """Write baselines/NAME in the run folder; `probability` [N] is known in the validation rows."""
    baseline = Baseline(
        kind=portable.kind,
        rows=portable.spec,
        features=row_names(prepared.schema, prepared.context),
        bounds=portable.bounds,
        calibration={"method": "platt", "scale": portable.scale, "shift": portable.shift},
        policy=policy,
        decided_by=asdict(prepared.config.decision),
        fingerprint=fingerprint(prepared, probability),
        metrics=metrics,
        versions={package: version(package) for package in ("scikit-learn", "skl2onnx")},
        made_for=inputs_id(prepared.schema, prepared.context, prepared.vocabularies),
    )
    rows = reference_rows(prepared, probability)
    logit, calibrated = portable.outputs(rows)
    rows |= {"logit": logit.astype(np.float32), "probability": calibrated.astype(np.float32)}
    write_baseline(run, baseline, as_onnx(portable.model, portable.spec.width), rows)


def as_onnx(model: Any, width: int) -> bytes:
    """A classifier over float64 [n, D] as an ONNX model that gives the label and a score of both classes.

    Of a regression the logit, as the probability of a logit of 50 is 1, and of a forest the probability. float64, in which
    scikit-learn computes: in float32 the sums of a forest and the logit of a regression lose digits.
    """
    if isinstance(model, RandomForestClassifier):
        round_thresholds(model)
    last = model.steps[-1][1] if isinstance(model, Pipeline) else model
    options: dict[int, dict[str, bool]] = {id(model): {"zipmap": False}, id(last): {"zipmap": False}}
    if isinstance(last, LogisticRegression):
        options[id(last)]["raw_scores"] = True
    converted = to_onnx(
        model,
        initial_types=[("x", DoubleTensorType([None, width]))],
        target_opset=OPSETS,
        options=options,
    )
    return bytes(converted.SerializeToString())


def round_thresholds(forest: RandomForestClassifier) -> None:
    """Round every threshold down to float32, in which ONNX keeps it; the forest decides as before.

    scikit-learn takes features as float32 and thresholds as float64, mostly half-way between two of them. Rounded to the
    nearest, one would become the feature above it, which then would go to the other side.
    """
    for tree in forest.estimators_:
        exact = tree.tree_.threshold
        nearest = exact.astype(np.float32)
        exact[...] = np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def reference_rows(prepared: Prepared, probability: Floats) -> Arrays:
    """Raw rows of the validation days, half of them those with the highest scores: columns of the graph, no identifiers.

    In some of them numbers are widened or missing and ids are those of unseen values.
    """
    rng = np.random.default_rng(0)
    encoded = prepared.encoded
    rows = np.flatnonzero(prepared.rows.validation)
    highest = rows[np.argsort(-probability[rows], kind="stable")][: REFERENCE_ROWS // 2]
    chosen = np.r_[highest, rng.choice(rows, REFERENCE_ROWS - len(highest))]
    raw: Arrays = {k: np.array(v) for k, v in encoded.gather(chosen).items()}
    for name in ("numeric", "context"):
        if name in raw:
            wide = rng.random(raw[name].shape) < 0.05
            raw[name][wide] *= rng.lognormal(0, 2, int(wide.sum())).astype(np.float32)
    if "numeric" in raw:
        raw["numeric"][rng.random(raw["numeric"].shape) < 0.02] = np.nan
    if "categorical" in raw:
        raw["categorical"][rng.random(raw["categorical"].shape) < 0.02] = 1
    return raw
