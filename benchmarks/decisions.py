"""What policies are worth on weeks after those they were chosen on, and what a decision costs the service.

    python -m benchmarks.decisions

Writes benchmarks/results/decisions.json. The scores are those of `benchmarks.quality` on the handbook's folds (every known
label, seed 0). A policy is chosen on the test week of one fold, which stands for its validation days, and measured on the week two folds
later, scored by that fold's model: it begins when the last label of the first is known. The costs are assumptions, not the
data's: a review costs 5 and recognises nine frauds in ten, an honest transaction declined 2 and a tenth of its amount, a
fraud that goes through its amount.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow.parquet as parquet

from benchmarks.processes import DATA, RESULTS, write_result
from seqfraud.choosing import ScoredDays, alternatives, choose_policy, prices
from seqfraud.config import DAY_MS, DecisionConfig, parse_instant
from seqfraud.policy import Costs, Policy, Thresholds
from training.worth import APPROVE_ALL, CHOSEN, NO_MODEL, measured

PAIRS = (("2018-07-25", "2018-08-08"), ("2018-08-01", "2018-08-15"))
COST = DecisionConfig(by="cost", review_cost=5.0, insult_cost=2.0, insult_share=0.1, review_catches=0.9)
SHARE = replace(COST, by="thresholds", alert_share=0.01)
CALLS, ROUNDS = 2000, 100


def week_of(fold: str) -> ScoredDays:
    """The test week of a fold."""
    scores = parquet.read_table(
        RESULTS / "handbook_scores.parquet",
        filters=[("fold", "=", fold), ("setting", "=", "all"), ("model", "=", "gru")],
    )
    columns = ["TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TX_AMOUNT", "TX_FRAUD"]
    table = parquet.read_table(DATA / "handbook.parquet", columns=columns)
    ids = np.array(scores["transaction_id"].to_pylist(), dtype=np.int64)
    order = np.argsort(table["TRANSACTION_ID"].to_numpy(), kind="stable")
    rows = order[np.searchsorted(table["TRANSACTION_ID"].to_numpy()[order], ids)]
    data = {name: table[name].to_numpy()[rows] for name in columns}
    since = data["TX_DATETIME"].astype("datetime64[ms]").astype(np.int64) - parse_instant(fold) - 14 * DAY_MS
    return ScoredDays(
        label=data["TX_FRAUD"].astype(np.int8),
        probability=scores["fraud_probability"].to_numpy().astype(np.float64),
        amount=data["TX_AMOUNT"].astype(np.float64),
        day=since // DAY_MS,
        user=data["CUSTOMER_ID"].astype(np.int32),
        days=7.0,
    )


def microseconds(call: Callable[[], object]) -> float:
    """CPU time of a call, the least of many short rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time_ns()
        for _ in range(CALLS):
            call()
        best = min(best, (time.process_time_ns() - began) / CALLS / 1000)
    return round(best, 3)


def main() -> None:
    """Measure, print and write the result."""
    weeks = {fold: week_of(fold) for pair in PAIRS for fold in pair}
    pairs = []
    for before, after in PAIRS:
        choice = choose_policy(COST, weeks[before])
        policies = {
            NO_MODEL: APPROVE_ALL,
            CHOSEN: choice.policy,
            "thresholds, alert_share 0.01": choose_policy(SHARE, weeks[before]).policy,
            **alternatives(COST, weeks[before], choice.policy),
        }
        found = measured(prices(COST), policies, weeks[after])
        pairs.append(
            {
                "chosen_on_fold": before,
                "measured_on_fold": after,
                "rows": len(weeks[after].label),
                "frauds": int(weeks[after].fraud.sum()),
                "tried": [vars(tried) for tried in choice.tried],
                "policies": {name: policy.as_dict() for name, policy in policies.items()},
                "a_day": found,
            }
        )
        print(
            f"chosen on {before}, measured on {after}: "
            + ", ".join(f"{t.setting} {t.per_day:.0f}" for t in choice.tried)
        )
        for name, of in found.items():
            print(
                f"  {name:34}{of['alerts']:>8.1f} alerts{of['declines']:>8.1f} declines{of['fraud_lost']:>9.0f} fraud"
                f"{of['cost']['estimate']:>9.0f} cost ({of['cost']['low']:.0f} to {of['cost']['high']:.0f}), less than "
                f"this policy {of['less_than_this']['estimate']:.0f} "
                f"({of['less_than_this']['low']:.0f} to {of['less_than_this']['high']:.0f})"
            )
    cuts = Thresholds(0.5, 0.3, 0.9)
    of_kind = {
        "thresholds": Policy(cuts),
        "expected loss": Policy(cuts, review_loss=20.0),
        "cost": Policy(cuts, costs=Costs(5.0, 2.0, 0.1)),
    }
    cost_us = {name: microseconds(lambda policy=policy: policy.decide(0.2, 31.5)) for name, policy in of_kind.items()}  # type: ignore[misc]
    print(f"CPU microseconds of a decision: {cost_us}")
    write_result("decisions", {"pairs": pairs, "decide_cpu_us": cost_us})


if __name__ == "__main__":
    main()
