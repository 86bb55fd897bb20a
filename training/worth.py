"""What decisions are worth: the money that a policy loses and saves a day, beside others, on validation and test days.

Money is in the unit of the amounts, counted over the rows with a label; alerts are counted over all rows. K policies, D
days, N rows.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.choosing import Choice, ScoredDays, alternatives, prices
from seqfraud.config import DAY_MS, DecisionConfig
from seqfraud.metrics import Interval, bootstrap_sums
from seqfraud.policy import NEVER, Costs, Policy, Thresholds
from training.prepare import Prepared

NO_MODEL = "no model"
"""Everything is approved."""
CHOSEN = "this policy"
APPROVE_ALL = Policy(Thresholds(NEVER, NEVER, NEVER))
BOOTSTRAP_USERS = 20_000_000
"""Users times rounds of one bootstrap: 200 rounds up to a hundred thousand users, fewer beyond, never under 50."""


def scored_days(prepared: Prepared, probability: npt.NDArray[np.float64], part: str) -> ScoredDays | None:
    """The transactions of the validation or the test days, without a label too; None where none of them is scored."""
    split, encoded, table = prepared.split, prepared.encoded, prepared.table
    begin, end = {
        "validation": (split.validation_start, split.train_end),
        "test": (split.test_start, split.test_end),
    }[part]
    inside = (encoded.time >= begin) & (encoded.time < end)
    rows = np.flatnonzero(inside & ~np.isnan(probability))
    if not len(rows):
        return None
    arrival = encoded.arrival[rows]
    amount = table.amount()
    last = min(end, int(table.time[-1]) + 1)
    # a label that is not known yet when fitting ends is no label of a validation day
    known = getattr(prepared.rows, part)[rows]
    return ScoredDays(
        label=np.where(known, prepared.label[rows], -1).astype(np.int8),
        probability=probability[rows],
        amount=None if amount is None else amount[arrival],
        day=(encoded.time[rows] - begin) // DAY_MS,
        user=table.user.codes[arrival],
        days=max((last - begin) / DAY_MS, 1 / DAY_MS),
        share=len(rows) / int(inside.sum()),
    )


def validation_days(prepared: Prepared, probability: npt.NDArray[np.float64]) -> ScoredDays:
    """Those by which a policy is chosen; a split without them is refused before."""
    rows = scored_days(prepared, probability, "validation")
    assert rows is not None
    return rows


def described_choice(settings: DecisionConfig, rows: ScoredDays, choice: Choice) -> dict[str, Any]:
    """How a policy came about, and those to compare it with, as JSON; `rows` are those of the validation days."""
    return {
        "by": settings.by,
        "chosen_on": "validation rows",
        "measured": choice.measured,
        "tried": [asdict(tried) for tried in choice.tried],
        "alternatives": {
            name: policy.as_dict() for name, policy in alternatives(settings, rows, choice.policy).items()
        },
    }


def worth(
    settings: DecisionConfig, policy: Policy, others: Mapping[str, Mapping[str, Any]], days: Mapping[str, ScoredDays]
) -> dict[str, Any]:
    """Figures of policies per part of the split, as JSON.

    Args:
        others: policies to compare with, as `described_choice` has them.
        days: validation and test days, where there are some.
    """
    policies = {
        NO_MODEL: APPROVE_ALL,
        CHOSEN: policy,
        **{name: Policy.from_dict(other) for name, other in others.items()},
    }
    costs = prices(settings, all(rows.amount is not None for rows in days.values()))
    return {
        "prices": asdict(costs),
        "priced": settings.review_cost is not None,
        **{part: {"days": rows.days, "policies": measured(costs, policies, rows)} for part, rows in days.items()},
    }


def measured(costs: Costs, policies: Mapping[str, Policy], rows: ScoredDays) -> dict[str, dict[str, Any]]:
    """What each of K policies costs a day on some rows, what it does, and intervals by user.

    `saved` is against no model; `less_than_this` what it costs less than the policy that was chosen, on the same draws.
    """
    money, known = rows.money(), rows.known
    decisions = {name: policy.decide_many(rows.probability, rows.amount) for name, policy in policies.items()}
    parts = {name: costs.of(rows.fraud, money, codes) * known for name, codes in decisions.items()}
    total = {name: part.sum(axis=0) for name, part in parts.items()}
    columns = [
        column
        for name in policies
        for column in (total[name], total[NO_MODEL] - total[name], total[CHOSEN] - total[name])
    ]
    users = len(np.unique(rows.user))
    intervals = iter(
        bootstrap_sums(np.stack(columns, axis=1), rows.user, rounds=max(50, min(200, BOOTSTRAP_USERS // users)))
    )
    out = {}
    for name, codes in decisions.items():
        alerts = np.bincount(rows.day[codes > 0], minlength=int(rows.day.max()) + 1) / rows.share
        alerts = alerts[: max(1, int(rows.days))]  # a part of a day says nothing of a day
        through, reviews, insults = (float(part.sum()) / rows.days for part in parts[name])
        cost, saved, less = (_a_day(next(intervals), rows.days) for _ in range(3))
        hits = int((rows.fraud & (codes > 0)).sum())
        alerted = int((known & (codes > 0)).sum())
        declined = known & (codes == 2)
        out[name] = {
            "alerts": float((codes > 0).sum()) / rows.days / rows.share,
            "alerts_by_day": {
                level: float(np.quantile(alerts, at)) for level, at in (("least", 0), ("median", 0.5), ("most", 1))
            },
            "declines": float((codes == 2).sum()) / rows.days / rows.share,
            "precision": hits / alerted if alerted else None,
            "decline_precision": float(rows.fraud[declined].mean()) if declined.any() else None,
            "recall": hits / int(rows.fraud.sum()) if rows.fraud.any() else None,
            "fraud_lost": through,
            "review_costs": reviews,
            "insult_costs": insults,
            "cost": cost,
            "saved": saved,
            "less_than_this": less,
        }
    return out


def _a_day(interval: Interval, days: float) -> dict[str, float]:
    return {name: getattr(interval, name) / days for name in ("estimate", "low", "high")}
