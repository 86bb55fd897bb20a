"""Models without a sequence, beside the GRU: same rows, same context columns, tuned on the validation days.

    logistic_regression   the row and its contexts
    random_forest         the row and its contexts
    boosted_trees         also hand-made features of the user's history (`training.history`)
    isolation_forest      the same features, fitted without labels

Each gets six settings from a small grid, fitted on at most TUNE_ROWS train rows and compared by average precision on the
validation rows; the best is fitted on at most FIT_ROWS, calibrated on the validation rows (Platt) and measured on the test
rows. Of more train rows all frauds are fitted and a random part of the honest ones, weighted up accordingly.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from seqfraud.files import replaced_file
from seqfraud.metrics import average_precision, bootstrap_interval, paired_bootstrap
from seqfraud.nn.checkpoint import Run
from seqfraud.policy import choose_thresholds
from training.calibrate import platt
from training.history import Features, history_features
from training.loop import pick_device
from training.prepare import Prepared, prepare
from training.run import all_logits, calibrated, qualities, write_run_report

TUNE_ROWS = 15_000
FIT_ROWS = 150_000
SEED = 0
BINS = 255
"""Categories that HistGradientBoosting can tell apart; columns with more are given to it as numbers."""
SCORES = "test_scores.parquet"
FIGURES = "baselines.json"
GRU = "gru"

Floats = npt.NDArray[np.float64]
Parameters = Mapping[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Family:
    """One kind of model: its settings to try, whether it sees the user's history, how it is built and scored."""

    name: str
    grid: Mapping[str, tuple[Any, ...]]
    history: bool
    build: Callable[[Parameters, Features], Any]
    score: Callable[[Any, npt.NDArray[np.float32]], Floats]
    """A score [n] that rises with fraud, any scale."""

    def trials(self) -> list[dict[str, Any]]:
        """Every setting of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def signed_log(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """sign(x) log(1 + |x|), missing values as 0."""
    filled = np.nan_to_num(values)
    return np.sign(filled) * np.log1p(np.abs(filled))


def known(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Missing values as -1, below every count, age and amount."""
    return np.nan_to_num(values, nan=-1.0)


def _logistic(parameters: Parameters, features: Features) -> Any:
    numbers = [i for i in range(len(features.names)) if i not in features.categorical]
    columns = ColumnTransformer(
        [
            ("numbers", make_pipeline(FunctionTransformer(signed_log), StandardScaler()), numbers),
            ("ids", OneHotEncoder(handle_unknown="ignore", min_frequency=20), list(features.categorical)),
        ]
    )
    return make_pipeline(columns, LogisticRegression(max_iter=300, random_state=SEED, **parameters))


def _forest(parameters: Parameters, features: Features) -> Any:
    trees = RandomForestClassifier(n_estimators=60, random_state=SEED, n_jobs=-1, **parameters)
    return make_pipeline(FunctionTransformer(known), trees)


def _boosted(parameters: Parameters, features: Features) -> Any:
    few = [i for i in features.categorical if np.nanmax(features.values[:, i], initial=0) < BINS]
    return HistGradientBoostingClassifier(
        learning_rate=0.06,
        max_iter=120,
        early_stopping=False,
        categorical_features=few,
        random_state=SEED,
        **parameters,
    )


def _isolation(parameters: Parameters, features: Features) -> Any:
    trees = IsolationForest(n_estimators=100, random_state=SEED, n_jobs=-1, **parameters)
    return make_pipeline(FunctionTransformer(known), trees)


def _decision(model: Any, values: npt.NDArray[np.float32]) -> Floats:
    return np.asarray(model.decision_function(values), dtype=np.float64)


def _log_odds(model: Any, values: npt.NDArray[np.float32]) -> Floats:
    p = np.clip(model.predict_proba(values)[:, 1], 1e-4, 1 - 1e-4)
    return np.asarray(np.log(p / (1 - p)), dtype=np.float64)


def _strangeness(model: Any, values: npt.NDArray[np.float32]) -> Floats:
    return -np.asarray(model.score_samples(values), dtype=np.float64)


FAMILIES = (
    Family(
        "logistic_regression", {"C": (0.01, 0.1, 1.0), "class_weight": (None, "balanced")}, False, _logistic, _decision
    ),
    Family(
        "random_forest",
        {"min_samples_leaf": (5, 20, 100), "class_weight": (None, "balanced_subsample")},
        False,
        _forest,
        _log_odds,
    ),
    Family(
        "boosted_trees",
        {"l2_regularization": (1.0, 30.0), "max_leaf_nodes": (7, 15, 31)},
        True,
        _boosted,
        _decision,
    ),
    Family(
        "isolation_forest",
        {"max_samples": (256, 1024, 4096), "max_features": (0.3, 1.0)},
        True,
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


def run_baselines(run: Run, data: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Tune, fit and measure every baseline on the rows of a run; writes baselines.json, test_scores.parquet, report.html.

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
    for family in FAMILIES:
        fitted = fit_baseline(family, prepared, progress)
        scores[family.name] = fitted.probability[test]
        thresholds = choose_thresholds(
            prepared.label[prepared.rows.validation],
            fitted.probability[prepared.rows.validation],
            decline_precision=run.config.decision.decline_precision,
            alert_share=run.config.decision.alert_share,
        )
        models[family.name] = {
            **fitted.details,
            "thresholds": thresholds.as_dict(),
            **qualities(prepared, fitted.probability, thresholds),
            "interval": _plain(bootstrap_interval("average_precision", label, scores[family.name], users)),
            "gru_minus_this": _plain(
                paired_bootstrap("average_precision", label, gru[test], scores[family.name], users)
            ),
        }
    result = {
        "chosen_on": "validation rows",
        GRU: {
            **qualities(prepared, gru, run.thresholds),
            "interval": _plain(bootstrap_interval("average_precision", label, gru[test], users)),
        },
        "models": models,
    }
    _write(run.path, prepared, scores, result)
    write_run_report(run.path, prepared, gru, run.metrics, run.thresholds)
    return result


def fit_baseline(family: Family, prepared: Prepared, progress: Progress | None = None) -> Fitted:
    """Tune a family on the validation rows, calibrate its best there, score validation and test rows."""
    began = time.perf_counter()
    train = drawn_rows(prepared, np.flatnonzero(prepared.rows.train), FIT_ROWS)
    tuned = np.searchsorted(train, drawn_rows(prepared, train, TUNE_ROWS))
    validation, test = np.flatnonzero(prepared.rows.validation), np.flatnonzero(prepared.rows.test)
    rows = np.r_[train, validation, test]
    features = history_features(prepared.table, prepared.encoded, prepared.context, rows)
    if not family.history:
        features = row_features(features, prepared)
    parts = np.split(features.values, [len(train), len(train) + len(validation)])
    label = prepared.label
    trials: list[dict[str, Any]] = []
    chosen: dict[str, Any] = {}
    best = -1.0
    for parameters in family.trials():
        model = family.build(parameters, features)
        _fit(model, parts[0][tuned], label[train[tuned]], _weights(prepared, train[tuned]))
        figure = average_precision(label[validation], family.score(model, parts[1])) or 0.0
        trials.append({"parameters": parameters, "validation_average_precision": figure})
        if figure > best:
            best, chosen = figure, parameters
        if progress:
            progress(f"{family.name} {len(trials)}/{len(family.trials())}, best {best:.4f}")
    model = family.build(chosen, features)
    _fit(model, parts[0], label[train], _weights(prepared, train))
    logits = [family.score(model, part) for part in parts[1:]]
    scale, shift = platt(logits[0], label[validation])
    probability = np.full(len(label), np.nan)
    for at, logit in zip((validation, test), logits, strict=True):
        probability[at] = 1 / (1 + np.exp(-np.clip(scale * logit + shift, -60, 60)))
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
    )


def row_features(features: Features, prepared: Prepared) -> Features:
    """Those that need no history: the row's numbers, contexts, ids and clock."""
    schema = prepared.schema
    ids = {f"{name} id" for name in schema.categorical}
    wanted = {*schema.numeric_inputs, *prepared.context.names(), *ids, "hour", "weekday"}
    kept = [i for i, name in enumerate(features.names) if name in wanted]
    categorical = tuple(at for at, i in enumerate(kept) if i in features.categorical)
    return Features(tuple(features.names[i] for i in kept), features.values[:, kept], categorical)


def drawn_rows(prepared: Prepared, rows: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """At most about `most` of the rows, ascending: every fraud and a random part of the honest ones."""
    if len(rows) <= most:
        return rows
    fraud = prepared.label[rows] == 1
    honest = rows[~fraud]
    drawn = np.random.default_rng(SEED).choice(honest, max(most - int(fraud.sum()), 1), replace=False)
    return np.sort(np.r_[rows[fraud], drawn])


def _weights(prepared: Prepared, rows: npt.NDArray[np.int64]) -> Floats:
    """1 for frauds; for honest rows what makes up for those that were not drawn."""
    train = prepared.label[prepared.rows.train]
    fraud = prepared.label[rows] == 1
    return np.where(fraud, 1.0, float((train == 0).sum()) / max(int((~fraud).sum()), 1))


def _fit(model: Any, values: npt.NDArray[np.float32], label: npt.NDArray[np.int8], weight: Floats) -> None:
    if isinstance(model, HistGradientBoostingClassifier):
        model.fit(values, label, sample_weight=weight)
    else:
        model.fit(values, label, **{f"{model.steps[-1][0]}__sample_weight": weight})


def _write(folder: Path, prepared: Prepared, scores: Mapping[str, Floats], result: Mapping[str, Any]) -> None:
    arrival = prepared.encoded.arrival[prepared.rows.test]
    columns: dict[str, Any] = {
        "transaction_id": pa.array(prepared.table.take(arrival).id_texts(), pa.string()),
        "label": pa.array(prepared.label[prepared.rows.test]),
    }
    columns |= {name: pa.array(values) for name, values in scores.items()}
    with replaced_file(folder / SCORES) as file:
        pa.parquet.write_table(pa.table(columns), file)
    with replaced_file(folder / FIGURES) as file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _plain(interval: Any) -> dict[str, Any] | None:
    return None if interval is None else dict(vars(interval))
