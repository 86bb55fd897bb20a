"""Score a whole file in arrival order with sequence.onnx, states carried within each user."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from seqfraud.bundle import Bundle, LabelSource
from seqfraud.cleaning import clean
from seqfraud.config import CleaningConfig, DataConfig, Duration
from seqfraud.files import replaced_file
from seqfraud.policy import DECISIONS, Policy, flag_many
from seqfraud.reading import column_names, read_transactions
from seqfraud.runtime import SequenceGraph, initial_states, next_states
from seqfraud.schema import Schema
from seqfraud.sequences import Encoded, chunks, encode, group_users, require_numbers
from seqfraud.table import Transactions

USERS = 256
EVENTS = 64


@dataclass(frozen=True)
class Scores:
    """N scored transactions in arrival order.

    Attributes:
        ids: texts [N].
        probability: float32 [N].
        amount: float64 [N], NaN where missing; None where no amount is declared.
    """

    ids: Sequence[str]
    probability: npt.NDArray[np.float32]
    amount: npt.NDArray[np.float64] | None


def read_for(
    schema: Schema, label: LabelSource, label_delay: int, policy: CleaningConfig, data: Path
) -> tuple[Transactions, dict[str, Any]]:
    """Clean transactions of a file in arrival order and what was cleaned; with labels where the file has them."""
    present = set(column_names(data))
    columns = DataConfig(
        user=schema.user,
        time=schema.time,
        label=label.column if label.column in present else None,
        label_known_at=label.known_at if label.known_at in present else None,
        label_delay=Duration(label_delay),
    )
    table, problems = read_transactions(data, schema, columns)
    return clean(table, problems, policy)


def read_for_bundle(bundle: Bundle, data: Path) -> Transactions:
    """Transactions of a file as the bundle's training read them."""
    return read_with_report(bundle, data)[0]


def read_with_report(bundle: Bundle, data: Path) -> tuple[Transactions, dict[str, Any]]:
    """Transactions of a file as the bundle's training read them, and what was cleaned."""
    manifest = bundle.manifest
    return read_for(manifest.schema, manifest.label, manifest.context.label_delay, manifest.cleaning, data)


def score_encoded(
    graph: SequenceGraph, encoded: Encoded, progress: Callable[[int], None] | None = None
) -> npt.NDArray[np.float32]:
    """float32 [N]: the probability of every encoded row."""
    out = np.full(len(encoded), np.nan, dtype=np.float32)
    for users in group_users(encoded.lengths(), USERS):
        outputs: dict[str, npt.NDArray[Any]] = {}
        for chunk in chunks(encoded, users, EVENTS):
            batch = len(chunk.length)
            states = initial_states(graph.spec, batch) if chunk.first else next_states(graph.spec, outputs, batch)
            outputs = graph.run({**encoded.gather(chunk.rows), "length": chunk.length, **states})
            real = chunk.rows >= 0
            out[chunk.rows[real]] = outputs["probability"][real]
            if progress:
                progress(int(chunk.length.sum()))
    return out


def write_scores(out: Path, scored: Scores, policy: Policy) -> int:
    """Write transaction_id, fraud_probability, is_fraud, decision as Parquet; how many are flagged."""
    flagged = flag_many(scored.probability, policy.thresholds)
    decisions = policy.decide_many(scored.probability, scored.amount)
    scores = pa.table(
        {
            "transaction_id": pa.array(scored.ids, pa.string()),
            "fraud_probability": pa.array(scored.probability),
            "is_fraud": pa.array(flagged),
            "decision": pa.DictionaryArray.from_arrays(pa.array(decisions), pa.array(DECISIONS)),
        }
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(out) as file:
        pyarrow.parquet.write_table(scores, file)
    return int(flagged.sum())


def score_table(
    bundle: Bundle, table: Transactions, threads: int = 2, progress: Callable[[int], None] | None = None
) -> npt.NDArray[np.float32]:
    """float32 [N]: the probability of every transaction, in the table's (arrival) order.

    Raises:
        DataError: a number is missing in a column where the model has no place for that.
    """
    manifest = bundle.manifest
    require_numbers(table, manifest.missing)
    encoded = encode(table, manifest.vocabularies, manifest.context)
    graph = SequenceGraph(bundle.sequence, manifest.graph, threads)
    out = np.empty(len(table), dtype=np.float32)
    out[encoded.arrival] = score_encoded(graph, encoded, progress)
    return out
