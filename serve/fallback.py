"""What the service answers while the model cannot: nothing (503), or a decision by simple limits on the amount.

A degraded answer is marked, changes no state and is not stored: when the same transaction is posted again later, it is
scored as new.
"""

import math
from dataclasses import dataclass
from typing import Literal

from seqfraud.policy import Decision


@dataclass(frozen=True)
class FallbackSettings:
    """The owner's choice.

    - mode: "refuse" answers 503; "limits" answers 200 by what follows, marked `degraded`.
    - review_above, decline_above: amounts, in the currency's unit, above which a transaction is reviewed or declined; up to
      them it is approved.
    - without_amount: the decision where a transaction has no amount, or no limit is set.
    """

    mode: Literal["refuse", "limits"] = "refuse"
    review_above: float | None = None
    decline_above: float | None = None
    without_amount: Decision = "review"

    def __post_init__(self) -> None:
        limits = {"review_above": self.review_above, "decline_above": self.decline_above}
        for name, value in limits.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}: expected an amount, got {value!r}")
        if self.mode == "refuse" and (limits := {k: v for k, v in limits.items() if v is not None}):
            raise ValueError(f'{min(limits)} has no effect with mode "refuse"; set mode = "limits"')
        if self.review_above is not None and self.decline_above is not None and self.review_above > self.decline_above:
            raise ValueError(
                f"review_above: expected at most decline_above, which is {self.decline_above:g}, got {self.review_above:g}"
            )

    def decide(self, amount: float | None) -> tuple[Decision, str]:
        """The decision on an amount, None or NaN where there is none, and the limit that says so in words."""
        if self.review_above is None and self.decline_above is None:
            return self.without_amount, "no limit is set"
        if amount is None or math.isnan(amount):
            return self.without_amount, "there is no amount"
        if self.decline_above is not None and amount > self.decline_above:
            return "decline", f"the amount is above {self.decline_above:g}"
        if self.review_above is not None and amount > self.review_above:
            return "review", f"the amount is above {self.review_above:g}"
        return "approve", "the amount is within the limits"
