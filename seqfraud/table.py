"""Transactions as arrays. No Arrow here: the service has these types too, and starts without it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.canonical import content_digest, network_of, spell_time
from seqfraud.schema import Schema

MISSING = -1
"""The code of a missing text, and of an unknown label."""

Int64 = npt.NDArray[np.int64]

RowNumbers = npt.NDArray[np.signedinteger[Any]]
"""Rows as indices, of `row_type`: beside millions of rows it matters that they take 4 bytes where they can."""


def row_type(rows: int) -> type[np.int32] | type[np.int64]:
    """The narrower type that counts to `rows`."""
    return np.int32 if rows <= np.iinfo(np.int32).max else np.int64


def by_code(codes: npt.NDArray[np.int32]) -> Int64:
    """Indices by code, ties as they come, the missing left out. NumPy sorts 16 bits by radix, ten times as fast."""
    shifted = codes + 1
    order = np.argsort(shifted.astype(np.uint16), kind="stable")
    if shifted.max(initial=0) > 0xFFFF:
        order = order[np.argsort((shifted >> 16).astype(np.uint16)[order], kind="stable")]
    return order[np.count_nonzero(codes == MISSING) :]


@dataclass(frozen=True)
class Coded:
    """A column of texts: `values[codes[i]]`, or missing where the code is -1."""

    codes: npt.NDArray[np.int32]
    values: list[str]

    def take(self, rows: npt.NDArray[Any]) -> "Coded":
        """The same values for some rows."""
        return Coded(self.codes[rows], self.values)

    def texts(self) -> list[str | None]:
        """The text of every row."""
        values: npt.NDArray[np.object_] = np.array([*self.values, None], dtype=object)
        return list(values[self.codes])


@dataclass(frozen=True)
class Transactions:
    """N transactions as arrays.

    Attributes:
        user: users, texts.
        time: int64 [N], milliseconds since the epoch, UTC.
        numbers: float64 [N, len(schema.numbers)], NaN where missing.
        texts: one column for each of schema.texts; IP addresses as they are.
        label: int8 [N], 1 fraud, 0 honest, -1 unknown; None where the data have no label.
        known_at: int64 [N], when the label became known; None where the label delay says it.
        ids: the id column, None where ids are derived.
        file_row: int64 [N], the row in the file (or files in name order).
    """

    schema: Schema
    user: Coded
    time: Int64
    numbers: npt.NDArray[np.float64]
    texts: tuple[Coded, ...]
    label: npt.NDArray[np.int8] | None
    known_at: Int64 | None
    ids: Coded | Int64 | None
    file_row: Int64

    def __len__(self) -> int:
        return len(self.time)

    def take(self, rows: npt.NDArray[Any]) -> "Transactions":
        """Some rows (indices or a mask), in the order given."""
        ids = self.ids.take(rows) if isinstance(self.ids, Coded) else None if self.ids is None else self.ids[rows]
        return Transactions(
            schema=self.schema,
            user=self.user.take(rows),
            time=self.time[rows],
            numbers=self.numbers[rows],
            texts=tuple(column.take(rows) for column in self.texts),
            label=None if self.label is None else self.label[rows],
            known_at=None if self.known_at is None else self.known_at[rows],
            ids=ids,
            file_row=self.file_row[rows],
        )

    def replaced(
        self,
        numbers: npt.NDArray[np.float64],
        label: npt.NDArray[np.int8] | None,
        known_at: Int64 | None,
    ) -> "Transactions":
        """The same rows with other values in some columns."""
        return replace(self, numbers=numbers, label=label, known_at=known_at)

    def in_arrival_order(self) -> "Transactions":
        """Sorted by event time, ties by file row."""
        if len(self) < 2 or bool((np.diff(self.time) >= 0).all()):
            return self
        return self.take(np.argsort(self.time, kind="stable"))

    def numeric_inputs(self) -> npt.NDArray[np.float64]:
        """float64 [N, F], a view."""
        return self.numbers[:, : len(self.schema.numeric_inputs)]

    def amount(self) -> npt.NDArray[np.float64] | None:
        """float64 [N], or None where no amount is declared."""
        if self.schema.amount is None:
            return None
        return self.numbers[:, self.schema.numbers.index(self.schema.amount)]

    def text(self, column: str) -> Coded:
        """The texts of a column of schema.texts."""
        return self.texts[self.schema.texts.index(column)]

    def entities(self) -> list[Coded]:
        """The E context columns: values as they are, IP addresses as their network."""
        plain = [self.text(column) for column in self.schema.context]
        return plain + [networks_of(self.text(column)) for column in self.schema.ip]

    def id_texts(self) -> list[str]:
        """The id of every row as the service would answer it; without an id column derived from the content."""
        if isinstance(self.ids, Coded):
            return [text or "" for text in self.ids.texts()]
        if self.ids is not None:
            return [str(i) for i in self.ids.tolist()]
        rows = zip(self.user.texts(), self.time.tolist(), self.numbers.tolist(), self._text_rows(), strict=True)
        return [content_digest(user or "", time, numbers, texts).hex() for user, time, numbers, texts in rows]

    def raw_rows(self) -> Iterator[dict[str, Any]]:
        """Every row as a request spells it: column names, JSON values, missing ones as None."""
        schema = self.schema
        names = (schema.user, *schema.numbers, *schema.texts)
        ids: Iterator[Any] | None = iter(self.id_texts()) if schema.transaction is not None else None
        columns = zip(self.user.texts(), self.time.tolist(), self.numbers.tolist(), self._text_rows(), strict=True)
        for user, time, numbers, texts in columns:
            clean = [None if x != x else x for x in numbers]
            row: dict[str, Any] = dict(zip(names, (user, *clean, *texts), strict=True))
            row[schema.time] = spell_time(time, schema.time_unit)
            if ids is not None and schema.transaction is not None:
                row[schema.transaction] = next(ids)
            yield row

    def _text_rows(self) -> Iterator[tuple[str | None, ...]]:
        if not self.texts:
            return iter([()] * len(self))
        return zip(*(column.texts() for column in self.texts), strict=True)


def networks_of(addresses: Coded) -> Coded:
    """Codes of networks from codes of addresses."""
    nets = [network_of(text) for text in addresses.values]
    codes: dict[str, int] = {}
    map_to = np.array([MISSING if net is None else codes.setdefault(net, len(codes)) for net in nets] + [MISSING])
    return Coded(map_to[addresses.codes].astype(np.int32), list(codes))
