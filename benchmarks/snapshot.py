"""A snapshot of a large memory while transactions come in, and a start from it.

    python -m benchmarks.snapshot [--users 1000000]

Makes up the memory of so many users with 10 events each on average (W = 32, H = 64), one context column with a tenth
as many entities, and eight tenths as many open transactions. Takes a snapshot without and with a thread that changes
memory as fast as it can, by what a transaction changes, without decoding, graph and journal. Then reads it back in a
process of its own. Writes benchmarks/results/snapshot.json.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from msgspec import msgpack

from benchmarks.processes import write_result
from seqfraud.context import USUAL, ContextSpec, ContextTable
from seqfraud.graph import NEXT, GraphSpec, StateSpec
from serve.capture import ROWS, SLOTS, Capture, remember
from serve.labels import UNSAID, LabelBook
from serve.snapshot import Piece, read_newest, write_snapshot
from serve.users import UserTable

HOUR = 3_600_000
DAY = 24 * HOUR
NOW = 1_750_000_000_000
EVENTS = 10
HIDDEN = 64
CONTEXT = ContextSpec(("merchant",), (DAY, 7 * DAY, 30 * DAY), 7 * DAY)
STATES = (StateSpec("h", "float32", (1, "B", HIDDEN), 0.0), StateSpec("last_time", "int64", ("B",), -(2**62)))
GRAPH = GraphSpec(3, 1, CONTEXT.width, STATES)


class Memory:
    """What a service keeps in memory, with the lock around it."""

    def __init__(self) -> None:
        self.users = UserTable(GRAPH, 32)
        self.context = ContextTable(CONTEXT)
        self.labels = LabelBook(self.context, lambda seq: (_ for _ in ()).throw(KeyError(seq)))
        self.lock = TimedLock()

    def take(self, pieces: Iterator[Piece]) -> None:
        remember(pieces, self.users, self.context, self.labels)


class TimedLock:
    """A lock that knows how long each thread had it, and of that what the thread was running: seconds."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._since = (0.0, 0.0)
        self.held: dict[str, list[tuple[float, float]]] = {}

    def __enter__(self) -> None:
        self._lock.acquire()
        self._since = time.perf_counter(), time.thread_time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._since[0], time.thread_time() - self._since[1]
        self.held.setdefault(threading.current_thread().name, []).append(seconds)
        self._lock.release()


def made_up(users: int) -> Iterator[Piece]:
    """Pieces as a capture would give them."""
    rng = np.random.default_rng(0)
    entities, waiting = users // 10, users * 8 // 10
    yield Piece("sizes", msgpack.encode((users, entities)))
    effects = rng.multinomial(users * EVENTS - waiting, np.full(entities, 1 / entities))
    lengths = np.r_[0, effects]
    for begin in range(0, entities + 1, ROWS):
        part = lengths[begin : begin + ROWS]
        names = [(0, f"merchant-{row}") for row in range(max(begin, 1), begin + len(part))]
        arrays = {
            "newest": np.full(len(part), NOW - HOUR),
            "sums": rng.random((len(part), 4, len(CONTEXT.half_lives) + 1)),
            "run": rng.integers(0, 9, (len(part), 5)),
            "effects": 2 * part,
        }
        yield Piece("entities", msgpack.encode(names), arrays)
    told = 4 * rng.integers(NOW - 90 * DAY, NOW - 7 * DAY, int(effects.sum()))
    yield Piece("effects", b"", {"effects": np.stack([told, np.full(len(told), USUAL)], axis=1).reshape(-1)})
    for begin in range(0, users, SLOTS):
        n = min(SLOTS, users - begin)
        held = rng.integers(1, 2 * EVENTS, n)
        total = int(held.sum())
        arrays = {
            "accepted": held,
            "held": held,
            "dropped": np.zeros(n, np.int64),
            "newest": np.full(n, NOW - HOUR),
            "anchor_time": np.zeros(n, np.int64),
            "integers": rng.integers(NOW - 90 * DAY, NOW - HOUR, (total, 1 + GRAPH.categorical)),
            "values": rng.random((total, GRAPH.numeric + GRAPH.context), dtype=np.float32),
            "now.h": rng.random((n, 1, HIDDEN), dtype=np.float32),
            "now.last_time": np.full(n, NOW - HOUR),
        }
        for stage in ("middle", "anchor"):
            arrays |= {f"{stage}.h": np.zeros((0, 1, HIDDEN), np.float32), f"{stage}.last_time": np.zeros(0, np.int64)}
        yield Piece("users", msgpack.encode([f"user-{slot}" for slot in range(begin, begin + n)]), arrays)
    columns = {
        "seq": users * EVENTS - waiting + np.arange(waiting),
        "time": np.sort(rng.integers(NOW - 7 * DAY, NOW, waiting)),
        "ratio": np.full(waiting, USUAL),
        "rows": rng.integers(1, entities + 1, (waiting, 1)),
        "effective": np.full(waiting, UNSAID, np.uint8),
    }
    yield Piece("open", b"", columns)
    yield Piece("frauds", np.packbits(rng.random(users * EVENTS - waiting) < 0.005, bitorder="little").tobytes())


class Traffic(threading.Thread):
    """Changes memory as transactions do; each one's seconds, the wait for the lock included."""

    def __init__(self, memory: Memory, users: int) -> None:
        super().__init__(name="traffic", daemon=True)
        self.memory = memory
        self.users = users
        self.seconds: list[float] = []
        self.stopped = False
        self.inputs = {"integers": np.full((1, 1 + GRAPH.categorical), NOW), "values": np.ones((1, 3 + GRAPH.context))}
        self.outputs = {s.name + NEXT: s.to_batch(s.initial_rows(1)) for s in STATES}

    def run(self) -> None:
        rng = np.random.default_rng(1)
        memory, clock = self.memory, time.perf_counter
        while not self.stopped:
            for user, entity in zip(
                rng.integers(0, self.users, 1000).tolist(),
                rng.integers(0, self.users // 10, 1000).tolist(),
                strict=True,
            ):
                began = clock()
                with memory.lock:
                    self.transaction(f"user-{user}", f"merchant-{entity}", NOW + len(self.seconds))
                self.seconds.append(clock() - began)

    def transaction(self, user: str, entity: str, now: int) -> None:
        users, context, labels = self.memory.users, self.memory.context, self.memory.labels
        labels.advance(now)
        rows = context.rows_of([entity])
        context.read(rows, now, 1.0)
        slot = users.slot(user)
        users.append(slot, now, self)  # type: ignore[arg-type]
        users.count(slot)
        ratio = context.add_transaction(rows, now, 1.0)
        labels.opened(self.users * EVENTS + len(self.seconds), now, rows, ratio)


def snapshot(memory: Memory, state: Path, seq: int) -> dict[str, Any]:
    """Take one; seconds, and for how long it had the lock (on a busy machine partly without running)."""
    memory.lock.held.clear()
    began, cpu = time.perf_counter(), time.thread_time()
    with memory.lock:
        capture = Capture(memory.lock, memory.users, memory.context, memory.labels, {})
    write_snapshot(state, "benchmark", seq, capture.pieces())
    with memory.lock:
        capture.end()
    held, running = np.array(memory.lock.held[threading.current_thread().name]).T * 1000
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.thread_time() - cpu, 2),
        "lock_held_first_ms": round(float(held[0]), 2),
        "lock_held_longest_ms": round(float(held.max()), 2),
        "lock_held_longest_cpu_ms": round(float(running.max()), 2),
        "lock_held_p99_ms": round(float(np.percentile(held, 99)), 2),
        "lock_held_p99_cpu_ms": round(float(np.percentile(running, 99)), 2),
        "lock_held_in_all_cpu_s": round(float(running.sum()) / 1000, 2),
    }


def waits(traffic: Traffic, since: int) -> dict[str, Any]:
    """What the transactions from number `since` on took, in milliseconds."""
    ms = np.array(traffic.seconds[since:]) * 1000
    return {
        "transactions": len(ms),
        **{f"p{q}_ms": round(float(np.percentile(ms, q)), 3) for q in (50, 99, 99.9)},
        "longest_ms": round(float(ms.max()), 1),
    }


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def written(state: Path, users: int) -> dict[str, Any]:
    """Figures of taking snapshots."""
    memory = Memory()
    memory.take(made_up(users))
    gc.freeze()  # as the server does
    before = peak_gib()
    alone = snapshot(memory, state, 1)
    traffic = Traffic(memory, users)
    traffic.start()
    time.sleep(5)
    calm = len(traffic.seconds)
    meanwhile = snapshot(memory, state, 2)
    during = waits(traffic, calm)
    traffic.stopped = True
    traffic.join()
    traffic.seconds = traffic.seconds[:calm]
    (state / "snapshot-000000000000002.bin").unlink()
    size = (state / "snapshot-000000000000001.bin").stat().st_size
    return {
        "file_gib": round(size / 2**30, 3),
        "bytes_per_user": round(size / users),
        "memory_gib": before,
        "peak_gib": peak_gib(),
        "snapshot_alone": alone,
        "snapshot_under_traffic": meanwhile,
        "traffic_before": waits(traffic, 0),
        "traffic_meanwhile": during,
    }


def read(state: Path) -> dict[str, Any]:
    """Figures of a start."""
    memory = Memory()
    began, cpu, main = time.perf_counter(), time.process_time(), time.thread_time()
    assert read_newest(state, "benchmark", 10, memory.take) == 1
    return {
        "read_seconds": round(time.perf_counter() - began, 2),
        "read_cpu_seconds": round(time.process_time() - cpu, 2),
        "read_cpu_seconds_of_one_thread": round(time.thread_time() - main, 2),
        "read_peak_gib": peak_gib(),
        "read_users": len(memory.users.slots),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--part", choices=["written", "read"], help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(written(args.state, args.users) if args.part == "written" else read(args.state)))
        return
    result: dict[str, Any] = {"users": args.users, "events": args.users * EVENTS}
    with tempfile.TemporaryDirectory(prefix="seqfraud-snapshot-") as folder:
        for part in ("written", "read"):  # each in a process of its own, so that its peak is its own
            words = [sys.executable, "-m", "benchmarks.snapshot", "--part", part, "--state", folder]
            run = subprocess.run([*words, "--users", str(args.users)], stdout=subprocess.PIPE, check=True)
            result |= json.loads(run.stdout)
    write_result("snapshot", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
