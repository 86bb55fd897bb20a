"""The monitor's report as one HTML page in the look of the training's report; charts are SVG, no script, nothing loaded."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from seqfraud import __version__
from seqfraud.config import duration_words, format_instant
from seqfraud.look import style
from seqfraud.watched import Between
from serve.monitor import ModelReport
from serve.monitor_report import Agreement, Report
from serve.verdicts import Compared, Level, Topic

BADGES: dict[Level, str] = {"ok": "good", "watch": "mixed", "alarm": "bad", "unknown": "unknown"}
HEADLINES: dict[Level, str] = {
    "ok": "Nothing to report",
    "watch": "Something to watch",
    "alarm": "Alarm",
    "unknown": "Cannot be said",
}
SHOWN = 12
"""Inputs that are shown with a picture; the others are in a table."""
WIDTH, HEIGHT = 320, 96


def page(report: Report) -> str:
    """The report as HTML."""
    moment = format_instant(report.now)
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">',
        f"<title>Monitor: {escape(moment)}</title><style>\n{style()}</style></head><body>",
        f'<header><h1>Monitor</h1><div class="lead">{escape(report.state)} at {escape(moment)}; inputs and scores of the last '
        f"{duration_words(report.window)}, quality of the {duration_words(report.mature)} before the label delay</div></header>",
        "<main>",
        _verdict(report),
        *(_model(model, report.agreement.get(model.model)) for model in report.models),
        _glossary(),
        "</main>",
        f"<footer>Made by seqfraud {__version__}.</footer></body></html>\n",
    ]
    return "\n".join(parts)


def _verdict(report: Report) -> str:
    models = [m for m in report.models if m.role == "in service"]
    topics = [*report.topics, *(t for m in models for t in m.topics)]
    worst = [t for t in topics if t.level == report.level and t.level != "ok"]
    words = "".join(f'<p class="verdict"><b>{escape(t.name)}</b>: {escape(t.words)}.</p>' for t in worst)
    fine = '<p class="verdict">Every verdict on the model in service is fine.</p>'
    return (
        f'<section id="verdict">{_badge(report.level, HEADLINES[report.level])}'
        f"{words or fine}"
        f'<p class="muted">Exit code {report.code}. The model in service is <code>{escape(report.service or "none")}</code>.</p>'
        "</section>"
    )


def _badge(level: Level, words: str) -> str:
    return f'<span class="badge {BADGES[level]}">{escape(words)}</span>'


def _model(model: ModelReport, agreement: Agreement | None) -> str:
    parts = [
        f'<section id="model-{escape(model.model)}"><h2>Model <code>{escape(model.model)}</code>, {escape(model.role)}</h2>',
        _topics(model.topics),
        _tiles(model),
        _days(model.days),
    ]
    if agreement is not None:
        parts.append(_agreement(agreement))
    parts += [_drift(model), _quality(model), "</section>"]
    return "\n".join(parts)


def _topics(topics: Sequence[Topic]) -> str:
    rows = (
        f'<tr><th scope="row">{escape(t.name)}</th><td><b class="{BADGES[t.level]}">{t.level}</b></td>'
        f'<td class="text">{escape(t.words)}</td></tr>'
        for t in topics
    )
    return _table("", ("Topic", "Verdict", "Why"), rows)


def _tiles(model: ModelReport) -> str:
    tiles: list[tuple[str, str, str]] = []
    if model.average_precision is not None:
        tiles.append(
            ("Average precision", _figure(model.average_precision), "matured rows, fraud as common as in validation")
        )
    if model.quality is not None:
        budget = f"budget {model.quality.alert_share:.2%} a day"
        for name, label, hint in (
            ("recall_at_1pct_fpr", "Recall at 1 % false positives", "matured rows"),
            ("precision_at_budget", "Precision of alerts", budget),
            ("money_caught", "Money caught", budget),
        ):
            if name in model.quality.figures:
                tiles.append((label, _figure(model.quality.figures[name]), hint))
    if model.expected is not None and model.expected.average_precision is not None:
        tiles.append(
            (
                "Average precision, expected",
                _figure(model.expected.average_precision),
                "by the newest probabilities alone",
            )
        )
    if model.alerts is not None:
        tiles.append(("Alerts", f"{model.alerts.share:.2%}", f"{model.alerts.low:.2%} to {model.alerts.high:.2%}"))
    shown = (f'<div class="tile"><span class="label">{a}</span><b>{b.split(" (")[0]}</b><span>{b.partition(" (")[2].rstrip(")")}</span>'
             f"<span>{escape(c)}</span></div>" for a, b, c in tiles)  # fmt: skip
    return f'<div class="tiles">{"".join(shown)}</div>' if tiles else ""


def _figure(found: Between) -> str:
    return f"{found.estimate:.3f} (95 %: {found.low:.3f} to {found.high:.3f})"


def _days(days: Sequence[dict[str, Any]]) -> str:
    if len(days) < 2:
        return ""
    labels = (f"{days[0]['day']} to {days[-1]['day']}").replace("-", "‑")
    charts = [
        _line("Transactions a day", [d["transactions"] for d in days], labels, "{:,.0f}"),
        _line("Answered with review or decline", [d["alerts"] for d in days], labels, "{:.2%}"),
        _line("Mean probability", [d["expected_fraud"] for d in days], labels, "{:.3%}"),
        _line("Labelled as fraud so far", [d["labelled_fraud"] for d in days], labels, "{:.2%}"),
    ]
    return f'<h3>By day</h3><div class="charts">{"".join(charts)}</div>'


def _line(title: str, values: Sequence[float | None], words: str, form: str) -> str:
    """A line over days; a gap where there is nothing."""
    known = [v for v in values if v is not None]
    most = max(known, default=0.0) or 1.0
    step = WIDTH / max(len(values) - 1, 1)
    runs: list[list[str]] = [[]]
    for i, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(f"{i * step:.1f},{HEIGHT - value / most * (HEIGHT - 8):.1f}")
    lines = "".join(
        f'<polyline points="{" ".join(run)}" fill="none" stroke="var(--gru)" stroke-width="1.6"/>'
        for run in runs
        if run
    )
    axis = f'<line x1="0" y1="{HEIGHT}" x2="{WIDTH}" y2="{HEIGHT}" stroke="var(--line)"/>'
    caption = f"{words}; from 0 to {form.format(most)}"
    return _chart(title, f"{title}, {caption}", axis + lines, caption)


def _chart(title: str, alt: str, body: str, caption: str) -> str:
    return (
        f'<figure><h3>{escape(title)}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT + 2}" role="img" aria-label="{escape(alt)}">{body}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _drift(model: ModelReport) -> str:
    found = [*(() if model.score is None else (model.score,)), *model.inputs, *model.values]
    if not found:
        return ""
    ranked = sorted(found, key=lambda c: (c is not model.score, -c.moved.moved))
    rows = (
        f'<tr><th scope="row">{escape(c.name)}</th><td><b class="{BADGES[c.level]}">{c.level}</b></td><td>{c.moved.moved:.3f}'
        f"<small>{c.moved.low:.3f} to {c.moved.high:.3f}</small></td><td>{c.moved.js:.3f}<small>{c.moved.js_low:.3f} to "
        f"{c.moved.js_high:.3f}</small></td><td>{c.quiet:.3f}</td><td>{c.moved.psi:.3f}</td><td>{c.moved.rows:,}</td></tr>"
        for c in ranked
    )
    head = ("Input", "Verdict", "Shift (PSI)", "Jensen-Shannon", "Quiet weeks", "PSI as it is", "Rows")
    return (
        "<h3>Inputs and scores beside the training time</h3>"
        '<p class="muted">Light: the training time; dark: the window. Bins hold about equally many in the training time.</p>'
        f'<div class="charts">{"".join(_bars(c) for c in ranked[:SHOWN])}</div>'
        f"<details><summary>All {len(ranked)} as a table</summary>{_table('', head, rows)}</details>"
    )


def _bars(one: Compared) -> str:
    """Shares by bin, the reference behind the sample."""
    k = len(one.reference)
    most = max(*one.reference, *one.moved.share)
    step = WIDTH / k
    bars = []
    for i, (then, now) in enumerate(zip(one.reference, one.moved.share, strict=True)):
        for share, at, wide, colour in ((then, 0.08, 0.84, "line"), (now, 0.24, 0.52, "gru")):
            tall = share / most * (HEIGHT - 4)
            bars.append(
                f'<rect x="{(i + at) * step:.1f}" y="{HEIGHT - tall:.1f}" width="{wide * step:.1f}" height="{tall:.1f}" '
                f'fill="var(--{colour})"/>'
            )
    caption = f"{one.level}: shift {one.moved.moved:.3f} ({one.moved.low:.3f} to {one.moved.high:.3f})"
    if one.edges:
        caption += f"; bins from {one.edges[0]:.4g} to {one.edges[-1]:.4g}"
    return _chart(one.name, f"{one.name}: {caption}", "".join(bars), caption)


def _quality(model: ModelReport) -> str:
    if model.quality is None:
        return ""
    then = {} if model.reference is None else model.reference.figures
    rows = (
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{now.estimate:.3f}<small>{now.low:.3f} to {now.high:.3f}</small></td>'
        + (
            f"<td>{b.estimate:.3f}<small>{b.low:.3f} to {b.high:.3f}</small></td>"
            if (b := then.get(name))
            else "<td>–</td>"
        )
        + "</tr>"
        for name, now in model.quality.figures.items()
    )
    out = f"<h3>Quality on matured rows</h3>{_table('', ('Figure', 'Now', 'Validation days'), rows)}"
    if model.segments:
        rows = (
            f'<tr><th scope="row">{escape(s.column)} {escape(s.name)}</th><td>{s.rows:,}</td><td>{s.frauds:,}</td><td>{s.expected:,.0f}</td>'
            + (f"<td>{s.more.estimate:.2f}<small>{s.more.low:.2f} to {s.more.high:.2f}</small></td>" if s.more else "<td>–</td>")
            + (f"<td>{s.average_precision.estimate:.3f}<small>{s.average_precision.low:.3f} to {s.average_precision.high:.3f}</small></td>"
               if s.average_precision else "<td>–</td>")
            + f"<td>{'–' if s.flagged is None else f'{s.flagged:.0%}'}</td></tr>"
            for s in model.segments
        )  # fmt: skip
        head = ("Segment", "Rows", "Frauds", "Expected", "Came for each expected", "Average precision", "Flagged")
        out += f"<h3>By segment</h3>{_table('', head, rows)}"
    return out


def _agreement(found: Agreement) -> str:
    words = f"{found.rows:,} transactions were scored by both"
    if found.same_decision is not None:
        words += f"; {found.same_decision:.1%} would have had the same decision"
    if found.mean_difference is not None:
        words += f"; probabilities differ by {found.mean_difference:.4f} on average"
    d = found.difference
    if d is not None:
        words += (
            f"; on the {found.matured:,} matured ones, with {found.frauds:,} frauds, its average precision is {d.difference:+.3f} "
            f"({d.low:+.3f} to {d.high:+.3f}) beside the model in service"
        )
    else:
        words += f"; {found.frauds:,} known frauds are too few to compare the quality"
    return f"<h3>In shadow</h3><p>{escape(words)}.</p>"


def _table(caption: str, head: Iterable[str], rows: Iterable[str]) -> str:
    cells = "".join(f"<th{' class=text' if text == 'Why' else ''}>{escape(text)}</th>" for text in head)
    return f'<div class="scroll"><table>{caption}<thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _glossary() -> str:
    return """<section id="glossary"><h2>Glossary</h2><dl>
<dt>Shift (PSI)</dt><dd>Population stability index between the training time and the window, with what a sample of this size
adds by itself taken off. By convention below 0.1 is no change, above 0.25 a large one. A verdict asks that the whole interval
lies beyond the band, and beyond twice what the index did in quiet weeks of the training time.</dd>
<dt>Jensen-Shannon</dt><dd>Distance of the two distributions, 0 to 1, with the same taken off.</dd>
<dt>Matured</dt><dd>The label delay is over: what is not labelled as fraud by then counts as honest.</dd>
<dt>Expected</dt><dd>What the probabilities themselves say, if they are right, before any label has come. A kind of fraud that the
model has never seen does not show in it.</dd>
<dt>95 % interval</dt><dd>How far a figure would move with other users of the same kind: whole users are drawn anew.</dd>
</dl></section>"""
