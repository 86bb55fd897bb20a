"""A bundle on disk: it opens if and only if its files are those that its manifest describes."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from seqfraud.bundle import (
    FILES,
    MANIFEST,
    REFERENCE,
    SEQUENCE,
    STEP,
    LabelSource,
    Manifest,
    Parity,
    ServeDefaults,
    content_id,
    open_bundle,
    put_in_place,
    write_manifest,
)
from seqfraud.config import CleaningConfig
from seqfraud.context import FOREVER, ContextSpec
from seqfraud.errors import BundleError
from seqfraud.graph import TensorSpec, gru_graph
from seqfraud.policy import Costs, Policy, Thresholds
from seqfraud.schema import Schema
from seqfraud.vocabulary import Vocabulary

DAY = 86_400_000
SCHEMA = Schema(
    "user",
    "time",
    "ms",
    transaction="id",
    amount="amount",
    numeric=("amount", "age"),
    categorical=("kind",),
    context=("shop",),
    ip=("address",),
    geo=(("lat", "long"),),
)
CONTEXT = ContextSpec(("shop", "address"), (DAY, 7 * DAY), 3 * DAY, run_memory=9 * DAY)
FULL = Manifest(
    kind="gru",
    schema=SCHEMA,
    label=LabelSource("fraud", None),
    context=CONTEXT,
    vocabularies=(Vocabulary("kind", ("grocery", "Bücher", "")),),
    graph=gru_graph(SCHEMA, CONTEXT, layers=2, hidden=5),
    missing=("age", "lat", "long"),
    calibration={"method": "platt", "scale": 1.25, "shift": -0.1},
    policy=Policy(Thresholds(is_fraud=0.5, review=0.25, decline=0.9)),
    serve=ServeDefaults(window=32, max_batch=1000),
    fingerprint={"rows": 12, "numeric_deciles": {"amount": [0.1, 1 / 3, 1e-300]}},
    metrics={"test": {"average_precision": 0.75, "roc_auc": None}},
    versions={"torch": "2.13.0"},
    parity=Parity(1e-5, 1e-3, {"sequence": {"logit": 1.5e-6}}),
    cleaning=CleaningConfig(negative_amount="drop", most_dropped=0.25),
)
BARE = dataclasses.replace(
    FULL,
    schema=Schema("user", "time", numeric=("amount",)),
    label=LabelSource(None, None),
    context=ContextSpec((), (DAY,), DAY),
    vocabularies=(),
    graph=gru_graph(Schema("user", "time", numeric=("amount",)), ContextSpec((), (DAY,), DAY), layers=1, hidden=2),
    missing=(),
    cleaning=CleaningConfig(),
)


def make_graph(inputs: list[TensorSpec], outputs: list[TensorSpec]) -> bytes:
    """A graph of the declared inputs and outputs that computes nothing sensible."""
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    both = [[helper.make_tensor_value_info(t.name, kinds[t.dtype], list(t.axes)) for t in s] for s in (inputs, outputs)]
    nodes = [helper.make_node("Add", [inputs[0].name, "one"], [t.name]) for t in outputs]
    one = numpy_helper.from_array(np.array([1], np.int64), "one")
    graph = helper.make_graph(nodes, "by hand", *both, [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def make_bundle(folder: Path, manifest: Manifest = FULL) -> str:
    folder.mkdir()
    graph = manifest.graph
    (folder / SEQUENCE).write_bytes(
        make_graph(
            [*graph.sequence_inputs(), *graph.state_inputs()], [*graph.sequence_outputs(), *graph.state_outputs()]
        )
    )
    (folder / STEP).write_bytes(
        make_graph([*graph.step_inputs(), *graph.state_inputs()], [*graph.step_outputs(), *graph.state_outputs()])
    )
    (folder / REFERENCE).write_bytes(b"the reference")
    return write_manifest(folder, manifest)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None], sign: bool = False) -> None:
    """Change the manifest's JSON; with `sign` the id is made to fit again."""
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw)
    if sign:
        raw.pop("id", None)
        raw = {"id": content_id(raw), **raw}
    (folder / MANIFEST).write_text(json.dumps(raw))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


# --- What opens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", [FULL, BARE], ids=["full", "bare"])
def test_what_was_written_is_what_is_read(tmp_path: Path, manifest: Manifest) -> None:
    written = make_bundle(tmp_path / "bundle", manifest)
    opened = open_bundle(tmp_path / "bundle")
    assert (opened.id, opened.manifest, opened.signed_by) == (written, manifest, None)
    held = dict(zip(FILES, (opened.sequence, opened.step, opened.reference), strict=True)) | {
        MANIFEST: opened.manifest_file
    }
    assert held == {name: (tmp_path / "bundle" / name).read_bytes() for name in held}
    assert "reference'" not in repr(opened)


def test_the_manifest_says_sizes_hashes_and_signatures_in_plain_json(bundle: Path) -> None:
    raw = json.loads((bundle / MANIFEST).read_text())
    assert raw["files"]["reference.npz"] == {
        "bytes": 13,
        "sha256": hashlib.sha256(b"the reference").hexdigest(),
    }
    signatures = {name: {t["name"] for t in s["inputs"]} for name, s in raw["signatures"].items()}
    states = {"h", "last_time", "last_place"}
    assert signatures == {
        "sequence.onnx": {"event_time", "numeric", "categorical", "context", "length", *states},
        "step.onnx": {"integers", "values", *states},
    }
    outputs = {t["name"] for t in raw["signatures"]["step.onnx"]["outputs"]}
    assert outputs == {"logit", "probability", "h_next", "last_time_next", "last_place_next"}


def test_the_id_is_a_function_of_the_content_and_nothing_else(tmp_path: Path) -> None:
    first = make_bundle(tmp_path / "a")
    assert make_bundle(tmp_path / "b") == first
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    assert open_bundle(tmp_path / "elsewhere").id == first
    change_manifest(tmp_path / "b", lambda raw: raw.update(sorted(raw.items(), reverse=True)))
    text = json.dumps(json.loads((tmp_path / "b" / MANIFEST).read_text()), sort_keys=True, indent=7)
    (tmp_path / "b" / MANIFEST).write_text(text)  # other order and spaces, same content
    assert open_bundle(tmp_path / "b").id == first


@pytest.mark.parametrize("name", FILES)
def test_another_file_is_another_id(tmp_path: Path, name: str) -> None:
    first = make_bundle(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(b"something else")
    assert write_manifest(tmp_path / "a", FULL) != first


@pytest.mark.parametrize(
    "change",
    [
        {"policy": Policy(Thresholds(0.5, 0.25, 0.91))},
        {"vocabularies": (Vocabulary("kind", ("Bücher", "grocery", "")),)},
        {"label": LabelSource("fraud", "known_at")},
        {"context": ContextSpec(("shop", "address"), (DAY, 7 * DAY), 3 * DAY + 1)},
        {"missing": ("lat", "long")},
        {"cleaning": CleaningConfig(negative_amount="drop")},
        {"calibration": {"method": "platt", "scale": 1.25, "shift": -0.1000001}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_manifest_is_another_id(tmp_path: Path, change: dict[str, Any]) -> None:
    assert make_bundle(tmp_path / "a") != make_bundle(tmp_path / "b", dataclasses.replace(FULL, **change))


def test_a_stray_file_in_the_folder_is_never_read_and_changes_nothing(bundle: Path) -> None:
    before = open_bundle(bundle)
    (bundle / ".DS_Store").write_bytes(b"x")
    (bundle / "model.pkl").write_bytes(b"x")
    assert open_bundle(bundle) == before


# --- What does not -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_changed_truncated_or_missing_file_is_refused_by_name(bundle: Path, name: str) -> None:
    good = (bundle / name).read_bytes()
    for bad in (good[:-1], good + b" ", b"X" + good[1:], b""):
        (bundle / name).write_bytes(bad)
        with pytest.raises(BundleError, match=f"{name} is not the file the manifest describes"):
            open_bundle(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        open_bundle(bundle)
    (bundle / name).write_bytes(good)
    open_bundle(bundle)


def test_swapped_files_are_refused(bundle: Path) -> None:
    """Both are graphs with good hashes, only not in their places."""
    (bundle / "step.onnx").rename(bundle / "other")
    (bundle / "sequence.onnx").rename(bundle / "step.onnx")
    (bundle / "other").rename(bundle / "sequence.onnx")
    with pytest.raises(BundleError, match=r"sequence\.onnx is not the file"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["thresholds"].update(is_fraud=0.51),
        lambda raw: raw["vocabularies"][0]["values"].reverse(),
        lambda raw: raw["metrics"]["test"].update(average_precision=0.99),
        lambda raw: raw.update(comment="added"),
        lambda raw: raw.update(id="0123456789abcdef"),
        lambda raw: raw.pop("id"),
        lambda raw: raw.pop("signatures"),
    ],
)
def test_a_changed_manifest_is_refused_with_both_ids(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    change_manifest(bundle, change)
    raw = json.loads((bundle / MANIFEST).read_text())
    claimed = raw.pop("id", None)
    with pytest.raises(BundleError, match=f"the manifest was changed: its id is {claimed!r}, its content's '"):
        open_bundle(bundle)


def test_a_bundle_of_format_1_decides_by_its_thresholds(bundle: Path) -> None:
    """That format had no `decision`."""

    def older(raw: dict[str, Any]) -> None:
        del raw["decision"]
        raw["format"] = 1

    change_manifest(bundle, older, sign=True)
    assert open_bundle(bundle).manifest == FULL
    change_manifest(bundle, lambda raw: raw.update(decision={"by": "expected_loss", "review": 3.0}), sign=True)
    with pytest.raises(BundleError, match=r"decision\.by: seen 'expected_loss'; expected 'thresholds'"):
        open_bundle(bundle)


def test_a_bundle_that_does_not_say_how_long_runs_are_remembered_remembers_them_for_good(bundle: Path) -> None:
    assert open_bundle(bundle).manifest.context.run_memory == 9 * DAY
    change_manifest(bundle, lambda raw: raw["context"].pop("run_memory"), sign=True)
    assert open_bundle(bundle).manifest.context.run_memory == FOREVER


def test_a_policy_by_the_amount_travels_and_needs_one(tmp_path: Path) -> None:
    for name, policy in (
        ("cost", Policy(FULL.thresholds, costs=Costs(4.0, insult_cost=1 / 3))),
        ("loss", Policy(FULL.thresholds, review_loss=0.1 + 0.2)),
    ):
        make_bundle(tmp_path / name, dataclasses.replace(FULL, policy=policy))
        assert open_bundle(tmp_path / name).manifest.policy == policy
        make_bundle(tmp_path / f"bare {name}", dataclasses.replace(BARE, policy=policy))
        with pytest.raises(BundleError, match=f"decision.by: '{policy.by}' needs an amount; schema.amount names no"):
            open_bundle(tmp_path / f"bare {name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decision": {"by": "luck"}}, "decision.by: seen 'luck'; expected one of"),
        (
            {"decision": {"by": "expected_loss", "review": 2e12}},
            r"decision\.review: seen 2e12|decision\.review: seen 2000000000000",
        ),
        ({"thresholds": {"is_fraud": 0.5, "review": 0.5}}, "thresholds.decline: missing; expected a number"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused_even_if_the_id_fits(
    bundle: Path, change: dict[str, Any], message: str
) -> None:
    change_manifest(bundle, lambda raw: raw.update(change), sign=True)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


@pytest.mark.parametrize("number", [3, 0, "1", None, 1.5, True])
def test_another_format_is_refused_even_if_its_id_fits(bundle: Path, number: Any) -> None:
    change_manifest(bundle, lambda raw: raw.update(format=number), sign=True)
    with pytest.raises(BundleError, match=f"format {number!r}; this version reads format 1 to 2"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["files"].update({"model.pkl": {"sha256": "0", "bytes": 1}}), "lists the files"),
        (lambda raw: raw["files"].pop("reference.npz"), "lists the files"),
        (lambda raw: raw.update(files=["sequence.onnx", "step.onnx", "reference.npz"]), "lists the files"),
        (lambda raw: raw["files"].update({"step.onnx": "abc"}), "step.onnx is not the file"),
        (lambda raw: raw.pop("graph"), "not readable: KeyError: 'graph'"),
        (lambda raw: raw.update(graph=[]), "not readable: TypeError"),
        (lambda raw: raw.update(schema=["user"]), "not readable: AttributeError"),
        (lambda raw: raw["schema"].update(users="user"), "unknown key schema.users.*schema.user"),
        (lambda raw: raw["schema"].pop("time"), "schema.time is missing"),
        (lambda raw: raw["thresholds"].update(review=0.95), "thresholds.review"),
        (lambda raw: raw["context"].update(label_delay="soon"), "not readable: ValueError"),
        (lambda raw: raw.update(vocabularies=[["grocery"]]), "not readable: TypeError"),
        (lambda raw: raw.pop("cleaning"), "not readable: KeyError: 'cleaning'"),
        (lambda raw: raw["cleaning"].update(repeated="keep"), "cleaning.repeated: 'keep' is not one of"),
        (lambda raw: raw["parity"].pop("tolerance"), "not readable: KeyError: 'tolerance'"),
    ],
)
def test_a_manifest_of_the_wrong_form_is_refused_even_if_its_id_fits(
    bundle: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_manifest(bundle, change, sign=True)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"{}", "format None"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(bundle: Path, content: bytes, message: str) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle; expected a folder"):
        open_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"there is no manifest\.json"):
        open_bundle(tmp_path)


# --- Into place --------------------------------------------------------------------------------------------------


def test_a_finished_folder_replaces_an_older_one_whole(tmp_path: Path) -> None:
    older, newer = tmp_path / "bundle", tmp_path / ".new"
    make_bundle(older, BARE)
    (older / "left over").touch()
    expected = make_bundle(newer)
    put_in_place(newer, older)
    assert open_bundle(older).id == expected
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["bundle", MANIFEST, *FILES])


def test_a_finished_folder_goes_where_there_was_none(tmp_path: Path) -> None:
    expected = make_bundle(tmp_path / "new")
    put_in_place(tmp_path / "new", tmp_path / "models" / "v1")
    assert open_bundle(tmp_path / "models" / "v1").id == expected
    assert not (tmp_path / "new").exists()
