"""`seqfraud models`: what it prints, what it changes, what it refuses, and what it asks of a running service."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from seqfraud.bundle import Bundle, open_bundle
from seqfraud.cli import main
from seqfraud.registry import Registry


@pytest.fixture(scope="module")
def two(make_bundle: Callable[..., Bundle], plain_toml: str) -> tuple[Bundle, Bundle]:
    return make_bundle(plain_toml, seed=0), make_bundle(plain_toml, seed=1)


@pytest.fixture(scope="module")
def made(two: tuple[Bundle, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry in which the first was replaced by the second."""
    folder = tmp_path_factory.mktemp("registry") / "models"
    registry = Registry(folder, clock=lambda: 1_700_000_000.0)
    for bundle in two:
        registry.add(bundle.path, "ann", "nightly")
        registry.promote(bundle.id, "ann", "it is\nbetter")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "models"))


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run(*args)`: exit code, stdout and stderr of `seqfraud models` on the registry."""

    def call(*args: object, on: tuple[object, ...] = ("--registry", folder)) -> tuple[int, str, str]:
        code = main(["models", *map(str, (*args, *on))])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_add_promote_and_roll_back(run: Any, folder: Path, two: tuple[Bundle, Bundle], cards: Bundle) -> None:
    a, b = (bundle.id for bundle in two)
    assert run("add", cards.path, "--author", "bob", "--reason", "another kind") == (
        0, f"{cards.id} is in {folder}\n", "",
    )  # fmt: skip
    assert run("challenge", cards.id[:8], "--author", "bob", "--reason", "let us see")[0] == 0
    code, out, _ = run("promote", "challenger", "--author", "bob", "--reason", "passed", "--json")
    assert (code, json.loads(out)) == (0, {"model": cards.id, "champion": cards.id, "challengers": []})
    assert run("rollback", "--author", "bob", "--reason", "no")[1] == f"{b} is the champion again\n"
    assert run("rollback", "--author", "bob", "--reason", "no")[1] == f"{a} is the champion again\n"
    assert run("challenge", b, "--author", "bob", "--reason", "again")[1] == f"{b} is a challenger\n"
    assert run("withdraw", "challenger", "--author", "bob", "--reason", "no")[1] == f"{b} is no challenger any more\n"
    assert [(e.author, e.action, e.reason) for e in Registry(folder).events()[4:]] == [
        ("bob", "add", "another kind"),
        ("bob", "challenge", "let us see"),
        ("bob", "promote", "passed"),
        ("bob", "rollback", "no"),
        ("bob", "rollback", "no"),
        ("bob", "challenge", "again"),
        ("bob", "withdraw", "no"),
    ]


def test_list(run: Any, two: tuple[Bundle, Bundle]) -> None:
    a, b = (bundle.id for bundle in two)
    assert run("list")[1].splitlines() == [
        f"{a}  champion before  2023-11-14T22:13:20Z      promote by ann: it is better",
        f"{b}  champion         2023-11-14T22:13:20Z      promote by ann: it is better",
    ]
    said = json.loads(run("list", "--json")[1])
    assert (said["champion"], said["previous"], said["challengers"]) == (b, a, [])
    assert [row["role"] for row in said["models"]] == ["champion before", "champion"]


def test_show_and_card(run: Any, two: tuple[Bundle, Bundle], folder: Path) -> None:
    a, b = (bundle.id for bundle in two)
    said = json.loads(run("show", "previous", "--json")[1])
    assert (said["model"], said["role"]) == (a, "champion before")
    assert [event["action"] for event in said["events"]] == ["add", "promote", "promote"]
    lines = run("show", "champion")[1].splitlines()
    assert lines[0] == f"model        {b}"
    assert lines[-1] == f"2023-11-14T22:13:20Z      promote {b} by ann: it is better"
    assert run("card", "champion")[1] == Registry(folder).card(b) + "\n"


def test_diff_takes_names_and_bundle_folders(run: Any, two: tuple[Bundle, Bundle], cards: Bundle) -> None:
    code, out, _ = run("diff", "previous", "champion")
    assert code == 0
    assert out.splitlines()[0].split() == [bundle.id for bundle in two]
    assert "graphs: step.onnx" in out
    assert "weights or structure differ" in out
    assert run("diff", "champion", two[1].path)[1].splitlines()[1:] == ["nothing differs"]
    said = json.loads(run("diff", "champion", cards.path, "--json")[1])
    assert said["b"] == cards.id
    assert {"section": "states", "name": "h", "a": "float32 [2, 'B', 6] by user", "b": "float32 [1, 'B', 8] by user",
            "words": ""} in said["differences"]  # fmt: skip


def test_attach_and_export(run: Any, folder: Path, two: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    (tmp_path / "gate.json").write_text('{"passed": true}')
    assert run("attach", "champion", tmp_path / "gate.json")[1] == f"gate.json is kept by {two[1].id}\n"
    assert "It passed." in (folder / "cards" / f"{two[1].id}.md").read_text()
    assert run("export", "champion", "--mlflow", tmp_path / "mlflow")[0] == 0
    assert open_bundle(tmp_path / "mlflow").id == two[1].id
    assert (tmp_path / "mlflow" / "MLmodel").is_file()
    assert "It passed." in (tmp_path / "mlflow" / "card.md").read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("promote",), "models promote: expected NAME after it, seen 0 words"),
        (("diff", "champion"), "models diff: expected A and B after it, seen 1 words"),
        (("list", "champion"), "models list: expected nothing after it"),
        (("promote", "champion", "--reason", "x"), "is the champion already"),
        (("promote", "previous"), "reason: seen ''; expected why"),
        (("promote", "nobody", "--reason", "x"), "there is no model 'nobody'"),
        (("export", "champion"), "expected --mlflow with export, and only there"),
        (("list", "--mlflow", "x"), "expected --mlflow with export, and only there"),
        (("list", "--url", "http://localhost:1"), "--url is for promote, rollback, challenge, withdraw"),
        (("rollback", "--url", "http://localhost:1", "--author", "ann"), "the author is the API key's id"),
        (("attach", "champion", "/nowhere/gate.json"), "/nowhere/gate.json: cannot be read"),
        (("add", "/nowhere"), "no such bundle"),
        (("show", "champion", "--trusted-keys", "/nowhere"), "/nowhere: cannot be read"),
    ],
)
def test_what_is_refused_in_one_line(run: Any, folder: Path, args: tuple[str, ...], words: str) -> None:
    before = (folder / "events.jsonl").read_bytes()
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert (folder / "events.jsonl").read_bytes() == before


def test_a_registry_has_to_be_named(run: Any, tmp_path: Path) -> None:
    assert "expected --registry" in run("list", on=())[2]
    assert "no such registry" in run("list", on=("--registry", tmp_path / "none"))[2]


class StandIn:
    """A service that keeps what it was asked, and answers what it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, Any]] = []
        self.answer: tuple[int, Any] = (200, {})
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                stand_in.asked.append((self.path, self.headers["authorization"], body))
                status, answer = stand_in.answer
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    one = StandIn()
    yield one
    one.server.shutdown()
    one.server.server_close()


def test_a_running_service_is_asked_and_the_registry_left_to_it(
    run: Any, folder: Path, stand_in: StandIn, tmp_path: Path
) -> None:
    before = (folder / "events.jsonl").read_bytes()
    stand_in.answer = (200, {"model": "0123456789abcdef"})
    for action in ("promote", "challenge", "withdraw"):
        code, out, _ = run(action, "12345678", "--reason", "better", "--url", stand_in.url)
        assert (code, out) == (0, f"{stand_in.url}: the champion is 0123456789abcdef\n")
    assert run("rollback", "--reason", "worse", "--url", stand_in.url, "--json", on=())[0] == 0
    assert stand_in.asked == [
        ("/v1/model", None, {"action": "promote", "reason": "better", "model": "12345678"}),
        ("/v1/model", None, {"action": "shadow", "reason": "better", "model": "12345678"}),
        ("/v1/model", None, {"action": "withdraw", "reason": "better", "model": "12345678"}),
        ("/v1/model", None, {"action": "rollback", "reason": "worse"}),
    ]
    assert (folder / "events.jsonl").read_bytes() == before


def test_what_a_service_refuses_is_said_in_its_words(run: Any, stand_in: StandIn) -> None:
    stand_in.answer = (409, {"error": {"message": "this service has no registry"}})
    code, _, err = run("promote", "12345678", "--reason", "better", "--url", stand_in.url, on=())
    assert (code, err) == (
        2,
        f"error: {stand_in.url}/v1/model: the service answered 409: this service has no registry\n",
    )


def test_the_key_goes_along(run: Any, stand_in: StandIn, tmp_path: Path) -> None:
    from serve.keys import add_key

    _, text = add_key(tmp_path / "keys.json", ["admin"], 0.0)
    (tmp_path / "admin.key").write_text(text)
    run("rollback", "--reason", "worse", "--url", stand_in.url, "--key-file", tmp_path / "admin.key", on=())
    assert stand_in.asked[0][1] == f"Bearer {text}"
