"""Charts as SVG, drawn by matplotlib and stripped of what a browser does not need: as part of a page, or as a file.

Nothing is loaded from outside, no script runs, and the same content gives the same bytes.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from seqfraud.look import LIGHT

Floats = npt.NDArray[np.float64]

COLOURS = {name: f"#0001{number:02x}" for number, name in enumerate(LIGHT)}
"""Stand-ins that matplotlib draws with; a page has a CSS variable of each name, a file the light colour."""
INK, MUTED, LINE, CARD = (COLOURS[name] for name in ("ink", "muted", "line", "card"))
MODEL, FRAUD, HONEST = (COLOURS[name] for name in ("gru", "fraud", "honest"))
OTHERS = [COLOURS[f"other-{i}"] for i in range(1, 6)]
DASHES: list[Any] = [(0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (8, 3))]
"""Models differ in dashes too, for readers and printers without colours."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from data
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "columnspacing": 1.2}
"""A legend over the axes, where it hides nothing."""
SMALL = (4.7, 3.6)
"""Inches; in the page a chart is as wide as its column, about this wide on a telephone."""


def inline(key: str, alt: str, paint: Callable[[Figure], None], size: tuple[float, float] = SMALL) -> Markup:
    """What `paint` draws as an element of a page, free of ids that another `key` has; colours are CSS variables."""
    box, body = _drawn(key, paint, size)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box, alt) + Markup(body)


def standalone(
    key: str, title: str, description: str, paint: Callable[[Figure], None], size: tuple[float, float]
) -> str:
    """What `paint` draws as a file of its own, light whatever is around it; title and description are its text form."""
    box, body = _drawn(key, paint, size)
    for name, colour in COLOURS.items():
        body = body.replace(colour, LIGHT[name])
    for number, long in enumerate(dict.fromkeys(re.findall(r' id="([^"]*)"', body))):
        body = body.replace(f'id="{long}"', f'id="i{number}"').replace(f"#{long}", f"#i{number}")
    _, _, width, height = box.split()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{width}" height="{height}" role="img"'
        f' aria-labelledby="title desc" font-family="\'DejaVu Sans\', Verdana, sans-serif">\n'
        f'<title id="title">{escape(title)}</title>\n<desc id="desc">{escape(description)}</desc>\n'
        f'<rect width="100%" height="100%" fill="{LIGHT["card"]}"/>\n{body}\n'
    )


def _drawn(key: str, paint: Callable[[Figure], None], size: tuple[float, float]) -> tuple[str, str]:
    """View box and content with the closing tag: no size, no style sheet, no namespaces, no groups' ids."""
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', body)
    assert box is not None  # matplotlib always writes one
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r"""font: ([\d.]+)px 'DejaVu Sans', sans-serif""", r"font-size: \1px", body)
    body = re.sub(r' (?:d|x|y|transform|points)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    return box[1], re.sub(r'<g (clip-path="[^"]*")>\n((?:<use [^>]*/>\n)+)</g>', _styled_once, body)


def _styled_once(markers: re.Match[str]) -> str:
    """The markers of one line with their style at the group instead of at each: half the size of a file of points."""
    styles = set(re.findall(r' style="[^"]*"', markers[2]))
    if len(styles) != 1:
        return markers[0]
    style = styles.pop()
    return f"<g {markers[1]}{style}>\n{markers[2].replace(style, '')}</g>"


def shares(axis: Any) -> None:
    """Tick labels in percent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


SHOWN_PROBABILITIES = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)


def log_odds(probability: Floats) -> Floats:
    """Where probabilities are on an axis of log-odds; certain ones at one in a million."""
    p = np.clip(probability, 1e-6, 1 - 1e-6)
    odds: Floats = np.log(p) - np.log1p(-p)
    return odds


def log_odds_ticks(axis: Any, low: float, high: float) -> None:
    """Tick labels in percent on an axis of log-odds from `low` to `high`."""
    shown = [p for p in SHOWN_PROBABILITIES if low <= log_odds(np.array(p)) <= high]
    axis.set_ticks([float(log_odds(np.array(p))) for p in shown], [f"{100 * p:g} %" for p in shown])
