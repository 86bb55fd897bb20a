"""Models without a sequence, beside the GRU: same rows, same context columns, tuned on the validation days.

    logistic_regression   the row and its contexts
    random_forest         the row and its contexts
    boosted_trees         also hand-made features of the user's history (`training.history`)
    isolation_forest      the same features, fitted without labels

Each gets six settings from a small grid, fitted on at most TUNE_ROWS train rows and compared by average precision on the
validation rows; the best is fitted on at most FIT_ROWS, calibrated on the validation rows (Platt) and measured on the test
rows. Of more train rows all frauds are fitted and a random part of the honest ones, weighted up accordingly.

The first two have no state; `training.portable` keeps them in the run folder in a form that can be exported.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import torch
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from seqfraud.choosing import choose_policy
from seqfraud.files import replaced_file
from seqfraud.metrics import average_precision, bootstrap_interval, paired_bootstrap
from seqfraud.nn.baseline import COMPARISON, RowFeatures, RowSpec, row_names
from seqfraud.nn.checkpoint import Run
from training.calibrate import platt
from training.history import Features, history_features
from training.loop import pick_device
from training.portable import Portable, keep, sigmoid
from training.prepare import Prepared, prepare
from training.run import all_logits, calibrated, qualities, write_run_report
from training.worth import validation_days

TUNE_ROWS = 15_000
FIT_ROWS = 100_000
SEED = 0
BINS = 255
"""Values of a column that HistGradientBoosting can tell apart; ids with more are given to it as numbers."""
BOUNDS = (1e-4, 0.999)
"""Of a forest's probabilities before the logit. The sums of an exported forest are exact to 1e-7: nearer to 1 that
would show in a logit."""
SCORES = "test_scores.parquet"
GRU = "gru"

Floats = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.floating[Any]]
Parameters = Mapping[str, Any]
Progress = Callable[[str], None]


class Material:
    """The rows that every family is given, and their features, computed once.

    Attributes:
        fitted: int64, the rows that may be fitted, into the encoded rows.
        train: int64, at most about `most` of them, by `drawn_rows`.
        rows: train rows and those to be scored, one after the other.
        history: every feature of these rows, NaN where there is nothing.
    """

    def __init__(self, prepared: Prepared, fitted: Int64, scored: Int64, most: int = FIT_ROWS) -> None:
        self.prepared = prepared
        self.fitted = fitted
        self.train = drawn_rows(prepared, fitted, most)
        self.rows = np.r_[self.train, scored]
        row = self.row()[1]
        past = history_features(prepared.table, prepared.encoded, self.rows)
        ids = (*row.categorical, *(len(row.names) + i for i in past.categorical))
        values = np.hstack([row.values.astype(np.float32), past.values])
        self.history = Features((*row.names, *past.names), values, ids)

    def drawn(self, most: int) -> Int64:
        """Places in `train` of at most about `most` of its rows."""
        return np.searchsorted(self.train, drawn_rows(self.prepared, self.train, most))

    def weights(self, rows: Int64) -> Floats:
        """1 for frauds; for honest ones of these train rows what makes up for those that were not drawn."""
        label = self.prepared.label
        fraud = label[rows] == 1
        return np.where(fraud, 1.0, float((label[self.fitted] == 0).sum()) / max(int((~fraud).sum()), 1))

    def row(self, missing: float | None = None, logarithm: bool = False) -> tuple[RowSpec, Features]:
        """What needs no history, by the module that is exported."""
        prepared = self.prepared
        schema, context = prepared.schema, prepared.context
        spec = RowSpec(len(schema.numeric_inputs), len(schema.categorical), context.width, missing, logarithm)
        inputs = {k: torch.from_numpy(v) for k, v in prepared.encoded.gather(self.rows).items()}
        ids = tuple(range(spec.numbers, spec.width))
        return spec, Features(row_names(schema, context), RowFeatures(spec)(inputs).numpy(), ids)

    def binned(self) -> Features:
        """`history` as ranks: in columns with more than 255 values, among quantiles of the train rows and of the frauds.

        HistGradientBoosting takes few values as its bins and makes quantiles of many itself. Given here they are better,
        as half of them lie where the frauds are, and cheaper: where rows have weights, scikit-learn 1.9 sorts the column
        anew for each quantile, which took nine tenths of a fit.
        """
        label = self.prepared.label[self.train]
        values = np.empty_like(self.history.values)
        for i, column in enumerate(self.history.values.T):
            train = column[: len(self.train)]
            present = ~np.isnan(train)
            if len(np.unique(train[present])) <= BINS:
                values[:, i] = column
                continue
            edges = np.r_[_quantiles(train[present], BINS // 2), _quantiles(train[present & (label == 1)], BINS // 2)]
            values[:, i] = np.where(np.isnan(column), np.nan, np.searchsorted(np.unique(edges), column))
        return Features(self.history.names, values, self.history.categorical)


@dataclass(frozen=True)
class Family:
    """One kind of model: its settings to try, what it sees, how it is built and scored."""

    name: str
    grid: Mapping[str, tuple[Any, ...]]
    inputs: Callable[[Material], tuple[RowSpec | None, Features]]
    build: Callable[[Parameters, Features], Any]
    score: Callable[[Any, Matrix], Floats]
    """A score [n] that rises with fraud, any scale; of a model that can be exported a logit, see `Baseline.bounds`."""
    bounds: tuple[float, float] | None = None

    def trials(self) -> list[dict[str, Any]]:
        """Every setting of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def fit(
        self, parameters: Parameters, features: Features, values: Matrix, label: npt.NDArray[np.int8], weight: Floats
    ) -> Any:
        """The model of `parameters`, fitted to values [n, D] of the features, labels [n] and weights [n]."""
        model = self.build(parameters, features)
        if isinstance(model, Pipeline):
            model.fit(values, label, **{f"{model.steps[-1][0]}__sample_weight": weight})
        else:
            model.fit(values, label, sample_weight=weight)
        return model


def _quantiles(values: Matrix, number: int) -> Matrix:
    """At most `number` of them, ascending, neither the least nor the largest value among them; none of no values."""
    if not len(values):
        return values
    levels = np.linspace(0, 100, number + 2)[1:-1]
    return np.asarray(np.percentile(values, levels, method="averaged_inverted_cdf"))


def known(features: Features) -> Features:
    """Missing values as -1, below every count, age and amount."""
    return Features(features.names, np.nan_to_num(features.values, nan=-1.0), features.categorical)


def _logistic(parameters: Parameters, features: Features) -> Any:
    numbers = [i for i in range(len(features.names)) if i not in features.categorical]
    parts = [("numbers", StandardScaler(), numbers)]
    if features.categorical:
        parts.append(("ids", OneHotEncoder(handle_unknown="ignore"), list(features.categorical)))
    return make_pipeline(ColumnTransformer(parts), LogisticRegression(max_iter=300, random_state=SEED, **parameters))


def _forest(parameters: Parameters, features: Features) -> Any:
    # a power of two: a pure leaf's share of the sum is exact in float32, in which ONNX keeps it
    return RandomForestClassifier(**{"n_estimators": 32, **parameters}, random_state=SEED, n_jobs=-1)


def _boosted(parameters: Parameters, features: Features) -> Any:
    few = [i for i in features.categorical if np.nanmax(features.values[:, i], initial=0) < BINS]
    return HistGradientBoostingClassifier(
        **{"learning_rate": 0.06, "max_iter": 120, **parameters},
        early_stopping=False,
        categorical_features=few,
        random_state=SEED,
    )


def _isolation(parameters: Parameters, features: Features) -> Any:
    return IsolationForest(n_estimators=100, random_state=SEED, n_jobs=-1, **parameters)


def _decision(model: Any, values: Matrix) -> Floats:
    return np.asarray(model.decision_function(values), dtype=np.float64)


def _log_odds(model: Any, values: Matrix) -> Floats:
    p = np.clip(model.predict_proba(values)[:, 1], *BOUNDS)
    return np.asarray(np.log(p / (1 - p)), dtype=np.float64)


def _strangeness(model: Any, values: Matrix) -> Floats:
    return -np.asarray(model.score_samples(values), dtype=np.float64)


FAMILIES = (
    Family(
        "logistic_regression",
        {"C": (0.01, 0.1, 1.0), "class_weight": (None, "balanced")},
        lambda material: material.row(missing=0.0, logarithm=True),
        _logistic,
        _decision,
    ),
    Family(
        "random_forest",
        {"min_samples_leaf": (5, 20, 100), "class_weight": (None, "balanced_subsample")},
        lambda material: material.row(missing=-1.0),
        _forest,
        _log_odds,
        BOUNDS,
    ),
    Family(
        "boosted_trees",
        {"l2_regularization": (1.0, 30.0), "max_leaf_nodes": (7, 15, 31)},
        lambda material: (None, material.binned()),
        _boosted,
        _decision,
    ),
    Family(
        "isolation_forest",
        {"max_samples": (256, 1024, 4096), "max_features": (0.3, 1.0)},
        lambda material: (None, known(material.history)),
        _isolation,
        _strangeness,
    ),
)
"""Six settings each."""


@dataclass(frozen=True)
class Fitted:
    """A tuned and calibrated baseline; `probability` float64 [N] over the encoded rows, NaN where not needed."""

    probability: Floats
    details: dict[str, Any]
    portable: Portable | None
    """Of a model without history."""


def run_baselines(run: Run, data: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Tune, fit and measure every baseline on the rows of a run.

    Writes baselines.json, test_scores.parquet, report.html, and baselines/NAME for those that can be exported.

    Returns:
        Per model the chosen parameters, every trial, seconds, figures on validation and test, and the interval of the
        GRU's average precision minus the model's (bootstrap by user).
    """
    prepared = prepare(run.config, run.data if data is None else data, run.vocabularies)
    device = pick_device("auto")
    run.model.to(device)
    gru = calibrated(run.model, all_logits(run.model, prepared, device))
    test = prepared.rows.test
    label = prepared.label[test]
    users = prepared.table.user.codes[prepared.encoded.arrival[test]]
    models: dict[str, dict[str, Any]] = {}
    scores: dict[str, Floats] = {}
    tried = np.r_[np.flatnonzero(prepared.rows.validation), np.flatnonzero(test)]
    material = Material(prepared, np.flatnonzero(prepared.rows.train), tried)
    # the forest beside the others: it takes as long as they do
    with ThreadPoolExecutor(2) as pool:
        all_fitted = list(pool.map(lambda family: fit_baseline(family, material, progress), FAMILIES))
    for family, fitted in zip(FAMILIES, all_fitted, strict=True):
        scores[family.name] = fitted.probability[test]
        policy = choose_policy(run.config.decision, validation_days(prepared, fitted.probability)).policy
        figures = qualities(prepared, fitted.probability, policy.thresholds)
        if fitted.portable is not None:
            keep(run.path, fitted.portable, prepared, fitted.probability, policy, figures)
        models[family.name] = {
            **fitted.details,
            **policy.as_dict(),
            **figures,
            "interval": _plain(bootstrap_interval("average_precision", label, scores[family.name], users)),
            "gru_minus_this": _plain(
                paired_bootstrap("average_precision", label, gru[test], scores[family.name], users)
            ),
        }
    result = {
        "chosen_on": "validation rows",
        GRU: {
            **qualities(prepared, gru, run.policy.thresholds),
            "interval": _plain(bootstrap_interval("average_precision", label, gru[test], users)),
        },
        "models": models,
    }
    _write(run.path, prepared, scores, result)
    write_run_report(run.path, prepared, gru, run.metrics, run.policy)
    return result


def fit_baseline(family: Family, material: Material, progress: Progress | None = None) -> Fitted:
    """Tune a family on the validation rows, calibrate its best there, score validation and test rows."""
    began = time.perf_counter()
    prepared, train, tuned = material.prepared, material.train, material.drawn(TUNE_ROWS)
    validation, test = np.flatnonzero(prepared.rows.validation), np.flatnonzero(prepared.rows.test)
    spec, features = family.inputs(material)
    parts = np.split(features.values, [len(train), len(train) + len(validation)])
    label = prepared.label
    trials: list[dict[str, Any]] = []
    chosen: dict[str, Any] = {}
    best = -1.0
    for parameters in family.trials():
        model = family.fit(parameters, features, parts[0][tuned], label[train[tuned]], material.weights(train[tuned]))
        figure = average_precision(label[validation], family.score(model, parts[1])) or 0.0
        trials.append({"parameters": parameters, "validation_average_precision": figure})
        if figure > best:
            best, chosen = figure, parameters
        if progress:
            progress(f"{family.name} {len(trials)}/{len(family.trials())}, best {best:.4f}")
    model = family.fit(chosen, features, parts[0], label[train], material.weights(train))
    logits = [family.score(model, part) for part in parts[1:]]
    scale, shift = platt(logits[0], label[validation])
    probability = np.full(len(label), np.nan)
    for at, logit in zip((validation, test), logits, strict=True):
        # float32, as a graph gives it, so that thresholds fall on values that it can give
        probability[at] = sigmoid(scale * logit + shift).astype(np.float32)
    portable = None
    if spec is not None:
        portable = Portable(family.name, spec, family.bounds, model, family.score, scale, shift)
    return Fitted(
        probability,
        {
            "parameters": chosen,
            "trials": trials,
            "features": len(features.names),
            "tuned_rows": len(tuned),
            "fitted_rows": len(train),
            "seconds": round(time.perf_counter() - began, 1),
        },
        portable,
    )


def drawn_rows(prepared: Prepared, rows: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """At most about `most` of the rows, ascending: every fraud and a random part of the honest ones."""
    if len(rows) <= most:
        return rows
    fraud = prepared.label[rows] == 1
    honest = rows[~fraud]
    drawn = np.random.default_rng(SEED).choice(honest, max(most - int(fraud.sum()), 1), replace=False)
    return np.sort(np.r_[rows[fraud], drawn])


def _write(folder: Path, prepared: Prepared, scores: Mapping[str, Floats], result: Mapping[str, Any]) -> None:
    arrival = prepared.encoded.arrival[prepared.rows.test]
    columns: dict[str, Any] = {
        "transaction_id": pa.array(prepared.table.take(arrival).id_texts(), pa.string()),
        "label": pa.array(prepared.label[prepared.rows.test]),
    }
    columns |= {name: pa.array(values) for name, values in scores.items()}
    with replaced_file(folder / SCORES) as file:
        pa.parquet.write_table(pa.table(columns), file)
    with replaced_file(folder / COMPARISON) as file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _plain(interval: Any) -> dict[str, Any] | None:
    return None if interval is None else dict(vars(interval))
