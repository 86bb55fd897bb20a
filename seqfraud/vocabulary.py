"""Category -> id, fitted on training rows, kept in the manifest. Id 0 is padding, id 1 every unseen or missing value."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from seqfraud.table import MISSING, Coded

PADDING = 0
UNSEEN = 1
FIRST = 2


@dataclass(frozen=True)
class Vocabulary:
    """The known values of one categorical column; value i has id i + 2."""

    column: str
    values: tuple[str, ...]

    def __len__(self) -> int:
        """Number of ids, padding and unseen included."""
        return FIRST + len(self.values)

    def lookup(self) -> dict[str, int]:
        """Text -> id, for the service; `.get(text, UNSEEN)`."""
        return {text: FIRST + i for i, text in enumerate(self.values)}

    def encode(self, column: Coded) -> npt.NDArray[np.int64]:
        """int64 [N] ids of a column."""
        known = self.lookup()
        map_to = np.array([known.get(text, UNSEEN) for text in column.values] + [UNSEEN], dtype=np.int64)
        return map_to[column.codes]


def fit_vocabulary(
    column: str, texts: Coded, min_count: int, left_out: Callable[[str], bool] = lambda _: False
) -> Vocabulary:
    """The values seen at least `min_count` times, most frequent first, ties by text; some are left out by their text."""
    counts = np.bincount(texts.codes[texts.codes != MISSING], minlength=len(texts.values))
    kept = [i for i in range(len(texts.values)) if counts[i] >= min_count and not left_out(texts.values[i])]
    kept.sort(key=lambda i: (-counts[i], texts.values[i]))
    return Vocabulary(column, tuple(texts.values[i] for i in kept))
