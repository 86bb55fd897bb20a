"""A running service gets another model: what its clients notice of it, and how long it takes.

    python -m benchmarks.swap [--records 30000] [--rate 200] [--swaps 4]

Fills a journal (H = 64, W = 32, 3,000 users, 300 merchants), starts the service on a registry of two models, and posts
transactions at a fixed rate; latency counts from the moment when a request was due. Meanwhile the two models change places,
by a rebuild each time, then once out of shadow; between them it is quiet for as long. A second part takes the time for which
a swap holds the service's lock, in this process. Writes benchmarks/results/swap.json.
"""

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.drawn import CARDS, drawn_bundle
from benchmarks.processes import address, start_service, write_result
from seqfraud.config import parse_config
from seqfraud.registry import Registry
from serve.catchup import CLOSE
from serve.service import Service

TOML = CARDS.replace("hidden = 8", "hidden = 64").replace("window = 3", "window = 32")
START_MS = 1_750_000_000_000
USERS, MERCHANTS, DEVICES = 3000, 300, 2000
QUIET_S = 6.0
HEADERS = {"Content-Type": "application/json"}


def body(n: int) -> bytes:
    """Transaction number n, never the same again."""
    return b'{"id":"t%d","user":"u%d","time":%d,"amount":%d.5,"kind":"food","merchant":"m%d","device":"d%d"}' % (
        n, n * 7919 % USERS, START_MS + n * 1000, n % 97, n * 31 % MERCHANTS, n * 17 % DEVICES,
    )  # fmt: skip


def make_registry(folder: Path, models: int) -> tuple[Registry, list[str]]:
    """Models that differ in their weights; the first is the champion."""
    registry, ids = Registry(folder / "models"), []
    for seed in range(models):
        bundle = drawn_bundle(folder / f"bundle{seed}", parse_config(TOML, "swap"), (), seed, 2.5)
        ids.append(registry.add(bundle.path, "benchmark"))
    registry.promote(ids[0], "benchmark", "the first")
    return registry, ids


def fill(registry: Registry, state: Path, records: int) -> None:
    """A journal with so many transactions, and its snapshot."""
    champion = registry.champion
    assert champion is not None
    with Service(registry.open(champion), state, snapshot_every=None) as service:
        for begin in range(0, records, 1000):
            with service.journal.group():
                for n in range(begin, min(begin + 1000, records)):
                    service.score_one(service.decoder.decode(body(n)))


class Traffic(threading.Thread):
    """Posts at a fixed rate until stopped; (when it was due, seconds from then to the answer) of each request."""

    def __init__(self, port: int, rate: float, first: int) -> None:
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.rate = rate
        self.number = first
        self.times: list[tuple[float, float]] = []
        self.wrong = 0
        self._stopped = False

    def run(self) -> None:
        due = time.perf_counter()
        while not self._stopped:
            time.sleep(max(0.0, due - time.perf_counter()))
            self.connection.request("POST", "/v1/score", body(self.number), HEADERS)
            answer = self.connection.getresponse()
            answer.read()
            self.wrong += answer.status != 200
            self.times.append((due, time.perf_counter() - due))
            self.number += 1
            due += 1 / self.rate

    def stop(self) -> None:
        self._stopped = True
        self.join()

    def between(self, begin: float, end: float) -> list[float]:
        """Seconds of the requests that were due in a time."""
        return [seconds for due, seconds in list(self.times) if begin <= due < end]


def figures(seconds: list[float]) -> dict[str, Any]:
    """Latencies in milliseconds."""
    ms = np.array(seconds) * 1000
    named = {f"p{q}_ms": round(float(np.percentile(ms, q)), 2) for q in (50, 99)}
    return {"requests": len(ms), **named, "longest_ms": round(float(ms.max()), 1)}


def call(port: int, content: Any = None) -> Any:
    """GET, or POST, /v1/model."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    method = "GET" if content is None else "POST"
    connection.request(method, "/v1/model", None if content is None else json.dumps(content), HEADERS)
    answer = connection.getresponse()
    shown = json.loads(answer.read())
    if answer.status != 200:
        raise RuntimeError(f"{content}: {answer.status} {shown}")
    return shown


def change(port: int, action: str, model: str) -> Any:
    """Another model in force, or in shadow."""
    return call(port, {"action": action, "model": model, "reason": "a benchmark"})


@contextmanager
def running(registry: Registry, state: Path) -> Iterator[tuple[int, int]]:
    """Port and process id of a service."""
    process = start_service(registry.folder, state, models="--registry")
    try:
        yield int(address(process).rpartition(":")[2]), process.pid
    finally:
        process.terminate()
        process.wait(60)


def under_load(registry: Registry, ids: list[str], state: Path, rate: float, swaps: int, first: int) -> dict[str, Any]:
    with running(registry, state) as (port, _):
        traffic = Traffic(port, rate, first)
        traffic.start()
        time.sleep(2.0)
        quiet: list[float] = []
        during: list[float] = []
        took, shadowed, at_once = [], [], []

        def wait_quietly() -> None:
            begin = time.perf_counter()
            time.sleep(QUIET_S)
            quiet.extend(traffic.between(begin, time.perf_counter()))

        for number in range(swaps):
            wait_quietly()
            begin = time.perf_counter()
            change(port, "promote", ids[(number + 1) % 2])
            took.append(time.perf_counter() - begin)
            during += traffic.between(begin, time.perf_counter())
        other = ids[(swaps + 1) % 2]
        change(port, "shadow", other)
        while call(port)["shadow"][0]["behind"] > 10:
            time.sleep(0.1)
        wait_quietly()
        begin = time.perf_counter()
        change(port, "promote", other)
        at_once.append(time.perf_counter() - begin)
        shadowed += traffic.between(begin - 0.05, time.perf_counter() + 0.05)
        time.sleep(0.2)
        records = call(port)["journal_records"]
        traffic.stop()
    before, meanwhile = figures(quiet), figures(during)
    return {
        "records": records,
        "not_200": traffic.wrong,
        "quiet": before,
        "during_a_swap": meanwhile,
        "ratio": {f"p{q}": round(meanwhile[f"p{q}_ms"] / before[f"p{q}_ms"], 2) for q in (50, 99)},
        "swap_seconds": round(statistics.median(took), 2),
        "out_of_shadow": {"seconds": round(at_once[0], 3), **figures(shadowed)},
    }


class TimedLock:
    """The service's lock; for how long it was held at the longest, in seconds, and of that the most that was running."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._began: list[tuple[float, float]] = []
        self.longest = self.running = 0.0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._began.append((time.perf_counter(), time.thread_time()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        began, cpu = self._began.pop()
        self.longest = max(self.longest, time.perf_counter() - began)
        self.running = max(self.running, time.thread_time() - cpu)
        self._lock.release()


def lock_held(registry: Registry, ids: list[str], state: Path) -> dict[str, float]:
    """Milliseconds for which a swap holds the lock at a time, with the most records that are left for then; the median of some."""
    champion = registry.champion
    assert champion is not None
    held, running = [], []
    with Service(registry.open(champion), state, snapshot_every=None, registry=registry) as service:
        for once in range(5):
            lock = service._lock = TimedLock()  # type: ignore[assignment]
            target = next(i for i in ids if i != service.bundle.id)
            engine = service.new_engine(registry.open(target))
            service.bind_rules(engine)
            ready = service.catch_up(engine)
            ready.follow_to(0)
            for n in range(CLOSE):
                service.score_one(service.decoder.decode(body(10_000_000 + once * CLOSE + n)))
            lock.longest = lock.running = 0.0
            registry.promote(target, "benchmark", "once more")
            service.put_in_force(ready, "benchmark", b'{"action":"promote"}')
            held.append(lock.longest * 1000)
            running.append(lock.running * 1000)
            ready.close()
    return {"wall_ms": round(statistics.median(held), 2), "cpu_ms": round(statistics.median(running), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=30_000)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--swaps", type=int, default=4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry, ids = make_registry(folder, 2)
        fill(registry, folder / "state", asked.records)
        result = under_load(registry, ids, folder / "state", asked.rate, asked.swaps, asked.records)
        result["lock_held"] = lock_held(registry, ids, folder / "state")
    print(json.dumps(result, indent=1))
    print(write_result("swap", {"rate": asked.rate, **result}))


if __name__ == "__main__":
    main()
