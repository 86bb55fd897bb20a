"""Score a whole file in arrival order with sequence.onnx, states carried within each user."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Bundle
from seqfraud.cleaning import clean
from seqfraud.config import DataConfig
from seqfraud.reading import Transactions, read_transactions
from seqfraud.runtime import SequenceGraph, initial_states, next_states
from seqfraud.sequences import Encoded, chunks, encode, group_users

USERS = 256
EVENTS = 64


def read_for(bundle: Bundle, data: Path, label: str | None, label_known_at: str | None) -> Transactions:
    """Transactions of a file in arrival order, by the bundle's schema, with labels where a column is named."""
    schema = bundle.manifest.schema
    columns = DataConfig(
        user=schema.user,
        time=schema.time,
        label=label,
        label_known_at=label_known_at,
        label_delay=type(DataConfig.label_delay)(bundle.manifest.context.label_delay),
    )
    table, problems = read_transactions(data, schema, columns)
    return clean(table, problems)[0]


def score_encoded(
    graph: SequenceGraph, encoded: Encoded, progress: Callable[[int], None] | None = None
) -> npt.NDArray[np.float32]:
    """float32 [N]: the probability of every encoded row."""
    out = np.full(len(encoded), np.nan, dtype=np.float32)
    for users in group_users(encoded.lengths(), USERS):
        outputs = {}
        for chunk in chunks(encoded, users, EVENTS):
            batch = len(chunk.length)
            states = initial_states(graph.spec, batch) if chunk.first else next_states(graph.spec, outputs, batch)
            outputs = graph.run({**encoded.gather(chunk.rows), "length": chunk.length, **states})
            real = chunk.rows >= 0
            out[chunk.rows[real]] = outputs["probability"][real]
            if progress:
                progress(int(chunk.length.sum()))
    return out


def score_table(
    bundle: Bundle, table: Transactions, threads: int = 2, progress: Callable[[int], None] | None = None
) -> npt.NDArray[np.float32]:
    """float32 [N]: the probability of every transaction, in the table's (arrival) order."""
    manifest = bundle.manifest
    encoded = encode(table, manifest.vocabularies, manifest.context)
    graph = SequenceGraph(bundle.sequence, manifest.graph, threads)
    out = np.empty(len(table), dtype=np.float32)
    out[encoded.arrival] = score_encoded(graph, encoded, progress)
    return out
