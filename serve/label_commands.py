"""`seqfraud labels`."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from seqfraud.commands import TrustedKeysOption, trusted_keys
from seqfraud.console import bar, print_json
from seqfraud.errors import ConfigError
from seqfraud.reading import LabelColumns
from serve.commands import JsonOption, KeyOption, SettingsOption

FileArgument = Annotated[Path, typer.Argument(help="CSV, Parquet or JSON lines (.jsonl).", metavar="FILE")]
Unit = Literal["iso", "s", "ms"]


def labels(
    file: FileArgument,
    url: Annotated[str | None, typer.Option(help="Address of a running service.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="File with an API key of the role label; else SEQFRAUD_API_KEY.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Instead of --url: state folder of a service that is not running.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="With --state: the bundle that the service serves.")] = None,
    source: Annotated[str, typer.Option(help="Where the labels are known from, such as chargeback.")] = "file",
    transaction: Annotated[
        str, typer.Option("--id", help="Column of the transactions' ids.", metavar="COLUMN")
    ] = LabelColumns.transaction,
    is_fraud: Annotated[
        str,
        typer.Option("--label", help="Column of the labels: 1, 0, true, false; empty: not known.", metavar="COLUMN"),
    ] = LabelColumns.is_fraud,
    known_at: Annotated[
        str,
        typer.Option(
            "--known-at", help="Column that says since when; now where it is empty or not there.", metavar="COLUMN"
        ),
    ] = "known_at",
    time_unit: Annotated[Unit, typer.Option(help="Of numbers in that column.")] = "iso",
    batch: Annotated[int, typer.Option(help="Labels of one request.", min=1)] = 1000,
    trusted: TrustedKeysOption = None,
    identifier_key: KeyOption = None,
    settings: SettingsOption = None,
    json: JsonOption = False,
) -> None:
    """Say in bulk what was fraud: new labels, corrections, labels of transactions that are not known yet.

    Rows are posted in batches in their order; of several with one id the last one counts. A batch is taken whole or not at
    all. What was said before counts as unchanged, so that after an interruption the same command goes on.

    Example: seqfraud labels chargebacks.csv --url http://127.0.0.1:8000 --source chargeback
    """
    from serve.labelling import AUTHOR, over_http, post_labels, read_rows

    if (url is None) == (state is None) or (state is None) != (bundle is None):
        raise ConfigError("labels: expected --url, or --state with --bundle")
    total, rows = read_rows(file, LabelColumns(transaction, is_fraud, known_at), time_unit, source)
    with ExitStack() as opened:
        if url is not None:
            from serve.keys import key_from
            from serve.replay import Client

            post = over_http(Client(url, key_from(key_file)))
        else:
            import msgspec

            from seqfraud.bundle import open_bundle
            from serve.service import Service
            from serve.settings import load_settings

            assert bundle is not None
            assert state is not None
            chosen = load_settings(settings)
            service = opened.enter_context(
                Service(
                    open_bundle(bundle, trusted_keys(trusted)),
                    state,
                    inputs=chosen.input,
                    identifier_key=chosen.identifiers.key_file(identifier_key),
                )
            )

            def post(said: list[dict[str, Any]]) -> Mapping[str, int]:
                counts: dict[str, int] = msgspec.json.decode(service.add_labels(msgspec.json.encode(said), AUTHOR))
                return counts

        progress = opened.enter_context(bar("labels", total))
        done = post_labels(rows, post, batch, progress.advance)
    if json:
        print_json(done.as_dict())
        return
    print(
        f"{done.rows:,} rows: {done.new:,} new, {done.changed:,} changed, {done.unchanged:,} unchanged, "
        f"{done.unknown:,} of transactions that are not known yet, {done.without_label:,} without a label"
    )
