"""What becomes of rows that cannot be used as they are: dropped, repaired or kept, by policy, and always counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.canonical import LARGEST_NUMBER, TIME_WORDS, network_of
from seqfraud.config import CleaningConfig, duration_words
from seqfraud.errors import DataError
from seqfraud.identifiers import looks_like_card
from seqfraud.reading import BEYOND, EXAMPLES, Problem
from seqfraud.table import MISSING, Coded, Transactions

Mask = npt.NDArray[np.bool_]

OUTLIER_SPREADS = 6.0
"""A number is unusual where its signed logarithm is further than this many interquartile ranges from the quartiles."""

_ID = "text that is not empty or a whole number"
_RULES: Mapping[str, tuple[str, str]] = {
    "missing time": ("bad_row", "{time}"),
    "unreadable time": ("bad_row", "{time}"),
    "missing user": ("bad_row", _ID),
    "missing id": ("bad_row", _ID),
    "not a number": ("bad_number", "a number"),
    "infinite number": ("bad_number", "a finite number"),
    BEYOND: ("bad_number", f"a number between -{LARGEST_NUMBER:g} and {LARGEST_NUMBER:g}"),
    "missing number": ("missing_number", "a number"),
    "negative amount": ("negative_amount", "0 or more"),
    "label neither 0 nor 1": ("bad_label", "0, 1 or nothing"),
    "unreadable label time": ("bad_label", "{time}"),
    "repeated id": ("repeated", "each id once"),
    "repeated id, other content": ("repeated", "each id once"),
}
"""For each reason the key of [cleaning] that decides about it, and what is expected instead."""

_ACTIONS = {"drop": "dropped", "missing": "set to missing", "unknown": "label unknown", "keep": "kept"}


@dataclass
class CleaningReport:
    """What was found and what became of it."""

    rows_read: int
    rows_used: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, problem: Problem, action: str) -> None:
        """Count a problem with what was done about it; rows are numbered from 1, a header is none."""
        rows = int(problem.rows.sum())
        self.findings.append(
            {
                "reason": problem.reason,
                "column": problem.column,
                "rows": rows,
                "share": rows / self.rows_read,
                "action": action,
                "examples": list(problem.examples),
            }
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for metrics.json and the report."""
        return {"rows_read": self.rows_read, "rows_used": self.rows_used, "findings": self.findings}


def clean(
    table: Transactions, problems: list[Problem], policy: CleaningConfig | None = None
) -> tuple[Transactions, dict[str, Any]]:
    """Transactions in arrival order that the model can use, and the report.

    Args:
        table: in file order, as read.
        problems: what reading found.
        policy: [cleaning]; its defaults where None.

    Raises:
        DataError: a policy is "error" and its problem is there, or more rows would be dropped than the policy allows.
    """
    policy = policy or CleaningConfig()
    report = CleaningReport(len(table))
    drop = np.zeros(len(table), dtype=bool)
    numbers, label, known_at = table.numbers, table.label, table.known_at
    for problem in (*problems, *_negative_amounts(table, problems)):
        action = _decided(policy, problem, table)
        report.add(problem, _ACTIONS[action])
        if action == "drop":
            drop |= problem.rows
        elif action == "missing":
            if numbers is table.numbers:
                numbers = numbers.copy()
            numbers[problem.rows, table.schema.numbers.index(problem.column)] = np.nan
        elif action == "unknown" and label is not None:
            label = np.where(problem.rows, np.int8(MISSING), label)
    table = table.replaced(numbers=numbers, label=label, known_at=known_at)
    if drop.any():
        table = table.take(~drop)
    if len(table) == 0:
        raise DataError("cleaning: no row is left; " + _worst(report, table))
    _note_order(table, report)
    table = table.in_arrival_order()
    table = _without_repetitions(table, policy, report)
    _note_outliers(table, report)
    _note_addresses(table, report)
    report.rows_used = len(table)
    dropped = 1 - report.rows_used / report.rows_read
    if dropped > policy.most_dropped:
        raise DataError(
            f"cleaning: {dropped:.1%} of {report.rows_read:,} rows would be dropped, at most {policy.most_dropped:.1%} may "
            f"(cleaning.most_dropped); {_worst(report, table)}"
        )
    return table, report.as_dict()


def _decided(policy: CleaningConfig, problem: Problem, table: Transactions) -> str:
    """The policy's word on a problem. Raises DataError where it is "error"."""
    if problem.reason == "missing label":
        return "unknown"  # not said yet, which is no mistake
    key, expected = _RULES[problem.reason]
    action: str = getattr(policy, key)
    if action == "error":
        raise DataError(
            f"column {problem.column!r}: {problem.reason} in {int(problem.rows.sum())} of {len(table)} rows, first in "
            f'{problem.examples[0]}; expected {_expected(expected, table)}; cleaning.{key} is "error"'
        )
    return action


def _expected(words: str, table: Transactions) -> str:
    return words.replace("{time}", TIME_WORDS[table.schema.time_unit])


def _worst(report: CleaningReport, table: Transactions) -> str:
    """The finding that costs most rows, in words."""
    lost = [f for f in report.findings if f["action"] == "dropped"]
    most = max(lost, key=lambda f: int(f["rows"]))
    expected = _expected(_RULES[most["reason"]][1], table)
    return (
        f"most for: column {most['column']!r}, {most['reason']}, {most['rows']:,} rows, such as {most['examples'][0]}; "
        f"expected {expected}"
    )


def _examples(rows: Mask, table: Transactions, shown: Callable[[int], str]) -> tuple[str, ...]:
    """Row numbers in the file and what stands there, for the first few."""
    found = np.flatnonzero(rows)[:EXAMPLES].tolist()
    return tuple(f"row {int(table.file_row[i]) + 1}: {shown(i)}" for i in found)


def _negative_amounts(table: Transactions, problems: list[Problem]) -> list[Problem]:
    """Amounts below 0; those that are bad numbers too, such as -inf, have been counted."""
    amount, column = table.amount(), table.schema.amount
    if amount is None or column is None:
        return []
    rows = amount < 0
    for problem in problems:
        if problem.column == column:
            rows &= ~problem.rows
    if not rows.any():
        return []
    examples = _examples(rows, table, lambda i: f"{amount[i]:g}")
    return [Problem("negative amount", column, rows, examples)]


def _note_order(table: Transactions, report: CleaningReport) -> None:
    """Rows that are older than one before them in the file."""
    newest = np.maximum.accumulate(table.time)
    rows = np.r_[False, table.time[1:] < newest[:-1]]
    if rows.any():
        examples = _examples(rows, table, lambda i: f"{duration_words(int(newest[i] - table.time[i]))} late")
        report.add(Problem("out of order", table.schema.time, rows, examples), "sorted by time")


def _note_outliers(table: Transactions, report: CleaningReport) -> None:
    """Numbers far from all others; kept, since an unusual amount may be what the model looks for."""
    for i, column in enumerate(table.schema.numbers):
        values = table.numbers[:, i]
        logs = np.sign(values) * np.log1p(np.abs(values))
        known = logs[~np.isnan(logs)]
        if len(known) == 0:
            continue
        low, high = np.quantile(known, [0.25, 0.75])
        reach = OUTLIER_SPREADS * (high - low)
        rows = (logs < low - reach) | (logs > high + reach)
        if reach > 0 and rows.any():
            examples = _examples(rows, table, lambda i, values=values: f"{values[i]:g}")  # type: ignore[misc]
            report.add(Problem("outlier", column, rows, examples), "kept")


def _note_addresses(table: Transactions, report: CleaningReport) -> None:
    """Texts that are no IP address and so have no network; the service takes them in the same way."""
    for column in table.schema.ip:
        texts = table.text(column)
        no_address = np.array([network_of(text) is None for text in texts.values] + [False])
        rows = no_address[texts.codes]
        if rows.any():
            examples = _examples(rows, table, lambda i, texts=texts: _shown(texts.values[texts.codes[i]]))  # type: ignore[misc]
            report.add(Problem("not an IP address", column, rows, examples), "kept without a network")


def _shown(text: str) -> str:
    return "(looks like a card number)" if looks_like_card(text) else repr(text)


def _without_repetitions(table: Transactions, policy: CleaningConfig, report: CleaningReport) -> Transactions:
    """The first row of each id in arrival order; the service would answer the others as duplicates or conflicts."""
    first = first_rows(table)
    repeated = first != np.arange(len(table))
    if not repeated.any():
        return table
    at = np.flatnonzero(repeated)
    other = np.zeros(len(table), dtype=bool)
    other[at] = _differs(table, at, first[at])
    column = table.schema.transaction or "(all declared columns)"
    for reason, rows in (("repeated id", repeated & ~other), ("repeated id, other content", other)):
        if rows.any():
            examples = _examples(rows, table, lambda i: f"also in row {int(table.file_row[first[i]]) + 1}")
            problem = Problem(reason, column, rows, examples)
            report.add(problem, _ACTIONS[_decided(policy, problem, table)])
    return table.take(~repeated)


def first_rows(table: Transactions) -> npt.NDArray[np.int64]:
    """int64 [N]: for each row in arrival order the first row that has its id."""
    index = np.arange(len(table))
    if isinstance(table.ids, Coded):
        keys: npt.NDArray[np.int64] = table.ids.codes.astype(np.int64)
    elif table.ids is not None:
        keys = table.ids
        if bool((np.diff(keys) > 0).all()):
            return index
    else:
        return _first_by_content(table)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    out: npt.NDArray[np.int64] = first[inverse]
    return out


def _first_by_content(table: Transactions) -> npt.NDArray[np.int64]:
    """Repetitions by derived id; only rows that share user and time with another can be some."""
    out = np.arange(len(table))
    order = np.lexsort((table.time, table.user.codes))
    user, time = table.user.codes[order], table.time[order]
    same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    suspects = np.sort(order[np.r_[same, False] | np.r_[False, same]])
    seen: dict[str, int] = {}
    for row, text in zip(suspects.tolist(), table.take(suspects).id_texts(), strict=True):
        out[row] = seen.setdefault(text, row)
    return out


def _differs(table: Transactions, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> Mask:
    """Whether rows a and b have other declared content."""
    x, y = table.numbers[a], table.numbers[b]
    out: Mask = (table.time[a] != table.time[b]) | (table.user.codes[a] != table.user.codes[b])
    out |= ((x != y) & ~(np.isnan(x) & np.isnan(y))).any(axis=1)
    for column in table.texts:
        out |= column.codes[a] != column.codes[b]
    return out
