"""What each part of the model brings: the handbook's first fold, setting "all", one thing taken away at a time.

    python -m benchmarks.quality.ablation [--seeds 1] [--only LINE]
    python -m benchmarks.quality.ablation --validation [--epochs N]

Protocol and settings are those of `benchmarks.quality.handbook`; nothing is chosen anew for a line. Each line has its average
precision, and the whole model's minus its own on the same rows, bootstrapped by customer.

"history: last N" is the whole model, not trained anew: the state before every test event is made from the N events of the
customer before it alone. Writes benchmarks/results/ablation_quality.json line by line: one that is there is not made again,
only the whole model is trained again for what is missing.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.processes import RESULTS, environment
from benchmarks.quality.fitting import fit_gru
from benchmarks.quality.handbook import DATA, FOLDS, VALIDATION_FOLD, Fold, read_fold
from benchmarks.quality.results import GRU, kept
from benchmarks.quality.variants import WithoutRecurrence, limited_logits, without_run_state
from seqfraud.config import Config
from seqfraud.files import replaced_file
from seqfraud.metrics import bootstrap_interval, paired_bootstrap
from seqfraud.nn.model import SequenceModel
from training.prepare import Prepared, prepare

RESULT = "ablation_quality.json"
SETTING = "all"
WHOLE = "whole"
HISTORIES = (5, 20, 100)
HIDDEN = (32, 128)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """What is trained in place of the whole model: another kind of model, configuration or input."""

    kind: type[SequenceModel] = SequenceModel
    config: Callable[[Config], Config] | None = None
    inputs: Callable[[Prepared], Prepared] | None = None

    def prepared(self, whole: Prepared, data: Path) -> Prepared:
        """The data as this variant sees them; read anew only where the configuration names other columns."""
        config = whole.config if self.config is None else self.config(whole.config)
        if config.features != whole.config.features:
            return prepare(config, data)
        seen = replace(whole, config=config)
        return seen if self.inputs is None else self.inputs(seen)


def _without_forecast(config: Config) -> Config:
    return replace(config, model=replace(config.model, forecast=False))


def _without_context(config: Config) -> Config:
    return replace(config, features=replace(config.features, context=(), ip=()))


def _hidden(units: int, config: Config) -> Config:
    return replace(config, model=replace(config.model, hidden=units))


TRAINED: dict[str, Variant] = {
    WHOLE: Variant(),
    "without recurrence": Variant(kind=WithoutRecurrence),
    "without forecast": Variant(config=_without_forecast),
    "without context": Variant(config=_without_context),
    "without run state": Variant(inputs=without_run_state),
    **{f"hidden size {units}": Variant(config=partial(_hidden, units)) for units in HIDDEN},
}
LIMITED = {f"history: last {last}": last for last in HISTORIES}
"""Lines of the whole model as it was trained."""
LINES = (*TRAINED, *LIMITED)


def made_lines(fold: Fold, wanted: Sequence[str], data: Path = DATA) -> Iterator[dict[str, Any]]:
    """Each wanted line of the result; the whole model is trained first, as every line is compared with it."""
    began = time.perf_counter()
    fitted = fit_gru(fold.prepared)
    rows = np.flatnonzero(fold.test)
    whole = fitted.logit[rows]
    for line in wanted:
        if line in LIMITED:
            logit = limited_logits(fitted.model, fold.prepared, rows, LIMITED[line])
        elif line != WHOLE:
            variant = TRAINED[line]
            logit = fit_gru(variant.prepared(fold.prepared, data), variant.kind).logit[rows]
        else:
            logit = whole
        yield {**_measured(fold, line, logit, whole), "seconds": round(time.perf_counter() - began, 1)}
        began = time.perf_counter()


def _measured(fold: Fold, line: str, logit: Floats, whole: Floats) -> dict[str, Any]:
    """A line of the result from the logits [n] of the test rows and the whole model's."""
    label, user = fold.prepared.label[fold.test], fold.user[fold.test]
    own = bootstrap_interval("average_precision", label, logit, user)
    difference = paired_bootstrap("average_precision", label, whole, logit, user)
    assert own is not None
    assert difference is not None
    return {
        "line": line,
        "fold": fold.first,
        "seed": fold.seed,
        "rows": len(label),
        "frauds": int((label == 1).sum()),
        "average_precision": vars(own),
        "whole_minus_this": None if line == WHOLE else vars(difference),
    }


def keep(file: Path, row: dict[str, Any]) -> None:
    """Add a line to the result."""
    rows = sorted([*kept(file, "lines"), row], key=lambda r: (r["seed"], LINES.index(r["line"])))
    with replaced_file(file) as temporary:
        result = {**environment(), "setting": SETTING, **_comparison(rows), "lines": rows}
        temporary.write_text(json.dumps(result, indent=1) + "\n")


def _comparison(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lines of the first seed as the page shows them (`results.Comparison`)."""
    models: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for row in rows:
        if row["seed"] == rows[0]["seed"]:
            name, own, less = (
                GRU if row["line"] == WHOLE else row["line"],
                row["average_precision"],
                row["whole_minus_this"],
            )
            models[name] = {
                "rows": row["rows"],
                "frauds": row["frauds"],
                "average_precision": own["estimate"],
                "interval": [own["low"], own["high"]],
            }
            if less is not None:
                differences[name] = {"average_precision": less["difference"], "low": less["low"], "high": less["high"]}
    return {"models": models, "differences": differences, "note": f"Handbook, {SETTING}, {rows[0]['fold']}."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", choices=LINES, action="append", metavar="LINE", help=f"one of: {', '.join(LINES)}")
    parser.add_argument(
        "--epochs", type=int, help="another number than the one that was chosen, with --validation only"
    )
    parser.add_argument(
        "--validation", action="store_true", help="the week that settings are chosen on; writes nothing"
    )
    options = parser.parse_args()
    if options.epochs is not None and not options.validation:
        parser.error("--epochs goes with --validation: the test fold has the number that was chosen")
    wanted = options.only or list(LINES)
    file = RESULTS / RESULT
    for seed in range(options.seeds):
        made = [] if options.validation else [row["line"] for row in kept(file, "lines") if row["seed"] == seed]
        missing = [line for line in wanted if line not in made]
        if not missing:
            continue
        fold = read_fold(SETTING, VALIDATION_FOLD if options.validation else FOLDS[0], seed)
        if options.epochs is not None:
            training = replace(fold.prepared.config.training, epochs=options.epochs)
            config = replace(fold.prepared.config, training=training)
            fold = replace(fold, prepared=replace(fold.prepared, config=config))
        for row in made_lines(fold, missing):
            print(json.dumps(row), flush=True)
            if not options.validation:
                keep(file, row)


if __name__ == "__main__":
    main()
