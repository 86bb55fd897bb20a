"""The journal: its log against SQLite alone (the table layout that was the journal before), and its two promises.

    python -m benchmarks.journal [--bundle BUNDLE]

Trains and exports a small bundle first (GRU of 128 units, one epoch), unless --bundle names one for the simulator's
columns. Microseconds per append with a pause in between; transactions per second through `Service.score` on one thread;
requests per second of a real server with 1 and 8 clients for each promise, beside what one sync of this disk takes.
Rounds are interleaved. Writes benchmarks/results/journal.json.
"""

import argparse
import http.client
import json
import os
import sqlite3
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from benchmarks.processes import command, command_json, service, write_result
from serve.journal import Journal, TransactionRecord

ROUNDS = 5
APPENDS = 2_000
PAUSE_SECONDS = 0.0002
SCORED = 2_000
SERVED_SECONDS = 2.0
CLIENTS = (1, 8)

CONFIG = """
[data]
path = "transactions.parquet"
transaction = "transaction_id"
user = "user_id"
time = "time"
label = "is_fraud"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["category"]
context = ["merchant_id"]
[split]
validation = "6d"
train_end = "2025-01-20"
[model]
hidden = 128
[training]
epochs = 1
"""
START_MS = 1_750_000_000_000


class SqliteJournal:
    """The journal before there was a log: SQLite in WAL mode on the thread that scores, as far as scoring needs it."""

    failed = ""

    def __init__(self, state: Path, promise: str = "process", disk: object = None) -> None:
        self._db = sqlite3.connect(state / "journal.sqlite", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(
            "CREATE TABLE transactions (seq INTEGER PRIMARY KEY, id TEXT NOT NULL, user TEXT NOT NULL, "
            "time INTEGER NOT NULL, content BLOB NOT NULL, raw BLOB NOT NULL, context BLOB NOT NULL, "
            "answer BLOB NOT NULL, bundle TEXT NOT NULL);"
            "CREATE UNIQUE INDEX transactions_id ON transactions (id);"
            "CREATE INDEX transactions_user ON transactions (user, time);"
        )
        self._notes: dict[str, str] = {}
        self.last_seq = 0

    def meta(self, key: str) -> str | None:
        return self._notes.get(key)

    def set_meta(self, key: str, value: str) -> None:
        self._notes[key] = value

    def append_transaction(self, r: TransactionRecord) -> None:
        self._db.execute(
            "INSERT INTO transactions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (r.seq, r.id, r.user, r.time, r.content, r.raw, r.context, r.answer, r.bundle),
        )
        self.last_seq = r.seq

    def transaction(self, identity: str) -> TransactionRecord | None:
        row = self._db.execute("SELECT * FROM transactions WHERE id = ?", (identity,)).fetchone()
        return None if row is None else TransactionRecord(*row)

    def after(self, seq: int) -> Iterator[TransactionRecord]:
        return iter(())

    def wait_durable(self, seq: int, before_waiting: object) -> None:
        pass

    def close(self) -> None:
        self._db.close()


JOURNALS: dict[str, Callable[..., Any]] = {"log": Journal, "sqlite": SqliteJournal}


def figures(seconds: list[float]) -> dict[str, float]:
    """Microseconds."""
    ordered = sorted(seconds)
    at = {f"p{q:g}": ordered[int(len(ordered) * q / 100)] for q in (50, 99, 99.9)}
    return {name: round(value * 1e6, 1) for name, value in {**at, "mean": statistics.fmean(ordered)}.items()}


def appends(work: Path) -> dict[str, dict[str, float]]:
    """Each append by itself, the disk busy with what the journal has it do meanwhile."""
    raw = json.dumps({"id": "t0000000", "user": "u00000", "time": START_MS, "amount": 81.5, "category": "groceries"})
    answer = {"transaction_id": "t0000000", "fraud_probability": 0.0123456789, "is_fraud": False, "reasons": []}
    record = TransactionRecord(
        0, "", "", 0, bytes(16), raw.encode(), bytes(256), json.dumps(answer | {"decision": "approve"}).encode(), "b" * 16
    )  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in JOURNALS}
    opened = {}
    for name, make in JOURNALS.items():
        (work / name).mkdir()
        opened[name] = make(work / name)
    for _ in range(ROUNDS):
        for name, journal in opened.items():
            for _ in range(APPENDS):
                seq = journal.last_seq + 1
                one = replace(record, seq=seq, id=f"t{seq * 7919 % 10**7}", user=f"u{seq % 1000}", time=START_MS + seq)
                began = time.perf_counter()
                journal.append_transaction(one)
                taken[name].append(time.perf_counter() - began)
                time.sleep(PAUSE_SECONDS)
    for journal in opened.values():
        journal.close()
    return {name: figures(seconds) for name, seconds in taken.items()}


def body(number: int) -> bytes:
    row = {
        "transaction_id": f"b{number}",
        "user_id": f"u{number % 500}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(START_MS // 1000 + number)),
        "amount": number % 97 + 0.5,
        "category": "grocery",
        "merchant_id": f"m{number % 300}",
    }
    return json.dumps(row).encode()


def scored(work: Path, bundle: Path) -> dict[str, float]:
    """Transactions per second through `Service.score` on one thread: medians of the rounds."""
    from seqfraud.bundle import open_bundle
    from serve.service import Service

    opened = {}
    for name, journal in JOURNALS.items():
        with mock.patch("serve.service.Journal", journal):
            opened[name] = Service(open_bundle(bundle), work / f"scored-{name}")
    rates: dict[str, list[float]] = {name: [] for name in opened}
    for turn in range(ROUNDS):
        bodies = [body(turn * SCORED + n) for n in range(SCORED)]
        for name, one in opened.items():
            began = time.perf_counter()
            for text in bodies:
                one.score(text)
            rates[name].append(SCORED / (time.perf_counter() - began))
    for one in opened.values():
        one.abandon()
    return {name: round(statistics.median(values)) for name, values in rates.items()}


def served(work: Path, bundle: Path) -> dict[str, dict[str, float]]:
    """Requests per second over HTTP and their p50 in milliseconds, by promise and number of clients."""
    out: dict[str, dict[str, float]] = {}
    for promise in ("process", "disk"):
        with service(bundle, work / f"served-{promise}", "--promise", promise) as url:
            first = 0
            for clients in CLIENTS:
                seconds = closed_loop(url, clients, first)
                first += len(seconds) + clients
                out[f"{promise}, {clients} clients"] = {
                    "requests_per_second": round(len(seconds) / SERVED_SECONDS),
                    "p50_ms": round(statistics.median(seconds) * 1000, 2),
                }
    return out


def closed_loop(url: str, clients: int, first: int) -> list[float]:
    """Seconds of every request; each client posts the next transaction once it has its answer."""
    numbers = iter(range(first, 10**9))
    seconds: list[float] = []
    stop = time.perf_counter() + SERVED_SECONDS

    def client() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        while (began := time.perf_counter()) < stop:
            connection.request("POST", "/v1/score", body(next(numbers)), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200 or json.loads(answer.read())["duplicate"]:
                raise SystemExit("the service did not score")
            seconds.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def one_sync(work: Path) -> float:
    """Milliseconds of an append and fdatasync by themselves: the median of 100."""
    with (work / "sync").open("wb", buffering=0) as file:
        taken = []
        for _ in range(100):
            began = time.perf_counter()
            file.write(bytes(600))
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - began)
    return round(statistics.median(taken) * 1000, 2)


def trained(work: Path) -> Path:
    (work / "config.toml").write_text(CONFIG)
    command_json("simulate", "--out", work / "transactions.parquet", "--users", 200, "--days", 30)
    command("train", work / "config.toml", "--out", work / "run", "--device", "cpu")
    command("export", work / "run", "--out", work / "bundle")
    return work / "bundle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seqfraud-journal-") as folder:
        work = Path(folder)
        bundle = args.bundle or trained(work)
        result = {
            "other_load_before": round(os.getloadavg()[0], 2),
            "one_sync_ms": one_sync(work),
            "append_us": appends(work),
            "scored_per_second": scored(work, bundle),
            "served": served(work, bundle),
        }
    write_result("journal", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
