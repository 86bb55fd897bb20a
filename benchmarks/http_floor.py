"""The floor under every request: a constant answer through Hug and granian, and nothing else.

    .venv/bin/python benchmarks/http_floor.py

Compares Hug as its documentation has it (default body parsing, granian's own server) with the edge
of this project (`serve.app` over the raw request, `serve.server`). Small JSON POST, keep-alive, 8
connections in a closed loop from a second process; rounds are interleaved, the table has medians.
Writes benchmarks/results/http_floor.json.
"""

import argparse
import json
import os
import platform
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "http_floor.json"
CONNECTIONS = 8
ROUNDS = 5
ROUND_SECONDS = 0.4

BODY = (
    b'{"TRANSACTION_ID":"123456","CUSTOMER_ID":"4961","TX_DATETIME":"2018-04-01T00:00:31",'
    b'"TX_AMOUNT":81.51,"TERMINAL_ID":"3412"}'
)
REQUEST = (
    b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)
ANSWER = {"transaction_id": "123456", "fraud_probability": 0.0123, "is_fraud": False}


class ConstantService:
    """Knows one answer."""

    answer = json.dumps(ANSWER).encode()

    def score(self, body: bytes) -> bytes:
        return self.answer

    score_batch = score

    def add_labels(self, body: bytes, author: str) -> bytes:
        return self.answer

    def transaction(self, transaction_id: str) -> bytes:
        return self.answer

    user = transaction

    def model(self) -> bytes:
        return self.answer

    def ready(self) -> bool:
        return True

    def close(self) -> None:
        pass


def plain_hug() -> Any:
    """What Hug's documentation shows: the body parsed by Hug, a dictionary returned."""
    from serve.hug_compat import hug

    api = hug.API(None, name="plain")

    @hug.post("/v1/score", api=api)
    def score(body):  # type: ignore[no-untyped-def]  # Hug takes annotations for converters
        return ANSWER

    return api.http.server(None)


def raw_hug() -> Any:
    from serve.app import create_app

    return create_app(ConstantService())


def serve_stock(make_app: Callable[[], Any]) -> None:
    """Granian's own server, one worker process, one thread: its best case here."""
    from granian.constants import Interfaces
    from granian.server import Server

    port = free_port()
    server = Server(
        "app",
        port=port,
        interface=Interfaces.WSGI,
        blocking_threads=1,
        log_enabled=False,
    )
    print(f"serving on http://127.0.0.1:{port}", flush=True)
    server.serve(target_loader=make_app, wrap_loader=False)


def serve_ours() -> None:
    from serve.server import ServerSettings, serve_forever

    serve_forever(ConstantService, ServerSettings(port=0))


SERVERS: dict[str, Callable[[], None]] = {
    "hug, default body, stock granian": lambda: serve_stock(plain_hug),
    "serve.app, stock granian": lambda: serve_stock(raw_hug),
    "serve.app, serve.server": serve_ours,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Case:
    """One server in one placement, with what its rounds measured."""

    name: str
    placement: str
    process: "subprocess.Popen[str]"
    port: int
    rounds: list[dict[str, float]] = field(default_factory=list)

    def median(self, key: str) -> float:
        return statistics.median(one[key] for one in self.rounds)


def start(name: str, placement: str, cpus: set[int]) -> Case:
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", name, "--cpus", ",".join(map(str, cpus))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    port = int(process.stdout.readline().rpartition(":")[2])
    case = Case(name, placement, process, port)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # stock granian prints nothing when it accepts
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return case
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise SystemExit(f"{name} did not start")


def load(port: int, seconds: float) -> dict[str, float]:
    """A closed loop over `CONNECTIONS` connections; times in microseconds."""
    poll = select.epoll()
    sockets: dict[int, socket.socket] = {}
    sent: dict[int, float] = {}
    latencies: list[float] = []
    now = begin = time.perf_counter()
    for _ in range(CONNECTIONS):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets[connection.fileno()] = connection
        poll.register(connection.fileno(), select.EPOLLIN)
        sent[connection.fileno()] = time.perf_counter()
        connection.sendall(REQUEST)
    while now - begin < seconds:
        for number, _ in poll.poll(5):
            # the answers are small enough to arrive in one piece
            if not sockets[number].recv(65536).startswith(b"HTTP/1.1 200"):
                raise SystemExit("the server did not answer 200")
            now = time.perf_counter()
            latencies.append(now - sent[number])
            sent[number] = now
            sockets[number].sendall(REQUEST)
    for connection in sockets.values():
        connection.close()
    latencies.sort()
    return {
        "requests_per_second": len(latencies) / (now - begin),
        "p50_us": latencies[len(latencies) // 2] * 1e6,
        "p99_us": latencies[int(len(latencies) * 0.99)] * 1e6,
        "requests": len(latencies),
    }


def cpu_seconds(process: int) -> float:
    """CPU time of a process and its children so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    tasks = Path(f"/proc/{process}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return own + sum(map(cpu_seconds, children))


def measure(case: Case) -> None:
    before = cpu_seconds(case.process.pid)
    one = load(case.port, ROUND_SECONDS)
    one["cpu_us_per_request"] = (cpu_seconds(case.process.pid) - before) / one["requests"] * 1e6
    case.rounds.append(one)


def run() -> list[Case]:
    cores = sorted(os.sched_getaffinity(0))
    placements: dict[str, tuple[set[int], set[int]]] = {"any core": (set(cores), set(cores))}
    if len(cores) > 1:
        placements["one core each"] = ({cores[0]}, {cores[1]})
    cases: list[Case] = []
    try:
        for placement, (server_cpus, _) in placements.items():
            cases += [start(name, placement, server_cpus) for name in SERVERS]
        for case in cases:
            load(case.port, 0.1)
        for _ in range(ROUNDS):
            for case in cases:
                os.sched_setaffinity(0, placements[case.placement][1])
                measure(case)
    finally:
        os.sched_setaffinity(0, cores)
        for case in cases:
            case.process.send_signal(signal.SIGTERM)
        for case in cases:
            case.process.wait(10)
    return cases


def report(cases: list[Case], load_before: float) -> dict[str, Any]:
    keys = ("requests_per_second", "p50_us", "p99_us", "cpu_us_per_request")
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("hug", "falcon", "granian")},
        },
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "other_load_before": load_before,
        "connections": CONNECTIONS,
        "rounds": ROUNDS,
        "round_seconds": ROUND_SECONDS,
        "results": [
            {
                "name": case.name,
                "placement": case.placement,
                **{key: round(case.median(key), 1) for key in keys},
                "every_round": [round(one["requests_per_second"]) for one in case.rounds],
            }
            for case in cases
        ],
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{'':34}{'placement':15}{'requests/s':>11}{'p50 us':>8}{'p99 us':>8}{'CPU us':>8}")
    for row in result["results"]:
        print(
            f"{row['name']:34}{row['placement']:15}{row['requests_per_second']:11.0f}"
            f"{row['p50_us']:8.0f}{row['p99_us']:8.0f}{row['cpu_us_per_request']:8.1f}"
        )
    print(f"load average before: {result['other_load_before']:.2f} on {result['cores']} cores")


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    arguments.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    arguments.add_argument("--cpus", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.serve:
        os.sched_setaffinity(0, map(int, given.cpus.split(",")))
        SERVERS[given.serve]()
        return
    load_before = os.getloadavg()[0]
    result = report(run(), load_before)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)


if __name__ == "__main__":
    main()
