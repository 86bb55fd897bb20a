"""What commands print: progress on a terminal, JSON for programs, sizes and rates for people."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

ERRORS = Console(stderr=True)


class Bar:
    """A progress bar on a terminal; silent elsewhere."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: int) -> None:
        """Some more steps are done."""
        self._progress.advance(self._task, steps)

    def show(self, done: float, words: str) -> None:
        """Steps done so far and what stands beside the bar."""
        self._progress.update(self._task, completed=done, description=words)


@contextmanager
def bar(words: str, total: int | None) -> Iterator[Bar]:
    """A bar for work of `total` steps, on stderr and only if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERRORS, disable=not sys.stderr.isatty(), transient=True) as progress:
        yield Bar(progress, progress.add_task(words, total=total))


def print_cleaning(report: dict[str, Any]) -> None:
    """What was found in the data and what became of it, on stderr; nothing where nothing was found."""
    for f in report["findings"]:
        print(
            f"note: {f['rows']:,} rows ({f['share']:.2%}): {f['reason']} in {f['column']!r}: {f['action']}; "
            f"{f['examples'][0]}",
            file=sys.stderr,
        )


def print_json(content: Any) -> None:
    """JSON on stdout."""
    print(json.dumps(content, indent=1))


def figure(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash where it is not defined."""
    return "-" if value is None else f"{value:.{digits}f}"
