"""Transactions as the raw columns of the graph, by user, in chunks with carried state.

Training, evaluation and bulk scoring all walk the same chunks.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from seqfraud.context import ContextSpec, context_columns
from seqfraud.errors import DataError
from seqfraud.table import Transactions, by_code, row_type
from seqfraud.vocabulary import Vocabulary


@dataclass(frozen=True)
class Encoded:
    """N transactions as graph inputs, sorted by user and, within a user, by arrival.

    Attributes:
        time: int64 [N] ms.
        numeric: float32 [N, F].
        categorical: int32 [N, C].
        context: float32 [N, K].
        begin, end: int64 [U]; user u has rows begin[u] to end[u].
        arrival: int64 [N]; row i is transaction arrival[i] of the arrival order.
    """

    time: npt.NDArray[np.int64]
    numeric: npt.NDArray[np.float32]
    categorical: npt.NDArray[np.int32]
    context: npt.NDArray[np.float32]
    begin: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    arrival: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.time)

    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [U]: events per user."""
        return self.end - self.begin

    def until(self, time: int) -> "Encoded":
        """The same arrays, every user ending before `time` (ms)."""
        earlier = np.r_[0, np.cumsum(self.time < time)]
        return dataclasses.replace(self, end=self.begin + earlier[self.end] - earlier[self.begin])

    def gather(self, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
        """Sequence inputs without length and states for rows [B, T]; rows of -1 are padding."""
        at = np.maximum(rows, 0)
        inputs: dict[str, npt.NDArray[np.generic]] = {"event_time": self.time[at]}
        for name in ("numeric", "categorical", "context"):
            column = getattr(self, name)
            if column.shape[1]:
                inputs[name] = column[at]
        if "categorical" in inputs:
            inputs["categorical"] = inputs["categorical"].astype(np.int64)
        return inputs


def require_numbers(table: Transactions, may_be_missing: Collection[str]) -> None:
    """Refuse a missing number where training saw none missing: the graph has no place for it and would give NaN.

    The service answers such a transaction with 422.

    Raises:
        DataError: with the column, the number of rows and the first one.
    """
    for i, column in enumerate(table.schema.numeric_inputs):
        if column in may_be_missing:
            continue
        rows = np.flatnonzero(np.isnan(table.numbers[:, i]))
        if len(rows):
            raise DataError(
                f"column {column!r}: no number in {len(rows)} of {len(table)} rows, first in row "
                f"{int(table.file_row[rows].min()) + 1}, but none was missing in the model's training rows; "
                "fill it, drop those rows, or train on data where it is missing too"
            )


def encode(table: Transactions, vocabularies: Sequence[Vocabulary], spec: ContextSpec) -> Encoded:
    """Graph inputs of transactions in arrival order, contexts included."""
    amount = table.amount()
    order = by_code(table.user.codes)
    place = np.empty(len(order), dtype=row_type(len(order)))
    place[order] = np.arange(len(order))
    context = context_columns(spec, table.entities(), table.time, amount, table.label, table.known_at, place)
    del place
    users = table.user.codes[order]
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.zeros(0, dtype=np.int64)
    categorical = np.empty((len(table), len(vocabularies)), dtype=np.int32)
    for c, vocabulary in enumerate(vocabularies):
        categorical[:, c] = vocabulary.encode(table.text(vocabulary.column))[order]
    return Encoded(
        time=table.time[order],
        numeric=table.numeric_inputs().astype(np.float32)[order],
        categorical=categorical,
        context=context,
        begin=starts.astype(np.int64),
        end=np.r_[starts[1:], len(users)].astype(np.int64),
        arrival=order,
    )


@dataclass(frozen=True)
class Chunk:
    """The next T events of a group of users.

    Attributes:
        rows: int64 [B, T] into the encoded rows, -1 where padded.
        length: int64 [B].
        first: whether the group's states are the initial ones.
    """

    rows: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    first: bool


def group_users(
    lengths: npt.NDArray[np.int64], size: int, rng: np.random.Generator | None = None
) -> list[npt.NDArray[np.int64]]:
    """Users in groups of `size` of similar length, longest first within a group.

    With `rng`, lengths are jittered and the groups shuffled, so that batches differ from epoch to epoch.
    """
    keys = lengths if rng is None else lengths * np.exp(rng.normal(0, 0.2, len(lengths)))
    order = np.argsort(-keys, kind="stable")
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    if rng is not None:
        rng.shuffle(groups)
    return [group[np.argsort(-lengths[group], kind="stable")] for group in groups]


def chunks(encoded: Encoded, users: npt.NDArray[np.int64], events: int) -> Iterator[Chunk]:
    """Chunks of at most `events` events of a group of users (longest first) until all have ended.

    Users whose events have ended leave the batch: each chunk has the first B users of the one before.
    """
    begin = encoded.begin[users]
    length = encoded.end[users] - begin
    steps = np.arange(events)
    for at in range(0, int(length.max(initial=0)), events):
        left = length - at
        alive = int((left > 0).sum())
        here = np.minimum(left[:alive], events)
        rows = begin[:alive, None] + at + steps[None, : int(here.max())]
        rows = np.where(steps[None, : rows.shape[1]] < here[:, None], rows, -1)
        yield Chunk(rows, here.astype(np.int64), first=at == 0)
