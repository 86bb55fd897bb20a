"""`seqfraud score`, `seqfraud load`, `seqfraud serve`, `seqfraud repair` and `seqfraud replay`."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from seqfraud.bundle import open_bundle
from seqfraud.config import parse_instant
from seqfraud.console import bar, print_cleaning, print_json
from seqfraud.errors import ConfigError, RunError

BundleOption = Annotated[Path, typer.Option(help="A bundle folder.")]
StateOption = Annotated[Path, typer.Option(help="The service's state folder; made if it is not there.")]
DataArgument = Annotated[Path, typer.Argument(help="CSV or Parquet, a file or a folder.", metavar="DATA")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Promise = Literal["process", "disk"]
TimeOption = Annotated[str | None, typer.Option(help="ISO 8601 time.", metavar="TIME")]


def score(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.", metavar="BUNDLE")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    data: Annotated[Path | None, typer.Argument(help="CSV or Parquet, a file or a folder.", metavar="DATA")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Score the journal of this state folder, in its order, instead of a file.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime.", min=1)] = 2,
    json: JsonOption = False,
) -> None:
    """Score in arrival order: transaction_id, fraud_probability, is_fraud, decision.

    Rows of a file that repeat an id count once, as the service would have it. With --state everything that a service
    accepted is scored again from its journal, which must give what it answered; the service may be running.

    Example: seqfraud score bundle transactions.parquet --out scores.parquet
    """
    from seqfraud.bulk import read_with_report, score_table, write_scores

    if (data is None) == (state is None):
        raise ConfigError("score: expected a file or --state, one of them")
    opened = open_bundle(bundle)
    summary: dict[str, Any] = {"model": opened.id}
    if state is not None:
        from serve.offline import score_journal

        ids, probability = score_journal(opened, state, threads)
    else:
        assert data is not None
        table, summary["cleaning"] = read_with_report(opened, data)
        print_cleaning(summary["cleaning"])
        with bar("scoring", len(table)) as progress:
            probability = score_table(opened, table, threads, progress.advance)
        ids = table.id_texts()
    flagged = write_scores(out, ids, probability, opened.manifest.thresholds)
    if json:
        print_json({**summary, "rows": len(ids), "is_fraud": flagged, "out": str(out)})
    else:
        print(f"{len(ids):,} transactions scored with {opened.id}, {flagged:,} flagged: {out}")


def load(
    data: DataArgument,
    bundle: BundleOption,
    state: StateOption,
    until: TimeOption = None,
    json: JsonOption = False,
) -> None:
    """Backfill a service's state with history and its labels, by the code path of live traffic.

    Example: seqfraud load history.parquet --bundle bundle --state state --until 2018-08-08
    """
    from seqfraud.bulk import read_with_report
    from serve.load import load as load_table
    from serve.service import Service

    end = instant("--until", until)
    opened = open_bundle(bundle)
    table, cleaning = read_with_report(opened, data)
    print_cleaning(cleaning)
    rows = len(table) if end is None else int((table.time < end).sum())
    with Service(opened, state) as service, bar("loading", rows) as progress:
        done = load_table(service, table, end, progress.advance)
    if json:
        print_json({**vars(done), "model": opened.id})
    else:
        print(f"{done.transactions:,} transactions ({done.duplicates:,} known before), {done.labels:,} labels: {state}")


def serve(
    bundle: BundleOption,
    state: StateOption,
    host: Annotated[str | None, typer.Option(help="Address to bind; 127.0.0.1 if not set.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 8000 if not set.", min=0, max=65535)] = None,
    settings: Annotated[Path | None, typer.Option(help="TOML file with the service's settings.")] = None,
    access_log: Annotated[bool | None, typer.Option(help="One line per request.")] = None,
    promise: Annotated[
        Promise, typer.Option(help="What an answer survives: the death of the process, or a power cut (disk) too.")
    ] = "process",
    snapshot_seconds: Annotated[
        float, typer.Option(help="Seconds between snapshots, if some thousand records came.", min=0.01)
    ] = 300.0,
) -> None:
    """The scoring service: POST /v1/score, and the rest of the HTTP interface.

    Example: seqfraud serve --bundle bundle --state state --port 8000
    """
    from serve.server import serve_forever
    from serve.service import Service
    from serve.settings import load_settings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("_granian").setLevel(logging.WARNING)
    flags: dict[str, Any] = {"host": host, "port": port, "log_access": access_log}
    loaded = load_settings(settings)
    server = replace(loaded.server, **{k: v for k, v in flags.items() if v is not None})
    opened = open_bundle(bundle)
    code = serve_forever(
        lambda: Service(opened, state, promise=promise, snapshot_every=snapshot_seconds),
        server,
        loaded.overload,
        loaded.limits,
    )
    if code:
        raise typer.Exit(code)


def repair(
    state: Annotated[Path, typer.Argument(help="A service's state folder.", metavar="STATE")],
    cut: Annotated[bool, typer.Option("--cut", help="Move everything from the first bad record on aside.")] = False,
) -> None:
    """Say whether a journal is whole; with --cut, give up what comes after the first bad record.

    What is cut is kept in files beside the log; the index and newer snapshots are removed and made again.

    Example: seqfraud repair state --cut
    """
    from serve.repair import repair as repair_state

    whole, words = repair_state(state, cut)
    print(words)
    if not whole:
        raise typer.Exit(1)


def replay(
    data: DataArgument,
    url: Annotated[str, typer.Option(help="Address of a running service.")],
    rate: Annotated[float | None, typer.Option(help="Transactions per second at most.", min=1e-6)] = None,
    since: TimeOption = None,
    until: TimeOption = None,
    limit: Annotated[int | None, typer.Option(help="Transactions at most.", min=1)] = None,
    against: Annotated[Path | None, typer.Option(help="Scores written by `seqfraud score` to compare with.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference of a probability that passes.")] = 1e-5,
    json: JsonOption = False,
) -> None:
    """Stream a file through a running service in arrival order, labels interleaved when they become known.

    Example: seqfraud replay data.parquet --url http://127.0.0.1:8000 --since 2018-08-08 --against scores.parquet
    """
    from seqfraud.bulk import read_for
    from seqfraud.bundle import LabelSource
    from seqfraud.config import CleaningConfig
    from seqfraud.schema import Schema
    from serve.replay import Client
    from serve.replay import replay as replay_table

    begin, end = instant("--since", since), instant("--until", until)
    client = Client(url)
    status, model = client.call("GET", "/v1/model")
    if status != 200 or not isinstance(model, dict) or not {"schema", "label", "cleaning", "context"} <= set(model):
        raise RunError(f"--url: {url}/v1/model answered {status} and no model; is this a seqfraud service?")
    label, delay = LabelSource(**model["label"]), int(model["context"]["label_delay"])
    policy = CleaningConfig(**model["cleaning"])
    table = read_for(Schema.from_dict(model["schema"]), label, delay, policy, data)[0]
    rows = int(((table.time >= (begin or table.time[0])) & (table.time < (end or table.time[-1] + 1))).sum())
    with bar("replaying", min(rows, limit or rows)) as progress:
        done = replay_table(
            client, table, delay, since=begin, until=end, limit=limit, rate=rate, progress=progress.advance
        )
    summary = {
        "model": model["model"],
        "transactions": len(done.seconds),
        "labels": done.labels,
        "duplicates": done.duplicates,
        "decisions": done.decisions,
        "milliseconds": {
            f"p{q:g}": float(np.percentile(done.seconds, q)) * 1000 for q in (50, 99, 99.9) if done.seconds
        },
    }
    failed = False
    if against is not None:
        largest, compared = done.largest_difference(scores_of(against))
        summary |= {"compared": compared, "largest_difference": largest}
        failed = compared == 0 or not largest <= tolerance
    if json:
        print_json(summary)
    else:
        for name, value in summary.items():
            print(f"{name:20} {value}")
    if failed:
        print(f"error: the probabilities differ from {against} by more than {tolerance:g}", file=sys.stderr)
        raise typer.Exit(1)


def scores_of(path: Path) -> dict[str, float]:
    """Probabilities by transaction id of a file written by `seqfraud score`."""
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise ConfigError(f"--against: {path}: no such file")
    table = parquet.read_table(path, columns=["transaction_id", "fraud_probability"])
    return dict(zip(table["transaction_id"].to_pylist(), table["fraud_probability"].to_pylist(), strict=True))


def instant(option: str, text: str | None) -> int | None:
    """Milliseconds of an ISO time given to an option. Raises ConfigError."""
    if text is None:
        return None
    try:
        return parse_instant(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
