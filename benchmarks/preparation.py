"""Preparing 24 million rows (read, clean, order, split, fit vocabularies, contexts, encode): time and peak memory.

    python -m benchmarks.preparation [--users 204500]

Simulates the file first. Writes benchmarks/results/preparation.json. Memory is read from /proc: Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.processes import command_json, write_result

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
geo = [["lat", "long"]]
[split]
train_start = "2025-01-15"
validation = "10d"
train_end = "2025-04-01"
"""


def memory(field: str) -> int:
    """Bytes of this process, now (VmRSS) or at most so far (VmHWM).

    Not `ru_maxrss`: through an exec that keeps the size of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(file: Path) -> None:
    """In a process of its own, so that the peak is that of the preparation: figures as JSON on stdout."""
    from seqfraud.config import parse_config
    from training.prepare import fit_scaling, prepare

    config = parse_config(CONFIG, "the benchmark's configuration")
    imported = memory("VmRSS")
    began, began_cpu = time.perf_counter(), time.process_time()
    prepared = prepare(config, file)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    encoded_peak = memory("VmHWM")
    fit_scaling(prepared)
    peak = memory("VmHWM")
    rows = len(prepared.encoded)
    print(
        json.dumps(
            {
                "rows": rows,
                "users": len(prepared.encoded.begin),
                "seconds": round(seconds, 1),
                "cpu_seconds": round(cpu_seconds, 1),
                "microseconds_per_row": round(seconds / rows * 1e6, 2),
                "seconds_with_scaling": round(time.perf_counter() - began, 1),
                "peak_gb": round(peak / 1e9, 2),
                "peak_gib": round(peak / 2**30, 2),
                "imports_gib": round(imported / 2**30, 2),
                "bytes_per_row": round((encoded_peak - imported) / rows, 1),
                "context_width": prepared.context.width,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=204_500)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measured(args.measure)
        return
    with tempfile.TemporaryDirectory(prefix="seqfraud-preparation-") as folder:
        file = Path(folder) / "transactions.parquet"
        simulated = command_json("simulate", "--out", file, "--users", args.users)
        words = [sys.executable, "-m", "benchmarks.preparation", "--measure", str(file)]
        result = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    write_result("preparation", {"frauds": simulated["frauds"], **result})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
