"""The GRU beside its peers on the same rows: figures, intervals, calibration, money, segments.

    python -m benchmarks.quality.compare handbook [--seeds 3] [--setting all]
    python -m benchmarks.quality.compare sparkov [--kept-peers]
    python -m benchmarks.quality.compare simulator

handbook: the GRU's scores are those that `python -m benchmarks.quality` kept; peers are fitted on each fold with the settings
of `peers.CHOSEN`; probabilities by `calibrating.handbook_calibrations`.

sparkov and simulator: by the split of the configuration. The number of epochs, the peers' settings and every model's calibration
come from the validation days and models fitted on the train days; then each is fitted on both, and measured on the test days.
`--kept-peers` fits the GRU only, where nothing that the peers read has changed.
Writes handbook_peers.json, sparkov_quality.json or simulator_quality.json in benchmarks/results, and the scores of every test
transaction in build/quality.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet

from benchmarks.processes import DATA as DATA_FOLDER
from benchmarks.processes import RESULTS, ROOT, environment
from benchmarks.quality import handbook
from benchmarks.quality.calibrating import calibrations, handbook_calibrations
from benchmarks.quality.fitting import Tuned, fit_gru, fit_to_validation
from benchmarks.quality.handbook import BUILT, FOLDS, Fold, read_fold, scores_file
from benchmarks.quality.measures import column_of, compared, label_segments, scored_rows
from benchmarks.quality.peers import CHOSEN, choose, fit_peers
from benchmarks.quality.results import GRU, HANDBOOK_PEERS, SIMULATOR, SPARKOV
from seqfraud.config import Config, load_config
from seqfraud.files import replaced_file
from training.prepare import Prepared, prepare
from training.simulate import Simulation, simulate_to

USERS, SIMULATION_SEED = 4000, 1
"""Of the simulation: more users than in `make demo`, whose test days have too few frauds to tell models apart."""

SETTINGS = ("week", "all")

Floats = npt.NDArray[np.float64]


def compare_handbook(seeds: int, wanted: Sequence[str] = SETTINGS) -> dict[str, Any]:
    """A comparison by setting over the four folds; what is not wanted stays as it is in the result."""
    file = RESULTS / f"{HANDBOOK_PEERS}.json"
    settings = json.loads(file.read_text())["settings"] if file.is_file() else {}
    for setting in wanted:
        chosen = handbook_calibrations(setting)
        scales = {name: one.platt for name, one in chosen.items()}
        parts = []
        for first in FOLDS:
            fold = read_fold(setting, first, 0)
            rows = np.flatnonzero(fold.test)
            gru = [kept_logits(fold, seed) for seed in range(seeds)]
            peers = fit_peers(fold.prepared, CHOSEN[setting], rows)
            probabilities = {GRU: [scales[GRU].probability(logit) for logit in gru]}
            probabilities |= {name: [scales[name].probability(logit)] for name, logit in peers.items()}
            keep_scores(f"handbook_{setting}_{first}", fold.prepared, rows, probabilities)
            scenario = column_of(handbook.DATA, "TX_FRAUD_SCENARIO", fold.prepared, rows)
            kinds = label_segments("scenario", scenario, fold.prepared.label[rows] == 1)
            parts.append(scored_rows(fold.prepared, rows, probabilities, kinds))
            print(json.dumps({"setting": setting, "fold": first, "rows": len(rows)}), flush=True)
        settings[setting] = {**compared(parts), "calibrations": {name: asdict(one) for name, one in chosen.items()}}
    return {"settings": settings}


def kept_logits(fold: Fold, seed: int) -> Floats:
    """float64 [N]: the GRU's logits on a fold's test rows as they were kept; else NaN. Raises ValueError where they are not."""
    file = scores_file(seed)
    table = parquet.read_table(file).to_pandas() if file.is_file() else None
    mine = None if table is None else table[(table["setting"] == fold.setting) & (table["fold"] == fold.first)]
    ids = fold.prepared.table.take(fold.prepared.encoded.arrival[fold.test]).id_texts()
    if mine is None or list(mine["transaction_id"]) != list(ids):
        raise ValueError(
            f"{file.name} does not hold the test rows of {fold.setting}, {fold.first}: `python -m benchmarks.quality` first"
        )
    # float32 ends some way before 1: the logits of what is nearer are that end's
    probability = np.clip(mine["fraud_probability"].to_numpy().astype(np.float64), 1e-30, 1 - 2**-24)
    out = np.full(len(fold.test), np.nan)
    out[fold.test] = np.log(probability / (1 - probability))
    return out


def compare_split(config: Config, data: Path, name: str, seeds: int, kept_peers: bool) -> dict[str, Any]:
    """One comparison by the configuration's own split; with `kept_peers` they are as the run before left them."""
    prepared = prepare(config, data)
    rows, validation = np.flatnonzero(prepared.rows.test), np.flatnonzero(prepared.rows.validation)
    tuned = fit_to_validation(prepared)
    if kept_peers:
        return compare_with_kept(prepared, tuned, rows, name, seeds)
    trials: list[dict[str, Any]] = []
    chosen = choose(prepared, np.flatnonzero(prepared.rows.train), validation, trials.append)
    train_only = replace(prepared, rows=replace(prepared.rows, validation=np.zeros_like(prepared.rows.validation)))
    before = {GRU: tuned.logit, **fit_peers(train_only, chosen, validation)}
    scales = calibrations(before, prepared.label, prepared.rows.validation)
    logits = {GRU: fit_seeds(prepared, tuned.epochs, name, seeds)}
    logits |= {peer: [logit] for peer, logit in fit_peers(prepared, chosen, rows).items()}
    probabilities = {model: [scales[model].probability(one) for one in each] for model, each in logits.items()}
    keep_scores(name, prepared, rows, probabilities)
    return {
        **compared([scored_rows(prepared, rows, probabilities)]),
        "chosen": {peer: asdict(settings) for peer, settings in chosen.items()},
        "epochs": tuned.epochs,
        "platt": {model: asdict(scale) for model, scale in scales.items()},
        "trials": len(trials),
    }


def compare_with_kept(
    prepared: Prepared, tuned: Tuned, rows: npt.NDArray[np.int64], name: str, seeds: int
) -> dict[str, Any]:
    """The GRU fitted anew beside the peers of the run before, on the same rows [n]. Raises ValueError where they are not there."""
    before = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    kept = parquet.read_table(BUILT / f"{name}_scores.parquet").to_pandas()
    ids = prepared.table.take(prepared.encoded.arrival[rows]).id_texts()
    scale = calibrations({GRU: tuned.logit}, prepared.label, prepared.rows.validation)[GRU]
    logits = fit_seeds(prepared, tuned.epochs, name, seeds)
    probabilities = {GRU: [scale.probability(logit) for logit in logits]}
    for peer in before["chosen"]:
        mine = kept[(kept["model"] == peer) & (kept["seed"] == 0)]
        if list(mine["transaction_id"]) != list(ids):
            raise ValueError(f"{name}_scores.parquet does not hold the test rows of {peer}")
        probabilities[peer] = [np.full(len(prepared.label), np.nan)]
        probabilities[peer][0][rows] = mine["fraud_probability"]
    keep_scores(name, prepared, rows, probabilities)
    peers = {key: before[key] for key in ("chosen", "trials")}
    return {
        **compared([scored_rows(prepared, rows, probabilities)]),
        **peers,
        "epochs": tuned.epochs,
        "platt": {**before["platt"], GRU: asdict(scale)},
        "peers_of_commit": before.get("peers_of_commit", before["commit"]),
    }


def fit_seeds(prepared: Prepared, epochs: int, name: str, seeds: int) -> list[Floats]:
    """The GRU's logits [N] of each seed."""
    logits = []
    for seed in range(seeds):
        training = replace(prepared.config.training, epochs=epochs, seed=seed)
        logits.append(fit_gru(replace(prepared, config=replace(prepared.config, training=training))).logit)
        print(json.dumps({"data": name, "seed": seed}), flush=True)
    return logits


def keep_scores(
    name: str, prepared: Prepared, rows: npt.NDArray[np.int64], probabilities: Mapping[str, Sequence[Floats]]
) -> None:
    """The probability [N] of every model and seed for rows [n], as Parquet."""
    ids = prepared.table.take(prepared.encoded.arrival[rows]).id_texts()
    tables = [
        pa.table(
            {
                "transaction_id": pa.array(ids, pa.string()),
                "seed": pa.array(np.full(len(rows), seed, dtype=np.int32)),
                "model": pa.array([model] * len(rows)),
                "fraud_probability": pa.array(probability[rows].astype(np.float32)),
            }
        )
        for model, each in probabilities.items()
        for seed, probability in enumerate(each)
    ]
    BUILT.mkdir(parents=True, exist_ok=True)
    with replaced_file(BUILT / f"{name}_scores.parquet") as temporary:
        parquet.write_table(pa.concat_tables(tables), temporary, compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("handbook", "sparkov", "simulator"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="of the handbook; both by default")
    parser.add_argument("--kept-peers", action="store_true", help="fit the GRU only, beside the peers of the last run")
    options = parser.parse_args()
    if options.kept_peers and options.data == "handbook":
        parser.error("--kept-peers goes with sparkov and simulator")
    if options.setting and options.data != "handbook":
        parser.error("--setting goes with handbook")
    if options.data == "handbook":
        name, result = HANDBOOK_PEERS, compare_handbook(options.seeds, options.setting or SETTINGS)
    elif options.data == "sparkov":
        name = SPARKOV
        config = load_config(ROOT / "configs" / "sparkov.toml")
        result = compare_split(config, DATA_FOLDER / "sparkov_gen.parquet", name, options.seeds, options.kept_peers)
    else:
        name = SIMULATOR
        BUILT.mkdir(parents=True, exist_ok=True)
        data = BUILT / "simulated.parquet"
        simulate_to(Simulation(users=USERS, seed=SIMULATION_SEED), data)
        config = load_config(ROOT / "configs" / "simulator.toml")
        result = compare_split(config, data, name, options.seeds, options.kept_peers)
    with replaced_file(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps({**environment(), "seeds": options.seeds, **result}, indent=1) + "\n")
    shown = result.get("settings", {name: result})
    print(json.dumps({key: one["differences"] for key, one in shown.items()}, indent=1))


if __name__ == "__main__":
    main()
