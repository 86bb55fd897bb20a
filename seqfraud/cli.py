"""The `seqfraud` command: names of subcommands, each imported only when it is called.

So that `seqfraud serve` starts without torch, and so that this package imports none of the others, a subcommand is a
name here and a function with typer annotations there.
"""

import difflib
import importlib
import sys
from dataclasses import dataclass

import typer

from seqfraud import __version__
from seqfraud.errors import SeqfraudError


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives and what the list of commands says about it."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "simulate": Command("training.commands", "simulate", "Make transactions with fraud that depends on history."),
    "init": Command("training.commands", "init", "Look at a file and propose a commented configuration."),
    "train": Command("training.commands", "train", "Train by a configuration; writes a run folder."),
    "evaluate": Command("training.commands", "evaluate", "Figures of a run, on its own or on other data."),
    "decide": Command("training.commands", "decide", "Choose a run's decisions again, by a changed [decision]."),
    "importance": Command("training.commands", "importance", "What a run uses: each input permuted in turn."),
    "baselines": Command("training.commands", "baselines", "Models without a sequence on the same rows, compared."),
    "export": Command("export.commands", "export", "A run as a verified ONNX bundle, or a refusal."),
    "verify": Command("serve.commands", "verify", "Every check of a bundle that needs no torch, or of a journal."),
    "sign": Command("seqfraud.commands", "sign", "Sign a bundle, so that services can ask for the signature."),
    "score": Command("serve.commands", "score", "Score a file, or a journal, in arrival order."),
    "load": Command("serve.commands", "load", "Backfill a service's state with history and its labels."),
    "serve": Command("serve.commands", "serve", "The scoring service."),
    "keys": Command("serve.commands", "keys", "Make, list and revoke the service's API keys."),
    "models": Command("serve.model_commands", "models", "Models in a folder: add, compare, promote, roll back."),
    "rules": Command("serve.rule_commands", "rules", "Test a rule against a journal."),
    "repair": Command("serve.commands", "repair", "Say whether a journal is whole; cut what is not."),
    "replay": Command("serve.commands", "replay", "Stream a file through a running service."),
    "labels": Command("serve.label_commands", "labels", "Say in bulk what was fraud."),
}


def usage() -> str:
    """What `seqfraud --help` prints; no subcommand is imported for it."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: seqfraud COMMAND [ARGS]...",
            "",
            "Sequence-based fraud scoring: train on each user's transactions, export to ONNX, serve.",
            "",
            "Commands:",
            *lines,
            "",
            "`seqfraud COMMAND --help` explains a command and gives an example; `seqfraud --version` says the version.",
        ]
    )


def run(name: str, args: list[str]) -> int:
    """Run a subcommand: 0, or one clear line on stderr and 2 for what a user can mend."""
    command = COMMANDS[name]
    function = getattr(importlib.import_module(command.module), command.function)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name, context_settings={"help_option_names": ["-h", "--help"]})(function)
    try:
        code = app(args, prog_name=f"seqfraud {name}", standalone_mode=False)
    except SeqfraudError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except typer.TyperException as error:
        words = error.format_message().rstrip(".")
        print(f"error: {words}; see seqfraud {name} --help", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def main(args: list[str] | None = None) -> int:
    """Entry point of the `seqfraud` command."""
    given = sys.argv[1:] if args is None else args
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"seqfraud {__version__}")
        return 0
    if given[0] not in COMMANDS:
        near = difflib.get_close_matches(given[0], COMMANDS, n=1, cutoff=0.0)[0]
        print(f"error: there is no command {given[0]!r}; the nearest is {near!r}; see seqfraud --help", file=sys.stderr)
        return 2
    return run(given[0], given[1:])


if __name__ == "__main__":
    sys.exit(main())
