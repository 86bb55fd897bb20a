"""`seqfraud retrain` and `seqfraud gate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from seqfraud.bundle import Bundle, open_bundle
from seqfraud.commands import TrustedKeysOption, trusted_keys
from seqfraud.config import load_config, parse_duration
from seqfraud.console import bar, print_json
from seqfraud.errors import ConfigError
from seqfraud.gate import GateReport
from seqfraud.registry import Registry
from seqfraud.schema import schema_of
from seqfraud.signature import TrustedKeys
from serve import retraining
from serve.commands import JsonOption, KeyOption, TimeOption, instant

REFUSED = 3
AUTHOR = "retrain"
GATE = "gate.json"

StateOption = Annotated[Path, typer.Option(help="The service's state folder; the service may be running.")]
RegistryOption = Annotated[
    Path | None,
    typer.Option(help="Registry: its champion is compared with, the challenger is added to it.", metavar="DIR"),
]
ChampionOption = Annotated[
    Path | None, typer.Option(help="Instead: the bundle that is compared with.", metavar="BUNDLE")
]
CompareOption = Annotated[str, typer.Option(help="How much matured time is compared on.", metavar="DURATION")]
ChallengeOption = Annotated[
    bool, typer.Option("--challenge", help="With --registry: let it score in shadow, if it passes.")
]
AuthorOption = Annotated[str, typer.Option(help="Who does this, for the registry.")]


def retrain(
    config: Annotated[Path, typer.Argument(help="The champion's configuration.", metavar="CONFIG.toml")],
    state: StateOption,
    out: Annotated[Path, typer.Option(help="Folder for the data, the run, the bundle and gate.json.")],
    data: Annotated[Path | None, typer.Option(help="Original files; default data.path, where it is there.")] = None,
    registry: RegistryOption = None,
    champion: ChampionOption = None,
    until: TimeOption = None,
    compare: CompareOption = "14d",
    challenge: ChallengeOption = False,
    author: AuthorOption = AUTHOR,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    sign: Annotated[Path | None, typer.Option(help="Private key to sign the bundle with.")] = None,
    trusted: TrustedKeysOption = None,
    identifier_key: KeyOption = None,
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime.", min=1)] = 2,
    json: JsonOption = False,
) -> None:
    """Train a challenger on what the service has seen, and say in words whether it may take the champion's place.

    Trained by the same configuration on the journal and the original files before it; compared on the newest matured weeks,
    whose labels are not fitted. Exit code 0: it passed; 3: it was refused; 2: it could not be tried.

    Example: seqfraud retrain config.toml --state state --registry registry --out retrained
    """

    def say(words: str) -> None:
        if not json:
            print(words, file=sys.stderr)

    signers = trusted_keys(trusted)
    against = _champion(registry, champion, challenge, signers)
    loaded = load_config(config)
    cuts = _cuts(state, against, until, compare)
    if schema_of(loaded) != against.manifest.schema:
        raise ConfigError(
            f"{config}: other columns than those of the champion {against.id}; expected its configuration"
        )
    if loaded.data.label_delay != against.manifest.context.label_delay:
        raise ConfigError(f"{config}: data.label_delay is not the champion's; maturity would mean two things")
    original = retraining.original_data(config, data)
    out.mkdir(parents=True, exist_ok=True)
    (out / GATE).unlink(missing_ok=True)  # of another challenger
    file = out.resolve() / "data.parquet"
    text = retraining.challenger_config(config, loaded, file, cuts)
    found = retraining.write_training_data(loaded, state, original, identifier_key, cuts.now, file)
    (out / "config.toml").write_text(text, encoding="utf-8")
    say(
        f"{found.journal:,} transactions of the journal and {found.original:,} of {original or 'no file'} before it, "
        f"{found.labelled:,} labelled, {found.frauds:,} frauds"
    )
    bundle = open_bundle(retraining.train_challenger(out, device, sign, say), signers)
    with bar("comparing", None):
        report = retraining.compare(against, bundle, state, cuts, threads)
    retraining.write_report(report, out / GATE)
    _settle(report, bundle, registry, signers, challenge, author, json)


def gate(
    challenger: Annotated[Path, typer.Argument(help="A bundle folder.", metavar="BUNDLE")],
    state: StateOption,
    out: Annotated[Path | None, typer.Option(help="gate.json to write.")] = None,
    registry: RegistryOption = None,
    champion: ChampionOption = None,
    until: TimeOption = None,
    compare: CompareOption = "14d",
    challenge: ChallengeOption = False,
    author: AuthorOption = AUTHOR,
    trusted: TrustedKeysOption = None,
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime.", min=1)] = 2,
    json: JsonOption = False,
) -> None:
    """Say whether a bundle that is there already may take the champion's place: the second half of `seqfraud retrain`.

    Exit code 0: it passed; 3: it was refused; 2: it could not be tried.

    Example: seqfraud gate bundles/other --state state --champion bundles/champion
    """
    signers = trusted_keys(trusted)
    against, bundle = _champion(registry, champion, challenge, signers), open_bundle(challenger, signers)
    cuts = _cuts(state, against, until, compare)
    with bar("comparing", None):
        report = retraining.compare(against, bundle, state, cuts, threads)
    if out is not None:
        retraining.write_report(report, out)
    _settle(report, bundle, registry, signers, challenge, author, json)


def _champion(registry: Path | None, champion: Path | None, challenge: bool, signers: TrustedKeys | None) -> Bundle:
    if challenge and registry is None:
        raise ConfigError("--challenge: expected --registry with it")
    if (registry is None) == (champion is None):
        raise ConfigError("expected --registry or --champion, one of them")
    if champion is not None:
        return open_bundle(champion, signers)
    assert registry is not None
    models = Registry(registry, signers)
    return models.open(models.resolve("champion"))


def _cuts(state: Path, champion: Bundle, until: str | None, compare: str) -> retraining.Cuts:
    try:
        span = parse_duration(compare)
    except ValueError as error:
        raise ConfigError(f"--compare: {error}") from None
    manifest = champion.manifest
    now = instant("--until", until)
    if now is None:
        now = retraining.newest_time(state, manifest.schema)
    return retraining.Cuts.of(now, manifest.context.label_delay, span)


def _settle(
    report: GateReport,
    bundle: Bundle,
    registry: Path | None,
    signers: TrustedKeys | None,
    challenge: bool,
    author: str,
    json: bool,
) -> None:
    """Tell, keep it in the registry, and end with the gate's exit code."""
    if registry is not None:
        models = Registry(registry, signers)
        outcome = report.text().splitlines()[0]
        models.add(bundle.path, author, outcome)
        models.attach(bundle.id, GATE, retraining.report_text(report).encode())
        if challenge and report.passed and bundle.id not in models.challengers:
            models.challenge(bundle.id, author, outcome)
    print_json(report.as_dict()) if json else print(report.text())
    if not report.passed:
        raise typer.Exit(REFUSED)
