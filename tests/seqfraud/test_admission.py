"""Bundles from elsewhere: what the folder, the manifest and the reference may not be, each refused in one line."""

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqfraud.admission import USER_BYTES, check_manifest, parse_manifest, user_bytes
from seqfraud.bundle import FILES, MANIFEST, REFERENCE, STEP, Bundle, content_id, open_bundle
from seqfraud.cli import main
from seqfraud.errors import BundleError
from seqfraud.graph import NEXT
from seqfraud.verification import load_cases
from serve.memory import Memory


@pytest.fixture
def folder(cards: Bundle, tmp_path: Path) -> Path:
    """A real bundle, written anew: to be spoilt."""
    to = tmp_path / "bundle"
    to.mkdir()
    for name, content in {
        MANIFEST: cards.manifest_file,
        **dict(zip(FILES, (cards.sequence, cards.step, cards.reference), strict=True)),
    }.items():
        (to / name).write_bytes(content)
    open_bundle(to)
    return to


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest so that its id fits again: what whoever makes a bundle can do."""
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw)
    raw.pop("id")
    (folder / MANIFEST).write_text(json.dumps({"id": content_id(raw), **raw}))


def refused(folder: Path, message: str) -> str:
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder}: ")
    assert text.isprintable()
    assert len(text) < 1000
    return text


# --- the folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_a_link_is_not_followed(folder: Path, name: str, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(folder, f"{name} is a symbolic link; expected a file in the folder itself")


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_a_pipe_is_not_waited_for_and_a_folder_not_read(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, f"{name} is not a file")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, f"{name} is not a file")


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_a_file_of_any_size_is_not_read(folder: Path, name: str) -> None:
    """A sparse file of a terabyte takes no space."""
    with (folder / name).open("r+b") as file:
        file.truncate(2**40)
    refused(folder, f"{name} has 1,099,511,627,776 bytes; at most [0-9,]+$")


def test_a_link_to_the_folder_itself_is_how_versions_are_switched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    assert open_bundle(tmp_path / "current").id == open_bundle(folder).id


def test_what_was_opened_is_what_was_checked(folder: Path) -> None:
    """The files may change right after they were hashed: they are not read again."""
    opened = open_bundle(folder)
    for name in FILES:
        (folder / name).write_bytes(b"something else")
    from seqfraud.runtime import SequenceGraph, StepGraph

    StepGraph(opened.step, opened.manifest.graph)
    SequenceGraph(opened.sequence, opened.manifest.graph)


def test_opening_writes_nothing(folder: Path) -> None:
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    open_bundle(folder)
    (folder / STEP).write_bytes(b"spoilt")
    refused(folder, r"step\.onnx is not the file")
    (folder / STEP).write_bytes(before[STEP][1])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {k: v for k, (_, v) in before.items()}


# --- the manifest as JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": 1, "format": 1}', "has the key 'format' twice"),
        (b'{"a": {"b\\n": 1, "b\\n": 2}}', r"has the key 'b\\n' twice"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b'{"a": 1e999}', "holds 1e999, which is no finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b'{"a": "\\ud800"}', "which is half of a character"),
        (b'{"\\ud800": 1}', "which is half of a character"),
        (b'{"a": ' + b"[" * 17 + b"]" * 17 + b"}", "nested deeper than 16 levels"),
        (b"[" * 1_000_000, "nested deeper than 16 levels"),
        (b'{"a":' * 100_000, "nested deeper than 16 levels"),
        (b"\xff", "is not JSON"),
        (b'"x"', "is not a JSON object"),
    ],
)
def test_json_is_read_strictly(content: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_manifest(content)


def state(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda raw: raw["graph"]["states"][0].update(changed)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a path": (lambda m: m["files"].update({"../../x": m["files"].pop("step.onnx")}), "lists the files .*expected seq"),
    "an absolute path": (lambda m: m["files"].update({"/etc/passwd": m["files"]["step.onnx"]}), "lists the files"),
    "many files": (lambda m: m["files"].update({str(i): {} for i in range(10**4)}), "lists the files"),
    "an unknown key": (lambda m: m.update(plugin="os"), "manifest: the key 'plugin' is unknown"),
    "an unknown key below": (lambda m: m["serve"].update(hook="x"), r"manifest\.serve: the key 'hook' is unknown"),
    "an unknown key of a state": (state(hook="x"), "unexpected keyword argument 'hook'"),
    "a line break": (lambda m: m.update({"a\nb\x1b[2J": 1}), r"the key 'a\\nb\\x1b\[2J' is unknown"),
    "a number that is cut": (
        lambda m: m["serve"].update(window=2.9),
        r"manifest\.serve\.window: seen 2\.9; expected 2",
    ),
    "a number as text": (lambda m: m["serve"].update(window="3"), r"manifest\.serve\.window: seen '3'; expected 3"),
    "true as a number": (lambda m: m["graph"].update(categorical=True), r"graph\.categorical: seen True; expected 1"),
    "format true": (lambda m: m.update(format=True), "format True; this version reads format 1"),
    "signatures of others": (
        lambda m: m["signatures"]["step.onnx"]["inputs"].pop(),
        r"manifest\.signatures\.step\.onnx\.inputs: seen",
    ),
    "a huge window": (lambda m: m["serve"].update(window=10**9), "serve.window: seen 1000000000; expected a whole"),
    "no window": (lambda m: m["serve"].update(window=0), "serve.window: seen 0"),
    "a window of less": (lambda m: m["serve"].update(window=-1), "serve.window: seen -1"),
    "a wide ring": (lambda m: m["serve"].update(window=60_000), "bytes of memory per user .* at most 524,288"),
    "a huge batch": (lambda m: m["serve"].update(max_batch=10**9), "serve.max_batch: seen 1000000000"),
    "a huge state": (state(axes=[1, "B", 10**9]), "state h: an axis: seen 1000000000; expected .* to 65,536"),
    "a state of many axes": (state(axes=[60_000, "B", 60_000]), "100,800,000,996 bytes of memory per user"),
    "an axis below zero": (state(axes=[1, "B", -8]), "state h: an axis: seen -8"),
    "an axis as text": (state(axes=[1, "B", "T"]), "state h: an axis: seen 'T'"),
    "no users in a state": (state(axes=[1, 8]), "axes .*; expected 'B' once"),
    "a state of another type": (state(dtype="object"), "dtype 'object'; expected one of float32, int64"),
    "a state of a merchant": (state(key="merchant"), "key 'merchant'; this version keeps states per user only"),
    "a state of nobody": (state(key="nobody"), "key 'nobody'; expected 'user' or a context column"),
    "a state named as an input": (state(name="values"), "state 'values': the name 'values' is taken"),
    "a state named as a state": (state(name="last_time"), "the name 'last_time' is taken"),
    "a state's strange name": (state(name="h\n"), "expected a name of letters"),
    "a state's strange beginning": (state(initial="0"), "initial '0'; expected a number"),
    "a state that begins far away": (state(initial=1e300), r"initial 1e\+300 is too large"),
    "many states": (
        lambda m: m["graph"]["states"].extend({**m["graph"]["states"][1], "name": f"s{i}"} for i in range(9)),
        "11 states; at most 8",
    ),
    "a half-life of zero": (lambda m: m["context"].update(half_lives=[0, 1]), "context.half_lives: seen 0"),
    "a half-life below zero": (lambda m: m["context"].update(half_lives=[-5, 1]), "context.half_lives: seen -5"),
    "a half-life of ages": (lambda m: m["context"].update(half_lives=[10**18, 1]), "context.half_lives: seen 10000"),
    "many half-lives": (
        lambda m: (m["context"].update(half_lives=[1] * 500), m["graph"].update(context=2 * 2005)),
        "number of context.half_lives: seen 500; expected .* to 32",
    ),
    "a habit of zero": (lambda m: m["context"].update(habit_half_life=0), "context.habit_half_life: seen 0"),
    "no memory of runs": (lambda m: m["context"].update(run_memory=0), "context.run_memory: seen 0"),
    "a user that is no context": (lambda m: m["context"].update(user=1), "context.user: 1; the schema says None"),
    "no inputs": (
        lambda m: m["context"].update(inputs=[]),
        r"context.inputs: seen \[\]; expected some of count, amount",
    ),
    "an unknown input": (lambda m: m["context"].update(inputs=["mean"]), "context.inputs: seen .'mean'"),
    "an input twice": (lambda m: m["context"].update(inputs=["run", "run"]), "context.inputs: .* each once"),
    "inputs in another order": (
        lambda m: m["context"].update(inputs=["run", "count"]),
        "context.inputs: .* this order",
    ),
    "other inputs": (lambda m: m["context"].update(inputs=["run"]), "graph.context: .*; the schema says"),
    "a delay below zero": (lambda m: m["context"].update(label_delay=-1), "context.label_delay: seen -1"),
    "other contexts": (lambda m: m["context"].update(columns=["kind", "device"]), "context.columns: .*the schema says"),
    "another width": (lambda m: m["graph"].update(numeric=4000), "graph.numeric: 4000; the schema says 1"),
    "other vocabularies": (lambda m: m["vocabularies"].clear(), "vocabularies of .*; the schema says .'kind'"),
    "a value twice": (
        lambda m: m["vocabularies"][0]["values"].append("food"),
        "vocabulary of 'kind': a value is listed twice",
    ),
    "a value that is no text": (lambda m: m["vocabularies"][0]["values"].append(7), "7 is no text"),
    "a long value": (lambda m: m["vocabularies"][0]["values"].append("x" * 1025), "is no text of at most 1024"),
    "a number that is missing": (lambda m: m.update(missing=["other"]), "missing: 'other' is no numeric input"),
    "a column of two roles": (lambda m: m["schema"].update(time="amount"), "'amount' has two roles"),
    "one column for all": (lambda m: m["schema"].update(transaction="user"), "user, time and transaction are"),
    "a column without a name": (lambda m: m["schema"].update(user=""), "a column's name has 0 characters"),
    "a column with a long name": (
        lambda m: m["schema"].update(user="u" * 201),
        "has 201 characters; expected 1 to 200",
    ),
    "a column twice": (
        lambda m: (m["schema"].update(context=["device", "device"]), m["context"].update(columns=["device", "device"])),
        "a column is listed twice",
    ),
    "many columns": (lambda m: m["schema"].update(ip=[f"c{i}" for i in range(600)]), "602 columns of one role"),
}


@pytest.mark.parametrize("form", HOSTILE)
def test_a_hostile_manifest_is_refused_even_if_its_id_fits(folder: Path, form: str) -> None:
    change, message = HOSTILE[form]
    change_manifest(folder, change)
    refused(folder, message)


def test_many_values_are_refused(cards: Bundle) -> None:
    m = cards.manifest
    vocabulary = dataclasses.replace(m.vocabularies[0], values=tuple(map(str, range(1_000_001))))
    with pytest.raises(BundleError, match="1,000,001 values in the vocabularies; at most 1,000,000"):
        check_manifest(m.schema, m.context, [vocabulary], m.graph, m.missing, 3, 50)


def test_what_a_user_takes_is_what_the_service_keeps(cards: Bundle, rich: Bundle, plain: Bundle) -> None:
    for bundle in (cards, rich, plain):
        users = Memory(bundle, None).users  # type: ignore[arg-type]
        kept = sum(array[0].nbytes for array in (*users.arrays.values(), *users.recent.values(), users.recent_at))
        assert user_bytes(bundle.manifest.graph, bundle.manifest.serve.window) == kept < USER_BYTES


# --- the reference -----------------------------------------------------------------------------------------------


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


def with_size(content: bytes, size: int) -> bytes:
    """An archive of one member that says of it how much it unpacks to."""
    changed = bytearray(content)
    for at in (content.rindex(b"PK\x01\x02") + 24, content.index(b"PK\x03\x04") + 22):
        changed[at : at + 4] = size.to_bytes(4, "little")
    return bytes(changed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: File is not a zip file"),
        (archive({str(i): b"" for i in range(65)}), "65 arrays .* at most 64"),
        (with_size(archive({"a": b""}), 300_000_000), "1 arrays of 300,000,000 bytes"),
        (archive({"a.npy": b"nothing"}), "cannot be read"),
        (
            archive({"a.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}")}),
            "with 0 bytes",
        ),
        (archive({"a.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", b"1234")}), "with 4 bytes"),
        (archive({"a.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem")}), "read"),
        (archive({"a.npy": npy("__import__('os').abort()")}), "cannot be read"),
        (archive({"a.npy": npy("(" * 9000)}), "cannot be read"),
        (archive({"../../x.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': ()}", b"1234")}), "the cases"),
    ],
)
def test_a_hostile_reference_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        load_cases(content)
    assert str(caught.value).startswith(f"{REFERENCE}: ")


def test_a_size_that_is_a_lie_is_not_believed() -> None:
    """The archive says that its member unpacks to 100 bytes; it is 10 MB."""
    with pytest.raises(BundleError, match="cannot be read"):
        load_cases(with_size(archive({"a.npy": bytes(10_000_000)}), 100))


def test_arrays_come_back_as_numpy_wrote_them() -> None:
    out = io.BytesIO()
    a, b = np.arange(6.0, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))
    np.savez_compressed(out, **{"ragged/a": a, "long/b": b})  # type: ignore[arg-type]
    cases = load_cases(out.getvalue())
    np.testing.assert_array_equal(cases["ragged"]["a"], a)
    np.testing.assert_array_equal(cases["long"]["b"], b)


# --- the commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["verify", "BUNDLE"],
        ["score", "BUNDLE", "nothing.csv", "--out", "scores.parquet"],
        ["load", "nothing.csv", "--bundle", "BUNDLE", "--state", "state"],
        ["serve", "--bundle", "BUNDLE", "--state", "state", "--port", "0"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_refuses_in_one_line(
    folder: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    change_manifest(folder, lambda m: m.update({"evil\n\x1b[31m": 1}))
    assert main([str(folder) if word == "BUNDLE" else word for word in command]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {folder}: manifest: the key ")
    assert not (tmp_path / "state").exists()


def test_a_state_gives_its_name_to_its_output(cards: Bundle) -> None:
    """So that `check_manifest` has to look at both names."""
    assert {s.name + NEXT for s in cards.manifest.graph.states} == {
        t.name for t in cards.manifest.graph.state_outputs()
    }
