"""Labels in bulk: a file's rows posted in batches to a running service, or given to one that is opened for it.

Posting twice is posting once: what a service has been told already counts as unchanged. So whatever stops a long file, the
command is run again from its beginning.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seqfraud.config import TimeUnit
from seqfraud.errors import DataError, RequestError, RunError
from seqfraud.reading import LabelColumns, column_names, read_labels
from seqfraud.table import MISSING
from serve.replay import Client

__all__ = ["AUTHOR", "BATCH", "Labelled", "over_http", "post_labels", "read_rows"]

AUTHOR = "labels"
BATCH = 1000
"""Labels of one request; a service takes 10,000 by default."""
PATIENCE_S = 60.0
"""A service that is overloaded or away is asked again for so long."""
FIRST_WAIT_S = 0.5
LINES = (".jsonl", ".ndjson")

Row = tuple[int, dict[str, Any]]
"""A row's number, from 1, and its label as it is posted; empty where it says nothing."""
Post = Callable[[list[dict[str, Any]]], Mapping[str, int]]
"""Labels to what became of them. Raises RequestError, of which the message begins with the place of a bad one."""

_PLACE = re.compile(r"\[([0-9]+)\]\.?")


@dataclass
class Labelled:
    """What became of a file's rows."""

    rows: int = 0
    new: int = 0
    changed: int = 0
    unchanged: int = 0
    unknown: int = 0
    without_label: int = 0

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


def read_rows(path: Path, columns: LabelColumns, unit: TimeUnit, source: str) -> tuple[int | None, Iterator[Row]]:
    """How many rows a CSV, Parquet or JSON lines file of labels has, if that is known, and the rows. Raises DataError.

    Args:
        columns: `known_at` may be missing from the file where it has the name that is the default.
        unit: of numbers in `known_at`.
        source: what every label says of where it is known from.
    """
    if path.name.endswith(LINES):
        return None, _read_lines(path, columns, unit, source)
    default = LabelColumns.known_at
    if columns.known_at == default and default not in column_names(path):
        columns = LabelColumns(columns.transaction, columns.is_fraud, None)
    table = read_labels(path, columns, unit)

    def rows() -> Iterator[Row]:
        said = zip(table.ids.codes.tolist(), table.is_fraud.tolist(), table.known_at.tolist(), strict=True)
        for number, (code, is_fraud, known_at) in enumerate(said, start=1):
            if is_fraud == MISSING:
                yield number, {}
            else:
                yield (
                    number,
                    _label(table.ids.values[code], is_fraud, None if known_at == MISSING else known_at, source),
                )

    return len(table), rows()


def _label(identity: object, is_fraud: object, known_at: object, source: str) -> dict[str, Any]:
    label = {"transaction_id": identity, "is_fraud": is_fraud, "source": source}
    return label if known_at is None else {**label, "known_at": known_at}


def _read_lines(path: Path, columns: LabelColumns, unit: TimeUnit, source: str) -> Iterator[Row]:
    """An object a line. What its values are is the service's to check."""
    scale = 1000 if unit == "s" else 1
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                row = _object(line) if line.strip() else {}
                if row is None or (row and columns.transaction not in row):
                    raise DataError(
                        f"{path}: row {number}: {line.strip()!r:.60}; expected a JSON object with {columns.transaction!r}"
                    )
                if row.get(columns.is_fraud) is None:
                    yield number, {}
                    continue
                known_at = None if columns.known_at is None else row.get(columns.known_at)
                if isinstance(known_at, int | float) and not isinstance(known_at, bool):
                    known_at *= scale
                yield number, _label(row[columns.transaction], row[columns.is_fraud], known_at, source)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; save the file as UTF-8") from error


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def post_labels(
    rows: Iterable[Row], post: Post, batch: int = BATCH, progress: Callable[[int], None] | None = None
) -> Labelled:
    """Post rows in their order, so that of several with one id the last one counts.

    Raises:
        RunError: a row was refused, or the service; everything before is stored.
    """
    done = Labelled()
    held: list[Row] = []

    def send() -> None:
        try:
            counts = post([label for _, label in held])
        except (RequestError, RunError) as error:
            place = _PLACE.match(str(error))
            number, words = (held[int(place[1])][0], str(error)[place.end() :]) if place else (held[0][0], str(error))
            before = f"the labels before row {held[0][0]} are stored, and count as unchanged when all are posted again"
            raise RunError(f"row {number}: {words}; {before}") from error
        for outcome in ("new", "changed", "unchanged", "unknown"):
            setattr(done, outcome, getattr(done, outcome) + counts[outcome])
        if progress:
            progress(len(held))
        held.clear()

    for number, label in rows:
        done.rows += 1
        if not label:
            done.without_label += 1
            continue
        held.append((number, label))
        if len(held) == batch:
            send()
    if held:
        send()
    return done


def over_http(client: Client, sleep: Callable[[float], object] = time.sleep) -> Post:
    """Posts to a running service; asks again, later and later, where it is overloaded or away."""

    def post(labels: list[dict[str, Any]]) -> Mapping[str, int]:
        waited, wait = 0.0, FIRST_WAIT_S
        while True:
            try:
                status, answer = client.call("POST", "/v1/labels", labels)
            except RunError:
                if waited >= PATIENCE_S:
                    raise
            else:
                if status == 200:
                    counts: dict[str, int] = answer
                    return counts
                error = answer.get("error", {})
                if status not in (429, 503) or waited >= PATIENCE_S:
                    raise RequestError(status, error.get("code", ""), error.get("message", str(answer)))
            sleep(wait)
            waited += wait
            wait = min(2 * wait, PATIENCE_S / 4)

    return post
