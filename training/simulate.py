"""Simulated card transactions whose fraud is visible in order and history, hardly in a single row.

`simulate` gives an Arrow table, `simulate_to` a Parquet file of any length in bounded memory; both
give the same rows for the same `Simulation`, in time order.

How it works. A small world is drawn first: cities, merchants (place, category, price level,
heavy-tailed popularity) and the windows in which some merchants are compromised. Users come in
blocks; a block draws its users' habits, then their honest life, then fraud, each from a random
stream of its own (seed, stream, block, source), and sorts its rows by time. `simulate_to` spills
the blocks into one file per span of time and then sorts span after span into a row group. A block's
size follows from the settings alone, so nothing about spilling, row groups or memory changes a row;
and a drift never changes a row before its date.

Honest life, besides ordinary purchases: trips (with time to travel), about two weeks in which *one*
habit shifts (hours or amounts or categories), shopping sprees within an hour or two, subscriptions
(equal amounts, regular but for some hours), tiny and large purchases, unknown devices and networks.

Fraud (`FRAUD_MIX` says how the frauds divide; `fraud_kind` explains a label, it is never an input):

test_burst           a small payment, 2 to 60 minutes later 3 to 6 larger ones, minutes apart, at
                     merchants new to the user. The small payment is labelled honest: labels are
                     what cardholders report, and payments like it are far more common alone.
habit_change         10 to 18 days in which someone else uses the account too: the user's hours
                     turned by 8 to 16 hours, 2 to 5 times the user's amounts (only users in the
                     lower half, so the amounts are ordinary for the population), other categories.
                     The user's own honest purchases go on in between.
impossible_hop       a purchase so far from the last one that it would take over 1000 km/h.
merchant_compromise  for 18 to 32 days about 6 of 10 transactions of a merchant are fraud; they are
                     what would have been honest ones, so only the merchant's recent history shows
                     them, never the row or the user's own history.
order                small online payment, fuel, electronics within hours, in this order: the last
                     is fraud. Each of the five other orders occurs as often, honest. With a longer
                     `order_gap` the user's own purchases come in between.
large_amount         one large amount.
trickle              only with the drift `new_pattern`: one small amount again and again at one
                     online merchant, at gaps that are equal to the millisecond.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime, timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from seqfraud.errors import ConfigError

Generator: TypeAlias = np.random.Generator
Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Records: TypeAlias = npt.NDArray[np.void]
Progress: TypeAlias = Callable[[int, int], None]

_MINUTE: Final = 60_000  # all times are int64 milliseconds since the first simulated midnight (UTC)
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR
_WEEKDAYS: Final = 7

# --- categories of merchants ----------------------------------------------------------------------


class Category(NamedTuple):
    """What the merchants of one category sell."""

    name: str
    share: float  # of the population's purchases
    median: float  # amount of an average user, currency units
    personal: bool  # whether a user's own level moves the amount
    online: bool  # bought from where the user is, at a merchant without a place


CATEGORIES: Final = (
    Category("grocery", 0.22, 28.0, True, False),
    Category("restaurant", 0.15, 18.0, True, False),
    Category("fuel", 0.08, 45.0, True, False),
    Category("transport", 0.09, 9.0, True, False),
    Category("clothing", 0.07, 55.0, True, False),
    Category("electronics", 0.05, 130.0, True, False),
    Category("pharmacy", 0.06, 16.0, True, False),
    Category("entertainment", 0.06, 25.0, True, False),
    Category("home", 0.05, 70.0, True, False),
    Category("travel", 0.03, 200.0, True, True),
    Category("digital", 0.07, 3.0, False, True),
    Category("marketplace", 0.07, 40.0, True, True),
)
CATEGORY_NAMES: Final = tuple(category.name for category in CATEGORIES)
_SHARE: Final = np.array([category.share for category in CATEGORIES])
_ONLINE: Final = np.array([category.online for category in CATEGORIES])
_PERSONAL: Final = np.array([category.personal for category in CATEGORIES])
_LOG_MEDIAN: Final = np.log([category.median for category in CATEGORIES])
_SHOP_SHARE: Final = np.where(_ONLINE, 0.0, _SHARE) / _SHARE[~_ONLINE].sum()
_DIGITAL: Final = CATEGORY_NAMES.index("digital")
_MARKETPLACE: Final = CATEGORY_NAMES.index("marketplace")
_SPLURGE: Final = np.array(
    [CATEGORY_NAMES.index(name) for name in ("electronics", "clothing", "home", "travel", "marketplace")]
)

# --- kinds of fraud -------------------------------------------------------------------------------

FRAUD_MIX: Final[dict[str, float]] = {  # share of all frauds
    "test_burst": 0.20,
    "habit_change": 0.20,
    "impossible_hop": 0.09,
    "merchant_compromise": 0.35,
    "order": 0.08,
    "large_amount": 0.08,
}
NEW_PATTERN: Final = "trickle"
FRAUD_KINDS: Final = (*FRAUD_MIX, NEW_PATTERN)
_CODE: Final = {kind: code for code, kind in enumerate(FRAUD_KINDS, start=1)}
_HONEST: Final = 0

_SUSPECT_ORDER: Final = ("digital", "fuel", "electronics")
_ORDERS: Final = np.array(
    list(itertools.permutations(CATEGORY_NAMES.index(name) for name in _SUSPECT_ORDER))
)  # [6, 3] category codes; the first row is the order that is fraud

_BURST_PAYMENTS: Final = (3, 6)  # after the test payment
_BURST_DELAY: Final = (2 * _MINUTE, 60 * _MINUTE)  # from the test payment to the burst
_BURST_GAP: Final = (1 * _MINUTE, 12 * _MINUTE)
_BURST_FACTOR: Final = (1.2, 3.0)  # of the user's own amounts

_TAKEOVER_LENGTH: Final = (10 * _DAY, 18 * _DAY)
_TAKEOVER_PAYMENTS: Final = (6, 13)
_SHIFT_HOURS: Final = (8.0, 16.0)  # of a habit change, fraud or honest
_SHIFT_FACTOR: Final = (2.0, 5.0)  # of a habit change, fraud or honest

_HOP_SPEED: Final = 1000.0  # km/h
_HOP_FRACTION: Final = (0.2, 0.9)  # of the time that the distance takes at _HOP_SPEED
_HOP_DISTANCE: Final = 400.0  # km at least, where there is a city that far

_COMPROMISE_LENGTH: Final = (18 * _DAY, 32 * _DAY)
_GOLDEN_RATIO: Final = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 lie evenly in 0..1
_COMPROMISE_CHANCE: Final = 0.6  # that a transaction of a compromised merchant is fraud
_COMPROMISE_TRAFFIC: Final = (0.45, 0.92)  # which quantiles of expected traffic can be compromised

_LARGE_AMOUNT: Final = (math.log(2500.0), 0.5)  # mean and deviation of the logarithm

_TRICKLE_SHARE: Final = 0.002  # of rows, before the drift's factor
_TRICKLE_PAYMENTS: Final = (6, 12)
_TRICKLE_GAP: Final = (20 * _HOUR, 60 * _HOUR)
_TRICKLE_AMOUNT: Final = (2.0, 12.0)

# --- honest life ----------------------------------------------------------------------------------

_RATE_SPREAD: Final = 0.6  # deviation of the logarithm of purchases per day over users
_LEVEL_SPREAD: Final = 0.7  # deviation of the logarithm of a user's own amount level
_PRICE_SPREAD: Final = 0.35  # the same for a merchant's price level
_AMOUNT_SPREAD: Final = (0.35, 0.75)  # range over users of the deviation of one user's amounts
_TASTE_SPREAD: Final = 0.6  # how much users differ in their categories
_WEEKDAY_SPREAD: Final = 0.35
_NIGHT_OWLS: Final = 0.08  # share of users
_NIGHT_SHIFT: Final = 9.0  # hours
_ANY_HOUR: Final = 0.06  # share of purchases at an hour that is no habit
_FAVOURITES: Final = 10  # merchants per user, visited by the weights 1, 1/2, 1/3, ...
_FAVOURITE_SHARE: Final = 0.7  # of purchases at home
_LARGE_PURCHASES: Final = (0.015, 3.0, 9.0)  # share of purchases, least and greatest factor
_SMALL_PURCHASES: Final = (0.03, 0.05, 0.3)
_LEAST_AMOUNT: Final = 0.5  # currency units

_SPREES: Final = 0.004  # per user and day
_SPREE_PURCHASES: Final = (3, 6)
_SPREE_GAP: Final = (2 * _MINUTE, 25 * _MINUTE)
_SPREE_SMALL: Final = 0.3  # of sprees have a small online purchase, never as the first

_SUBSCRIPTIONS: Final = 0.7  # per user
_WEEKLY: Final = 0.3  # of subscriptions; the others are monthly
_PERIODS: Final = (7 * _DAY, 30 * _DAY)
_SUBSCRIPTION_JITTER: Final = 2 * _HOUR  # deviation

_TRIP_SLOT: Final = 30 * _DAY  # at most one trip in each
_TRIP_CHANCE: Final = 0.3  # per slot
_TRIP_LENGTH: Final = (1 * _DAY, 10 * _DAY)
_TRIP_MARGIN: Final = 12 * _HOUR  # before and after a trip in its slot: longer than any journey
_TRAVEL_SPEED: Final = 600.0  # km/h, door to door in the long run
_TRAVEL_OVERHEAD: Final = 1.5  # hours

_PHASE_SLOT: Final = 45 * _DAY  # at most one honest change of one habit in each
_PHASE_CHANCE: Final = 0.06  # per slot
_PHASE_LENGTH: Final = (10 * _DAY, 18 * _DAY)
_HOURS, _AMOUNTS, _TASTE = range(3)  # the habit that changes

_OWN_DEVICES: Final = 3  # at most
_MAIN_DEVICE: Final = 0.8  # share of purchases
_UNKNOWN_DEVICE: Final = (0.02, 0.10)  # share of purchases: honest, fraud
_HOME_NETWORK: Final = (0.60, 0.40)  # share of purchases at home: honest, fraud
_MOBILE: Final = 0.75  # share of the purchases that do not come from the home network

# --- the world ------------------------------------------------------------------------------------

_USERS_PER_CITY: Final = 100
_CITIES: Final = (6, 64)
_LATITUDES: Final = (37.0, 57.0)
_LONGITUDES: Final = (-8.0, 26.0)
_CITY_TAIL: Final = 0.7  # exponent of the cities' sizes by rank
_CITY_SCATTER: Final = 0.04  # degrees, deviation
_ONLINE_SCATTER: Final = 0.005  # degrees, deviation of where a device says it is
_POPULARITY_TAIL: Final = 1.2  # Pareto exponent of merchants' popularity
_POPULARITY_CAP: Final = 100.0
_EARTH_RADIUS: Final = 6371.0  # km

_FIRST_OCTET: Final = 11  # city 0 has 11.0.0.0/8, the next 12.0.0.0/8, ...: none is reserved
_USERS_PER_NETWORK: Final = 20
_HOME_NETWORKS: Final = (4, 50_000)  # /24 networks of a city
_MOBILE_NETWORKS: Final = (60_000, 60_008)
_OTHER_NETWORKS: Final = (61_000, 61_400)

_DEVICE_BITS: Final = 48
_DEVICE_MIX: Final = 0x9E3779B97F4B  # odd, so that multiplying modulo 2**48 maps ids one to one
_DEVICES_PER_USER: Final = 4
_UNKNOWN_DEVICES: Final = (1 << 40, 1 << 41)  # before mixing: apart from every user's own

# --- blocks, spans and files ----------------------------------------------------------------------

_BLOCK_ROWS: Final = 250_000  # about; another number gives other data, so this is no knob
_SPAN_ROWS: Final = 1_000_000  # rows sorted and written at once
_FIRST_TRANSACTION: Final = 100_000_001
_MAX_USERS: Final = 100_000_000

_RECORD: Final = np.dtype(
    [
        ("time", "<i8"),
        ("device", "<i8"),
        ("amount", "<f8"),
        ("lat", "<f8"),
        ("long", "<f8"),
        ("user", "<i4"),
        ("merchant", "<i4"),
        ("ip", "<u4"),
        ("kind", "i1"),
    ]
)

SCHEMA: Final = pa.schema(
    [
        pa.field("transaction_id", pa.int64(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("time", pa.timestamp("ms", tz="UTC"), nullable=False),
        pa.field("amount", pa.float64(), nullable=False),
        pa.field("merchant_id", pa.int32(), nullable=False),
        pa.field("category", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("device_id", pa.int64(), nullable=False),
        pa.field("ip", pa.string(), nullable=False),
        pa.field("lat", pa.float64(), nullable=False),
        pa.field("long", pa.float64(), nullable=False),
        pa.field("is_fraud", pa.int8(), nullable=False),
        pa.field("fraud_kind", pa.string(), nullable=False),
    ]
)
_DICTIONARY_COLUMNS: Final = ["merchant_id", "category", "ip", "is_fraud", "fraud_kind"]


# --- settings -------------------------------------------------------------------------------------

DRIFT_KINDS: Final = ("new_pattern", "inflation", "fraud_rate")


def _whole(field: str, value: object, least: int, greatest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= greatest:
        raise ConfigError(f"{field}: expected a whole number from {least} to {greatest}, got {value!r}")


def _number(field: str, value: float, greatest: float, *, zero: bool = False) -> None:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not 0 <= value <= greatest or (value == 0 and not zero):
        least = "from 0" if zero else "above 0"
        raise ConfigError(f"{field}: expected a number {least} up to {greatest:g}, got {value!r}")


def _date(field: str, value: str) -> date:
    try:
        return date.fromisoformat(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{field}: expected a date such as '2025-01-01', got {value!r}") from None


@dataclass(frozen=True)
class Drift:
    """A change from midnight UTC of the date `at` on; no row before it changes.

    kind "new_pattern": frauds of the kind "trickle" appear, `factor` times 0.2 % of the rows.
    kind "inflation":   every amount is multiplied by `factor`.
    kind "fraud_rate":  cases of the kind `fraud_kind` that begin from then on come `factor` times
                        as often.
    """

    kind: str
    at: str
    factor: float = 1.5
    fraud_kind: str = ""

    def __post_init__(self) -> None:
        if self.kind not in DRIFT_KINDS:
            raise ConfigError(f"drift.kind: expected one of {', '.join(DRIFT_KINDS)}, got {self.kind!r}")
        _date("drift.at", self.at)
        _number("drift.factor", self.factor, 100.0, zero=self.kind == "fraud_rate")
        wanted = tuple(FRAUD_MIX) if self.kind == "fraud_rate" else ("",)
        if self.fraud_kind not in wanted:
            expected = f"one of {', '.join(wanted)}" if self.kind == "fraud_rate" else "nothing"
            raise ConfigError(f"drift.fraud_kind: expected {expected} for {self.kind}, got {self.fraud_kind!r}")


def parse_drift(text: str) -> Drift:
    """A drift as a command spells it: KIND@DATE[:FACTOR[:FRAUD_KIND]]. Raises ConfigError."""
    kind, separator, rest = text.partition("@")
    at, *more = rest.split(":")
    if not separator or len(more) > 2:
        raise ConfigError(
            f"drift: expected KIND@DATE[:FACTOR[:FRAUD_KIND]] such as 'inflation@2025-04-01:1.2', got {text!r}"
        )
    try:
        factor = float(more[0]) if more else Drift.factor
    except ValueError:
        raise ConfigError(f"drift.factor: expected a number such as 1.5, got {more[0]!r} in {text!r}") from None
    return Drift(kind, at, factor, *more[1:])


@dataclass(frozen=True)
class Simulation:
    """What to simulate. The defaults were fixed before a model of this project was tuned on them."""

    users: int = 2000
    days: int = 120
    seed: int = 7
    start: str = "2025-01-01"  # midnight UTC of this date
    drift: tuple[Drift, ...] = ()
    purchases_per_day: float = 0.9  # ordinary purchases per user and day, mean over users
    merchants_per_user: float = 0.4
    fraud_share: float = 0.0085  # of rows, about
    only_kind: str = ""  # one of FRAUD_MIX, which then has all the frauds; else they divide by FRAUD_MIX
    order_gap: tuple[float, float] = (20.0, 150.0)  # minutes between the steps of an order, least and greatest

    def __post_init__(self) -> None:
        _whole("users", self.users, 1, _MAX_USERS)
        _whole("days", self.days, 1, 1_000_000)
        _whole("seed", self.seed, 0, 2**63 - 1)
        _number("purchases_per_day", self.purchases_per_day, 1000.0)
        _number("merchants_per_user", self.merchants_per_user, 10.0)
        _number("fraud_share", self.fraud_share, 0.2, zero=True)
        if self.only_kind not in ("", *FRAUD_MIX):
            raise ConfigError(f"only_kind: expected one of {', '.join(FRAUD_MIX)}, got {self.only_kind!r}")
        least, greatest = self.order_gap
        if not 0 < least <= greatest - 1 < 1e5:
            raise ConfigError(
                f"order_gap: expected minutes, the second at least one more than the first, got {self.order_gap!r}"
            )
        first = _date("start", self.start)
        try:
            end = first + timedelta(days=self.days)
        except OverflowError:
            raise ConfigError(f"days: expected an end before the year 10000, got {self.days!r}") from None
        for drift in self.drift:
            if not first <= _date("drift.at", drift.at) < end:
                raise ConfigError(f"drift.at: expected a date from {first} to before {end}, got {drift.at!r}")

    @property
    def span(self) -> int:
        """Simulated time, ms."""
        return self.days * _DAY

    @property
    def start_ms(self) -> int:
        """The first midnight, ms since the epoch."""
        return (date.fromisoformat(self.start) - date(1970, 1, 1)).days * _DAY

    def fraud_rate(self, kind: str) -> float:
        """Frauds of a kind of FRAUD_MIX per user and day, where nothing drifts."""
        share = FRAUD_MIX[kind] if not self.only_kind else float(kind == self.only_kind)
        return self.fraud_share * share * self.rows_per_user_day

    def since_start(self, drift: Drift) -> int:
        """When `drift` begins, ms since the first midnight."""
        return (date.fromisoformat(drift.at) - date.fromisoformat(self.start)).days * _DAY

    @property
    def rows_per_user_day(self) -> float:
        """Expected rows per user and day, but for the few that come with fraud."""
        subscriptions = _SUBSCRIPTIONS * (_WEEKLY / _PERIODS[0] + (1 - _WEEKLY) / _PERIODS[1]) * _DAY
        return self.purchases_per_day + subscriptions + _SPREES * _mean(_SPREE_PURCHASES)

    @property
    def expected_rows(self) -> float:
        """About how many rows there will be."""
        return self.rows_per_user_day * self.users * self.days

    @property
    def users_per_block(self) -> int:
        """Users drawn together: it follows from the other settings, as do the blocks."""
        return min(self.users, max(1, int(_BLOCK_ROWS / (self.rows_per_user_day * self.days))))


@dataclass(frozen=True)
class Summary:
    """What a simulation came to."""

    rows: int
    users: int  # with a transaction
    merchants: int  # with a transaction
    frauds: int
    frauds_by_kind: dict[str, int]  # every kind, also those with none
    first: datetime | None  # UTC; None without rows
    last: datetime | None


# --- random streams and small helpers -------------------------------------------------------------


class _Stream(IntEnum):
    """Random streams: a change in one leaves what the others draw as it was."""

    WORLD = 0
    COMPROMISE = 1
    PEOPLE = 2
    ORDINARY = 3
    SPREE = 4
    SUBSCRIPTION = 5
    INTERCEPTED = 6
    FRAUD = 7


def _rng(settings: Simulation, stream: _Stream, *key: int) -> Generator:
    seeds = np.random.SeedSequence(settings.seed, spawn_key=(int(stream), *key))
    return np.random.Generator(np.random.SFC64(seeds))


def _mean(bounds: tuple[float, float]) -> float:
    return (bounds[0] + bounds[1]) / 2


def _count(rng: Generator, mean: float) -> int:
    """A whole number next to `mean`, right on average: the mix varies less than by Poisson."""
    return math.floor(mean + rng.random())


def _uniform(rng: Generator, bounds: tuple[float, float], count: int) -> Floats:
    return rng.uniform(bounds[0], bounds[1], count)


def _milliseconds(rng: Generator, bounds: tuple[int, int], count: int) -> Ints:
    return rng.integers(bounds[0], bounds[1], count)


def _log_normal(rng: Generator, spread: float, count: int) -> Floats:
    """[count] lognormal factors with mean 1."""
    return np.asarray(np.exp(spread * rng.standard_normal(count) - spread * spread / 2))


def _repeat(counts: Ints) -> tuple[Ints, Ints]:
    """Owner [N] of each of N = sum(counts) members, for counts [E], and place among them [N]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, place


def _running(gaps: Ints, owner: Ints, place: Ints) -> Ints:
    """Sums of gaps [N] from each owner's first member on (whose own gap counts) [N].

    Every owner has at least one member.
    """
    total = np.cumsum(gaps)
    before = (total - gaps)[place == 0]
    return np.asarray(total - before[owner])


def _kilometres(lat1: Floats, long1: Floats, lat2: Floats, long2: Floats) -> Floats:
    """Great-circle distance of places in degrees; arguments broadcast."""
    a1, o1, a2, o2 = (np.radians(angle) for angle in (lat1, long1, lat2, long2))
    chord = np.sin((a2 - a1) / 2) ** 2 + np.cos(a1) * np.cos(a2) * np.sin((o2 - o1) / 2) ** 2
    return np.asarray(2 * _EARTH_RADIUS * np.arcsin(np.sqrt(chord)))


# --- where fraud comes from: the settled rate and what drifts make of it --------------------------


@dataclass(frozen=True)
class _Source:
    """A stream of cases of one kind.

    The settled source (number 0) gives the rate without drift. A drift that raises a rate adds a
    source of its own, one that lowers it thins every source: so what came before the drift is drawn
    as if there were none.
    """

    number: int
    begin: int  # ms
    rate: float  # cases per user and day
    thinning: tuple[tuple[int, float], ...] = ()  # (from ms on, share of cases that stay)

    def kept(self, rng: Generator, start: Ints) -> Bools:
        """Which cases [E] stay, given when they start (ms) [E]."""
        share = np.ones(len(start))
        for begin, factor in self.thinning:
            share[start >= begin] *= factor
        return np.asarray(rng.random(len(start)) < share)


def _sources(settings: Simulation, kind: str, rate: float) -> list[_Source]:
    """The sources of a fraud kind that has `rate` cases per user and day where nothing drifts."""
    changes = [
        (settings.since_start(drift), drift.factor)
        for drift in sorted(settings.drift, key=settings.since_start)
        if drift.kind == "fraud_rate" and drift.fraud_kind == kind
    ]
    thinning = tuple((begin, factor) for begin, factor in changes if factor < 1)
    sources = [_Source(0, 0, rate, thinning)]
    for begin, factor in changes:
        if factor > 1:
            sources.append(_Source(len(sources), begin, rate * (factor - 1), thinning))
            rate *= factor
    return sources


def _new_sources(settings: Simulation) -> list[_Source]:
    """The sources of the new pattern: one per drift that brings it."""
    rate = _TRICKLE_SHARE * settings.rows_per_user_day / _mean(_TRICKLE_PAYMENTS)
    news = [drift for drift in settings.drift if drift.kind == "new_pattern"]
    return [
        _Source(number, settings.since_start(drift), rate * drift.factor) for number, drift in enumerate(news, start=1)
    ]


# --- the world ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _World:
    """Cities (C), merchants (M, sorted by cell) and cells: a place and a category.

    Place C stands for online, which is one place for everybody.
    """

    city_lat: Floats  # [C]
    city_long: Floats  # [C]
    city_share: Floats  # [C] of users
    distance: Floats  # [C, C] km
    by_distance: Ints  # [C, C] cities, the farthest first
    far: Ints  # [C] how many of those are far enough for a hop, at least 1
    place: Ints  # [M]
    category: Ints  # [M]
    lat: Floats  # [M]; of no meaning for an online merchant
    long: Floats  # [M]
    base: Floats  # [M] logarithm of an average user's amount
    public: npt.NDArray[np.int32]  # [M] merchant_id, in no order that means anything
    popularity: Floats  # [M] cumulative
    cell_first: Ints  # [cells] first merchant
    cell_last: Ints  # [cells] last merchant
    compromised: Ints  # [M] when a compromise begins, ms; the end of all time if it never does
    restored: Ints  # [M] when it ends, ms

    @property
    def cities(self) -> int:
        return len(self.city_lat)


def _cell(cities: int, city: Ints, category: Ints) -> Ints:
    """The cell [N] in which one buys `category` [N] when in `city` [N]."""
    place = np.where(_ONLINE[category], cities, city)
    return np.asarray(place * len(CATEGORIES) + category)


def _pick_merchants(rng: Generator, world: _World, city: Ints, category: Ints) -> Ints:
    """A merchant [N] for each city [N] and category [N], by popularity."""
    cell = _cell(world.cities, city, category)
    first, last = world.cell_first[cell], world.cell_last[cell]
    below = np.where(first > 0, world.popularity[first - 1], 0.0)
    target = below + rng.random(len(cell)) * (world.popularity[last] - below)
    # A target may round up to the cell's end: clip it back into the cell.
    return np.clip(np.searchsorted(world.popularity, target, side="right"), first, last)


def _merchant_cells(rng: Generator, settings: Simulation, city_share: Floats) -> Ints:
    """The cells [M] of all merchants, sorted: one for every cell ever asked for, then more."""
    cities = len(city_share)
    city, category = np.divmod(np.arange(cities * len(CATEGORIES)), len(CATEGORIES))
    askable = np.unique(_cell(cities, city, category))
    rest = max(0, round(settings.users * settings.merchants_per_user) - len(askable))
    more = _cell(
        cities,
        rng.choice(cities, rest, p=city_share),
        rng.choice(len(CATEGORIES), rest, p=_SHARE),
    )
    return np.sort(np.concatenate([askable, more]))


def _expected_traffic(settings: Simulation, cells: Ints, popularity: Floats, city_share: Floats) -> Floats:
    """Transactions per day [M] that merchants of these cells and this popularity [M] expect."""
    place, category = np.divmod(cells, len(CATEGORIES))
    in_cell = popularity / np.bincount(cells, weights=popularity)[cells]
    reach = np.append(city_share, 1.0)[place]
    return np.asarray(settings.rows_per_user_day * settings.users * _SHARE[category] * reach * in_cell)


def _spread(rng: Generator, begin: int, end: int, count: int) -> Ints:
    """Times [count] (ms) from begin to before end of which every prefix is spread evenly.

    Compromises are few: at random times a test period might have none, or most of them.
    """
    place = (rng.random() + np.arange(count) * _GOLDEN_RATIO) % 1.0
    return np.asarray(begin + (place * (end - begin)).astype(np.int64))


def _compromises(settings: Simulation, traffic: Floats) -> tuple[Ints, Ints]:
    """When each merchant [M] is compromised, at most once: from, until (ms)."""
    never = np.iinfo(np.int64).max
    begin, end = np.full(len(traffic), never), np.full(len(traffic), never)
    rng = _rng(settings, _Stream.COMPROMISE)
    low, high = np.quantile(traffic, _COMPROMISE_TRAFFIC)
    queue = rng.permutation(np.flatnonzero((traffic >= low) & (traffic <= high)))
    frauds_a_day = settings.fraud_rate("merchant_compromise")
    for source in _sources(settings, "merchant_compromise", frauds_a_day * settings.users):
        rng = _rng(settings, _Stream.COMPROMISE, source.number)
        length = _milliseconds(rng, _COMPROMISE_LENGTH, len(queue))
        # The settled rate holds from the first day, so compromises may have begun before it.
        lead = 0 if source.number else _COMPROMISE_LENGTH[1]
        start = _spread(rng, source.begin - lead, settings.span, len(queue))
        stop = start + length
        seen = np.clip(np.minimum(stop, settings.span) - np.maximum(start, 0), 0, None) / _DAY
        total = np.cumsum(seen * traffic[queue] * _COMPROMISE_CHANCE)
        goal = source.rate * (settings.span - source.begin) / _DAY
        # The last one may overshoot: it is taken as often as makes the mean right.
        last = int(np.searchsorted(total, goal))
        before = total[last - 1] if last else 0.0
        whole = last < len(queue) and rng.random() * (total[last] - before) < goal - before
        taken = slice(0, last + int(whole))
        kept = source.kept(rng, start)[taken]
        chosen = queue[taken][kept]
        begin[chosen], end[chosen] = start[taken][kept], stop[taken][kept]
        queue = queue[taken.stop :]
    return begin, end


def _make_world(settings: Simulation) -> _World:
    rng = _rng(settings, _Stream.WORLD)
    cities = int(np.clip(settings.users // _USERS_PER_CITY, *_CITIES))
    city_lat, city_long = _uniform(rng, _LATITUDES, cities), _uniform(rng, _LONGITUDES, cities)
    size = np.arange(1, cities + 1) ** -_CITY_TAIL
    city_share = size / size.sum()
    distance = _kilometres(city_lat[:, None], city_long[:, None], city_lat, city_long)

    cells = _merchant_cells(rng, settings, city_share)
    merchants = len(cells)
    place, category = np.divmod(cells, len(CATEGORIES))
    popularity = np.minimum(rng.random(merchants) ** (-1 / _POPULARITY_TAIL), _POPULARITY_CAP)
    town = np.minimum(place, cities - 1)
    traffic = _expected_traffic(settings, cells, popularity, city_share)
    compromised, restored = _compromises(settings, traffic)
    every_cell = np.arange((cities + 1) * len(CATEGORIES))
    return _World(
        city_lat=city_lat,
        city_long=city_long,
        city_share=city_share,
        distance=distance,
        by_distance=np.argsort(-distance, axis=1, kind="stable"),
        far=np.maximum(1, (distance >= _HOP_DISTANCE).sum(axis=1)),
        place=place,
        category=category,
        lat=city_lat[town] + _CITY_SCATTER * rng.standard_normal(merchants),
        long=city_long[town] + _CITY_SCATTER * rng.standard_normal(merchants),
        base=_LOG_MEDIAN[category] + _PRICE_SPREAD * rng.standard_normal(merchants),
        public=(rng.permutation(merchants) + 1).astype(np.int32),
        popularity=np.cumsum(popularity),
        cell_first=np.searchsorted(cells, every_cell, side="left"),
        cell_last=np.searchsorted(cells, every_cell, side="right") - 1,
        compromised=compromised,
        restored=restored,
    )


# --- people ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spells:
    """At most one spell per user and slot of time, kept flat [U * slots]."""

    slot: int  # ms
    slots: int
    begin: Ints  # ms
    end: Ints  # ms; equal to begin where there is none

    def index(self, user: Ints, time: Ints) -> Ints:
        """Where to look up user [N] at time [N], ms within the simulated span."""
        return np.asarray(user * self.slots + time // self.slot)


@dataclass(frozen=True)
class _People:
    """The habits of a block's users (U); users are counted from the block's first."""

    first: int  # number of the block's first user among all
    rate: Floats  # [U] ordinary purchases per day
    level: Floats  # [U] logarithm of the own amount level
    spread: Floats  # [U] deviation of the logarithm of amounts
    weekday: Floats  # [U, 7] relative to the mean day, from the first day's weekday on
    early: Floats  # [U] preferred hours
    late: Floats  # [U]
    early_share: Floats  # [U]
    hour_width: Floats  # [U] hours
    city: Ints  # [U]
    lat: Floats  # [U] of home
    long: Floats  # [U]
    taste: npt.NDArray[np.float32]  # [U, categories] cumulative
    favourites: Ints  # [U, _FAVOURITES] merchants
    devices: Ints  # [U] how many
    network: Ints  # [U] address at home, as a number
    trips: _Spells
    trip_city: Ints  # [U * slots]
    trip_travel: Ints  # [U * slots] ms of a journey
    phases: _Spells
    phase_habit: Ints  # [U * slots] which habit changes
    phase_hours: Floats  # [U * slots]
    phase_factor: Floats  # [U * slots]

    @property
    def count(self) -> int:
        return len(self.rate)

    def whereabouts(self, user: Ints, time: Ints) -> tuple[Ints, Bools]:
        """The city [N] in which user [N] is at time [N] (ms), and whether it is between two [N]."""
        at = self.trips.index(user, time)
        begin, end, travel = self.trips.begin[at], self.trips.end[at], self.trip_travel[at]
        away = (time >= begin) & (time < end)
        travelling = (end > begin) & ~away & (time >= begin - travel) & (time < end + travel)
        return np.where(away, self.trip_city[at], self.city[user]), travelling


def _spells(
    rng: Generator,
    users: int,
    span: int,
    slot: int,
    chance: float,
    length: tuple[int, int],
    margin: int,
) -> _Spells:
    slots = -(-span // slot)
    count = users * slots
    duration = _milliseconds(rng, length, count)
    room = slot - duration - 2 * margin
    begin = np.tile(np.arange(slots) * slot, users) + margin + (rng.random(count) * room).astype(np.int64)
    happens = rng.random(count) < chance
    return _Spells(slot, slots, begin, begin + duration * happens)


def _tastes(rng: Generator, users: int) -> npt.NDArray[np.float32]:
    weight = _SHARE * np.exp(_TASTE_SPREAD * rng.standard_normal((users, len(CATEGORIES))))
    total = np.cumsum(weight, axis=1)
    return np.asarray((total / total[:, -1:]).astype(np.float32))  # the last is 1 exactly


def _draw_categories(rng: Generator, taste: npt.NDArray[np.float32], user: Ints) -> Ints:
    """A category [N] by the taste of user [N]."""
    chance = rng.random(len(user), dtype=np.float32)
    return np.asarray((chance[:, None] >= taste[user]).sum(axis=1))


def _make_people(settings: Simulation, world: _World, block: int) -> _People:
    rng = _rng(settings, _Stream.PEOPLE, block)
    first = block * settings.users_per_block
    users = min(settings.users_per_block, settings.users - first)
    city = rng.choice(world.cities, users, p=world.city_share)
    taste = _tastes(rng, users)
    owner = np.repeat(np.arange(users), _FAVOURITES)
    favourites = _pick_merchants(rng, world, city[owner], _draw_categories(rng, taste, owner))
    weekday = np.exp(_WEEKDAY_SPREAD * rng.standard_normal((users, _WEEKDAYS)))
    night = _NIGHT_SHIFT * (rng.random(users) < _NIGHT_OWLS)
    city_networks = np.clip(settings.users * world.city_share / _USERS_PER_NETWORK, *_HOME_NETWORKS)
    trips = _spells(rng, users, settings.span, _TRIP_SLOT, _TRIP_CHANCE, _TRIP_LENGTH, _TRIP_MARGIN)
    traveller = np.repeat(np.arange(users), trips.slots)
    elsewhere = (city[traveller] + rng.integers(1, world.cities, len(traveller))) % world.cities
    journey = world.distance[city[traveller], elsewhere] / _TRAVEL_SPEED + _TRAVEL_OVERHEAD
    phases = _spells(rng, users, settings.span, _PHASE_SLOT, _PHASE_CHANCE, _PHASE_LENGTH, 0)
    return _People(
        first=first,
        rate=settings.purchases_per_day * _log_normal(rng, _RATE_SPREAD, users),
        level=_LEVEL_SPREAD * rng.standard_normal(users),
        spread=_uniform(rng, _AMOUNT_SPREAD, users),
        weekday=weekday / weekday.mean(axis=1, keepdims=True),
        early=12.0 + 2.0 * rng.standard_normal(users) + night,
        late=18.5 + 1.5 * rng.standard_normal(users) + night,
        early_share=_uniform(rng, (0.25, 0.75), users),
        hour_width=_uniform(rng, (0.8, 2.2), users),
        city=city,
        lat=world.city_lat[city] + _CITY_SCATTER * rng.standard_normal(users),
        long=world.city_long[city] + _CITY_SCATTER * rng.standard_normal(users),
        taste=taste,
        favourites=favourites.reshape(users, _FAVOURITES),
        devices=rng.integers(1, _OWN_DEVICES + 1, users),
        network=_addresses(rng, city, np.zeros(users), city_networks[city]),
        trips=trips,
        trip_city=elsewhere,
        trip_travel=(journey * _HOUR).astype(np.int64),
        phases=phases,
        phase_habit=rng.integers(0, 3, users * phases.slots),
        phase_hours=_uniform(rng, _SHIFT_HOURS, users * phases.slots),
        phase_factor=_uniform(rng, _SHIFT_FACTOR, users * phases.slots),
    )


def _addresses(rng: Generator, city: Ints, low: Floats, high: Floats) -> Ints:
    """IPv4 addresses as numbers [N], in the city's networks low [N] to below high [N]."""
    network = (low + rng.random(len(city)) * (high - low)).astype(np.int64)
    host = rng.integers(1, 255, len(city))
    return ((_FIRST_OCTET + city) << 24) + (network << 8) + host


# --- purchases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Purchases:
    """Who bought what, when and in which city [N each]; devices and places come later."""

    user: Ints
    time: Ints  # ms
    city: Ints
    merchant: Ints
    amount: Floats
    kind: Ints  # code of the fraud kind, _HONEST for none

    kept: Bools  # False where a drift thins the case out: its rows are dropped once they are complete

    def only(self, mask: Bools) -> _Purchases:
        columns = (getattr(self, field.name)[mask] for field in fields(self))
        return _Purchases(*columns)

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True)
class _Scene:
    """What a maker of purchases looks at."""

    settings: Simulation
    world: _World
    people: _People


@dataclass(frozen=True)
class _Cases:
    """Cases (E) of fraud, or sprees: whose, from when on, and whether a drift leaves them in."""

    user: Ints  # [E]
    start: Ints  # [E] ms
    kept: Bools  # [E]


def _draw_cases(rng: Generator, scene: _Scene, source: _Source, lead: int = 0) -> _Cases:
    """Cases spread evenly over users and time.

    `lead` (ms): how long before the first day a settled case may have begun.
    """
    begin = source.begin - (0 if source.number else lead)
    count = _count(rng, source.rate * scene.people.count * (scene.settings.span - begin) / _DAY)
    user = rng.integers(0, scene.people.count, count)
    start = rng.integers(begin, scene.settings.span, count)
    return _Cases(user, start, source.kept(rng, start))


def _members(rng: Generator, count: int, bounds: tuple[int, int]) -> tuple[Ints, Ints]:
    """bounds[0] to bounds[1] members for each of `count` cases: case [N] and place in it [N]."""
    return _repeat(rng.integers(bounds[0], bounds[1] + 1, count))


def _draw_hours(rng: Generator, people: _People, user: Ints) -> Floats:
    """Hours [N] as user [N] likes them; may lie beyond a day, to be taken modulo 24."""
    early = rng.random(len(user)) < people.early_share[user]
    habit = np.where(early, people.early[user], people.late[user])
    hours = habit + people.hour_width[user] * rng.standard_normal(len(user))
    return np.where(rng.random(len(user)) < _ANY_HOUR, 24 * rng.random(len(user)), hours)


def _clock(day: Ints, hours: Floats) -> Ints:
    """Time (ms) [N] of hours [N] (taken modulo 24) on day [N]."""
    return np.asarray(day * _DAY + np.minimum((hours % 24 * _HOUR).astype(np.int64), _DAY - 1))


def _draw_amounts(rng: Generator, scene: _Scene, user: Ints, merchant: Ints) -> Floats:
    """What user [N] ordinarily spends at merchant [N], currency units."""
    personal = _PERSONAL[scene.world.category[merchant]] * scene.people.level[user]
    noise = scene.people.spread[user] * rng.standard_normal(len(user))
    return np.exp(scene.world.base[merchant] + personal + noise)


def _buy(
    rng: Generator,
    scene: _Scene,
    user: Ints,
    time: Ints,
    category: Ints,
    kept: Bools,
    *,
    factor: Floats | float = 1.0,
    kind: Ints | int = _HONEST,
) -> _Purchases:
    """Purchases [N] of a category in the user's whereabouts, at merchants by popularity.

    Left out are those outside the simulated time and those during a journey.
    """
    inside = (time >= 0) & (time < scene.settings.span)
    city, travelling = scene.people.whereabouts(user, np.clip(time, 0, scene.settings.span - 1))
    merchant = _pick_merchants(rng, scene.world, city, category)
    amount = _draw_amounts(rng, scene, user, merchant) * factor
    kinds = np.broadcast_to(np.asarray(kind, dtype=np.int64), user.shape)
    return _Purchases(user, time, city, merchant, amount, kinds, kept).only(inside & ~travelling)


# --- honest life ----------------------------------------------------------------------------------


def _active_days(rng: Generator, scene: _Scene) -> tuple[Ints, Ints]:
    """User [N] and day [N] of the ordinary purchases, by rate and weekday; users ascend."""
    people, days = scene.people, scene.settings.days
    peak = people.weekday.max(axis=1)
    user = np.repeat(np.arange(people.count), rng.poisson(people.rate * days * peak))
    day = rng.integers(0, days, len(user))
    chance = people.weekday.ravel()[user * _WEEKDAYS + day % _WEEKDAYS]
    accepted = rng.random(len(user)) * peak[user] < chance
    return user[accepted], day[accepted]


def _draw_ordinary(rng: Generator, scene: _Scene) -> _Purchases:
    people, world = scene.people, scene.world
    user, day = _active_days(rng, scene)
    phase = people.phases.index(user, day * _DAY)
    shifted = (day * _DAY >= people.phases.begin[phase]) & (day * _DAY < people.phases.end[phase])
    habit = np.where(shifted, people.phase_habit[phase], -1)
    hours = _draw_hours(rng, people, user) + np.where(habit == _HOURS, people.phase_hours[phase], 0.0)
    time = _clock(day, hours)
    city, travelling = people.whereabouts(user, time)

    at_favourite = rng.random(len(user)) < _FAVOURITE_SHARE
    at_favourite &= (city == people.city[user]) & (habit != _TASTE)
    weight = np.cumsum(1 / np.arange(1, _FAVOURITES + 1))
    rank = np.searchsorted(weight, rng.random(len(user)) * weight[-1], side="right")
    merchant = people.favourites.ravel()[user * _FAVOURITES + rank]
    other = np.flatnonzero(~at_favourite)
    category = _draw_categories(rng, people.taste, user[other])
    splurge = habit[other] == _TASTE
    category[splurge] = rng.choice(_SPLURGE, int(splurge.sum()))
    merchant[other] = _pick_merchants(rng, world, city[other], category)

    amount = _draw_amounts(rng, scene, user, merchant)
    amount *= np.where(habit == _AMOUNTS, people.phase_factor[phase], 1.0)
    for share, least, greatest in (_LARGE_PURCHASES, _SMALL_PURCHASES):
        some = np.flatnonzero(rng.random(len(user)) < share)
        amount[some] *= _uniform(rng, (least, greatest), len(some))
    kind, kept = np.full(len(user), _HONEST), np.ones(len(user), dtype=np.bool_)
    return _Purchases(user, time, city, merchant, amount, kind, kept).only(~travelling)


def _draw_sprees(rng: Generator, scene: _Scene) -> _Purchases:
    cases = _draw_cases(rng, scene, _Source(0, 0, _SPREES))
    of, place = _members(rng, len(cases.user), _SPREE_PURCHASES)
    gap = np.where(place == 0, 0, _milliseconds(rng, _SPREE_GAP, len(of)))
    user, time = cases.user[of], cases.start[of] + _running(gap, of, place)
    category = _draw_categories(rng, scene.people.taste, user)
    # At a place the shortest spree has too, so that every spree can have its small payment.
    small_place = rng.integers(1, _SPREE_PURCHASES[0], len(cases.user))
    has_small = rng.random(len(cases.user)) < _SPREE_SMALL
    category[(place == small_place[of]) & has_small[of]] = _DIGITAL
    return _buy(rng, scene, user, time, category, cases.kept[of])


def _draw_subscriptions(rng: Generator, scene: _Scene) -> _Purchases:
    user = np.repeat(np.arange(scene.people.count), rng.poisson(_SUBSCRIPTIONS, scene.people.count))
    period = np.where(rng.random(len(user)) < _WEEKLY, *_PERIODS)
    first = (rng.random(len(user)) * period).astype(np.int64)
    merchant = _pick_merchants(rng, scene.world, scene.people.city[user], np.full(len(user), _DIGITAL))
    price = _draw_amounts(rng, scene, user, merchant)
    of, place = _repeat(scene.settings.span // period + 1)
    jitter = (_SUBSCRIPTION_JITTER * rng.standard_normal(len(of))).astype(np.int64)
    time = first[of] + place * period[of] + jitter
    inside = (time >= 0) & (time < scene.settings.span)
    city, travelling = scene.people.whereabouts(user[of], np.clip(time, 0, scene.settings.span - 1))
    kind, kept = np.full(len(of), _HONEST), np.ones(len(of), dtype=np.bool_)
    every = _Purchases(user[of], time, city, merchant[of], price[of], kind, kept)
    return every.only(inside & ~travelling)


# --- fraud ----------------------------------------------------------------------------------------

_Maker: TypeAlias = Callable[[Generator, _Scene, _Source, _Purchases], _Purchases]
"""Makes the purchases of one source of a fraud kind, given the block's ordinary purchases."""


def _is_familiar(scene: _Scene, bought: _Purchases, ordinary: _Purchases) -> Bools:
    """Which purchases [N] are made where the user also makes ordinary ones."""
    concerned = np.zeros(scene.people.count, dtype=np.bool_)
    concerned[bought.user] = True
    some = np.flatnonzero(concerned[ordinary.user])
    merchants = len(scene.world.public)
    visited = ordinary.user[some] * merchants + ordinary.merchant[some]
    return np.isin(bought.user * merchants + bought.merchant, visited)


def _at_new_merchants(rng: Generator, scene: _Scene, bought: _Purchases, ordinary: _Purchases) -> _Purchases:
    """The purchases, frauds moved to merchants unknown to the user or dropped if none is found.

    First to others of the category; a small town may have none, so then to an online market place.
    """
    world = scene.world
    for category in (world.category[bought.merchant], np.full(len(bought), _MARKETPLACE)):
        again = np.flatnonzero((bought.kind != _HONEST) & _is_familiar(scene, bought, ordinary))
        merchant, amount = bought.merchant.copy(), bought.amount.copy()
        merchant[again] = _pick_merchants(rng, world, bought.city[again], category[again])
        amount[again] *= np.exp(world.base[merchant[again]] - world.base[bought.merchant[again]])
        bought = replace(bought, merchant=merchant, amount=amount)
    return bought.only((bought.kind == _HONEST) | ~_is_familiar(scene, bought, ordinary))


def _draw_test_bursts(rng: Generator, scene: _Scene, source: _Source, ordinary: _Purchases) -> _Purchases:
    cases = _draw_cases(rng, scene, source)
    of, place = _members(rng, len(cases.user), (_BURST_PAYMENTS[0] + 1, _BURST_PAYMENTS[1] + 1))
    delay = _milliseconds(rng, _BURST_DELAY, len(of))
    gap = np.select([place == 0, place == 1], [0, delay], _milliseconds(rng, _BURST_GAP, len(of)))
    time = cases.start[of] + _running(gap, of, place)
    category = np.where(place == 0, _DIGITAL, rng.choice(_SPLURGE, len(of)))
    factor = np.where(place == 0, 1.0, _uniform(rng, _BURST_FACTOR, len(of)))
    kind = np.where(place == 0, _HONEST, _CODE["test_burst"])
    bought = _buy(rng, scene, cases.user[of], time, category, cases.kept[of], factor=factor, kind=kind)
    return _at_new_merchants(rng, scene, bought, ordinary)


def _draw_habit_changes(rng: Generator, scene: _Scene, source: _Source, _: _Purchases) -> _Purchases:
    cases = _draw_cases(rng, scene, source, lead=_TAKEOVER_LENGTH[1])
    people, count = scene.people, len(cases.user)
    modest = np.argsort(people.level, kind="stable")[: (people.count + 1) // 2]
    victim = modest[cases.user % len(modest)]
    length = _milliseconds(rng, _TAKEOVER_LENGTH, count)
    turned = _uniform(rng, _SHIFT_HOURS, count)
    factor = _uniform(rng, _SHIFT_FACTOR, count)
    of, _place = _members(rng, count, _TAKEOVER_PAYMENTS)
    user = victim[of]
    moment = cases.start[of] + (rng.random(len(of)) * length[of]).astype(np.int64)
    time = _clock(moment // _DAY, _draw_hours(rng, people, user) + turned[of])
    # An hour before the one at which the case began on its first day: the same hour a day later.
    time += np.where(time < cases.start[of], _DAY, 0)
    category = rng.choice(_SPLURGE, len(of))
    kind = _CODE["habit_change"]
    return _buy(rng, scene, user, time, category, cases.kept[of], factor=factor[of], kind=kind)


def _draw_hops(rng: Generator, scene: _Scene, source: _Source, ordinary: _Purchases) -> _Purchases:
    """Every case hangs on an ordinary purchase; the one that hops is made shortly after it."""
    world, span = scene.world, scene.settings.span
    choice = np.flatnonzero(ordinary.time >= source.begin)
    wanted = source.rate * scene.people.count * (span - source.begin) / _DAY
    count = _count(rng, wanted) if len(choice) else 0
    last = choice[rng.integers(0, max(1, len(choice)), count)]
    here = ordinary.city[last]
    there = world.by_distance[here, (rng.random(count) * world.far[here]).astype(np.int64)]
    hours = world.distance[here, there] / _HOP_SPEED * _uniform(rng, _HOP_FRACTION, count)
    time = ordinary.time[last] + (hours * _HOUR).astype(np.int64)
    category = rng.choice(len(CATEGORIES), count, p=_SHOP_SHARE)
    user = ordinary.user[last]
    merchant = _pick_merchants(rng, world, there, category)
    amount = _draw_amounts(rng, scene, user, merchant)
    kind, kept = np.full(count, _CODE["impossible_hop"]), source.kept(rng, time)
    return _Purchases(user, time, there, merchant, amount, kind, kept).only(time < span)


def _draw_orders(rng: Generator, scene: _Scene, source: _Source, _: _Purchases) -> _Purchases:
    """All six orders alike; a drift makes only the one that is fraud more or less frequent."""
    every_order = _Source(source.number, source.begin, source.rate * len(_ORDERS), source.thinning)
    cases = _draw_cases(rng, scene, every_order)
    order = rng.integers(0, len(_ORDERS), len(cases.user))
    suspect = order == 0
    kept = np.where(suspect, cases.kept, source.number == 0)
    of, place = _repeat(np.full(len(cases.user), len(_SUSPECT_ORDER)))
    least, greatest = scene.settings.order_gap
    bounds = (round(least * _MINUTE), round(greatest * _MINUTE))
    gap = np.where(place == 0, 0, _milliseconds(rng, bounds, len(of)))
    time = cases.start[of] + _running(gap, of, place)
    fraud = suspect[of] & (place == len(_SUSPECT_ORDER) - 1)
    kind = np.where(fraud, _CODE["order"], _HONEST)
    return _buy(rng, scene, cases.user[of], time, _ORDERS[order[of], place], kept[of], kind=kind)


def _draw_large_amounts(rng: Generator, scene: _Scene, source: _Source, _: _Purchases) -> _Purchases:
    cases = _draw_cases(rng, scene, source)
    category = rng.choice(_SPLURGE, len(cases.user))
    kind = _CODE["large_amount"]
    bought = _buy(rng, scene, cases.user, cases.start, category, cases.kept, kind=kind)
    amount = np.exp(rng.normal(*_LARGE_AMOUNT, len(bought)))
    return replace(bought, amount=amount)


def _draw_trickles(rng: Generator, scene: _Scene, source: _Source, _: _Purchases) -> _Purchases:
    cases = _draw_cases(rng, scene, source)
    count = len(cases.user)
    gap = _milliseconds(rng, _TRICKLE_GAP, count)
    price = _uniform(rng, _TRICKLE_AMOUNT, count)
    merchant = _pick_merchants(rng, scene.world, scene.people.city[cases.user], np.full(count, _DIGITAL))
    of, place = _members(rng, count, _TRICKLE_PAYMENTS)
    user, time = cases.user[of], cases.start[of] + place * gap[of]
    city, _travelling = scene.people.whereabouts(user, np.minimum(time, scene.settings.span - 1))
    kind = np.full(len(of), _CODE[NEW_PATTERN])
    every = _Purchases(user, time, city, merchant[of], price[of], kind, cases.kept[of])
    return every.only(time < scene.settings.span)


_MAKERS: Final[dict[str, tuple[_Maker, float]]] = {  # and the mean number of frauds in a case
    "test_burst": (_draw_test_bursts, _mean(_BURST_PAYMENTS)),
    "habit_change": (_draw_habit_changes, _mean(_TAKEOVER_PAYMENTS)),
    "impossible_hop": (_draw_hops, 1.0),
    "order": (_draw_orders, 1.0),
    "large_amount": (_draw_large_amounts, 1.0),
}


def _fraud_sources(settings: Simulation) -> Iterator[tuple[str, _Maker, _Source]]:
    """Everything that adds fraud to a block: all but what compromised merchants leak."""
    for kind, (maker, frauds) in _MAKERS.items():
        for source in _sources(settings, kind, settings.fraud_rate(kind) / frauds):
            yield kind, maker, source
    for source in _new_sources(settings):
        yield NEW_PATTERN, _draw_trickles, source


def _intercept(rng: Generator, world: _World, honest: _Purchases) -> _Purchases:
    """Honest purchases, with those turned into fraud that a compromised merchant leaked."""
    time, merchant = honest.time, honest.merchant
    open_to_fraud = (time >= world.compromised[merchant]) & (time < world.restored[merchant])
    leaked = open_to_fraud & (rng.random(len(honest)) < _COMPROMISE_CHANCE)
    return replace(honest, kind=np.where(leaked, _CODE["merchant_compromise"], honest.kind))


# --- rows -----------------------------------------------------------------------------------------


def _draw_devices(rng: Generator, people: _People, user: Ints, covert: Ints) -> Ints:
    """device_id [N]; covert [N] is 1 where the purchase is made by someone else who shows it."""
    rank = 1 + (rng.random(len(user)) * (people.devices[user] - 1)).astype(np.int64)
    main = (people.devices[user] == 1) | (rng.random(len(user)) < _MAIN_DEVICE)
    number = (people.first + user) * _DEVICES_PER_USER + np.where(main, 0, rank)
    unknown = np.flatnonzero(rng.random(len(user)) < np.take(_UNKNOWN_DEVICE, covert))
    number[unknown] = rng.integers(*_UNKNOWN_DEVICES, len(unknown))
    # Wraps around modulo 2**64, which leaves the lower 48 bits as they should be.
    return np.asarray((number * _DEVICE_MIX) & ((1 << _DEVICE_BITS) - 1))


def _draw_addresses(rng: Generator, people: _People, bought: _Purchases, covert: Ints) -> Ints:
    """IPv4 address [N]: home, or where the purchase is made a mobile network or another one."""
    count = len(bought)
    mobile = rng.random(count) < _MOBILE
    low = np.where(mobile, _MOBILE_NETWORKS[0], _OTHER_NETWORKS[0]).astype(float)
    high = np.where(mobile, _MOBILE_NETWORKS[1], _OTHER_NETWORKS[1]).astype(float)
    outside = _addresses(rng, bought.city, low, high)
    home = rng.random(count) < np.take(_HOME_NETWORK, covert)
    home &= bought.city == people.city[bought.user]
    return np.where(home, people.network[bought.user], outside)


def _draw_places(rng: Generator, scene: _Scene, bought: _Purchases) -> tuple[Floats, Floats]:
    """Latitude [N] and longitude [N]: the merchant's; online, about where the user stays."""
    world, people, user = scene.world, scene.people, bought.user
    online = _ONLINE[world.category[bought.merchant]]
    at_home = bought.city == people.city[user]
    lat, long = world.lat[bought.merchant], world.long[bought.merchant]
    some = np.flatnonzero(online)
    city, who, home = bought.city[some], user[some], at_home[some]
    scatter = _ONLINE_SCATTER * rng.standard_normal((2, len(some)))
    lat[some] = np.where(home, people.lat[who], world.city_lat[city]) + scatter[0]
    long[some] = np.where(home, people.long[who], world.city_long[city]) + scatter[1]
    return lat, long


def _complete(rng: Generator, scene: _Scene, bought: _Purchases) -> Records:
    """The records of those purchases [N] that are kept.

    All of them are completed first: what is dropped must not change what the others draw.
    A purchase that a merchant leaked is the user's own; one of the kind `order` must show in
    nothing else.
    """
    own = np.isin(bought.kind, [_HONEST, _CODE["order"], _CODE["merchant_compromise"]])
    covert = np.where(own, 0, 1)
    records = np.empty(len(bought), dtype=_RECORD)
    records["time"] = bought.time
    records["user"] = scene.people.first + bought.user
    records["merchant"] = bought.merchant
    records["kind"] = bought.kind
    records["amount"] = _inflated(scene.settings, bought)
    records["device"] = _draw_devices(rng, scene.people, bought.user, covert)
    records["ip"] = _draw_addresses(rng, scene.people, bought, covert)
    lat, long = _draw_places(rng, scene, bought)
    records["lat"], records["long"] = np.round(lat, 5), np.round(long, 5)
    return records[bought.kept]


def _inflated(settings: Simulation, bought: _Purchases) -> Floats:
    """Amounts [N] as they are paid: inflated, at least _LEAST_AMOUNT, with two decimals."""
    amount = bought.amount.copy()
    for drift in settings.drift:
        if drift.kind == "inflation":
            amount[bought.time >= settings.since_start(drift)] *= drift.factor
    return np.maximum(amount, _LEAST_AMOUNT).round(2)


def _make_block(settings: Simulation, world: _World, block: int) -> Records:
    """All transactions of a block of users, in time order."""
    scene = _Scene(settings, world, _make_people(settings, world, block))
    ordinary = _draw_ordinary(_rng(settings, _Stream.ORDINARY, block), scene)
    sprees = _draw_sprees(_rng(settings, _Stream.SPREE, block), scene)
    subscriptions = _draw_subscriptions(_rng(settings, _Stream.SUBSCRIPTION, block), scene)
    parts = []
    for number, honest in enumerate((ordinary, sprees, subscriptions)):
        rng = _rng(settings, _Stream.INTERCEPTED, block, number)
        parts.append(_complete(rng, scene, _intercept(rng, world, honest)))
    for kind, maker, source in _fraud_sources(settings):
        rng = _rng(settings, _Stream.FRAUD, block, _CODE[kind], source.number)
        parts.append(_complete(rng, scene, maker(rng, scene, source, ordinary)))
    records = np.concatenate(parts)
    return records[np.argsort(records["time"], kind="stable")]


def _blocks(settings: Simulation, world: _World) -> Iterator[Records]:
    for block in range(_block_count(settings)):
        yield _make_block(settings, world, block)


def _block_count(settings: Simulation) -> int:
    return -(-settings.users // settings.users_per_block)


# --- tables and files -----------------------------------------------------------------------------

_OCTETS: Final = pa.array([str(octet) for octet in range(256)])


def _ip_strings(ip: npt.NDArray[np.uint32]) -> Any:
    """Dotted addresses, an Arrow string array [N]."""
    octets = [_OCTETS.take(pa.array((ip >> shift & 255).astype(np.int32))) for shift in (24, 16, 8, 0)]
    return pc.binary_join_element_wise(*octets, ".")


def _to_table(settings: Simulation, world: _World, records: Records, first_row: int) -> pa.Table:
    """Records [N] in time order as a table, the first being row number `first_row` of all."""
    first_id = _FIRST_TRANSACTION + first_row
    category = world.category[records["merchant"]].astype(np.int8)
    columns = {
        "transaction_id": np.arange(first_id, first_id + len(records), dtype=np.int64),
        "user_id": records["user"].astype(np.int64) + 1,
        "time": pa.array(records["time"] + settings.start_ms).cast(SCHEMA.field("time").type),
        "amount": np.ascontiguousarray(records["amount"]),
        "merchant_id": world.public[records["merchant"]],
        "category": pa.DictionaryArray.from_arrays(pa.array(category), pa.array(CATEGORY_NAMES)),
        "device_id": np.ascontiguousarray(records["device"]),
        "ip": _ip_strings(records["ip"]),
        "lat": np.ascontiguousarray(records["lat"]),
        "long": np.ascontiguousarray(records["long"]),
        "is_fraud": (records["kind"] != _HONEST).astype(np.int8),
        "fraud_kind": pa.array(["", *FRAUD_KINDS]).take(pa.array(np.ascontiguousarray(records["kind"]))),
    }
    return pa.table(columns, schema=SCHEMA)


def _in_time_order(parts: Sequence[Records]) -> Records:
    """Blocks that are sorted by time, merged; equal times stay in the order of blocks."""
    records = np.concatenate(parts)
    return records[np.argsort(records["time"], kind="stable")]


def simulate(settings: Simulation) -> pa.Table:
    """All transactions as one table in time order, with the columns of `SCHEMA`."""
    world = _make_world(settings)
    return _to_table(settings, world, _in_time_order(list(_blocks(settings, world))), 0)


class _Tally:
    """Counts for the summary, row group by row group."""

    def __init__(self, settings: Simulation, world: _World) -> None:
        self._start = datetime.fromtimestamp(settings.start_ms / 1000, UTC)
        self._users = np.zeros(settings.users, dtype=np.bool_)
        self._merchants = np.zeros(len(world.public), dtype=np.bool_)
        self._kinds = np.zeros(len(FRAUD_KINDS) + 1, dtype=np.int64)
        self._first: datetime | None = None
        self._last: datetime | None = None
        self.rows = 0

    def add(self, records: Records) -> None:
        self.rows += len(records)
        self._users[records["user"]] = True
        self._merchants[records["merchant"]] = True
        self._kinds += np.bincount(records["kind"], minlength=len(self._kinds))
        first, last = (self._start + timedelta(milliseconds=int(time)) for time in records["time"][[0, -1]])
        self._first, self._last = self._first or first, last

    def summary(self) -> Summary:
        return Summary(
            rows=self.rows,
            users=int(self._users.sum()),
            merchants=int(self._merchants.sum()),
            frauds=int(self._kinds[1:].sum()),
            frauds_by_kind={kind: int(self._kinds[code]) for kind, code in _CODE.items()},
            first=self._first,
            last=self._last,
        )


def _span_edges(settings: Simulation) -> Ints:
    """Ends (ms) of the spans of time that are sorted and written one by one [spans + 1]."""
    spans = max(1, math.ceil(settings.expected_rows / _SPAN_ROWS))
    return np.linspace(0, settings.span, spans + 1).astype(np.int64)


def _spill(settings: Simulation, blocks: Iterator[Records], folder: Path) -> Iterator[int]:
    """Appends every block to one file per span of time; yields how many blocks are done."""
    edges = _span_edges(settings)
    for done, records in enumerate(blocks, start=1):
        cuts = np.searchsorted(records["time"], edges)
        for span, (low, high) in enumerate(itertools.pairwise(cuts)):
            with (folder / f"{span}.records").open("ab") as file:
                records[low:high].tofile(file)
        yield done


def simulate_to(settings: Simulation, path: Path, progress: Progress | None = None) -> Summary:
    """Writes the rows of `simulate` to a Parquet file that appears whole or not at all.

    `progress` is called with steps done and steps in total: one step per block of users and per
    span of time. Memory holds one of either at a time; the disk, next to `path`, 53 bytes per row
    besides the file until it is done.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"out: expected a file in a folder that exists, got {str(path)!r}")
    world = _make_world(settings)
    tally = _Tally(settings, world)
    blocks, spans = _block_count(settings), len(_span_edges(settings)) - 1
    report = progress or (lambda done, total: None)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
        folder = Path(name)
        for done in _spill(settings, _blocks(settings, world), folder):
            report(done, blocks + spans)
        whole = folder / "whole.parquet"
        with pq.ParquetWriter(whole, SCHEMA, compression="zstd", use_dictionary=_DICTIONARY_COLUMNS) as writer:
            for span in range(spans):
                spilled = folder / f"{span}.records"
                records = _in_time_order([np.fromfile(spilled, dtype=_RECORD)])
                spilled.unlink()
                if len(records):
                    writer.write_table(_to_table(settings, world, records, tally.rows))
                    tally.add(records)
                report(blocks + span + 1, blocks + spans)
        os.replace(whole, path)
    return tally.summary()
