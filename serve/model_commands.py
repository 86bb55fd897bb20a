"""`seqfraud models`."""

import getpass
from dataclasses import asdict
from pathlib import Path
from time import time
from typing import Annotated, Any, Literal

import typer

from seqfraud.bundle import MANIFEST, Bundle, open_bundle
from seqfraud.card import FIGURES, concerns, role
from seqfraud.commands import TrustedKeysOption, trusted_keys
from seqfraud.console import figure, print_json
from seqfraud.errors import ConfigError, RunError
from seqfraud.modeldiff import Compared, compare
from seqfraud.modelevents import iso
from seqfraud.registry import Registry

ModelAction = Literal[
    "list", "show", "diff", "promote", "rollback", "add", "challenge", "withdraw", "card", "attach", "export"
]
ARGUMENTS: dict[ModelAction, tuple[str, ...]] = {
    "list": (),
    "show": ("NAME",),
    "diff": ("A", "B"),
    "promote": ("NAME",),
    "rollback": (),
    "add": ("BUNDLE",),
    "challenge": ("NAME",),
    "withdraw": ("NAME",),
    "card": ("NAME",),
    "attach": ("NAME", "FILE"),
    "export": ("NAME",),
}
SERVICE_SAYS: dict[ModelAction, str] = {
    "promote": "promote",
    "rollback": "rollback",
    "challenge": "shadow",
    "withdraw": "withdraw",
}
"""What POST /v1/model calls it."""
TIMEOUT_S = 3600.0
"""A service answers when the model is in step with its journal."""


def models(
    action: Annotated[ModelAction, typer.Argument(help="What to do.", metavar="|".join(ARGUMENTS))],
    what: Annotated[
        list[str] | None, typer.Argument(help="What it is done to.", metavar="[NAME|BUNDLE|FILE]...")
    ] = None,
    registry: Annotated[Path | None, typer.Option(help="The registry's folder; made by add.")] = None,
    reason: Annotated[str, typer.Option(help="Why; kept with the event.")] = "",
    author: Annotated[str | None, typer.Option(help="Who does it; the user of this machine if not set.")] = None,
    url: Annotated[str | None, typer.Option(help="Ask the service that runs here to do it.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="With --url: file with an API key for admin; else SEQFRAUD_API_KEY.")
    ] = None,
    mlflow: Annotated[Path | None, typer.Option(help="With export: the folder to write, in MLflow's layout.")] = None,
    trusted: TrustedKeysOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Models in a folder: which answers, which is tried beside it, who put it there and why.

    NAME is a model's id or the beginning of it (8 digits), champion, previous or challenger; with diff also a bundle
    folder. A service that runs on the registry changes its model without a pause where --url asks it; without --url
    the registry alone is changed, and a service follows at its next start.

    Example: seqfraud models promote challenger --registry models --reason "passed the gate" --url http://127.0.0.1:8000
    """
    given = tuple(what or ())
    if len(given) != len(ARGUMENTS[action]):
        expected = " and ".join(ARGUMENTS[action]) or "nothing"
        raise ConfigError(f"models {action}: expected {expected} after it, seen {len(given)} words")
    if (mlflow is not None) != (action == "export"):
        raise ConfigError("models: expected --mlflow with export, and only there")
    if url is not None:
        if action not in SERVICE_SAYS or author is not None:
            raise ConfigError(f"models: --url is for {', '.join(SERVICE_SAYS)}, and the author is the API key's id")
        _ask_service(url, key_file, action, given, reason, json)
        return
    if registry is None:
        raise ConfigError("models: expected --registry, the folder of the models")
    held = Registry(registry, trusted_keys(trusted))
    if action in ("list", "show", "diff", "card"):
        _look(held, action, given, json)
    else:
        _change(held, action, given, _user() if author is None else author, reason, mlflow, json)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise ConfigError("--author: missing, and this machine does not know who you are") from error


def _look(held: Registry, action: ModelAction, given: tuple[str, ...], json: bool) -> None:
    if action == "list":
        _list(held, json)
    elif action == "show":
        _show(held, held.resolve(given[0]), json)
    elif action == "diff":
        a, b = (_bundle(held, name) for name in given)
        compared = compare(a, b)
        print_json(asdict(compared)) if json else _print_diff(compared)
    else:
        text = held.card(held.resolve(given[0]))
        print_json({"card": text}) if json else print(text)


def _change(
    held: Registry, action: ModelAction, given: tuple[str, ...], who: str, reason: str, mlflow: Path | None, json: bool
) -> None:
    if action == "add":
        model = held.add(Path(given[0]), who, reason)
        words = f"{model} is in {held.folder}"
    elif action == "rollback":
        model = held.rollback(who, reason)
        words = f"{model} is the champion again"
    else:
        model = held.resolve(given[0])
        if action == "promote":
            held.promote(model, who, reason)
            words = f"{model} is the champion"
        elif action == "challenge":
            held.challenge(model, who, reason)
            words = f"{model} is a challenger"
        elif action == "withdraw":
            held.withdraw(model, who, reason)
            words = f"{model} is no challenger any more"
        elif action == "attach":
            words = f"{_attach(held, model, Path(given[1]))} is kept by {model}"
        else:
            from seqfraud.mlflowlayout import export_mlflow

            assert mlflow is not None
            export_mlflow(held.open(model), held.card(model), mlflow, iso(time()))
            words = f"{model} in MLflow's layout: {mlflow}"
    standing = held.standing()
    if json:
        print_json({"model": model, "champion": standing.champion, "challengers": list(standing.challengers)})
    else:
        print(words)


def _attach(held: Registry, model: str, file: Path) -> str:
    try:
        return held.attach(model, file.name, file.read_bytes()).name
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def _bundle(held: Registry, name: str) -> Bundle:
    path = Path(name)
    return open_bundle(path) if (path / MANIFEST).is_file() else held.open(held.resolve(name))


def _list(held: Registry, json: bool) -> None:
    standing, events = held.standing(), held.events()
    rows = []
    for model in standing.models:
        newest = [event for event in events if event.model == model][-1]
        rows.append({"model": model, "role": role(model, standing), "since": newest.at, "by": newest.author,
                     "action": newest.action, "reason": newest.reason})  # fmt: skip
    if json:
        print_json({"champion": standing.champion, "previous": standing.previous,
                    "challengers": list(standing.challengers), "models": rows})  # fmt: skip
        return
    for row in rows:
        about = f"{row['action']} by {row['by']}: {_line(row['reason'])}".rstrip(": ")
        print(f"{row['model']}  {row['role']:15}  {row['since']:24}  {about}")


def _show(held: Registry, model: str, json: bool) -> None:
    bundle, standing = held.open(model), held.standing()
    manifest = bundle.manifest
    fingerprint = manifest.fingerprint
    about: dict[str, Any] = {
        "model": model,
        "role": role(model, standing),
        "kind": manifest.kind,
        "path": str(bundle.path),
        "signed_by": bundle.signed_by,
        "trained": {name: fingerprint.get(name) for name in ("first", "last", "rows", "frauds", "users")},
        "decision": manifest.policy.as_dict(),
        "metrics": {k: v for k, v in manifest.metrics.items() if k in ("validation", "test")},
        "versions": dict(manifest.versions),
        "attached": list(held.attached(model)),
        "events": [asdict(event) for event in held.events() if concerns(event, model)],
    }
    if json:
        print_json(about)
        return
    for name, value in about.items():
        if name != "events":
            print(f"{name:12} {_words(value)}")
    for event in about["events"]:
        print(
            f"{event['at']:24}  {event['action']} {event['model']} by {event['author']}: {_line(event['reason'])}".rstrip(
                ": "
            )
        )


def _line(reason: str) -> str:
    return " ".join(reason.split())


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(of)}" for name, of in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _print_diff(compared: Compared) -> None:
    print(f"{'':40}  {compared.a:>20}  {compared.b:>20}")
    for d in compared.differences:
        print(f"{f'{d.section}: {d.name}':40}  {_size(d.a):>20}  {_size(d.b):>20}  {d.words}".rstrip())
    if not compared.differences:
        print("nothing differs")
    for part, name, a, b in compared.figures:
        change = "" if a is None or b is None else f"{b - a:>+12.4g}"
        print(f"{f'{part}: {FIGURES[name]}':44}  {_figure(a):>16}  {_figure(b):>20}{change}".rstrip())


def _figure(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else figure(value)


def _size(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list | tuple) else _words(value)


def _ask_service(
    url: str, key_file: Path | None, action: ModelAction, given: tuple[str, ...], reason: str, json: bool
) -> None:
    from serve.keys import key_from
    from serve.replay import Client

    body = {"action": SERVICE_SAYS[action], "reason": reason} | ({"model": given[0]} if given else {})
    status, answer = Client(url, key_from(key_file), TIMEOUT_S).call("POST", "/v1/model", body)
    if status != 200 or not isinstance(answer, dict):
        error = answer.get("error", {}) if isinstance(answer, dict) else {}
        raise RunError(f"{url}/v1/model: the service answered {status}: {error.get('message', answer)}")
    print_json(answer) if json else print(f"{url}: the champion is {answer.get('model')}")
