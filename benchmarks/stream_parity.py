"""History loaded, then transactions streamed over HTTP one at a time with their labels: equal to bulk scoring?

    python benchmarks/stream_parity.py                      # handbook data, 100,000 transactions from 2018-08-08 on
    python benchmarks/stream_parity.py --config configs/sparkov.toml --since 2020-06-21

Trains and exports first, unless --bundle names a bundle. Writes benchmarks/results/stream_parity_NAME.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEQFRAUD = Path(sys.executable).parent / "seqfraud"


def command(*args: str | Path) -> str:
    """Run a subcommand and return what it printed."""
    print("+ seqfraud", *args, flush=True)
    done = subprocess.run([SEQFRAUD, *map(str, args)], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return done.stdout


def environment() -> dict[str, Any]:
    """What ran this: for the record beside the figures."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        "commit": commit.stdout.strip(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("numpy", "onnxruntime", "granian", "hug", "msgspec")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "handbook.toml")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "handbook.parquet")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--since", default="2018-08-08")
    parser.add_argument("--limit", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seqfraud-parity-") as folder:
        work = Path(folder)
        bundle = args.bundle
        if bundle is None:
            command("train", args.config, "--data", args.data, "--out", work / "run")
            bundle = work / "bundle"
            command("export", work / "run", "--out", bundle)
        command("score", bundle, args.data, "--out", work / "scores.parquet")
        began = time.perf_counter()
        loaded = json.loads(
            command("load", args.data, "--bundle", bundle, "--state", work / "state", "--until", args.since, "--json")
        )
        load_seconds = time.perf_counter() - began
        server = subprocess.Popen(
            [SEQFRAUD, "serve", "--bundle", bundle, "--state", work / "state", "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            began = time.perf_counter()
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            start_seconds = time.perf_counter() - began
            began = time.perf_counter()
            replayed = json.loads(
                command(
                    "replay", args.data, "--url", url, "--since", args.since, "--limit", str(args.limit),
                    "--against", work / "scores.parquet", "--json",
                )
            )  # fmt: skip
            replay_seconds = time.perf_counter() - began
        finally:
            server.terminate()
            stopped = server.wait(30)
    result = {
        "environment": environment(),
        "data": args.data.name,
        "since": args.since,
        "loaded": loaded,
        "load_seconds": round(load_seconds, 1),
        "loaded_per_second": round(loaded["transactions"] / load_seconds),
        "start_seconds": round(start_seconds, 2),
        "replay_seconds": round(replay_seconds, 1),
        "server_exit_code": stopped,
        **replayed,
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"stream_parity_{args.data.stem}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"largest difference over {replayed['compared']:,} transactions: {replayed['largest_difference']:.2e}")


if __name__ == "__main__":
    main()
