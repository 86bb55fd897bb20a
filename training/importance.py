"""What a trained model uses: permutation importance of every declared input on the validation days.

An input is what a line of [features] names: a numeric or categorical column, a context or ip column with all the numbers
that are read of it, a geo pair. Its importance is by how much the average precision on the validation rows falls when its
raw values are permuted (Breiman 2001, "Random Forests"):

- Permuted are the values as the graph reads them, among all rows of the validation days, labelled or not, of all users:
  a value comes from another row, and its marginal distribution stays. The numbers of a context or ip column, and latitude
  and longitude of a pair, stay together. Each row's permuted value also enters the state that the later rows of its user
  are scored with.
- Not permuted is anything before the validation days: every user enters them with the state that the true history left.
  Other inputs that are worked out from the same column stay as they are: an amount that is permuted as a number still
  counts in the contexts' sums.
- Time is no line of [features]: gaps and the clock are not permuted, for events out of order are no history at all.
- Rows after the validation days are not read.

Inputs that say the same share their importance: each alone can seem useless. `training.selection` therefore drops nothing
without training again.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqfraud.config import FeaturesConfig
from seqfraud.errors import RunError
from seqfraud.metrics import average_precision
from seqfraud.nn.model import SequenceModel
from seqfraud.sequences import Encoded
from training.loop import DeviceData, score_logits, states_after
from training.prepare import Prepared

FILE = "importance.json"
REPEATS = 10
KINDS = ("numeric", "categorical", "context", "ip", "geo")
"""The lists of [features] that name inputs."""

Progress = Callable[[int, int, str], None]
"""Called with (permutations done, of so many, the input that is next)."""


@dataclass(frozen=True)
class Input:
    """One entry of a list of [features]; a geo pair has two columns."""

    kind: str
    columns: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} {'/'.join(self.columns)}"


def inputs_of(features: FeaturesConfig) -> tuple[Input, ...]:
    """Every declared input, list by list."""
    return tuple(
        Input(kind, entry if isinstance(entry, tuple) else (entry,))
        for kind in KINDS
        for entry in getattr(features, kind)
    )


@dataclass(frozen=True)
class Figure:
    """The importance of one input.

    Attributes:
        permuted: average precision of each repeat with the input permuted.
        mean: by how much it falls on average.
        deviation: standard deviation over the repeats.
    """

    input: Input
    permuted: tuple[float, ...]
    mean: float
    deviation: float


@dataclass(frozen=True)
class Importance:
    """What a model uses; `average_precision` is that of the `rows` validation rows as they are.

    `permuted_rows` counts all rows of the validation days; figures come with the most important first.
    """

    average_precision: float
    rows: int
    frauds: int
    permuted_rows: int
    seed: int
    figures: tuple[Figure, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for importance.json."""
        return {"measured_on": "validation rows", "metric": "average_precision", **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "Importance":
        """What `as_dict` gave."""
        figures = tuple(
            Figure(
                Input(f["input"]["kind"], tuple(f["input"]["columns"])),
                tuple(f["permuted"]),
                float(f["mean"]),
                float(f["deviation"]),
            )
            for f in raw["figures"]
        )
        counts = {name: int(raw[name]) for name in ("rows", "frauds", "permuted_rows", "seed")}
        return Importance(average_precision=float(raw["average_precision"]), figures=figures, **counts)


def read_importance(run: Path) -> Importance | None:
    """The importance.json of a run folder; None where there is none. Raises RunError."""
    path = run / FILE
    if not path.is_file():
        return None
    try:
        return Importance.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: cannot be read; run seqfraud importance again") from error


@dataclass(frozen=True)
class ValidationDays:
    """The rows of the validation days alone, and the states with which their users enter them.

    Attributes:
        encoded: the n rows, labelled or not, and their users.
        start: states of those users, by name.
        label: int8 [n].
        labelled: mask [n], the validation rows.
    """

    encoded: Encoded
    start: dict[str, Tensor]
    label: npt.NDArray[np.int8]
    labelled: npt.NDArray[np.bool_]

    def average_precision(self, model: SequenceModel, encoded: Encoded, device: torch.device, events: int) -> float:
        """The model's figure with the columns of `encoded` in place of the true ones."""
        logits = score_logits(model, DeviceData(encoded, device), encoded, events, self.start)
        figure = average_precision(self.label[self.labelled], logits[self.labelled].astype(np.float64))
        assert figure is not None  # `rows_of` refuses validation rows without a fraud
        return figure


def validation_days(model: SequenceModel, prepared: Prepared, device: torch.device) -> ValidationDays:
    """Score the history before the validation days once and keep the states."""
    encoded, split = prepared.encoded, prepared.split
    before = encoded.until(split.validation_start)
    end = encoded.until(split.train_end).end
    users = np.flatnonzero(end > before.end)
    length = (end - before.end)[users]
    rows = np.flatnonzero((encoded.time >= split.validation_start) & (encoded.time < split.train_end))
    history = dataclasses.replace(before, begin=before.begin[users], end=before.end[users])
    return ValidationDays(
        encoded=Encoded(
            time=encoded.time[rows],
            numeric=encoded.numeric[rows],
            categorical=encoded.categorical[rows],
            context=encoded.context[rows],
            begin=np.cumsum(length) - length,
            end=np.cumsum(length),
            arrival=encoded.arrival[rows],
        ),
        start=states_after(model, DeviceData(encoded, device), history, prepared.config.training.events_per_chunk),
        label=prepared.label[rows],
        labelled=prepared.rows.validation[rows],
    )


def measure_importance(
    model: SequenceModel,
    prepared: Prepared,
    device: torch.device,
    repeats: int = REPEATS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Importance:
    """Permute each input in turn, at least twice; repeat i has the same permutation of rows for every input.

    The model is left on `device`.
    """
    model.to(device)
    days = validation_days(model, prepared, device)
    events = prepared.config.training.events_per_chunk
    true = days.average_precision(model, days.encoded, device, events)
    orders = [np.random.default_rng((seed, i)).permutation(len(days.encoded)) for i in range(repeats)]
    figures: list[Figure] = []
    inputs = inputs_of(prepared.config.features)
    for number, one in enumerate(inputs):
        permuted = []
        for i, order in enumerate(orders):
            if progress:
                progress(number * repeats + i, len(inputs) * repeats, str(one))
            changed = with_permuted(days.encoded, prepared, one, order)
            permuted.append(days.average_precision(model, changed, device, events))
        deviation = float(np.std(permuted, ddof=1))
        figures.append(Figure(one, tuple(permuted), true - float(np.mean(permuted)), deviation))
    figures.sort(key=lambda figure: -figure.mean)
    labels = days.label[days.labelled]
    return Importance(true, len(labels), int((labels == 1).sum()), len(days.encoded), seed, tuple(figures))


def with_permuted(encoded: Encoded, prepared: Prepared, one: Input, order: npt.NDArray[np.int64]) -> Encoded:
    """The same rows, but row i has the values of row order[i] in the columns of one input."""
    name, columns = _columns_of(prepared, one)
    values = getattr(encoded, name).copy()
    values[:, columns] = values[order, columns]
    return dataclasses.replace(encoded, **{name: values})


def _columns_of(prepared: Prepared, one: Input) -> tuple[str, slice]:
    """The array of `Encoded` that holds an input, and its columns there."""
    schema = prepared.schema
    if one.kind in ("context", "ip"):
        return "context", prepared.context.numbers_of(schema.entities.index(one.columns[0]))
    if one.kind == "categorical":
        at = schema.categorical.index(one.columns[0])
        return "categorical", slice(at, at + 1)
    at = schema.numeric_inputs.index(one.columns[0])
    return "numeric", slice(at, at + len(one.columns))
