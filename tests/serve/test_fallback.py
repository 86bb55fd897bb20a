"""While the model cannot answer: what the owner chose, nothing changed by it, and everything as ever once it can again."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqfraud.errors import ConfigError, RequestError
from seqfraud.policy import Decision
from serve.fallback import FallbackSettings
from serve.log import Disk
from serve.replay import Client
from serve.service import MODEL, STORAGE, Service
from serve.settings import load_settings

START = 1_600_000_000_000
HOUR = 3_600_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}
LIMITS = FallbackSettings("limits", review_above=100.0, decline_above=1000.0)


def row(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def score(service: Service, **changes: Any) -> Any:
    return json.loads(service.score(json.dumps(row(**changes)).encode()))


def degraded(text: str) -> dict[str, Any]:
    return {"code": "degraded", "text": text, "contribution": None}


def batch(service: Service, rows: list[dict[str, Any]]) -> Any:
    return json.loads(service.score_batch(json.dumps(rows).encode()))["results"]


def refused(service: Service, **changes: Any) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        score(service, **changes)
    return caught.value.status, caught.value.code


# --- the settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "amount", "decision"),
    [
        (LIMITS, 100.0, "approve"),
        (LIMITS, 100.01, "review"),
        (LIMITS, 1000.0, "review"),
        (LIMITS, 1000.01, "decline"),
        (LIMITS, None, "review"),
        (LIMITS, float("nan"), "review"),
        (replace(LIMITS, without_amount="decline"), None, "decline"),
        (FallbackSettings("limits", decline_above=5.0), 5.01, "decline"),
        (FallbackSettings("limits", review_above=5.0), 1e9, "review"),
        (FallbackSettings("limits", without_amount="approve"), 1e9, "approve"),
        (FallbackSettings("limits"), 1.0, "review"),
    ],
)
def test_limits_decide(settings: FallbackSettings, amount: float | None, decision: Decision) -> None:
    assert settings.decide(amount)[0] == decision


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('mode = "limit"', "fallback.mode: 'limit' is not one of"),
        ('mode = "limits"\nreview_above = 10\ndecline_above = 5', "review_above: expected at most decline_above"),
        ("decline_above = 5", 'fallback: decline_above has no effect with mode "refuse"'),
        ('mode = "limits"\nreview_above = nan', "review_above: expected an amount"),
        ('mode = "limits"\nwithout_amount = "ask"', "fallback.without_amount: 'ask' is not one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(f"[fallback]\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")


def test_settings_are_read_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('[fallback]\nmode = "limits"\nreview_above = 100\ndecline_above = 1000.0\n')
    assert load_settings(file).fallback == LIMITS


def test_the_settings_on_the_page_are_settings(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "service.md").read_text()
    block = page[page.index("[fallback]") :]
    (tmp_path / "serve.toml").write_text(block[: block.index("```")])
    fallback = load_settings(tmp_path / "serve.toml").fallback
    assert fallback == FallbackSettings("limits", review_above=500.0, decline_above=5000.0, without_amount="review")


# --- faults ------------------------------------------------------------------------------------------------------


class Fault:
    """Something that can break in a service and be mended."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.broken = False
        self.disk = Disk(write=self._write)

    def _write(self, descriptor: int, data: bytes) -> int:
        if self.broken and self.kind == "disk":
            raise OSError(28, "no space left on device")
        return os.write(descriptor, data)

    def put_into(self, service: Service) -> None:
        step, run = service.engine.step, service.engine.step._run

        def broken_run(binding: Any) -> None:
            if self.broken and self.kind == "graph raises":
                raise RuntimeError("Non-zero status code returned while running GRU node\nand more")
            run(binding)
            if self.broken and self.kind in ("NaN", "infinity"):
                step.outputs["probability"][...] = {"NaN": np.nan, "infinity": np.inf}[self.kind]

        step._run = broken_run

    @property
    def code(self) -> str:
        return STORAGE if self.kind == "disk" else MODEL


FAULTS = ["graph raises", "NaN", "infinity", "disk"]


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> Fault:
    return Fault(request.param)


@pytest.fixture
def open_service(cards: Any, tmp_path: Path, fault: Fault) -> Iterator[Callable[[FallbackSettings], Service]]:
    opened: list[Service] = []

    def make(settings: FallbackSettings) -> Service:
        service = Service(cards, tmp_path / "state", clock=lambda: 1000, disk=fault.disk, fallback=settings)
        fault.put_into(service)
        opened.append(service)
        return service

    yield make
    fault.broken = False
    for service in opened:
        service.close()


def fill(service: Service) -> None:
    for i in range(5):
        score(service, id=f"before {i}", time=START - (5 - i) * HOUR, amount=10.0 * i)
    service.add_labels(b'[{"transaction_id": "before 1", "is_fraud": true, "known_at": 1599999990000}]')


def test_by_default_it_is_a_503_and_nothing_changes(
    open_service: Callable[[FallbackSettings], Service], fault: Fault, memory_of: Any
) -> None:
    service = open_service(FallbackSettings())
    fill(service)
    before = memory_of(service)
    fault.broken = True
    for changes in ({}, {"user": "new", "merchant": "new"}, {"time": START - 10 * HOUR, "id": "late"}):
        assert refused(service, **changes) == (503, fault.code)
    results = batch(service, [row(), row(id="before 0", time=START - 5 * HOUR, amount=0.0), {"id": "x"}])
    assert [r.get("error", {}).get("code") for r in results] == [fault.code, None, "invalid_field"]
    assert results[1]["duplicate"] is True
    assert service.degraded_answers == {MODEL: 0, STORAGE: 0}
    assert memory_of(service) == before
    fault.broken = False
    assert score(service)["duplicate"] is False


def test_with_limits_it_is_an_answer_that_says_so_and_nothing_changes(
    open_service: Callable[[FallbackSettings], Service], fault: Fault, memory_of: Any, cards: Any
) -> None:
    service = open_service(LIMITS)
    fill(service)
    before = memory_of(service)
    fault.broken = True
    assert score(service, amount=20.0) == {
        "transaction_id": "t1",
        "fraud_probability": None,
        "is_fraud": False,
        "decision": "approve",
        "reasons": [degraded(f"{fault.code}: the amount is within the limits")],
        "model": cards.id,
        "history": 5,
        "late": False,
        "duplicate": False,
        "degraded": True,
    }
    declined = score(service, id="t2", user="new", merchant="new", amount=5000.0)
    assert (declined["decision"], declined["is_fraud"], declined["history"]) == ("decline", True, 0)
    assert declined["reasons"] == [degraded(f"{fault.code}: the amount is above 1000")]
    late = score(service, id="t3", time=START - 10 * HOUR, amount=500.0)
    assert (late["decision"], late["late"], late["degraded"]) == ("review", True, True)
    assert service.degraded_answers == {MODEL: 0, STORAGE: 0} | {fault.code: 3}
    assert memory_of(service) == before


def test_a_batch_degrades_by_item(open_service: Callable[[FallbackSettings], Service], fault: Fault) -> None:
    """What was scored before is a duplicate with its first answer; what is wrong stays wrong."""
    service = open_service(LIMITS)
    first = score(service)
    fault.broken = True
    known, new, wrong, conflict = batch(
        service, [row(), row(id="t2", amount=101.0), row(id="t3", amount="x"), row(amount=21.0)]
    )
    assert known == {**first, "duplicate": True}
    assert (new["degraded"], new["decision"]) == (True, "review")
    assert wrong["error"]["code"] == "invalid_field"
    assert conflict["error"]["code"] == "conflict"
    assert service.degraded_answers[fault.code] == 1


def test_afterwards_all_is_as_if_the_degraded_had_never_come(
    open_service: Callable[[FallbackSettings], Service], fault: Fault, memory_of: Any, cards: Any, tmp_path: Path
) -> None:
    """The same ids are scored as new, by the very bits of a service that never failed, and after a restart too."""
    later = [
        row(),
        row(id="t2", user="new", merchant="new"),
        row(id="t3", time=START - 4 * HOUR),
        row(id="t4", time=START),
    ]
    with Service(cards, tmp_path / "undisturbed", clock=lambda: 1000) as undisturbed:
        fill(undisturbed)
        expected = [score(undisturbed, **changes) for changes in later]
        memory = memory_of(undisturbed)
    service = open_service(LIMITS)
    fill(service)
    fault.broken = True
    assert all(score(service, **changes)["degraded"] for changes in later)
    with pytest.raises(RequestError) as caught:
        service.transaction("t1")
    assert caught.value.status == 404, "a degraded answer is not stored"
    fault.broken = False
    got = [score(service, **changes) for changes in later]
    assert got == expected
    assert all("degraded" not in answer for answer in got)
    assert memory_of(service) == memory
    service.abandon()
    again = open_service(LIMITS)
    assert memory_of(again) == memory
    assert [score(again, **changes) for changes in later] == [{**a, "duplicate": True} for a in expected]


def test_a_late_event_whose_rebuilding_fails_is_not_stored(cards: Any, tmp_path: Path, memory_of: Any) -> None:
    """The later states were once rebuilt after the record was stored: memory stayed behind the journal for ever."""
    with Service(cards, tmp_path, clock=lambda: 1000, fallback=LIMITS) as service:
        fill(service)
        before, run = memory_of(service), service.engine.sequence.states_after
        calls: list[int] = []

        def fails_at_last(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == failing:
                raise RuntimeError("out of memory")
            return run(*args)

        service.engine.sequence.states_after = fails_at_last  # type: ignore[method-assign]
        for failing in (1, 2):
            calls.clear()
            assert score(service, id="late", time=START - 4 * HOUR + 1)["degraded"] is True
            assert len(calls) == failing
            assert memory_of(service) == before
        service.engine.sequence.states_after = run  # type: ignore[method-assign]
        assert score(service, id="late", time=START - 4 * HOUR + 1)["late"] is True


def test_ready_under_each_mode(open_service: Callable[[FallbackSettings], Service], fault: Fault) -> None:
    """Refusing, the service asks to be left alone until its graph answers again, which it finds out by itself."""
    service = open_service(FallbackSettings())
    assert (service.ready(), service.degraded()) == (True, False)
    fault.broken = True
    refused(service)
    model = fault.kind != "disk"  # a disk that was full is tried again with every request
    assert (service.ready(), service.degraded()) == (not model, model)
    fault.broken = False
    assert (service.ready(), service.degraded()) == (True, False)


def test_with_limits_it_is_ready_and_says_that_it_is_degraded(
    open_service: Callable[[FallbackSettings], Service], fault: Fault
) -> None:
    service = open_service(LIMITS)
    fault.broken = True
    score(service)
    assert (service.ready(), service.degraded()) == (True, fault.kind != "disk")
    fault.broken = False
    assert (service.ready(), service.degraded()) == (True, False)
    assert "degraded" not in score(service)


def test_an_outage_is_one_line_in_the_log(
    open_service: Callable[[FallbackSettings], Service], fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    service = open_service(LIMITS)
    fault.broken = True
    for i in range(5):
        score(service, id=f"t{i}")
    fault.broken = False
    for i in range(5):
        score(service, id=f"t{i}")
    said = [r for r in caplog.records if r.name == "serve.service" and r.levelname != "INFO"]
    lines = [(r.levelname, r.getMessage().partition(":")[0]) for r in said]
    assert lines == [("ERROR", fault.code), ("WARNING", fault.code)]


def test_without_an_amount_there_is_one_decision(plain: Any, tmp_path: Path) -> None:
    """PLAIN names no amount for money, though it has a number of that name."""
    settings = replace(LIMITS, without_amount="decline")
    with Service(plain, tmp_path, fallback=settings) as service:
        service.engine.step._run = lambda binding: 1 / 0
        answer = json.loads(service.score(b'{"user": "ann", "time": 1600000000, "amount": 1, "kind": "food"}'))
        assert (answer["decision"], answer["reasons"]) == (
            "decline",
            [degraded("model_unavailable: there is no amount")],
        )


def test_a_missing_amount_is_no_small_amount(rich: Any, tmp_path: Path) -> None:
    """Scoring counts it as 0; a limit must not."""
    with Service(rich, tmp_path, fallback=LIMITS) as service:
        service.engine.step._run = lambda binding: 1 / 0
        sent = {
            "id": 1,
            "user": "a",
            "time": "2020-09-13T12:00:00Z",
            "amount": 5,
            "lat": 1,
            "long": 2,
            "ip": "10.0.0.1",
        }
        answer = json.loads(service.score(json.dumps(sent).encode()))
        assert (answer["decision"], answer["degraded"]) == ("review", True)


@pytest.mark.parametrize("settings", [FallbackSettings(), LIMITS])
def test_a_promise_that_cannot_be_kept_is_not_given(cards: Any, tmp_path: Path, settings: FallbackSettings) -> None:
    """The disk fails at the sync: what was scored may be stored or not, so that answer must not leave."""

    def sync(descriptor: int) -> None:
        if broken:
            raise OSError(5, "input/output error")

    broken = False
    with Service(cards, tmp_path, promise="disk", disk=Disk(sync=sync), fallback=settings) as service:
        score(service, id="before")
        broken = True
        if settings is LIMITS:
            answer = score(service)
            assert (answer["degraded"], answer["fraud_probability"]) == (True, None)
            results = batch(service, [row(id="before"), row(id="t2")])  # which of them are on disk, nobody knows
            assert [r["degraded"] for r in results] == [True, True]
            assert service.degraded_answers == {MODEL: 0, STORAGE: 3}
        else:
            assert refused(service) == (503, "storage_unavailable")
        assert (service.ready(), service.degraded()) == (settings is LIMITS, True)


# --- real processes ----------------------------------------------------------------------------------------------

SERVE = textwrap.dedent(
    """
    '''`seqfraud serve` whose graph fails while the file `broken` is there. Arguments: bundle, state, mode, broken.'''
    import sys
    from pathlib import Path
    from seqfraud.bundle import open_bundle
    from serve.fallback import FallbackSettings
    from serve.server import ServerSettings, serve_forever
    from serve.service import Service

    bundle, state, mode, broken = sys.argv[1:]

    def make():
        limits = {"review_above": 100.0} if mode == "limits" else {}
        service = Service(open_bundle(Path(bundle)), Path(state), fallback=FallbackSettings(mode, **limits))
        run = service.engine.step._run

        def fails(binding):
            if Path(broken).exists():
                raise RuntimeError("broken")
            run(binding)

        service.engine.step._run = fails
        return service

    sys.exit(serve_forever(make, ServerSettings(port=0)))
    """
)
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def running(*command: str | Path) -> Iterator[Client]:
    """A server process; ended the hard way."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        line = process.stdout.readline() if ready else "nothing within a minute"
        found = re.fullmatch(r"seqfraud serving on (\S+)\n", line)
        assert found, line
        yield Client(found[1])
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


@pytest.mark.parametrize("mode", ["refuse", "limits"])
def test_a_server_whose_graph_fails_and_is_mended(cards: Any, tmp_path: Path, mode: str) -> None:
    (tmp_path / "fails.py").write_text(SERVE)
    broken = tmp_path / "broken"
    with running(tmp_path / "fails.py", cards.path, tmp_path / "state", mode, broken) as client:
        assert client.call("POST", "/v1/score", row(id="before"))[0] == 200
        broken.touch()
        status, answer = client.call("POST", "/v1/score", row(amount=500.0))
        ready = client.call("GET", "/readyz")
        if mode == "limits":
            assert (status, answer["decision"], answer["degraded"]) == (200, "review", True)
            assert ready == (200, {"status": "degraded"})
        else:
            assert (status, answer["error"]["code"]) == (503, "model_unavailable")
            assert ready[0] == 503
        assert client.call("GET", "/healthz")[0] == 200
        assert client.call("GET", "/v1/transactions/t1")[0] == 404
        broken.unlink()
        assert client.call("GET", "/readyz") == (200, {"status": "ready"})
        status, answer = client.call("POST", "/v1/score", row(amount=500.0))
        assert (status, answer["duplicate"], answer["history"], "degraded" in answer) == (200, False, 1, False)


@pytest.mark.parametrize("mode", ["refuse", "limits"])
def test_a_server_whose_state_folder_is_removed(cards: Any, tmp_path: Path, mode: str) -> None:
    """An open file can be written after its folder is gone, so the service would go on and lose everything at its end."""
    state, settings = tmp_path / "state", tmp_path / "serve.toml"
    settings.write_text('[fallback]\nmode = "limits"\nreview_above = 100\n' if mode == "limits" else "")
    command = ["-m", "serve", "--bundle", cards.path, "--state", state, "--port", "0", "--settings", settings]
    with running(*command) as client:
        assert client.call("POST", "/v1/score", row())[0] == 200
        shutil.rmtree(state)
        deadline = time.monotonic() + 30
        for i in range(10**6):  # the first ones may still be answered: until the next sync
            status, answer = client.call("POST", "/v1/score", row(id=f"after {i}", amount=500.0))
            if status != 200 or "degraded" in answer:
                break
            assert time.monotonic() < deadline
        ready = client.call("GET", "/readyz")
        if mode == "limits":
            assert answer["reasons"] == [degraded("storage_unavailable: the amount is above 100")]
            assert ready == (200, {"status": "degraded"})
        else:
            assert (status, answer["error"]["code"], ready[0]) == (503, "storage_unavailable", 503)
        assert client.call("GET", "/healthz")[0] == 200


def test_a_server_goes_on_when_its_bundle_is_damaged_on_disk(cards: Any, tmp_path: Path) -> None:
    """The model that runs is in memory, and whoever opens the damaged one gets a refusal and disturbs nobody."""
    bundle, state = Path(shutil.copytree(cards.path, tmp_path / "bundle")), tmp_path / "state"
    with running("-m", "serve", "--bundle", bundle, "--state", state, "--port", "0") as client:
        with Service(cards, tmp_path / "other", clock=lambda: 1000) as other:
            expected = [score(other, id=f"t{i}", time=START + i * HOUR) for i in range(8)]
        got = [client.call("POST", "/v1/score", row(id=f"t{i}", time=START + i * HOUR))[1] for i in range(4)]
        (bundle / "step.onnx").write_bytes(b"evil")
        (bundle / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes()[:-100])
        for command in (["verify", bundle], ["serve", "--bundle", bundle, "--state", tmp_path / "third"]):
            done = subprocess.run(
                [sys.executable, "-m", "seqfraud.cli", *map(str, command)],
                capture_output=True,
                text=True,
                check=False,
                cwd=ROOT,
                timeout=60,
            )
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        shutil.rmtree(bundle)
        got += [client.call("POST", "/v1/score", row(id=f"t{i}", time=START + i * HOUR))[1] for i in range(4, 8)]
        assert client.call("GET", "/readyz") == (200, {"status": "ready"})
        assert got == expected
        assert client.call("GET", "/v1/model")[1]["model"] == cards.id
