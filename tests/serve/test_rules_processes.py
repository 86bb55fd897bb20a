"""Rules over HTTP in a process of its own: with keys, and after kill -9."""

import http.client
import json
import signal
import subprocess
import sys
from typing import Any

from serve.keys import add_key

START = 1_600_000_000_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}


def ask(port: int, method: str, path: str, body: Any, key: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    out = answer.status, json.loads(answer.read())
    connection.close()
    return out


def test_rules_and_lists_survive_kill_9_and_are_in_force_at_once(serve, cards, tmp_path):
    file = tmp_path / "keys.json"
    stored, admin = add_key(file, ["admin"], 0.0)
    scorer = add_key(file, ["score"], 0.0)[1]
    running = serve("--keys", file).started()

    def code(changes: dict[str, Any]) -> list[str]:
        status, answer = ask(running.port, "POST", "/v1/score", {**ROW, **changes}, scorer)
        assert status == 200, answer
        return [r["code"] for r in answer["reasons"] if r["code"].startswith(("rule:", "list:"))]

    rule = {"expression": "count_1h >= 2", "decision": "decline", "enabled": True, "why": "a burst"}
    assert ask(running.port, "PUT", "/v1/rules/burst", rule, scorer)[0] == 403
    assert ask(running.port, "GET", "/v1/rules", None, scorer)[0] == 403
    assert code({"id": 1}) == []
    status, made = ask(running.port, "PUT", "/v1/rules/burst", rule, admin)
    assert (status, made["author"]) == (200, stored.id)
    assert code({"id": 2}) == ["rule:burst"]
    bad = {"kind": "block", "field": "merchant", "why": "a compromise"}
    assert ask(running.port, "PUT", "/v1/lists/bad", bad, admin)[0] == 200
    entries = {"entries": [{"value": "m9"}], "why": "known fraud there"}
    assert ask(running.port, "POST", "/v1/lists/bad/entries", entries, admin)[1]["new"] == 1
    running.process.send_signal(signal.SIGKILL)
    running.process.wait(30)

    running = serve("--keys", file).started()
    assert code({"id": 3}) == ["rule:burst"]
    assert code({"id": 4, "merchant": "m9"}) == ["list:bad"]
    changes = ask(running.port, "GET", "/v1/rules/burst/history", None, admin)[1]["changes"]
    assert [(c["author"], c["why"]) for c in changes] == [(stored.id, "a burst")]
    status, tested = ask(running.port, "POST", "/v1/rules/test", {"expression": "count_1h >= 3"}, admin)
    assert (status, tested["words"]) == (200, "would have hit 2 of the last 4, 0 of them fraud")
    assert ask(running.port, "DELETE", "/v1/lists/bad/entries", {"values": ["m9"], "why": "mended"}, admin)[0] == 200
    assert code({"id": 5, "merchant": "m9"}) == ["rule:burst"]
    assert ask(running.port, "GET", "/v1/lists/bad?offset=x", None, admin)[0] == 422

    # the command reads the same state folder while the service runs
    words = ["rules", "test", "amount > 10", "--bundle", cards.path, "--state", tmp_path / "state"]
    done = subprocess.run([sys.executable, "-m", "seqfraud.cli", *map(str, words)], capture_output=True, text=True)
    assert done.stdout.startswith("would have hit 5 of the last 5, 0 of them fraud\n"), done.stderr
    wrong = subprocess.run(
        [sys.executable, "-m", "seqfraud.cli", *map(str, words[:2]), "amout > 1", *map(str, words[3:])],
        capture_output=True,
        text=True,
    )
    assert (wrong.returncode, "the nearest is amount" in wrong.stderr) == (2, True)
