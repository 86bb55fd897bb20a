"""Which inputs a model needs: backward elimination, judged on the validation days.

Doubtful is an input whose mean importance is not above `DEVIATIONS` standard deviations over the repeats. Where an input
says nothing, its true values are one more draw like the permuted ones, so that chance alone rarely lifts it above that;
the standard error of the mean would be too small a measure, for it shrinks with the number of repeats.

All doubtful inputs are dropped together and the model is trained anew without them, from the same seed. If its average
precision on the validation rows is at most `MARGIN` below that of the full model, they stay dropped, the importance of
the others is measured again and the search goes on from there. If not, the less important half of them is tried; that
finds the one to keep of two columns that say the same. At most `TRIALS` models are trained beside the full one, and at
least one input stays. The model is the last that was accepted, so the smallest; no test row has a say.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seqfraud.config import Config
from seqfraud.metrics import average_precision
from training.importance import KINDS, Importance, Input, inputs_of, measure_importance
from training.loop import DeviceData, Fitted, score_logits

DEVIATIONS = 2.0
MARGIN = 0.005
"""Of average precision."""
TRIALS = 4
RULE = (
    f"dropped where permuting it lowers the validation average precision by no more than {DEVIATIONS:g} standard deviations "
    f"and a model trained without is at most {MARGIN:g} below the full model there"
)

Train = Callable[[Config], Fitted]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """A model trained without some inputs.

    Attributes:
        without: all inputs that it lacks.
        average_precision: on the validation rows.
        difference: to the full model, on the validation rows that both have; a dropped column may be one for which the
            cleaning dropped rows.
    """

    without: tuple[Input, ...]
    average_precision: float
    difference: float
    accepted: bool


@dataclass(frozen=True)
class Selection:
    """The model that was chosen, and how.

    Attributes:
        full: importance in the model with all inputs.
        importance: in the chosen model.
    """

    chosen: Fitted
    dropped: tuple[Input, ...]
    full: Importance
    importance: Importance
    trials: tuple[Trial, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for metrics.json."""
        return {
            "rule": RULE,
            "kept": [str(one) for one in inputs_of(self.chosen.prepared.config.features)],
            "dropped": [str(one) for one in self.dropped],
            "full": {
                "average_precision": self.full.average_precision,
                "importance": {str(f.input): {"mean": f.mean, "deviation": f.deviation} for f in self.full.figures},
            },
            "trials": [{**asdict(trial), "without": [str(one) for one in trial.without]} for trial in self.trials],
        }


def select_inputs(config: Config, train: Train, device: torch.device, say: Say | None = None) -> Selection:
    """Train with all inputs of a configuration and drop those that the model does not need.

    Args:
        train: a model by a configuration, on the same data for all.
        say: called with words about every step.
    """

    def measured(fitted: Fitted) -> Importance:
        return measure_importance(fitted.model, fitted.prepared, device)

    tell = say or (lambda _: None)
    chosen = train(config)
    true = validation_scores(chosen, device)
    whole = importance = measured(chosen)
    dropped: tuple[Input, ...] = ()
    trials: list[Trial] = []
    candidates = doubtful(importance)
    while candidates and len(trials) < TRIALS:
        without = (*dropped, *candidates)
        if any(set(trial.without) == set(without) for trial in trials):  # refused before, on the way to fewer
            candidates = candidates[: len(candidates) // 2]
            continue
        tell(f"training without {', '.join(map(str, without))}")
        reduced = train(without_inputs(config, without))
        trial = _tried(without, true, validation_scores(reduced, device))
        trials.append(trial)
        tell(
            f"validation average precision {trial.average_precision:.4f}, {trial.difference:+.4f} to the full model: "
            f"{'dropped' if trial.accepted else 'kept'}"
        )
        if trial.accepted:
            chosen, dropped, importance = reduced, without, measured(reduced)
            candidates = doubtful(importance)
        else:
            candidates = candidates[: len(candidates) // 2]
    return Selection(chosen, dropped, whole, importance, tuple(trials))


def doubtful(importance: Importance) -> tuple[Input, ...]:
    """Inputs that may be of no use, the least important first; never all."""
    found = [f.input for f in reversed(importance.figures) if f.mean <= DEVIATIONS * f.deviation]
    return tuple(found[: len(importance.figures) - 1])


def without_inputs(config: Config, dropped: Iterable[Input]) -> Config:
    """The configuration with these inputs out of [features]; what [data] names stays."""
    gone = set(dropped)
    kept: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for one in inputs_of(config.features):
        if one not in gone:
            kept[one.kind].append(one.columns if one.kind == "geo" else one.columns[0])
    lists: dict[str, Any] = {kind: tuple(entries) for kind, entries in kept.items()}
    return replace(config, features=replace(config.features, **lists))


@dataclass(frozen=True)
class Scores:
    """The n validation rows of a model: row in the file int64 [n], label int8 [n], logit float64 [n]."""

    file_row: npt.NDArray[np.int64]
    label: npt.NDArray[np.int8]
    logit: npt.NDArray[np.float64]

    def average_precision(self, at: npt.NDArray[np.int64] | slice = slice(None)) -> float:
        """Of some of the rows; 0 where there is no fraud among them."""
        return average_precision(self.label[at], self.logit[at]) or 0.0


def validation_scores(fitted: Fitted, device: torch.device) -> Scores:
    """Scores of the validation rows; nothing later is scored."""
    prepared = fitted.prepared
    encoded, rows = prepared.encoded, prepared.rows.validation
    logits = score_logits(
        fitted.model.to(device),
        DeviceData(encoded, device),
        encoded.until(prepared.split.train_end),
        prepared.config.training.events_per_chunk,
    )
    file_row = prepared.table.file_row[encoded.arrival[rows]]
    return Scores(file_row, prepared.label[rows], logits[rows].astype(np.float64))


def _tried(without: tuple[Input, ...], full: Scores, reduced: Scores) -> Trial:
    _, mine, theirs = np.intersect1d(reduced.file_row, full.file_row, assume_unique=True, return_indices=True)
    difference = reduced.average_precision(mine) - full.average_precision(theirs)
    return Trial(without, reduced.average_precision(), difference, difference >= -MARGIN)
