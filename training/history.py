"""Hand-made history features for the baselines: what a transaction's own user did before it.

Everything comes from earlier rows of the same user in arrival order, so equal times count in the order in which they
arrived, and from the row itself. No Python loop over rows or users: rows are sorted by user, windows are found by
searchsorted, sums are differences of running sums. Amounts are in the data's currency, ages and gaps in seconds, NaN
says "there is none".

Letters: N encoded rows, n rows asked for, D features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from seqfraud.config import DAY_MS, HOUR_MS
from seqfraud.sequences import Encoded
from seqfraud.table import MISSING, Coded, Transactions

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

WINDOWS = {"1h": HOUR_MS, "1d": DAY_MS, "7d": 7 * DAY_MS, "28d": 28 * DAY_MS}
"""Ages in ms up to which an earlier event counts, both ends included."""
LAGS = (1, 2, 3)
EARTH_KM = 6371.0088
SMALLEST_DEVIATION = 1e-4
"""Of the mean; a smaller deviation is taken for none."""


@dataclass(frozen=True)
class Features:
    """Features of n rows.

    Attributes:
        names: the D names.
        values: float32 [n, D].
        categorical: the places in `names` of those that are ids.
    """

    names: tuple[str, ...]
    values: npt.NDArray[np.float32]
    categorical: tuple[int, ...]


def history_features(table: Transactions, encoded: Encoded, rows: Int64) -> Features:
    """The history of each row's user.

    Args:
        table: transactions in arrival order.
        encoded: the same, by user; whole, not cut by `until`.
        rows: int64 [n] into the encoded rows.
    """
    columns = [(name, values[rows]) for name, values in _columns(table, encoded)]
    names = tuple(name for name, _ in columns)
    values = np.empty((len(rows), len(names)), dtype=np.float32)
    for i, (_, column) in enumerate(columns):
        values[:, i] = column
    return Features(names, values, tuple(i for i, name in enumerate(names) if name.endswith(" id")))


def _columns(table: Transactions, encoded: Encoded) -> Iterator[tuple[str, npt.NDArray[np.float64]]]:
    """Names and columns [N]."""
    past = Past(encoded.time, encoded.begin, encoded.end)
    yield from _gaps(past)
    amount = table.amount()
    by_user = None if amount is None else amount[encoded.arrival]
    if by_user is not None:
        yield from _amounts(past, by_user)
    for c, name in enumerate(table.schema.categorical):
        for lag in LAGS:
            before = past.earlier(encoded.categorical[:, c].astype(np.float64), lag)
            yield f"{name} {lag} before id", np.nan_to_num(before)
    texts = {column: table.text(column) for column in table.schema.categorical}
    texts |= dict(zip(table.schema.entities, table.entities(), strict=True))
    for name, coded in texts.items():
        yield from _familiarity(name, past, coded, encoded.arrival, by_user)
    for pair in table.schema.geo:
        at = [table.schema.numeric_inputs.index(column) for column in pair]
        yield from _places("/".join(pair), past, encoded.numeric[:, at].astype(np.float64))


class Past:
    """Where the earlier rows of each row's user are.

    Attributes:
        time: int64 [N] ms.
        begin: int64 [N], the first row of each row's user.
        row: int64 [N], 0 to N - 1.
    """

    def __init__(self, time: Int64, begin: Int64, end: Int64) -> None:
        self.time = time
        self.row = np.arange(len(time), dtype=np.int64)
        self.user = np.repeat(np.arange(len(begin), dtype=np.int64), end - begin)
        if len(self.user) != len(time):
            raise ValueError(f"{len(time)} rows, but the users have {len(self.user)}; expected whole histories")
        self.begin = begin[self.user]

    def earlier(self, values: Float64, lag: int) -> Float64:
        """float64 [N]: the value `lag` rows before, NaN where the user has no such row."""
        there = self.row - lag
        return np.where(there >= self.begin, values[np.maximum(there, 0)], np.nan)

    def since(self, window: int) -> Int64:
        """int64 [N]: the first row of the user at most `window` ms before; the row itself where there is none."""
        if not len(self.time):
            return self.row
        after = self.time - self.time.min()
        # so far apart that a window that reaches back beyond its user's first row ends before the user before
        span = int(after.max()) + window + 1
        key = self.user * span + after
        first: Int64 = np.searchsorted(key, key - window, side="left").astype(np.int64)
        return first


class RunningSum:
    """Sums of earlier values [N] by differences; long doubles, so that a user's sum does not feel the users before."""

    def __init__(self, values: Float64) -> None:
        self._sums = np.r_[np.zeros(1, dtype=np.longdouble), np.cumsum(values, dtype=np.longdouble)]

    def between(self, first: Int64, row: Int64) -> Float64:
        """float64 [N]: the sum of rows first to row - 1."""
        total: Float64 = (self._sums[row] - self._sums[first]).astype(np.float64)
        return total


def _ratio(part: Float64, whole: Float64) -> Float64:
    """part / whole [N], NaN where whole is 0."""
    ratio: Float64 = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole != 0)
    return ratio


def _gaps(past: Past) -> Iterator[tuple[str, Float64]]:
    seconds = (past.time - past.time.min(initial=0)) / 1000
    for lag in LAGS:
        yield f"seconds since {lag} before", seconds - past.earlier(seconds, lag)
    yield "events before", (past.row - past.begin).astype(np.float64)


def _amounts(past: Past, amount: Float64) -> Iterator[tuple[str, Float64]]:
    """Windows, ratios to the past, previous amounts; a missing amount counts as an event without one."""
    row, begin = past.row, past.begin
    known = ~np.isnan(amount)
    value = np.where(known, amount, 0.0)
    sums, counts = RunningSum(value), RunningSum(known.astype(np.float64))
    per_day: dict[str, tuple[Float64, Float64]] = {}
    for name, window in WINDOWS.items():
        first = past.since(window)
        count, total = (row - first).astype(np.float64), sums.between(first, row)
        mean = _ratio(total, counts.between(first, row))
        yield f"count {name}", count
        yield f"sum {name}", total
        yield f"mean {name}", mean
        yield f"amount / mean {name}", _ratio(amount, mean)
        per_day[name] = (count * DAY_MS / window, total * DAY_MS / window)
    for what, i in (("count", 0), ("sum", 1)):
        yield f"{what} 1d / 28d", _ratio(per_day["1d"][i], per_day["28d"][i])
    # squares of differences from the user's first amount: of large amounts alone they would lose the deviation
    centre = value[begin] if len(value) else value
    centred = np.where(known, value - centre, 0.0)
    number = counts.between(begin, row)
    offset = _ratio(RunningSum(centred).between(begin, row), number)
    variance = _ratio(RunningSum(centred**2).between(begin, row), number) - offset**2
    deviation = np.sqrt(np.maximum(variance, 0.0))
    mean = centre + offset
    deviation[~(deviation > SMALLEST_DEVIATION * np.abs(mean))] = 0.0
    yield "mean before", mean
    yield "deviation before", np.where(number > 0, deviation, np.nan)
    yield "amount / mean before", _ratio(amount, mean)
    yield "(amount - mean) / deviation before", _ratio(amount - mean, deviation)
    largest = past.earlier(_running_max(np.where(known, amount, -np.inf), past.user), 1)
    largest = np.where(np.isinf(largest), np.nan, largest)
    yield "amount / largest before", _ratio(amount, largest)
    for lag in LAGS:
        yield f"amount {lag} before", past.earlier(amount, lag)


def _running_max(values: Float64, user: Int64) -> Float64:
    """float64 [N]: running maximum within users, over ranks shifted by the user."""
    distinct, rank = np.unique(values, return_inverse=True)
    shift = user * len(distinct)
    return distinct[np.maximum.accumulate(rank + shift) - shift]


def _familiarity(
    name: str, past: Past, coded: Coded, arrival: Int64, amount: Float64 | None
) -> Iterator[tuple[str, Float64]]:
    """Whether and when the user had this value before, how many values it had, the amounts with this value."""
    codes = coded.codes[arrival].astype(np.int64)
    missing = codes == MISSING
    key = past.user * (len(coded.values) + 1) + codes + 1
    order = np.argsort(key, kind="stable")
    first = np.r_[True, key[order][1:] != key[order][:-1]][: len(order)]
    place = np.empty(len(order), dtype=np.int64)
    place[order] = past.row
    group = np.maximum.accumulate(np.where(first, past.row, 0))[place]
    """First place of each row's user and value in the order by user and value."""
    times = (place - group).astype(np.float64)
    seen = times > 0
    previous = order[np.maximum(place - 1, 0)]
    age = np.where(seen & ~missing, (past.time - past.time[previous]) / 1000, np.nan)
    yield f"{name}: times before", np.where(missing, np.nan, times)
    yield f"{name}: share before", np.where(missing, np.nan, _ratio(times, (past.row - past.begin).astype(np.float64)))
    yield f"{name}: seconds since", age
    values = RunningSum((~seen & ~missing).astype(np.float64)).between(past.begin, past.row)
    yield f"{name}: values before", values
    same = (codes == past.earlier(codes.astype(np.float64), 1)).astype(np.float64)
    yield f"{name}: same as before", np.where(missing | (past.row == past.begin), np.nan, same)
    if amount is not None:
        known = ~np.isnan(amount[order])
        total = RunningSum(np.where(known, amount[order], 0.0)).between(group, place)
        mean = _ratio(total, RunningSum(known.astype(np.float64)).between(group, place))
        yield f"{name}: amount / mean with it before", np.where(missing, np.nan, _ratio(amount, mean))


def _places(name: str, past: Past, place: Float64) -> Iterator[tuple[str, Float64]]:
    """Distance (km) and speed (km/h) since the last place, distance from the mean of all places before."""
    before = np.stack([past.earlier(place[:, i], 1) for i in (0, 1)], axis=1)
    distance = haversine_km(place, before)
    seconds = np.maximum((past.time - past.time[np.maximum(past.row - 1, 0)]) / 1000, 1.0)
    yield f"{name}: km from before", distance
    yield f"{name}: km/h since before", distance * 3600 / seconds
    known = ~np.isnan(place[:, 0]) & ~np.isnan(place[:, 1])
    number = RunningSum(known.astype(np.float64)).between(past.begin, past.row)
    there: list[Float64] = [np.where(known, place[:, i], 0.0) for i in (0, 1)]
    sums = [RunningSum(values).between(past.begin, past.row) for values in there]
    yield f"{name}: km from the mean before", haversine_km(place, np.stack([_ratio(s, number) for s in sums], axis=1))


def haversine_km(here: Float64, there: Float64) -> Float64:
    """Great-circle distance [N] of places [N, 2], latitude and longitude in degrees."""
    a, b = np.radians(here), np.radians(there)
    s = np.sin((a[:, 0] - b[:, 0]) / 2) ** 2 + np.cos(a[:, 0]) * np.cos(b[:, 0]) * np.sin((a[:, 1] - b[:, 1]) / 2) ** 2
    distance: Float64 = 2 * EARTH_KM * np.arcsin(np.sqrt(np.clip(s, 0.0, 1.0)))
    return distance
