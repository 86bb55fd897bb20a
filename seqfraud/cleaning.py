"""What becomes of rows that cannot be used: dropped, kept or refused, and always counted."""

from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.errors import DataError
from seqfraud.reading import Problem
from seqfraud.table import Coded, Transactions

KEPT = frozenset({"missing number"})
"""Problems that the model can live with: the graph has a place for a missing number."""


def clean(table: Transactions, problems: list[Problem]) -> tuple[Transactions, dict[str, Any]]:
    """Transactions in arrival order without repetitions, and the report.

    Raises:
        DataError: a row has a problem that the model cannot live with.
    """
    for problem in problems:
        if problem.reason not in KEPT:
            raise DataError(
                f"column {problem.column!r}: {problem.reason} in {int(problem.rows.sum())} of {len(table)} rows, "
                f"first in {problem.example}"
            )
    table = table.in_arrival_order()
    repeated = repeated_rows(table)
    report: dict[str, Any] = {
        "rows_read": len(table),
        "rows_used": int(len(table) - repeated.sum()),
        "repeated": int(repeated.sum()),
        "kept": [{"reason": p.reason, "column": p.column, "rows": int(p.rows.sum())} for p in problems],
    }
    return (table.take(~repeated) if repeated.any() else table), report


def repeated_rows(table: Transactions) -> npt.NDArray[np.bool_]:
    """Mask [N] of rows, in arrival order, whose id an earlier row has; the service would answer them as duplicates."""
    n = len(table)
    if isinstance(table.ids, Coded):
        keys: npt.NDArray[np.int64] = table.ids.codes.astype(np.int64)
    elif table.ids is not None:
        keys = table.ids
        if bool((np.diff(keys) > 0).all()):
            return np.zeros(n, dtype=bool)
    else:
        return _same_content(table)
    first = np.unique(keys, return_index=True)[1]
    out = np.ones(n, dtype=bool)
    out[first] = False
    return out


def _same_content(table: Transactions) -> npt.NDArray[np.bool_]:
    """Repetitions by derived id; only rows that share user and time with another can be some."""
    order = np.lexsort((table.time, table.user.codes))
    user, time = table.user.codes[order], table.time[order]
    same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    suspects = np.sort(order[np.r_[same, False] | np.r_[False, same]])
    out = np.zeros(len(table), dtype=bool)
    seen: set[str] = set()
    for row, text in zip(suspects.tolist(), table.take(suspects).id_texts(), strict=True):
        out[row] = text in seen
        seen.add(text)
    return out
