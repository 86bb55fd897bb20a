"""Several models on the same test rows: figures, segments, bootstrap intervals and paired differences.

Rows come in parts, the folds. A figure is the mean over the parts that define it and over a model's seeds, None where
none does; bins and counts are over all parts together. Intervals draw customers, once for all parts. What comes out
is dicts, lists and numbers, ready for JSON.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as parquet

from seqfraud.metrics import (
    DAY_MS,
    Part,
    average_precision,
    bootstrap_means,
    brier,
    calibration_in_the_large,
    calibration_slope,
    card_precision_at_k,
    log_loss,
    money_caught,
    recall_at_fpr,
    roc_auc,
)
from training.prepare import Prepared
from training.report_data import bins_with_intervals, history_bands

BUDGETS = (50, 100, 200)
"""Alerts a day."""
BUDGET = 100
"""Of the recall of segments."""
TOP = 0.01
ROUNDS = 500
AMOUNT_BANDS = (10, 50, 100, 200, 500)
"""In the currency of the data; the same in every fold."""

Floats = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Segments = Mapping[str, Mapping[str, Mask]]
"""Property, name of the segment, its rows [N]; the same names in every part, in order."""


@dataclass(frozen=True)
class ScoredRows:
    """The N test rows of one part, such as a fold, and what each model says of them.

    Attributes:
        label: int8 [N], 0 or 1.
        user: [N], the same in every part.
        day: int64 [N], days since the epoch, UTC.
        amount: float64 [N].
        probabilities: by model, the GRU first, one [N] per seed, calibrated.
    """

    label: npt.NDArray[np.int8]
    user: npt.NDArray[Any]
    day: Int64
    amount: Floats
    probabilities: Mapping[str, Sequence[Floats]]
    segments: Segments = field(default_factory=dict)


def scored_rows(
    prepared: Prepared, rows: Int64, probabilities: Mapping[str, Sequence[Floats]], more: Segments | None = None
) -> ScoredRows:
    """The rows, int64 [n] into encoded rows, with their segments.

    Args:
        probabilities: by model, one [N] per seed over the encoded rows, as `fit_gru` and `fit_peers` give logits.
        more: other segments, of n rows.
    """
    encoded, amount = prepared.encoded, prepared.table.amount()
    arrival = encoded.arrival[rows]
    money = np.zeros(len(rows)) if amount is None else np.nan_to_num(amount[arrival])
    users = prepared.table.user
    return ScoredRows(
        prepared.label[rows],
        np.array(users.values)[users.codes[arrival]],
        encoded.time[rows] // DAY_MS,
        money,
        {name: [score[rows] for score in seeds] for name, seeds in probabilities.items()},
        {**segments_of(prepared, rows), **(more or {})},
    )


def segments_of(prepared: Prepared, rows: Int64) -> dict[str, dict[str, Mask]]:
    """Bands of the amount, of the user's events before, and whether a fraud is known of each context that says so."""
    encoded, context, amount = prepared.encoded, prepared.context, prepared.table.amount()
    out: dict[str, dict[str, Mask]] = {}
    if amount is not None:
        out["amount"] = amount_bands(amount[encoded.arrival[rows]])
    begin = np.repeat(encoded.begin, encoded.lengths())
    out["events before"] = dict(history_bands(rows - begin[rows]))
    names = context.names()
    told = [column for column in context.columns if f"{column}.since_fraud_d" in names]
    for column in told:
        known = encoded.context[rows, names.index(f"{column}.since_fraud_d")] >= 0
        out[column] = {"with known fraud": known, "without known fraud": ~known}
    return out


def amount_bands(amount: Floats) -> dict[str, Mask]:
    """Masks [N] between AMOUNT_BANDS, closed at the lower end; a missing amount is in none."""
    low, high = AMOUNT_BANDS[0], AMOUNT_BANDS[-1]
    inner = {f"{a} to {b}": (amount >= a) & (amount < b) for a, b in pairwise(AMOUNT_BANDS)}
    return {f"under {low}": amount < low, **inner, f"{high} and more": amount >= high}


def column_of(data: Path, column: str, prepared: Prepared, rows: Int64) -> npt.NDArray[Any]:
    """A column of the data that training does not read, such as the handbook's TX_FRAUD_SCENARIO, for rows [n]."""
    values = parquet.read_table(data, columns=[column])[column].to_numpy()
    found: npt.NDArray[Any] = values[prepared.table.file_row[prepared.encoded.arrival[rows]]]
    return found


def label_segments(name: str, values: npt.NDArray[np.int64], fraud: Mask) -> dict[str, dict[str, Mask]]:
    """Kinds of fraud [N] as segments: each holds the frauds of one kind and no honest row, so that only recall is defined."""
    kinds = {f"{name} {value}": fraud & (values == value) for value in np.unique(values[fraud]).tolist()}
    return {name: kinds}


def compared(parts: Sequence[ScoredRows], rounds: int = ROUNDS) -> dict[str, Any]:
    """Every model's figures over the parts, and the first model's average precision minus that of each other.

    Returns:
        models: by name `figures`, with `interval`. differences: by name average_precision, low, high,
        share_gru_higher and rounds.
    """
    models = {name: figures(parts, name) for name in parts[0].probabilities}
    drawn = bootstrap_means(
        "average_precision", [Part(part.label, part.user, part.probabilities) for part in parts], rounds=rounds
    )
    differences: dict[str, Any] = {}
    if drawn is not None:
        for name, interval in drawn.of.items():
            models[name]["interval"] = [interval.low, interval.high]
        for name, found in drawn.first_minus.items():
            differences[name] = {
                "average_precision": found.difference,
                "low": found.low,
                "high": found.high,
                "share_gru_higher": found.share_a_higher,
                "rounds": found.rounds,
            }
    return {"models": models, "differences": differences}


def figures(parts: Sequence[ScoredRows], model: str) -> dict[str, Any]:
    """One model's figures: means over parts and seeds; rows, frauds, bins and segments over all parts together."""

    def mean(figure: Callable[[ScoredRows, Floats], float | None]) -> float | None:
        return _mean(figure(part, score) for part in parts for score in part.probabilities[model])

    first = np.concatenate([part.probabilities[model][0] for part in parts])
    label = np.concatenate([part.label for part in parts])
    slope = [calibration_slope(part.label, score) for part in parts for score in part.probabilities[model]]
    return {
        "rows": len(label),
        "frauds": int((label == 1).sum()),
        "seeds": len(parts[0].probabilities[model]),
        "average_precision": mean(lambda part, score: average_precision(part.label, score)),
        "roc_auc": mean(lambda part, score: roc_auc(part.label, score)),
        "card_precision_100": mean(lambda part, score: card_precision_at_k(part.label, score, part.user, part.day)),
        "recall_at_1pct_fpr": mean(lambda part, score: recall_at_fpr(part.label, score)),
        "money_caught": {str(alerts): mean(partial(_money, alerts=alerts)) for alerts in BUDGETS},
        "log_loss": mean(lambda part, score: log_loss(part.label, score)),
        "brier": mean(lambda part, score: brier(part.label, score)),
        "calibration": {
            "slope": _mean(None if one is None else one.slope for one in slope),
            "intercept": _mean(None if one is None else one.intercept for one in slope),
            "in_the_large": mean(lambda part, score: calibration_in_the_large(part.label, score)),
        },
        # of the first seed: of a mean over seeds they would be another model's
        "top_bins": [
            {**vars(found.bin), "low": found.low, "high": found.high}
            for found in bins_with_intervals(label, first, top=TOP)
        ],
        "segments": _segment_figures(parts, model),
    }


def _segment_figures(parts: Sequence[ScoredRows], model: str) -> dict[str, dict[str, dict[str, Any]]]:
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for name in parts[0].segments:
        out[name] = {}
        for segment in dict.fromkeys(key for part in parts for key in part.segments[name]):
            where = [part.segments[name].get(segment, np.zeros(len(part.label), dtype=np.bool_)) for part in parts]
            rows = sum(int(mask.sum()) for mask in where)
            if rows:
                out[name][segment] = _one_segment(parts, where, model)
    return out


def _one_segment(parts: Sequence[ScoredRows], where: Sequence[Mask], model: str) -> dict[str, Any]:
    frauds = [int((part.label[mask] == 1).sum()) for part, mask in zip(parts, where, strict=True)]
    scores = [
        (part, mask, score) for part, mask in zip(parts, where, strict=True) for score in part.probabilities[model]
    ]
    seeds = len(parts[0].probabilities[model])
    caught = sum(_frauds_alerted(part, mask, score) for part, mask, score in scores) / seeds
    return {
        "rows": sum(int(mask.sum()) for mask in where),
        "frauds": sum(frauds),
        "average_precision": _mean(
            average_precision(part.label[mask], score[mask]) for part, mask, score in scores if _has_both(part, mask)
        ),
        "roc_auc": _mean(roc_auc(part.label[mask], score[mask]) for part, mask, score in scores),
        "recall_at_1pct_fpr": _mean(recall_at_fpr(part.label[mask], score[mask]) for part, mask, score in scores),
        f"recall_at_{BUDGET}_alerts": caught / sum(frauds) if sum(frauds) else None,
    }


def _has_both(part: ScoredRows, mask: Mask) -> bool:
    return len(np.unique(part.label[mask])) == 2


def _frauds_alerted(part: ScoredRows, mask: Mask, score: Floats) -> float:
    """How many of the segment's frauds are among the days' BUDGET highest-scored rows, whatever their segment."""
    frauds = mask & (part.label == 1)
    # fraud money where each such fraud is worth 1 and any other row nothing
    found = money_caught(frauds, score, frauds, part.day, alerts_per_day=BUDGET)
    return 0.0 if found is None else found.total * int(frauds.sum())


def _money(part: ScoredRows, score: Floats, *, alerts: int) -> float | None:
    found = money_caught(part.label, score, part.amount, part.day, alerts_per_day=alerts)
    return None if found is None else found.mean


def _mean(values: Any) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
