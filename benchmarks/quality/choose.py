"""Which settings of the GRU do best on weeks before the test folds: the handbook, one candidate at a time.

    python -m benchmarks.quality.choose [--only NAME] [--seed 0]

Protocol of `benchmarks.quality.handbook` on the train weeks that begin 2018-06-20, 06-27 and 07-04, whose test weeks end where
the first test fold begins; setting "all". Writes benchmarks/results/handbook_choice.json run by run: one that is there is not made
again. What is used stands in `handbook.ALL`.
"""

import argparse
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import RESULTS, environment
from benchmarks.quality.fitting import fit_gru
from benchmarks.quality.handbook import Fold, measured, read_fold, seeded
from benchmarks.quality.results import kept
from seqfraud.files import replaced_file

RESULT = "handbook_choice.json"
SETTING = "all"
WEEKS = ("2018-06-20", "2018-06-27", "2018-07-04")


@dataclass(frozen=True)
class Candidate:
    """What a candidate has in place of the setting's own `[model]` and `[training]`."""

    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def of(self, fold: Fold) -> Fold:
        config = fold.prepared.config
        config = replace(
            config, model=replace(config.model, **self.model), training=replace(config.training, **self.training)
        )
        return replace(fold, prepared=replace(fold.prepared, config=config))


def _of_all(forecast: bool, hidden: int, weight_decay: float = 0.01, **training: Any) -> Candidate:
    return Candidate({"forecast": forecast, "hidden": hidden}, {"weight_decay": weight_decay, **training})


CANDIDATES: dict[str, Candidate] = {
    "forecast, 64 units": _of_all(True, 64),
    "64 units": _of_all(False, 64),
    "32 units": _of_all(False, 32),
    "128 units": _of_all(False, 128),
    "64 units, 12 epochs": _of_all(False, 64, epochs=12),
    "64 units, dropout": _of_all(False, 64, dropout=0.2),
    "64 units, decay": _of_all(False, 64, 0.1),
    "64 units, more decay": _of_all(False, 64, 0.3),
    "64 units, most decay": _of_all(False, 64, 1.0),
}
"""For "all". The rest is the setting's own."""


def keep(file: Path, row: dict[str, Any]) -> None:
    """Add a run; the means are over the weeks that a candidate has."""
    rows = sorted([*kept(file, "runs"), row], key=lambda r: (r["setting"], r["candidate"], r["seed"], r["fold"]))
    means = {}
    for name in {(r["setting"], r["candidate"]) for r in rows}:
        mine = [r["average_precision"] for r in rows if (r["setting"], r["candidate"]) == name]
        means[" / ".join(name)] = {"average_precision": float(np.mean(mine)), "runs": len(mine)}
    with replaced_file(file) as temporary:
        result = {**environment(), "means": dict(sorted(means.items())), "runs": rows}
        temporary.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CANDIDATES), action="append", metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    file = RESULTS / RESULT
    for first in WEEKS:
        made = {(r["setting"], r["candidate"], r["fold"], r["seed"]) for r in kept(file, "runs")}
        wanted = [name for name in options.only or CANDIDATES if (SETTING, name, first, options.seed) not in made]
        if not wanted:
            continue
        fold = seeded(read_fold(SETTING, first, 0), options.seed)
        for name in wanted:
            began = time.perf_counter()
            logit = fit_gru(CANDIDATES[name].of(fold).prepared).logit
            row = {"candidate": name, **measured(fold, logit), "seconds": round(time.perf_counter() - began, 1)}
            print(json.dumps(row), flush=True)
            keep(file, row)


if __name__ == "__main__":
    main()
