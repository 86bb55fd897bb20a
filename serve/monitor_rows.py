"""A service's journal as the arrays that `monitor` looks at. It may run beside the service: nothing is changed by it."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from seqfraud.bundle import Bundle
from seqfraud.config import DAY_MS
from seqfraud.fingerprint import Columns, gaps_of, stacked
from seqfraud.table import MISSING, Coded, networks_of
from seqfraud.vocabulary import FIRST, UNSEEN, Vocabulary
from serve.journalled import Journalled, read_journal
from serve.verdicts import Rows, Span

LOOK_BACK = 28 * DAY_MS
"""Beyond what is looked at, for the time since a user's event before."""


def read_rows(state: Path, bundles: Sequence[Bundle], span: Span) -> Journalled:
    """What the journal holds of the time that is looked at, and before, as it was known at its end.

    Raises RunError where there is no journal, or where it is damaged or holds other fields than the first bundle's.
    """
    delay = max(bundle.manifest.context.label_delay for bundle in bundles)
    since = span.now - max(span.window, span.mature + delay) - LOOK_BACK
    return read_journal(state, bundles[0].manifest.schema, since=since, until=span.now, fields=True, context=True)


def rows_of(journal: Journalled, bundle: Bundle, alike: Collection[str]) -> Rows:
    """The rows as a bundle sees them.

    Args:
        journal: read with fields and contexts.
        alike: ids of the bundles whose contexts are the same numbers as this one's.
    """
    manifest, table = bundle.manifest, journal.table
    assert journal.fields is not None
    fields, schema = journal.fields, manifest.schema
    user, _ = _codes(table["user"])
    time = table["time"].to_numpy()
    model = table["model"]
    decision = table["decision"]
    label = table["label"].fill_null(-1).to_numpy().astype(np.int8)
    numeric = np.empty((len(time), len(schema.numeric_inputs)))
    for i, column in enumerate(schema.numeric_inputs):
        numeric[:, i] = _floats(fields[column])
    categorical = np.empty((len(time), len(manifest.vocabularies)), dtype=np.int64)
    for c, vocabulary in enumerate(manifest.vocabularies):
        categorical[:, c] = _ids(fields[vocabulary.column], vocabulary)
    columns = Columns(
        time=time,
        user=user,
        numeric=numeric,
        categorical=categorical,
        context=_contexts(
            journal, pc.is_in(model, pa.array(list(alike), pa.string())).to_numpy(), manifest.context.width
        ),
        gap=gaps_of(user, time),
        absent={column: fields[column].is_null().to_numpy() for column in (*schema.numbers, *schema.texts)},
        entity=stacked(
            [*(_codes(fields[c])[0] for c in schema.context), *(_networks(fields[c]) for c in schema.ip)], len(time)
        ),
    )
    return Rows(
        columns=columns,
        own=pc.equal(model, bundle.id).to_numpy(zero_copy_only=False),
        probability=_floats(table["probability"]),
        alerted=pc.fill_null(pc.is_in(decision, pa.array(["review", "decline"])), False).to_numpy(),
        declined=pc.fill_null(pc.equal(decision, "decline"), False).to_numpy(),
        control=pc.fill_null(table["control"], False).to_numpy(),
        amount=None if schema.amount is None else _floats(table["amount"]),
        label=label,
    )


def _codes(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
    """int64 [N]: a number for each text, -1 where null; and the texts."""
    found = column.combine_chunks().dictionary_encode()
    codes: npt.NDArray[np.int64] = pc.fill_null(found.indices, MISSING).to_numpy().astype(np.int64)
    return codes, found.dictionary.to_pylist()


def _networks(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """int64 [N]: a number for the network of each IP address, -1 where there is none."""
    codes, addresses = _codes(column)
    return networks_of(Coded(codes.astype(np.int32), addresses)).codes.astype(np.int64)


def _floats(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """float64 [N], NaN where null."""
    out: npt.NDArray[np.float64] = pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy()
    return out


def _ids(column: pa.ChunkedArray, vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    """int64 [N]: ids of a vocabulary, as `Vocabulary.encode` gives them."""
    found = pc.index_in(column, value_set=pa.array(vocabulary.values, pa.string()), skip_nulls=True)
    out: npt.NDArray[np.int64] = pc.fill_null(found, UNSEEN - FIRST).to_numpy().astype(np.int64) + FIRST
    return out


def _contexts(journal: Journalled, alike: npt.NDArray[np.bool_], width: int) -> npt.NDArray[np.float32]:
    """float32 [N, K], NaN where another model read other numbers."""
    out = np.full((len(alike), width), np.nan, dtype=np.float32)
    for i in np.flatnonzero(alike).tolist():
        if len(journal.context[i]) == width:
            out[i] = journal.context[i]
    return out
