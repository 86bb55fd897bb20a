"""A file as the service would meet it: transactions in arrival order, labels at the moment they become known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.table import MISSING, Transactions


@dataclass(frozen=True)
class DueLabel:
    """A label that becomes known at `known_at` (ms), of a row of the table."""

    transaction_id: str
    is_fraud: bool
    known_at: int
    row: int


@dataclass(frozen=True)
class Arrival:
    """The labels that become known before a transaction, and the transaction as a request spells it.

    `row` is its place in the table; None at the end, where only labels are left.
    """

    labels: list[DueLabel]
    row: int | None
    transaction: dict[str, Any]


def arrivals(
    table: Transactions, label_delay: int, since: int | None, until: int | None, ids: Sequence[str] | None = None
) -> Iterator[Arrival]:
    """Transactions with since <= time < until, each with the labels that became known since the one before.

    Labels that silence would say anyway, honest ones known no earlier than the label delay, are left out. Labels known
    before `since` or at or after `until` are left out too: a load up to a time and a replay from that time say each
    label once.

    Args:
        ids: what labels name the rows by; None: the table's own ids.
    """
    low = -(2**62) if since is None else since
    high = 2**62 if until is None else until
    ids = table.id_texts() if ids is None else ids
    wanted, known_at = _labels_worth_saying(table, label_delay)
    wanted = wanted[(known_at[wanted] >= low) & (known_at[wanted] < high)]
    wanted = wanted[np.argsort(known_at[wanted], kind="stable")]
    fraud = np.zeros(0) if table.label is None else table.label == 1
    labels = [DueLabel(ids[i], bool(fraud[i]), int(known_at[i]), i) for i in wanted.tolist()]
    at = 0
    rows = np.flatnonzero((table.time >= low) & (table.time < high))
    for row, transaction in zip(rows.tolist(), table.take(rows).raw_rows(), strict=True):
        time = int(table.time[row])
        begin = at
        while at < len(labels) and labels[at].known_at <= time:
            at += 1
        yield Arrival(labels[begin:at], row, transaction)
    if at < len(labels):
        yield Arrival(labels[at:], None, {})


def _labels_worth_saying(table: Transactions, label_delay: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows [n] whose label is not what silence says by then, and when each row's label is known [N]."""
    silence = table.time + label_delay
    known_at = silence if table.known_at is None else table.known_at
    if table.label is None:
        return np.zeros(0, dtype=np.int64), known_at
    said = (table.label == 1) | ((table.label != MISSING) & (known_at < silence))
    return np.flatnonzero(said), known_at
