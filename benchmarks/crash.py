"""Kill -9 under load: is everything that was acknowledged there, and every score that of an uninterrupted run?

    python -m benchmarks.crash [--kills 200] [--seed 0] [--promise process|disk]        # make crash

Clients post transactions (late ones among them), batches and labels to a real service, which is killed at random moments,
also while it starts. After every restart each acknowledged transaction is posted again and must come back as a duplicate
with its first answer. At the end all answers are compared with `seqfraud score --state`, which works them out anew from the
journal in its order, contexts included. Writes benchmarks/results/crash.json.
"""

import argparse
import json
import random
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet

from benchmarks.drawn import CARDS, drawn_bundle
from benchmarks.processes import address, command, start_service, write_result
from seqfraud.config import parse_config
from seqfraud.errors import RunError
from serve.replay import Client

CLIENTS = 6
START = 1_600_000_000_000
MINUTE = 60_000
TOLERANCE = 1e-5
LONGEST_LIFE_S = 0.8
IN_START = 0.15
"""Share of the kills that come while the service starts."""


@dataclass
class Outcome:
    """What a crash test found; `lost`, `changed` and `labels_lost` have to be 0."""

    kills: int = 0
    killed_in_start: int = 0
    acknowledged: int = 0
    acknowledged_late: int = 0
    journalled: int = 0
    lost: int = 0
    changed: int = 0
    labels_acknowledged: int = 0
    labels_lost: int = 0
    rechecked: int = 0
    largest_difference: float = 0.0
    seconds: float = 0.0


class Workload:
    """Requests in order of their making, and what was acknowledged. Thread-safe."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._clock = START
        self._made = 0
        self.rows: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, dict[str, Any]] = {}
        self.fresh: list[str] = []
        """Acknowledged since the last check."""
        self.labels: dict[str, bool] = {}
        """The newest acknowledged label by transaction."""
        self.labels_acknowledged = 0

    def next(self, with_labels: bool) -> tuple[str, Any]:
        """Path and content of a new request."""
        with self._lock:
            rng = self._random
            if with_labels and self.answers and rng.random() < 0.4:
                return "/v1/labels", self._labels()
            if rng.random() < 0.1:
                return "/v1/score/batch", [self._row() for _ in range(rng.randint(1, 8))]
            return "/v1/score", self._row()

    def _row(self) -> dict[str, Any]:
        rng = self._random
        self._clock += rng.choice([0, 1, 1, 2, 5]) * MINUTE
        back = rng.choice([2, 10, 60, 5000]) * MINUTE if rng.random() < 0.05 else 0
        identity = f"t{self._made}"
        self._made += 1
        row = {
            "id": identity,
            "user": f"u{rng.randrange(60)}",
            "time": self._clock - back,
            "amount": round(rng.lognormvariate(3, 1.5), 2),
            "kind": rng.choice(["food", "fuel", "7", "never heard of"]),
            "merchant": f"m{rng.randrange(12)}",
            "device": f"d{rng.randrange(40)}",
        }
        self.rows[identity] = row
        return row

    def _labels(self) -> list[dict[str, Any]]:
        known = list(self.answers)[-400:]
        chosen = self._random.sample(known, min(len(known), self._random.randint(1, 3)))
        after = self._random.choice([1, 10, 100]) * MINUTE
        return [
            {"transaction_id": i, "is_fraud": self._random.random() < 0.8, "known_at": self._clock + after}
            for i in chosen
        ]

    def acknowledge(self, path: str, content: Any, answer: Any) -> None:
        """Note what the service answered with 200."""
        with self._lock:
            if path == "/v1/labels":
                self.labels |= {label["transaction_id"]: label["is_fraud"] for label in content}
                self.labels_acknowledged += len(content)
                return
            for one in [answer] if path == "/v1/score" else answer["results"]:
                if "error" in one:
                    raise RuntimeError(f"a transaction was refused: {one}")
                self.answers[one["transaction_id"]] = {**one, "duplicate": False}
                self.fresh.append(one["transaction_id"])


@dataclass
class Post:
    """One client: a thread that posts until the service is gone, then leaves what was not answered."""

    url: str
    workload: Workload
    with_labels: bool
    """One client says them all, so that the newest of a transaction is known."""
    again: tuple[str, Any] | None = None
    """A request that was not answered in the life before: it is posted again first."""
    failed: list[BaseException] = field(default_factory=list)

    def run(self) -> None:
        """Post until nobody answers."""
        client = Client(self.url)
        while True:
            path, content = self.again or self.workload.next(self.with_labels)
            self.again = (path, content)
            try:
                status, answer = client.call("POST", path, content)
            except RunError:
                return
            try:
                if status != 200:
                    raise RuntimeError(f"{path}: {status} {answer}")
                self.workload.acknowledge(path, content, answer)
            except BaseException as error:
                self.failed.append(error)
                return
            self.again = None


def crash(bundle: Path, state: Path, kills: int, seed: int, scores: Path, options: tuple[str, ...] = ()) -> Outcome:
    """Kill a service over an empty state folder `kills` times, then compare everything."""
    began = time.perf_counter()
    rng = random.Random(seed)
    workload, outcome = Workload(seed), Outcome()
    unanswered: list[tuple[str, Any] | None] = [None] * CLIENTS
    while outcome.kills < kills:
        process = start_service(bundle, state, *options)
        try:
            if rng.random() < IN_START:
                time.sleep(rng.uniform(0.3, 0.9))
                outcome.killed_in_start += 1
            else:
                url = address(process)
                _recheck(Client(url), workload, outcome)
                unanswered = _post_until_killed(url, workload, unanswered, process, rng.uniform(0.01, LONGEST_LIFE_S))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        outcome.kills += 1
    _finish(bundle, state, workload, unanswered, outcome, scores, options)
    outcome.seconds = round(time.perf_counter() - began, 1)
    return outcome


def _post_until_killed(
    url: str,
    workload: Workload,
    unanswered: list[tuple[str, Any] | None],
    process: subprocess.Popen[str],
    seconds: float,
) -> list[tuple[str, Any] | None]:
    """Let the clients post, kill the service after some seconds; what each client has no answer to."""
    posts = [Post(url, workload, number == 0, again) for number, again in enumerate(unanswered)]
    threads = [threading.Thread(target=post.run) for post in posts]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join()
    for post in posts:
        for error in post.failed:
            raise error
    return [post.again for post in posts]


def _recheck(client: Client, workload: Workload, outcome: Outcome) -> None:
    """Post what was acknowledged since the last check again: duplicates with their first answers."""
    for identity in workload.fresh:
        status, answer = client.call("POST", "/v1/score", workload.rows[identity])
        outcome.rechecked += 1
        if status != 200 or not answer["duplicate"]:
            outcome.lost += 1
        elif {**answer, "duplicate": False} != workload.answers[identity]:
            outcome.changed += 1
    workload.fresh.clear()


def _finish(
    bundle: Path,
    state: Path,
    workload: Workload,
    unanswered: list[tuple[str, Any] | None],
    outcome: Outcome,
    scores: Path,
    options: tuple[str, ...],
) -> None:
    """One more life, in which everything is checked and which ends with SIGTERM; then the offline run."""
    process = start_service(bundle, state, *options)
    try:
        client = Client(address(process))
        for path, content in filter(None, unanswered):
            workload.acknowledge(path, content, client.call("POST", path, content)[1])
        workload.fresh = list(workload.answers)
        _recheck(client, workload, outcome)
        # a label that is there is unchanged when it is said again
        again = [{"transaction_id": i, "is_fraud": fraud, "known_at": START} for i, fraud in workload.labels.items()]
        if again:
            heard = client.call("POST", "/v1/labels", again)[1]
            outcome.labels_lost = len(again) - heard["unchanged"]
        process.terminate()
        if process.wait(60) != 0:
            raise RuntimeError(f"the service ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()
    command("score", bundle, "--state", state, "--out", scores)
    table = pyarrow.parquet.read_table(scores)
    offline = dict(zip(table["transaction_id"].to_pylist(), table["fraud_probability"].to_pylist(), strict=True))
    outcome.acknowledged = len(workload.answers)
    outcome.acknowledged_late = sum(answer["late"] for answer in workload.answers.values())
    outcome.labels_acknowledged = workload.labels_acknowledged
    outcome.journalled = len(offline)
    outcome.lost += sum(identity not in offline for identity in workload.answers)
    outcome.largest_difference = max(
        abs(answer["fraud_probability"] - offline[identity])
        for identity, answer in workload.answers.items()
        if identity in offline
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--promise", default="process")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seqfraud-crash-") as folder:
        work = Path(folder)
        bundle = drawn_bundle(work / "bundle", parse_config(CARDS, "crash"), (), args.seed, 2.5).path
        options = ("--promise", args.promise, "--snapshot-seconds", "0.2")
        outcome = crash(bundle, work / "state", args.kills, args.seed, work / "scores.parquet", options)
    result = {"promise": args.promise, "seed": args.seed, **asdict(outcome)}
    write_result("crash", result)
    print(json.dumps(result, indent=1))
    if outcome.lost or outcome.changed or outcome.labels_lost or not outcome.largest_difference <= TOLERANCE:
        raise SystemExit("something acknowledged was lost or changed")


if __name__ == "__main__":
    main()
