"""The command: help with an example everywhere, one line and exit code 2 for what a user can mend, JSON for programs."""

import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from seqfraud import __version__
from seqfraud.cli import COMMANDS, main


class Ran:
    """What a command printed and ended with."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *args: str | Path) -> None:
        capsys.readouterr()
        self.code = main([str(arg) for arg in args])
        self.out, self.err = capsys.readouterr()

    def refused(self) -> str:
        """The one line."""
        assert self.code == 2
        assert self.out == ""
        assert re.fullmatch(r"error: [^\n]+\n", self.err), self.err
        return self.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *args: Ran(capsys, *args)


# ---- help


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_every_command_has_an_example_of_it(run, name, flag):
    ran = run(name, flag)
    assert ran.code == 0
    assert ran.err == ""
    assert f"Usage: seqfraud {name}" in ran.out
    example = re.search(rf"Example: seqfraud {name} \S+", " ".join(ran.out.split()))
    assert example, ran.out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_is_a_call_that_parses(name, monkeypatch, capsys):
    """The options and arguments that an example uses exist, and nothing required is left out."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    function = getattr(module, command.function)
    text = " ".join((inspect.getdoc(function) or "").partition("Example: ")[2].split())
    called: list[dict[str, Any]] = []

    def instead(**values: Any) -> None:
        called.append(values)

    instead.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    instead.__annotations__ = function.__annotations__
    monkeypatch.setattr(module, command.function, instead)
    program, subcommand, *args = shlex.split(text)
    assert (program, subcommand) == ("seqfraud", name)
    assert main([name, *args]) == 0, capsys.readouterr().err
    assert len(called) == 1


def test_the_list_names_every_command_with_what_it_does(run):
    for args in ([], ["--help"], ["-h"]):
        ran = run(*args)
        assert ran.code == (0 if args else 2), "no command is not a success for a script"
        for name, command in COMMANDS.items():
            assert re.search(rf"^  {name} +{re.escape(command.summary)}$", ran.out, re.MULTILINE)


def test_the_version_is_said(run):
    ran = run("--version")
    assert (ran.code, ran.out) == (0, f"seqfraud {__version__}\n")


# ---- errors


@pytest.mark.parametrize(("typed", "nearest"), [("trian", "train"), ("scor", "score"), ("Serve", "serve"), ("x", None)])
def test_an_unknown_command_names_the_nearest(run, typed, nearest):
    words = run(typed).refused()
    assert repr(typed) in words
    assert any(f"the nearest is {name!r}" in words for name in ([nearest] if nearest else COMMANDS))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["score"], r"Missing argument .*; see seqfraud score --help"),
        (["score", "b", "d"], r"Missing option '--out'"),
        (["score", "b", "d", "--out"], r"--out"),
        (["score", "b", "d", "--out", "o", "--nope"], r"No such option: --nope"),
        (["verify", "a", "b"], r"unexpected extra argument"),
        (["serve", "--bundle", "b", "--state", "s", "--port", "http"], r"'--port'"),
        (["serve", "--bundle", "b", "--state", "s", "--port", "65536"], r"'--port'"),
        (["replay", "d", "--url", "http://x", "--rate", "0"], r"'--rate'"),
        (["verify", "{no}"], r"no such bundle"),
        (["score", "{no}", "d", "--out", "o"], r"no such bundle"),
        (["load", "d", "--bundle", "{no}", "--state", "{no}"], r"no such bundle"),
        (["serve", "--bundle", "{no}", "--state", "{no}"], r"no such bundle"),
        (["train", "{no}.toml"], r"\.toml: cannot be read"),
        (["evaluate", "{no}"], r"config\.toml is missing"),
        (["export", "{no}", "--out", "{no}"], r"config\.toml is missing"),
        (["simulate", "--out", "{no}.parquet", "--users", "0"], r"users: expected a whole number from 1"),
        (
            ["simulate", "--out", "{no}/x.parquet", "--drift", "inflation"],
            r"drift: expected KIND@DATE.*got 'inflation'",
        ),
        (
            ["simulate", "--out", "{no}/x.parquet", "--days", "9", "--drift", "inflation@2025-01-10"],
            r"drift\.at: expected a date from 2025-01-01 to before 2025-01-10, got '2025-01-10'",
        ),
        (["replay", "{no}.parquet", "--url", "ftp://x"], r"--url: 'ftp://x' is not an address such as"),
        (["replay", "{no}.parquet", "--url", "http://127.0.0.1:9"], r"http://127\.0\.0\.1:9/v1/model: no answer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, args, words):
    ran = run(*(arg.replace("{no}", str(tmp_path / "no")) for arg in args))
    assert re.search(words, ran.refused())
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_data_that_cannot_be_read_is_one_line(run, cards, tmp_path):
    out = tmp_path / "scores.parquet"
    for name, content, words in (
        ("absent.parquet", None, "no such file or folder"),
        ("empty.csv", b"", "empty"),
        ("text.parquet", b"no parquet", "cannot be read as Parquet"),
        ("notes.txt", b"x", "expected a .csv, .csv.gz or .parquet file"),
        ("columns.csv", b"a,b\n1,2\n", "there is no column"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for command in (
            ("score", cards.path, tmp_path / name, "--out", out),
            ("load", tmp_path / name, "--bundle", cards.path, "--state", tmp_path / "state"),
        ):
            line = run(*command).refused()
            assert words in line
            assert name in line
    assert not out.exists()


def test_a_wrong_time_names_the_option(run, cards, tmp_path):
    file = rows(tmp_path)
    words = run("load", file, "--bundle", cards.path, "--state", tmp_path / "s", "--until", "tomorrow").refused()
    assert "--until: 'tomorrow' is not an ISO 8601 date or time" in words


def test_a_bug_keeps_its_traceback(monkeypatch):
    """Only what a user can mend becomes one line."""
    import seqfraud.verification

    def crash(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(seqfraud.verification, "verify_bundle", crash)
    with pytest.raises(ZeroDivisionError):
        main(["verify", "anything"])


# ---- results


def rows(folder: Path) -> Path:
    file = folder / "rows.parquet"
    ids = [*range(11), 2]
    columns = {
        "id": ids,
        "user": [f"u{n % 3}" for n in ids],
        "time": [1_600_000_000_000 + n for n in ids],
        "amount": [5.0 * n for n in ids],
        "kind": ["food"] * 12,
        "merchant": [f"m{n % 2}" for n in ids],
        "device": [None] * 12,
        "fraud": [int(n == 2) for n in ids],
        "known_at": [1_600_000_000_000 + 5] * 12,
    }
    parquet.write_table(pa.table(columns), file)
    return file


def test_json_is_json_and_says_the_same_as_words(run, cards, tmp_path):
    file, out = rows(tmp_path), tmp_path / "folder" / "scores.parquet"
    words = run("score", cards.path, file, "--out", out)
    assert words.code == 0
    assert f"11 transactions scored with {cards.id}" in words.out
    done = json.loads(run("score", cards.path, file, "--out", out, "--json").out)
    assert (done["model"], done["rows"], done["out"]) == (cards.id, 11, str(out))
    table = parquet.read_table(out)
    assert table.column_names == ["transaction_id", "fraud_probability", "is_fraud", "decision"]
    assert table["transaction_id"].to_pylist() == [str(n) for n in range(11)], "a repeated id counts once"
    assert done["is_fraud"] == sum(table["is_fraud"].to_pylist())
    loaded = json.loads(run("load", file, "--bundle", cards.path, "--state", tmp_path / "state", "--json").out)
    assert loaded == {**loaded, "transactions": 11, "duplicates": 0, "labels": 11, "model": cards.id}
    again = run("load", file, "--bundle", cards.path, "--state", tmp_path / "state")
    assert re.search(r"11 transactions \(11 known before\), 0 labels", again.out)
    made = json.loads(run("simulate", "--out", tmp_path / "s.parquet", "--users", 3, "--days", 9, "--json").out)
    assert made["rows"] == parquet.read_metadata(tmp_path / "s.parquet").num_rows


def test_simulated_drifts_begin_on_their_dates(run, tmp_path):
    """Two drifts at once: amounts double from the fifth day, a new kind of fraud from the seventh."""
    size = ("--users", 200, "--days", 9, "--json")
    run("simulate", "--out", tmp_path / "plain.parquet", *size)
    drifts = ("--drift", "inflation@2025-01-05:2", "--drift", "new_pattern@2025-01-07:20")
    assert run("simulate", "--out", tmp_path / "drift.parquet", *size, *drifts).code == 0
    plain, drift = (parquet.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("plain", "drift"))
    assert min(row["time"].day for row in drift if row["fraud_kind"] == "trickle") == 7
    amount = {(row["user_id"], row["time"], row["merchant_id"]): row["amount"] for row in plain}
    factors: dict[bool, set[float]] = {False: set(), True: set()}
    for row in drift:
        before = amount.get((row["user_id"], row["time"], row["merchant_id"]))
        if before is not None and before > 10:
            factors[row["time"].day >= 5].add(round(row["amount"] / before, 2))
    assert factors == {False: {1.0}, True: {2.0}}


def test_a_terminal_is_wanted_for_progress(run, cards, tmp_path):
    """Output that goes to a file has no bar in it."""
    ran = run("score", cards.path, rows(tmp_path), "--out", tmp_path / "o.parquet", "--json")
    assert "\x1b" not in ran.out + ran.err
    assert "scoring" not in ran.err


def test_the_module_and_the_part_of_serve_and_export_are_commands_too(tmp_path):
    for module, args in (("seqfraud.cli", ["verify"]), ("serve", ["--bundle"]), ("export", ["run"])):
        done = subprocess.run(
            [sys.executable, "-m", module, *args], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 2
        assert re.fullmatch(r"error: [^\n]+; see seqfraud (verify|serve|export) --help\n", done.stderr)


def test_replay_wants_a_seqfraud_service_at_the_other_end(run, tmp_path):
    """Something else that answers JSON is one line, not a KeyError."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"hello": "world"}')

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    words = run("replay", tmp_path / "rows.parquet", "--url", url).refused()
    thread.join()
    server.server_close()
    assert "is this a seqfraud service?" in words
