"""A trained run as read from its folder; `training.run` describes the files."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch

import seqfraud
from seqfraud.config import Config, load_config
from seqfraud.context import context_spec
from seqfraud.errors import RunError
from seqfraud.graph import GraphSpec, gru_graph
from seqfraud.nn.model import ModelSpec, SequenceModel
from seqfraud.policy import Thresholds
from seqfraud.schema import Schema, schema_of
from seqfraud.vocabulary import Vocabulary


@dataclass(frozen=True)
class Run:
    """A trained run as read from its folder."""

    path: Path
    config: Config
    schema: Schema
    graph: GraphSpec
    model: SequenceModel
    vocabularies: tuple[Vocabulary, ...]
    calibration: Mapping[str, Any]
    thresholds: Thresholds
    fingerprint: Mapping[str, Any]
    metrics: Mapping[str, Any]


def load_run(path: Path) -> Run:
    """Read a run folder. Raises RunError."""
    for name in ("config.toml", "model.json", "model.safetensors", "metrics.json"):
        if not (path / name).is_file():
            raise RunError(f"{path}: {name} is missing; expected a run folder written by `seqfraud train`")
    config = load_config(path / "config.toml")
    raw = json.loads((path / "model.json").read_text(encoding="utf-8"))
    schema = schema_of(config)
    spec = ModelSpec.from_dict(raw["model"])
    graph = gru_graph(schema, context_spec(config, schema), spec.layers, spec.hidden)
    model = SequenceModel(spec, graph)
    model.load_state_dict(safetensors.torch.load_file(str(path / "model.safetensors")))
    return Run(
        path=path,
        config=config,
        schema=schema,
        graph=graph,
        model=model.eval(),
        vocabularies=tuple(Vocabulary(v["column"], tuple(v["values"])) for v in raw["vocabularies"]),
        calibration=raw["calibration"],
        thresholds=Thresholds.from_dict(raw["thresholds"]),
        fingerprint=raw["fingerprint"],
        metrics=json.loads((path / "metrics.json").read_text(encoding="utf-8")),
    )


def versions() -> dict[str, str]:
    """Versions of what made the model."""
    found = {"python": platform.python_version(), "seqfraud": seqfraud.__version__}
    for package in ("torch", "numpy", "onnx", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
