"""`make demo`: simulate, train, compare, export, verify, serve, stream held-out transactions through the service."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, command, command_json, service

FOLDER = ROOT / "demo"
HELD_OUT = "2025-04-08"
"""test_start of configs/simulator.toml."""
USERS = 1500
STREAMED = 5_000
TOLERANCE = 1e-5
BASELINE = "logistic_regression"
"""Exported too: a model without a state fits the same contract."""


def main() -> None:
    began = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    data, run, bundle = FOLDER / "transactions.parquet", FOLDER / "run", FOLDER / "bundle"
    scores, state = FOLDER / "scores.parquet", FOLDER / "state"
    command("simulate", "--out", data, "--users", USERS)
    command("train", "configs/simulator.toml", "--out", run)
    command("baselines", run)
    command("export", run, "--out", bundle)
    command("verify", bundle)
    command("export", run, "--model", BASELINE, "--out", FOLDER / BASELINE)
    command("score", bundle, data, "--out", scores)
    command("load", data, "--bundle", bundle, "--state", state, "--until", HELD_OUT)
    with service(bundle, state) as url:
        replayed = command_json(
            "replay", data, "--url", url, "--since", HELD_OUT, "--limit", STREAMED, "--against", scores
        )
    print_summary(run, bundle, replayed, time.perf_counter() - began)


def print_summary(run: Path, bundle: Path, replayed: dict[str, object], seconds: float) -> None:
    """What came out, and where to look."""
    metrics = json.loads((run / "metrics.json").read_text())
    test, milliseconds = metrics["test"], replayed["milliseconds"]
    print(f"""
What came out
  test days: average precision {test["average_precision"]:.3f} at {test["frauds"]} frauds in {test["rows"]:,} transactions
{comparison(json.loads((run / "baselines.json").read_text()))}
  streamed:  {replayed["transactions"]:,} held-out transactions over HTTP, one at a time: {replayed["decisions"]}
             round trip p50 {milliseconds["p50"]:.2f} ms, p99 {milliseconds["p99"]:.2f} ms
  parity:    live scores equal bulk scores to {replayed["largest_difference"]:.1e} (allowed {TOLERANCE:g})

Where it lies
  report     {(run / "report.html").relative_to(ROOT)}
  figures    {(run / "metrics.json").relative_to(ROOT)}
  bundle     {bundle.relative_to(ROOT)}; of the {BASELINE.replace("_", " ")} {(FOLDER / BASELINE).relative_to(ROOT)}
  scores     {(FOLDER / "scores.parquet").relative_to(ROOT)}

Serve it yourself
  .venv/bin/seqfraud serve --bundle {bundle.relative_to(ROOT)} --state {(FOLDER / "state").relative_to(ROOT)}

{seconds:.0f} s in all""")


def comparison(result: dict[str, Any]) -> str:
    """A table: average precision on the test days and how much the GRU's is above it, with 95 % intervals by user."""
    lines = [f"             {'':20} average precision         GRU minus it"]
    for name, found in [("gru", result["gru"]), *result["models"].items()]:
        interval, difference = found["interval"], found.get("gru_minus_this")
        line = f"             {name.replace('_', ' '):20} {interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
        if difference is not None:
            line += f"   {difference['difference']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
