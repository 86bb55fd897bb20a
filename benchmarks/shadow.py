"""What challengers in shadow cost the answers: latency at a fixed rate with none, one and two of them, and CPU.

    python -m benchmarks.shadow [--records 5000] [--rate 200] [--rounds 4] [--seconds 6]

A service on a registry of three models (as benchmarks.swap); in each round 0, 1 and 2 challengers score beside the one that
answers, and are in step before it is measured. Latency counts from the moment when a request was due; CPU is the whole
process's per request. Figures are medians over the rounds, ratios of those within rounds. Everything shares the machine's cores: with two of them, the
client, the server's threads and the challengers do. Writes benchmarks/results/shadow.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import write_result
from benchmarks.swap import Traffic, call, change, figures, fill, make_registry, running

CASES = (0, 1, 2)


def cpu_seconds(pid: int) -> float:
    """Of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_in_step(port: int) -> None:
    """Return when every challenger is."""
    while any(one["behind"] > 50 for one in call(port)["shadow"]):
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6.0)
    asked = parser.parse_args()
    rounds: list[dict[int, dict[str, Any]]] = []
    dropped = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry, ids = make_registry(folder, 3)
        fill(registry, folder / "state", asked.records)
        with running(registry, folder / "state") as (port, pid):
            traffic = Traffic(port, asked.rate, asked.records)
            traffic.start()
            time.sleep(1.0)
            for _ in range(asked.rounds):
                seen = {}
                for case in CASES:
                    if case:
                        change(port, "shadow", ids[case])
                        wait_in_step(port)
                    begin, used = time.perf_counter(), cpu_seconds(pid)
                    time.sleep(asked.seconds)
                    used = cpu_seconds(pid) - used
                    times = traffic.between(begin, time.perf_counter())
                    seen[case] = {**figures(times), "cpu_us": used / len(times) * 1e6}
                    dropped += sum(one["dropped"] for one in call(port)["shadow"])
                rounds.append(seen)
                for case in CASES[1:]:
                    change(port, "withdraw", ids[case])
            traffic.stop()
    result: dict[str, Any] = {
        "rate": asked.rate,
        "not_200": traffic.wrong,
        "dropped": dropped,
        "challengers": {
            case: {
                **{f"{q}_ms": statistics.median(one[case][f"{q}_ms"] for one in rounds) for q in ("p50", "p99")},
                "cpu_us_per_request": round(statistics.median(one[case]["cpu_us"] for one in rounds)),
            }
            for case in CASES
        },
        "ratio_to_none": {
            case: {
                "p50": round(statistics.median(one[case]["p50_ms"] / one[0]["p50_ms"] for one in rounds), 3),
                "p99": round(statistics.median(one[case]["p99_ms"] / one[0]["p99_ms"] for one in rounds), 3),
                "cpu": round(statistics.median(one[case]["cpu_us"] / one[0]["cpu_us"] for one in rounds), 3),
            }
            for case in CASES[1:]
        },
    }
    print(json.dumps(result, indent=1))
    print(write_result("shadow", result))


if __name__ == "__main__":
    main()
