"""What several networks in one graph cost a transaction (`model.members`): the same service with one, three and five.

    python -m benchmarks.members [--rounds 5]

Writes benchmarks/results/members.json. Microseconds of CPU time of the scoring thread per transaction, each the least of some
rounds; the services get each transaction in turn and approve it, so that nothing is explained. Drawn weights; 64 units a network.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawn import drawn_bundle
from benchmarks.processes import write_result
from benchmarks.reasons import CONFIG, MEASURED, USERS, figures, rows, timed
from seqfraud.bundle import Bundle
from seqfraud.config import parse_config
from seqfraud.policy import NEVER, Policy, Thresholds
from serve.service import Service

MEMBERS = (1, 3, 5)


def one_round(bundles: dict[int, Bundle], folder: Path, posted: list[bytes]) -> dict[int, list[float]]:
    """Microseconds by number of networks and transaction."""
    services = {n: Service(bundle, folder / str(n), snapshot_every=None) for n, bundle in bundles.items()}
    out: dict[int, list[float]] = {n: [] for n in services}
    for number, body in enumerate(posted):
        first = number % len(MEMBERS)
        for n in MEMBERS[first:] + MEMBERS[:first]:
            took, _ = timed(lambda n=n, body=body: services[n].score(body))  # type: ignore[misc]
            out[n].append(took)
    for service in services.values():
        service.abandon()
    return out


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    posted, measured = rows(), slice(-USERS * MEASURED, None)
    policy = Policy(Thresholds(is_fraud=0.6, review=NEVER, decline=NEVER))
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        for n in MEMBERS:
            config = parse_config(CONFIG + f"members = {n}\n", "members")
            bundle = drawn_bundle(Path(folder) / f"bundle{n}", config, (), 0, 2.5)
            bundles[n] = replace(bundle, manifest=replace(bundle.manifest, policy=policy))
        every = [one_round(bundles, Path(folder) / str(number), posted) for number in range(rounds)]
    found: dict[int, dict[str, Any]] = {}
    for n in MEMBERS:
        least = np.min([one[n][measured] for one in every], axis=0)
        graph = bundles[n].manifest.graph
        width = sum(int(np.prod(s.row_shape, dtype=int)) * np.dtype(s.dtype).itemsize for s in graph.states)
        found[n] = {**figures(least), "state_bytes_a_user": width}
    write_result(
        "members",
        {
            "rounds": rounds,
            "transactions": USERS * MEASURED,
            "microseconds": {str(n): one for n, one in found.items()},
            "ratio_p50": {str(n): round(found[n]["p50"] / found[1]["p50"], 3) for n in MEMBERS},
        },
    )


if __name__ == "__main__":
    main()
