"""What keys and the access log cost per request: CPU time in process, the app over a constant answer.

    .venv/bin/python -m benchmarks.edge

Rounds are interleaved, the table has medians. Writes benchmarks/results/edge.json.
"""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.http_floor import BODY, ConstantService
from benchmarks.processes import write_result
from serve.keys import Keyring, add_key
from serve.logs import AccessLog, LogSettings, configure_logs
from serve.server import Door, ServerSettings, _Gateway

ROUNDS = 25
REQUESTS = 3_000
MANY_KEYS = 1_000


class Protocol:
    """Takes the answer as granian does."""

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        assert status == 200


def environ(key: str | None) -> dict[str, Any]:
    given = {} if key is None else {"HTTP_AUTHORIZATION": f"Bearer {key}"}
    return {
        "REQUEST_METHOD": "POST", "PATH_INFO": "/v1/score", "QUERY_STRING": "", "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(BODY)), "SERVER_NAME": "x", "SERVER_PORT": "80", "wsgi.url_scheme": "http",
        "REMOTE_ADDR": "127.0.0.1", "wsgi.errors": None, **given,
    }  # fmt: skip


def microseconds(answer: Callable[[Any, dict[str, Any]], object], key: str | None) -> float:
    request, protocol = environ(key), Protocol()
    begin = time.thread_time()
    for _ in range(REQUESTS):
        answer(protocol, {**request, "wsgi.input": io.BytesIO(BODY)})
    return (time.thread_time() - begin) / REQUESTS * 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "wb") as nowhere:
        file = Path(folder) / "keys.json"
        key = add_key(file, ["score"], time.time())[1]
        few = Keyring(file)
        many_file = Path(folder) / "many.json"
        many_file.write_bytes(file.read_bytes())
        os.chmod(many_file, 0o600)
        for _ in range(MANY_KEYS):
            add_key(many_file, ["score"], time.time())
        log = AccessLog(configure_logs(LogSettings(access=True, queued=10**9), nowhere.fileno()))
        doors: dict[str, tuple[Door, str | None]] = {
            "no keys, no access log": (Door(), None),
            "a key": (Door(keys=few), key),
            f"one of {MANY_KEYS} keys": (Door(keys=Keyring(many_file)), key),
            "access log": (Door(access=log), None),
        }
        gateways = {
            name: (_Gateway(ConstantService(), ServerSettings(), door)._answer, sent)
            for name, (door, sent) in doors.items()
        }
        rounds: dict[str, list[float]] = {name: [] for name in gateways}
        for _ in range(ROUNDS):
            for name, (answer, sent) in gateways.items():
                rounds[name].append(microseconds(answer, sent))
    medians = {name: round(statistics.median(times), 2) for name, times in rounds.items()}
    base = medians["no keys, no access log"]
    for name, median in medians.items():
        print(f"{name:26} {median:7.2f} us per request  {median - base:+6.2f}")
    print(write_result("edge", {"microseconds_per_request": medians, "rounds": ROUNDS, "requests": REQUESTS}))


if __name__ == "__main__":
    main()
