"""How reports look: one style sheet and its colours, for every page that is written."""

from pathlib import Path
from string import Template

SHEET = Path(__file__).with_name("report.css")

LIGHT = {
    "ink": "#1a212b", "muted": "#5c6775", "line": "#dde2e8", "card": "#ffffff",
    "gru": "#0a5fa8", "fraud": "#c04a04", "honest": "#66788c",
    "other-1": "#00805f", "other-2": "#a8578a", "other-3": "#94700a", "other-4": "#6a5acd", "other-5": "#3a8fb7",
}  # fmt: skip
"""Colours on a light ground, by name; the sheet has those on a dark one."""


def style() -> str:
    """The style sheet of a page, the colours as its variables."""
    colours = " ".join(f"--{name}: {colour};" for name, colour in LIGHT.items())
    return Template(SHEET.read_text(encoding="utf-8")).substitute(LIGHT=colours)
