"""A bundle: a folder with two graphs, reference vectors and a manifest, identified by its content.

`write_manifest` completes one, `open_bundle` refuses what is changed, foreign or hostile before onnxruntime sees a byte:
sizes and hashes here, the manifest in `admission`, the graphs in `onnxfile`, who vouches for it in `signature`.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seqfraud.admission import MANIFEST_BYTES, check_manifest, parse_manifest, require_same
from seqfraud.config import CleaningConfig, IdentifiersConfig, from_plain
from seqfraud.context import FOREVER, ContextSpec
from seqfraud.errors import BundleError, ConfigError
from seqfraud.files import replaced_file
from seqfraud.graph import GraphSpec
from seqfraud.onnxfile import check_graph
from seqfraud.policy import Policy, Thresholds
from seqfraud.schema import Schema
from seqfraud.signature import SIGNATURE, SIGNATURE_BYTES, SigningKey, TrustedKeys, require_signature
from seqfraud.vocabulary import Vocabulary

FORMAT = 2
READS = (1, 2)
"""Format 1 had no `decision`: by thresholds."""
SEQUENCE = "sequence.onnx"
STEP = "step.onnx"
REFERENCE = "reference.npz"
MANIFEST = "manifest.json"
FILES = (SEQUENCE, STEP, REFERENCE)
FILE_BYTES = 64 * 1024**2
"""Of one file; those of a GRU have a few hundred kB, a forest's a few MB."""
CLOCK_FEATURES = 2
"""That a row without a state has besides its inputs: the time of day and of week."""


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
    policy: Policy
    serve: ServeDefaults
    fingerprint: Mapping[str, Any]
    metrics: Mapping[str, Any]
    versions: Mapping[str, str]
    parity: Parity
    cleaning: CleaningConfig = CleaningConfig()
    identifiers: IdentifiersConfig = field(default_factory=IdentifiersConfig)

    @property
    def thresholds(self) -> Thresholds:
        """Those of the policy."""
        return self.policy.thresholds

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
            **self.policy.as_dict(),
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
        try:
            context = raw["context"]
            vocabularies = tuple(Vocabulary(v["column"], tuple(v["values"])) for v in raw["vocabularies"])
            return Manifest(
                kind=str(raw["kind"]),
                schema=Schema.from_dict(raw["schema"]),
                label=LabelSource(raw["label"]["column"], raw["label"]["known_at"]),
                context=ContextSpec(
                    tuple(context["columns"]),
                    tuple(map(int, context["half_lives"])),
                    int(context["label_delay"]),
                    int(context["habit_half_life"]),
                    None if context["user"] is None else int(context["user"]),
                    tuple(context["inputs"]),
                    tuple(context["user_inputs"]),
                    int(context.get("run_memory", FOREVER)),
                ),
                vocabularies=vocabularies,
                graph=GraphSpec.from_dict(raw["graph"]),
                missing=tuple(raw["missing"]),
                calibration=raw["calibration"],
                policy=Policy.from_dict(raw if raw["format"] != 1 else {**raw, "decision": {"by": "thresholds"}}),
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
                identifiers=from_plain(IdentifiersConfig, dict(raw["identifiers"]), "manifest", "identifiers."),
            )
        except (AttributeError, ConfigError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise BundleError(f"manifest: not readable: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Bundle:
    """A bundle that was checked. Its graphs and reference are the bytes that were hashed, whatever the disk holds now."""

    path: Path
    id: str
    manifest: Manifest
    sequence: bytes = field(repr=False)
    step: bytes = field(repr=False)
    reference: bytes = field(repr=False)
    manifest_file: bytes = field(repr=False)
    """What a signature is over."""
    signed_by: str | None = None
    """Id of the trusted key that signed it; None where no signature was asked for."""


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


def open_bundle(path: Path, trusted: TrustedKeys | None = None) -> Bundle:
    """Read a bundle, each file once, and refuse what export would not write; changes nothing and runs nothing.

    Args:
        path: the folder. What it holds besides the bundle's files is never looked at.
        trusted: whose signature is asked for; None: nobody's.

    Raises:
        BundleError: in one line, what is wrong where.
    """
    if not path.is_dir():
        raise BundleError(f"{path}: no such bundle; expected a folder written by `seqfraud export`")
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return _open(path, folder, trusted)
        finally:
            os.close(folder)
    except (BundleError, OSError) as error:
        words = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        # what is quoted from a bundle may hold anything
        printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)
        raise BundleError(f"{path}: {printable:.600}") from error


def _open(path: Path, folder: int, trusted: TrustedKeys | None) -> Bundle:
    """The bundle of an open folder: that it is renamed or replaced meanwhile mixes nothing."""
    content = _read(folder, MANIFEST, MANIFEST_BYTES)
    if content is None:
        raise BundleError(f"there is no {MANIFEST}")
    signer = None
    if trusted is not None:
        signer = require_signature(content, _read(folder, SIGNATURE, SIGNATURE_BYTES), trusted)
    raw = parse_manifest(content)
    form = raw.get("format")
    if form not in READS or isinstance(form, bool | float):
        raise BundleError(f"manifest: format {form!r:.80}; this version reads format {READS[0]} to {READS[-1]}")
    claimed = raw.pop("id", None)
    if claimed != content_id(raw):
        raise BundleError(f"the manifest was changed: its id is {claimed!r:.80}, its content's {content_id(raw)!r}")
    files = raw.pop("files", None)
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise BundleError(f"the manifest lists the files {files!r:.200}; expected {', '.join(FILES)}")
    manifest = Manifest.from_dict(raw)
    graph = manifest.graph
    check_manifest(
        manifest.schema,
        manifest.context,
        manifest.vocabularies,
        graph,
        manifest.missing,
        manifest.serve.window,
        manifest.serve.max_batch,
    )
    if manifest.policy.by != "thresholds" and manifest.schema.amount is None:
        raise BundleError(
            f"manifest: decision.by: {manifest.policy.by!r} needs an amount; schema.amount names no column"
        )
    require_same(raw, {**manifest.as_dict(), "format": form})
    contents = {name: _read_described(folder, name, files[name]) for name in FILES}
    features = graph.numeric + graph.context + graph.categorical + CLOCK_FEATURES
    inputs, outputs = [*graph.sequence_inputs(), *graph.state_inputs()], graph.state_outputs()
    check_graph(contents[SEQUENCE], SEQUENCE, inputs, [*graph.sequence_outputs(), *outputs], features)
    inputs = [*graph.step_inputs(), *graph.state_inputs()]
    check_graph(contents[STEP], STEP, inputs, [*graph.step_outputs(), *outputs], features)
    return Bundle(
        path,
        str(claimed),
        manifest,
        sequence=contents[SEQUENCE],
        step=contents[STEP],
        reference=contents[REFERENCE],
        manifest_file=content,
        signed_by=signer,
    )


def _read_described(folder: int, name: str, described: Any) -> bytes:
    content = _read(folder, name, FILE_BYTES)
    if content is None:
        raise BundleError(f"{name} is missing")
    if described != {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}:
        raise BundleError(f"{name} is not the file the manifest describes (size or sha256 differs)")
    return content


def _read(folder: int, name: str, limit: int) -> bytes | None:
    """A file of an open folder, read once; None where it is not there. No link is followed and no device waited for."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        words = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise BundleError(f"{name} {words}; expected a file in the folder itself") from error
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise BundleError(f"{name} is not a file")
        if about.st_size > limit:
            raise BundleError(f"{name} has {about.st_size:,} bytes; at most {limit:,}")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise BundleError(f"{name} has more than {limit:,} bytes")
    return content


def sign_bundle(path: Path, key: SigningKey) -> str:
    """Check a bundle and add a key's signature to its manifest.sig; the key's id. Raises BundleError.

    What the same key signed before is replaced; the lines of other keys stay.
    """
    identity, line = key.sign(open_bundle(path).manifest_file)
    file = path / SIGNATURE
    before = [x.split() for x in file.read_text("ascii", "replace").splitlines()] if file.is_file() else []
    others = [" ".join(words) + "\n" for words in before if len(words) == 3 and words[1] != identity]
    with replaced_file(file) as temporary:
        temporary.write_text("".join([*others, line]), encoding="ascii")
    return identity


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
