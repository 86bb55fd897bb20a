"""Models that change places in a real server: under load, and when it is killed on the way."""

import contextlib
import http.client
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqfraud.bundle import Bundle
from seqfraud.registry import Registry
from serve.log import read_frames
from serve.offline import score_journal
from serve.records import TransactionRecord, decode_records
from serve.shadow import read_shadow

START = 1_600_000_000_000
MINUTE = 60_000
CLIENTS = 3
PAUSE_S = 0.005


@pytest.fixture(scope="session")
def pair(make_bundle: Callable[..., Bundle], cards_toml: str) -> tuple[Bundle, Bundle]:
    """Two models over the fields of CARDS; the second reads other half-lives."""
    return make_bundle(cards_toml), make_bundle(cards_toml.replace('["1h", "12h"]', '["2h", "12h"]'), seed=1)


@pytest.fixture
def models(pair: tuple[Bundle, Bundle], tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "models")
    for bundle in pair:
        registry.add(bundle.path, "ann")
    registry.promote(pair[0].id, "ann", "the first")
    return registry


@pytest.fixture
def begin(run_service, models: Registry, tmp_path: Path) -> Callable[..., Any]:
    """`begin(*flags)`: a server on the registry and one state folder."""

    def start(*flags: str) -> Any:
        words = ["--registry", models.folder, "--state", tmp_path / "state", "--port", "0", *flags]
        return run_service([sys.executable, "-m", "serve", *map(str, words)]).started()

    return start


class Client:
    """A connection that is kept; what it sent and what came back."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self.answers: dict[str, dict[str, Any]] = {}
        self.others: list[tuple[int, bytes]] = []

    def call(self, method: str, path: str, content: Any = None) -> tuple[int, Any]:
        body = None if content is None else json.dumps(content)
        self._connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read())

    def score(self, row: dict[str, Any]) -> None:
        status, answer = self.call("POST", "/v1/score", row)
        if status == 200:
            self.answers[answer["transaction_id"]] = answer
        else:
            self.others.append((status, answer))


class Load:
    """Clients that post random traffic of common users and merchants, late events and labels among it, until stopped."""

    def __init__(self, port: int, seed: int) -> None:
        self.clients = [Client(port) for _ in range(CLIENTS)]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(client, seed * 100 + i)) for i, client in enumerate(self.clients)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, client: Client, seed: int) -> None:
        rng, clock, number = random.Random(seed), START + seed * 10_000 * MINUTE, 0
        try:
            while not self._stop.is_set():
                clock += rng.choice([0, 1, 5, 40]) * MINUTE
                back = rng.choice([1, 30, 200, 9000]) * MINUTE if rng.random() < 0.1 else 0
                row = {"id": f"{seed}-{number}", "user": f"u{rng.randrange(40)}", "time": clock - back,
                       "amount": rng.choice([1.0, 20.0, 300.0]), "kind": rng.choice(["food", "fuel", None]),
                       "merchant": f"m{rng.randrange(5)}", "device": f"d{rng.randrange(9)}"}  # fmt: skip
                client.score(row)
                if rng.random() < 0.2:
                    label = {"transaction_id": f"{seed}-{max(0, number - rng.randrange(30))}",
                             "is_fraud": rng.random() < 0.5, "known_at": clock + 30 * MINUTE}  # fmt: skip
                    status, _ = client.call("POST", "/v1/labels", [label])
                    assert status == 200
                number += 1
                time.sleep(PAUSE_S)
        except (OSError, http.client.HTTPException):
            assert self._stop.is_set() or self.killed

    killed = False

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    @property
    def answers(self) -> dict[str, dict[str, Any]]:
        return {name: answer for client in self.clients for name, answer in client.answers.copy().items()}

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.answers) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def changed(port: int, action: str, model: str = "") -> Any:
    body = {"action": action, "reason": "a test"} | ({"model": model} if model else {})
    status, answer = Client(port).call("POST", "/v1/model", body)
    assert status == 200, answer
    return answer


def require_as_offline(answers: dict[str, dict[str, Any]], pair: tuple[Bundle, ...], state: Path) -> None:
    """Every answer is what the model that it names gives offline, in the journal's order; none is mixed of two."""
    journalled = {
        record.id: record
        for frame in read_frames(state / "journal")
        for record in decode_records(frame.seq, frame.payload)
        if isinstance(record, TransactionRecord)
    }
    for bundle in pair:
        offline = score_journal(bundle, state, threads=1)
        wanted = dict(zip(offline.ids, offline.probability.tolist(), strict=True))
        mine = {name: answer for name, answer in answers.items() if answer["model"] == bundle.id}
        got = [answer["fraud_probability"] for answer in mine.values()]
        np.testing.assert_allclose(got, [wanted[name] for name in mine], atol=1e-5)
        for name, answer in mine.items():
            assert journalled[name].bundle == bundle.id
            stored = json.loads(journalled[name].answer)
            assert stored == {**answer, "reasons": stored["reasons"]}
            assert answer["is_fraud"] == (answer["fraud_probability"] >= bundle.manifest.policy.thresholds.is_fraud)


def test_no_answer_fails_or_is_mixed_while_models_change_places_under_load(begin, pair, models, tmp_path):
    first, second = (bundle.id for bundle in pair)
    server = begin("--snapshot-seconds", "0.5")
    load = Load(server.port, 1)
    try:
        load.wait_for(150)
        assert changed(server.port, "promote", second)["model"] == second
        load.wait_for(len(load.answers) + 100)
        assert changed(server.port, "rollback")["model"] == first
        load.wait_for(len(load.answers) + 100)
        shadow = changed(server.port, "shadow", second)["shadow"]
        assert [one["model"] for one in shadow] == [second]
        asking, deadline = Client(server.port), time.monotonic() + 120
        while asking.call("GET", "/v1/model")[1]["shadow"][0]["scored"] < 100:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert changed(server.port, "promote", "challenger")["model"] == second
        load.wait_for(len(load.answers) + 100)
    finally:
        load.stop()
    assert server.stop() == 0
    assert [client.others for client in load.clients] == [[]] * CLIENTS
    answers = load.answers
    by_model = {model: sum(answer["model"] == model for answer in answers.values()) for model in (first, second)}
    assert min(by_model.values()) > 100
    require_as_offline(answers, pair, tmp_path / "state")
    scored = read_shadow(tmp_path / "state")
    offline = score_journal(pair[1], tmp_path / "state", threads=1)
    wanted = dict(zip(offline.ids, offline.probability.tolist(), strict=True))
    assert len(scored) > 100
    np.testing.assert_allclose(scored["probability"], [wanted[i] for i in scored["id"].to_pylist()], atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_service_that_is_killed_in_a_swap_serves_the_registrys_champion(begin, pair, models, tmp_path, share):
    first, second = (bundle.id for bundle in pair)
    server = begin()
    load = Load(server.port, 2)
    load.wait_for(300)
    load.killed = True
    began = time.monotonic()
    changed(server.port, "promote", second)
    changed(server.port, "rollback")
    took = (time.monotonic() - began) / 2
    asked = threading.Thread(target=lambda: _ask_in_vain(server.port, second))
    asked.start()
    time.sleep(share * took)
    server.process.kill()
    server.process.wait(30)
    asked.join(30)
    load.stop()
    champion = models.champion
    assert champion in (first, second)
    again = begin()
    assert Client(again.port).call("GET", "/v1/model")[1]["model"] == champion
    more = Load(again.port, 3)
    more.wait_for(60)
    other = second if champion == first else first
    changed(again.port, "promote" if champion == first else "rollback", other)
    more.wait_for(len(more.answers) + 30)
    more.stop()
    assert again.stop() == 0
    assert [client.others for client in (*load.clients, *more.clients)] == [[]] * 2 * CLIENTS
    require_as_offline({**load.answers, **more.answers}, pair, tmp_path / "state")


def _ask_in_vain(port: int, model: str) -> None:
    body = {"action": "promote", "model": model, "reason": "a test"}
    with contextlib.suppress(OSError, http.client.HTTPException):
        Client(port).call("POST", "/v1/model", body)
