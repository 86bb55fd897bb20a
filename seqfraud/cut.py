"""Rows of a table as they were at one moment, for a reader that copies them a piece at a time while the table changes.

The table holds a `Cut` while somebody reads it so. Whoever is about to change a row asks the cut to keep it first: a row
that the reader has not come to yet is set aside as it is, once; rows already copied, and rows made after the cut, are of
no interest. The reader puts the rows that were set aside over those that it copies. All calls are made under the lock
that guards the table.
"""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Row = TypeVar("Row")


class Cut(Generic[Row]):
    """Which rows of a table were copied, and those that were set aside.

    Attributes:
        size: rows that the table had when the cut was made.
        copied: rows below this were copied.
    """

    def __init__(self, size: int, save: Callable[[int], Row]) -> None:
        self.size = size
        self.copied = 0
        self._save = save
        self._kept: dict[int, Row] = {}

    def keep(self, rows: Iterable[int]) -> None:
        """These rows are about to change."""
        for row in rows:
            if self.copied <= row < self.size and row not in self._kept:
                self._kept[row] = self._save(row)

    def advance(self, count: int) -> tuple[int, int, list[tuple[int, Row]]]:
        """The next rows to copy, at most `count`: first, end, and what was set aside of them by index in the piece."""
        begin, end = self.copied, min(self.copied + count, self.size)
        self.copied = end
        pop = self._kept.pop
        return begin, end, [(row - begin, pop(row)) for row in range(begin, end) if row in self._kept]
