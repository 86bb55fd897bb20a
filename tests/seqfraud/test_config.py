"""The configuration: what a good file says, and that a bad one is refused with the file, the key and what to write."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfraud.config import (
    DAY_MS,
    HOUR_MS,
    CleaningConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    IdentifiersConfig,
    ServeConfig,
    SplitConfig,
    TrainingConfig,
    format_instant,
    load_config,
    parse_config,
    parse_duration,
    parse_instant,
)
from seqfraud.errors import BundleError, ConfigError
from seqfraud.schema import Schema, schema_of

MINIMAL = """
[data]
user = "u"
time = "t"
[features]
numeric = ["x"]
"""


def refused(text: str) -> str:
    """The message of the error, without the file's name, which it begins with."""
    with pytest.raises(ConfigError) as error:
        parse_config(text, "conf.toml")
    message = str(error.value)
    assert message.startswith("conf.toml: ")
    assert "\n" not in message
    return message.removeprefix("conf.toml: ")


def test_minimal_configuration_has_the_defaults() -> None:
    config = parse_config(MINIMAL, "conf.toml")
    assert config == Config(data=DataConfig(user="u", time="t"), features=FeaturesConfig(numeric=("x",)))
    assert config.data.label_delay == 7 * DAY_MS
    assert config.features.half_lives == (HOUR_MS, DAY_MS, 7 * DAY_MS, 30 * DAY_MS)
    assert config.features.habit_half_life == 90 * DAY_MS
    assert config.features.run_memory == 60 * DAY_MS
    assert config.features.context_inputs == ("count", "amount", "ratio", "fraud", "honest", "run")
    assert config.split is None


def test_every_kind_of_value() -> None:
    config = parse_config(
        """
        [data]
        path = "a.csv"
        transaction = "id"
        user = "u"
        time = "t"
        time_unit = "ms"
        label = "y"
        label_delay = "12h"
        label_known_at = "k"
        amount = "x"
        [features]
        numeric = ["x", "z"]
        categorical = ["c"]
        context = ["m"]
        geo = [["lat", "long"], ["a", "b"]]
        ip = ["address"]
        half_lives = ["90m", "1.5d"]
        habit_half_life = "30d"
        context_inputs = ["run", "ratio"]
        [cleaning]
        bad_row = "error"
        most_dropped = 0
        [split]
        train_start = 2018-04-01
        validation = "2d"
        train_end = "2018-08-01T12:00:00+02:00"
        test_start = 2018-08-08T00:00:00Z
        test_end = 2018-08-15T01:00:00
        [training]
        learning_rate = 1
        positive_weight = "balanced"
        mixed_precision = false
        [serve]
        window = 8
        """,
        "conf.toml",
    )
    assert config.data == DataConfig(
        path="a.csv", transaction="id", user="u", time="t", time_unit="ms", label="y",
        label_delay=12 * HOUR_MS, label_known_at="k", amount="x",
    )  # type: ignore[arg-type]  # fmt: skip
    assert config.features == FeaturesConfig(
        numeric=("x", "z"), categorical=("c",), context=("m",), geo=(("lat", "long"), ("a", "b")), ip=("address",),
        half_lives=(90 * 60_000, 36 * HOUR_MS), habit_half_life=30 * DAY_MS, context_inputs=("run", "ratio"),
    )  # type: ignore[arg-type]  # fmt: skip
    assert config.cleaning == CleaningConfig(bad_row="error", most_dropped=0.0)
    assert config.split == SplitConfig(
        train_start=1_522_540_800_000, validation=2 * DAY_MS, train_end=1_533_117_600_000,
        test_start=1_533_686_400_000, test_end=1_534_294_800_000,
    )  # type: ignore[arg-type]  # fmt: skip
    assert config.training == TrainingConfig(learning_rate=1.0, positive_weight="balanced", mixed_precision=False)
    assert isinstance(config.training.learning_rate, float)
    assert config.serve == ServeConfig(window=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "[trainin]", "unknown section trainin; the nearest valid section is training"),
        (MINIMAL + "numerc = []", "unknown key features.numerc; the nearest valid key is features.numeric"),
        (MINIMAL + "[serve]\nwindows = 3", "unknown key serve.windows; the nearest valid key is serve.window"),
        # however far off, there is a nearest one
        (MINIMAL + "[model]\nzzz = 3", "unknown key model.zzz; the nearest valid key is model."),
        ("colour = 1\n" + MINIMAL, "unknown section colour; the nearest valid section is "),
        ("[features]\nnumeric = ['x']", "the section data is missing"),
        ("[data]\nuser = 'u'", "the key data.time is missing"),
        (MINIMAL + "[split]\nvalidation = '1d'", "the key split.train_end is missing"),
        ("data = 3", "data: expected a section, got 3"),
        ("[data", "not valid TOML: "),
        (MINIMAL + "[data]", "not valid TOML: "),
    ],
)
def test_unknown_missing_and_malformed(text: str, message: str) -> None:
    assert refused(text).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nuser = 5", "data.user: expected a string, got 5"),
        ("[data]\nlabel = true", "data.label: expected a string, got True"),
        ("[data]\ntime_unit = 'minutes'", "data.time_unit: 'minutes' is not one of 'iso', 's', 'ms'"),
        ("[data]\ntime_unit = ['s']", "data.time_unit: ['s'] is not one of 'iso', 's', 'ms'"),
        ("[data]\nlabel_delay = 7", 'data.label_delay: expected a duration such as "7d", got 7'),
        (
            "[data]\nlabel_delay = '7 days'",
            "data.label_delay: '7 days' is not a duration; expected a number and a unit",
        ),
        ("[features]\nnumeric = 'x'", "features.numeric: expected a list, got 'x'"),
        ("[features]\nnumeric = ['x', 2]", "features.numeric: expected a string, got 2"),
        ("[features]\ngeo = ['lat', 'long']", "features.geo: expected a list, got 'lat'"),
        ("[features]\ngeo = [['lat']]", "features.geo: expected a list of 2, got ['lat']"),
        ("[features]\nhalf_lives = ['1d', 'x']", "features.half_lives: 'x' is not a duration"),
        ("[features]\nbins = 1.5", "features.bins: expected a whole number, got 1.5"),
        ("[features]\nbins = true", "features.bins: expected a whole number, got True"),
        ("[training]\nclip = '1'", "training.clip: expected a number, got '1'"),
        ("[training]\nclip = false", "training.clip: expected a number, got False"),
        ("[training]\nmixed_precision = 1", "training.mixed_precision: expected true or false, got 1"),
        (
            "[training]\npositive_weight = 'cube'",
            "training.positive_weight: expected a number, got 'cube' and 'cube' is not one of 'balanced', 'sqrt'",
        ),
        ("[split]\ntrain_end = 5", 'split.train_end: expected a date such as "2018-04-01", got 5'),
        ("[split]\ntrain_end = 12:00:00", 'split.train_end: expected a date such as "2018-04-01", got '),
        ("[split]\ntrain_end = 'May'", "split.train_end: 'May' is not an ISO 8601 date or time"),
    ],
)
def test_wrong_types_name_the_key_and_the_value(text: str, message: str) -> None:
    assert refused(text).startswith(message)


def changed(section: str, key: str, value: str) -> str:
    """The minimal configuration with one more key."""
    return MINIMAL + f"{key} = {value}" if section == "features" else MINIMAL + f"[{section}]\n{key} = {value}"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("features", "bins"), ("features", "min_count"), ("model", "hidden"), ("model", "members"), ("model", "layers"),
        ("model", "input_width"), ("model", "head_width"), ("model", "embedding"), ("training", "epochs"),
        ("training", "patience"), ("training", "users_per_batch"), ("training", "events_per_chunk"),
        ("training", "learning_rate"), ("training", "clip"), ("serve", "window"), ("serve", "max_batch"),
    ],
)  # fmt: skip
def test_sizes_are_positive(section: str, key: str) -> None:
    parse_config(changed(section, key, "1"), "conf.toml")
    assert refused(changed(section, key, "0")).startswith(f"{section}.{key}: expected more than 0, got 0")
    assert refused(changed(section, key, "-3")).startswith(f"{section}.{key}: expected more than 0, got -3")


def test_a_learning_rate_that_is_no_number() -> None:
    assert (
        refused(changed("training", "learning_rate", "nan")) == "training.learning_rate: expected more than 0, got nan"
    )


@pytest.mark.parametrize(
    ("section", "key", "good", "bad", "expected"),
    [
        ("training", "dropout", ("0", "0.99"), ("-0.1", "1", "nan"), "expected 0 to below 1"),
        ("training", "weight_decay", ("0",), ("-0.1", "nan"), "expected 0 or more"),
        ("training", "positive_weight", ("0.1", '"sqrt"'), ("0", "-2", "nan"), "expected more than 0"),
        ("cleaning", "most_dropped", ("0", "1"), ("-0.1", "1.01"), "expected 0 to 1"),
        ("decision", "alert_share", ("0.001", "1"), ("0", "1.01", "-1"), "expected above 0 to 1"),
        ("decision", "decline_precision", ("0.5", "1"), ("0", "90"), "expected above 0 to 1"),
        ("decision", "control_share", ("0", "0.05"), ("0.06", "-0.1", "nan"), "expected 0 to 0.05"),
        ("decision", "review", ("0.5", "1"), ("0", "30", "nan"), "expected above 0 to 1"),
        ("decision", "decline", ("0.5", "1"), ("0", "90", "nan"), "expected above 0 to 1"),
        ("decision", "review_cost", ("0", "4.5"), ("-1", "nan", "inf"), "expected an amount of money, 0 to 1e12"),
        ("decision", "fraud_share", ("0.5", "1.2"), ("-1", "nan"), "expected a share of the amount, 0 to 1000"),
        ("decision", "review_catches", ("0.5", "1"), ("0", "1.1", "nan"), "expected above 0 to 1"),
    ],
)
def test_ranges(section: str, key: str, good: tuple[str, ...], bad: tuple[str, ...], expected: str) -> None:
    for value in good:
        parse_config(changed(section, key, value), "conf.toml")
    for value in bad:
        assert refused(changed(section, key, value)).startswith(f"{section}.{key}: {expected}, got ")


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        ("by = 'luck'", "decision.by: 'luck' is not one of 'thresholds', 'budget', 'cost'"),
        ("review = 0.5\nalert_share = 0.1", "decision.review: given together with decision.alert_share; expected one"),
        ("decline = 0.5\ndecline_precision = 0.9", "decision.decline: given together with decision.decline_precision"),
        ("review = 0.9\ndecline = 0.5", "decision.review: expected at most decision.decline, which is 0.5, got 0.9"),
        ("rank = 'money'", 'decision.rank: has no effect with by = "thresholds"; it belongs to by = "budget"'),
        ("by = 'budget'", 'decision.alerts_per_day: missing; by = "budget" needs it'),
        ("by = 'budget'\nalerts_per_day = 0", "decision.alerts_per_day: expected more than 0, got 0.0"),
        (
            "by = 'budget'\nalerts_per_day = 10\ndeclines_per_day = 11",
            "decision.declines_per_day: expected at most decision.alerts_per_day, which is 10.0",
        ),
        (
            "by = 'budget'\nalerts_per_day = 10\nreview = 0.5",
            'decision.review: has no effect with by = "budget"; it belongs to by = "thresholds"',
        ),
        (
            "by = 'cost'\ndecline_precision = 0.5",
            'decision.decline_precision: has no effect with by = "cost"; it belongs to by = "thresholds" or "budget"',
        ),
        ("by = 'cost'\ninsult_cost = 2", "decision.review_cost: expected more than 0; by ="),
        ("by = 'cost'\nreview_cost = 2", "decision.insult_cost: missing, and insult_share too"),
        (
            "by = 'cost'\nreview_cost = 2\ninsult_cost = 2\nfraud_share = 0",
            "decision.fraud_share: expected more than 0",
        ),
        (
            "by = 'cost'\nreview_cost = 2\ninsult_cost = 2\nmargin = 0",
            "decision.margin: expected 0.001 to 1000, got 0.0",
        ),
    ],
)
def test_decisions_that_cannot_be_meant(decision: str, message: str) -> None:
    assert refused(MINIMAL_AMOUNT + f"[decision]\n{decision}\n").startswith(message)


@pytest.mark.parametrize(
    ("decision", "what"),
    [
        ("by = 'cost'\nreview_cost = 2\ninsult_share = 0.1", 'by = "cost"'),
        ("by = 'budget'\nalerts_per_day = 10\nrank = 'money'", 'rank = "money"'),
    ],
)
def test_deciding_by_money_needs_an_amount(decision: str, what: str) -> None:
    parse_config(MINIMAL_AMOUNT + f"[decision]\n{decision}\n", "conf.toml")
    without = MINIMAL_AMOUNT.replace("amount = 'a'\n", "") + f"[decision]\n{decision}\n"
    assert refused(without) == f"decision: {what} needs the amount of a transaction; name its column in data.amount"


def test_costs_may_be_named_whatever_decides() -> None:
    """The report counts in them."""
    decision = parse_config(MINIMAL_AMOUNT + "[decision]\nreview_cost = 3\nfraud_cost = 0\n", "c.toml").decision
    assert (decision.by, decision.review_cost, decision.insult_cost) == ("thresholds", 3.0, None)


MINIMAL_AMOUNT = "[data]\nuser = 'u'\ntime = 't'\namount = 'a'\n[features]\nnumeric = ['a']\n"
DATA = "[data]\nuser = 'u'\ntime = 't'\nlabel = 'y'\nlabel_known_at = 'k'\n"


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("", "features: no column is named; expected at least one, such as numeric"),
        ("numeric = ['x']\nhalf_lives = []", "features.half_lives: expected one or more durations above 0"),
        ("numeric = ['x']\nhalf_lives = ['1d', '0s']", "features.half_lives: expected one or more durations above 0"),
        ("numeric = ['x']\nhabit_half_life = '0d'", "features.habit_half_life: expected a duration above 0"),
        ("numeric = ['x']\nrun_memory = '0d'", "features.run_memory: expected a duration above 0"),
        (
            "context = ['m']\ncontext_inputs = []",
            "features.context_inputs: expected one or more of count, amount, ratio, fraud, honest, run",
        ),
        ("context = ['m']\ncontext_inputs = ['run', 'run']", "features.context_inputs: 'run' is listed twice"),
        (
            "context = ['m']\ncontext_inputs = ['mean']",
            "features.context_inputs: 'mean' is not one of 'count', 'amount', 'ratio', 'fraud', 'honest', 'run'",
        ),
        ("numeric = ['x', 'x']", "features.numeric and geo: 'x' is listed twice"),
        ("numeric = ['x']\ngeo = [['x', 'z']]", "features.numeric and geo: 'x' is listed twice"),
        ("geo = [['z', 'z']]", "features.numeric and geo: 'z' is listed twice"),
        ("categorical = ['c', 'd', 'c']", "features.categorical: 'c' is listed twice"),
        ("context = ['m']\nip = ['m']", "features.context and ip: 'm' is listed twice"),
        ("numeric = ['y']", "features: 'y' is data.label; the answer cannot be an input"),
        ("geo = [['a', 'y']]", "features: 'y' is data.label; the answer cannot be an input"),
        ("categorical = ['k']", "features: 'k' is data.label_known_at; the answer cannot be an input"),
        ("context = ['y']", "features: 'y' is data.label; the answer cannot be an input"),
        ("ip = ['y']", "features: 'y' is data.label; the answer cannot be an input"),
    ],
)
def test_columns_that_cannot_be_features(features: str, message: str) -> None:
    assert refused(f"{DATA}[features]\n{features}") == message


def test_one_column_may_be_category_and_context() -> None:
    config = parse_config(f"{DATA}[features]\ncategorical = ['m']\ncontext = ['m']", "conf.toml")
    assert schema_of(config).texts == ("m",)


@pytest.mark.parametrize("role", ["numeric = ['x']", "geo = [['x', 'z']]", "categorical = ['x']", "context = ['x']",
                                  "ip = ['x']"])  # fmt: skip
def test_any_one_feature_is_enough(role: str) -> None:
    parse_config(f"{DATA}[features]\n{role}", "conf.toml")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            "train_start = 2018-07-25\ntrain_end = 2018-08-01",
            "split.train_start 2018-07-25T00:00:00Z is not before the validation days, which start 2018-07-25T00:00:00Z",
        ),
        ("train_end = 2018-08-01\ntest_start = 2018-07-31T23:59:59", "split.test_start is before split.train_end"),
        (
            "train_end = 2018-08-01\ntest_start = 2018-08-08\ntest_end = 2018-08-08",
            "split.test_end is not after split.test_start",
        ),
        ("train_end = 2018-08-01\ntest_end = 2018-08-01", "split.test_end is not after split.test_start"),
    ],
)
def test_splits_out_of_order(split: str, message: str) -> None:
    assert refused(f"{MINIMAL}[split]\n{split}") == message


def test_splits_that_just_fit() -> None:
    edges = "train_start = 2018-07-24T23:59:59.999\ntrain_end = 2018-08-01\ntest_start = 2018-08-01\n"
    config = parse_config(f"{MINIMAL}[split]\n{edges}test_end = 2018-08-01T00:00:00.001", "conf.toml")
    assert config.split is not None
    assert config.split.test_end == config.split.train_end + 1


def test_one_column_has_one_role() -> None:
    for features, message in (
        ("numeric = ['x']\ncontext = ['x']", "conf: the column 'x' is used both as a number and as text; choose one"),
        ("numeric = ['t']", "conf: the column 't' is data.time and cannot be a feature too"),
        ("categorical = ['t']", "conf: the column 't' is data.time and cannot be a feature too"),
        ("context = ['id']", "conf: the column 'id' is data.transaction and cannot be a feature too"),
    ):
        config = parse_config(f"[data]\nuser='u'\ntime='t'\ntransaction='id'\n[features]\n{features}", "conf")
        with pytest.raises(ConfigError) as error:
            schema_of(config, "conf")
        assert str(error.value) == message


def test_columns_by_role() -> None:
    config = parse_config(
        """
        data = {user = "u", time = "t", transaction = "id", amount = "total"}
        [features]
        numeric = ["x"]
        geo = [["lat", "long"]]
        categorical = ["c", "m"]
        context = ["m", "u"]
        ip = ["address"]
        """,
        "conf",
    )
    schema = schema_of(config)
    assert schema.numeric_inputs == ("x", "lat", "long")
    assert schema.numbers == ("x", "lat", "long", "total")
    assert schema.texts == ("c", "m", "u", "address")
    assert schema.entities == ("m", "u", "address")
    assert schema.fields == ("id", "u", "t", "x", "lat", "long", "total", "c", "m", "address")


def as_json(value: Any) -> Any:
    return [as_json(item) for item in value] if isinstance(value, tuple) else value


def test_a_schema_survives_the_manifest() -> None:
    schema = Schema(user="u", time="t", time_unit="s", numeric=("x",), geo=(("a", "b"),), amount="x")
    plain = {key: as_json(value) for key, value in schema.as_dict().items()}
    assert Schema.from_dict(plain) == schema
    with pytest.raises(BundleError, match=r"unknown key schema\.colour"):
        Schema.from_dict(plain | {"colour": 1})


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("250ms", 250), ("45s", 45_000), ("30m", 1_800_000), ("12h", 43_200_000), ("7d", 604_800_000),
        ("2w", 1_209_600_000), ("1.5h", 5_400_000), (" 3 d ", 259_200_000), ("0d", 0), ("0.1ms", 0),
    ],
)  # fmt: skip
def test_durations(text: str, ms: int) -> None:
    assert parse_duration(text) == ms


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1e3d", "7D", "7 days", "1y", "1d 2h", ".5d", "inf d"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; expected a number and a unit"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("1970-01-01", 0),
        ("2018-04-01", 1_522_540_800_000),
        ("2018-04-01T10:30", 1_522_578_600_000),
        ("2018-04-01 10:30:00.25", 1_522_578_600_250),
        ("2018-04-01T10:30:00Z", 1_522_578_600_000),
        ("2018-04-01T10:30:00+02:00", 1_522_571_400_000),
        ("2018-04-01T10:30:00-0530", 1_522_598_400_000),
        ("1969-12-31T23:59:59.9999", -1),
        ("0001-01-01", -62_135_596_800_000),
    ],
)
def test_instants(text: str, ms: int) -> None:
    assert parse_instant(text) == ms


@pytest.mark.parametrize("text", ["", "yesterday", "2018-13-01", "2018-02-30", "1522540800", "10:30"])
def test_no_instants(text: str) -> None:
    with pytest.raises(ValueError, match="is not an ISO 8601 date or time"):
        parse_instant(text)


@given(st.integers(-62_135_596_800_000, 253_402_300_799_999))
def test_instants_are_spelled_so_that_they_are_read_back(ms: int) -> None:
    """Years before 1000 were spelled with fewer than four digits, which nothing reads."""
    assert parse_instant(format_instant(ms)) == ms


def test_spelled_instants() -> None:
    assert format_instant(1_522_578_600_000) == "2018-04-01T10:30:00Z"
    assert format_instant(1_522_578_600_007) == "2018-04-01T10:30:00.007Z"
    assert format_instant(-1) == "1969-12-31T23:59:59.999Z"
    assert format_instant(-62_135_596_800_000) == "0001-01-01T00:00:00Z"


def test_load_config(tmp_path: Path) -> None:
    path = tmp_path / "conf.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    assert load_config(path) == parse_config(MINIMAL, "x")
    assert math.isclose(load_config(path).training.learning_rate, 3e-3)

    path.write_text(MINIMAL + "nme = 1")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: unknown key features.nme; the nearest valid key is features.")

    path.write_bytes(b'[data]\nuser = "\xff"')
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: not UTF-8 text"

    for absent, word in ((tmp_path / "no.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as error:
            load_config(absent)
        assert str(error.value).startswith(f"{absent}: cannot be read: {word}")


# ---- identifiers

IDENTIFIERS = (
    MINIMAL
    + """
categorical = ["kind"]
context = ["merchant"]
[identifiers]
"""
)


def test_a_policy_per_column() -> None:
    assert parse_config(MINIMAL, "conf.toml").identifiers == IdentifiersConfig("cards", {})
    config = parse_config(IDENTIFIERS + 'default = "keep"\ncolumns = { u = "hash", "kind" = "cards" }', "conf.toml")
    assert config.identifiers == IdentifiersConfig("keep", {"u": "hash", "kind": "cards"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('default = "all"', "identifiers.default: 'all' is not one of 'cards', 'hash', 'keep'"),
        ('columns = { u = "all" }', "identifiers.columns.u: 'all' is not one of 'cards', 'hash', 'keep'"),
        ("columns = { u = true }", "identifiers.columns.u: True is not one of 'cards', 'hash', 'keep'"),
        ('columns = ["u"]', "identifiers.columns: expected a table, such as { COLUMN = ... }, got ['u']"),
        (
            'columns = { merchants = "hash" }',
            "identifiers.columns: 'merchants' is no column of users, ids, entities or categories; "
            "the nearest is 'merchant'",
        ),
        ('columns = { x = "hash" }', "identifiers.columns: 'x' is no column of users, ids, entities or categories; "),
        ('columns = { kind = "hash" }', "identifiers: 'kind' cannot be \"hash\": it is categorical, and the values of"),
    ],
)
def test_a_policy_that_cannot_be(text: str, message: str) -> None:
    assert refused(IDENTIFIERS + text).startswith(message)


def test_a_user_that_is_categorical_is_not_hashed_by_default_either() -> None:
    """Its values would stand in the bundle all the same."""
    text = MINIMAL + 'categorical = ["u"]\n[identifiers]\ndefault = "hash"\n'
    assert refused(text).startswith("identifiers: 'u' cannot be \"hash\"")
    parse_config(text + 'columns = { u = "cards" }', "conf.toml")
