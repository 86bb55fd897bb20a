"""Several times the capacity: what the service answers in time, what it refuses, and how it is afterwards.

    python -m benchmarks.overload [--bundle BUNDLE] [--seconds 3]

The service runs on one core, the load on the other (benchmarks/open_loop.py: requests are due at a fixed rate, on up to 800
connections, and count where they are answered within a second of when they were due). First a closed loop gives the
capacity, then come 0.5 to 8 times as much, in single transactions and in batches of 50; where the load's core cannot offer
that much, "sent_per_second" says what it was. Then the same with slow clients in between, and with more connections than
there are. After each overload: how long the first requests of a lone client take. Without --bundle the weights are drawn at
random (128 units), which costs the same. The machine's own stalls are those of a loop that only sleeps, meanwhile.
Writes benchmarks/results/overload.json.
"""

import argparse
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.drawn import CARDS, drawn_bundle
from benchmarks.processes import ROOT, address, start_service, write_result
from seqfraud.config import parse_config

TIMES = (0.5, 1.0, 2.0, 4.0, 8.0)
CONNECTIONS = 800
MANY_CONNECTIONS = 2_000
PATIENCE_SECONDS = 1.0
BATCH = 50
SLOW = {"half a header": 100, "half a body": 100, "silent": 100}


class Bench:
    """A running service and where things run; transactions are numbered through."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, load_cpus: set[int], seconds: float) -> None:
        self.process = process
        self.port = port
        self._load_cpus = load_cpus
        self._seconds = seconds
        self._first = 0

    def load(self, rate: float, connections: int, batch: int) -> dict[str, Any]:
        """One run of the client, with what the machine stood still for and the service's memory."""
        words = [
            "--rate", str(rate), "--seconds", str(self._seconds), "--connections", str(connections),
            "--patience", str(PATIENCE_SECONDS), "--first", str(self._first), "--batch", str(batch),
        ]  # fmt: skip
        self._first += 10_000_000
        with Stalls() as stalls, self._on_load_cpus():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.open_loop", str(self.port), *words],
                stdout=subprocess.PIPE, check=True, cwd=ROOT,
            )  # fmt: skip
        figures: dict[str, Any] = json.loads(done.stdout)
        return figures | {"rss_mib": self.memory(), "machine_stall_ms": stalls.worst()}

    def times(self, capacity: float, batch: int, connections: int = CONNECTIONS, times: Any = TIMES) -> dict[str, Any]:
        """Loads by how many times the capacity they are."""
        out = {}
        for factor in times:
            figures = self.load(capacity * factor, connections, batch) | {"after": self.after()}
            figures["refused_share"] = round(1 - figures["accepted"] / max(1, figures["accepted"] + lost(figures)), 3)
            figures["goodput_of_capacity"] = round(figures["goodput_per_second"] / capacity, 2)
            out[f"{factor:g}"] = figures
            show(f"{factor:g} x", figures)
        return out

    def after(self) -> dict[str, float]:
        """What a lone client meets right after a load: the slowest and the median of its first 20 requests."""
        taken = []
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        for _ in range(20):
            self._first += 1
            row = {"id": f"a{self._first}", "user": "u1", "time": 1_760_000_000_000, "amount": 1.0}
            began = time.perf_counter()
            connection.request("POST", "/v1/score", json.dumps(row), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                return {"refused_ms": round((time.perf_counter() - began) * 1000, 2)}
            taken.append(time.perf_counter() - began)
        connection.close()
        return {"slowest_ms": round(max(taken) * 1000, 2), "p50_ms": round(sorted(taken)[10] * 1000, 2)}

    def memory(self) -> float:
        """MiB of the service that are resident."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)

    @contextmanager
    def _on_load_cpus(self) -> Iterator[None]:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._load_cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


class Stalls:
    """A thread that only sleeps, and how late it was at worst."""

    def __init__(self) -> None:
        self._late = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sleep)

    def _sleep(self) -> None:
        while not self._stop.is_set():
            began = time.perf_counter()
            time.sleep(0.001)
            self._late = max(self._late, time.perf_counter() - began - 0.001)

    def __enter__(self) -> "Stalls":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def worst(self) -> float:
        """Milliseconds."""
        return round(self._late * 1000, 1)


def lost(figures: dict[str, Any]) -> int:
    """Requests without a score."""
    return int(figures["refused"] + figures["given_up"] + figures["broken"])


@contextmanager
def slow_clients(port: int) -> Iterator[None]:
    """Clients that send a part and fall silent; those that are cut off come back."""
    parts = {
        "half a header": b"POST /v1/score HTTP/1.1\r\nHo",
        "half a body": b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{",
        "silent": b"",
    }
    stop = threading.Event()

    def keep(kind: str) -> None:
        held: list[socket.socket] = []
        while not stop.wait(0.1):
            for one in list(held):
                with contextlib.suppress(BlockingIOError):
                    with contextlib.suppress(OSError):
                        if one.recv(1000, socket.MSG_DONTWAIT):
                            continue
                    held.remove(one)
                    one.close()
            while len(held) < SLOW[kind]:
                with contextlib.suppress(OSError):
                    one = socket.create_connection(("127.0.0.1", port), timeout=1)
                    held.append(one)
                    one.sendall(parts[kind])
        for one in held:
            one.close()

    threads = [threading.Thread(target=keep, args=(kind,)) for kind in SLOW]
    for thread in threads:
        thread.start()
    time.sleep(1)
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def show(name: str, figures: dict[str, Any]) -> None:
    accepted = figures["accepted_ms"]
    print(
        f"{name:>6}  sent {figures['sent_per_second']:6}/s  in time {figures['goodput_per_second']:6}/s  "
        f"refused {figures['refused']:6} given up {figures['given_up']:6} broken {figures['broken']:4}  "
        f"p50 {accepted['p50']} p99 {accepted['p99']} ms  {figures['rss_mib']} MiB  stall {figures['machine_stall_ms']} ms  "
        f"after {figures.get('after', '')}",
        flush=True,
    )


def measure(bench: Bench) -> dict[str, Any]:
    result: dict[str, Any] = {"rss_mib_before": bench.memory()}
    bench.load(0, 64, 1)
    for name, batch in (("single", 1), ("batches", BATCH)):
        closed = bench.load(0, 64 if batch == 1 else 8, batch)
        capacity = closed["goodput_per_second"]
        print(f"{name}: {capacity} requests/s in a closed loop")
        show("closed", closed)
        result[name] = {"capacity_per_second": capacity, "times": bench.times(capacity, batch)}
    capacity = result["single"]["capacity_per_second"]
    print(f"with slow clients: {SLOW}")
    with slow_clients(bench.port):
        result["slow_clients"] = {"clients": SLOW, "times": bench.times(capacity, 1, times=(0.5, 2.0))}
    print(f"with up to {MANY_CONNECTIONS} connections")
    result["many_connections"] = bench.times(capacity, 1, MANY_CONNECTIONS, (4.0,))
    result["rss_mib_after"] = bench.memory()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="Made for the columns of benchmarks/drawn.py's CARDS.")
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    load_before = round(os.getloadavg()[0], 2)
    cpus = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="seqfraud-overload-") as folder:
        work = Path(folder)
        config = parse_config(CARDS.replace("hidden = 8", "hidden = 128"), "overload")
        bundle = args.bundle or drawn_bundle(work / "bundle", config, (), 1, 1.0).path
        os.sched_setaffinity(0, {cpus[0]})
        process = start_service(bundle, work / "state")
        os.sched_setaffinity(0, cpus)
        try:
            port = urlsplit(address(process)).port
            assert port is not None
            result = measure(Bench(process, port, {cpus[-1]}, args.seconds))
        finally:
            process.terminate()
            process.wait(60)
    write_result("overload", {"other_load_before": load_before, "patience_seconds": PATIENCE_SECONDS, **result})


if __name__ == "__main__":
    main()
