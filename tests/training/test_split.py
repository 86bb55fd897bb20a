"""The split by time: which transaction is what at its exact millisecond, and which labels may be fitted."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from seqfraud.config import Config, DataConfig, Duration, Instant, SplitConfig
from seqfraud.errors import ConfigError, DataError
from seqfraud.reading import Coded, Transactions
from seqfraud.schema import Schema
from training.split import Split, rows_of, split_of

DAY = 86_400_000
START = 1_735_689_600_000  # 2025-01-01
SPLIT = Split(
    train_start=START + 2 * DAY,
    validation_start=START + 5 * DAY,
    train_end=START + 7 * DAY,
    test_start=START + 9 * DAY,
    test_end=START + 12 * DAY,
)


def table(
    time: npt.ArrayLike, label: npt.ArrayLike | None = None, known_at: npt.ArrayLike | None = None
) -> Transactions:
    """Transactions of one user."""
    times = np.asarray(time, dtype=np.int64)
    return Transactions(
        schema=Schema("user", "time", "ms"),
        user=Coded(np.zeros(len(times), dtype=np.int32), ["u"]),
        time=times,
        numbers=np.empty((len(times), 0)),
        texts=(),
        label=None if label is None else np.asarray(label, dtype=np.int8),
        known_at=None if known_at is None else np.asarray(known_at, dtype=np.int64),
        ids=None,
        file_row=np.arange(len(times)),
    )


def both_classes(times: list[int]) -> Transactions:
    """Every time twice, honest and fraud."""
    return table(np.repeat(times, 2), np.tile([0, 1], len(times)))


def times_of(mask: npt.NDArray[np.bool_], transactions: Transactions) -> list[int]:
    return sorted(set(transactions.time[mask].tolist()))


# --- Masks -------------------------------------------------------------------------------------------------------


def test_parts_are_closed_at_the_start_and_open_at_the_end() -> None:
    bounds = list(vars(SPLIT).values())
    data = both_classes(sorted(bound + ms for bound in bounds for ms in (-1, 0, 1)))
    rows = rows_of(SPLIT, data, label_delay=2 * DAY)
    train_start, validation_start, train_end, test_start, test_end = bounds
    assert times_of(rows.train, data) == [train_start, train_start + 1, validation_start - 1]
    assert times_of(rows.validation, data) == [validation_start, validation_start + 1, train_end - 1]
    assert times_of(rows.test, data) == [test_start, test_start + 1, test_end - 1]
    np.testing.assert_array_equal(rows.before_validation, rows.train)
    counts = rows.train.astype(int) + rows.validation + rows.test
    assert counts.max() == 1
    assert times_of(counts == 0, data) == [
        train_start - 1, train_end, train_end + 1, test_start - 1, test_end, test_end + 1
    ]  # fmt: skip


def test_labels_known_only_after_the_test_begins_are_not_fitted() -> None:
    """With a delay of 2 days and a test that starts 1 day after the train end, validation's last day is not usable."""
    split = replace(SPLIT, test_start=SPLIT.train_end + DAY)
    last = split.train_end - DAY
    data = both_classes([split.train_start, split.validation_start, last - 1, last, last + 1, split.train_end - 1])
    rows = rows_of(split, data, label_delay=2 * DAY)
    # `last` is known exactly when the test starts
    assert times_of(rows.validation, data) == [split.validation_start, last - 1, last]


def test_the_column_that_says_when_a_label_was_known_overrules_the_delay() -> None:
    train, validation, test = SPLIT.train_start, SPLIT.validation_start, SPLIT.test_start
    time = [train, train, train, train, train, validation, validation, validation, test, test]
    label = [0, 1, 1, 0, 1, 0, 1, 1, 0, 1]
    known_at = [train, test - 1, test, test + 1, 2**60, validation, test, test + 1, 2**60, 2**60]
    data = table(time, label, known_at)
    rows = rows_of(SPLIT, data, label_delay=10**6 * DAY)
    assert np.flatnonzero(rows.train).tolist() == [0, 1, 2]
    assert np.flatnonzero(rows.before_validation).tolist() == [0, 1, 2, 3, 4]  # what fits no label
    assert np.flatnonzero(rows.validation).tolist() == [5, 6]
    assert np.flatnonzero(rows.test).tolist() == [8, 9]  # the test is measured with labels known whenever


def test_unknown_labels_are_neither_fitted_nor_measured() -> None:
    time = np.repeat([SPLIT.train_start, SPLIT.validation_start, SPLIT.test_start], 3)
    data = table(time, [0, 1, -1] * 3)
    rows = rows_of(SPLIT, data, label_delay=0)
    for mask, expected in ((rows.train, [0, 1]), (rows.validation, [3, 4]), (rows.test, [6, 7])):
        assert np.flatnonzero(mask).tolist() == expected
    assert np.flatnonzero(rows.before_validation).tolist() == [0, 1, 2]


def test_without_test_rows_there_is_an_empty_test() -> None:
    rows = rows_of(SPLIT, both_classes([SPLIT.train_start, SPLIT.validation_start]), label_delay=0)
    assert not rows.test.any()


@pytest.mark.parametrize(
    ("time", "label", "message"),
    [
        ([2, 2, 5, 5], [0, 0, 0, 1], r"the train rows \(2 with a label known at 2025-01-10T00:00:00Z\) hold no fraud"),
        ([2, 2, 5, 5], [1, 1, 0, 1], r"the train rows \(2 .*hold no honest transaction; expected both classes"),
        ([2, 2, 5, 5], [0, 1, 1, 1], r"the validation rows \(2 .*hold no honest transaction"),
        ([2, 2, 5, 5], [0, 1, 0, -1], r"the validation rows \(1 .*hold no fraud"),
        ([2, 2, 8, 8], [0, 1, 0, 1], r"the validation rows \(0 .*hold no fraud"),
        ([0, 0, 5, 5], [0, 1, 0, 1], r"the train rows \(0 .*hold no fraud"),
    ],
)
def test_a_part_without_both_classes_is_an_error(time: list[int], label: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(SPLIT, table(START + DAY * np.array(time), label), label_delay=0)


def test_labels_that_come_too_late_are_an_error_that_says_so() -> None:
    data = both_classes([SPLIT.train_start, SPLIT.validation_start])
    with pytest.raises(DataError, match=r"the validation rows \(0 with a label known at 2025-01-10T00:00:00Z\)"):
        rows_of(SPLIT, data, label_delay=5 * DAY)


def test_data_without_labels_are_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.label names no column"):
        rows_of(SPLIT, table([SPLIT.train_start]), label_delay=0)


# --- Bounds ------------------------------------------------------------------------------------------------------


def config(delay: int = 3 * DAY, **split: Any) -> Config:
    settings = {"train_end": START + 20 * DAY, "validation": 5 * DAY, **split}
    typed = {k: Duration(v) if k == "validation" else Instant(v) for k, v in settings.items()}
    return Config(DataConfig("user", "time", label="fraud", label_delay=Duration(delay)), split=SplitConfig(**typed))


FIRST, LAST = START + 1234, START + 30 * DAY
DATA = table([FIRST, START + 10 * DAY, LAST])


def test_what_the_configuration_leaves_open_comes_from_the_data() -> None:
    assert split_of(config(), DATA) == Split(
        train_start=FIRST,
        validation_start=START + 15 * DAY,
        train_end=START + 20 * DAY,
        test_start=START + 23 * DAY,  # the gap is the label delay
        test_end=LAST + 1,  # the last row is a test row
    )


def test_what_the_configuration_says_is_taken() -> None:
    split = split_of(config(train_start=START + 4 * DAY, test_start=START + 21 * DAY, test_end=START + 25 * DAY), DATA)
    assert vars(split) == {
        "train_start": START + 4 * DAY,
        "validation_start": START + 15 * DAY,
        "train_end": START + 20 * DAY,
        "test_start": START + 21 * DAY,
        "test_end": START + 25 * DAY,
    }
    assert split.as_dict()["validation_start"] == "2025-01-16T00:00:00Z"


def test_a_train_start_before_the_data_is_the_first_row() -> None:
    assert split_of(config(train_start=START - 9 * DAY), DATA).train_start == FIRST


def test_the_test_never_ends_before_it_starts() -> None:
    split = split_of(config(train_end=LAST), DATA)
    assert (split.test_start, split.test_end) == (LAST + 3 * DAY, LAST + 3 * DAY + 1)


@pytest.mark.parametrize("train_end", [START - DAY, START + 5 * DAY, LAST + 5 * DAY + 1, LAST + 900 * DAY])
def test_a_train_end_outside_the_data_is_an_error_with_all_three_times(train_end: int) -> None:
    message = r"the data reach from 2025-01-01T00:00:01.234Z to 2025-01-31T00:00:00Z, but .* validation begin at \d{4}-"
    with pytest.raises(ConfigError, match=message):
        split_of(config(train_end=train_end), DATA)


@pytest.mark.parametrize("train_end", [FIRST + 5 * DAY + 1, LAST + 5 * DAY])
def test_the_first_and_the_last_possible_train_end(train_end: int) -> None:
    """One row before validation begins, or one row from then on."""
    assert split_of(config(train_end=train_end), DATA).train_end == train_end


def test_a_configuration_without_split_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"section \[split\] is missing; .*split\.train_end"):
        split_of(Config(DataConfig("user", "time")), DATA)
