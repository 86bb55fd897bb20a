"""False alarms: a hundred simulated weeks in which nothing changes, and what the monitor says of each; then weeks with a change.

A small model is trained on the first months of one long simulation and then left alone: its users, merchants and frauds go
on as before, so that every alarm is a false one. Transactions and contexts are scored in bulk, week after week is looked at
as the monitor would at its end. Neighbouring weeks share three quarters of the rows that quality is measured on.

How the model itself ages is shown beside one that never forgets a known fraud (`features.run_memory`), on three simulations.

Example: python -m benchmarks.quiet [--ageing: only the last part, beside what is there]
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import ROOT, command
from seqfraud.bulk import read_for_bundle, score_encoded
from seqfraud.bundle import Bundle, open_bundle
from seqfraud.config import DAY_MS, WEEK_MS, parse_instant
from seqfraud.files import replaced_file
from seqfraud.fingerprint import Columns, gaps_of, stacked
from seqfraud.metrics import average_precision, wilson
from seqfraud.runtime import SequenceGraph
from seqfraud.sequences import encode
from seqfraud.table import MISSING
from serve.monitor import examine
from serve.verdicts import Rows, Span

FOLDER = ROOT / "build" / "quiet"
RESULT = ROOT / "benchmarks" / "results" / "quiet.json"
USERS, SEED, DAYS = 1000, 53, 835
AGEING_SEEDS = (11, 23, SEED)
FEW = 100
"""Users of the small service."""
BEGIN = "2025-05-08"
"""One label delay after the training."""
WEEKS = 100
CONFIG = """
[data]
transaction = "transaction_id"
user = "user_id"
time = "time"
label = "is_fraud"
label_delay = "7d"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["category"]
context = ["merchant_id", "device_id", "user_id"]
geo = [["lat", "long"]]
ip = ["ip"]
run_memory = "{memory}"
[split]
train_start = "2025-01-15"
validation = "14d"
train_end = "2025-05-01"
test_start = "2025-05-08"
test_end = "2025-05-15"
[model]
hidden = 32
[training]
epochs = 6
users_per_batch = 16
dropout = 0.2
[decision]
alert_share = 0.01
decline_precision = 0.9
"""
MEMORY, FOR_GOOD = "60d", "36500d"
CHANGES = {
    "new_pattern": "new_pattern@2025-06-05:3",
    "inflation": "inflation@2025-06-05:1.5",
    "fraud_rate": "fraud_rate@2025-06-05:4:test_burst",
}
CHANGED_AT, CHANGED_DAYS = "2025-06-05", 220
MATURE = 28 * DAY_MS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weeks", type=int, default=WEEKS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--ageing", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    result: dict[str, Any] = {
        "weeks": args.weeks,
        "users": USERS,
        "seed": SEED,
        "window_days": 7,
        "quality_window_days": MATURE // DAY_MS,
    }

    def keep(part: str, found: Any) -> None:
        result[part] = found
        if not args.ageing:
            result["seconds"] = round(time.perf_counter() - began)
        with replaced_file(args.out) as file:
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(found), flush=True)

    if args.ageing:
        result = json.loads(args.out.read_text(encoding="utf-8"))
        keep("ageing", [aged(args.folder / str(seed), seed, args.weeks) for seed in AGEING_SEEDS])
        return
    folder = args.folder / str(SEED)
    bundle = prepared_bundle(folder, SEED, MEMORY)
    rows, user = rows_of(bundle, folder / "quiet.parquet")
    keep("quiet", counted(looked(bundle, rows, args.weeks)))
    changes = {}
    for name, drift in CHANGES.items():
        data = folder / f"{name}.parquet"
        if not data.exists():
            simulate(data, SEED, CHANGED_DAYS, drift)
        found = looked(bundle, rows_of(bundle, data)[0], 8, CHANGED_AT)
        changes[drift] = {"alarm": first(found, "alarm"), "watch_or_alarm": first(found, "alarm", "watch")}
        keep("weeks_until", changes)
    keep("quiet_small", {"users": FEW, **counted(looked(bundle, rows.take(user < FEW), args.weeks))})
    keep("ageing", [aged(args.folder / str(seed), seed, args.weeks) for seed in AGEING_SEEDS])


def aged(folder: Path, seed: int, weeks: int) -> dict[str, Any]:
    """How a model that forgets and one that does not do by quarters of the weeks, neither ever trained again."""
    found = {
        memory: by_quarter(rows_of(prepared_bundle(folder, seed, memory), folder / "quiet.parquet")[0], weeks)
        for memory in (MEMORY, FOR_GOOD)
    }
    return {"seed": seed, "by_run_memory": found}


def by_quarter(rows: Rows, weeks: int) -> list[dict[str, float]]:
    """How right the probabilities are, and how good, in each quarter of the weeks."""
    out = []
    week = (rows.columns.time - parse_instant(BEGIN)) // WEEK_MS
    for i in range(4):
        inside = (week >= weeks * i // 4) & (week < weeks * (i + 1) // 4)
        fraud, probability = rows.label[inside] == 1, rows.probability[inside]
        out.append(
            {
                "frauds": int(fraud.sum()),
                "expected": round(float(probability.sum())),
                "average_precision": average_precision(fraud, probability),
            }
        )
    return out


def prepared_bundle(folder: Path, seed: int, memory: str) -> Bundle:
    """The long simulation, and a model of its first months; what is there already is used."""
    bundle = folder / f"bundle-{memory}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "quiet.parquet").exists():
        simulate(folder / "quiet.parquet", seed, DAYS)
    if not bundle.exists():
        first_months = folder / "train.parquet"
        simulate(first_months, seed, 135)
        config, run = folder / f"quiet-{memory}.toml", folder / f"run-{memory}"
        config.write_text(CONFIG.format(memory=memory), encoding="utf-8")
        command("train", config, "--data", first_months, "--out", run)
        command("export", run, "--out", bundle)
    return open_bundle(bundle)


def simulate(out: Path, seed: int, days: int, drift: str | None = None) -> None:
    more = [] if drift is None else ["--drift", drift]
    command("simulate", "--out", out, "--users", USERS, "--days", days, "--seed", seed, *more)


def rows_of(bundle: Bundle, data: Path) -> tuple[Rows, np.ndarray[Any, Any]]:
    """Every transaction of a file as the monitor sees it, and the users' numbers; labels are those that will be known."""
    manifest = bundle.manifest
    table = read_for_bundle(bundle, data)
    encoded = encode(table, manifest.vocabularies, manifest.context)
    probability = score_encoded(SequenceGraph(bundle.sequence, manifest.graph, 1), encoded).astype(np.float64)
    order = np.argsort(encoded.arrival)  # encoded rows in arrival order
    user, amount = table.user.codes.astype(np.int64), table.amount()
    probability = probability[order]
    decisions = manifest.policy.decide_many(probability, amount)
    absent = {column: np.isnan(table.numbers[:, i]) for i, column in enumerate(table.schema.numbers)}
    absent |= {column: table.text(column).codes == MISSING for column in table.schema.texts}
    columns = Columns(
        time=table.time,
        user=user,
        numeric=table.numeric_inputs(),
        categorical=encoded.categorical[order],
        context=encoded.context[order],
        gap=gaps_of(user, table.time),
        absent=absent,
        entity=stacked([column.codes for column in table.entities()], len(table)),
    )
    everything = np.ones(len(table), dtype=bool)
    assert table.label is not None
    rows = Rows(columns, everything, probability, decisions > 0, decisions == 2, ~everything, amount, table.label)
    return rows, user


def looked(bundle: Bundle, rows: Rows, weeks: int, begin: str = BEGIN) -> list[dict[str, str]]:
    """The verdicts by topic at the end of each week."""
    out = []
    for week in range(1, weeks + 1):
        now = parse_instant(begin) + week * WEEK_MS
        span = Span(now, WEEK_MS, MATURE)
        time_ms = rows.columns.time
        near = (time_ms < now) & (time_ms >= now - MATURE - 2 * WEEK_MS) & (time_ms >= parse_instant(BEGIN))
        if not (time_ms >= now).any():
            raise SystemExit(f"the simulation ends before week {week}")
        report = examine(bundle.manifest, bundle.id, "in service", rows.take(near), span)
        out.append(
            {topic.name: topic.level for topic in report.topics}
            | {f"{topic.name} words": topic.words for topic in report.topics if topic.level in ("alarm", "watch")}
        )
    return out


def counted(found: list[dict[str, str]]) -> dict[str, Any]:
    """By topic how often each verdict, and the rate of alarms with its interval."""
    names = [name for name in found[0] if not name.endswith(" words")]
    topics = {}
    for name in names:
        levels = Counter(week[name] for week in found)
        low, high = wilson(levels["alarm"], len(found))
        topics[name] = {
            **{level: levels[level] for level in ("ok", "watch", "alarm", "unknown")},
            "alarm_rate": levels["alarm"] / len(found),
            "alarm_rate_low": low,
            "alarm_rate_high": high,
        }
    alarmed = sum(any(week[name] == "alarm" for name in names) for week in found)
    low, high = wilson(alarmed, len(found))
    words = [
        {"week": i, "topic": name, "level": week[name], "words": week[f"{name} words"]}
        for i, week in enumerate(found, start=1)
        for name in names
        if f"{name} words" in week
    ]
    return {
        "alarmed_weeks": alarmed,
        "alarmed_weeks_by_quarter": [
            sum(any(week[name] == "alarm" for name in names) for week in found[i : i + len(found) // 4])
            for i in range(0, len(found), max(len(found) // 4, 1))
        ][:4],
        "alarm_rate": alarmed / len(found),
        "alarm_rate_low": low,
        "alarm_rate_high": high,
        "topics": topics,
        "alarms_and_watches": words,
    }


def first(found: list[dict[str, str]], *levels: str) -> dict[str, int | None]:
    """By topic the first week with such a verdict."""
    names = [name for name in found[0] if not name.endswith(" words")]
    return {name: next((i for i, week in enumerate(found, 1) if week[name] in levels), None) for name in names}


if __name__ == "__main__":
    main()
