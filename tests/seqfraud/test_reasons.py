"""What of a transaction is unusual, and what is put in its place: facts that are laid down, one by one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from seqfraud.bundle import Bundle, Manifest
from seqfraud.errors import BundleError
from seqfraud.reasons import Change, Event, Replacements

START = 1_600_000_000_000 - 1_600_000_000_000 % 86_400_000
"""A midnight."""
MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
TOML = """
[data]
transaction = "id"
user = "user"
time = "time"
time_unit = "ms"
amount = "amount"
[features]
numeric = ["amount", "age"]
categorical = ["kind"]
context = ["merchant", "user"]
ip = ["ip"]
geo = [["lat", "long"]]
half_lives = ["1d", "7d"]
[model]
hidden = 4
input_width = 4
head_width = 4
embedding = 4
"""
FOOD, FUEL = 2, 3
PARIS, LONDON, NICE = (48.86, 2.35), (51.51, -0.13), (43.7, 7.27)


@pytest.fixture(scope="module")
def manifest(make_bundle: Callable[..., Bundle]) -> Manifest:
    return make_bundle(TOML, missing=("age",)).manifest


@pytest.fixture(scope="module")
def names(manifest: Manifest) -> list[str]:
    """Of the F + K values."""
    return [*manifest.schema.numeric_inputs, *manifest.context.names()]


def row(names: list[str], **changes: float) -> list[float]:
    """Values of an ordinary transaction: an amount of 20, merchants with three transactions of late, no known fraud."""
    ordinary: dict[str, float] = dict.fromkeys(names, 0.0) | {
        "amount": 20.0,
        "age": 40.0,
        "lat": PARIS[0],
        "long": PARIS[1],
    }
    for name in names:
        kind = name.partition(".")[2]
        if kind.startswith("count"):
            ordinary[name] = 3.0
        elif kind == "amount_ratio":
            ordinary[name] = 1.0
        elif kind in ("run_age_d", "since_fraud_d", "run_least_ratio", "run_least_lately"):
            ordinary[name] = -1.0
    assert changes.keys() <= ordinary.keys()
    return list((ordinary | changes).values())


@pytest.fixture
def event(names: list[str]) -> Callable[..., Event]:
    """`event(time, kind, past, **values)`: after twelve days with a transaction at noon each, or another past."""

    def make(
        time: int = START + 12 * DAY + 12 * HOUR,
        kind: int = FOOD,
        past: list[tuple[int, int, dict[str, float]]] | None = None,
        **values: float,
    ) -> Event:
        if past is None:
            past = [(START + n * DAY + 12 * HOUR, FOOD, {}) for n in range(12)]
        amount = values.get("amount", 20.0)
        return Event(
            np.array([time, kind]),
            np.array(row(names, **values), dtype=np.float32),
            0.0 if np.isnan(amount) else amount,
            np.array([(t, k) for t, k, _ in past], dtype=np.int64).reshape(-1, 2),
            np.array([row(names, **v) for _, _, v in past], dtype=np.float32).reshape(len(past), len(names)),
        )

    return make


def reasons(manifest: Manifest, event: Event) -> dict[str, Change]:
    return {change.code: change for change in Replacements(manifest).of(event) if change.code}


def test_nothing_of_an_ordinary_transaction_is_a_reason(manifest, event):
    assert reasons(manifest, event()).keys() == {"recent_history"}


@pytest.mark.parametrize(
    ("amount", "code"),
    [(20.0, None), (39.0, None), (40.0, "above"), (11.0, None), (10.0, "below"), (0.0, "below"), (float("nan"), None)],
)
def test_an_amount_is_far_from_the_habit_by_a_factor_of_two(manifest, event, amount, code):
    found = reasons(manifest, event(amount=amount)).keys() - {"recent_history"}
    assert found == ({f"amount_{code}_habit"} if code else set())


def test_with_the_amount_its_ratios_become_usual(manifest, names, event):
    """What a transaction with that amount would have read: ratios are proportional to the amount."""
    ratios = {f"{column}.amount_ratio": ratio for column, ratio in (("merchant", 8.0), ("user", 10.0), ("ip", -1.0))}
    change = reasons(manifest, event(amount=200.0, **ratios))["amount_above_habit"]
    assert (change.value, change.usual) == (200.0, 20.0)
    assert change.text == "amount 200 is 10.0 times this user's usual 20"
    put = {names[at]: x for at, x in zip(change.at, change.put, strict=True)}
    assert put == pytest.approx({"amount": 20.0, "merchant.amount_ratio": 0.8, "user.amount_ratio": 1.0})


def test_a_young_users_usual_amount_is_his_mean_or_that_of_the_training_rows(manifest, event):
    past = [(START, FOOD, {"amount": 500.0})]
    change = reasons(manifest, event(amount=200.0, past=past, **{"user.amount_ratio": 4.0}))["amount_above_habit"]
    assert (change.usual, change.text) == (50.0, "amount 200 is 4.0 times this user's mean 50")
    stranger = event(amount=200.0, past=past, **{"user.amount_ratio": -1.0})
    assert "amount_above_habit" not in reasons(manifest, stranger), "nobody knows what is usual"
    known = replace(manifest, fingerprint={"numeric_deciles": {"amount": [float(n) for n in range(11)]}})
    change = reasons(known, stranger)["amount_above_habit"]
    assert (change.usual, change.text) == (5.0, "amount 200 is 40.0 times the usual 5")


def test_other_numbers_are_unusual_beyond_all_that_the_user_had(manifest, event):
    past = [(START + n * DAY + 12 * HOUR, FOOD, {"age": 30.0 + n}) for n in range(12)]
    assert "number_above_habit:age" not in reasons(manifest, event(past=past, age=41.0))
    assert reasons(manifest, event(past=past, age=42.0))["number_above_habit:age"].usual == 36.0
    assert "number_below_habit:age" in reasons(manifest, event(past=past, age=29.0))
    missing = reasons(manifest, event(past=past, age=float("nan")))["number_missing:age"]
    assert (missing.value, missing.put) == (None, [36.0])


def test_a_category_is_new_if_no_recent_event_had_it(manifest, event):
    past = [(START + n * DAY + 12 * HOUR, FUEL if n == 3 else FOOD, {}) for n in range(12)]
    assert "new_category:kind" not in reasons(manifest, event(kind=FUEL, past=past))
    change = reasons(manifest, event(kind=FUEL))["new_category:kind"]
    assert (change.category, change.value, change.usual) == ((0, FOOD), "fuel", "food")
    assert change.text == "kind 'fuel' is new among this user's last 12"
    unknown = reasons(manifest, event(kind=1))["new_category:kind"]
    assert (unknown.value, unknown.text) == (None, "an unknown kind is new among this user's last 12")


@pytest.mark.parametrize(("hour", "unusual"), [(12.0, False), (14.0, False), (14.1, True), (9.9, True), (0.5, True)])
def test_an_hour_is_unusual_if_hardly_an_event_was_near_it(manifest, event, hour, unusual):
    time = START + 12 * DAY + int(hour * HOUR)
    found = reasons(manifest, event(time=time))
    assert ("unusual_hour" in found) == unusual
    if unusual:
        change = found["unusual_hour"]
        assert (time + change.moved) % DAY == 12 * HOUR + HOUR // 2
        assert abs(change.moved) <= DAY // 2


def test_midnight_is_near_midnight(manifest, event):
    past = [(START + n * DAY - 30 * MINUTE, FOOD, {}) for n in range(12)]
    assert "unusual_hour" not in reasons(manifest, event(time=START + 12 * DAY + 30 * MINUTE, past=past))
    change = reasons(manifest, event(time=START + 11 * DAY + 3 * HOUR, past=past))["unusual_hour"]
    assert change.moved == -3 * HOUR - 30 * MINUTE


def test_a_silence_is_long_by_ten_usual_gaps_and_a_week(manifest, event):
    last = START + 11 * DAY + 12 * HOUR
    assert "after_long_silence" not in reasons(manifest, event(time=last + 9 * DAY))
    change = reasons(manifest, event(time=last + 10 * DAY))["after_long_silence"]
    assert change.closer == 9 * DAY, "the last event comes closer by all that is not usual"
    assert change.text == "the first transaction after 10 days; this user's usual gap is 24 hours"


def test_a_place_is_far_or_cannot_be_reached(manifest, names, event):
    last = START + 11 * DAY + 12 * HOUR
    london = {"lat": LONDON[0], "long": LONDON[1]}
    change = reasons(manifest, event(time=last + 20 * MINUTE, **london))["impossible_speed"]
    assert change.text.startswith("343 km from the last place in 20 minutes: 1,030 km/h")
    put = {names[at]: x for at, x in zip(change.at, change.put, strict=True)}
    assert put == pytest.approx({"lat": PARIS[0], "long": PARIS[1]}, abs=1e-5), "he never moved"
    assert "far_from_last_place" in reasons(manifest, event(**london))
    assert not reasons(manifest, event(lat=48.9, long=2.4)).keys() & {"far_from_last_place", "impossible_speed"}


def test_who_travels_is_not_far_from_his_last_place(manifest, event):
    """A usual distance of 690 km; one that is farther is put back on the way, also across the date line."""
    places = [PARIS, NICE]
    past = [
        (START + n * DAY + 12 * HOUR, FOOD, dict(zip(("lat", "long"), places[n % 2], strict=True))) for n in range(12)
    ]
    assert not reasons(manifest, event(past=past, lat=PARIS[0], long=PARIS[1])).keys() - {"recent_history"}
    far = event(
        past=[(t, k, {"lat": 0.0, "long": 179.0 - n % 2}) for n, (t, k, _) in enumerate(past)], lat=0.0, long=-172.0
    )
    change = reasons(manifest, far)["far_from_last_place"]
    assert change.usual == "111 km"
    assert change.put == pytest.approx([0.0, 179.0], abs=1e-3)


def test_known_fraud_of_an_entity_is_replaced_by_none(manifest, names, event):
    known = {"merchant.fraud_1d": 0.5, "merchant.fraud_7d": 1.5, "merchant.run_age_d": 4.0, "merchant.run_length": 2.0,
             "merchant.since_fraud_d": 2.5, "merchant.run_least_ratio": 3.0, "merchant.run_least_lately": 2.0,
             "merchant.since_honest_d": 9.0}  # fmt: skip
    found = reasons(manifest, event(**known))
    change = found["known_fraud:merchant"]
    assert change.text == "merchant has known fraud: 2 in a row, the last 2 days ago"
    assert found.keys() == {"known_fraud:merchant", "recent_history"}
    clean = dict(zip(names, row(names), strict=True))
    put = {names[at]: x for at, x in zip(change.at, change.put, strict=True)}
    assert put == {name: clean[name] for name in known if name != "merchant.since_honest_d"}


def test_the_words_for_an_entity_say_whose_it_is(manifest, event):
    found = reasons(manifest, event(**{"ip.run_length": 1.0, "user.run_length": 1.0, "ip.since_fraud_d": 0.5}))
    assert found["known_fraud:ip"].text == "the network of ip has known fraud: 1 in a row, the last 12 hours ago"
    assert found["known_fraud:user"].text.startswith("this user has known fraud")


def test_an_entity_is_new_or_unusually_active_compared_with_those_that_the_user_goes_to(manifest, names, event):
    never = {name: 0.0 for name in names if name.startswith("merchant.count")}
    change = reasons(manifest, event(**never))["new_entity:merchant"]
    assert {names[at] for at in change.at} > never.keys()
    assert change.text == "the first transaction of this merchant; this user's usual has had 3 of late"
    busy = reasons(manifest, event(**{"merchant.count_1d": 12.0}))
    assert busy["unusual_activity:merchant"].text == "merchant: 12 transactions of late; 3.0 are usual"
    assert "unusual_activity:merchant" not in reasons(manifest, event(**{"merchant.count_1d": 11.9}))


def test_a_session_goes_on_while_events_come_close_after_each_other(manifest, event):
    noon = START + 12 * DAY + 12 * HOUR
    past = [(START + n * DAY + 12 * HOUR, FOOD, {}) for n in range(12)]
    past += [(noon, FOOD, {"amount": 25.0}), (noon + 50 * MINUTE, FOOD, {"amount": 30.0})]
    change = reasons(manifest, event(time=noon + 60 * MINUTE, past=past))["rapid_succession"]
    assert change.left_out == range(12, 14)
    assert change.text == "3 transactions within 60 minutes; this user's usual gap is 24 hours"
    assert "rapid_succession" not in reasons(manifest, event(time=noon + 111 * MINUTE, past=past))
    hourly = [(START + n * HOUR, FOOD, {}) for n in range(12)]
    assert "rapid_succession" not in reasons(manifest, event(time=START + 11 * HOUR + 16 * MINUTE, past=hourly))
    assert "rapid_succession" in reasons(manifest, event(time=START + 11 * HOUR + 15 * MINUTE, past=hourly))


def test_a_small_payment_in_the_session_may_have_been_a_test(manifest, event):
    noon = START + 12 * DAY + 12 * HOUR
    past = [(START + n * DAY + 12 * HOUR, FOOD, {}) for n in range(12)]
    past += [(noon, FOOD, {"amount": 1.5}), (noon + 50 * MINUTE, FOOD, {"amount": 30.0})]
    found = reasons(manifest, event(time=noon + 55 * MINUTE, past=past, amount=35.0))
    change = found["minutes_after_test_payment"]
    assert change.left_out == range(12, 14)
    assert change.text == "55 minutes after a payment like a test: amount 1.50; 1 more since then"
    assert "rapid_succession" not in found, "it would say the same"
    small = reasons(manifest, event(time=noon + 55 * MINUTE, past=past, amount=4.0))
    assert "minutes_after_test_payment" not in small, "after a test comes something larger"


def test_a_model_without_a_state_has_no_history_to_replace(manifest, event):
    stateless = replace(manifest, graph=replace(manifest.graph, states=()))
    found = Replacements(stateless).of(event(time=START + 11 * DAY + 12 * HOUR + MINUTE))
    assert not any(change.of_history or change.closer for change in found)


def test_a_first_event_has_no_history_and_no_last_place(manifest, event):
    found = Replacements(manifest).of(event(past=[], amount=20.0, **{"user.amount_ratio": -1.0}))
    assert {change.input for change in found} == {"kind", "merchant.known_fraud", "user.known_fraud", "ip.known_fraud"}
    assert not any(change.code for change in found)


@pytest.mark.parametrize(
    "fingerprint",
    [
        {"hour": "noon"},
        {"hour": 24},
        {"hour": True},
        {"gap_deciles_s": [1.0]},
        {"gap_deciles_s": "long"},
        {"numeric_deciles": []},
        {"numeric_deciles": {"amount": ["x"] * 11}},
        {"context_deciles": {"merchant.count_1d": 7}},
    ],
)
def test_a_fingerprint_from_elsewhere_holds_figures_or_is_refused(manifest: Manifest, fingerprint: dict[str, Any]):
    with pytest.raises(BundleError, match="fingerprint"):
        Replacements(replace(manifest, fingerprint=fingerprint))
