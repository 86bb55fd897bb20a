"""`seqfraud init`: each guess, what is written for the simulator's and the public files, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from seqfraud.config import DAY_MS, Config, IdentifiersConfig, load_config, parse_config, parse_instant
from seqfraud.errors import ConfigError, DataError
from seqfraud.identifiers import looks_like_card
from training.proposal import Given, Proposal, inspect_file, propose, propose_split, write_config
from training.run import train_run
from training.simulate import Simulation, simulate

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def proposed(data: Path, tmp_path: Path, read_all: bool = True) -> tuple[Config, Proposal]:
    proposal, checked = write_config(data, tmp_path / "my.toml", read_all=read_all)
    assert checked is None or checked.refusal is None
    return load_config(tmp_path / "my.toml"), proposal


def test_the_simulator(tmp_path: Path) -> None:
    pq.write_table(simulate(Simulation(users=300, days=90)), tmp_path / "data.parquet")
    config, proposal = proposed(tmp_path / "data.parquet", tmp_path)
    data, features = config.data, config.features
    assert (data.transaction, data.user, data.time, data.label) == ("transaction_id", "user_id", "time", "is_fraud")
    assert data.amount == "amount"
    assert features.numeric == ("amount",)
    assert features.categorical == ("category",)
    assert "merchant_id" in features.context
    assert features.geo == (("lat", "long"),)
    assert features.ip == ("ip",)
    left_out = {choice.column: choice.why for choice in proposal.of("left out")}
    assert "fraud_kind" in left_out
    assert (config.data.path, config.split is not None) == ("data.parquet", True)


def test_every_column_has_a_reason_and_the_text_has_comments(tmp_path: Path) -> None:
    table = simulate(Simulation(users=100, days=60))
    pq.write_table(table, tmp_path / "data.parquet")
    _, proposal = proposed(tmp_path / "data.parquet", tmp_path)
    assert [choice.column for choice in proposal.choices] == table.column_names
    assert all(choice.why for choice in proposal.choices)
    lines = (tmp_path / "my.toml").read_text().splitlines()
    assert sum("#" in line for line in lines) > 10


def test_an_existing_file_stays_without_force(tmp_path: Path) -> None:
    pq.write_table(simulate(Simulation(users=50, days=60)), tmp_path / "data.parquet")
    (tmp_path / "my.toml").write_text("mine")
    with pytest.raises(ConfigError, match="--force"):
        write_config(tmp_path / "data.parquet", tmp_path / "my.toml")
    assert (tmp_path / "my.toml").read_text() == "mine"
    write_config(tmp_path / "data.parquet", tmp_path / "my.toml", force=True)
    load_config(tmp_path / "my.toml")


def test_what_is_written_for_simulated_data_trains_as_it_stands(tmp_path: Path) -> None:
    """Nothing to fill in and nothing to mend: columns, dates and the path are right."""
    torch.set_num_threads(1)
    pq.write_table(simulate(Simulation(users=150, days=60, fraud_share=0.03)), tmp_path / "data.parquet")
    config = tmp_path / "configs" / "my.toml"
    _, checked = write_config(tmp_path / "data.parquet", config)
    text = config.read_bytes()
    metrics = train_run(config, None, tmp_path / "run", "cpu")
    assert config.read_bytes() == (tmp_path / "run" / "config.toml").read_bytes() == text
    assert checked is not None
    for part, (rows, frauds) in checked.parts.items():
        assert metrics["rows"][part] == rows, "what init announces is what training takes"
        assert part == "train" or metrics[part]["frauds"] == frauds
    assert metrics["test"]["roc_auc"] > 0.6


# ---- single guesses, on 3,000 transactions of 60 days

N = 3000
FIRST = 1_735_689_600
"""2025-01-01, seconds."""
Ints = npt.NDArray[np.int64]
Column = Callable[["Drawn"], Any]


class Drawn:
    """What columns are made of."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.seconds: Ints = FIRST + np.sort(self.rng.integers(0, 60 * 86_400, N))
        self.user: Ints = self.rng.integers(0, 80, N)
        self.fraud: Ints = (self.rng.random(N) < 0.05).astype(np.int64)

    def iso(self, end: str = "", separator: str = "T") -> list[str]:
        return [str(np.datetime64(int(s), "s")).replace("T", separator) + end for s in self.seconds]

    def ints(self, low: int, high: int) -> Ints:
        return self.rng.integers(low, high, N)

    def texts(self, prefix: str, count: int) -> list[str]:
        return [f"{prefix}{i}" for i in self.rng.integers(0, count, N)]


PLAIN: dict[str, Column] = {
    "tx_id": lambda d: np.arange(N) + 50_000,
    "customer": lambda d: [f"c{u}" for u in d.user],
    "when": lambda d: d.seconds,
    "amount": lambda d: np.round(d.rng.lognormal(3, 1, N), 2),
    "shop": lambda d: d.texts("s", 60),
    "kind": lambda d: d.texts("k", 6),
    "is_fraud": lambda d: d.fraud,
}


def file(folder: Path, form: str = "parquet", without: tuple[str, ...] = (), **columns: Column) -> Path:
    """The plain columns and others, as a file."""
    drawn = Drawn()
    kept = {name: make for name, make in PLAIN.items() if name not in without}
    data = pa.table({name: make(drawn) for name, make in {**kept, **columns}.items()})
    path = folder / f"data.{form}"
    if form == "csv":
        pa.csv.write_csv(data, path)
    else:
        pq.write_table(data, path)
    return path


def guessed(path: Path, given: Given | None = None) -> Proposal:
    return propose(inspect_file(path), given)


def why(proposal: Proposal, column: str) -> tuple[str, str]:
    """Role and reason."""
    choice = next(choice for choice in proposal.choices if choice.column == column)
    return choice.role, choice.why


@pytest.mark.parametrize("form", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("make", "unit"),
    [
        (lambda d: d.iso(), "iso"),
        (lambda d: d.iso("Z", " "), "iso"),
        (lambda d: d.iso(".125+02:00"), "iso"),
        (lambda d: d.seconds.astype("datetime64[s]"), "iso"),
        (lambda d: d.seconds, "s"),
        (lambda d: d.seconds + 0.25, "s"),
        (lambda d: [str(s) for s in d.seconds], "s"),
        (lambda d: d.seconds * 1000, "ms"),
        (lambda d: [str(s * 1000) for s in d.seconds], "ms"),
    ],
)
def test_the_unit_of_the_time(tmp_path: Path, make: Column, unit: str, form: str) -> None:
    """As numbers and as texts; and what is written is read back to the same first and last moment."""
    path = file(tmp_path, form, when=make)
    proposal, checked = write_config(path, tmp_path / "c.toml")
    assert (proposal.one("time").column, proposal.time_unit) == ("when", unit)  # type: ignore[union-attr]
    assert load_config(tmp_path / "c.toml").data.time_unit == unit
    assert checked is not None
    assert (checked.refusal, checked.rows) == (None, N)
    assert abs(proposal.split.first - FIRST * 1000) < DAY_MS
    assert sum(rows for rows, _ in checked.parts.values()) > N / 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d.seconds * 1_000_000, r"when: numbers from .*: microseconds or finer; divide them to milliseconds"),
        (lambda d: d.seconds - FIRST, r"when: numbers from .*: a clock of its own; add the moment at which it starts"),
        (lambda d: ["31.12.2024 10:00"] * N, r"when: texts such as '31\.12\.2024 10:00', not ISO 8601"),
    ],
)
def test_a_time_that_is_none_says_what_it_holds_instead(tmp_path: Path, make: Column, words: str) -> None:
    with pytest.raises(DataError, match=words):
        guessed(file(tmp_path, when=make))


def test_of_two_times_the_transactions_own_is_taken(tmp_path: Path) -> None:
    """And a time that repeats it, or one of the user, is left out."""
    proposal = guessed(file(
        tmp_path, date_of_birth=lambda d: ((d.user * 86_400 * 30).astype("datetime64[s]")),
        unix_time=lambda d: d.seconds + 3600, account_opened=lambda d: (FIRST - d.user * 86_400).astype("datetime64[s]"),
    ))  # fmt: skip
    assert proposal.one("time").column == "when"  # type: ignore[union-attr]
    assert why(proposal, "unix_time") == ("left out", "repeats when, always 60 minutes apart")
    assert why(proposal, "date_of_birth")[0] == why(proposal, "account_opened")[0] == "left out"


@pytest.mark.parametrize("form", ["parquet", "csv"])
@pytest.mark.parametrize(
    "name",
    [
        "is_fraud",
        "isFraud",
        "TX_FRAUD",
        "fraud_flag",
        "Fraudulent",
        "Class",
        "target",
        "label",
        "chargeback",
        "is scam",
    ],
)
@pytest.mark.parametrize("kind", [int, float, bool, str])
def test_the_label_under_other_names_and_types(tmp_path: Path, name: str, kind: type, form: str) -> None:
    path = file(tmp_path, form, ("is_fraud",), **{name: lambda d: [kind(f) for f in d.fraud]})
    proposal = guessed(path)
    assert proposal.one("label").column == name  # type: ignore[union-attr]
    assert proposal.notes == ()


@pytest.mark.parametrize(("yes", "no"), [("True", "False"), ("TRUE", "FALSE"), ("1.0", "0.0")])
def test_a_label_in_words_of_pandas_is_one_and_is_read_as_such(tmp_path: Path, yes: str, no: str) -> None:
    """It was left out as a leak, with the advice to write 1 and 0."""
    path = file(tmp_path, "csv", is_fraud=lambda d: np.where(d.fraud == 1, yes, no))
    proposal, checked = write_config(path, tmp_path / "c.toml")
    assert why(proposal, "is_fraud")[0] == "label"
    assert checked is not None
    assert checked.refusal is None
    assert sum(frauds for _, frauds in checked.parts.values()) > 50


def test_a_label_with_gaps_says_how_many(tmp_path: Path) -> None:
    proposal = guessed(
        file(tmp_path, is_fraud=lambda d: [None if i % 4 == 0 else int(f) for i, f in enumerate(d.fraud)])
    )
    role, words = why(proposal, "is_fraud")
    assert role == "label"
    assert words.endswith("unknown in 25 %")


def test_of_label_and_forecast_the_label_is_taken_and_the_forecast_left_out(tmp_path: Path) -> None:
    proposal = guessed(file(tmp_path, isFlaggedFraud=lambda d: d.fraud * d.ints(0, 2)))
    assert why(proposal, "is_fraud")[0] == "label"
    assert why(proposal, "isFlaggedFraud")[0] == "left out"


@pytest.mark.parametrize(
    ("columns", "note"),
    [
        ({}, "no label was found: training needs a column of 0 (honest) and 1 (fraud)"),
        ({"online": lambda d: (d.rng.random(N) < 0.1).astype(int)},
         "no label was found: training needs a column of 0 (honest) and 1 (fraud); columns of 0 and 1: online; name one "
         "with --label COLUMN"),
        ({"fraudulent": lambda d: np.where(d.fraud == 1, "Y", "N")},
         "no label was found: 'fraudulent' is named like one, but holds 'N', 'Y'; write 1 for fraud and 0 for honest there "
         "and run this again"),
    ],
)  # fmt: skip
def test_without_a_label_the_file_says_what_to_do(tmp_path: Path, columns: dict[str, Column], note: str) -> None:
    path = file(tmp_path, without=("is_fraud",), **columns)
    proposal, _ = write_config(path, tmp_path / "c.toml")
    assert proposal.notes == (note,)
    text = (tmp_path / "c.toml").read_text()
    assert '# label = "is_fraud"' in text
    assert load_config(tmp_path / "c.toml").data.label is None
    if "online" in columns:
        assert guessed(path, Given(label="online")).one("label").column == "online"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cc_num", lambda d: 4_000_000_000_000_000 + d.user * 7919),
        ("card_number", lambda d: [f"{4_000_000_000_000_000 + u * 7919}" for u in d.user]),
        ("PAN", lambda d: [f"{u:019d}" for u in d.user]),
        ("account_id", lambda d: d.user),  # "count" in it made it a measure
        ("USER", lambda d: [f"00{u}" for u in d.user]),
        ("nameOrig", lambda d: [f"C{u}" for u in d.user]),
        ("client", lambda d: d.user.astype(float)),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_the_user_under_other_names(tmp_path: Path, name: str, make: Column, form: str) -> None:
    proposal = guessed(file(tmp_path, form, ("customer",), **{name: make}))
    role, words = why(proposal, name)
    assert role == "user"
    assert "80 values" in words
    for choice in proposal.choices:
        assert "4000000000000" not in choice.why.replace(",", ""), "a reason never quotes a card number"


def test_a_file_without_a_user_lists_what_comes_back(tmp_path: Path) -> None:
    path = file(tmp_path, without=("customer",))
    with pytest.raises(
        DataError, match=r"no column looks like a user.*shop \(60 values with 50 transactions each\).*--user"
    ):
        guessed(path)
    assert guessed(path, Given(user="shop")).one("user").column == "shop"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="there is no column 'nobody'; the columns are: tx_id, when"):
        guessed(path, Given(user="nobody"))


@pytest.mark.parametrize(
    ("name", "make", "role"),
    [
        ("tx_id", lambda d: np.arange(N), "transaction"),
        ("txn_ref", lambda d: [f"{i:032x}" for i in range(N)], "transaction"),
        ("order_number", lambda d: np.arange(N)[::-1] + 2**53, "transaction"),
        ("Unnamed: 0", lambda d: np.arange(N), "left out"),
        ("index", lambda d: np.arange(N), "left out"),
        ("nonce", lambda d: [f"{i:08x}" for i in range(N)], "left out"),
    ],
)
def test_ids_of_transactions_and_row_numbers(tmp_path: Path, name: str, make: Column, role: str) -> None:
    proposal = guessed(file(tmp_path, without=("tx_id",), **{name: make}))
    assert why(proposal, name)[0] == role
    assert (proposal.one("transaction") is not None) == (role == "transaction")


@pytest.mark.parametrize(
    ("name", "make", "role", "words"),
    [
        ("mcc", lambda d: d.ints(5000, 5020), "categorical", "20 values"),
        ("zip", lambda d: d.ints(10_000, 12_500), "left out", "too rarely the same"),
        ("country", lambda d: d.texts("C", 30), "categorical", "30 values"),
        ("country_code", lambda d: d.ints(1, 30), "categorical", "29 values"),
        ("counterparty", lambda d: d.ints(1, 40), "context", "39 values"),
        ("item_count", lambda d: d.ints(1, 30), "numeric", "1 to 29"),
        ("terminal", lambda d: d.ints(0, 40), "context", "40 values with 75 transactions each"),
        ("device_id", lambda d: d.user * 2 + d.ints(0, 2), "context", "mostly one user each"),
        ("beneficiary", lambda d: d.texts("b", 1500), "context", "2.3 transactions each|values"),
        ("age", lambda d: 20 + d.user % 4, "numeric", "an attribute of the user, it never changes"),
        ("salary", lambda d: 1000 + d.user * 7.5, "left out", "repeats customer: one value for each user"),
        ("job", lambda d: [f"j{u // 2}" for u in d.user], "left out", "nearly says who the user is"),
        ("items", lambda d: d.ints(1, 9), "numeric", "1 to 8"),
        ("balance", lambda d: d.rng.normal(1000, 300, N), "numeric", "half are below"),
        ("online", lambda d: d.ints(0, 2).astype(bool), "categorical", "2 values"),
        ("constant", lambda d: ["x"] * N, "left out", "always the same"),
        ("empty", lambda d: pa.nulls(N), "left out", "always missing"),
        ("hardly", lambda d: [1.5 if i == 7 else None for i in range(N)], "left out", "almost always missing"),
        ("tags", lambda d: [["a"]] * N, "left out", "of type list"),
        ("note", lambda d: [f"paid for {i % 1500} things and more" for i in range(N)], "left out", "free text"),
        ("shop_name", lambda d: None, "left out", "repeats shop: equal in the same rows"),
        ("status", lambda d: d.texts("s", 3), "categorical", "make sure that it is known when the transaction happens"),
        ("seen", lambda d: (d.seconds - d.ints(0, 10**6)).astype("datetime64[s]"), "left out", "a second time"),
    ],
)  # fmt: skip
def test_what_becomes_of_a_column(tmp_path: Path, name: str, make: Column, role: str, words: str) -> None:
    """Cardinality, name, type and relation to the user decide."""
    if name == "shop_name":
        shops = np.random.default_rng(9).integers(0, 60, N)
        proposal = guessed(file(tmp_path, shop=lambda d: shops, shop_name=lambda d: [f"n{s}" for s in shops]))
    else:
        proposal = guessed(file(tmp_path, **{name: make}))
    got, reason = why(proposal, name)
    assert got == role, reason
    assert any(part in reason for part in words.split("|")), reason


def test_two_numbers_that_differ_in_every_row_are_not_each_others_copies(tmp_path: Path) -> None:
    """Groups of one row each are equal for any two such columns: balances before and after were taken for one."""
    proposal = guessed(file(
        tmp_path, oldbalance=lambda d: d.rng.normal(1000, 300, N), surplus=lambda d: d.rng.normal(0, 1, N),
        same=lambda d: np.random.default_rng(5).random(N), again=lambda d: np.random.default_rng(5).random(N),
    ))  # fmt: skip
    numeric = [choice.column for choice in proposal.of("numeric")]
    assert numeric == ["oldbalance", "surplus", "same"]
    assert why(proposal, "again") == ("left out", "repeats same: equal in the same rows")


@pytest.mark.parametrize(
    ("name", "make", "leaks"),
    [
        ("outcome_code", lambda d: np.where(d.fraud == 1, 9, d.ints(0, 5)), True),
        ("reason", lambda d: [None if not f else "stolen" for f in d.fraud], True),
        ("refund", lambda d: np.where(d.fraud == 1, 50 + d.rng.random(N), d.rng.random(N)), True),
        ("fraud_kind", lambda d: d.texts("x", 3), True),
        ("weak", lambda d: np.where((d.fraud == 1) & (d.rng.random(N) < 0.3), 9, d.ints(0, 9)), False),
    ],
)
def test_leaks(tmp_path: Path, name: str, make: Column, leaks: bool) -> None:
    """A column that gives the answer away, in its values, their being there, or its name."""
    role, words = why(guessed(file(tmp_path, **{name: make})), name)
    assert (role == "left out" and words.startswith("a leak")) == leaks, words


def test_a_merchant_that_turned_bad_for_a_week_is_no_leak(tmp_path: Path) -> None:
    """Its frauds lie in one half of the time; what it says of the other half counts."""

    def shop(d: Drawn) -> list[str]:
        bad = (d.seconds < FIRST + 8 * 86_400) & (d.fraud == 1)
        return ["bad" if b else f"s{i}" for b, i in zip(bad, d.rng.integers(0, 60, N), strict=True)]

    assert why(guessed(file(tmp_path, shop=shop)), "shop")[0] == "context"


@pytest.mark.parametrize(
    ("lat", "long"), [("lat", "long"), ("latitude", "longitude"), ("merch_lat", "merch_lng"), ("shopLat", "shopLon")]
)
def test_places(tmp_path: Path, lat: str, long: str) -> None:
    """A pair that moves is a place; the user's home is none."""
    proposal = guessed(file(tmp_path, **{
        lat: lambda d: d.rng.uniform(40, 50, N), long: lambda d: d.rng.uniform(-120, 9, N),
        "home_lat": lambda d: 40.0 + d.user // 2, "home_long": lambda d: 9.0 + d.user // 2,
    }))  # fmt: skip
    assert proposal.places == ((lat, long),)
    assert "it never changes within a user" in why(proposal, "home_lat")[1]


def test_numbers_that_cannot_be_degrees_are_no_place(tmp_path: Path) -> None:
    proposal = guessed(file(
        tmp_path, latitude=lambda d: d.rng.uniform(400, 500, N), longitude=lambda d: d.rng.uniform(0, 9, N)
    ))  # fmt: skip
    assert proposal.places == ()
    assert why(proposal, "latitude")[0] == why(proposal, "longitude")[0] == "numeric"


def test_ip_addresses_of_both_kinds(tmp_path: Path) -> None:
    proposal = guessed(file(
        tmp_path, "csv", client=lambda d: [f"10.0.{i}.7" for i in d.ints(0, 256)],
        v6=lambda d: [f"2001:db8:{i:x}::1" for i in d.ints(0, 500)],
        version=lambda d: [f"1.{i}.0" for i in d.ints(0, 20)],
        ip_number=lambda d: d.ints(2**31, 2**32),
    ))  # fmt: skip
    assert [choice.column for choice in proposal.of("ip")] == ["client", "v6"]
    assert why(proposal, "version")[0] == "categorical"
    assert why(proposal, "ip_number")[0] == "left out"


def test_when_labels_became_known_gives_the_delay(tmp_path: Path) -> None:
    def known(d: Drawn) -> list[str | None]:
        late = d.seconds + 86_400 * d.ints(1, 4)
        return [str(np.datetime64(int(s), "s")) if f else None for s, f in zip(late, d.fraud, strict=True)]

    path = file(tmp_path, when=lambda d: d.iso(), reported_at=known)
    proposal, checked = write_config(path, tmp_path / "c.toml")
    assert why(proposal, "reported_at")[0] == "label known at"
    data = load_config(tmp_path / "c.toml").data
    assert (data.label_known_at, data.label_delay) == ("reported_at", 3 * DAY_MS)
    assert checked is not None
    assert checked.refusal is None


def test_names_with_quotes_line_breaks_and_no_name(tmp_path: Path) -> None:
    """The file is TOML whatever columns are called, and no name breaks out of its comment."""
    odd = {
        'a "b" \\': lambda d: d.texts("x", 5),
        "two\nlines = 1": lambda d: d.texts("y", 5),
        "": lambda d: d.texts("z", 5),
    }
    path = file(tmp_path, **odd)
    write_config(path, tmp_path / "c.toml")
    assert set(load_config(tmp_path / "c.toml").features.categorical) == {"kind", 'a "b" \\', "two\nlines = 1"}


@pytest.mark.parametrize(("days", "delay"), [(400, None), (60, None), (10, None), (60, 20 * DAY_MS), (0.5, None)])
def test_the_split_leaves_no_part_empty(days: float, delay: int | None) -> None:
    first = parse_instant("2025-01-01") + 5 * 3_600_000
    last = first + int(days * DAY_MS)
    split = propose_split(first, last, delay)
    begin = split.train_end - split.validation
    assert first <= split.train_start < begin < split.train_end < split.test_start < split.test_end
    assert split.test_end > last
    assert (begin - split.train_start) > 0.2 * (last - first), "most of the time is for training"


def test_a_split_needs_an_hour() -> None:
    with pytest.raises(DataError, match="a split by time needs an hour at the least"):
        propose_split(0, 60_000)


def test_large_files_are_judged_by_a_sample_of_every_part(tmp_path: Path) -> None:
    path = file(tmp_path)
    sample = inspect_file(path, limit=800)
    assert 400 <= sample.sampled <= 800
    assert sample.rows == N
    when = sample.values["when"]
    assert when.min() < FIRST + 86_400
    assert when.max() > FIRST + 58 * 86_400
    facts = {column.name: column for column in sample.columns}
    assert facts["customer"].per_value() == pytest.approx(N / 80, rel=0.1)
    assert facts["tx_id"].unique
    assert [c.role for c in propose(sample).choices] == [c.role for c in guessed(path).choices]


def test_a_file_without_a_time_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": ["a", "b"] * 50, "amount": [1.5, 2.5] * 50}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match="time"):
        write_config(tmp_path / "data.parquet", tmp_path / "my.toml")
    assert not (tmp_path / "my.toml").exists()


def public(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not beside the checkout in shared/data; this test needs it")
    return DATA / name


def test_the_handbook_data(tmp_path: Path) -> None:
    config, proposal = proposed(public("handbook.parquet"), tmp_path, read_all=False)
    data, features = config.data, config.features
    assert (data.transaction, data.user, data.time) == ("TRANSACTION_ID", "CUSTOMER_ID", "TX_DATETIME")
    assert (data.label, data.amount) == ("TX_FRAUD", "TX_AMOUNT")
    assert (features.numeric, features.context) == (("TX_AMOUNT",), ("TERMINAL_ID",))
    assert [choice.column for choice in proposal.of("left out")] == ["TX_FRAUD_SCENARIO"]


def test_the_sparkov_data(tmp_path: Path) -> None:
    config, proposal = proposed(public("sparkov_gen.parquet"), tmp_path, read_all=False)
    data, features = config.data, config.features
    assert (data.transaction, data.user, data.time) == (None, "cc_num", "trans_date_trans_time")
    assert (data.label, data.amount) == ("is_fraud", "amt")
    assert "merchant" in features.context
    assert "category" in features.categorical
    assert features.geo == (("merch_lat", "merch_long"),)
    assert "unix_time" in [choice.column for choice in proposal.of("left out")]


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_users_that_look_like_cards_are_commented_on(tmp_path: Path, form: str) -> None:
    cards = [int(f"{n}{c}") for n in range(400_000_000_000_000, 400_000_000_000_080)
             for c in range(10) if looks_like_card(f"{n}{c}")]  # fmt: skip
    path = file(tmp_path, form, customer=lambda d: np.array(cards)[d.user])
    config, _ = proposed(path, tmp_path)
    text = (tmp_path / "my.toml").read_text()
    assert config.identifiers == IdentifiersConfig()
    assert '# [identifiers]\n# columns = { "customer" = "hash" }\n' in text
    hashed = parse_config(text.replace("# [identifiers]\n# columns", "[identifiers]\ncolumns"), "my.toml")
    assert hashed.identifiers.columns == {"customer": "hash"}
    assert not any(str(card) in text for card in cards)


def test_users_that_do_not_are_not(tmp_path: Path) -> None:
    """Of 16-digit counters one in ten looks like a card."""
    proposed(file(tmp_path, customer=lambda d: 4_000_000_000_000_000 + d.user), tmp_path)
    assert "identifiers" not in (tmp_path / "my.toml").read_text()
