"""Restarts of a service with many users and a long journal: from the journal alone, and from a snapshot.

    python -m benchmarks.restart [--users 1000000] [--events 10000000] [--since 100000]

The journal is written by the journal's own code, with drawn contexts and answers: a restart does not score. Measured are real
`seqfraud serve` processes from their start to their first answer, and their peak memory: without a snapshot (which the stop
after it leaves), then, with --since more records, from that snapshot. Writes benchmarks/results/restart.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawn import drawn_bundle
from benchmarks.processes import address, start_service, write_result
from seqfraud.bundle import Bundle
from seqfraud.config import DAY_MS, parse_config
from serve.journal import Journal
from serve.records import LabelRecord, TransactionRecord
from serve.replay import Client
from serve.service import Service

CONFIG = """
[data]
transaction = "id"
user = "user"
time = "time"
time_unit = "ms"
label_delay = "7d"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["kind"]
context = ["merchant"]
"""
START = 1_700_000_000_000
SPAN = 90 * DAY_MS
MERCHANTS = 100_000
GROUP = 2000
LABELLED = 10
"""Frauds labelled per group: 0.5 % of the transactions."""


def write_events(journal: Journal, bundle: Bundle, users: int, events: range, total: int) -> None:
    """Append transactions of users drawn at random, `total` of which are spread over SPAN, and labels of some."""
    rng = np.random.default_rng(events.start)
    for begin in range(events.start, events.stop, GROUP):
        numbers = range(begin, min(begin + GROUP, events.stop))
        user = rng.integers(users, size=len(numbers)).tolist()
        merchant = rng.integers(MERCHANTS, size=len(numbers)).tolist()
        context = rng.exponential(3, (len(numbers), bundle.manifest.context.width)).astype(np.float32)
        with journal.group():
            for i, number in enumerate(numbers):
                when = START + SPAN * number // total
                raw = {"id": number, "user": f"user{user[i]}", "time": when, "amount": 12.5, "kind": "food",
                       "merchant": f"m{merchant[i]}"}  # fmt: skip
                answer = {"transaction_id": str(number), "fraud_probability": 0.01, "is_fraud": False,
                          "decision": "approve", "reasons": [], "model": bundle.id, "history": 0, "late": False,
                          "duplicate": False}  # fmt: skip
                journal.append_transaction(
                    TransactionRecord(
                        seq=journal.last_seq + 1,
                        id=str(number),
                        user=raw["user"],
                        time=when,
                        content=number.to_bytes(16, "big"),
                        raw=json.dumps(raw).encode(),
                        context=context[i].tobytes(),
                        answer=json.dumps(answer).encode(),
                        bundle=bundle.id,
                    )
                )
            first = journal.last_seq + 1
            journal.append_labels(
                [
                    LabelRecord(first + i, str(number), True, when + DAY_MS, when, "drawn")
                    for i, number in enumerate(numbers[:: GROUP // LABELLED])
                ]
            )


def start(bundle: Bundle, state: Path) -> dict[str, Any]:
    """Start a service, ask it once, stop it: seconds to the first answer, peak memory, seconds and size of the stop."""
    began = time.perf_counter()
    process = start_service(bundle.path, state)
    try:
        status, model = Client(address(process)).call("GET", "/v1/model")
        seconds = time.perf_counter() - began
        assert status == 200, model
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        began = time.perf_counter()
        process.terminate()
        process.wait(600)
    finally:
        process.kill()
    snapshot = max(state.glob("snapshot-*.bin"))
    return {
        "seconds": round(seconds, 1),
        "peak_gib": round(peak / 2**20, 2),
        "users": model["users"],
        "records": model["journal_records"],
        "stop_seconds": round(time.perf_counter() - began, 1),
        "snapshot_gib": round(snapshot.stat().st_size / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--since", type=int, default=100_000, help="Records after the snapshot.")
    args = parser.parse_args()
    total = args.events + args.since
    with tempfile.TemporaryDirectory(prefix="seqfraud-restart-") as folder:
        state = Path(folder) / "state"
        bundle = drawn_bundle(Path(folder) / "bundle", parse_config(CONFIG, "restart"), (), 0, 1.0)
        Service(bundle, state, snapshot_every=None).abandon()  # says in the journal whose it is
        began = time.perf_counter()
        write(state, bundle, args.users, range(args.events), total)
        written = time.perf_counter() - began
        log_bytes = sum(file.stat().st_size for file in (state / "journal").iterdir())
        print(f"{args.events:,} transactions written in {written:.0f} s", flush=True)
        alone = start(bundle, state)
        print(f"from the journal alone: {alone}", flush=True)
        write(state, bundle, args.users, range(args.events, total), total)
        recent = start(bundle, state)
        print(f"from a snapshot of {args.since:,} transactions ago: {recent}", flush=True)
    write_result(
        "restart",
        {
            "transactions": args.events,
            "since_snapshot": args.since,
            "log_gib": round(log_bytes / 2**30, 2),
            "journal_alone": alone,
            "from_snapshot": recent,
            "seconds_alone": alone["seconds"],
            "seconds_from_snapshot": recent["seconds"],
        },
    )


def write(state: Path, bundle: Bundle, users: int, events: range, total: int) -> None:
    """`write_events` into the journal of a state folder."""
    journal = Journal(state)
    try:
        write_events(journal, bundle, users, events, total)
    finally:
        journal.close()


if __name__ == "__main__":
    main()
