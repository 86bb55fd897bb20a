"""Why a transaction is not approved: what of it is really unusual, and what the user's usual value in its place would be.

A `Change` is one thing of a transaction replaced by the user's usual value. Where the thing is unusual, so that its words are
true of this transaction, the change has the code of a reason; how much it matters only the model can say, by scoring the
transaction with the change made. This is the fixed vocabulary:

    amount_above_habit, amount_below_habit     the amount; with it every `amount_ratio` of a context
    number_above_habit:COLUMN, number_below_habit:COLUMN, number_missing:COLUMN
    new_category:COLUMN                        a category that none of the user's recent events had
    unusual_hour                               the time of day; the gap stays
    after_long_silence                         the gap
    far_from_last_place, impossible_speed      the place, nearer to the last one
    known_fraud:COLUMN                         an entity's known frauds, replaced by none
    unusual_activity:COLUMN, new_entity:COLUMN an entity's transactions of late
    minutes_after_test_payment                 the history as of before a small payment shortly before
    rapid_succession                           the history as of before the events right before
    recent_history                             the history as of before the events that the ring holds

A usual value is the middle one of the user's events in the ring, a category the most common one; from fewer than `FEWEST`
events it is the training rows', from the manifest's fingerprint. Where neither knows it, nothing is replaced.

Letters: C, F, K as in the graph; n events in the ring before the transaction.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import sub
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Manifest
from seqfraud.config import DAY_MS, HOUR_MS, MINUTE_MS
from seqfraud.context import MOST_RATIO, UNKNOWN_AGE, UNKNOWN_RATIO
from seqfraud.errors import BundleError
from seqfraud.vocabulary import FIRST, UNSEEN

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Value = float | str | None

FEWEST = 5
"""Events from which a user has a habit."""
FACTOR = 2.0
"""An amount is far from the habit where it is so many times as large, or as small."""
FEWEST_HOURS = 10
NEAR_HOURS = 2
RARE = 0.05
"""An hour is unusual where at most this share of at least FEWEST_HOURS events was within NEAR_HOURS of it."""
SILENCE = 10
LEAST_SILENCE = 7 * DAY_MS
"""A silence is long from so many usual gaps and so many ms on."""
FAR_KM = 50.0
FAR = 3
"""A place is far from the last one from so many km, and so many usual distances, on."""
FASTEST_KMH = 900.0
"""Of an airliner; who is faster was not there himself."""
ACTIVE = 3
"""An entity is unusually active from so many times the usual number of transactions, and so many more, on."""
SESSION_MS = 60 * MINUTE_MS
SESSION = 4
"""Events belong to one session while each comes within SESSION_MS, and 1 / SESSION of the usual gap, of the one before."""
TEST = 0.3
"""A payment of a session may be a test if it is so small a part of the usual amount and of the amount at hand."""
EARTH_KM = 6371.0088
"""Mean radius, IUGG; as in the graph."""


@dataclass(frozen=True, slots=True)
class Event:
    """A transaction as the step graph sees it, and its user's events in the ring before it, oldest first.

    Attributes:
        integers: int64 [1 + C], time (ms) and category ids.
        values: float32 [F + K], numbers and context; empty where there are none.
        amount: of the transaction, 0 where it is missing.
        past_integers: int64 [n, 1 + C].
        past_values: float32 [n, F + K].
    """

    integers: Int64
    values: Float32
    amount: float
    past_integers: Int64
    past_values: Float32


@dataclass(slots=True)
class Change:
    """One thing of a transaction replaced by the usual.

    Attributes:
        input: the input columns that it replaces, and what of them.
        value, usual: what is there, and what is put in its place.
        code, text: the reason that is true of it; empty where the value is nothing unusual.
        at, put: places among the F + K values, and what is put there.
        category: which of the C categories gets which id.
        moved: ms by which the event and the last event are moved in time.
        closer: ms by which the last event comes closer.
        left_out: which of the n events before are left out of the history.
        forgotten: the history is that of before the n events; times and places stay.
    """

    input: str
    value: Value
    usual: Value
    code: str = ""
    text: str = ""
    at: Sequence[int] = ()
    put: Sequence[float] = ()
    category: tuple[int, int] | None = None
    moved: int = 0
    closer: int = 0
    left_out: range | None = None
    forgotten: bool = False

    @property
    def of_history(self) -> bool:
        """Whether it is the state that is replaced, rather than something of the transaction."""
        return self.forgotten or self.left_out is not None


@dataclass(frozen=True)
class _Entity:
    """Where the numbers of a context column are among the values, by what they count."""

    column: str
    who: str
    """Words for it."""
    counts: list[int]
    activity: list[int]
    """Counts, amounts and known honest."""
    fraud: list[int]
    run: list[int]
    """Age, length, days since the last known fraud; least ratios where the user is an entity."""
    ratio: int | None


@dataclass
class _Usual:
    """What is usual for the user of an event, worked out once."""

    whose: str
    values: dict[int, float]
    """By place among the F + K values; NaN where it is not known."""
    gap: float
    """ms; NaN where it is not known."""
    times: list[int]
    """[n] ms of the events before."""


class Replacements:
    """What may be replaced in the transactions of one bundle, and when that is a reason."""

    def __init__(self, manifest: Manifest) -> None:
        """Raises BundleError where the fingerprint has something else than figures where they are looked for."""
        schema, spec, graph = manifest.schema, manifest.context, manifest.graph
        self._time = schema.time
        self._has_states = bool(graph.states)
        self._numeric = graph.numeric
        plain = len(schema.numeric)
        self._amount = schema.numeric.index(schema.amount) if schema.amount in schema.numeric else None
        self._amount_name = schema.amount
        self._numbers = [(i, column) for i, column in enumerate(schema.numeric) if i != self._amount]
        self._places = [(f"{a}/{b}", plain + 2 * g) for g, (a, b) in enumerate(schema.geo)]
        self._categories = [(c, v.column, v.values) for c, v in enumerate(manifest.vocabularies)]
        self._entities: list[_Entity] = []
        for c, column in enumerate(spec.columns):
            begin = graph.numeric + spec.numbers_of(c).start
            at = {kind: [begin + i for i in range(p.start, p.stop)] for kind, p in spec.places(c).items()}
            run = at.get("run", [])
            who = "this user" if c == spec.user else f"the network of {column}" if column in schema.ip else column
            self._entities.append(
                _Entity(
                    column=column,
                    who=who,
                    counts=at.get("count", []),
                    activity=[*at.get("count", []), *at.get("amount", []), *at.get("honest", [])],
                    fraud=at.get("fraud", []),
                    run=[i for number, i in enumerate(run) if number != 3],
                    ratio=at["ratio"][0] if "ratio" in at else None,
                )
            )
        self._ratios = [e.ratio for e in self._entities if e.ratio is not None]
        self._user_ratio = None if spec.user is None else self._entities[spec.user].ratio
        judged = [self._amount, *(at for at, _ in self._numbers), *(i for e in self._entities for i in e.counts)]
        self._judged = [at for at in judged if at is not None]
        """Places whose usual values say whether a change has a code; of the others they are only put."""
        self._longest = max(range(len(spec.half_lives)), key=lambda i: spec.half_lives[i], default=0)
        names = [("numeric_deciles", n) for n in schema.numeric_inputs]
        names += [("context_deciles", n) for n in spec.names()]
        figures = manifest.fingerprint
        self._typical = [_deciles(figures, kind, name) for kind, name in names]
        self._typical_values = {at: math.nan if d is None else d[5] for at, d in enumerate(self._typical)}
        gaps = _figures("gap_deciles_s", figures.get("gap_deciles_s"))
        self._typical_gap = 1000 * gaps[5] if gaps else math.nan
        hour = figures.get("hour")
        if hour is not None and (not isinstance(hour, int) or isinstance(hour, bool) or not 0 <= hour < 24):
            raise BundleError(f"manifest: fingerprint.hour: seen {hour!r:.60}; expected 0 to 23")
        self._typical_hour: int | None = hour

    def of(self, event: Event, unusual: bool = False) -> list[Change]:
        """Every change that can be made, or only those of something unusual, which have a code; of the history last."""
        usual = self._usual(event, self._judged if unusual else range(len(self._typical)))
        values = event.values.tolist()
        changes = self._amount_changes(event, values, usual, unusual)
        changes += self._number_changes(event, values, usual)
        changes += self._category_changes(event, usual, unusual)
        changes += self._time_changes(event, usual, unusual)
        changes += self._place_changes(event, values, usual, unusual)
        for entity in self._entities:
            changes += self._known_fraud_changes(entity, values, unusual)
            changes += self._activity_changes(entity, event, values, usual, unusual)
        if self._has_states and usual.times:
            changes += self._history_changes(event, usual)
        return [change for change in changes if change.code] if unusual else changes

    def _usual(self, event: Event, places: Sequence[int]) -> _Usual:
        count = len(event.past_integers)
        times = event.past_integers[:, 0].tolist()
        if count < FEWEST:
            return _Usual("the usual", self._typical_values, self._typical_gap, times)
        gaps = sorted(map(sub, times[1:], times))
        return _Usual("this user's usual", _middle(event, places), gaps[len(gaps) // 2], times)

    def _amount_changes(self, event: Event, values: list[float], usual: _Usual, unusual: bool) -> list[Change]:
        at, ratio = self._amount, None if self._user_ratio is None else values[self._user_ratio]
        amount = event.amount if at is None else values[at]
        name, ratios = self._amount_name, [i for i in self._ratios if values[i] > 0]
        if name is None or (at is None and not ratios) or math.isnan(amount):
            return []
        use, whose = math.nan if at is None else usual.values[at], usual.whose
        known = ratio is not None and 0 < ratio < MOST_RATIO and amount > 0
        if known and (math.isnan(use) or len(usual.times) < FEWEST):
            use, whose = amount / ratio, "this user's mean"  # type: ignore[operator]
        if math.isnan(use) or use <= 0:
            return []
        code = text = ""
        if amount >= FACTOR * use:
            code, text = (
                "amount_above_habit",
                f"{name} {_figure(amount)} is {amount / use:.1f} times {whose} {_figure(use)}",
            )
        elif 0 <= amount * FACTOR <= use:
            code, text = "amount_below_habit", f"{name} {_figure(amount)} is far below {whose} {_figure(use)}"
        elif unusual:
            return []
        places, put = ([], []) if at is None else ([at], [use])
        if amount > 0:
            places += ratios
            put += [min(values[i] * use / amount, MOST_RATIO) for i in ratios]
        return [Change(name, amount, use, code, text, places, put)]

    def _number_changes(self, event: Event, values: list[float], usual: _Usual) -> list[Change]:
        changes = []
        for at, name in self._numbers:
            value, use = values[at], usual.values[at]
            if math.isnan(use):
                continue
            code = text = ""
            if math.isnan(value):
                code, text = "number_missing", f"{name} is missing; {usual.whose} is {_figure(use)}"
            elif (bounds := self._bounds(event, at)) is not None:
                if value > bounds[1]:
                    code, text = "number_above_habit", f"{name} {_figure(value)} is above {usual.whose} {_figure(use)}"
                elif value < bounds[0]:
                    code, text = "number_below_habit", f"{name} {_figure(value)} is below {usual.whose} {_figure(use)}"
            shown = None if math.isnan(value) else value
            changes.append(Change(name, shown, use, code and f"{code}:{name}", text, [at], [use]))
        return changes

    def _bounds(self, event: Event, at: int) -> tuple[float, float] | None:
        """What a number of a user lies between: all that the ring holds, or four in five of the training rows."""
        if len(event.past_values) >= FEWEST:
            known = [x for x in event.past_values[:, at].tolist() if not math.isnan(x)]
            return (min(known), max(known)) if known else None
        deciles = self._typical[at]
        return None if deciles is None else (deciles[1], deciles[9])

    def _category_changes(self, event: Event, usual: _Usual, unusual: bool) -> list[Change]:
        changes = []
        for c, name, known in self._categories:
            value = event.integers.item(1 + c)
            before = event.past_integers[:, 1 + c].tolist()
            if unusual and value in before and value != UNSEEN:
                continue
            use, code, text = FIRST, "", ""  # the most frequent of the training rows
            if len(before) >= FEWEST:
                use = Counter(before).most_common(1)[0][0]
                if value not in before:
                    said = f"{name} {_category(value, known)!r}" if value != UNSEEN else f"an unknown {name}"
                    code, text = f"new_category:{name}", f"{said} is new among this user's last {len(before)}"
            elif value == UNSEEN:
                code, text = f"new_category:{name}", f"an unknown {name}"
            if use < FIRST + len(known):
                shown = _category(value, known), _category(use, known)
                changes.append(Change(name, *shown, code, text, category=(c, use)))
        return changes

    def _time_changes(self, event: Event, usual: _Usual, unusual: bool) -> list[Change]:
        changes = []
        time, count = event.integers.item(0), len(usual.times)
        phase = time % DAY_MS
        hour, code, text = self._typical_hour, "", ""
        if count >= FEWEST_HOURS:
            earliest = time - NEAR_HOURS * HOUR_MS
            near = sum([(t - earliest) % DAY_MS <= 2 * NEAR_HOURS * HOUR_MS for t in usual.times])
            if near <= RARE * count:
                code = "unusual_hour"
                text = f"{near} of this user's last {count} transactions were within {NEAR_HOURS} hours of {_clock(phase)} UTC"
            if code or not unusual:
                hour = _busiest([t % DAY_MS // HOUR_MS for t in usual.times])
        if hour is not None:
            use = hour * HOUR_MS + HOUR_MS // 2
            moved = (use - phase + DAY_MS // 2) % DAY_MS - DAY_MS // 2
            changes.append(Change(f"{self._time}.hour", _clock(phase), _clock(use), code, text, moved=moved))
        if usual.times and self._has_states and not math.isnan(usual.gap):
            gap, use = max(time - usual.times[-1], 0), int(usual.gap)
            code = text = ""
            if gap >= LEAST_SILENCE and gap >= SILENCE * use:
                code = "after_long_silence"
                text = f"the first transaction after {_duration(gap)}; {usual.whose} gap is {_duration(use)}"
            changes.append(Change(f"{self._time}.gap", _duration(gap), _duration(use), code, text, closer=gap - use))
        return changes

    def _place_changes(self, event: Event, values: list[float], usual: _Usual, unusual: bool) -> list[Change]:
        if not usual.times:
            return []
        changes = []
        for name, at in self._places:
            here, last = values[at : at + 2], event.past_values[-1, at : at + 2].tolist()
            if unusual and _is_near(here, last):
                continue
            places = np.concatenate([event.past_values[:, at : at + 2], [here]], dtype=np.float64)
            steps = _steps_km(places)
            apart = float(steps[-1])
            near = float(np.sort(steps[:-1])[(len(places) - 2) // 2]) if len(places) > FEWEST else 0.0
            if math.isnan(apart) or math.isnan(near):
                continue
            hours = max((event.integers.item(0) - usual.times[-1]) / HOUR_MS, 1 / 3600)
            code = text = ""
            if apart >= FAR_KM and apart / hours > FASTEST_KMH:
                code = "impossible_speed"
                text = f"{apart:,.0f} km from the last place in {_duration(int(hours * HOUR_MS))}: {apart / hours:,.0f} km/h"
            elif apart >= max(FAR_KM, FAR * near):
                code = "far_from_last_place"
                text = f"{apart:,.0f} km from the last place; {usual.whose} distance is {near:,.0f} km"
            part = min(near / apart, 1.0) if apart > 0 else 1.0
            east = (here[1] - last[1] + 180) % 360 - 180
            put = [last[0] + part * (here[0] - last[0]), (last[1] + part * east + 180) % 360 - 180]
            shown = f"{apart:,.0f} km from the last place", f"{min(near, apart):,.0f} km"
            changes.append(Change(name, *shown, code, text, [at, at + 1], put))
        return changes

    def _known_fraud_changes(self, entity: _Entity, values: list[float], unusual: bool) -> list[Change]:
        if not entity.fraud and not entity.run:
            return []
        code = text = ""
        frauds = max([0.0, *[values[i] for i in entity.fraud]])
        if entity.run and values[entity.run[1]] > 0:
            frauds = values[entity.run[1]]
            ago = _duration(int(values[entity.run[2]] * DAY_MS))
            text = f"{entity.who} has known fraud: {frauds:.0f} in a row, the last {ago} ago"
        elif frauds > 0.01:
            text = f"{entity.who} has known fraud of late: {frauds:.1f}, older ones counted less"
        elif unusual:
            return []
        if text:
            code = f"known_fraud:{entity.column}"
        run = [UNKNOWN_AGE, 0.0, UNKNOWN_AGE, UNKNOWN_RATIO, UNKNOWN_RATIO][: len(entity.run)]
        put = [0.0] * len(entity.fraud) + run
        at = [*entity.fraud, *entity.run]
        return [Change(f"{entity.column}.known_fraud", frauds, 0.0, code, text, at, put)]

    def _activity_changes(
        self, entity: _Entity, event: Event, values: list[float], usual: _Usual, unusual: bool
    ) -> list[Change]:
        if not entity.counts:
            return []
        code = text = ""
        longest = entity.counts[self._longest]
        if not any(values[i] for i in entity.counts) and usual.values[longest] >= 1:
            code, text = f"new_entity:{entity.column}", f"the first transaction of this {entity.column}"
            text += f"; {usual.whose} has had {usual.values[longest]:.0f} of late"
        else:
            for i in entity.counts:
                if values[i] >= ACTIVE * (usual.values[i] + 1):
                    code = f"unusual_activity:{entity.column}"
                    text = f"{entity.who}: {values[i]:.0f} transactions of late; {usual.values[i]:.1f} are usual"
                    break
        if unusual:
            if not code:
                return []
            if len(usual.times) >= FEWEST:
                usual.values |= _middle(event, entity.activity)
        put = [usual.values[i] for i in entity.activity]
        if any(map(math.isnan, put)):
            return []
        shown = values[longest], usual.values[longest]
        return [Change(f"{entity.column}.activity", *shown, code, text, entity.activity, put)]

    def _history_changes(self, event: Event, usual: _Usual) -> list[Change]:
        time, times, count = event.integers.item(0), usual.times, len(usual.times)
        changes = []
        test, amount = self._test_payment(event, usual)
        if test < count:
            spent = _duration(time - times[test])
            text = f"{spent} after a payment like a test: {self._amount_name} {_figure(amount)}"
            if count - test > 1:
                text += f"; {count - test - 1} more since then"
            left = range(test, count)
            changes.append(Change("history", None, None, "minutes_after_test_payment", text, left_out=left))
        begin = _session(time, times, min(SESSION_MS, math.inf if math.isnan(usual.gap) else usual.gap / SESSION))
        if begin < test:
            text = f"{count - begin + 1} transactions within {_duration(time - times[begin])}"
            if not math.isnan(usual.gap):
                text += f"; {usual.whose} gap is {_duration(int(usual.gap))}"
            left = range(begin, count)
            changes.append(Change("history", None, None, "rapid_succession", text, left_out=left))
        text = f"the order and pattern of this user's last {count} transactions"
        changes.append(Change("history", None, None, "recent_history", text, forgotten=True))
        return changes

    def _test_payment(self, event: Event, usual: _Usual) -> tuple[int, float]:
        """Which of the events before in the same session is the first that may be a test, and its amount; n where none is."""
        at, count = self._amount, len(usual.times)
        if at is None or not usual.values[at] > 0:
            return count, math.nan
        begin = _session(event.integers.item(0), usual.times, SESSION_MS)
        most = TEST * min(usual.values[at], event.values.item(at))
        amounts = event.past_values[begin:, at].tolist()
        small = ((begin + i, amount) for i, amount in enumerate(amounts) if 0 <= amount <= most)
        return next(small, (count, math.nan))


def _session(time: int, times: list[int], limit: float) -> int:
    """Which event begins the session that an event at `time` continues; len(times) where it begins one itself."""
    begin = len(times)
    while begin and time - times[begin - 1] <= limit:
        begin -= 1
        time = times[begin]
    return begin


def _deciles(figures: Mapping[str, Any], kind: str, name: str) -> list[float] | None:
    """The eleven deciles of a column's training rows, where the fingerprint has them. Raises BundleError."""
    columns = figures.get(kind, {})
    if not isinstance(columns, Mapping):
        raise BundleError(f"manifest: fingerprint.{kind}: seen {columns!r:.60}; expected figures by column")
    return _figures(f"{kind}.{name}", columns.get(name))


def _middle(event: Event, places: Sequence[int]) -> dict[int, float]:
    """The middle one of the events before of some of the F + K values, by place; NaN counts as the largest."""
    middle = len(event.past_values) // 2
    values = np.partition(event.past_values[:, places], middle, axis=0)[middle].tolist()
    return dict(zip(places, values, strict=True))


def _figures(name: str, seen: Any) -> list[float] | None:
    if seen is None or seen == []:
        return None
    if not isinstance(seen, list) or len(seen) != 11 or not all(isinstance(x, int | float) for x in seen):
        raise BundleError(f"manifest: fingerprint.{name}: seen {seen!r:.60}; expected 11 deciles")
    return [float(x) for x in seen]


def _busiest(hours: list[int]) -> int:
    """The hour of the day with the most events in it and beside it."""
    counts = Counter(hours)
    return max(range(24), key=lambda h: 2 * counts[h] + counts[(h - 1) % 24] + counts[(h + 1) % 24])


def _is_near(a: list[float], b: list[float]) -> bool:
    """Whether two places (degrees) are less than FAR_KM apart even along a meridian and a parallel, or one is not known."""
    degrees = abs(a[0] - b[0]) + abs((a[1] - b[1] + 180) % 360 - 180)
    return not degrees * math.radians(EARTH_KM) >= FAR_KM


def _steps_km(places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Great-circle distances [n] between places [n + 1, 2] in degrees, each to the one before; haversine formula."""
    places = np.radians(places)
    half = np.sin((places[1:] - places[:-1]) * 0.5)
    half *= half
    cos = np.cos(places[:, 0])
    distance: npt.NDArray[np.float64] = np.arcsin(
        np.sqrt(np.minimum(half[:, 0] + cos[1:] * cos[:-1] * half[:, 1], 1.0))
    )
    return 2 * EARTH_KM * distance


def _category(identity: int, known: tuple[str, ...]) -> str | None:
    """The text of a category; None where it is not known."""
    return known[identity - FIRST] if identity >= FIRST else None


def _figure(x: float) -> str:
    return f"{x:,.2f}".removesuffix(".00")


def _clock(phase: int) -> str:
    return f"{phase // HOUR_MS:02d}:{phase % HOUR_MS // MINUTE_MS:02d}"


def _duration(ms: int) -> str:
    for unit, name in ((DAY_MS, "days"), (HOUR_MS, "hours"), (MINUTE_MS, "minutes")):
        if ms >= 2 * unit:
            return f"{ms / unit:.0f} {name}"
    return f"{max(ms, 0) / 1000:.0f} seconds"
