"""What reasons cost a transaction: scored in process by the same service with and without them, and approved; explanations.

    python -m benchmarks.reasons [--rounds 5]

Writes benchmarks/results/reasons.json. Microseconds of CPU time of the scoring thread per transaction, each the least of some
rounds, so that what else the machine does counts little; the three services get each transaction in turn. Nothing is approved by the first two, of which
the second gives no reasons; everything by the third. Users have full rings, and one transaction in three continues a
session, which costs a call of sequence.onnx more.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawn import KINDS, drawn_bundle
from benchmarks.processes import write_result
from seqfraud.bundle import Bundle
from seqfraud.config import parse_config
from seqfraud.policy import NEVER, Policy, Thresholds
from serve.reasons import Situation
from serve.service import Service

CONFIG = """
[data]
transaction = "id"
user = "user"
time = "time"
time_unit = "ms"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["kind"]
context = ["merchant", "device", "user"]
ip = ["ip"]
geo = [["lat", "long"]]
[model]
hidden = 64
"""
USERS, EVENTS, MEASURED = 4, 112, 75
START = 1_700_000_000_000
MINUTE, DAY = 60_000, 86_400_000
EXPLAINED = 20


def rows() -> list[bytes]:
    """Transactions of some users in turn, day by day; every third comes with the one before."""
    rng = np.random.default_rng(0)
    out = []
    for n in range(EVENTS):
        for user in range(USERS):
            time_ms = START + n // 3 * DAY + n % 3 * (10 * MINUTE if n % 3 < 2 else DAY // 40) + user * MINUTE
            row = {
                "id": f"{user}-{n}",
                "user": f"u{user}",
                "time": time_ms,
                "amount": round(float(rng.lognormal(3, 1.2)), 2),
                "kind": KINDS[int(rng.integers(len(KINDS)))],
                "merchant": f"m{rng.integers(40)}",
                "device": f"d{user}" if rng.random() < 0.9 else f"new{n}-{user}",
                "ip": f"10.{user}.0.{rng.integers(9)}",
                "lat": 48 + float(rng.normal(0, 0.05)) + 5 * (rng.random() < 0.1),
                "long": 2 + float(rng.normal(0, 0.05)),
            }
            out.append(json.dumps(row).encode())
    return out


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds of a call, and what it gives."""
    began = time.thread_time()
    result = call()
    return (time.thread_time() - began) * 1e6, result


def one_round(bundle: Bundle, folder: Path, posted: list[bytes]) -> tuple[dict[str, list[float]], list[int], Any]:
    """Microseconds by service and transaction, the number of reasons of each, and those of explanations."""
    states = {"with_reasons": 0.0, "without_reasons": 0.0, "approved": NEVER}
    services = {}
    for name, review in states.items():
        thresholds = Thresholds(is_fraud=0.6, review=review, decline=NEVER)
        asked = replace(bundle, manifest=replace(bundle.manifest, policy=Policy(thresholds)))
        services[name] = Service(asked, folder / name, snapshot_every=None)
    services["without_reasons"].engine.explainer.reasons = lambda situation: []  # type: ignore[method-assign]
    seconds: dict[str, list[float]] = {name: [] for name in services}
    counts = []
    for number, body in enumerate(posted):
        names = list(services)[number % 3 :] + list(services)[: number % 3]
        for name in names:
            took, answer = timed(lambda name=name, body=body: services[name].score(body))  # type: ignore[misc]
            seconds[name].append(took)
            if name == "with_reasons":
                counts.append(len(json.loads(answer)["reasons"]))
    explained = explanations(services["with_reasons"], posted)
    for service in services.values():
        service.abandon()
    return seconds, counts, explained


def explanations(service: Service, posted: list[bytes]) -> list[tuple[float, float]]:
    """Microseconds of some explanations, and of those how many the service's lock is held."""
    explain, unlocked = service.engine.explainer.explain, [0.0]

    def noted(situation: Situation) -> Any:
        unlocked[0] = time.thread_time()
        return explain(situation)

    service.engine.explainer.explain = noted  # type: ignore[method-assign]
    out = []
    for body in posted[-EXPLAINED:]:
        identity, began = json.loads(body)["id"], time.thread_time()
        took, _ = timed(lambda identity=identity: service.explanation(identity))  # type: ignore[misc]
        out.append((took, (unlocked[0] - began) * 1e6))
    return out


def figures(microseconds: Any) -> dict[str, float]:
    """Median and 99th percentile."""
    return {
        "p50": round(float(np.percentile(microseconds, 50)), 1),
        "p99": round(float(np.percentile(microseconds, 99)), 1),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    posted, measured = rows(), slice(-USERS * MEASURED, None)
    every: list[dict[str, list[float]]] = []
    explained = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = drawn_bundle(Path(folder) / "bundle", parse_config(CONFIG, "reasons"), (), 0, 2.5)
        for number in range(rounds):
            seconds, counts, took = one_round(bundle, Path(folder) / str(number), posted)
            every.append(seconds)
            explained.append(took)
    least = {name: np.min([seconds[name] for seconds in every], axis=0)[measured] for name in every[0]}
    extra = least["with_reasons"] - least["without_reasons"]
    best = np.min(explained, axis=0)
    result = {
        "transactions": len(extra),
        "rounds": rounds,
        "reasons_per_transaction": round(float(np.mean(counts[measured])), 2),
        "microseconds": {name: figures(values) for name, values in least.items()},
        "extra_microseconds": figures(extra),
        "ratio": round(float(np.median(least["with_reasons"]) / np.median(least["without_reasons"])), 2),
        "explanation_microseconds": figures(best[:, 0]),
        "explanation_before_the_graphs_microseconds": figures(best[:, 1]),
    }
    print(json.dumps(result, indent=1))
    write_result("reasons", result)


if __name__ == "__main__":
    main()
