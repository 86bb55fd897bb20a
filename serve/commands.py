"""`seqfraud verify`, `score`, `load`, `serve`, `keys`, `repair` and `replay`."""

import sys
import time as clock_time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import typer

from seqfraud.bundle import Bundle, open_bundle
from seqfraud.commands import TrustedKeysOption, trusted_keys
from seqfraud.config import format_instant, parse_duration, parse_instant
from seqfraud.console import bar, print_cleaning, print_json
from seqfraud.errors import ConfigError, RegistryError, RunError
from seqfraud.registry import Registry

BundleOption = Annotated[Path, typer.Option(help="A bundle folder.")]
SettingsOption = Annotated[Path | None, typer.Option(help="TOML file with the service's settings.")]
StateOption = Annotated[Path, typer.Option(help="The service's state folder; made if it is not there.")]
DataArgument = Annotated[Path, typer.Argument(help="CSV or Parquet, a file or a folder.", metavar="DATA")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Promise = Literal["process", "disk"]
KeyOption = Annotated[
    Path | None, typer.Option("--identifier-key", help="File of the key that identifiers are hashed with.")
]
LogFormat = Literal["json", "text"]
LISTED = ("id", "roles", "created", "expires", "revoked", "note")
Section = TypeVar("Section")
TimeOption = Annotated[str | None, typer.Option(help="ISO 8601 time.", metavar="TIME")]


def verify(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle folder.", metavar="[BUNDLE]")] = None,
    trusted: TrustedKeysOption = None,
    state: Annotated[Path | None, typer.Option(help="Verify the journal of this state folder, not a bundle.")] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A head that the service logged before, SEQ:HASH; may be given again.", metavar="SEQ:HASH"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a bundle's files and the parity of its graphs with the trained module's reference vectors.

    With --state check that no record of a service's journal was changed, removed, moved or inserted, and that the heads
    that were noted before are still on its chain; the service may be running.

    Example: seqfraud verify bundle
    """
    if (bundle is None) == (state is None) or (head and state is None) or (trusted and bundle is None):
        raise ConfigError("verify: expected a bundle, or --state with any number of --head; see seqfraud verify --help")
    if state is not None:
        _verify_journal(state, head or [], json)
        return
    from seqfraud.verification import verify_bundle

    assert bundle is not None
    measured = verify_bundle(bundle, trusted_keys(trusted))
    if json:
        print_json(measured)
        return
    width = max(map(len, measured))
    for name, figures in measured.items():
        print(f"{name:{width}}  " + "  ".join(f"{what} {value:.2g}" for what, value in figures.items()))
    print(f"{bundle}: {len(measured)} checks passed")


def _verify_journal(state: Path, heads: list[str], json: bool) -> None:
    from serve.audit import audit, parse_head

    claims = [parse_head(text) for text in heads]
    with bar("verifying", sum(file.stat().st_size for file in state.glob("journal/*.log"))) as progress:
        found = audit(state, claims, progress.advance)
    if json:
        print_json({"whole": found.first_bad is None, **vars(found)})
    elif found.first_bad is None:
        print(f"{state}: {found.records:,} records in {found.files} files are as they were written")
        print(f"on the chain: {', '.join(found.agrees) or 'no head was noted'}")
        print(f"head {found.head}")
    if found.first_bad is not None:
        print(f"error: {state}: record {found.first_bad} is not as it was written: {found.reason}", file=sys.stderr)
        raise typer.Exit(1)


def score(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.", metavar="BUNDLE")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    data: Annotated[Path | None, typer.Argument(help="CSV or Parquet, a file or a folder.", metavar="DATA")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Score the journal of this state folder, in its order, instead of a file.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime.", min=1)] = 2,
    trusted: TrustedKeysOption = None,
    identifier_key: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Score in arrival order: transaction_id, fraud_probability, is_fraud, decision.

    Rows of a file that repeat an id count once, as the service would have it. With --state everything that a service
    accepted is scored again from its journal, which must give what it answered; the service may be running. With
    --identifier-key the ids of a file are those of the service that has this key, else the file's own.

    Example: seqfraud score bundle transactions.parquet --out scores.parquet
    """
    from seqfraud.bulk import Scores, read_with_report, score_table, write_scores
    from seqfraud.identifiers import Identifiers, read_key

    if (data is None) == (state is None):
        raise ConfigError("score: expected a file or --state, one of them")
    if state is not None and identifier_key is not None:
        raise ConfigError("--identifier-key: what a journal holds is hashed already")
    key = None if identifier_key is None else read_key(identifier_key)
    opened = open_bundle(bundle, trusted_keys(trusted))
    summary: dict[str, Any] = {"model": opened.id}
    if state is not None:
        from serve.offline import score_journal

        scored = score_journal(opened, state, threads)
    else:
        assert data is not None
        table, summary["cleaning"] = read_with_report(opened, data)
        print_cleaning(summary["cleaning"])
        with bar("scoring", len(table)) as progress:
            probability = score_table(opened, table, threads, progress.advance)
        ids = Identifiers(table.schema, opened.manifest.identifiers, key).table(table).id_texts()
        scored = Scores(ids, probability, table.amount())
    flagged = write_scores(out, scored, opened.manifest.policy)
    if json:
        print_json({**summary, "rows": len(scored.ids), "is_fraud": flagged, "out": str(out)})
    else:
        print(f"{len(scored.ids):,} transactions scored with {opened.id}, {flagged:,} flagged: {out}")


def load(
    data: DataArgument,
    bundle: BundleOption,
    state: StateOption,
    until: TimeOption = None,
    trusted: TrustedKeysOption = None,
    identifier_key: KeyOption = None,
    settings: SettingsOption = None,
    json: JsonOption = False,
) -> None:
    """Backfill a service's state with history and its labels, by the code path of live traffic.

    Example: seqfraud load history.parquet --bundle bundle --state state --until 2018-08-08
    """
    from seqfraud.bulk import read_with_report
    from serve.load import load as load_table
    from serve.service import Service
    from serve.settings import load_settings

    chosen = load_settings(settings)
    key = chosen.identifiers.key_file(identifier_key)
    end = instant("--until", until)
    opened = open_bundle(bundle, trusted_keys(trusted))
    table, cleaning = read_with_report(opened, data)
    print_cleaning(cleaning)
    rows = len(table) if end is None else int((table.time < end).sum())
    with (
        Service(opened, state, inputs=chosen.input, identifier_key=key) as service,
        bar("loading", rows) as progress,
    ):
        done = load_table(service, table, end, progress.advance)
    if json:
        print_json({**vars(done), "model": opened.id})
    else:
        print(f"{done.transactions:,} transactions ({done.duplicates:,} known before), {done.labels:,} labels: {state}")


def serve(
    state: StateOption,
    bundle: Annotated[Path | None, typer.Option(help="A bundle folder; or --registry.")] = None,
    registry: Annotated[
        Path | None, typer.Option(help="A registry of models: its champion answers, its challengers score in shadow.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; 127.0.0.1 if not set.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 8000 if not set.", min=0, max=65535)] = None,
    settings: SettingsOption = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, as `seqfraud keys add` makes it.")] = None,
    without_keys: Annotated[
        bool | None, typer.Option("--without-keys", help="Let everybody do everything, on any address.")
    ] = None,
    access_log: Annotated[bool | None, typer.Option(help="One log line per request.")] = None,
    log_format: Annotated[LogFormat | None, typer.Option(help="Log lines; json if not set.")] = None,
    promise: Annotated[
        Promise, typer.Option(help="What an answer survives: the death of the process, or a power cut (disk) too.")
    ] = "process",
    snapshot_seconds: Annotated[
        float, typer.Option(help="Seconds between snapshots, if some thousand records came.", min=0.01)
    ] = 300.0,
    trusted: TrustedKeysOption = None,
    identifier_key: KeyOption = None,
) -> None:
    """The scoring service: POST /v1/score, and the rest of the HTTP interface.

    With --registry the registry's champion answers, and POST /v1/model lets another model come into force.

    Example: seqfraud serve --bundle bundle --state state --port 8000
    """
    from serve.keys import Keyring
    from serve.logs import AccessLog, configure_logs
    from serve.metrics import Registry as Measured
    from serve.server import Door, serve_forever
    from serve.service import Service
    from serve.settings import load_settings

    given = load_settings(settings)
    server = with_flags(given.server, host=host, port=port)
    log = with_flags(given.log, access=access_log, format=log_format)
    access = with_flags(given.keys, file=None if keys is None else str(keys), without=without_keys)
    if access.file and access.without:
        raise ConfigError("keys: there is a file of keys, and `without` them (--without-keys); expected one of them")
    writer = configure_logs(log)
    door = Door(
        keys=Keyring(Path(access.file)) if access.file else None,
        without_keys=access.without,
        tls=given.tls,
        access=AccessLog(writer) if log.access else None,
        metrics=Measured(),
    )
    signers = given.bundle.trusted_keys if trusted is None else str(trusted)
    signed_by = trusted_keys(None if signers is None else Path(signers))
    folder = registry or (Path(given.bundle.registry) if given.bundle.registry and bundle is None else None)
    if (bundle is None) == (folder is None):
        raise ConfigError("serve: expected --bundle or --registry, one of them")
    models = None if folder is None else Registry(folder, signed_by)
    opened = _champion(models) if models is not None else open_bundle(bundle or Path(), signed_by)
    key = given.identifiers.key_file(identifier_key)

    def make_service() -> Service:
        return Service(
            opened,
            state,
            promise=promise,
            snapshot_every=snapshot_seconds,
            inputs=given.input,
            fallback=given.fallback,
            identifier_key=key,
            webhook=given.webhook,
            metrics=door.metrics,
            registry=models,
            shadow=given.shadow,
        )

    code = serve_forever(make_service, server, door, given.overload, given.limits)
    if code:
        raise typer.Exit(code)


def _champion(registry: Registry) -> Bundle:
    """The bundle that a registry says is to be served. Raises RegistryError where it names none."""
    champion = registry.champion
    if champion is None:
        raise RegistryError(f"{registry.folder}: there is no champion yet; see `seqfraud models promote`")
    return registry.open(champion)


def keys(
    action: Annotated[Literal["add", "list", "revoke"], typer.Argument(help="What to do.", metavar="add|list|revoke")],
    file: Annotated[Path, typer.Option(help="File of API keys; made if it is not there.")],
    identity: Annotated[str | None, typer.Argument(help="Which key to revoke.", metavar="[ID]")] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(help="score, label, metrics or admin: what a new key may do; may be given again."),
    ] = None,
    expires: Annotated[str | None, typer.Option(help="ISO 8601 time, or from now such as 90d.", metavar="TIME")] = None,
    note: Annotated[str, typer.Option(help="For whoever lists the keys.")] = "",
    json: JsonOption = False,
) -> None:
    """Make, list and revoke the service's API keys. A running service follows the file within a second.

    A new key is printed once, alone on stdout; the file holds only its hash. To rotate: add one, give it to the
    client, revoke the old one.

    Example: seqfraud keys add --file keys.json --role score --expires 90d --note checkout
    """
    from serve.keys import add_key, read_keys, revoke_key

    now = clock_time.time()
    if (action == "revoke") != (identity is not None):
        raise ConfigError("keys: expected an ID with revoke, and only there")
    if action != "add" and (role or expires or note):
        raise ConfigError("keys: --role, --expires and --note are for add")
    if action == "add":
        key, text = add_key(file, role or [], now, moment("--expires", expires, now), note)
        if json:
            print_json({"key": text, "id": key.id, "roles": key.roles, "expires": key.expires})
        else:
            print(text)
            print(f"this is the only time that the key is shown; the id for revoking it is {key.id}", file=sys.stderr)
    elif action == "revoke":
        assert identity is not None
        revoke_key(file, identity, now)
        print_json({"id": identity}) if json else print(f"{identity} is revoked")
    else:
        known = read_keys(file)
        if json:
            print_json([{"state": k.state(now)} | {n: getattr(k, n) for n in LISTED} for k in known])
            return
        for k in known:
            until = f"until {k.expires}" if k.expires else "without end"
            print(f"{k.id}  {'+'.join(k.roles):17}  {k.state(now):8}  {k.created}  {until}  {k.note}")


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
    data: Annotated[Path | None, typer.Argument(help="CSV or Parquet, a file or a folder.", metavar="[DATA]")] = None,
    url: Annotated[str | None, typer.Option(help="Address of a running service.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="File with an API key for score and label; else SEQFRAUD_API_KEY.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Transactions per second at most.", min=1e-6)] = None,
    since: TimeOption = None,
    until: TimeOption = None,
    limit: Annotated[int | None, typer.Option(help="Transactions at most.", min=1)] = None,
    against: Annotated[Path | None, typer.Option(help="Scores written by `seqfraud score` to compare with.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference of a probability that passes.")] = 1e-5,
    identifier_key: KeyOption = None,
    decision: Annotated[
        str | None,
        typer.Option(help="Instead: work the decision on this transaction out again.", metavar="TRANSACTION_ID"),
    ] = None,
    state: Annotated[Path | None, typer.Option(help="With --decision: the service's state folder.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="With --decision: the bundle that decided.")] = None,
    recorded_context: Annotated[
        bool, typer.Option("--recorded-context", help="With --decision: do not work the context out again.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Stream a file through a running service in arrival order, labels interleaved when they become known.

    --identifier-key belongs here where `seqfraud score` had it; the service is asked for ids that depend on its key.

    With --decision derive the probability, the decision and the reasons of one transaction again from the journal and the
    bundle that decided, and say whether they are what was answered. Nothing is posted; the service may be running.

    Example: seqfraud replay data.parquet --url http://127.0.0.1:8000 --since 2018-08-08 --against scores.parquet
    """
    if decision is not None:
        if data is not None or url is not None or state is None or bundle is None:
            raise ConfigError("replay: expected --state and --bundle with --decision, and no DATA or --url")
        _replay_decision(decision, state, bundle, identifier_key, not recorded_context, json)
        return
    if data is None or url is None or state is not None or bundle is not None or recorded_context:
        raise ConfigError("replay: expected DATA and --url, or --decision with --state and --bundle")
    from seqfraud.bulk import read_for
    from seqfraud.bundle import LabelSource
    from seqfraud.config import CleaningConfig, IdentifiersConfig
    from seqfraud.identifiers import read_key
    from seqfraud.schema import Schema
    from serve.keys import key_from
    from serve.replay import Client
    from serve.replay import replay as replay_table

    begin, end = instant("--since", since), instant("--until", until)
    client = Client(url, key_from(key_file))
    status, model = client.call("GET", "/v1/model")
    if status != 200 or not isinstance(model, dict) or not {"schema", "label", "cleaning", "context"} <= set(model):
        raise RunError(f"--url: {url}/v1/model answered {status} and no model; is this a seqfraud service?")
    label, delay = LabelSource(**model["label"]), int(model["context"]["label_delay"])
    policy = CleaningConfig(**model["cleaning"])
    identifiers = IdentifiersConfig(**model.get("identifiers", {"default": "keep"}))
    key = None if identifier_key is None else read_key(identifier_key)
    table = read_for(Schema.from_dict(model["schema"]), label, delay, policy, data)[0]
    rows = int(((table.time >= (begin or table.time[0])) & (table.time < (end or table.time[-1] + 1))).sum())
    with bar("replaying", min(rows, limit or rows)) as progress:
        done = replay_table(
            client, table, delay, identifiers, key,
            since=begin, until=end, limit=limit, rate=rate, progress=progress.advance,
        )  # fmt: skip
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


def _replay_decision(
    identity: str, state: Path, bundle: Path, identifier_key: Path | None, with_context: bool, json: bool
) -> None:
    import msgspec

    from serve.retrace import TOLERANCE, retrace

    with bar("reading the journal", None) as progress:
        found = retrace(open_bundle(bundle), state, identity, identifier_key, with_context, progress.advance)
    answered, derived = msgspec.to_builtins(found.answered), msgspec.to_builtins(found.derived)
    if json:
        print_json(
            {
                "agrees": not found.differs,
                "differs": found.differs,
                "record": found.seq,
                "answered": answered,
                "derived": derived,
                "context_difference": found.context_difference,
            }
        )
    else:
        print(f"record {found.seq}, by the bundle {found.answered.model}")
        print(f"{'':17}  {'answered':24}  derived again")
        for name in ("fraud_probability", "is_fraud", "decision", "reasons", "history", "late"):
            print(f"{name:17}  {answered[name]!s:24}  {derived[name]}")
        if found.context_difference is not None:
            print(f"{'context':17}  {'as recorded':24}  differs by {found.context_difference:.2g} at most")
    if found.differs:
        words = f"{', '.join(found.differs)} of {identity!r} cannot be derived again to {TOLERANCE:g}"
        print(f"error: {words}", file=sys.stderr)
        raise typer.Exit(1)


def with_flags(section: Section, **flags: Any) -> Section:
    """A section of the settings with the flags that were given."""
    return replace(section, **{name: value for name, value in flags.items() if value is not None})  # type: ignore[type-var]


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


def moment(option: str, text: str | None, now: float) -> str | None:
    """ISO text in UTC of an option's ISO time, or of a duration from `now` (seconds since the epoch)."""
    if text is None:
        return None
    try:
        return format_instant(int(now * 1000) + parse_duration(text))
    except ValueError:
        return format_instant(instant(option, text) or 0)
