"""How much several networks in one model give on Sparkov (`model.members`), on months before the test.

    python -m benchmarks.quality.members

The configuration of Sparkov with its validation days from 2020-01-01 on: fitted until the end of 2019, the epoch chosen and
everything measured on 2020-01-01 to 2020-06-13. Networks of one model are fitted each by itself, so that what one, two
and three of them say comes from one fit. Writes benchmarks/results/sparkov_members.json.
"""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import DATA, RESULTS, ROOT, environment
from benchmarks.quality.fitting import fit_to_validation, logits_until
from benchmarks.quality.results import SPARKOV_MEMBERS
from seqfraud.config import Duration, load_config, parse_instant
from seqfraud.files import replaced_file
from seqfraud.graph import gru_graph
from seqfraud.metrics import average_precision, recall_at_fpr
from seqfraud.nn.model import SequenceModel
from training.prepare import Prepared, prepare

MEMBERS = 3
FROM = "2020-01-01"
FPR = 0.01


def read(config_path: Path, data: Path) -> Prepared:
    """The data with validation days from FROM on and MEMBERS networks."""
    config = load_config(config_path)
    split, model = config.split, replace(config.model, members=MEMBERS)
    days = Duration(split.train_end - parse_instant(FROM))
    return prepare(replace(config, split=replace(split, validation=days), model=model), data)


def alone(model: SequenceModel, member: int, prepared: Prepared) -> SequenceModel:
    """One of a model's networks as a model."""
    spec = replace(model.spec, members=1)
    one = SequenceModel(spec, gru_graph(prepared.schema, prepared.context, spec.layers, spec.state_width))
    one.encoder.load_state_dict(model.encoder.state_dict())
    one.networks[0].load_state_dict(model.networks[member].state_dict())
    return one.to(next(model.parameters()).device)


def main() -> None:
    """Fit, measure and write the result."""
    prepared = read(ROOT / "configs" / "sparkov.toml", DATA / "sparkov_gen.parquet")
    tuned = fit_to_validation(prepared)
    rows = prepared.rows.validation
    label, end = prepared.label[rows], prepared.split.train_end
    each = [logits_until(alone(tuned.model, i, prepared), prepared, end)[rows] for i in range(MEMBERS)]
    measured: list[dict[str, Any]] = []
    for count in range(1, MEMBERS + 1):
        for which in combinations(range(MEMBERS), count):
            logit = np.mean([each[i] for i in which], axis=0)
            figures = {"average_precision": average_precision(label, logit), "recall": recall_at_fpr(label, logit, FPR)}
            measured.append({"networks": list(which), **figures})
            print(json.dumps(measured[-1]), flush=True)
    result = {
        "from": FROM,
        "rows": int(rows.sum()),
        "frauds": int((label == 1).sum()),
        "epoch": tuned.epochs,
        "false_positive_rate": FPR,
        "measured": measured,
    }
    with replaced_file(RESULTS / f"{SPARKOV_MEMBERS}.json") as temporary:
        temporary.write_text(json.dumps({**environment(), **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
