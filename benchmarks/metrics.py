"""What metrics cost: a scored transaction with and without them, a request at the edge, and a scrape, in process.

    python -m benchmarks.metrics [--rounds 60] [--calls 100]

Writes benchmarks/results/metrics.json. A service of its own for each case, in turn in short rounds, each transaction new, in
microseconds of CPU of the thread that scores, medians of the rounds; a difference is the median of the differences within
rounds. The same counts kept by prometheus-client are a case where that is installed:

    pip install --target PEERS prometheus-client
    PYTHONPATH=.:PEERS python -m benchmarks.metrics
"""

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.drawn import CARDS, drawn_bundle
from benchmarks.edge import microseconds
from benchmarks.http_floor import ConstantService
from benchmarks.processes import write_result
from benchmarks.rules import body
from seqfraud.config import parse_config
from seqfraud.vocabulary import UNSEEN
from serve.answers import Answer
from serve.decoding import Transaction
from serve.measures import SCORES, STAGE_SECONDS, STAGES
from serve.metrics import Registry
from serve.server import Door, ServerSettings, _Gateway
from serve.service import Service

OFF, ON, PEER = "no metrics", "metrics", "prometheus-client"
SCRAPES = 50


class PeerMeasures:
    """What `serve.measures.Measures` counts of a transaction, kept by prometheus-client."""

    def __init__(self, client: Any, fields: Sequence[str]) -> None:
        self._registry = registry = client.CollectorRegistry()
        self._latest = client.generate_latest
        stages = client.Histogram("seqfraud_stage_seconds", "x", ["stage"], buckets=STAGE_SECONDS, registry=registry)
        self._stages = [stages.labels(stage) for stage in STAGES]
        decisions = client.Counter("seqfraud_decisions", "x", ["decision"], registry=registry)
        self._decisions = {decision: decisions.labels(decision) for decision in ("approve", "review", "decline")}
        self._scores = client.Histogram("seqfraud_score_ratio", "x", buckets=SCORES, registry=registry)
        self._flagged = client.Counter("seqfraud_transactions_flagged", "x", registry=registry)
        self._late = client.Counter("seqfraud_transactions_late", "x", registry=registry)
        unseen = client.Counter("seqfraud_categories_unseen", "x", ["field"], registry=registry)
        self._fields = [unseen.labels(field) for field in fields]

    def scored(self, transaction: Transaction, answer: Answer, marks: Sequence[float]) -> None:
        for stage, begin, end in zip(self._stages[1:7], marks, marks[1:], strict=False):
            stage.observe(end - begin)
        self._scores.observe(answer.fraud_probability)
        self._decisions[answer.decision].inc()
        if answer.is_fraud:
            self._flagged.inc()
        if answer.late:
            self._late.inc()
        if UNSEEN in transaction.categories:
            for field, category in zip(self._fields, transaction.categories, strict=True):
                if category == UNSEEN:
                    field.inc()

    def answered(self, decode: float, wait: float, encode: float) -> None:
        for stage, seconds in zip((self._stages[0], *self._stages[7:]), (decode, wait, encode), strict=True):
            stage.observe(seconds)

    def scrape(self) -> bytes:
        text: bytes = self._latest(self._registry)
        return text


def summary(rounds: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Medians by case, and what each adds to the base: of the differences and ratios within rounds."""
    differences = {name: [a - b for a, b in zip(times, rounds[base], strict=True)] for name, times in rounds.items()}
    ratios = {name: [a / b for a, b in zip(times, rounds[base], strict=True)] for name, times in rounds.items()}
    return {
        "microseconds": {name: round(statistics.median(times), 2) for name, times in rounds.items()},
        "added": {name: round(statistics.median(d), 2) for name, d in differences.items() if name != base},
        "ratio": {name: round(statistics.median(r), 3) for name, r in ratios.items() if name != base},
    }


def scoring(folder: Path, rounds: int, calls: int) -> dict[str, Any]:
    """Microseconds per transaction by case, and per scrape."""
    bundle = drawn_bundle(folder / "bundle", parse_config(CARDS, "CARDS"), (), 0, 2.5)
    fields = [vocabulary.column for vocabulary in bundle.manifest.vocabularies]
    scrapes: dict[str, Callable[[], bytes]] = {}
    with ExitStack() as opened:

        def service(name: str, metrics: Registry | None) -> Service:
            return opened.enter_context(Service(bundle, folder / name, metrics=metrics, snapshot_every=None))

        services = {OFF: service(OFF, None), ON: service(ON, Registry())}
        scrapes[ON] = services[ON].metrics
        try:
            peer = PeerMeasures(importlib.import_module("prometheus_client"), fields)
        except ImportError:
            print("prometheus-client is not installed")
        else:
            services[PEER] = service(PEER, None)
            services[PEER]._measures = peer  # type: ignore[assignment]
            scrapes[PEER] = peer.scrape
        times: dict[str, list[float]] = {name: [] for name in services}
        for number in range(rounds):
            sent = [body(number * calls + n) for n in range(calls)]
            for name, one in services.items():
                began = time.thread_time()
                for transaction in sent:
                    one.score(transaction)
                times[name].append((time.thread_time() - began) / calls * 1e6)
        shown = {}
        for name, scrape in scrapes.items():
            lengths, took = [], []
            for _ in range(SCRAPES):
                began = time.thread_time()
                lengths.append(len(scrape()))
                took.append((time.thread_time() - began) * 1e6)
            shown[name] = {"microseconds": round(statistics.median(took)), "bytes": lengths[-1]}
    return {"transaction": summary(times, OFF), "scrape": shown}


def edge(rounds: int) -> dict[str, Any]:
    """Microseconds per request through the gateway to a constant answer."""
    doors = {OFF: Door(), ON: Door(metrics=Registry())}
    gateways = {name: _Gateway(ConstantService(), ServerSettings(), door)._answer for name, door in doors.items()}
    times: dict[str, list[float]] = {name: [] for name in gateways}
    for _ in range(rounds):
        for name, answer in gateways.items():
            times[name].append(microseconds(answer, None))
    return summary(times, OFF)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = scoring(Path(folder), options.rounds, options.calls)
    result["request"] = edge(max(5, options.rounds // 4))
    for what in ("transaction", "request"):
        for name, value in result[what]["microseconds"].items():
            added = result[what]["added"].get(name, 0.0)
            print(f"{what:12} {name:20} {value:8.2f} us  {added:+6.2f}  {result[what]['ratio'].get(name, 1.0):.3f}")
    for name, figures in result["scrape"].items():
        print(f"{'scrape':12} {name:20} {figures['microseconds']:8} us  {figures['bytes']} bytes")
    print(write_result("metrics", {**result, "rounds": options.rounds, "calls": options.calls}))


if __name__ == "__main__":
    sys.exit(main())
