"""Metrics for Prometheus: counters, gauges, histograms, and their text exposition (format 0.0.4).

Of our own, because of the hot path: what counts there writes to an object that was looked up once. A series has one writer
at a time (whoever counts holds a lock already: the service's, or the edge's), and a scrape reads without one: a number is
replaced, never torn, and a histogram's count is the sum of its buckets, so that the two always agree.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import logging
import math
import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar

from seqfraud.errors import SeqfraudError

__all__ = ["CONTENT_TYPE", "Counter", "Distribution", "Gauge", "Histogram", "Number", "Registry", "foreign_text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FOREIGN_BYTES = 1 << 20
"""Of a file whose text is appended, at most."""

Labels = tuple[str, ...]
Read = Callable[[], float | Mapping[Labels, float]]
"""What is read at the scrape: a number, or one for each combination of label values."""

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

_log = logging.getLogger(__name__)


class Number:
    """One number, written as `x.value += 1`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Distribution:
    """Observations by bucket: `counts[i]` of those at or below `bounds[i]` and above the bound before; the last of the rest."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = list(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


S = TypeVar("S")


class _Family(Generic[S]):
    """All series of one name, by the values of its labels."""

    kind: str

    def __init__(self, name: str, words: str, labels: Sequence[str]) -> None:
        self.name = name
        self._words = words
        self._labels = tuple(labels)
        self._series: dict[Labels, S] = {}

    def _made(self) -> S:
        raise NotImplementedError

    def _lines(self, values: Labels, series: S) -> Iterator[str]:
        raise NotImplementedError

    def of(self, *values: str) -> S:
        """The series with these label values, made where it is new; it is shown from then on. Keep it where it is hot."""
        if len(values) != len(self._labels):
            raise ValueError(f"{self.name}: {len(values)} label values; expected {len(self._labels)}")
        series = self._series.get(values)
        return self._series.setdefault(values, self._made()) if series is None else series

    def render(self) -> str:
        """HELP, TYPE and every series, one a line; empty where there are none. Raises what a read raises."""
        lines = [line for values, series in list(self._series.items()) for line in self._lines(values, series)]
        if not lines:
            return ""
        words = self._words.replace("\\", r"\\").replace("\n", r"\n")
        return "\n".join([f"# HELP {self.name} {words}", f"# TYPE {self.name} {self.kind}", *lines, ""])

    def _selector(self, values: Labels, *more: str) -> str:
        pairs = [f'{name}="{value.translate(_ESCAPES)}"' for name, value in zip(self._labels, values, strict=True)]
        joined = ",".join((*pairs, *more))
        return f"{{{joined}}}" if joined else ""


class _Numbers(_Family[Number]):
    def __init__(self, name: str, words: str, labels: Sequence[str] = (), read: Read | None = None) -> None:
        super().__init__(name, words, labels)
        self._read = read

    def _made(self) -> Number:
        return Number()

    def render(self) -> str:
        """As the family's; what is read is read now."""
        if self._read is not None:
            read = self._read()
            numbers = read if isinstance(read, Mapping) else {(): read}
            for gone in self._series.keys() - numbers.keys():
                del self._series[gone]
            for values, number in numbers.items():
                self.of(*values).value = number
        return super().render()

    def _lines(self, values: Labels, series: Number) -> Iterator[str]:
        yield f"{self.name}{self._selector(values)} {_spelled(series.value)}"


class Counter(_Numbers):
    """Only grows; its name ends with `_total`."""

    kind = "counter"


class Gauge(_Numbers):
    """Goes up and down."""

    kind = "gauge"


class Histogram(_Family[Distribution]):
    """How many observations are at or below each bound."""

    kind = "histogram"

    def __init__(self, name: str, words: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        super().__init__(name, words, labels)
        self._bounds = tuple(bounds)
        self._selectors: dict[Labels, list[str]] = {}

    def _made(self) -> Distribution:
        return Distribution(self._bounds)

    def _lines(self, values: Labels, series: Distribution) -> Iterator[str]:
        selectors = self._selectors.get(values)
        if selectors is None:
            bounds = (*map(_spelled, self._bounds), "+Inf")
            within = [self._selector(values, f'le="{bound}"') for bound in bounds]
            selectors = self._selectors[values] = [f"{self.name}_bucket{selector} " for selector in within]
        count = 0
        for selector, count in zip(selectors, accumulate(series.counts), strict=True):
            yield f"{selector}{count}"
        plain = self._selector(values)
        yield f"{self.name}_sum{plain} {_spelled(series.sum)}"
        yield f"{self.name}_count{plain} {count}"


F = TypeVar("F", bound=Counter | Gauge | Histogram)


class Registry:
    """Families by name. Declaring is for the start; counting and scraping are for any thread, see the module."""

    def __init__(self) -> None:
        self._families: dict[str, Counter | Gauge | Histogram] = {}
        self._lock = threading.Lock()
        self._errors = self.counter(
            "seqfraud_metrics_unreadable_total",
            "Metrics that were left out of a scrape because they could not be read.",
        ).of()

    def counter(self, name: str, words: str, labels: Sequence[str] = (), read: Read | None = None) -> Counter:
        """Declare a counter, with `read` one whose value is asked for at the scrape. Raises ValueError."""
        if not name.endswith("_total"):
            raise ValueError(f"{name}: the name of a counter ends with _total")
        return self._add(Counter(name, words, labels, read), labels)

    def gauge(self, name: str, words: str, labels: Sequence[str] = (), read: Read | None = None) -> Gauge:
        """Declare a gauge, with `read` one whose value is asked for at the scrape. Raises ValueError."""
        return self._add(Gauge(name, words, labels, read), labels)

    def histogram(self, name: str, words: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        """Declare a histogram; `bounds` are finite and ascend. Raises ValueError."""
        if not bounds or list(bounds) != sorted(set(bounds)) or not all(map(math.isfinite, bounds)):
            raise ValueError(f"{name}: bounds {bounds}; expected finite numbers that ascend")
        return self._add(Histogram(name, words, bounds, labels), labels)

    def _add(self, family: F, labels: Sequence[str]) -> F:
        name = family.name
        if name in self._families:
            raise ValueError(f"{name}: declared twice")
        if not _NAME.fullmatch(name) or not all(_LABEL.fullmatch(x) and x[:2] != "__" and x != "le" for x in labels):
            raise ValueError(f"{name}, labels {tuple(labels)}: not what Prometheus takes as names")
        self._families[name] = family
        return family

    @property
    def names(self) -> Collection[str]:
        """Of all families."""
        return self._families.keys()

    def render(self) -> str:
        """The exposition. What raises SeqfraudError or OSError while it is read is left out, logged and counted."""
        with self._lock:
            parts = []
            for family in list(self._families.values()):
                try:
                    parts.append(family.render())
                except (SeqfraudError, OSError) as error:
                    self._errors.value += 1
                    _log.warning("the metric %s cannot be read: %s", family.name, error)
            return "".join(parts)


def _spelled(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


# ---- what others wrote

_VALUE = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?Inf|NaN"
_PAIR = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\[\\"n])*"'
_PAIRS = rf"(?:{_PAIR}(?:,{_PAIR})*,?)?"
_SAMPLE = re.compile(rf"({_NAME.pattern})(?:\{{({_PAIRS})\}})?[ \t]+({_VALUE})")
_ABOUT = re.compile(
    rf"# (?:(HELP) ({_NAME.pattern}) ((?:[^\\]|\\[\\n])*)|TYPE ({_NAME.pattern}) (counter|gauge|untyped))"
)
_PART = re.compile(r"_(?:bucket|sum|count)$")


def foreign_text(file: Path, taken: Collection[str]) -> str:
    """Numbers that another program wrote into a file as its metrics, fit to stand behind ours; empty without a file.

    Of each family once HELP and TYPE, then its samples together, each series once. Left out are lines that are none of
    these (so histograms, and what has a timestamp), families whose name is `taken`, and files beyond FOREIGN_BYTES.
    """
    try:
        if file.stat().st_size > FOREIGN_BYTES:
            _log.warning("%s: more than %d bytes; it is left out of the metrics", file, FOREIGN_BYTES)
            return ""
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    about: dict[str, dict[str, str]] = {}
    samples: dict[str, dict[frozenset[str], str]] = {}
    for line in text.split("\n"):
        found = _ABOUT.fullmatch(line)
        if found is not None:
            name, word = (found[2], "HELP") if found[1] else (found[4], "TYPE")
            about.setdefault(name, {}).setdefault(word, line)
            continue
        sample = _SAMPLE.fullmatch(line)
        if sample is None or sample[1] in taken or _PART.sub("", sample[1]) in taken:
            continue
        pairs = re.findall(_PAIR, sample[2] or "")
        if len({pair.partition("=")[0] for pair in pairs}) == len(pairs):
            samples.setdefault(sample[1], {}).setdefault(frozenset(pairs), line)
    lines = []
    for name, series in samples.items():
        said = about.get(name, {})
        lines += [said[word] for word in ("HELP", "TYPE") if word in said]
        lines += series.values()
    return "".join(f"{line}\n" for line in lines)
