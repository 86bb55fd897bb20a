"""A bundle: a folder with two graphs, reference vectors and a manifest, identified by its content.

`write_bundle` makes one under a temporary name, `open_bundle` checks sizes and hashes before onnxruntime sees a byte.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from seqfraud.config import CleaningConfig, IdentifiersConfig, from_plain
from seqfraud.context import ContextSpec
from seqfraud.errors import BundleError, ConfigError
from seqfraud.graph import GraphSpec
from seqfraud.identifiers import is_hashed
from seqfraud.policy import Thresholds
from seqfraud.schema import Schema
from seqfraud.vocabulary import Vocabulary

FORMAT = 1
SEQUENCE = "sequence.onnx"
STEP = "step.onnx"
REFERENCE = "reference.npz"
MANIFEST = "manifest.json"
FILES = (SEQUENCE, STEP, REFERENCE)


@dataclass(frozen=True)
class LabelSource:
    """Which columns of a data file hold the label and when it became known; the service never sees them."""

    column: str | None
    known_at: str | None


@dataclass(frozen=True)
class ServeDefaults:
    """What the configuration says about serving."""

    window: int
    max_batch: int


@dataclass(frozen=True)
class Parity:
    """Largest allowed differences, and those measured per check."""

    probability: float
    logit: float
    measured: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Manifest:
    """Everything about a model that is not in its graphs."""

    kind: str
    schema: Schema
    label: LabelSource
    context: ContextSpec
    vocabularies: tuple[Vocabulary, ...]
    graph: GraphSpec
    missing: tuple[str, ...]
    """Numeric inputs that may be missing."""
    calibration: Mapping[str, Any]
    thresholds: Thresholds
    serve: ServeDefaults
    fingerprint: Mapping[str, Any]
    metrics: Mapping[str, Any]
    versions: Mapping[str, str]
    parity: Parity
    cleaning: CleaningConfig = CleaningConfig()
    identifiers: IdentifiersConfig = field(default_factory=IdentifiersConfig)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without the files and the id."""
        graph = self.graph
        return {
            "format": FORMAT,
            "kind": self.kind,
            "schema": self.schema.as_dict(),
            "label": asdict(self.label),
            "cleaning": asdict(self.cleaning),
            "identifiers": asdict(self.identifiers),
            "context": asdict(self.context),
            "vocabularies": [asdict(v) for v in self.vocabularies],
            "graph": graph.as_dict(),
            "signatures": {
                SEQUENCE: {
                    "inputs": [asdict(t) for t in (*graph.sequence_inputs(), *graph.state_inputs())],
                    "outputs": [asdict(t) for t in (*graph.sequence_outputs(), *graph.state_outputs())],
                },
                STEP: {
                    "inputs": [asdict(t) for t in (*graph.step_inputs(), *graph.state_inputs())],
                    "outputs": [asdict(t) for t in (*graph.step_outputs(), *graph.state_outputs())],
                },
            },
            "missing": list(self.missing),
            "calibration": dict(self.calibration),
            "thresholds": self.thresholds.as_dict(),
            "serve": asdict(self.serve),
            "fingerprint": dict(self.fingerprint),
            "metrics": dict(self.metrics),
            "versions": dict(self.versions),
            "parity": {
                "tolerance": {"probability": self.parity.probability, "logit": self.parity.logit},
                "measured": {k: dict(v) for k, v in self.parity.measured.items()},
            },
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "Manifest":
        """Raises BundleError where something is missing or of the wrong form."""
        if raw.get("format") != FORMAT:
            raise BundleError(f"manifest: format {raw.get('format')!r}; this version reads format {FORMAT}")
        try:
            context = raw["context"]
            vocabularies = tuple(Vocabulary(v["column"], tuple(v["values"])) for v in raw["vocabularies"])
            identifiers = raw.get("identifiers")
            if identifiers is None:  # of a bundle from before there was a policy
                identifiers = _policy_that_keeps(vocabularies)
            return Manifest(
                kind=str(raw["kind"]),
                schema=Schema.from_dict(raw["schema"]),
                label=LabelSource(raw["label"]["column"], raw["label"]["known_at"]),
                context=ContextSpec(
                    tuple(context["columns"]), tuple(map(int, context["half_lives"])), int(context["label_delay"])
                ),
                vocabularies=vocabularies,
                graph=GraphSpec.from_dict(raw["graph"]),
                missing=tuple(raw["missing"]),
                calibration=raw["calibration"],
                thresholds=Thresholds.from_dict(raw["thresholds"]),
                serve=ServeDefaults(int(raw["serve"]["window"]), int(raw["serve"]["max_batch"])),
                fingerprint=raw["fingerprint"],
                metrics=raw["metrics"],
                versions=raw["versions"],
                parity=Parity(
                    float(raw["parity"]["tolerance"]["probability"]),
                    float(raw["parity"]["tolerance"]["logit"]),
                    raw["parity"]["measured"],
                ),
                cleaning=from_plain(CleaningConfig, dict(raw["cleaning"]), "manifest", "cleaning."),
                identifiers=from_plain(IdentifiersConfig, identifiers, "manifest", "identifiers."),
            )
        except (AttributeError, ConfigError, KeyError, TypeError, ValueError) as error:
            raise BundleError(f"manifest: not readable: {type(error).__name__}: {error}") from error


def _policy_that_keeps(vocabularies: Sequence[Vocabulary]) -> dict[str, Any]:
    """The default, without hashing what a model was trained to know by its own spelling."""
    known = [v.column for v in vocabularies if any(is_hashed("cards", text) for text in v.values)]
    return {"columns": dict.fromkeys(known, "keep")}


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files have the hashes that its manifest says."""

    path: Path
    id: str
    manifest: Manifest

    @cached_property
    def sequence(self) -> Path:
        """The file of the sequence graph."""
        return self.path / SEQUENCE

    @cached_property
    def step(self) -> Path:
        """The file of the step graph."""
        return self.path / STEP


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, str | int]:
    """What the manifest says of a file."""
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def content_id(content: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that identify a manifest's content, file hashes included."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write the manifest of a folder that holds the other files; returns the bundle's id."""
    content = manifest.as_dict()
    content["files"] = {name: file_entry(folder / name) for name in FILES}
    bundle_id = content_id(content)
    (folder / MANIFEST).write_text(json.dumps({"id": bundle_id, **content}, indent=1) + "\n", encoding="utf-8")
    return bundle_id


def open_bundle(path: Path) -> Bundle:
    """Read the manifest and check every file against it. Raises BundleError."""
    if not path.is_dir():
        raise BundleError(f"{path}: no such bundle; expected a folder written by `seqfraud export`")
    try:
        raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{path}: there is no {MANIFEST}") from error
    except ValueError as error:
        raise BundleError(f"{path}: {MANIFEST} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BundleError(f"{path}: {MANIFEST} is not a JSON object")
    claimed = raw.pop("id", None)
    manifest = Manifest.from_dict(raw)
    files = raw.get("files")
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise BundleError(f"{path}: the manifest lists the files {files!r:.200}; expected {', '.join(FILES)}")
    for name in FILES:
        file = path / name
        if not file.is_file():
            raise BundleError(f"{path}: {name} is missing")
        if files[name] != file_entry(file):
            raise BundleError(f"{path}: {name} is not the file the manifest describes (size or sha256 differs)")
    if claimed != content_id(raw):
        raise BundleError(f"{path}: the manifest was changed: its id is {claimed!r}, its content's {content_id(raw)!r}")
    return Bundle(path, str(claimed), manifest)


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name; an older one of that name is replaced."""
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(final)
