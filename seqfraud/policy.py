"""What follows from a probability: approve, review or decline, and whether it counts as fraud.

Thresholds are chosen once, on validation rows, and travel in the bundle's manifest; the service and
bulk scoring apply them with the same comparison in float64.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqfraud.errors import BundleError, ConfigError, DataError
from seqfraud.metrics import Floats, Mask, as_labels, as_probabilities

Decision = Literal["approve", "review", "decline"]

DECISIONS: tuple[Decision, ...] = ("approve", "review", "decline")
"""The decisions by their code in `decide_many`, from mild to strict."""

NEVER = 1.01
"""A threshold that no probability reaches; a plain number, so that JSON can hold it."""


@dataclass(frozen=True)
class Thresholds:
    """A probability at or above a threshold has its consequence; each is 0..1 or NEVER.

    `is_fraud` is the yes or no of an answer, independent of the decision; `review` <= `decline`.
    """

    is_fraud: float
    review: float
    decline: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BundleError(f"thresholds.{name}: seen {value!r}; expected a number")
            if not (0 <= value <= 1 or value == NEVER):
                raise BundleError(f"thresholds.{name}: seen {value!r}; expected 0..1, or {NEVER} for never")
        if self.review > self.decline:
            raise BundleError(
                f"thresholds.review: seen {self.review!r}; expected at most thresholds.decline, "
                f"which is {self.decline!r}"
            )

    def as_dict(self) -> dict[str, float]:
        """The thresholds by name, as the manifest holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Thresholds":
        """The inverse of `as_dict`; a missing, unknown or impossible entry is a BundleError."""
        if not isinstance(values, Mapping):
            raise BundleError(f"thresholds: seen {values!r}; expected an object with three numbers")
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1, cutoff=0)[0]
                raise BundleError(f"thresholds.{name}: unknown; the nearest valid key is {near}")
        for name in names:
            if name not in values:
                raise BundleError(f"thresholds.{name}: missing; expected a number")
        # The constructor checks the types; that a manifest may hold anything is its business.
        return cls(**values)  # type: ignore[arg-type]


def decide(probability: float, thresholds: Thresholds) -> Decision:
    """The decision on one transaction.

    A probability that is not a number goes to a person: every comparison with NaN is false, and the
    order of these leaves it at review.
    """
    # Against a float32 scalar numpy would round the threshold to float32 before it compares.
    probability = float(probability)
    if probability >= thresholds.decline:
        return "decline"
    if probability < thresholds.review:
        return "approve"
    return "review"


def decide_many(probabilities: ArrayLike, thresholds: Thresholds) -> NDArray[np.uint8]:
    """The decisions on N transactions as indices [N] into DECISIONS, each what `decide` says."""
    p = np.asarray(probabilities, dtype=np.float64)  # see `decide` for why not float32
    not_approved = ~(p < thresholds.review)
    return not_approved.astype(np.uint8) + (p >= thresholds.decline)


def flag_many(probabilities: ArrayLike, thresholds: Thresholds) -> Mask:
    """`is_fraud` of N transactions: the mask [N] of those at or above that threshold."""
    flagged: Mask = np.asarray(probabilities, dtype=np.float64) >= thresholds.is_fraud
    return flagged


@dataclass(frozen=True)
class _Cuts:
    """The D ways to cut rows between distinct probabilities, from the fewest alerts to all rows."""

    threshold: Floats
    """Where to cut so that a cut's alerts are the rows at or above it [D]."""
    alerts: NDArray[np.int64]
    """Rows at or above the cut [D]."""
    frauds: NDArray[np.int64]
    """Frauds among them [D]."""
    ends_in_fraud: Mask
    """Whether the lowest probability above the cut belongs to a fraud [D]."""


def _cuts(fraud: Mask, probability: Floats) -> _Cuts:
    distinct, code, count = np.unique(probability, return_inverse=True, return_counts=True)
    frauds_at = np.bincount(code[fraud], minlength=len(distinct))
    below = np.append(0.0, distinct[:-1])
    middle = below + (distinct - below) / 2
    # Between neighbouring floats there is no middle; rounded down it would take in the lower row.
    threshold = np.where(middle > below, middle, distinct)
    return _Cuts(
        threshold[::-1],
        np.cumsum(count[::-1]),
        np.cumsum(frauds_at[::-1]),
        frauds_at[::-1] > 0,
    )


def choose_thresholds(
    label: ArrayLike,
    probability: ArrayLike,
    *,
    decline_precision: float = 0.9,
    alert_share: float | None = None,
    minimum_declines: int = 20,
) -> Thresholds:
    """Thresholds from N validation rows; never from test rows, whose figures they would flatter.

    `is_fraud` has the best F1, with the fewest alerts among equals.

    `review` is the same. Given `alert_share` it is the cut that comes nearest to that share of the
    rows (review and decline together, at least one row); NEVER where even the first tied block is
    so large that no alert at all comes nearer.

    `decline` is the lowest probability of a fraud, at or above `review`, such that of the rows from
    there up at least `decline_precision` are frauds and there are at least `minimum_declines`;
    NEVER where none is. Going on below a fraud would only decline more honest rows.

    Each threshold lies midway between the lowest probability that it takes in and the next lower
    one (0 below the lowest), so that float noise between machines flips no row where the gap
    permits.
    """
    _require_setting("decision.decline_precision", decline_precision)
    if alert_share is not None:
        _require_setting("decision.alert_share", alert_share)
    if minimum_declines < 1:
        raise ConfigError(f"minimum_declines: seen {minimum_declines!r}; expected at least 1")
    fraud = as_labels(label)
    p = as_probabilities(probability, len(fraud))
    if not fraud.any():
        raise DataError(
            f"label: seen no fraud in {len(fraud)} validation rows; expected at least one to "
            "choose thresholds by: lengthen [split] validation"
        )
    cuts = _cuts(fraud, p)
    f1 = 2 * cuts.frauds / (cuts.alerts + cuts.frauds[-1])
    best = int(np.argmax(f1))
    is_fraud = float(cuts.threshold[best])
    last = best if alert_share is None else _nearest_cut(cuts, max(1.0, alert_share * len(p)))
    if last is None:
        return Thresholds(is_fraud, NEVER, NEVER)
    up_to_review = slice(0, last + 1)
    alerts, frauds = cuts.alerts[up_to_review], cuts.frauds[up_to_review]
    strict = np.flatnonzero(
        (frauds / alerts >= decline_precision) & (alerts >= minimum_declines) & cuts.ends_in_fraud[up_to_review]
    )
    decline = float(cuts.threshold[strict[-1]]) if len(strict) else NEVER
    return Thresholds(is_fraud, float(cuts.threshold[last]), decline)


def _nearest_cut(cuts: _Cuts, alerts: float) -> int | None:
    """The cut with a number of alerts nearest to `alerts`; None where no alert at all is nearer."""
    distance = np.abs(cuts.alerts - alerts)
    nearest = int(np.argmin(distance))
    return nearest if distance[nearest] < alerts else None


def _require_setting(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{name}: seen {value!r}; expected a share above 0 and up to 1")
