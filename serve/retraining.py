"""A challenger from what a service has seen, and whether it may take the champion's place.

Training data are the journal's transactions with the newest labels, and before its first the original files, their
identifiers hashed with the service's key, so that a user of both is one. `seqfraud train` and `seqfraud export` make the
challenger, in processes of their own: nothing here needs torch. Champion and challenger then score the journal again in
arrival order, with contexts and labels as they were known then, and `seqfraud.gate` judges by the newest matured weeks.
"""

import datetime
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from seqfraud.bulk import read_for
from seqfraud.bundle import Bundle, LabelSource
from seqfraud.config import DAY_MS, Config, format_instant, load_config, parse_instant
from seqfraud.errors import ConfigError, DataError, RunError
from seqfraud.files import replaced_file
from seqfraud.gate import USUAL, Compared, GateReport, GateSettings, Latency, Period, judge
from seqfraud.identifiers import Identifiers, key_check, read_key, treatments
from seqfraud.runtime import StepGraph, initial_states
from seqfraud.schema import Schema, schema_of
from seqfraud.table import MISSING, Transactions
from serve.identity import CHECK, KEY_FILE, POLICY
from serve.journalled import Journalled, is_fraud, matured, read_journal, weights
from serve.offline import score_journal

COMPARE = 14 * DAY_MS
"""The newest matured time that models are compared on."""
KNOWN_AT = "label_known_at"
"""Column of the training file where the configuration names none."""

STEP_CALLS = 40
STEP_TURNS = 60
"""Calls of one graph in a row, and how often the two take turns."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cuts:
    """Where time is cut, in ms: labels known until `test_start` are fitted; what is compared is matured at `now`."""

    train_end: int
    test_start: int
    test_end: int
    now: int

    @staticmethod
    def of(now: int, label_delay: int, compare: int) -> "Cuts":
        """The newest matured time before `now`, and before it one label delay in which labels are not all known."""
        end = now - label_delay
        return Cuts(end - compare - label_delay, end - compare, end, now)


@dataclass(frozen=True)
class TrainingData:
    """What a training file is made of."""

    original: int
    journal: int
    both: int
    """Rows of the original files that the journal has too: they count once."""
    labelled: int
    frauds: int


# ---- the data


def newest_time(state: Path, schema: Schema) -> int:
    """Time (ms) just after the newest transaction of a journal. Raises RunError where it has none."""
    table = read_journal(state, schema).table
    if not len(table):
        raise RunError(f"{state}: the journal has no transaction")
    return int(pc.max(table["time"]).as_py()) + 1


def write_training_data(
    config: Config, state: Path, original: Path | None, identifier_key: Path | None, now: int, out: Path
) -> TrainingData:
    """Everything that was known at `now` as one Parquet file, in arrival order.

    What was declined, and of which nobody said anything, has no label where a control share was let through: those that
    were stand for it. Without a control share silence counts as honest, as everywhere.

    Raises:
        RunError: the journal is not what the configuration declares, or the identifiers are not hashed as it says.
        DataError: the original files cannot be read.
    """
    if config.data.label is None:
        raise ConfigError("data.label is missing; expected the name of the label's column")
    schema = schema_of(config)
    read = read_journal(state, schema, until=now, fields=True)
    hashing = _identifiers(config, schema, state, read.notes, identifier_key)
    label, known_at = _label_columns(config, schema)
    delay = int(config.data.label_delay)
    table = _journal_rows(read, schema, delay, now, label, known_at)
    count = both = 0
    if original is not None:
        source = LabelSource(config.data.label, config.data.label_known_at)
        older = hashing.table(read_for(schema, source, delay, config.cleaning, original)[0])
        if older.label is None:
            raise DataError(f"{original}: the label's column {config.data.label!r} is missing")
        older, both = _before_journal(older, read)
        count = len(older)
        table = pa.concat_tables([_original_rows(older, read, delay, now, label, known_at), table])
    table = table.take(np.argsort(table[schema.time].cast(pa.int64()).to_numpy(), kind="stable"))
    with replaced_file(out) as file:
        file.touch(mode=0o600)  # it holds what the journal holds
        parquet.write_table(table, file)
    labels = table[label]
    return TrainingData(
        original=count,
        journal=len(read.table),
        both=both,
        labelled=len(labels) - labels.null_count,
        frauds=int(pc.sum(labels).as_py() or 0),
    )


def _identifiers(
    config: Config, schema: Schema, state: Path, notes: Mapping[str, str], key_file: Path | None
) -> Identifiers:
    """What hashes the original files' identifiers as the journal's are. Raises RunError where that cannot be."""
    wanted = treatments(schema, config.identifiers)
    noted = msgspec.json.decode(notes[POLICY]) if POLICY in notes else dict.fromkeys(wanted, "keep")
    for column, treatment in wanted.items():
        if noted.get(column) != treatment:
            raise RunError(
                f"{state}: the journal's values of {column} are stored by the identifier policy {noted.get(column)!r}; the "
                f"configuration says {treatment!r}, by which a user of the file and of the journal would be two"
            )
    if CHECK not in notes:
        return Identifiers(schema, config.identifiers, None)
    path = key_file or state / KEY_FILE
    key = read_key(path)
    if key_check(key) != notes[CHECK]:
        raise RunError(f"{path}: not the identifier key that the journal of {state} is written with")
    return Identifiers(schema, config.identifiers, key)


def _label_columns(config: Config, schema: Schema) -> tuple[str, str]:
    assert config.data.label is not None
    known_at = config.data.label_known_at or KNOWN_AT
    while known_at in schema.fields:
        known_at += "_"
    return config.data.label, known_at


def _labelled(
    columns: dict[str, Any],
    schema: Schema,
    label: npt.NDArray[np.int8],
    known_at: npt.NDArray[np.int64],
    names: tuple[str, str],
) -> pa.Table:
    """Columns in the schema's order, with labels (-1 unknown) and when they were known."""
    unknown = label == MISSING
    ordered = {name: columns[name] for name in schema.fields}
    return pa.table(
        {
            **ordered,
            names[0]: pa.array(label, pa.int8(), mask=unknown),
            names[1]: pa.array(known_at, pa.timestamp("ms"), mask=unknown),
        }
    )


def _journal_rows(read: Journalled, schema: Schema, delay: int, now: int, label: str, known_at: str) -> pa.Table:
    assert read.fields is not None
    table = read.table
    time = table["time"].to_numpy()
    said = table["label"].is_valid().to_numpy(zero_copy_only=False).astype(bool)
    unknowable = ~said & (weights(read) == 0)
    labels = np.where(said, is_fraud(table), 0).astype(np.int8)
    labels[~said & (~matured(table, now, delay) | unknowable)] = MISSING
    known = np.where(said, table["label_known_at"].fill_null(0).to_numpy(), time + delay)
    columns = {name: read.fields[name] for name in schema.fields}
    columns[schema.time] = pa.array(time, pa.timestamp("ms"))
    return _labelled(columns, schema, labels, known, (label, known_at))


def _before_journal(older: Transactions, read: Journalled) -> tuple[Transactions, int]:
    """The original rows that came before the journal's first and are not in it, and how many are in both."""
    if not len(read.table):
        return older, 0
    held = set(read.table["id"].to_pylist())
    in_journal = np.array([identity in held for identity in older.id_texts()], dtype=bool)
    first = read.table["time"][0].as_py()
    return older.take(~in_journal & (older.time < first)), int(in_journal.sum())


def _original_rows(older: Transactions, read: Journalled, delay: int, now: int, label: str, known_at: str) -> pa.Table:
    """The original rows; what the service was told of one of them since counts more than what the file says."""
    schema = older.schema
    assert older.label is not None
    labels = older.label.copy()
    known = older.time + delay if older.known_at is None else older.known_at.copy()
    ids = older.id_texts()
    said = {row["transaction_id"]: row for row in read.labels.to_pylist()}
    if said:
        for i, identity in enumerate(ids):
            if (row := said.get(identity)) is not None:
                labels[i], known[i] = row["label"], row["known_at"]
    labels[known >= now] = MISSING
    columns: dict[str, Any] = {schema.user: pa.array(older.user.texts(), pa.string())}
    columns[schema.time] = pa.array(older.time, pa.timestamp("ms"))
    for i, name in enumerate(schema.numbers):
        columns[name] = pa.array(older.numbers[:, i], pa.float64(), from_pandas=True)
    for name, texts in zip(schema.texts, older.texts, strict=True):
        columns[name] = pa.array(texts.texts(), pa.string())
    if schema.transaction is not None:
        columns[schema.transaction] = pa.array(ids, pa.string())
    return _labelled(columns, schema, labels, known, (label, known_at))


# ---- the configuration


def challenger_config(path: Path, config: Config, data: Path, cuts: Cuts) -> str:
    """The text of a configuration as given but for where the data are and where time is cut; comments are not kept."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    label, known_at = _label_columns(config, schema_of(config))
    raw["data"] = {**raw["data"], "path": str(data), "label": label, "label_known_at": known_at}
    raw["split"] = {
        **raw.get("split", {}),
        "train_end": format_instant(cuts.train_end),
        "test_start": format_instant(cuts.test_start),
        "test_end": format_instant(cuts.test_end),
    }
    return f"# By seqfraud retrain from {path.name}: other data, and the split moved to the newest matured weeks.\n{_toml(raw)}"


def _toml(raw: Mapping[str, Any], prefix: str = "") -> str:
    """TOML of what `tomllib` reads."""
    plain = {key: value for key, value in raw.items() if not isinstance(value, dict)}
    out = "".join(f"{_toml_value(key)} = {_toml_value(value)}\n" for key, value in plain.items())
    for key, value in raw.items():
        if isinstance(value, dict):
            name = f"{prefix}{_toml_value(key)}"
            out += f"\n[{name}]\n{_toml(value, f'{name}.')}"
    return out


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    return repr(value)


# ---- the challenger


def train_challenger(out: Path, device: str, sign: Path | None, say: Say) -> Path:
    """`seqfraud train` and `seqfraud export` by `out`/config.toml; the bundle's folder. Raises RunError."""
    run, bundle = out / "run", out / "bundle"
    _seqfraud(["train", str(out / "config.toml"), "--out", str(run), "--device", device], say)
    signing = [] if sign is None else ["--sign", str(sign)]
    _seqfraud(["export", str(run), "--out", str(bundle), *signing], say)
    return bundle


def _seqfraud(args: Sequence[str], say: Say) -> None:
    """A subcommand in a process of its own, what it says on stderr passed on line by line."""
    command = [sys.executable, "-m", "seqfraud.cli", *args]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                last = line.rstrip() or last
                say(line.rstrip())
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise RunError(
            f"seqfraud {args[0]} failed: {last.removeprefix('error: ') or f'exit code {process.returncode}'}"
        )


# ---- the comparison


def compare(
    champion: Bundle,
    challenger: Bundle,
    state: Path,
    cuts: Cuts,
    threads: int = 2,
    settings: GateSettings = USUAL,
) -> GateReport:
    """Both score the journal in arrival order; judged is what was matured at `cuts.now`.

    Raises:
        RunError: one of the two cannot score the journal, or the challenger does not say what it was fitted on.
    """
    manifest = challenger.manifest
    delay = champion.manifest.context.label_delay
    # before the scores: what comes meanwhile is in them too, and is not asked for
    read = read_journal(state, manifest.schema, since=cuts.test_start, until=cuts.now, fields=True)
    scores = [score_journal(bundle, state, threads) for bundle in (champion, challenger)]
    table = read.table
    assert read.fields is not None
    rows = matured(table, cuts.now, delay) & (table["time"].to_numpy() < cuts.test_end)
    ids = table["id"].filter(pa.array(rows)).to_pylist()
    probability = [_scores_of(scored.ids, scored.probability, ids) for scored in scores]
    fields = read.fields.filter(pa.array(rows))
    schema = manifest.schema
    amount = None
    if schema.amount is not None:
        amount = table["amount"].to_numpy(zero_copy_only=False).astype(np.float64)[rows]
    compared = Compared(
        fraud=is_fraud(table)[rows],
        champion=probability[0],
        challenger=probability[1],
        user=np.unique(np.array(table["user"].to_pylist(), dtype=object), return_inverse=True)[1][rows],
        weight=weights(read)[rows],
        amount=amount,
        categories={column: fields[column].to_pylist() for column in schema.categorical},
    )
    period = Period(cuts.test_start, cuts.test_end, _labels_until(challenger))
    latency = step_latency(champion, challenger)
    return judge(champion.id, challenger.id, compared, manifest.parity, latency, period, settings)


def _scores_of(
    ids: Sequence[str], probability: npt.NDArray[np.float32], wanted: Sequence[str]
) -> npt.NDArray[np.float64]:
    at = {identity: i for i, identity in enumerate(ids)}
    return probability[[at[identity] for identity in wanted]].astype(np.float64)


def _labels_until(bundle: Bundle) -> int:
    """Time (ms) until which labels that a bundle was fitted on were known; of older bundles the last training row's."""
    said = bundle.manifest.fingerprint
    text = said.get("labels_until", said.get("last"))
    if not isinstance(text, str):
        raise RunError(f"{bundle.path}: the fingerprint does not say until when labels were fitted; train it again")
    return parse_instant(text)


def step_latency(champion: Bundle, challenger: Bundle) -> Latency:
    """Microseconds of one call of each step graph, as the service calls it: the median of calls that took turns."""
    steps = [StepGraph(bundle.step, bundle.manifest.graph) for bundle in (champion, challenger)]
    for step in steps:
        for name, value in initial_states(step.spec, 1).items():
            step.inputs[name][...] = value
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(STEP_TURNS):
        for step, measured in zip(steps, seconds, strict=True):
            for call in range(STEP_CALLS):
                began = perf_counter()
                step.run_bound()
                if call:  # the first finds the caches full of the other
                    measured.append(perf_counter() - began)
    return Latency(*(float(np.median(measured)) * 1e6 for measured in seconds))


def report_text(report: GateReport) -> str:
    """The content of gate.json."""
    return json.dumps(report.as_dict(), indent=1) + "\n"


def write_report(report: GateReport, out: Path) -> None:
    """gate.json."""
    with replaced_file(out) as file:
        file.write_text(report_text(report), encoding="utf-8")


def original_data(config_path: Path, data: Path | None) -> Path | None:
    """The original files: those given, or the configuration's where they are there. Raises RunError."""
    if data is not None:
        if not data.exists():
            raise RunError(f"--data: {data}: no such file or folder")
        return data
    path = load_config(config_path).data.path
    found = (config_path.parent / path).resolve() if path else None
    return found if found is not None and found.exists() else None
