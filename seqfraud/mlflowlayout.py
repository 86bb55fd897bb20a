"""A bundle in MLflow's model layout, without MLflow: for registries and tools that know that layout.

The folder stays a bundle of its own, with MLflow's files beside: `seqfraud serve --bundle` opens it as it is. MLflow sees
sequence.onnx, as its flavours `onnx` and `python_function`; the loader of both is MLflow's own, so that nothing of seqfraud has
to be installed there. What MLflow cannot know is how raw columns become the graph's inputs: vocabularies, contexts and
states are in manifest.json.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from seqfraud.bundle import FILES, MANIFEST, SEQUENCE, Bundle
from seqfraud.errors import RegistryError
from seqfraud.graph import TensorSpec
from seqfraud.signature import SIGNATURE

CARD = "card.md"
_VERSION = re.compile(r"[0-9][0-9A-Za-z.]*")


def export_mlflow(bundle: Bundle, card: str, out: Path, now: str) -> None:
    """Write the folder `out`, which must not be there yet.

    Args:
        card: the model's card, in Markdown.
        now: ISO 8601, for MLflow's `utc_time_created`.
    """
    if out.exists():
        raise RegistryError(f"--mlflow: {out} exists; expected a folder that is not there yet")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            held = dict(zip(FILES, (bundle.sequence, bundle.step, bundle.reference), strict=True))
            for name, content in {**held, MANIFEST: bundle.manifest_file}.items():
                (temporary / name).write_bytes(content)
            if (bundle.path / SIGNATURE).is_file():
                shutil.copyfile(bundle.path / SIGNATURE, temporary / SIGNATURE, follow_symlinks=False)
            (temporary / CARD).write_text(card, encoding="utf-8")
            for name, text in _environment(bundle).items():
                (temporary / name).write_text(text, encoding="utf-8")
            size = sum(file.stat().st_size for file in temporary.iterdir())
            (temporary / "MLmodel").write_text(_mlmodel(bundle, size, now), encoding="utf-8")
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise RegistryError(f"--mlflow: {out}: cannot be written: {error.strerror}") from error


def _mlmodel(bundle: Bundle, size: int, now: str) -> str:
    """The MLmodel file: YAML, whose scalars are written as JSON, which is YAML too."""
    graph = bundle.manifest.graph
    inputs = _tensors([*graph.sequence_inputs(), *graph.state_inputs()])
    outputs = _tensors([*graph.sequence_outputs(), *graph.state_outputs()])
    data = json.dumps(SEQUENCE)
    lines = [
        "flavors:",
        "  onnx:",
        "    code: null",
        f"    data: {data}",
        *(["    onnx_version: " + json.dumps(version)] if (version := _version(bundle, "onnx")) else []),
        "    onnx_session_options:",
        "      execution_mode: sequential",
        "      inter_op_num_threads: 1",
        "      intra_op_num_threads: 1",
        "    providers:",
        "    - CPUExecutionProvider",
        "  python_function:",
        f"    data: {data}",
        "    env:",
        "      conda: conda.yaml",
        "      virtualenv: python_env.yaml",
        "    loader_module: mlflow.onnx",
        *(["    python_version: " + json.dumps(version)] if (version := _version(bundle, "python")) else []),
        "metadata:",
        f"  card: {json.dumps(CARD)}",
        f"  seqfraud_bundle: {json.dumps(bundle.id)}",
        f"  seqfraud_kind: {json.dumps(bundle.manifest.kind)}",
        f"model_size_bytes: {size}",
        f"model_uuid: {json.dumps(hashlib.sha256(bundle.manifest_file).hexdigest()[:32])}",
        "signature:",
        f"  inputs: {json.dumps(inputs)}",
        f"  outputs: {json.dumps(outputs)}",
        "  params: null",
        f"utc_time_created: {json.dumps(now)}",
    ]
    return "\n".join(lines) + "\n"


def _tensors(specs: Sequence[TensorSpec]) -> str:
    """A side of MLflow's signature, a text of JSON; -1 stands for an axis of any length."""
    return json.dumps(
        [
            {
                "name": spec.name,
                "type": "tensor",
                "tensor-spec": {"dtype": spec.dtype, "shape": [a if isinstance(a, int) else -1 for a in spec.axes]},
            }
            for spec in specs
        ]
    )


def _environment(bundle: Bundle) -> dict[str, str]:
    """requirements.txt and the two files that lead to it."""
    packages = ("onnx", "onnxruntime")
    pinned = [f"{name}=={version}" if (version := _version(bundle, name)) else name for name in packages]
    python = _version(bundle, "python")
    requirements = ["mlflow", *pinned]
    return {
        "requirements.txt": "".join(f"{line}\n" for line in requirements),
        "python_env.yaml": "".join(
            [
                f"python: {json.dumps(python)}\n" if python else "",
                "build_dependencies:\n- pip\n- setuptools\n- wheel\n",
                "dependencies:\n- -r requirements.txt\n",
            ]
        ),
        "conda.yaml": "".join(
            [
                "channels:\n- conda-forge\n",
                f"dependencies:\n- python{f'={python}' if python else ''}\n- pip\n- pip:\n",
                *(f"  - {line}\n" for line in requirements),
                "name: mlflow-env\n",
            ]
        ),
    }


def _version(bundle: Bundle, package: str) -> str | None:
    """What the manifest says it was made with; None where that is no version."""
    said = bundle.manifest.versions.get(package)
    return said if isinstance(said, str) and _VERSION.fullmatch(said) else None
