"""A bundle in MLflow's layout, checked without MLflow; docs/improvement.md says with which version it was loaded."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from seqfraud.bundle import FILES, MANIFEST, Bundle, open_bundle, sign_bundle, write_manifest
from seqfraud.errors import RegistryError
from seqfraud.mlflowlayout import export_mlflow
from seqfraud.signature import new_key, read_signing_key, read_trusted_keys

NOW = "2026-11-27T03:11:29.047Z"


def read(text: str) -> dict[str, Any]:
    """The YAML that is written: objects by indentation, scalars and lists of them."""
    root: dict[str, Any] = {}
    open_at: list[tuple[int, dict[str, Any]]] = [(-1, root)]
    last: tuple[dict[str, Any], str] | None = None
    for line in text.splitlines():
        depth, line = len(line) - len(line.lstrip()), line.strip()
        if line.startswith("- "):
            assert last is not None
            holder, name = last
            holder[name] = [*(holder[name] or []), line[2:]]
            continue
        while depth <= open_at[-1][0]:
            open_at.pop()
        name, _, value = line.partition(":")
        value = value.strip()
        holder = open_at[-1][1]
        if value:
            holder[name] = json.loads(value) if value[0] in '"0123456789' or value == "null" else value
        else:
            holder[name] = {}
            open_at.append((depth, holder[name]))
        last = (holder, name)
    return root


@pytest.fixture
def versioned(rich: Bundle, tmp_path: Path) -> Bundle:
    folder = Path(shutil.copytree(rich.path, tmp_path / "bundle"))
    versions = {"python": "3.11.7", "onnx": "1.23.2", "onnxruntime": "1.32.0", "torch": "2.13.0+cpu"}
    write_manifest(folder, dataclasses.replace(rich.manifest, versions=versions))
    return open_bundle(folder)


def test_the_layout(versioned: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "mlflow"
    export_mlflow(versioned, "# card\n", out, NOW)
    assert {f.name for f in out.iterdir()} == {
        *FILES, MANIFEST, "MLmodel", "card.md", "conda.yaml", "python_env.yaml", "requirements.txt",
    }  # fmt: skip
    said = read((out / "MLmodel").read_text())
    assert set(said) == {
        "flavors", "metadata", "model_size_bytes", "model_uuid", "signature", "utc_time_created",
    }  # fmt: skip
    onnx, function = said["flavors"]["onnx"], said["flavors"]["python_function"]
    assert (out / onnx["data"]).read_bytes() == versioned.sequence
    assert (onnx["onnx_version"], onnx["providers"]) == ("1.23.2", ["CPUExecutionProvider"])
    assert function == {
        "data": "sequence.onnx",
        "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
        "loader_module": "mlflow.onnx",
        "python_version": "3.11.7",
    }
    assert said["metadata"]["seqfraud_bundle"] == versioned.id
    assert len(said["model_uuid"]) == 32
    assert said["model_size_bytes"] == sum(f.stat().st_size for f in out.iterdir() if f.name != "MLmodel")
    assert (out / "requirements.txt").read_text() == "mlflow\nonnx==1.23.2\nonnxruntime==1.32.0\n"
    assert read((out / "python_env.yaml").read_text())["dependencies"] == ["-r requirements.txt"]
    assert "- python=3.11.7" in (out / "conda.yaml").read_text()


def test_the_signature_names_every_tensor_of_the_graph(versioned: Bundle, tmp_path: Path) -> None:
    export_mlflow(versioned, "", tmp_path / "mlflow", NOW)
    said = read((tmp_path / "mlflow" / "MLmodel").read_text())["signature"]
    graph = versioned.manifest.graph
    inputs = {t["name"]: t["tensor-spec"] for t in json.loads(said["inputs"])}
    assert list(inputs) == [t.name for t in (*graph.sequence_inputs(), *graph.state_inputs())]
    assert inputs["event_time"] == {"dtype": "int64", "shape": [-1, -1]}
    assert inputs["h"] == {"dtype": "float32", "shape": [1, -1, 6]}
    assert inputs["context"] == {"dtype": "float32", "shape": [-1, -1, graph.context]}
    outputs = [t["name"] for t in json.loads(said["outputs"])]
    assert outputs == [t.name for t in (*graph.sequence_outputs(), *graph.state_outputs())]
    assert said["params"] is None


def test_the_folder_is_still_the_bundle_and_its_signature_counts(versioned: Bundle, tmp_path: Path) -> None:
    new_key(tmp_path / "release.key")
    signer = sign_bundle(versioned.path, read_signing_key(tmp_path / "release.key"))
    export_mlflow(versioned, "", tmp_path / "mlflow", NOW)
    opened = open_bundle(tmp_path / "mlflow", read_trusted_keys(tmp_path / "release.key.pub"))
    assert (opened.id, opened.signed_by) == (versioned.id, signer)


def test_a_folder_that_is_there_is_not_touched(versioned: Bundle, tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    with pytest.raises(RegistryError, match="mlflow exists; expected a folder that is not there yet"):
        export_mlflow(versioned, "", tmp_path / "mlflow", NOW)
    assert list((tmp_path / "mlflow").iterdir()) == []


def test_a_version_that_is_none_asks_for_nothing(rich: Bundle, tmp_path: Path) -> None:
    """A manifest may say anything; pip reads options from requirements.txt."""
    folder = Path(shutil.copytree(rich.path, tmp_path / "bundle"))
    versions = {"onnx": "1.23.2\n--index-url http://elsewhere", "onnxruntime": "1 --pre", "python": "*"}
    write_manifest(folder, dataclasses.replace(rich.manifest, versions=versions))
    export_mlflow(open_bundle(folder), "", tmp_path / "mlflow", NOW)
    assert (tmp_path / "mlflow" / "requirements.txt").read_text() == "mlflow\nonnx\nonnxruntime\n"
    assert "elsewhere" not in (tmp_path / "mlflow" / "MLmodel").read_text()
