"""Detection on the four folds of the Fraud-Detection-Handbook, by the GRU alone, in the form in which it is served.

    python -m benchmarks.quality [--setting week|all] [--seeds 3] [--validation]

Protocol (Fraud-Detection-Handbook, chapter 7, SequentialModeling): train weeks begin 2018-07-25, 08-01, 08-08 and 08-15; 7 days
train, 7 days delay, 7 days test. Test rows leave out customers with a fraud in the train week, and, for test day k, those
with a fraud on the days before that is known by then. "week": the loss is over the train week's labels only; "all": over all
that are known at its end, from 2018-04-22 on (the three weeks before fill the contexts). Transactions without their labels are
history in both; contexts use the labels known by then.

Inputs, epochs and every other setting were chosen on the week of 2018-07-18 with the train week of 2018-07-04
(`--validation` runs that); each fold starts from scratch. A run is (setting, fold, seed). Writes
benchmarks/results/handbook_quality.json, and the scores of seed 0 as handbook_scores.parquet beside it; a run that is in
the result already is not made again.
"""

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet

from benchmarks.processes import DATA as DATA_FOLDER
from benchmarks.processes import RESULTS, ROOT, environment
from seqfraud.config import DAY_MS, Config, Duration, Instant, SplitConfig, format_instant, load_config, parse_instant
from seqfraud.files import replaced_file
from seqfraud.metrics import average_precision, card_precision_at_k, roc_auc

DATA = DATA_FOLDER / "handbook.parquet"
CONFIG = ROOT / "configs" / "handbook.toml"
FOLDS = ("2018-07-25", "2018-08-01", "2018-08-08", "2018-08-15")
VALIDATION_FOLD = "2018-07-04"
LABELS_FROM = "2018-04-22"
RESULT, SCORES = "handbook_quality.json", "handbook_scores.parquet"
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


def test_rows(
    start: int, time_ms: npt.NDArray[np.int64], user: npt.NDArray[np.int32], label: npt.NDArray[np.int8]
) -> Mask:
    """Mask [N] of a fold's test rows, by the protocol."""
    day = (time_ms - start) // DAY_MS
    fraud = label == 1
    known = np.zeros(int(user.max()) + 1, dtype=bool)
    known[user[fraud & (day >= 0) & (day < 7)]] = True
    out = np.zeros(len(time_ms), dtype=bool)
    for k in range(7):
        known[user[fraud & (day == 7 + k - 1)]] = True
        out |= (day == 14 + k) & ~known[user]
    return out


def run(setting: str, fold: str, seed: int) -> tuple[dict[str, Any], pa.Table]:
    """Fit on one fold and score its test rows."""
    import torch

    from seqfraud.nn.model import SequenceModel
    from training.loop import DeviceData, fit, pick_device, score_logits
    from training.prepare import fit_scaling, prepare

    began = time.perf_counter()
    start = parse_instant(fold)
    config = fold_config(setting, start, seed)
    prepared = prepare(config, DATA)
    torch.manual_seed(seed)
    scaling, spec, graph = fit_scaling(prepared)
    model = SequenceModel(spec, graph)
    scaling.apply(model.encoder)
    device = pick_device("auto")
    fit(model, prepared, device, config.training, refit=True)
    encoded = prepared.encoded.until(prepared.split.test_end)
    logits = score_logits(model, DeviceData(encoded, device), encoded, config.training.events_per_chunk)
    user = np.repeat(np.arange(len(encoded.begin)), prepared.encoded.lengths()).astype(np.int32)
    mask = test_rows(start, encoded.time, user, prepared.label)
    label, logit = prepared.label[mask], logits[mask].astype(np.float64)
    day = (encoded.time[mask] - start) // DAY_MS
    row = {
        "setting": setting,
        "fold": fold,
        "seed": seed,
        "rows": int(mask.sum()),
        "frauds": int((label == 1).sum()),
        "average_precision": average_precision(label, logit),
        "roc_auc": roc_auc(label, logit),
        "card_precision_100": card_precision_at_k(label, logit, user[mask], day),
        "seconds": time.perf_counter() - began,
    }
    table = pa.table(
        {
            "transaction_id": pa.array(np.array(prepared.table.id_texts())[encoded.arrival[mask]]),
            "fold": pa.array([format_instant(start)[:10]] * len(logit)),
            "setting": pa.array([setting] * len(logit)),
            "seed": pa.array(np.full(len(logit), seed, dtype=np.int32)),
            "model": pa.array(["gru"] * len(logit)),
            "fraud_probability": pa.array((1 / (1 + np.exp(-logit))).astype(np.float32)),
        }
    )
    return row, table


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=("week", "all"), action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--validation", action="store_true", help="the weeks that settings are chosen on; writes nothing"
    )
    options = parser.parse_args()
    settings = options.setting or ["week", "all"]
    if options.validation:
        for setting in settings:
            print(json.dumps(run(setting, VALIDATION_FOLD, 0)[0]), flush=True)
        return
    file, scores = RESULTS / RESULT, RESULTS / SCORES
    for seed in range(options.seeds):
        for setting in settings:
            for fold in FOLDS:
                # read at each turn: two processes, a setting each, may write by turns
                rows = json.loads(file.read_text())["runs"] if file.is_file() else []
                if any((r["setting"], r["fold"], r["seed"]) == (setting, fold, seed) for r in rows):
                    continue
                row, table = run(setting, fold, seed)
                print(json.dumps(row), flush=True)
                rows = json.loads(file.read_text())["runs"] if file.is_file() else []
                rows = sorted([*rows, row], key=lambda r: (r["setting"], r["seed"], r["fold"]))
                result = {**environment(), "summary": summary(rows), "runs": rows}
                with replaced_file(file) as temporary:
                    temporary.write_text(json.dumps(result, indent=1) + "\n")
                if seed == 0:
                    before = [parquet.read_table(scores)] if scores.is_file() else []
                    with replaced_file(scores) as temporary:
                        parquet.write_table(pa.concat_tables([*before, table]), temporary, compression="zstd")
    print(json.dumps(json.loads(file.read_text())["summary"], indent=1))


if __name__ == "__main__":
    main()
