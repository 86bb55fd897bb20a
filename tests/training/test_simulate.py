"""The simulator: its promises about form, about drift and about each kind of fraud."""

from __future__ import annotations

import ipaddress
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from seqfraud.errors import ConfigError
from training import simulate as module
from training.simulate import (
    CATEGORY_NAMES,
    FRAUD_KINDS,
    FRAUD_MIX,
    SCHEMA,
    Drift,
    Simulation,
    parse_drift,
    simulate,
    simulate_to,
)

HOUR = 3_600_000  # ms
DAY = 24 * HOUR
DRIFT_DATE = "2025-01-21"
SMALL = Simulation(users=300, days=40)


@dataclass(frozen=True)
class Rows:
    """Columns [N] of a table, ordered by user and then time."""

    user: npt.NDArray[Any]
    ms: npt.NDArray[Any]
    amount: npt.NDArray[Any]
    merchant: npt.NDArray[Any]
    category: npt.NDArray[Any]
    lat: npt.NDArray[Any]
    long: npt.NDArray[Any]
    kind: npt.NDArray[Any]

    @property
    def follows(self) -> npt.NDArray[Any]:
        """Whether the row before is the same user's [N]."""
        return np.concatenate([[False], self.user[1:] == self.user[:-1]])


def rows_of(table: pa.Table) -> Rows:
    user = table["user_id"].to_numpy()
    order = np.lexsort((table["transaction_id"].to_numpy(), user))
    return Rows(
        user=user[order],
        ms=table["time"].cast(pa.int64()).to_numpy()[order],
        amount=table["amount"].to_numpy()[order],
        merchant=table["merchant_id"].to_numpy()[order],
        category=table["category"].cast(pa.string()).to_numpy(zero_copy_only=False)[order],
        lat=table["lat"].to_numpy()[order],
        long=table["long"].to_numpy()[order],
        kind=table["fraud_kind"].to_numpy(zero_copy_only=False)[order],
    )


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return simulate(Simulation())


@pytest.fixture(scope="module")
def rows(table: pa.Table) -> Rows:
    return rows_of(table)


def before(table: pa.Table, moment: datetime) -> pa.Table:
    return table.filter(pc.less(table["time"], pa.scalar(moment, SCHEMA.field("time").type)))


# --- form -----------------------------------------------------------------------------------------


def test_columns_and_size(table: pa.Table) -> None:
    assert table.schema == SCHEMA
    assert table.schema.names == [
        "transaction_id",
        "user_id",
        "time",
        "amount",
        "merchant_id",
        "category",
        "device_id",
        "ip",
        "lat",
        "long",
        "is_fraud",
        "fraud_kind",
    ]
    assert 150_000 < table.num_rows < 300_000
    assert all(column.null_count == 0 for column in table.columns)


def test_time_order_and_ids(table: pa.Table) -> None:
    times = table["time"].cast(pa.int64()).to_numpy()
    start = int(datetime(2025, 1, 1, tzinfo=UTC).timestamp() * 1000)
    assert (np.diff(times) >= 0).all()
    assert (np.diff(table["transaction_id"].to_numpy()) > 0).all()
    assert start <= times[0] and times[-1] < start + 120 * DAY


def test_values_are_plausible(table: pa.Table) -> None:
    amount = table["amount"].to_numpy()
    assert amount.min() >= 0.5
    assert (amount == amount.round(2)).all()
    assert table["lat"].to_numpy().min() > 30 and table["lat"].to_numpy().max() < 65
    assert np.abs(table["long"].to_numpy()).max() < 35
    assert set(pc.unique(table["category"].cast(pa.string())).to_pylist()) == set(CATEGORY_NAMES)
    addresses = pc.unique(table["ip"]).to_pylist()[::50]
    assert all(ipaddress.IPv4Address(address).is_global for address in addresses)
    assert table["device_id"].to_numpy().min() >= 0


def test_label_and_its_explanation_agree(table: pa.Table) -> None:
    fraud = table["is_fraud"].to_numpy() == 1
    explained = table["fraud_kind"].to_numpy(zero_copy_only=False) != ""
    assert (fraud == explained).all()


def test_users_differ_in_level_and_rate(rows: Rows) -> None:
    counts = np.bincount(rows.user)[1:]
    assert np.quantile(counts, 0.9) > 3 * np.quantile(counts, 0.1)
    total = np.bincount(rows.user, weights=np.log(rows.amount))[1:]
    means = total[counts > 30] / counts[counts > 30]
    assert np.std(means) > 0.4


def test_merchants_are_heavy_tailed(rows: Rows) -> None:
    counts = np.sort(np.bincount(rows.merchant))[::-1]
    assert counts[: len(counts) // 100].sum() > 0.07 * counts.sum()


# --- same settings, same rows ---------------------------------------------------------------------


def test_same_seed_same_table() -> None:
    assert simulate(SMALL).equals(simulate(SMALL))


def test_another_seed_another_table() -> None:
    assert not simulate(SMALL).equals(simulate(replace(SMALL, seed=8)))


@pytest.mark.parametrize("span_rows", [1500, 10**9])
def test_file_equals_table_however_it_is_cut(span_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", 4000)  # several blocks of users
    monkeypatch.setattr(module, "_SPAN_ROWS", span_rows)
    path = tmp_path / "out.parquet"
    summary = simulate_to(SMALL, path)
    whole = simulate(SMALL)
    assert pq.read_table(path).combine_chunks().equals(whole.combine_chunks())
    assert (pq.ParquetFile(path).num_row_groups > 1) == (span_rows < 10**9)

    kinds = Counter(whole["fraud_kind"].to_pylist())
    assert summary.rows == whole.num_rows
    assert summary.users == len(pc.unique(whole["user_id"]))
    assert summary.merchants == len(pc.unique(whole["merchant_id"]))
    assert summary.frauds == pc.sum(whole["is_fraud"]).as_py()
    assert summary.frauds_by_kind == {kind: kinds[kind] for kind in FRAUD_KINDS}
    assert (summary.first, summary.last) == (whole["time"][0].as_py(), whole["time"][-1].as_py())


@pytest.mark.parametrize("settings", [Simulation(users=1, days=1), Simulation(users=3, days=400)])
def test_few_users(settings: Simulation, tmp_path: Path) -> None:
    summary = simulate_to(settings, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").schema.names == SCHEMA.names
    assert summary.rows == simulate(settings).num_rows


def test_no_row_at_all_is_still_a_file(tmp_path: Path) -> None:
    settings = Simulation(users=1, days=1, purchases_per_day=1e-6)
    summary = simulate_to(settings, tmp_path / "out.parquet")
    assert (summary.rows, summary.first, summary.last) == (0, None, None)
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


# --- the file -------------------------------------------------------------------------------------


def test_only_the_file_is_left_and_progress_ends(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    simulate_to(SMALL, tmp_path / "out.parquet", lambda done, total: steps.append((done, total)))
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert {total for _, total in steps} == {len(steps)}


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    path.write_bytes(b"old")

    def fail_at_the_end(done: int, total: int) -> None:
        if done == total:
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        simulate_to(SMALL, path, fail_at_the_end)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.parquet"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["no/such/out.parquet", "."])
def test_a_place_that_takes_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^out: expected a file"):
        simulate_to(SMALL, tmp_path / name)


# --- the frauds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [7, 11])
def test_rate_and_mix(seed: int) -> None:
    kinds = simulate(Simulation(seed=seed))["fraud_kind"].to_numpy(zero_copy_only=False)
    frauds = (kinds != "").sum()
    assert 0.007 < frauds / len(kinds) < 0.010
    for kind, share in FRAUD_MIX.items():
        assert (kinds == kind).sum() / frauds == pytest.approx(share, rel=0.3), kind
    assert not (kinds == "trickle").any()


def test_large_amounts_are_large_and_honest_ones_come_close(rows: Rows) -> None:
    honest, fraud = rows.amount[rows.kind == ""], rows.amount[rows.kind == "large_amount"]
    assert np.median(fraud) > np.quantile(honest, 0.999)
    assert honest.max() > np.quantile(fraud, 0.9)
    for kind in set(FRAUD_MIX) - {"large_amount"}:
        some = rows.amount[rows.kind == kind]
        assert np.quantile(some, 0.99) < np.quantile(honest, 0.9998), kind
        assert np.median(some) < np.quantile(honest, 0.95), kind


def test_burst_follows_a_small_payment_at_new_merchants(rows: Rows) -> None:
    burst = rows.kind == "test_burst"
    first = np.flatnonzero(burst & ~(np.roll(burst, 1) & rows.follows))
    tested = 0
    for at in first:
        just = slice(max(0, at - 4), at)  # an honest purchase may come in between
        near = (rows.user[just] == rows.user[at]) & (rows.ms[at] - rows.ms[just] < HOUR)
        tested += (near & (rows.category[just] == "digital")).any()
    assert tested > 0.9 * len(first) > 50

    pair = rows.user * 1_000_000 + rows.merchant
    assert np.isin(pair[burst], pair[~burst]).mean() < 0.05
    honest = rows.amount[rows.kind == ""]
    assert rows.amount[burst].max() < honest.max()
    assert rows.amount[burst].min() > honest.min()


def test_small_payments_are_mostly_alone(rows: Rows) -> None:
    small = (rows.category == "digital") & (rows.amount < 10)
    ahead = np.zeros(len(small), dtype=bool)
    ahead[:-1] = (rows.kind[1:] == "test_burst") & (rows.user[1:] == rows.user[:-1])
    assert small.sum() > 20 * (small & ahead).sum() > 0


def test_honest_bursts_are_more_frequent_than_fraudulent_ones(rows: Rows) -> None:
    quick = rows.follows & (np.diff(rows.ms, prepend=0) < 25 * 60_000)
    third = quick & np.roll(quick, 1)  # the third purchase in a row within minutes
    assert (third & (rows.kind == "")).sum() > (third & (rows.kind == "test_burst")).sum() > 0


def speeds(rows: Rows) -> npt.NDArray[Any]:
    """km/h from the row before [N]; infinite without time between."""
    lat, long = np.radians(rows.lat), np.radians(rows.long)
    chord = np.sin(np.diff(lat) / 2) ** 2 + np.cos(lat[1:]) * np.cos(lat[:-1]) * np.sin(np.diff(long) / 2) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        speed = 2 * 6371 * np.arcsin(np.sqrt(chord)) / (np.diff(rows.ms) / HOUR)
    return np.concatenate([[0.0], speed])


def test_nobody_honest_travels_faster_than_an_aircraft(rows: Rows) -> None:
    speed = speeds(rows)
    hop = rows.follows & (rows.kind == "impossible_hop")
    honest = rows.follows & (rows.kind == "") & (np.roll(rows.kind, 1) == "")
    assert (speed[hop] > 900).mean() > 0.98
    assert (speed[honest] > 900).mean() < 0.002  # two shops of a city within seconds


def test_honest_users_travel(rows: Rows) -> None:
    moved = rows.follows & (np.abs(np.diff(rows.lat, prepend=0)) > 2)
    honest = moved & (rows.kind == "") & (np.roll(rows.kind, 1) == "")
    assert honest.sum() > 5 * (rows.kind == "impossible_hop").sum()


def test_compromises_stay_in_their_merchants_and_times(table: pa.Table) -> None:
    settings = Simulation()
    world = module._make_world(settings)
    index = np.argsort(world.public)[table["merchant_id"].to_numpy() - 1]
    time = table["time"].cast(pa.int64()).to_numpy() - settings.start_ms
    inside = (time >= world.compromised[index]) & (time < world.restored[index])
    kinds = table["fraud_kind"].to_numpy(zero_copy_only=False)
    leaked = kinds == "merchant_compromise"
    assert not (leaked & ~inside).any()
    assert 0.5 < leaked[inside].mean() < 0.7
    assert 10 < len(np.unique(index[leaked])) < 0.1 * len(world.public)
    length = (world.restored - world.compromised)[np.unique(index[leaked])]
    assert length.min() >= 18 * DAY and length.max() < 32 * DAY


def test_compromised_purchases_look_like_any_other(rows: Rows) -> None:
    leaked = rows.amount[rows.kind == "merchant_compromise"]
    honest = rows.amount[rows.kind == ""]
    assert abs(np.median(np.log(leaked)) - np.median(np.log(honest))) < 0.7


def test_only_one_order_is_fraud_and_the_others_are_as_frequent(rows: Rows) -> None:
    suspect = ("digital", "fuel", "electronics")
    found: Counter[tuple[str, ...]] = Counter()
    fraud: Counter[tuple[str, ...]] = Counter()
    for at in range(2, len(rows.user)):
        order = tuple(rows.category[at - 2 : at + 1])
        together = rows.user[at] == rows.user[at - 2] and rows.ms[at] - rows.ms[at - 2] < 5 * HOUR
        if together and set(order) == set(suspect):
            found[order] += 1
            fraud[order] += rows.kind[at] == "order"
    usual = np.mean([found[order] for order in itertools.permutations(suspect)])
    for order in itertools.permutations(suspect):
        assert found[order] == pytest.approx(usual, rel=0.3), order
        assert (fraud[order] > 0) == (order == suspect), order
    assert fraud[suspect] > 0.75 * found[suspect]


def test_one_kind_alone_has_all_the_frauds() -> None:
    every = simulate(replace(SMALL, fraud_share=0.02))
    for kind in FRAUD_MIX:
        table = simulate(replace(SMALL, fraud_share=0.02, only_kind=kind))
        count = kind_count(table, kind)
        assert count == table["is_fraud"].to_numpy().sum(), kind
        assert count > 2 * kind_count(every, kind), kind
    assert count / table.num_rows == pytest.approx(0.02, rel=0.3)


def test_the_users_own_purchases_come_between_the_steps_of_a_long_order() -> None:
    gap = (6 * 60.0, 36 * 60.0)
    rows = rows_of(simulate(replace(SMALL, purchases_per_day=2.0, only_kind="order", order_gap=gap)))
    last = np.flatnonzero(rows.kind == "order")
    between, complete = [], []
    for at in last.tolist():
        mine = rows.user == rows.user[at]
        ago = (rows.ms[at] - rows.ms[mine]) / 60_000
        steps = [(ago >= n * gap[0]) & (ago <= n * gap[1]) for n in (1, 2)]
        complete.append(all(c in rows.category[mine][s] for c, s in zip(("fuel", "digital"), steps, strict=True)))
        between.append(((ago > 0) & (ago < 2 * gap[0])).sum())
    assert len(last) > 50
    assert np.mean(complete) > 0.9  # a step that falls into a journey is left out
    assert np.mean(between) > 1


def test_a_takeover_lasts_about_two_weeks_beside_the_users_own_purchases(rows: Rows) -> None:
    taken = rows.kind == "habit_change"
    spans, shares, factors = [], [], []
    for user in np.unique(rows.user[taken]):
        mine = rows.user == user
        times = rows.ms[mine & taken]
        within = mine & (rows.ms >= times.min()) & (rows.ms <= times.max())
        spans.append((times.max() - times.min()) / DAY)
        shares.append(taken[within].mean())
        own = np.log(rows.amount[mine & (rows.kind == "")])
        factors.append(np.exp(np.log(rows.amount[mine & taken]).mean() - own.mean()))
    assert 8 < np.median(spans) < 19
    assert 0.2 < np.mean(shares) < 0.8
    assert np.mean(np.array(factors) > 2) > 0.9
    population = np.quantile(rows.amount[rows.kind == ""], 0.99)
    assert np.quantile(rows.amount[taken], 0.9) < population


# --- drift ----------------------------------------------------------------------------------------


def drifted(drift: Drift) -> tuple[pa.Table, pa.Table]:
    """The small simulation without and with a drift, after a check that no earlier row differs."""
    plain, changed = simulate(SMALL), simulate(replace(SMALL, drift=(drift,)))
    moment = datetime.fromisoformat(drift.at).replace(tzinfo=UTC)
    assert before(plain, moment).equals(before(changed, moment))
    assert before(plain, moment).num_rows > 1000
    return plain, changed


def kind_count(table: pa.Table, kind: str) -> int:
    return int(pc.sum(pc.equal(table["fraud_kind"], kind)).as_py())


def test_new_pattern_is_equal_amounts_at_equal_gaps() -> None:
    plain, changed = drifted(Drift("new_pattern", DRIFT_DATE, factor=5.0))
    assert kind_count(plain, "trickle") == 0
    added = rows_of(changed.filter(pc.equal(changed["fraud_kind"], "trickle")))
    assert len(added.user) > 20
    runs = Counter(zip(added.user, added.merchant, added.amount, strict=True))
    for user, merchant, amount in runs:
        run = (added.user == user) & (added.merchant == merchant) & (added.amount == amount)
        assert len(np.unique(np.diff(added.ms[run]))) <= 1
    assert max(runs.values()) >= 5


def test_inflation_multiplies_amounts() -> None:
    plain, changed = drifted(Drift("inflation", DRIFT_DATE, factor=2.0))
    assert plain.num_rows == changed.num_rows
    ratio = changed["amount"].to_numpy() / plain["amount"].to_numpy()
    later = plain["time"].cast(pa.int64()).to_numpy() >= (
        datetime.fromisoformat(DRIFT_DATE).replace(tzinfo=UTC).timestamp() * 1000
    )
    large = plain["amount"].to_numpy() > 10
    assert np.allclose(ratio[later & large], 2.0, atol=0.002)


@pytest.mark.parametrize("kind", FRAUD_MIX)
@pytest.mark.parametrize("factor", [0.0, 6.0])
def test_fraud_rate_changes_one_kind(kind: str, factor: float) -> None:
    _, changed = drifted(Drift("fraud_rate", DRIFT_DATE, factor=factor, fraud_kind=kind))
    settings = replace(SMALL, users=1500, fraud_share=0.02)
    drift = Drift("fraud_rate", DRIFT_DATE, factor=factor, fraud_kind=kind)
    plain, changed = simulate(settings), simulate(replace(settings, drift=(drift,)))
    more = kind_count(changed, kind) > kind_count(plain, kind)
    assert more == (factor > 1)
    for other in set(FRAUD_MIX) - {kind, "merchant_compromise"}:
        assert kind_count(changed, other) == kind_count(plain, other)


# --- settings that cannot be ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("users", 0),
        ("users", -5),
        ("users", 2.5),
        ("users", True),
        ("days", 0),
        ("days", 999_999),
        ("seed", -1),
        ("start", "yesterday"),
        ("start", "2025-02-30"),
        ("start", 20250101),
        ("purchases_per_day", 0.0),
        ("purchases_per_day", float("nan")),
        ("merchants_per_user", -0.1),
        ("fraud_share", 0.9),
        ("only_kind", "theft"),
        ("only_kind", "trickle"),
        ("order_gap", (0.0, 150.0)),
        ("order_gap", (20.0, float("nan"))),
        ("order_gap", (20.0, 20.0)),
    ],
)
def test_refused_settings_name_field_and_value(field: str, value: Any) -> None:
    settings: dict[str, Any] = {
        field: value,
        **({"start": "9000-01-01"} if value == 999_999 else {}),
    }
    with pytest.raises(ConfigError) as refusal:
        Simulation(**settings)
    assert str(refusal.value).startswith(f"{field}: expected ")
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(
    ("drift", "field", "seen"),
    [
        ({"kind": "earthquake"}, "kind", "earthquake"),
        ({"kind": "inflation", "at": "soon"}, "at", "soon"),
        ({"kind": "inflation", "at": "2030-01-01"}, "at", "2030-01-01"),
        ({"kind": "inflation", "factor": 0.0}, "factor", "0.0"),
        ({"kind": "inflation", "fraud_kind": "order"}, "fraud_kind", "order"),
        ({"kind": "fraud_rate"}, "fraud_kind", "''"),
        ({"kind": "fraud_rate", "fraud_kind": "trickle"}, "fraud_kind", "trickle"),
    ],
)
def test_refused_drifts_name_field_and_value(drift: dict[str, Any], field: str, seen: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Simulation(drift=(Drift(**{"at": DRIFT_DATE, **drift}),))
    assert str(refusal.value).startswith(f"drift.{field}: expected ")
    assert seen in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "drift"),
    [
        ("new_pattern@2025-04-01", Drift("new_pattern", "2025-04-01", 1.5)),
        ("inflation@2025-04-01:1.2", Drift("inflation", "2025-04-01", 1.2)),
        ("fraud_rate@2025-04-01:0:order", Drift("fraud_rate", "2025-04-01", 0.0, "order")),
    ],
)
def test_a_drift_is_spelled_in_one_word(text: str, drift: Drift) -> None:
    assert parse_drift(text) == drift


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inflation", r"drift: expected KIND@DATE\[:FACTOR\[:FRAUD_KIND\]\] such as .*, got 'inflation'"),
        ("inflation@2025-04-01:2:order:x", r"drift: expected KIND@DATE.*got 'inflation@2025-04-01:2:order:x'"),
        ("inflation@2025-04-01:much", r"drift\.factor: expected a number such as 1\.5, got 'much'"),
        ("inflation@2025-04-01:", r"drift\.factor: expected a number such as 1\.5, got ''"),
        ("inflation@2025-04-01:nan", r"drift\.factor: expected a number above 0 up to 100, got nan"),
        ("inflatoin@2025-04-01", r"drift\.kind: expected one of new_pattern, .*got 'inflatoin'"),
        ("inflation@April", r"drift\.at: expected a date such as '2025-01-01', got 'April'"),
        ("inflation@", r"drift\.at: expected a date such as '2025-01-01', got ''"),
        ("fraud_rate@2025-04-01:3", r"drift\.fraud_kind: expected one of test_burst, .* for fraud_rate, got ''"),
    ],
)
def test_a_drift_that_is_spelled_wrongly_says_how(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_drift(text)
