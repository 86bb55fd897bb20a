"""Split by time: history, train, validation (the last days before train_end), a gap without known labels, test."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from seqfraud.config import Config, format_instant
from seqfraud.errors import ConfigError, DataError
from seqfraud.table import MISSING, Transactions

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """Bounds in ms since the epoch; intervals are closed at the start and open at the end."""

    train_start: int
    validation_start: int
    train_end: int
    test_start: int
    test_end: int

    def as_dict(self) -> dict[str, str]:
        """ISO times for reports."""
        return {name: format_instant(value) for name, value in vars(self).items()}


def later_split(config: Config, table: Transactions) -> Split:
    """Bounds for measuring on other data: the test has no end."""
    bounds = _bounds(config, table)
    return replace(bounds, test_end=max(int(table.time[-1]), bounds.test_start) + 1)


def split_of(config: Config, table: Transactions) -> Split:
    """Bounds of the configuration, with what it leaves open taken from the data. Raises ConfigError."""
    first, last = int(table.time[0]), int(table.time[-1])
    bounds = _bounds(config, table)
    if not first < bounds.validation_start <= last:
        raise ConfigError(
            f"split: the data reach from {format_instant(first)} to {format_instant(last)}, but training would end "
            f"and validation begin at {format_instant(bounds.validation_start)}"
        )
    return bounds


def _bounds(config: Config, table: Transactions) -> Split:
    split = config.split
    if split is None:
        raise ConfigError("the section [split] is missing; training needs at least split.train_end")
    first, last = int(table.time[0]), int(table.time[-1])
    test_start = split.test_start if split.test_start is not None else split.train_end + config.data.label_delay
    return Split(
        train_start=max(split.train_start if split.train_start is not None else first, first),
        validation_start=split.train_end - split.validation,
        train_end=split.train_end,
        test_start=test_start,
        test_end=split.test_end if split.test_end is not None else max(last + 1, test_start + 1),
    )


@dataclass(frozen=True)
class Rows:
    """Masks [N] over transactions in arrival order. Train and validation rows have labels known when fitting ends."""

    before_validation: Mask
    train: Mask
    validation: Mask
    test: Mask

    def fitted(self, refit: bool) -> Mask:
        """The rows whose labels are fitted; with `refit` those of the validation days too."""
        return self.train | self.validation if refit else self.train


def rows_of(split: Split, table: Transactions, label_delay: int, fitting: bool = True) -> Rows:
    """Which rows are what. Labels that become known only after `test_start` are not used for fitting.

    Where nothing is to be fitted, there have to be test rows only.

    Raises:
        DataError: a part has no rows, no fraud or no honest transaction.
    """
    if table.label is None:
        raise DataError("training needs labels: data.label names no column")
    t = table.time
    known_at = t + label_delay if table.known_at is None else table.known_at
    usable = (table.label != MISSING) & (known_at <= split.test_start)
    between = (t >= split.train_start) & (t < split.validation_start)
    rows = Rows(
        before_validation=between,
        train=between & usable,
        validation=(t >= split.validation_start) & (t < split.train_end) & usable,
        test=(t >= split.test_start) & (t < split.test_end) & (table.label != MISSING),
    )
    if not fitting and not rows.test.any():
        raise DataError(
            f"there is no labelled row from {format_instant(split.test_start)} on (split.test_start); nothing to measure"
        )
    for name in ("train", "validation") if fitting else ():
        mask: Mask = getattr(rows, name)
        for value, word in ((1, "fraud"), (0, "honest transaction")):
            if not (table.label[mask] == value).any():
                raise DataError(
                    f"the {name} rows ({int(mask.sum())} with a label known at {format_instant(split.test_start)}) "
                    f"hold no {word}; expected both classes: check data.label and [split]"
                )
    return rows
