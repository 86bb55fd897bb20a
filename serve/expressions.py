"""The language of rules: CEL, the Common Expression Language, over one bundle's fields, checked before it is taken.

Google's CEL (`cel-expr-python`, the C++ runtime) parses, checks types and evaluates. It has no loops that a rule could make
long, no attributes of Python objects and regular expressions in linear time (RE2). In front of it stands a scanner that
takes only what rules need: names of the vocabulary, numbers, texts, operators and four methods, so that a wrong name is
refused with the nearest one, and what is not on the list does not reach the library. All numbers are doubles.
"""

import difflib
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cel_expr_python import cel

from seqfraud.bundle import Manifest
from seqfraud.config import DAY_MS
from seqfraud.errors import RequestError
from seqfraud.identifiers import Identifiers, treatments

__all__ = ["Expression", "Language", "Value", "Window", "activation", "ever_true", "holds", "identifier_of", "nearest"]

LONGEST = 1000
"""Characters of an expression."""
LONGEST_PATTERN = 100
LONGEST_WINDOW = 90 * DAY_MS

Kind = Literal["number", "text", "bool"]
Value = float | str | bool

METHODS = ("startsWith", "endsWith", "contains", "matches")
_WORDS = ("true", "false", "in")
_RESERVED = frozenset(
    [
        "true",
        "false",
        "null",
        "in",
        "as",
        "break",
        "const",
        "continue",
        "else",
        "for",
        "function",
        "if",
        "import",
        "let",
        "loop",
        "package",
        "namespace",
        "return",
        "var",
        "void",
        "while",
    ]
)
_UNITS = {"m": 60_000, "h": 3_600_000, "d": DAY_MS}
_WINDOW = re.compile(r"(count|total|distinct)_(?:(.+)_)?([1-9][0-9]{0,5})([mhd])")

PLAIN: dict[str, Kind] = {
    "probability": "number",
    "hour": "number",
    "weekday": "number",
    "history": "number",
    "late": "bool",
    "since_last": "number",
}
"""What is known beside the fields, where no field has the name."""

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
    |(?P<number>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?![0-9A-Za-z_.]))
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*(?![A-Za-z0-9_"']))
    |(?P<text>"(?:[^"\\\r\n]|\\["'\\nt])*"(?!["'])|'(?:[^'\\\r\n]|\\["'\\nt])*'(?!["']))
    |(?P<sign>&&|\|\||[=!<>]=|[<>!+\-*?:(),\[\].]|/(?!/))""",
    re.VERBOSE,
)
_ESCAPED = re.compile(r"\\(.)")
_ESCAPES = {"n": "\n", "t": "\t"}
_TYPES: dict[Kind, Any] = {"number": cel.Type.DOUBLE, "text": cel.Type.STRING, "bool": cel.Type.BOOL}
_SAID = re.compile(r"<input>:-?\d+:-?\d+: (.+)")


@dataclass(frozen=True, slots=True)
class Window:
    """What a name such as `count_1h` stands for, over the user's recent events and this one.

    Attributes:
        what: number of events, sum of their amounts, or number of distinct values of `column`.
        span: milliseconds; an event belongs to it whose time is after this one's less the span.
    """

    what: Literal["count", "total", "distinct"]
    column: str
    span: int


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression.

    Attributes:
        text: as it was written, card numbers in its texts hashed.
        source: the same for CEL.
        names: what it refers to.
        program: compiled.
    """

    text: str
    source: str
    names: frozenset[str]
    program: Any


def identifier_of(column: str) -> str:
    """The name of a column in expressions: other characters than letters, digits and `_` become `_`."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", column)
    return f"_{name}" if not name or name[0].isdigit() else f"{name}_" if name in _RESERVED else name


class Language:
    """The vocabulary of one bundle, and what compiles expressions over it."""

    def __init__(self, manifest: Manifest, identifiers: Identifiers) -> None:
        schema = manifest.schema
        self.schema = schema
        self._hide = identifiers
        self._treatments = treatments(schema, manifest.identifiers)
        self.columns: dict[str, str] = {}
        """Identifier -> column, for the fields; of two columns with one identifier the first has it."""
        for column in (*schema.numbers, *schema.texts, schema.user, schema.time):
            self.columns.setdefault(identifier_of(column), column)
        numbers = {*schema.numbers, schema.time}
        self._kinds: dict[str, Kind] = dict(PLAIN)
        self._kinds |= {f"has_{name}": "bool" for name in self.columns}
        self._kinds |= {name: "number" if c in numbers else "text" for name, c in self.columns.items()}
        self._windows = _windows_over(manifest)

    def window_of(self, name: str) -> Window | None:
        """What a name says of the recent events; None where it says nothing of them."""
        if name in self._kinds:
            return None
        found = _WINDOW.fullmatch(name)
        if found is None:
            return None
        what, field, count, unit = found.groups()
        span = int(count) * _UNITS[unit]
        column = self._windows.get((what, field or ""))
        return None if column is None or span > LONGEST_WINDOW else Window(what, column, span)  # type: ignore[arg-type]

    def compile(self, text: str, field: str = "expression") -> Expression:
        """Check an expression. Raises RequestError 422 that says what is wrong and what is expected."""
        if len(text) > LONGEST:
            raise _refused(field, f"{len(text)} characters", f"at most {LONGEST}")
        written, source = [], []
        types: dict[str, Any] = {}
        tokens = list(_scan(text, field))
        for i, (kind, token) in enumerate(tokens):
            if kind == "name":
                self._check_name(tokens, i, types, field)
            elif kind == "number" and not math.isfinite(float(token)):
                raise _refused(field, token, "a number that is not so large")
            elif kind == "text":
                # a card number in a rule is no more to be stored than one in a transaction
                said = _unescaped(token)
                hidden = self._hide.without_cards(said)
                token = token if hidden == said else f'"{hidden}"'
            written.append(token)
            source.append(f"{token}.0" if kind == "number" and token.isdigit() else token)
        names = frozenset(types)
        try:
            program = cel.NewEnv(variables=types).compile("".join(source))
        except (RuntimeError, TypeError) as error:
            raise _refused(field, _said_by_cel(error), "an expression that is true or false") from None
        if program.return_type() != cel.Type.BOOL:
            raise _refused(field, "it is neither true nor false", "a condition, such as amount > 100")
        return Expression("".join(written), "".join(source), names, program)

    def _check_name(self, tokens: list[tuple[str, str]], i: int, types: dict[str, Any], field: str) -> None:
        name = tokens[i][1]
        rest = [token for token in tokens[i + 1 :] if token[0] != "space"]
        if [token for kind, token in tokens[:i] if kind != "space"][-1:] == ["."]:
            if name not in METHODS:
                raise _refused(field, f".{name}", f"one of {', '.join(METHODS)}{nearest(name, METHODS)}")
            if name == "matches":
                _check_pattern(rest, field)
        elif name not in _WORDS:
            window = self.window_of(name)
            kind: Kind | None = self._kinds.get(name) if window is None else "number"
            if kind is None:
                raise _refused(
                    field, f"{name!r} is no name here", f"a field or a value that rules know{self._hint(name)}"
                )
            column = self.columns.get(name)
            if kind == "text" and column is not None and self._treatments.get(column) == "hash":
                raise _refused(field, f"the values of {column} are stored hashed", f"a list, or has_{name}")
            types[name] = _TYPES[kind]

    def _hint(self, name: str) -> str:
        found = _WINDOW.fullmatch(name)
        if found is None:
            windows = [f"{what}_{field}_24h" if field else f"{what}_24h" for what, field in self._windows]
            return nearest(name, [*self._kinds, *windows])
        if (found[1], found[2] or "") in self._windows:
            return f"; a window is at most {LONGEST_WINDOW // DAY_MS}d long"
        known = sorted(field or "the amount" for what, field in self._windows if what == found[1])
        return f"; {found[1]} is known of {', '.join(known) or 'nothing'}: what the user's recent events keep"


def _windows_over(manifest: Manifest) -> dict[tuple[str, str], str]:
    """(what, identifier of the field or "") -> column: what the user's ring keeps of an event."""
    schema = manifest.schema
    out = {("count", ""): ""}
    if schema.amount in schema.numeric_inputs:
        out["total", ""] = str(schema.amount)
    for column in (*schema.numeric_inputs, *(v.column for v in manifest.vocabularies)):
        out.setdefault(("distinct", identifier_of(column)), column)
    return out


def _scan(text: str, field: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise _refused(
                field, f"{text[at : at + 10]!r} at character {at + 1}", "names, numbers, texts in quotes and operators"
            )
        yield str(found.lastgroup), found[0]
        at = found.end()


def _check_pattern(rest: list[tuple[str, str]], field: str) -> None:
    """What follows `matches`: a short pattern, written out; counted repetitions make it slow to compile."""
    if [kind for kind, _ in rest[:3]] != ["sign", "text", "sign"]:
        raise _refused(field, "matches without a pattern in quotes", 'such as .matches("^[A-Z]+$")')
    pattern = _unescaped(rest[1][1])
    if len(pattern) > LONGEST_PATTERN or "{" in pattern:
        raise _refused(
            field,
            f"the pattern {pattern!r:.60}",
            f"at most {LONGEST_PATTERN} characters and no counted repetition {{n}}",
        )
    said = _no_names().compile(f'"".matches({rest[1][1]})').eval(data={}).value()
    if not isinstance(said, bool):
        raise _refused(field, f"the pattern {pattern!r:.60}: {said}", "a regular expression of RE2")


def _unescaped(token: str) -> str:
    return _ESCAPED.sub(lambda found: _ESCAPES.get(found[1], found[1]), token[1:-1])


def _said_by_cel(error: Exception) -> str:
    """CEL's first complaint in our words for types."""
    text = str(error)
    found = _SAID.search(text)
    words = found[1] if found else text.partition("\n")[0].removeprefix("CANCELLED: ")
    for ours, theirs in (("number", "double"), ("text", "string"), ("true or false", "bool")):
        words = re.sub(rf"\b{theirs}\b", ours, words)
    return words.removesuffix(" [CANCELLED]")


def nearest(name: str, known: Iterable[str]) -> str:
    """The words of a refusal that name the nearest of what is known."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; the nearest is {near[0]}" if near else ""


def _refused(field: str, seen: str, expected: str) -> RequestError:
    return RequestError(422, "invalid_field", f"{field}: {seen}; expected {expected}", field)


# ---- evaluation


def ever_true(sources: Sequence[str]) -> Any | None:
    """A program that is false exactly where each of these is false and none fails; None where they are too deep together.

    Most transactions match no rule: one call says so for many.
    """
    try:
        return _no_names().compile(" || ".join(f"({source})" for source in sources), disable_check=True)
    except RuntimeError:
        return None


def activation(values: Mapping[str, Value]) -> Any:
    """Values by name, for several evaluations; None where they cannot be given to CEL."""
    try:
        return _no_names().Activation(values)
    except RuntimeError:  # half of a surrogate pair
        return None


def holds(program: Any, values: Any) -> bool | None:
    """Whether an expression is true of values; None where it fails: a value is missing, a division by zero."""
    if values is None:
        return None
    try:
        said = program.eval(values).value()
    except RuntimeError:
        return None
    return said if isinstance(said, bool) else None


@functools.cache
def _no_names() -> Any:
    return cel.NewEnv(variables={})
