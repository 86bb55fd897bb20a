"""Read, clean, order, split, fit vocabularies and scaling on training rows, encode: all before the first step."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.tree import DecisionTreeClassifier

from seqfraud.cleaning import clean
from seqfraud.config import Config
from seqfraud.context import NEVER, ContextSpec, context_spec
from seqfraud.errors import DataError
from seqfraud.graph import GraphSpec, gru_graph
from seqfraud.identifiers import is_hashed, treatments
from seqfraud.nn.model import UNKNOWN, EventEncoder, ModelSpec, signed_log
from seqfraud.reading import read_transactions
from seqfraud.schema import Schema, schema_of
from seqfraud.sequences import Encoded, encode
from seqfraud.table import Transactions
from seqfraud.vocabulary import Vocabulary, fit_vocabulary
from training.split import Rows, Split, later_split, rows_of, split_of

FIT_ROWS = 500_000
"""Rows at most from which scaling and bins are fitted; a random sample of the training rows beyond that."""
FEWEST_IN_STEP = 20
LEAST_FRAUD_SHARE = 0.03
"""Of the frauds: at least so many rows lie on either side of a step."""
NARROWEST_BIN = 1e-3
NARROWEST_SHARE = 0.02
"""A bin is at least 0.001 + 2 % of its edge wide, on the scale of the signed logarithm. Two implementations of a
logarithm differ by one unit in the last place, which a narrower bin would amplify into visible differences between
graphs."""
SENTINEL = -float(np.log1p(-UNKNOWN))
"""Signed logarithm of UNKNOWN."""


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs. Masks and labels are over encoded rows (by user), not over arrivals."""

    config: Config
    schema: Schema
    context: ContextSpec
    vocabularies: tuple[Vocabulary, ...]
    table: Transactions
    split: Split
    encoded: Encoded
    rows: Rows
    label: npt.NDArray[np.int8]
    cleaning: dict[str, Any]


def prepare(
    config: Config, data: Path, vocabularies: tuple[Vocabulary, ...] | None = None, later: bool = False
) -> Prepared:
    """Read `data` by the configuration and encode it; with `vocabularies` nothing is fitted.

    With `later` the data are others than those of the training: every labelled row from the start of the test on is a
    test row, and train and validation rows need not be there.
    """
    schema = schema_of(config)
    if config.data.label is None:
        raise DataError("training needs labels: the configuration has no data.label")
    table, problems = read_transactions(data, schema, config.data)
    table, cleaning = clean(table, problems, config.cleaning)
    split = later_split(config, table) if later else split_of(config, table)
    rows = rows_of(split, table, config.data.label_delay, fitting=not later)
    spec = context_spec(config, schema)
    if vocabularies is None:
        vocabularies = _fit_vocabularies(config, table, rows.before_validation, cleaning)
    encoded = encode(table, vocabularies, spec)
    by_user = Rows(**{name: mask[encoded.arrival] for name, mask in vars(rows).items()})
    assert table.label is not None
    return Prepared(
        config, schema, spec, vocabularies, table, split, encoded, by_user, table.label[encoded.arrival], cleaning
    )


def _fit_vocabularies(
    config: Config, table: Transactions, fitting: npt.NDArray[np.bool_], cleaning: dict[str, Any]
) -> tuple[Vocabulary, ...]:
    """Vocabularies without what the service would hash; the rows that this concerns are added to the cleaning report."""
    policy = treatments(table.schema, config.identifiers)
    out = []
    for column in table.schema.categorical:
        texts, hashed = table.text(column), partial(is_hashed, policy[column])
        out.append(fit_vocabulary(column, texts.take(fitting), config.features.min_count, hashed))
        cards = np.array([hashed(text) for text in texts.values] + [False])[texts.codes]
        if cards.any():
            first = int(table.file_row[np.argmax(cards)]) + 1
            cleaning["findings"].append(
                {
                    "reason": "looks like a card number",
                    "column": column,
                    "rows": int(cards.sum()),
                    "share": int(cards.sum()) / cleaning["rows_read"],
                    "action": "unseen value in the vocabulary; see identifiers.columns",
                    "examples": [f"row {first}"],
                }
            )
    return tuple(out)


@dataclass(frozen=True)
class Scaling:
    """Fitted constants of the EventEncoder: means and deviations [V], bins [P], steps [S], fill values [F]."""

    mean: npt.NDArray[np.float32]
    inverse_std: npt.NDArray[np.float32]
    bin_value: npt.NDArray[np.int64]
    bin_scale: npt.NDArray[np.float32]
    bin_low: npt.NDArray[np.float32]
    step_value: npt.NDArray[np.int64]
    step_threshold: npt.NDArray[np.float32]
    fill: npt.NDArray[np.float32]

    def apply(self, encoder: EventEncoder) -> None:
        """Copy the constants into the module's buffers."""
        for name, value in vars(self).items():
            getattr(encoder, name).copy_(torch.from_numpy(value))


def fit_scaling(prepared: Prepared, refit: bool = False) -> tuple[Scaling, ModelSpec, GraphSpec]:
    """Means, deviations, quantile bins and steps of the training rows' values, and the shapes that follow from them.

    With `refit` the validation rows are training rows too.
    """
    config, schema, encoded = prepared.config, prepared.schema, prepared.encoded
    fitted = prepared.rows.fitted(refit)
    rows = np.flatnonzero(prepared.rows.before_validation | fitted)
    if len(rows) > FIT_ROWS:
        rows = np.sort(np.random.default_rng(0).choice(rows, FIT_ROWS, replace=False))
    places = len(schema.geo)
    plain = len(schema.numeric_inputs) - 2 * places
    numeric = encoded.numeric[rows]
    # history counts too: a column that began before train_start; geo columns say it through the distance
    earlier = encoded.time < prepared.split.validation_start
    missing = tuple(np.flatnonzero(np.isnan(encoded.numeric[earlier, :plain]).any(axis=0)).tolist())
    fill = np.zeros(numeric.shape[1], dtype=np.float32)
    for i, column in enumerate(schema.numeric_inputs):
        present = numeric[~np.isnan(numeric[:, i]), i]
        if len(present) == 0:
            raise DataError(f"column {column!r} has no value in the training rows")
        fill[i] = np.median(present)
    sketch = ModelSpec(
        numeric=numeric.shape[1],
        places=places,
        context=prepared.context.width,
        vocabularies=tuple(len(v) for v in prepared.vocabularies),
        missing=missing,
        bins=0,
        hidden=config.model.hidden,
        layers=config.model.layers,
        input_width=config.model.input_width,
        head_width=config.model.head_width,
        embedding=config.model.embedding,
        dropout=config.training.dropout,
        forecast=config.model.forecast,
        members=config.model.members,
    )
    values = _values(sketch, fill, encoded, rows)
    # summed in float64: in float32 a column that never changes would seem to
    mean, std = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
    constant = std < 1e-6
    bin_value, bin_scale, bin_low = _bins(values, config.features.bins)
    step_value, step_threshold = _steps(sketch, fill, prepared, np.flatnonzero(fitted))
    scaling = Scaling(
        mean=mean.astype(np.float32),
        inverse_std=np.where(constant, 0.0, 1.0 / np.maximum(std, 1e-6)).astype(np.float32),
        bin_value=bin_value,
        bin_scale=bin_scale,
        bin_low=bin_low,
        step_value=step_value,
        step_threshold=step_threshold,
        fill=fill,
    )
    spec = ModelSpec(**{**sketch.as_dict(), "bins": len(bin_value), "steps": len(step_value)})
    return scaling, spec, gru_graph(schema, prepared.context, spec.layers, spec.state_width)


def _values(
    spec: ModelSpec,
    fill: npt.NDArray[np.float32],
    encoded: Encoded,
    rows: npt.NDArray[np.int64],
    logarithm: bool = True,
) -> npt.NDArray[np.float32]:
    """float32 [n, V]: the encoder's values of some rows, by the encoder itself."""
    encoder = EventEncoder(spec)
    encoder.fill.copy_(torch.from_numpy(fill))
    first = np.zeros(len(encoded), dtype=bool)
    first[encoded.begin] = True
    before = np.maximum(rows - 1, 0)
    previous_time = np.where(first[rows], NEVER, encoded.time[before])
    with torch.no_grad():
        values = encoder.values(
            torch.from_numpy(encoded.time[rows])[:, None],
            torch.from_numpy(encoded.numeric[rows]) if spec.numeric else None,
            torch.from_numpy(encoded.context[rows]) if spec.context else None,
            torch.from_numpy(previous_time)[:, None],
            torch.from_numpy(encoded.numeric[before][:, -2 * spec.places :]) if spec.places else None,
        )
        return (signed_log(values) if logarithm else values).numpy()


def _steps(
    spec: ModelSpec, fill: npt.NDArray[np.float32], prepared: Prepared, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Where the share of frauds changes along each value: the splits of a tree on that value alone, from labelled rows.

    Target-aware bins of Gorishniy et al. 2022 (arXiv 2203.05556), as steps.
    """
    label = prepared.label[rows] == 1
    if len(rows) > FIT_ROWS:
        honest = rows[~label]
        drawn = np.random.default_rng(0).choice(honest, max(FIT_ROWS - int(label.sum()), 1), replace=False)
        weight = len(honest) / len(drawn)
        rows = np.sort(np.r_[rows[label], drawn])
        label = prepared.label[rows] == 1
    else:
        weight = 1.0
    values = _values(spec, fill, prepared.encoded, rows, logarithm=False)
    least = max(FEWEST_IN_STEP, round(LEAST_FRAUD_SHARE * int(label.sum())))
    which: list[int] = []
    thresholds: list[float] = []
    if prepared.config.features.steps and len(rows) >= 2 * least:
        weights = np.where(label, 1.0, weight)
        for v in range(spec.values - 2 * spec.places):  # distances differ in the last place between graphs
            tree = DecisionTreeClassifier(
                criterion="entropy",
                max_leaf_nodes=prepared.config.features.steps + 1,
                min_samples_leaf=least,
                random_state=0,
            ).fit(values[:, v : v + 1], label, sample_weight=weights)
            found = np.unique(tree.tree_.threshold[tree.tree_.children_left >= 0].astype(np.float32))
            which += [v] * len(found)
            thresholds += found.tolist()
    return np.array(which, dtype=np.int64), np.array(thresholds, dtype=np.float32)


def _bins(
    values: npt.NDArray[np.float32], bins: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Edges at quantiles, the highest at .99 and .999, and one bin between "unknown" and the least known value."""
    levels = np.r_[np.linspace(0, 1, bins + 1)[:-1], 0.99, 0.999]
    which, scale, lows = [], [], []
    for v in range(values.shape[1]):
        column = values[:, v]
        known = column[column > SENTINEL + 1e-3] if (column < 0).any() and column.min() > SENTINEL - 1e-3 else column
        edges = np.unique(np.quantile(known, levels)) if len(known) else np.zeros(0)
        if len(known) < len(column):
            edges = np.r_[SENTINEL, edges]
        kept = edges[:1].tolist()
        for edge in edges[1:].tolist():
            if edge - kept[-1] >= NARROWEST_BIN + NARROWEST_SHARE * abs(edge):
                kept.append(edge)
        for low, high in pairwise(kept):
            which.append(v)
            scale.append(1 / (high - low))
            lows.append(low)
    return np.array(which, dtype=np.int64), np.array(scale, dtype=np.float32), np.array(lows, dtype=np.float32)
