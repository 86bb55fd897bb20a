"""The text of a configuration without some inputs, comments kept.

An entry of a list of [features] on a line of its own becomes a comment, so that what stands above it still belongs to
it; one that shares its line is cut out.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from seqfraud.config import Config, parse_config
from seqfraud.errors import ConfigError
from training.importance import KINDS, Input, inputs_of
from training.selection import without_inputs

MARK = "# dropped: "

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"""|\#[^\n]*|[\[\]{},=\n]|[^\S\n]+|[^\s\[\]{},="'\#]+""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Entry:
    """Where an entry of a list of [features] stands in the text."""

    kind: str
    start: int
    end: int


def dropped_text(text: str, source: str, config: Config, reasons: Mapping[Input, str], heading: str) -> str:
    """The configuration's text without the inputs of `reasons`; a comment at its head says which went and why.

    Args:
        text: what `config` was read from.
        source: what messages call it.
        heading: the first line of that comment.

    Raises:
        ConfigError: [features] is written in a way that this does not read.
    """
    entries = list(_entries(text))
    inputs = inputs_of(config.features)
    by_kind = {kind: [entry for entry in entries if entry.kind == kind] for kind in KINDS}
    found = [entry for kind in KINDS for entry in by_kind[kind]]
    reduced = text
    if len(found) == len(inputs):
        gone = [entry for entry, one in zip(found, inputs, strict=True) if one in reasons]
        for entry in sorted(gone, key=lambda entry: -entry.start):
            reduced = _without(reduced, entry)
    comment = [heading, *(f"  {one}: {why}" for one, why in reasons.items())]
    reduced = "".join(f"# {line}\n" for line in comment) + "\n" + reduced
    if parse_config(reduced, source) != without_inputs(config, reasons):
        raise ConfigError(
            f"{source}: --select rewrites the lists of [features] and cannot read them as they are written; expected a "
            'table [features] with lines such as numeric = ["amount"]'
        )
    return reduced


def _entries(text: str) -> Iterator[Entry]:
    """The entries of the lists of [features], in order."""
    table, depth, start = "", 0, -1
    statement: list[str] = []
    for token in _TOKEN.finditer(text):
        word = token[0]
        if word.startswith("#") or (word != "\n" and word.isspace()):
            continue
        if "=" not in statement:
            if word == "\n":
                if statement[:1] == ["["]:
                    table = "".join(statement).strip("[]").replace('"', "").replace("'", "")
                statement = []
            else:
                statement.append(word)
            continue
        kind = _kind(table, statement)
        if word == "[":
            depth += 1
            if depth == 2:
                start = token.start()
        elif word == "]":
            depth -= 1
            if depth == 1 and kind:
                yield Entry(kind, start, token.end())
        elif word == "\n":
            if depth == 0:
                statement = []
        elif depth == 1 and word != "," and kind:
            yield Entry(kind, token.start(), token.end())


def _kind(table: str, statement: list[str]) -> str | None:
    """The list of [features] that a statement sets, if it does."""
    key = "".join(statement[: statement.index("=")]).replace('"', "").replace("'", "")
    section, _, name = (f"{table}.{key}" if table else key).partition(".")
    return name if section == "features" and name in KINDS else None


def _without(text: str, entry: Entry) -> str:
    line_start = text.rfind("\n", 0, entry.start) + 1
    line_end = text.find("\n", entry.end)
    before = text[line_start : entry.start]
    after = text[entry.end : line_end if line_end >= 0 else len(text)]
    alone = not before.strip() and re.fullmatch(r"\s*,?\s*(#.*)?", after) and "\n" not in text[entry.start : entry.end]
    if alone:
        return f"{text[: entry.start]}{MARK}{text[entry.start :]}"
    comma = re.compile(r"\s*,[^\S\n]*").match(text, entry.end)
    if comma:
        return text[: entry.start] + text[comma.end() :]
    return re.sub(r",\s*\Z", "", text[: entry.start]) + text[entry.end :]
