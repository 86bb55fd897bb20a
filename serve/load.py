"""Backfill a service's state with history and its labels, by the code path of live traffic."""

from collections.abc import Callable
from dataclasses import dataclass

from seqfraud.errors import JournalError, RequestError, RunError
from seqfraud.table import Transactions
from serve.alerts import begin_backfill, end_backfill
from serve.arrivals import Arrival, arrivals
from serve.decoding import SaidLabel
from serve.service import Service

GROUP = 1000
"""Records that become durable together."""
SOURCE = AUTHOR = "load"


@dataclass
class Loaded:
    """What a backfill did; labels that were there already do not count."""

    transactions: int = 0
    duplicates: int = 0
    labels: int = 0


def load(
    service: Service,
    table: Transactions,
    until: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Loaded:
    """Post every transaction before `until` (ms) and the labels known by then, in arrival order; then a snapshot.

    None of them becomes an alert: the journal notes from which record to which it was backfilled.

    A load that was interrupted can be run again: what is there already counts as duplicates.

    Raises:
        RequestError: the service refuses a transaction; the message says which.
        RunError: a group of records could not be stored. Memory is then ahead of the journal and the service abandoned.
    """
    try:
        begin_backfill(service.journal)
        done = _load(service, table, until, progress)
        end_backfill(service.journal)
    except JournalError as error:
        service.abandon()
        raise RunError(f"{error}; make room and load again") from error
    except KeyboardInterrupt:
        service.abandon()  # it may have come between a record and its commit to memory: no snapshot of that
        raise
    service.snapshot()
    return done


def _load(service: Service, table: Transactions, until: int | None, progress: Callable[[int], None] | None) -> Loaded:
    done = Loaded()
    # ids as labels name them: a file's own as they are, derived ones as the service derives them
    ids = (table if table.ids is not None else service.identifiers.table(table)).id_texts()
    waiting = iter(arrivals(table, service.bundle.manifest.context.label_delay, None, until, ids))
    while True:
        with service.journal.group():
            for arrival in waiting:
                _post(service, table, arrival, done)
                if arrival.row is not None and done.transactions % GROUP == 0:
                    break
            else:
                return done
        if progress:
            progress(GROUP)


def _post(service: Service, table: Transactions, arrival: Arrival, done: Loaded) -> None:
    if arrival.labels:
        said = [SaidLabel(d.transaction_id, d.is_fraud, d.known_at, SOURCE) for d in arrival.labels]
        heard = service.hear_labels(said, AUTHOR)
        done.labels += len(said) - heard["unchanged"]
    if arrival.row is None:
        return
    try:
        answer = service.score_one(service.decode(arrival.transaction))
    except RequestError as error:
        where = f"row {int(table.file_row[arrival.row]) + 1}"
        raise RequestError(error.status, error.code, f"{where}: {error.message}", error.field) from error
    done.duplicates += answer.duplicate
    done.transactions += 1
