"""What a webhook costs scoring: the service in process, every transaction an alert, receivers that are slow or away.

    python -m benchmarks.outbox [--rounds 9] [--transactions 2000]

Each round opens a service on an empty state folder for each kind of receiver, in turn, and scores one transaction after
the other. The receiver is a process of its own. Writes benchmarks/results/outbox.json: microseconds per transaction
(median over rounds of a round's mean, median and 99th percentile), and each as a ratio to the service without a webhook.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.drawn import CARDS, drawn_bundle
from benchmarks.processes import write_result
from seqfraud.bundle import Bundle
from seqfraud.config import parse_config
from serve.service import Service
from serve.webhook import WebhookSettings

START = 1_600_000_000_000
SLOW_SECONDS = 0.05
RECEIVERS = ("none", "at once", "slow", "away")


def receive(pause: float, port: Any) -> None:
    """Answer every message after a pause."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            time.sleep(pause)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def receivers() -> Iterator[dict[str, int]]:
    """Ports by name; nobody listens at the last one."""
    spawn, running, ports = multiprocessing.get_context("spawn"), [], {}
    for name, pause in (("at once", 0.0), ("slow", SLOW_SECONDS)):
        ours, theirs = spawn.Pipe()
        running.append(spawn.Process(target=receive, args=(pause, theirs), daemon=True))
        running[-1].start()
        ports[name] = ours.recv()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports["away"] = taken.getsockname()[1]
    try:
        yield ports
    finally:
        for process in running:
            process.kill()
            process.join()


def measure(bundle: Bundle, state: Path, webhook: WebhookSettings | None, count: int) -> tuple[list[float], int]:
    """Microseconds of each transaction, and how many events were delivered meanwhile."""
    with Service(bundle, state, webhook=webhook, snapshot_every=None) as service:
        service.engine.policy = replace(
            service.engine.policy, thresholds=replace(service.engine.policy.thresholds, review=0.0)
        )
        took = []
        for n in range(count):
            row = {"id": f"t{n}", "user": f"u{n % 500}", "time": START + n * 1000, "amount": 5.0, "kind": "food",
                   "merchant": f"m{n % 50}", "device": f"d{n % 90}"}  # fmt: skip
            body = json.dumps(row).encode()
            begin = time.perf_counter()
            service.score(body)
            took.append((time.perf_counter() - begin) * 1e6)
        delivered = 0 if service._outbox is None else service._outbox.delivered
    return took, delivered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--transactions", type=int, default=2000)
    options = parser.parse_args()
    figures: dict[str, dict[str, list[float]]] = {
        name: {"mean": [], "p50": [], "p99": [], "delivered": []} for name in RECEIVERS
    }
    with tempfile.TemporaryDirectory() as folder, receivers() as ports:
        work = Path(folder)
        bundle = drawn_bundle(work / "bundle", parse_config(CARDS, "CARDS"), (), 0, 2.5)
        secret = work / "secret"
        secret.touch(0o600)
        secret.write_text("whsec_" + "A" * 44)
        for n in range(options.rounds):
            for name in RECEIVERS:
                webhook = WebhookSettings(f"http://127.0.0.1:{ports[name]}/", str(secret)) if name in ports else None
                took, delivered = measure(bundle, work / f"{n} {name}", webhook, options.transactions)
                took.sort()
                figures[name]["mean"].append(statistics.fmean(took))
                figures[name]["p50"].append(took[len(took) // 2])
                figures[name]["p99"].append(took[len(took) * 99 // 100])
                figures[name]["delivered"].append(delivered)
    medians = {name: {k: round(statistics.median(v), 1) for k, v in f.items()} for name, f in figures.items()}
    result = {
        "rounds": options.rounds,
        "transactions": options.transactions,
        "slow_seconds": SLOW_SECONDS,
        "microseconds": medians,
        "ratios": {
            name: {k: round(medians[name][k] / medians["none"][k], 3) for k in ("mean", "p50", "p99")}
            for name in RECEIVERS[1:]
        },
    }
    write_result("outbox", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
