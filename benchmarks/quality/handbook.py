"""Detection on the four folds of the Fraud-Detection-Handbook, by the GRU alone, in the form in which it is served.

Protocol (Fraud-Detection-Handbook, chapter 7, SequentialModeling): train weeks begin 2018-07-25, 08-01, 08-08 and 08-15; 7 days
train, 7 days delay, 7 days test. Test rows leave out customers with a fraud in the train week, and, for test day k, those
with a fraud on the days before that is known by then. "week": the loss is over the train week's labels only; "all": over all
that are known at its end, from 2018-04-22 on (the three weeks before fill the contexts). Transactions without their labels are
history in both; contexts use the labels known by then.

Inputs, epochs and every other setting were chosen on the week of 2018-07-18 with the train week of 2018-07-04
(`--validation` runs that); each fold starts from scratch. A run is (setting, fold, seed).
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.processes import DATA as DATA_FOLDER
from benchmarks.processes import RESULTS, ROOT
from benchmarks.quality.fitting import fit_gru
from seqfraud.config import DAY_MS, Config, Duration, Instant, SplitConfig, load_config, parse_instant
from seqfraud.metrics import average_precision, card_precision_at_k, roc_auc
from training.prepare import Prepared, prepare

DATA = DATA_FOLDER / "handbook.parquet"
CONFIG = ROOT / "configs" / "handbook.toml"
BUILT = ROOT / "build" / "quality"
"""What other commands need and nobody commits."""
FOLDS = ("2018-07-25", "2018-08-01", "2018-08-08", "2018-08-15")
VALIDATION_FOLD = "2018-07-04"
LABELS_FROM = "2018-04-22"
WEEK: dict[str, Any] = {"epochs": 10, "learning_rate": 2e-3, "weight_decay": 0.1, "dropout": 0.3}
"""A week has some five hundred frauds: what is chosen for it holds the network back."""
ALL: dict[str, Any] = {"epochs": 8}

Mask = npt.NDArray[np.bool_]


def fold_config(setting: str, start: int, seed: int) -> Config:
    """The configuration of a fold: that of the data, with the fold's split and the setting's training."""
    config = load_config(CONFIG)
    split = SplitConfig(
        train_start=Instant(start if setting == "week" else parse_instant(LABELS_FROM)),
        train_end=Instant(start + 7 * DAY_MS),
        validation=Duration(DAY_MS),  # fitted too: the number of epochs is chosen
        test_start=Instant(start + 14 * DAY_MS),
        test_end=Instant(start + 21 * DAY_MS),
    )
    chosen = WEEK if setting == "week" else ALL
    return replace(config, split=split, training=replace(config.training, seed=seed, **chosen))


def test_rows(day: npt.NDArray[np.int64], user: npt.NDArray[np.int32], label: npt.NDArray[np.int8]) -> Mask:
    """Mask [N] of a fold's test rows, by the protocol; `day` counts from the first train day."""
    fraud = label == 1
    known = np.zeros(int(user.max()) + 1, dtype=bool)
    known[user[fraud & (day >= 0) & (day < 7)]] = True
    out = np.zeros(len(day), dtype=bool)
    for k in range(7):
        known[user[fraud & (day == 7 + k - 1)]] = True
        out |= (day == 14 + k) & ~known[user]
    return out


@dataclass(frozen=True)
class Fold:
    """A fold ready to be fitted and measured.

    Attributes:
        first: ISO date of the first train day.
        user: int32 [N], over encoded rows.
        day: int64 [N], days since the first train day.
        test: bool [N], the protocol's test rows.
    """

    setting: str
    first: str
    seed: int
    prepared: Prepared
    user: npt.NDArray[np.int32]
    day: npt.NDArray[np.int64]
    test: Mask


def read_fold(setting: str, first: str, seed: int) -> Fold:
    """Read and encode the data for a fold."""
    start = parse_instant(first)
    prepared = prepare(fold_config(setting, start, seed), DATA)
    encoded = prepared.encoded
    user = np.repeat(np.arange(len(encoded.begin)), encoded.lengths()).astype(np.int32)
    day = (encoded.time - start) // DAY_MS
    return Fold(setting, first, seed, prepared, user, day, test_rows(day, user, prepared.label))


def seeded(fold: Fold, seed: int) -> Fold:
    """The same fold, to be fitted from another seed."""
    config = fold.prepared.config
    training = replace(config.training, seed=seed)
    return replace(fold, seed=seed, prepared=replace(fold.prepared, config=replace(config, training=training)))


def measured(fold: Fold, score: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The protocol's figures of a score [N] that rises with fraud."""
    mask = fold.test
    label = fold.prepared.label[mask]
    return {
        "setting": fold.setting,
        "fold": fold.first,
        "seed": fold.seed,
        "rows": int(mask.sum()),
        "frauds": int((label == 1).sum()),
        "average_precision": average_precision(label, score[mask]),
        "roc_auc": roc_auc(label, score[mask]),
        "card_precision_100": card_precision_at_k(label, score[mask], fold.user[mask], fold.day[mask]),
    }


def score_table(fold: Fold, model: str, probability: npt.NDArray[np.float64]) -> pa.Table:
    """The test rows' probabilities, of [N]."""
    rows = int(fold.test.sum())
    ids = fold.prepared.table.take(fold.prepared.encoded.arrival[fold.test]).id_texts()
    return pa.table(
        {
            "transaction_id": pa.array(ids, pa.string()),
            "fold": pa.array([fold.first] * rows),
            "setting": pa.array([fold.setting] * rows),
            "seed": pa.array(np.full(rows, fold.seed, dtype=np.int32)),
            "model": pa.array([model] * rows),
            "fraud_probability": pa.array(probability[fold.test].astype(np.float32)),
        }
    )


def run(fold: Fold) -> tuple[dict[str, Any], pa.Table]:
    """Fit on one fold and score its test rows."""
    began = time.perf_counter()
    logit = fit_gru(fold.prepared).logit
    row = {**measured(fold, logit), "seconds": time.perf_counter() - began}
    return row, score_table(fold, "gru", 1 / (1 + np.exp(-logit)))


def scores_file(seed: int) -> Path:
    """Where the scores of a seed are kept; those of seed 0 are committed."""
    return RESULTS / "handbook_scores.parquet" if seed == 0 else BUILT / f"handbook_scores_{seed}.parquet"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over folds, per setting and seed, and their spread over seeds."""
    out: dict[str, Any] = {}
    for setting in sorted({row["setting"] for row in rows}):
        for metric in ("average_precision", "roc_auc", "card_precision_100"):
            means = []
            for seed in sorted({row["seed"] for row in rows}):
                mine = [row[metric] for row in rows if (row["setting"], row["seed"]) == (setting, seed)]
                if len(mine) == len(FOLDS):
                    means.append(float(np.mean(mine)))
            if means:
                spread = {"mean": float(np.mean(means)), "lowest": min(means), "highest": max(means)}
                out.setdefault(setting, {})[metric] = {**spread, "seeds": len(means)}
    return out
