"""The TOML configuration as frozen dataclasses, one per concern.

`load_config(path)` is the only reader. An unknown key is an error that names the file, the key and the nearest valid
one; a wrong type names the key, the value seen and what is expected. Times become int64 milliseconds since the epoch
(UTC), durations int milliseconds.
"""

import dataclasses
import difflib
import re
import tomllib
import typing
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union

from seqfraud.errors import ConfigError

SECOND_MS = 1000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
WEEK_MS = 7 * DAY_MS
HABIT_HALF_LIFE = 90 * DAY_MS
MOST_CONTROL = 0.05
"""Of what is declined, let through at random: more would be a way to pay."""

TimeUnit = Literal["iso", "s", "ms"]

ContextInput = Literal["count", "amount", "ratio", "fraud", "honest", "run"]
"""What can be read of an entity: its decayed sums, the ratio of the amount to its habit, its run of known frauds."""
CONTEXT_INPUTS: tuple[ContextInput, ...] = typing.get_args(ContextInput)

Treatment = Literal["cards", "hash", "keep"]
"""What becomes of an identifier before it is stored: hashed where it looks like a card number, always, never."""

_UNITS = {"ms": 1, "s": SECOND_MS, "m": MINUTE_MS, "h": HOUR_MS, "d": DAY_MS, "w": WEEK_MS}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\s*")


def parse_duration(text: str) -> int:
    """Milliseconds of a duration such as "7d", "12h", "30m", "45s", "2w". Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is not a duration; expected a number and a unit, such as "7d" or "12h"')
    return round(float(match[1]) * _UNITS[match[2]])


def duration_words(ms: float) -> str:
    """A duration for people, rounded, in the largest unit that fits twice."""
    for unit, size in (("d", DAY_MS), ("h", HOUR_MS), ("min", MINUTE_MS)):
        if ms >= 2 * size:
            return f"{ms / size:.0f} {unit}"
    return f"{ms / SECOND_MS:.0f} s"


def parse_instant(text: str) -> int:
    """Milliseconds since the epoch of an ISO 8601 date or time; without a zone it is UTC. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f'{text!r} is not an ISO 8601 date or time, such as "2018-04-01"') from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return instant_ms(moment)


def instant_ms(moment: datetime) -> int:
    """Whole milliseconds since the epoch of an aware datetime, rounded down."""
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000


def format_instant(ms: int) -> str:
    """ISO 8601 text in UTC of milliseconds since the epoch."""
    whole, part = divmod(ms, 1000)
    text = datetime.fromtimestamp(whole, UTC).replace(tzinfo=None).isoformat()  # strftime would say year 1, not 0001
    return f"{text}.{part:03d}Z" if part else f"{text}Z"


class Duration(int):
    """A configuration value written as "7d"; an int of milliseconds."""


class Instant(int):
    """A configuration value written as an ISO date or time; an int of milliseconds since the epoch."""


@dataclass(frozen=True)
class DataConfig:
    """Where the transactions are and which column is what."""

    user: str
    time: str
    path: str = ""
    transaction: str | None = None
    time_unit: TimeUnit = "iso"
    label: str | None = None
    label_delay: Duration = Duration(7 * DAY_MS)
    label_known_at: str | None = None
    amount: str | None = None


@dataclass(frozen=True)
class CleaningConfig:
    """What becomes of rows that cannot be used as they are; "error" refuses the file."""

    bad_row: Literal["drop", "error"] = "drop"
    """No user, no id, no time or an unreadable one."""
    bad_number: Literal["missing", "drop", "error"] = "missing"
    """Text where a number should be, infinite, or beyond what float32 holds. The service refuses such transactions
    whatever is said here: who sends one can mend it."""
    missing_number: Literal["keep", "drop", "error"] = "keep"
    """With "drop" or "error" the service refuses such transactions too, else where training saw none missing."""
    negative_amount: Literal["keep", "drop", "error"] = "keep"
    """With "drop" or "error" the service refuses such transactions too."""
    bad_label: Literal["unknown", "drop", "error"] = "unknown"
    """Neither 0 nor 1, or with an unreadable time of knowing."""
    repeated: Literal["drop", "error"] = "drop"
    """A later row with the id of an earlier one."""
    most_dropped: float = 0.1
    """More than this share of dropped rows is an error: the configuration is more likely wrong than the data."""


@dataclass(frozen=True)
class FeaturesConfig:
    """Which columns reach the model, and as what."""

    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    geo: tuple[tuple[str, str], ...] = ()
    ip: tuple[str, ...] = ()
    half_lives: tuple[Duration, ...] = (
        Duration(HOUR_MS),
        Duration(DAY_MS),
        Duration(7 * DAY_MS),
        Duration(30 * DAY_MS),
    )
    habit_half_life: Duration = Duration(HABIT_HALF_LIFE)
    """Of an entity's mean amount, with which the amount at hand is compared."""
    run_memory: Duration = Duration(60 * DAY_MS)
    """How long an entity's last known fraud is remembered after it could be known."""
    context_inputs: tuple[ContextInput, ...] = CONTEXT_INPUTS
    """What reaches the model of each entity; everything is kept all the same."""
    user_inputs: tuple[ContextInput, ...] = ("ratio", "fraud", "run")
    """The same of the user, where the user's column is a context: its counts are what the sequence says already."""
    min_count: int = 5
    """A category seen in fewer training rows gets the id of the unseen ones."""
    bins: int = 12
    """Quantile bins per number for the piecewise-linear encoding."""
    steps: int = 0
    """Steps at most per number, where the share of frauds changes in the training rows; whether they help is a choice
    for the validation days, for few frauds may be learned by heart."""


@dataclass(frozen=True)
class SplitConfig:
    """Time split. `validation` is the last part of the time before `train_end`."""

    train_end: Instant
    train_start: Instant | None = None
    validation: Duration = Duration(7 * DAY_MS)
    test_start: Instant | None = None
    test_end: Instant | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network."""

    hidden: int = 64
    layers: int = 1
    input_width: int = 64
    head_width: int = 64
    embedding: int = 8
    forecast: bool = True
    """Whether the state also forecasts the user's next numbers; the head is told how far off it was."""
    members: int = 1
    """Networks that are fitted side by side, each from its own draw; the model's logit is the mean of theirs."""


@dataclass(frozen=True)
class TrainingConfig:
    """How the network is fitted."""

    epochs: int = 8
    patience: int = 3
    users_per_batch: int = 32
    events_per_chunk: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    clip: float = 1.0
    dropout: float = 0.0
    positive_weight: float | Literal["balanced", "sqrt"] = 1.0
    """Weight of a fraud in the loss: a number, "balanced" (honest / fraud) or "sqrt" of that."""
    seed: int = 0
    forecast_weight: float = 0.1
    """Weight of the forecast's loss, which every event has, beside that of the labels."""
    mixed_precision: bool = True


@dataclass(frozen=True)
class CalibrationConfig:
    """How logits become probabilities, fitted on the validation days."""

    method: Literal["platt", "none"] = "platt"


@dataclass(frozen=True)
class DecisionConfig:
    """How probabilities and amounts become decisions; what is left open is chosen on the validation days.

    Amounts and costs are in the unit of `data.amount`.
    """

    by: Literal["thresholds", "budget", "cost"] = "thresholds"
    alert_share: float | None = None
    """Share of transactions to review or decline; with `review` left out too: the threshold with the best F1."""
    review: float | None = None
    """Review from this probability on."""
    decline: float | None = None
    """Decline from this probability on."""
    decline_precision: float | None = None
    """Decline where at least this share is fraud; 0.9 where nothing else says what is declined."""
    alerts_per_day: float | None = None
    """Transactions to review or decline, on average over the days."""
    declines_per_day: float | None = None
    """So many of them are declined."""
    rank: Literal["probability", "money"] | None = None
    """What the budget goes to: the highest probabilities, or the highest probability x amount; left out: whichever has
    more fraud money in its alerts on the validation days."""
    review_cost: float | None = None
    """Of looking at one transaction."""
    insult_cost: float | None = None
    """Of declining an honest one, and in addition"""
    insult_share: float | None = None
    """this share of its amount."""
    fraud_cost: float | None = None
    """Of a fraud that goes through, such as the fee of a chargeback (0), and in addition"""
    fraud_share: float | None = None
    """this share of its amount (1)."""
    review_catches: float | None = None
    """Share of the frauds that a review recognises (1)."""
    margin: float | None = None
    """An alert has to promise so many times what it costs; left out: 1, unless the validation days say otherwise."""
    control_share: float = 0.0
    """Share of what the policy declines that is let through at random, so that its truth becomes known."""


@dataclass(frozen=True)
class IdentifiersConfig:
    """What the service stores of users, entities and other texts; `seqfraud.identifiers` says how."""

    default: Treatment = "cards"
    """For every column of texts but the transaction id, which is kept."""
    columns: dict[str, Treatment] = field(default_factory=dict)
    """For single columns, the transaction id included."""


@dataclass(frozen=True)
class ServeConfig:
    """Defaults of the service for bundles of this configuration."""

    window: int = 32
    """W: at least this many recent events per user are kept, at most twice as many."""
    max_batch: int = 1000


@dataclass(frozen=True)
class Config:
    """A whole configuration file."""

    data: DataConfig
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    split: SplitConfig | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    identifiers: IdentifiersConfig = field(default_factory=IdentifiersConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


T = TypeVar("T")


def load_config(path: Path) -> Config:
    """Read and check a configuration file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    return parse_config(text, source=str(path))


def parse_config(text: str, source: str) -> Config:
    """Check a configuration given as TOML text; `source` is what messages call it. Raises ConfigError."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from error
    config = from_plain(Config, raw, source)
    _check(config, source)
    return config


def from_plain(cls: type[T], raw: dict[str, Any], source: str, prefix: str = "") -> T:
    """Build a dataclass from plain data; every unknown key or wrong type is a ConfigError that names it."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            kind = "key" if prefix else "section"
            hint = f"; the nearest valid {kind} is {prefix}{near[0]}" if near else ""
            raise ConfigError(f"{source}: unknown {kind} {name}{hint}")
        values[key] = _convert(hints[key], value, source, name)
    for key, spec in known.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and key not in values:
            kind = "key" if prefix else "section"
            raise ConfigError(f"{source}: the {kind} {prefix}{key} is missing")
    return cls(**values)


def _convert(hint: Any, value: Any, source: str, name: str) -> Any:
    """`value` as the annotated type, or a ConfigError."""
    try:
        return _cast(hint, value, source, name)
    except ValueError as error:
        raise ConfigError(f"{source}: {name}: {error}") from None


def _cast(hint: Any, value: Any, source: str, name: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (Union, UnionType):
        return _cast_union(typing.get_args(hint), value, source, name)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value in allowed and isinstance(value, str):
            return value
        raise ValueError(f"{value!r} is not one of {', '.join(repr(a) for a in allowed)}")
    if origin is dict:
        return _cast_mapping(typing.get_args(hint)[1], value, source, name)
    if origin is tuple:
        return _cast_tuple(typing.get_args(hint), value, source, name)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"expected a section, got {value!r}")
        return from_plain(typing.cast(type[Any], hint), value, source, f"{name}.")
    return _cast_scalar(hint, value)


def _cast_union(options: tuple[Any, ...], value: Any, source: str, name: str) -> Any:
    problems = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _cast(option, value, source, name)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(" and ".join(problems))


def _cast_tuple(inner: tuple[Any, ...], value: Any, source: str, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {value!r}")
    if inner[-1] is Ellipsis:
        return tuple(_cast(inner[0], item, source, name) for item in value)
    if len(value) != len(inner):
        raise ValueError(f"expected a list of {len(inner)}, got {value!r}")
    return tuple(_cast(hint, item, source, name) for hint, item in zip(inner, value, strict=True))


def _cast_mapping(inner: Any, value: Any, source: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a table, such as {{ COLUMN = ... }}, got {value!r}")
    return {key: _convert(inner, item, source, f"{name}.{key}") for key, item in value.items()}


def _cast_scalar(hint: Any, value: Any) -> Any:
    if hint is Duration:
        if isinstance(value, str):
            return Duration(parse_duration(value))
        raise ValueError(f'expected a duration such as "7d", got {value!r}')
    if hint is Instant:
        if isinstance(value, date):  # TOML has dates of its own; datetime is a date too
            value = value.isoformat()
        if isinstance(value, str):
            return Instant(parse_instant(value))
        raise ValueError(f'expected a date such as "2018-04-01", got {value!r}')
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    words = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    raise ValueError(f"expected {words[hint]}, got {value!r}")


def _check(config: Config, source: str) -> None:
    """What types alone cannot say."""
    features, split = config.features, config.split
    positive = {
        "features.bins": features.bins,
        "features.min_count": features.min_count,
        "model.hidden": config.model.hidden,
        "model.members": config.model.members,
        "model.layers": config.model.layers,
        "model.input_width": config.model.input_width,
        "model.head_width": config.model.head_width,
        "model.embedding": config.model.embedding,
        "training.epochs": config.training.epochs,
        "training.patience": config.training.patience,
        "training.users_per_batch": config.training.users_per_batch,
        "training.events_per_chunk": config.training.events_per_chunk,
        "training.learning_rate": config.training.learning_rate,
        "training.clip": config.training.clip,
        "serve.window": config.serve.window,
        "serve.max_batch": config.serve.max_batch,
    }
    if features.steps < 0:
        raise ConfigError(f"{source}: features.steps: expected 0 or more, got {features.steps}")
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{source}: {name}: expected more than 0, got {value}")
    if not 0 <= config.cleaning.most_dropped <= 1:
        raise ConfigError(f"{source}: cleaning.most_dropped: expected 0 to 1, got {config.cleaning.most_dropped}")
    _check_decision(config, source)
    weight = config.training.positive_weight
    if isinstance(weight, float) and not weight > 0:
        raise ConfigError(f"{source}: training.positive_weight: expected more than 0, got {weight}")
    for name in ("weight_decay", "forecast_weight"):
        if not (number := getattr(config.training, name)) >= 0:
            raise ConfigError(f"{source}: training.{name}: expected 0 or more, got {number}")
    if not 0 <= config.training.dropout < 1:
        raise ConfigError(f"{source}: training.dropout: expected 0 to below 1, got {config.training.dropout}")
    if any(h <= 0 for h in features.half_lives) or not features.half_lives:
        raise ConfigError(f"{source}: features.half_lives: expected one or more durations above 0")
    if features.habit_half_life <= 0:
        raise ConfigError(f"{source}: features.habit_half_life: expected a duration above 0")
    if features.run_memory <= 0:
        raise ConfigError(f"{source}: features.run_memory: expected a duration above 0")
    for name in ("context_inputs", "user_inputs"):
        if not getattr(features, name):
            raise ConfigError(f"{source}: features.{name}: expected one or more of {', '.join(CONTEXT_INPUTS)}")
    columns = (*features.numeric, *(c for pair in features.geo for c in pair))
    if not (columns or features.categorical or features.context or features.ip):
        raise ConfigError(f"{source}: features: no column is named; expected at least one, such as numeric")
    for name, used in (("numeric and geo", columns), ("categorical", features.categorical),
                       ("context and ip", (*features.context, *features.ip)),
                       ("context_inputs", features.context_inputs), ("user_inputs", features.user_inputs)):  # fmt: skip
        twice = sorted({c for c in used if used.count(c) > 1})
        if twice:
            raise ConfigError(f"{source}: features.{name}: {twice[0]!r} is listed twice")
    for key, label in (("label", config.data.label), ("label_known_at", config.data.label_known_at)):
        everywhere = (*columns, *features.categorical, *features.context, *features.ip)
        if label is not None and label in everywhere:
            raise ConfigError(f"{source}: features: {label!r} is data.{key}; the answer cannot be an input")
    _check_identifiers(config, source)
    if split is not None:
        validation_start = split.train_end - split.validation
        if split.train_start is not None and split.train_start >= validation_start:
            raise ConfigError(
                f"{source}: split.train_start {format_instant(split.train_start)} is not before the validation days, "
                f"which start {format_instant(validation_start)}"
            )
        if split.test_start is not None and split.test_start < split.train_end:
            raise ConfigError(f"{source}: split.test_start is before split.train_end")
        if split.test_end is not None and split.test_end <= (split.test_start or split.train_end):
            raise ConfigError(f"{source}: split.test_end is not after split.test_start")


_DECIDING = {
    "alert_share": ("thresholds",),
    "review": ("thresholds",),
    "decline": ("thresholds", "budget"),
    "decline_precision": ("thresholds", "budget"),
    "alerts_per_day": ("budget",),
    "declines_per_day": ("budget",),
    "rank": ("budget",),
    "margin": ("cost",),
}
"""Which keys of [decision] belong to which `by`. Costs are for all: where they do not decide, the report counts in them."""
_ONE_OF = (("review", "alert_share"), ("decline", "decline_precision", "declines_per_day"))


def _check_decision(config: Config, source: str) -> None:
    decision = config.decision
    given = {f.name: value for f in fields(decision) if (value := getattr(decision, f.name)) is not None}

    def refuse(name: str, problem: str) -> typing.NoReturn:
        raise ConfigError(f"{source}: decision.{name}: {problem}")

    for name, value in given.items():
        if name in ("alert_share", "review", "decline", "decline_precision") and not 0 < value <= 1:
            refuse(name, f"expected above 0 to 1, got {value}")
        if name in ("alerts_per_day", "declines_per_day") and not 0 < value < 1e12:
            refuse(name, f"expected more than 0, got {value}")
        if name in ("review_cost", "insult_cost", "fraud_cost") and not 0 <= value <= 1e12:
            refuse(name, f"expected an amount of money, 0 to 1e12, got {value}")
        if name in ("insult_share", "fraud_share") and not 0 <= value <= 1000:
            refuse(name, f"expected a share of the amount, 0 to 1000, got {value}")
        if name == "review_catches" and not 0 < value <= 1:
            refuse(name, f"expected above 0 to 1, got {value}")
        if name == "control_share" and not 0 <= value <= MOST_CONTROL:
            refuse(name, f"expected 0 to {MOST_CONTROL}, got {value}")
        if name == "margin" and not 0.001 <= value <= 1000:
            refuse(name, f"expected 0.001 to 1000, got {value}")
        if decision.by not in _DECIDING.get(name, (decision.by,)):
            where = " or ".join(f'"{by}"' for by in _DECIDING[name])
            refuse(name, f'has no effect with by = "{decision.by}"; it belongs to by = {where}')
    for names in _ONE_OF:
        if len(both := [name for name in names if name in given]) > 1:
            refuse(both[0], f"given together with decision.{both[1]}; expected one of them")
    if decision.review is not None and decision.decline is not None and decision.review > decision.decline:
        refuse("review", f"expected at most decision.decline, which is {decision.decline}, got {decision.review}")
    if decision.by == "budget":
        if decision.alerts_per_day is None:
            refuse("alerts_per_day", 'missing; by = "budget" needs it')
        if decision.declines_per_day is not None and decision.declines_per_day > decision.alerts_per_day:
            refuse("declines_per_day", f"expected at most decision.alerts_per_day, which is {decision.alerts_per_day}")
    if config.data.amount is None and (decision.by == "cost" or decision.rank == "money"):
        what = 'by = "cost"' if decision.by == "cost" else 'rank = "money"'
        raise ConfigError(
            f"{source}: decision: {what} needs the amount of a transaction; name its column in data.amount"
        )
    if decision.by == "cost":
        if not decision.review_cost:
            refuse("review_cost", 'expected more than 0; by = "cost" needs it')
        if not decision.insult_cost and not decision.insult_share:
            refuse("insult_cost", 'missing, and insult_share too; by = "cost" needs one of them above 0')
        if decision.fraud_cost in (None, 0) and decision.fraud_share == 0:
            refuse("fraud_share", "expected more than 0 where fraud_cost is not: then no fraud would cost anything")


def _check_identifiers(config: Config, source: str) -> None:
    data, features, policy = config.data, config.features, config.identifiers
    texts = (data.user, data.transaction, *features.categorical, *features.context, *features.ip)
    known = dict.fromkeys(column for column in texts if column is not None)
    for column in policy.columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1, cutoff=0.0)
            raise ConfigError(
                f"{source}: identifiers.columns: {column!r} is no column of users, ids, entities or categories; "
                f"the nearest is {near[0]!r}"
            )
    everything = {column for column, treatment in policy.columns.items() if treatment == "hash"}
    if policy.default == "hash" and data.user not in policy.columns:
        everything.add(data.user)
    in_bundle = sorted(everything & set(features.categorical))
    if in_bundle:
        raise ConfigError(
            f'{source}: identifiers: {in_bundle[0]!r} cannot be "hash": it is categorical, and the values of such a '
            'column are in the bundle as they are; take it out of features.categorical, or say "cards" or "keep"'
        )
