"""What follows from a probability and an amount: approve, review or decline, and whether it counts as fraud.

A policy is chosen once, on validation rows (`seqfraud.choosing`), and travels in the bundle's manifest; the service and
bulk scoring apply it with the same operations in float64.
"""

import difflib
import hmac
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqfraud.config import MOST_CONTROL
from seqfraud.errors import BundleError
from seqfraud.metrics import Floats, Mask

Decision = Literal["approve", "review", "decline"]

DECISIONS: tuple[Decision, ...] = ("approve", "review", "decline")
"""The decisions by their code in `Policy.decide_many`, from mild to strict."""

Rule = Literal["thresholds", "expected_loss", "cost"]
"""What a policy decides by, as the manifest says it."""

NEVER = 1.01
"""A threshold that no probability reaches; a plain number, so that JSON can hold it."""

MOST_MONEY = 1e12
"""Of a fixed cost or an expected loss."""
MOST = 1000.0
"""Of a share of the amount, or a margin."""


@dataclass(frozen=True)
class Thresholds:
    """A probability at or above a threshold has its consequence; each is 0..1 or NEVER.

    `is_fraud` is the yes or no of an answer, independent of the decision; `review` <= `decline`. Under a policy that asks
    for the amount, `review` and `decline` are for transactions that have none.
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
        # The constructor checks the types; that a manifest may hold anything is its business.
        return cls(**_named(cls, values, "thresholds"))


@dataclass(frozen=True)
class Costs:
    """What decisions cost, in the currency's unit, of an amount a (0 where negative).

    A fraud that goes through costs `fraud_cost + fraud_share * a`; a review `review_cost`, and it finds the share
    `review_catches` of the frauds; an honest customer who is declined `insult_cost + insult_share * a`. What is done
    about a transaction has to promise `margin` times what it costs.
    """

    review_cost: float
    insult_cost: float = 0.0
    insult_share: float = 0.0
    fraud_cost: float = 0.0
    fraud_share: float = 1.0
    review_catches: float = 1.0
    margin: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            low, high = _BOUNDS[field.name]
            _require_number(f"decision.{field.name}", getattr(self, field.name), low, high)

    def decide(self, probability: float, amount: float) -> Decision:
        """The decision of least expected cost, the mildest among equals; NaN as a probability goes to a person."""
        approve, review, decline = self._expected(probability, amount if amount > 0 else 0.0)
        if approve <= review and approve <= decline:
            return "approve"
        return "decline" if decline < review else "review"

    def decide_many(self, probabilities: Floats, amounts: Floats) -> NDArray[np.uint8]:
        """The decisions on N transactions as indices [N] into DECISIONS, each what `decide` says."""
        approve, review, decline = self._expected(probabilities, np.where(amounts > 0, amounts, 0.0))
        acts = ~((approve <= review) & (approve <= decline))
        codes: NDArray[np.uint8] = acts.astype(np.uint8) + (acts & (decline < review))
        return codes

    def _expected(self, p: Any, amount: Any) -> tuple[Any, Any, Any]:
        """Expected costs of approving, reviewing and declining, of numbers or arrays [N].

        Elkan 2001, "The foundations of cost-sensitive learning" (IJCAI), with costs that depend on the example as in
        Bahnsen, Stojanovic, Aouada and Ottersten 2013, "Cost sensitive credit card fraud detection using Bayes minimum
        risk" (ICMLA); the review between the two is ours.
        """
        loss = p * (self.fraud_cost + self.fraud_share * amount)
        insult = (1.0 - p) * (self.insult_cost + self.insult_share * amount)
        return loss, self.margin * self.review_cost + (1.0 - self.review_catches) * loss, self.margin * insult

    def of(self, fraud: Mask, amount: Floats, decisions: NDArray[np.uint8]) -> Floats:
        """What decisions came to [3, N]: fraud that went through, reviews, honest customers declined.

        Args:
            fraud: mask [N].
            amount: [N], 0 where missing or negative.
            decisions: indices [N] into DECISIONS.
        """
        approved, reviewed, declined = (decisions == code for code in range(3))
        loss = (self.fraud_cost + self.fraud_share * amount) * fraud
        insult = (self.insult_cost + self.insult_share * amount) * ~fraud
        through = loss * (approved + (1.0 - self.review_catches) * reviewed)
        return np.stack([through, self.review_cost * reviewed, insult * declined])


_BOUNDS = {
    "review_cost": (0.0, MOST_MONEY),
    "insult_cost": (0.0, MOST_MONEY),
    "insult_share": (0.0, MOST),
    "fraud_cost": (0.0, MOST_MONEY),
    "fraud_share": (0.0, MOST),
    "review_catches": (0.0, 1.0),
    "margin": (1 / MOST, MOST),
}


@dataclass(frozen=True)
class Policy:
    """The decision as a pure function of probability and amount; at most one of `review_loss` and `costs` is set.

    - Neither: by the thresholds of the probability.
    - `review_loss`: decline by the threshold; review where probability times amount, the expected loss, is at least that.
    - `costs`: whatever has the least expected cost.

    A transaction without an amount is decided by the thresholds in every case.

    `control_share` of what it declines is let through by the service (`let_through`); that is none of `decide`.
    """

    thresholds: Thresholds
    review_loss: float | None = None
    costs: Costs | None = None
    control_share: float = 0.0

    def __post_init__(self) -> None:
        if self.review_loss is not None:
            if self.costs is not None:
                raise BundleError("decision: seen an expected loss and costs; expected one of them")
            _require_number("decision.review", self.review_loss, 0.0, MOST_MONEY)
        _require_number("decision.control_share", self.control_share, 0.0, MOST_CONTROL)

    @property
    def by(self) -> Rule:
        """What decides."""
        return "cost" if self.costs is not None else "thresholds" if self.review_loss is None else "expected_loss"

    def decide(self, probability: float, amount: float | None) -> Decision:
        """The decision on one transaction; the amount is None or NaN where there is none.

        A probability that is not a number goes to a person: every comparison with NaN is false, and the order of these
        leaves it at review.
        """
        # Against a float32 scalar numpy would round the threshold to float32 before it compares.
        probability = float(probability)
        amount = math.nan if amount is None else float(amount)
        if self.costs is not None and not math.isnan(amount):
            return self.costs.decide(probability, amount)
        if probability >= self.thresholds.decline:
            return "decline"
        if self.review_loss is not None and not math.isnan(amount):
            loss = probability * (amount if amount > 0 else 0.0)
            return "approve" if loss < self.review_loss else "review"
        return "approve" if probability < self.thresholds.review else "review"

    def decide_many(self, probabilities: ArrayLike, amounts: ArrayLike | None) -> NDArray[np.uint8]:
        """The decisions on N transactions as indices [N] into DECISIONS, each what `decide` says."""
        p = np.asarray(probabilities, dtype=np.float64)  # see `decide` for why not float32
        a = np.full(p.shape, np.nan) if amounts is None else np.asarray(amounts, dtype=np.float64)
        declined = p >= self.thresholds.decline
        acts = ~(p < self.thresholds.review)
        if self.review_loss is not None:
            acts = np.where(np.isnan(a), acts, ~(p * np.where(a > 0, a, 0.0) < self.review_loss))
        codes: NDArray[np.uint8] = (acts | declined).astype(np.uint8) + declined
        return codes if self.costs is None else np.where(np.isnan(a), codes, self.costs.decide_many(p, a))

    def as_dict(self) -> dict[str, Any]:
        """`thresholds` and `decision`, as the manifest holds them."""
        decision: dict[str, Any] = {"by": self.by}
        if self.review_loss is not None:
            decision["review"] = self.review_loss
        if self.costs is not None:
            decision |= asdict(self.costs)
        if self.control_share:
            decision["control_share"] = self.control_share
        return {"thresholds": self.thresholds.as_dict(), "decision": decision}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Policy":
        """The inverse of `as_dict`, other keys aside; a missing, unknown or impossible entry is a BundleError."""
        for name in ("thresholds", "decision"):
            if name not in values:
                raise BundleError(f"{name}: missing; expected an object")
        thresholds, decision = Thresholds.from_dict(values["thresholds"]), values["decision"]
        if not isinstance(decision, Mapping):
            raise BundleError(f"decision: seen {decision!r}; expected an object that says by what, such as a cost")
        by = decision.get("by")
        control = decision.get("control_share", 0.0)
        rest = {name: value for name, value in decision.items() if name not in ("by", "control_share")}
        if by == "thresholds":
            for name in rest:
                raise BundleError(f"decision.{name}: unknown; by thresholds there is nothing more to say")
            return cls(thresholds, control_share=control)
        if by == "expected_loss":
            return cls(thresholds, review_loss=_named(_ReviewLoss, rest, "decision")["review"], control_share=control)
        if by == "cost":
            return cls(thresholds, costs=Costs(**_named(Costs, rest, "decision")), control_share=control)
        raise BundleError(f"decision.by: seen {by!r}; expected one of {', '.join(get_args(Rule))}")


@dataclass(frozen=True)
class _ReviewLoss:
    review: float


def _named(cls: type[Any], values: Any, where: str) -> dict[str, Any]:
    """The entries of an object that has those of a dataclass, all and no others."""
    names = [field.name for field in fields(cls)]
    if not isinstance(values, Mapping):
        raise BundleError(f"{where}: seen {values!r}; expected an object with {', '.join(names)}")
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0)[0]
            raise BundleError(f"{where}.{name}: unknown; the nearest valid key is {near}")
    for name in names:
        if name not in values:
            raise BundleError(f"{where}.{name}: missing; expected a number")
    return dict(values)


def _require_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BundleError(f"{name}: seen {value!r}; expected a number from {low:g} to {high:g}")


def let_through(key: bytes, transaction_id: str, share: float) -> bool:
    """Whether a transaction is among the `share` that is let through at random: the same whenever it is asked.

    A keyed hash of its id as a number below 1; without the key nobody can choose an id that is let through.
    """
    digest = hmac.digest(key, transaction_id.encode("utf-8", "surrogatepass"), "sha256")
    return int.from_bytes(digest[:7], "big") < share * 2**56


def flag_many(probabilities: ArrayLike, thresholds: Thresholds) -> Mask:
    """`is_fraud` of N transactions: the mask [N] of those at or above that threshold."""
    flagged: Mask = np.asarray(probabilities, dtype=np.float64) >= thresholds.is_fraud
    return flagged
