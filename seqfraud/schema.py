"""Which column of a transaction is what: the part of a configuration that travels inside the bundle."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from seqfraud.config import Config, TimeUnit, from_plain
from seqfraud.errors import BundleError, ConfigError


@dataclass(frozen=True)
class Schema:
    """The declared columns of a transaction by role.

    F = len(numeric_inputs), C = len(categorical), E = len(entities).
    """

    user: str
    time: str
    time_unit: TimeUnit = "iso"
    transaction: str | None = None
    amount: str | None = None
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    ip: tuple[str, ...] = ()
    geo: tuple[tuple[str, str], ...] = ()

    @property
    def numeric_inputs(self) -> tuple[str, ...]:
        """The F columns of the graph's `numeric` input: numbers first, then latitude and longitude of each place."""
        return (*self.numeric, *(column for pair in self.geo for column in pair))

    @property
    def numbers(self) -> tuple[str, ...]:
        """Every column that holds a number: the numeric inputs and, if it is not one of them, the amount."""
        extra = () if self.amount is None or self.amount in self.numeric_inputs else (self.amount,)
        return (*self.numeric_inputs, *extra)

    @property
    def entities(self) -> tuple[str, ...]:
        """The E columns whose values have a context: as they are, then networks of IP addresses."""
        return (*self.context, *self.ip)

    @property
    def user_entity(self) -> int | None:
        """Which of the entities is the user; None: none is."""
        return self.context.index(self.user) if self.user in self.context else None

    @property
    def texts(self) -> tuple[str, ...]:
        """Every column, other than user and id, that is compared as text; each once."""
        return tuple(dict.fromkeys((*self.categorical, *self.context, *self.ip)))

    @property
    def fields(self) -> tuple[str, ...]:
        """Every declared column, each once."""
        first = () if self.transaction is None else (self.transaction,)
        return tuple(dict.fromkeys((*first, self.user, self.time, *self.numbers, *self.texts)))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> "Schema":
        """The schema of a manifest. Raises BundleError."""
        try:
            return from_plain(Schema, {k: v for k, v in raw.items() if v is not None}, "manifest", "schema.")
        except ConfigError as error:
            raise BundleError(str(error)) from error


def schema_of(config: Config, source: str = "configuration") -> Schema:
    """The schema that a configuration declares. Raises ConfigError where one column has two incompatible roles."""
    data, features = config.data, config.features
    schema = Schema(
        user=data.user,
        time=data.time,
        time_unit=data.time_unit,
        transaction=data.transaction,
        amount=data.amount,
        numeric=features.numeric,
        categorical=features.categorical,
        context=features.context,
        ip=features.ip,
        geo=features.geo,
    )
    both = set(schema.numbers) & set(schema.texts)
    if both:
        raise ConfigError(f"{source}: the column {min(both)!r} is used both as a number and as text; choose one")
    reserved = {data.time: "data.time", data.transaction: "data.transaction"}
    for column in (*schema.numbers, *schema.texts):
        if column in reserved:
            raise ConfigError(f"{source}: the column {column!r} is {reserved[column]} and cannot be a feature too")
    return schema
