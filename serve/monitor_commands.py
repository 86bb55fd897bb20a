"""`seqfraud monitor`."""

import signal
import threading
import time as clock_time
from pathlib import Path
from typing import Annotated

import typer

from seqfraud.bundle import Bundle, open_bundle
from seqfraud.commands import TrustedKeysOption, trusted_keys
from seqfraud.config import parse_duration, parse_instant
from seqfraud.console import print_json
from seqfraud.errors import ConfigError, RunError
from seqfraud.files import replaced_file
from seqfraud.signature import TrustedKeys

FIGURES = "monitor.prom"
"""In the state folder; the service's /metrics shows it."""
PAGE, PLAIN = "report.html", "report.json"
NEWEST = "newest"


def monitor(
    state: Annotated[Path, typer.Option(help="The service's state folder; the service may be running.")],
    bundle: Annotated[list[Path] | None, typer.Option(help="A bundle folder; may be given again.")] = None,
    registry: Annotated[
        Path | None, typer.Option(help="Instead: a registry folder, its champion and challengers.", metavar="DIR")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and report.json; STATE/monitor if not set.")
    ] = None,
    every: Annotated[
        str | None, typer.Option(help="Again and again, such as 15m; else once.", metavar="DURATION")
    ] = None,
    window: Annotated[str, typer.Option(help="Inputs and scores of so long.", metavar="DURATION")] = "7d",
    quality_window: Annotated[
        str, typer.Option(help="Quality of so long, before the label delay.", metavar="DURATION")
    ] = "28d",
    until: Annotated[
        str | None,
        typer.Option(
            help="ISO time to look back from, or newest: that of the newest transaction; now if not set.",
            metavar="TIME",
        ),
    ] = None,
    trusted: TrustedKeysOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say whether a model in service sees what it was trained on, and how good it still is where labels have matured.

    Exit code 0: fine, or something to watch; 3: an alarm; 4: it cannot be said, for want of data or labels; 2: bad input.

    Example: seqfraud monitor --state state --bundle bundle --every 15m
    """
    if bool(bundle) == (registry is not None):
        raise ConfigError("monitor: expected --bundle or --registry, one of them")
    lengths = [_duration(option, text) for option, text in (("--window", window), ("--quality-window", quality_window))]
    pause = None if every is None else _duration("--every", every)
    moment = None if until in (None, NEWEST) else _instant(until or "")
    if pause is not None and moment is not None:
        raise ConfigError("--until: with --every only newest; a fixed time would give the same report again and again")
    folder = state / "monitor" if out is None else out
    keys = trusted_keys(trusted)
    stop = threading.Event()
    if pause is not None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    while True:
        began = clock_time.monotonic()
        code = _look_once(state, bundle or [], registry, keys, folder, lengths, moment, until == NEWEST, json)
        if pause is None:
            if code:
                raise typer.Exit(code)
            return
        if stop.wait(max(pause / 1000 - (clock_time.monotonic() - began), 0.0)):
            return


def _look_once(
    state: Path,
    paths: list[Path],
    registry: Path | None,
    keys: TrustedKeys | None,
    folder: Path,
    lengths: list[int],
    moment: int | None,
    newest: bool,
    json: bool,
) -> int:
    """Look, write, print; the exit code."""
    from serve.monitor_page import page
    from serve.monitor_report import gauges, look
    from serve.verdicts import Span

    opened = [open_bundle(path, keys) for path in paths] if registry is None else _registered(registry, keys)
    if newest:
        moment = _newest(state)
    now = clock_time.time_ns() // 1_000_000 if moment is None else moment
    report = look(state, opened, Span(now, *lengths))
    plain = report.as_dict()
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / PAGE, page(report))
    _write(folder / PLAIN, _dumps(plain))
    _write(state / FIGURES, gauges(report))
    if json:
        print_json(plain)
    else:
        print(f"{plain['at']}  {report.level}  {folder / PAGE}")
        for model in report.models:
            print(f"model {model.model}, {model.role}")
            for topic in model.topics:
                print(f"  {topic.name:11}  {topic.level:7}  {topic.words}")
        for topic in report.topics:
            print(f"{topic.name:13}  {topic.level:7}  {topic.words}")
    return report.code


def _registered(folder: Path, keys: TrustedKeys | None) -> list[Bundle]:
    """The champion, the challengers, and the champion before, which may have scored most of what is looked at."""
    from seqfraud.registry import Registry

    registry = Registry(folder, keys)
    standing = registry.standing()
    if standing.champion is None:
        raise RunError(f"{folder}: there is no champion yet; see `seqfraud models promote`")
    before = () if standing.previous is None else (standing.previous,)
    return [registry.open(model) for model in dict.fromkeys((standing.champion, *standing.challengers, *before))]


def _newest(state: Path) -> int:
    """Just after the newest transaction of the journal, ms; now where there is none."""
    from serve.log import read_frames
    from serve.records import TransactionRecord, decode_records

    folder = state / "journal"
    if not folder.is_dir():
        raise RunError(f"{state}: there is no journal here")
    records = (r for frame in read_frames(folder) for r in decode_records(frame.seq, frame.payload))
    times = [r.time for r in records if isinstance(r, TransactionRecord)]
    return max(times) + 1 if times else clock_time.time_ns() // 1_000_000


def _write(path: Path, text: str) -> None:
    with replaced_file(path) as file:
        file.write_text(text, encoding="utf-8")


def _dumps(content: object) -> str:
    import json

    return json.dumps(content, indent=1) + "\n"


def _duration(option: str, text: str) -> int:
    try:
        found = parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    if found <= 0:
        raise ConfigError(f"{option}: seen {text!r}; expected more than nothing")
    return found


def _instant(text: str) -> int:
    try:
        return parse_instant(text)
    except ValueError as error:
        raise ConfigError(f"--until: {error}; expected that, or {NEWEST}") from None
