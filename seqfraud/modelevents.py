"""What happened to the models of a registry, and what that makes of them: who is the champion, who challenges it.

The events are the truth, one JSON object per line in a file that only grows; everything else is their fold. `Standing.after`
says what an event makes of what was, or why it may not be: the same words when it is asked for and when a file is read.
"""

import json
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from seqfraud.config import format_instant, from_plain, parse_instant
from seqfraud.errors import ConfigError, RegistryError
from seqfraud.files import locked_folder, sync_folder

Action = Literal["add", "promote", "rollback", "challenge", "withdraw"]
AUTHOR_CHARACTERS = 200
REASON_CHARACTERS = 4000
_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Event:
    """Something that was done to a model."""

    at: str
    """ISO 8601, UTC."""
    author: str
    action: Action
    model: str
    """Content id; of a rollback the model that it went back to."""
    reason: str
    before: str | None = None
    """The champion until then."""

    def __post_init__(self) -> None:
        """Raises RegistryError that names the field."""
        if not _ID.fullmatch(self.model):
            raise RegistryError(f"model: seen {self.model!r:.80}; expected a content id of 16 hexadecimal digits")
        if not self.author.strip() or len(self.author) > AUTHOR_CHARACTERS or not self.author.isprintable():
            raise RegistryError(
                f"author: seen {self.author!r:.80}; expected who it is, in up to {AUTHOR_CHARACTERS} printable characters"
            )
        if self.action != "add" and not self.reason.strip():
            raise RegistryError(f"reason: seen {self.reason!r:.80}; expected why, in words")
        if len(self.reason) > REASON_CHARACTERS or not all(c.isprintable() or c in "\n\t" for c in self.reason):
            raise RegistryError(
                f"reason: {len(self.reason):,} characters, {self.reason!r:.80}; expected at most {REASON_CHARACTERS:,}, "
                "printable ones and ends of lines"
            )
        try:
            parse_instant(self.at)
        except ValueError as error:
            raise RegistryError(f"at: {error}") from error


@dataclass(frozen=True)
class Standing:
    """What the models of a registry are to each other."""

    models: tuple[str, ...] = ()
    """In the order in which they were added."""
    champions: tuple[str, ...] = ()
    """The champion is the last; a rollback goes back to the one before it, and forgets the one that it takes away."""
    challengers: tuple[str, ...] = ()
    """In the order in which they began."""

    @property
    def champion(self) -> str | None:
        """The model that answers; None before the first promotion."""
        return self.champions[-1] if self.champions else None

    @property
    def previous(self) -> str | None:
        """What a rollback goes back to; None where there is nothing."""
        return self.champions[-2] if len(self.champions) > 1 else None

    def after(self, event: Event) -> "Standing":
        """What an event makes of it. Raises RegistryError where it cannot be."""
        model, champion = event.model, self.champion
        if event.action == "add":
            return self if model in self.models else replace(self, models=(*self.models, model))
        if model not in self.models:
            raise RegistryError(f"there is no model {model!r:.80} in this registry; it has {_listed(self.models)}")
        if event.before != champion:
            raise RegistryError(f"the champion is {champion}, not {event.before!r:.80}: it was changed meanwhile")
        without = tuple(one for one in self.challengers if one != model)
        if event.action == "promote":
            if model == champion:
                raise RegistryError(f"{model} is the champion already")
            return replace(self, champions=(*self.champions, model), challengers=without)
        if event.action == "rollback":
            if model != self.previous:
                raise RegistryError(f"the champion before {champion} was {self.previous}, not {model}")
            return replace(self, champions=self.champions[:-1], challengers=without)
        if event.action == "challenge":
            if model == champion:
                raise RegistryError(f"{model} is the champion; it cannot challenge itself")
            if model in self.challengers:
                raise RegistryError(f"{model} is a challenger already")
            return replace(self, challengers=(*self.challengers, model))
        if model not in self.challengers:
            raise RegistryError(f"{model} is no challenger; those are {_listed(self.challengers)}")
        return replace(self, challengers=without)


class EventLog:
    """The file of events. Several processes may write it; each event is on disk when `write` returns.

    A line is whole when it ends. What a crash left of the last one was never said to be done: it is not read, and the
    next event takes its place. Anything else that cannot be read is refused, with the number of the line.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> tuple[list[Event], Standing]:
        """All events and their fold. Raises RegistryError."""
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise RegistryError(f"{self._file}: cannot be read: {error.strerror}") from error
        events, standing = [], Standing()
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            where = f"{self._file}: line {number}"
            try:
                raw = json.loads(line)
                if not isinstance(raw, dict):
                    raise ValueError("no JSON object")
                event = from_plain(Event, raw, "event", "event.")
                standing = standing.after(event)
            except (ConfigError, RegistryError, RecursionError, ValueError) as error:
                raise RegistryError(f"{where}: {error}") from error
            events.append(event)
        return events, standing

    def write(self, make: Callable[[Standing], Event]) -> Event:
        """Append what `make` makes of the standing that no other writer can change meanwhile. Raises RegistryError."""
        with alone(self._file.parent):
            _, standing = self.read()
            try:
                event = make(standing)
                standing.after(event)
            except RegistryError as error:
                raise RegistryError(f"{self._file.parent}: {error}") from error
            plain = {name: value for name, value in asdict(event).items() if value is not None}
            self._append(json.dumps(plain, ensure_ascii=False).encode() + b"\n")
        return event

    def _append(self, line: bytes) -> None:
        try:
            fresh = not self._file.exists()
            with self._file.open("ab", buffering=0) as stream:
                whole = self._file.read_bytes().rfind(b"\n") + 1
                stream.truncate(whole)
                try:
                    if stream.write(line) != len(line):
                        raise OSError(0, "only a part could be written")
                    os.fsync(stream.fileno())
                except OSError:
                    stream.truncate(whole)
                    raise
            if fresh:
                sync_folder(self._file.parent)
        except OSError as error:
            raise RegistryError(f"{self._file}: cannot be written: {error.strerror}") from error


def alone(folder: Path) -> AbstractContextManager[None]:
    """One at a time for one folder of a registry. Raises RegistryError where it is not there."""
    return locked_folder(folder, lambda error: RegistryError(f"{folder}: no such registry: {error.strerror}"))


def iso(seconds: float) -> str:
    """ISO 8601 text, to the millisecond, of seconds since the epoch."""
    return format_instant(int(seconds * 1000))


def _listed(models: tuple[str, ...]) -> str:
    return ", ".join(models) or "none"
