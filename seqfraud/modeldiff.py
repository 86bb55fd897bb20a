"""What differs between two bundles: every entry of their manifests that is not the same, and their figures side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seqfraud.bundle import Bundle
from seqfraud.card import FIGURES, PARTS
from seqfraud.config import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from seqfraud.context import FOREVER

SPANS = ("rows", "frauds", "users", "first", "last")
"""What is compared of the training data."""
APART = ("format", "graph", "signatures", "vocabularies", "fingerprint", "metrics", "parity", "files")
"""Entries of a manifest that are compared in a way of their own, or follow from others."""


@dataclass(frozen=True)
class Difference:
    """An entry that is not the same; None where a side has none."""

    section: str
    name: str
    a: Any
    b: Any
    words: str = ""
    """What a list or a vocabulary gained and lost."""


@dataclass(frozen=True)
class Compared:
    """Two models beside each other."""

    a: str
    b: str
    differences: tuple[Difference, ...]
    figures: tuple[tuple[str, str, float | None, float | None], ...]
    """Part, figure, that of a, that of b: all that one of them has, the same or not. Of other rows where training spans
    differ."""


def compare(a: Bundle, b: Bundle) -> Compared:
    """What differs from a to b."""
    return Compared(a.id, b.id, tuple(_differences(a, b)), tuple(_figures(a, b)))


def _differences(a: Bundle, b: Bundle) -> Iterator[Difference]:
    one, other = _plain(a), _plain(b)
    for section in one:
        if section not in APART:
            yield from _changed(section, *(_flat(side[section], section) for side in (one, other)))
    yield from _changed("states", _states(a), _states(b))
    yield from _vocabularies(a, b)
    names = (a.manifest.context.names(), b.manifest.context.names())
    if names[0] != names[1]:
        yield Difference("context", "numbers read", len(names[0]), len(names[1]), _counted(*names))
    spans = [{name: m.fingerprint.get(name) for name in SPANS} for m in (a.manifest, b.manifest)]
    yield from _changed("training data", *spans)
    graphs = [{"sequence.onnx": x.sequence, "step.onnx": x.step} for x in (a, b)]
    for name, content in graphs[0].items():
        if content != graphs[1][name]:
            before, after = (f"{len(graph[name]):,} bytes" for graph in graphs)
            yield Difference("graphs", name, before, after, "weights or structure differ")


def _plain(bundle: Bundle) -> dict[str, Any]:
    """The manifest as plain data, with durations as people write them."""
    content = bundle.manifest.as_dict()
    context = content["context"]
    words = {name: _duration(context[name]) for name in ("label_delay", "habit_half_life", "run_memory")}
    half_lives = [_duration(ms) for ms in context["half_lives"]]
    return {**content, "context": {**context, **words, "half_lives": half_lives}}


def _duration(ms: int) -> str:
    """As it is, in the largest unit that holds it a whole number of times: two that differ differ in words."""
    if ms == FOREVER:
        return "for good"
    for unit, size in (("d", DAY_MS), ("h", HOUR_MS), ("min", MINUTE_MS), ("s", SECOND_MS)):
        if ms % size == 0:
            return f"{ms // size} {unit}"
    return f"{ms} ms"


def _vocabularies(a: Bundle, b: Bundle) -> Iterator[Difference]:
    one, other = ({v.column: v.values for v in x.manifest.vocabularies} for x in (a, b))
    for column in dict.fromkeys((*one, *other)):
        before, after = one.get(column), other.get(column)
        if before != after:
            sizes = [None if values is None else len(values) for values in (before, after)]
            yield Difference("vocabularies", column, sizes[0], sizes[1], _counted(before or (), after or ()))


def _states(bundle: Bundle) -> dict[str, str]:
    return {s.name: f"{s.dtype} {list(s.axes)} by {s.key}" for s in bundle.manifest.graph.states}


def _figures(a: Bundle, b: Bundle) -> Iterator[tuple[str, str, float | None, float | None]]:
    for part in PARTS:
        found = [x.manifest.metrics.get(part) for x in (a, b)]
        one, other = (f if isinstance(f, Mapping) else {} for f in found)
        for name in FIGURES:
            before, after = _number(one.get(name)), _number(other.get(name))
            if before is not None or after is not None:
                yield part, name, before, after


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _changed(section: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys((*a, *b)):
        before, after = a.get(name), b.get(name)
        if before != after:
            both = isinstance(before, list | tuple) and isinstance(after, list | tuple)
            yield Difference(section, name, before, after, _gained(before, after) if both else "")


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Leaves by their names, those below the first level joined with dots; lists are leaves."""
    if not isinstance(value, Mapping):
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, part in value.items():
        below = _flat(part, str(key))
        leaves |= {f"{key}.{leaf}" if isinstance(part, Mapping) else leaf: of for leaf, of in below.items()}
    return leaves


def _gained(before: Any, after: Any) -> str:
    new, gone = ([x for x in xs if x not in ys] for xs, ys in ((after, before), (before, after)))
    return ", ".join([*(f"+{x}" for x in new), *(f"-{x}" for x in gone)]) or "in another order"


def _counted(before: Sequence[str], after: Sequence[str]) -> str:
    new, gone = len(set(after) - set(before)), len(set(before) - set(after))
    return f"{new:,} new, {gone:,} gone" if new or gone else "in another order"
