"""A trained run as read from its folder; `training.run` describes the files."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

import seqfraud
from seqfraud.config import Config, load_config
from seqfraud.context import ContextSpec, context_spec
from seqfraud.errors import RunError, SeqfraudError
from seqfraud.graph import GraphSpec, gru_graph
from seqfraud.nn.model import ModelSpec, SequenceModel
from seqfraud.policy import Policy
from seqfraud.schema import Schema, schema_of
from seqfraud.vocabulary import Vocabulary


@dataclass(frozen=True)
class Run:
    """A trained run as read from its folder."""

    path: Path
    data: Path
    """What it was trained on."""
    config: Config
    schema: Schema
    graph: GraphSpec
    model: SequenceModel
    vocabularies: tuple[Vocabulary, ...]
    calibration: Mapping[str, Any]
    policy: Policy
    fingerprint: Mapping[str, Any]
    metrics: Mapping[str, Any]


def load_run(path: Path, decided: bool = True) -> Run:
    """Read a run folder; with `decided` its policy has to be what its [decision] asks for. Raises RunError."""
    for name in ("config.toml", "model.json", "model.safetensors", "reference.npz", "metrics.json"):
        if not (path / name).is_file():
            raise RunError(f"{path}: {name} is missing; expected a run folder written by `seqfraud train`")
    try:
        return _read_run(path, decided)
    except SeqfraudError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise RunError(f"{path}: not readable as a run of this version, train it again: {reason}") from error


def _read_run(path: Path, decided: bool) -> Run:
    config = load_config(path / "config.toml")
    raw = json.loads((path / "model.json").read_text(encoding="utf-8"))
    schema = schema_of(config)
    context = context_spec(config, schema)
    for name, value in described(schema, context).items():
        if raw[name] != value:
            raise RunError(f"{path}: config.toml was changed after training: its {name} is not that of model.json")
    if decided and raw["decided_by"] != asdict(config.decision):
        raise RunError(
            f"{path}: the [decision] of config.toml was changed; `seqfraud decide {path}` chooses by it what the model "
            "decides"
        )
    spec = ModelSpec.from_dict(raw["model"])
    graph = gru_graph(schema, context, spec.layers, spec.state_width)
    model = SequenceModel(spec, graph)
    model.load_state_dict(_named_by_network(safetensors.torch.load_file(str(path / "model.safetensors"))))
    return Run(
        path=path,
        data=Path(raw["data"]),
        config=config,
        schema=schema,
        graph=graph,
        model=model.eval(),
        vocabularies=tuple(Vocabulary(v["column"], tuple(v["values"])) for v in raw["vocabularies"]),
        calibration=raw["calibration"],
        policy=Policy.from_dict(raw),
        fingerprint=raw["fingerprint"],
        metrics=json.loads((path / "metrics.json").read_text(encoding="utf-8")),
    )


def _named_by_network(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of today: before a model could have several networks, those of the only one had no number."""
    learned = ("embeddings", "input", "cells", "forecast", "head", "output")
    return {f"networks.0.{name}" if name.startswith(learned) else name: value for name, value in weights.items()}


def described(schema: Schema, context: ContextSpec) -> dict[str, Any]:
    """What of the configuration the weights depend on, as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps({"schema": schema.as_dict(), "context": asdict(context)}))
    return plain


def may_be_missing(schema: Schema, spec: ModelSpec) -> tuple[str, ...]:
    """Numeric inputs that the model takes without a value: those missing in training, and every place."""
    return (
        *(schema.numeric_inputs[i] for i in spec.missing),
        *(column for pair in schema.geo for column in pair),
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
