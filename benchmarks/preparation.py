"""Preparing 24 million rows (read, clean, order, split, fit vocabularies, contexts, encode): time and peak memory.

    python -m benchmarks.preparation [--users 204500]

Simulates the file first. Writes benchmarks/results/preparation.json.
"""

import argparse
import json
import resource
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


def measured(folder: Path) -> None:
    """In a process of its own, so that the peak is that of the preparation: figures as JSON on stdout."""
    from seqfraud.config import load_config
    from training.prepare import fit_scaling, prepare

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    prepared = prepare(load_config(folder / "config.toml"), folder / "transactions.parquet")
    seconds = time.perf_counter() - began
    fit_scaling(prepared)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = len(prepared.encoded)
    print(
        json.dumps(
            {
                "rows": rows,
                "users": len(prepared.encoded.begin),
                "seconds": round(seconds, 1),
                "microseconds_per_row": round(seconds / rows * 1e6, 2),
                "seconds_with_scaling": round(time.perf_counter() - began, 1),
                "peak_gib": round(peak / 2**20, 2),
                "imports_gib": round(imported / 2**20, 2),
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
        work = Path(folder)
        (work / "config.toml").write_text(CONFIG)
        simulated = command_json("simulate", "--out", work / "transactions.parquet", "--users", args.users)
        words = [sys.executable, "-m", "benchmarks.preparation", "--measure", str(work)]
        result = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    write_result("preparation", {"frauds": simulated["frauds"], **result})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
