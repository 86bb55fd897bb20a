"""`make bench`: every benchmark in turn; those that need the public data say so where they are not there."""

import json
import subprocess
import sys

from benchmarks.processes import DATA, RESULTS, ROOT

RUNS: dict[str, tuple[list[str], str | None]] = {
    "chain": (["benchmarks.chain"], None),
    "decisions": (["benchmarks.decisions"], "handbook.parquet"),
    "edge": (["benchmarks.edge"], None),
    "http_floor": (["benchmarks.http_floor"], None),
    "identifiers": (["benchmarks.identifiers"], None),
    "journal": (["benchmarks.journal"], None),
    "metrics": (["benchmarks.metrics"], None),
    "outbox": (["benchmarks.outbox"], None),
    "overload": (["benchmarks.overload"], None),
    "preparation": (["benchmarks.preparation"], None),
    "reasons": (["benchmarks.reasons"], None),
    "restart": (["benchmarks.restart"], None),
    "rules": (["benchmarks.rules"], None),
    "shadow": (["benchmarks.shadow"], None),
    "snapshot": (["benchmarks.snapshot"], None),
    "stream_parity_handbook": (["benchmarks.stream_parity"], "handbook.parquet"),
    "stream_parity_sparkov_gen": (
        [
            "benchmarks.stream_parity", "--config", "configs/sparkov.toml", "--since", "2020-12-01", "--limit", "60000",
            "--data", str(DATA / "sparkov_gen.parquet"),
        ],
        "sparkov_gen.parquet",
    ),
    "swap": (["benchmarks.swap"], None),
}  # fmt: skip


def main() -> int:
    failed = []
    for name, (words, needs) in RUNS.items():
        print(f"\n== {name}", flush=True)
        if needs is not None and not (DATA / needs).is_file():
            print(f"skipped: {DATA / needs} is not there")
            continue
        if subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=False).returncode:
            failed.append(name)
    print("\n== results")
    for file in sorted(RESULTS.glob("*.json")):
        content = json.loads(file.read_text())
        shown = {k: v for k, v in content.items() if isinstance(v, int | float | str)}
        print(f"{file.stem:28} " + "  ".join(f"{k} {v}" for k, v in shown.items()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
