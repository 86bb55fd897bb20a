"""The tables of docs/quality.md, written from the results; the prose between them is left alone.

    python -m benchmarks.quality.page

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`. Where its result is missing, it says which command
makes it. Nothing is measured here.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import RESULTS, ROOT
from benchmarks.quality.handbook import FOLDS
from benchmarks.quality.results import (
    ABLATION,
    GRU,
    HANDBOOK,
    HANDBOOK_PEERS,
    HANDBOOK_PICTURES,
    ORDER,
    SIMULATOR,
    SPARKOV,
    SPARKOV_MEMBERS,
    Comparison,
    Difference,
    Figures,
    HandbookPeers,
    HandbookPictures,
    HandbookQuality,
    Members,
    Run,
)
from seqfraud.files import replaced_file

PAGE = ROOT / "docs" / "quality.md"

PUBLISHED = {
    "decision tree": (0.7972, 0.5789, 0.2843),
    "logistic regression": (0.8677, 0.6233, 0.2971),
    "random forest": (0.8704, 0.6777, 0.2993),
    "XGBoost": (0.8694, 0.6865, 0.3032),
    "feed-forward network": (0.8765, 0.6749, 0.3032),
    "CNN": (0.8718, 0.5992, 0.2879),
    "LSTM": (0.8763, 0.6653, 0.2968),
    "LSTM + attention": (0.8743, 0.6672, 0.2954),
}
"""ROC AUC, average precision, card precision@100: Fraud-Detection-Handbook, chapter 7, SequentialModeling, four folds."""
PROTOCOL = {
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "card_precision_100": "card precision@100",
}
"""The protocol's figures, in the order of `PUBLISHED`."""
NOTHING = "–"


# --- Words ------------------------------------------------------------------------------------------


def figure(value: float | None, digits: int = 4) -> str:
    """A figure without the zero before the point: .7131."""
    if value is None:
        return NOTHING
    text = f"{abs(value):.{digits}f}"
    text = text.removeprefix("0") if text.startswith("0.") else text
    return ("−" if value < 0 and float(text) else "") + text


def signed(value: float) -> str:
    """A difference with its sign."""
    return ("+" if value > 0 else "") + figure(value)


def called(name: str) -> str:
    """A model by the name under which it is shown."""
    return "GRU" if name == GRU else name.replace("_", " ")


def settings_of(names: Iterable[str]) -> list[str]:
    """The settings among names, that of the published figures first."""
    return sorted(set(names), key=lambda name: (name != "week", name))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a vertical bar inside a cell is escaped."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# --- The handbook's folds ---------------------------------------------------------------------------


def folds_beside_published(result: HandbookQuality) -> str:
    """The published figures beside ours: means over folds and seeds."""
    rows = [[f"published, {name}", *map(figure, figures)] for name, figures in PUBLISHED.items()]
    whole = whole_seeds(result["runs"])
    for setting, seeds in whole.items():
        rows.append([f"**GRU, {setting}**", *(f"**{mean_and_spread(seeds, metric)}**" for metric in PROTOCOL)])
    counts = ", ".join(f"{setting} {len(seeds)}" for setting, seeds in whole.items()) or "none yet"
    note = "Means of four folds and of seeds; ± the standard deviation over folds, in brackets the lowest and highest mean of a seed."
    return f"{table(['', *PROTOCOL.values()], rows)}\n\n{note} Seeds with all folds: {counts}."


def whole_seeds(runs: Sequence[Run]) -> dict[str, list[list[Run]]]:
    """Setting -> the runs of each seed that has all folds."""
    out: dict[str, list[list[Run]]] = {}
    for setting in settings_of(run["setting"] for run in runs):
        for seed in sorted({run["seed"] for run in runs if run["setting"] == setting}):
            mine = [run for run in runs if (run["setting"], run["seed"]) == (setting, seed)]
            if len(mine) == len(FOLDS):
                out.setdefault(setting, []).append(mine)
    return out


def mean_and_spread(seeds: Sequence[Sequence[Run]], metric: str) -> str:
    """Mean ± deviation over folds, and the range over seeds where there are several."""
    values = np.array([[float(run[metric]) for run in sorted(seed, key=lambda r: r["fold"])] for seed in seeds])  # type: ignore[literal-required]
    by_seed, by_fold = values.mean(axis=1), values.mean(axis=0)
    text = f"{figure(float(values.mean()))} ± {figure(float(by_fold.std(ddof=1)))}"
    return text if len(seeds) == 1 else f"{text} ({figure(float(by_seed.min()))} to {figure(float(by_seed.max()))})"


def each_fold(result: HandbookQuality) -> str:
    """Average precision by fold and setting: the mean of the seeds and their range."""
    runs = result["runs"]
    folds = sorted({run["fold"] for run in runs})
    rows = []
    for setting in settings_of(run["setting"] for run in runs):
        cells = []
        for fold in folds:
            values = [run["average_precision"] for run in runs if (run["setting"], run["fold"]) == (setting, fold)]
            text = figure(float(np.mean(values))) if values else NOTHING
            cells.append(f"{text} ({figure(min(values))} to {figure(max(values))})" if len(values) > 1 else text)
        rows.append([setting, *cells])
    return table(["average precision", *folds], rows)


# --- Models side by side ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A figure that a table may show; `distance` says how far from the best a value is, None where nothing is best."""

    header: str
    path: tuple[str, ...]
    distance: Callable[[float], float] | None
    digits: int = 4


def most(value: float) -> float:
    """The highest is best."""
    return -value


RANKING = (
    Column("average precision", ("average_precision",), most),
    Column("ROC AUC", ("roc_auc",), most),
    Column("card precision@100", ("card_precision_100",), most),
    Column("recall at 1 % false positives", ("recall_at_1pct_fpr",), most),
)
PROBABILITIES = (
    Column("log-loss", ("log_loss",), abs, 5),
    Column("Brier score", ("brier",), abs, 5),
    Column("calibration slope", ("calibration", "slope"), lambda value: abs(value - 1), 3),
    Column("calibration intercept", ("calibration", "in_the_large"), abs, 3),
    Column("with the slope free", ("calibration", "intercept"), None, 3),
)


def found(figures: Mapping[str, Any], path: Sequence[str]) -> float | None:
    """A figure by its path; None where it is not there."""
    value: Any = figures
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def models_table(comparison: Comparison, columns: Sequence[Column]) -> str:
    """Models in rows, those of the columns that any model has, the best of each in bold; an empty text without any."""
    models = comparison["models"]
    shown = [c for c in columns if any(found(figures, c.path) is not None for figures in models.values())]
    if not shown:
        return ""
    best = {c.header: best_of(list(models.values()), c) for c in shown}
    rows = []
    for name, figures in models.items():
        cells = []
        for column in shown:
            value = found(figures, column.path)
            text = figure(value, column.digits)
            text = f"**{text}**" if value is not None and value == best[column.header] else text
            interval = figures.get("interval") if column.path == ("average_precision",) else None
            cells.append(f"{text} ({figure(interval[0], 3)} to {figure(interval[1], 3)})" if interval else text)
        rows.append([called(name), *cells])
    return table(["", *(column.header for column in shown)], rows)


def best_of(models: Sequence[Figures], column: Column) -> float | None:
    """The best value of a column; None where there is no choice."""
    values = [value for figures in models if (value := found(figures, column.path)) is not None]
    return min(values, key=column.distance) if column.distance is not None and len(values) > 1 else None


def money_columns(comparison: Comparison) -> list[Column]:
    """The shares of fraud money caught, by alerts a day, that any model has."""
    budgets = {budget for figures in comparison["models"].values() for budget in figures.get("money_caught") or {}}
    return [Column(f"money caught, {b} alerts a day", ("money_caught", b), most, 3) for b in sorted(budgets, key=int)]


def differences_table(differences: Mapping[str, Difference]) -> str:
    """What the GRU is ahead of each of the others."""
    rows = [
        [called(name), signed(d["average_precision"]), f"{signed(d['low'])} to {signed(d['high'])}", verdict(d)]
        for name, d in differences.items()
    ]
    return table(["GRU less", "average precision", "95 % interval", ""], rows)


def verdict(difference: Difference) -> str:
    """Whether chance explains a difference."""
    return "GRU ahead" if difference["low"] > 0 else "GRU behind" if difference["high"] < 0 else "not told apart"


def side_by_side(comparison: Comparison) -> str:
    """Every table of a comparison but calibration bins and segments."""
    what = comparison.get("what") or {}
    parts = [
        comparison.get("note", ""),
        models_table(comparison, RANKING),
        models_table(comparison, money_columns(comparison)),
        models_table(comparison, PROBABILITIES),
        differences_table(comparison["differences"]) if comparison.get("differences") else "",
        "\n".join(f"- {called(name)}: {words}" for name, words in what.items()),
    ]
    return "\n\n".join(part for part in parts if part)


def by_setting(result: HandbookPeers, words: Callable[[Comparison], str]) -> str:
    """The same for each setting under its name."""
    parts = [(setting, words(result["settings"][setting])) for setting in settings_of(result["settings"])]
    return "\n\n".join(f"**{setting}**\n\n{text}" for setting, text in parts if text)


def top_bins(comparison: Comparison) -> str:
    """What the GRU said and what came in the highest-scored 1 %."""
    bins = comparison["models"].get(GRU, {}).get("top_bins") or []
    rows = [[f"{b['count']:,}", figure(b["mean_probability"], 3), figure(b["observed_rate"], 3)] for b in bins]
    return table(["rows", "mean probability", "share of frauds"], rows) if rows else ""


def segments(comparison: Comparison) -> str:
    """Average precision by segment, a column for each model that has segments."""
    models = {name: figures["segments"] for name, figures in comparison["models"].items() if figures.get("segments")}
    if not models:
        return ""
    rows = []
    for kind, parts in next(iter(models.values())).items():
        for name, segment in parts.items():
            cells = [figure(found(mine, (kind, name, "average_precision"))) for mine in models.values()]
            rows.append([kind, name, f"{segment['rows']:,}", f"{segment['frauds']:,}", *cells])
    return table(["", "segment", "rows", "frauds", *map(called, models)], rows)


def members(result: Members) -> str:
    """What one network says and what several say together: means over every choice of so many, and their range."""
    rows = []
    for count in sorted({len(one["networks"]) for one in result["measured"]}):
        cells = []
        for metric in ("average_precision", "recall"):
            values = [float(one[metric]) for one in result["measured"] if len(one["networks"]) == count]  # type: ignore[literal-required]
            text = figure(float(np.mean(values)))
            cells.append(f"{text} ({figure(min(values))} to {figure(max(values))})" if len(values) > 1 else text)
        rows.append([str(count), *cells])
    return table(["networks", "average precision", "recall at 1 % false positives"], rows)


# --- Pictures ---------------------------------------------------------------------------------------


def pictures(result: HandbookPictures) -> str:
    """The pictures, each with the rule by which it was chosen."""
    parts = [f"Fold {result['fold']}, {result['setting']}, seed {result['seed']}."]
    for picture in result["pictures"]:
        alt = picture["description"].replace("[", "(").replace("]", ")")
        parts += [f"![{picture['title']}. {alt}](quality/{picture['file']})", f"Chosen: {picture['rule']}."]
    return "\n\n".join(parts)


# --- The page ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A generated part of the page: the result that it is made of, and the command that makes the result."""

    name: str
    result: str
    command: str
    words: Callable[[Any], str]


SECTIONS = (
    Section("handbook", HANDBOOK, "python -m benchmarks.quality", folds_beside_published),
    Section("handbook-folds", HANDBOOK, "python -m benchmarks.quality", each_fold),
    Section(
        "handbook-peers",
        HANDBOOK_PEERS,
        "python -m benchmarks.quality.compare handbook",
        lambda r: by_setting(r, side_by_side),
    ),
    Section(
        "calibration",
        HANDBOOK_PEERS,
        "python -m benchmarks.quality.compare handbook",
        lambda r: by_setting(r, top_bins),
    ),
    Section(
        "segments", HANDBOOK_PEERS, "python -m benchmarks.quality.compare handbook", lambda r: by_setting(r, segments)
    ),
    Section("sparkov", SPARKOV, "python -m benchmarks.quality.compare sparkov", side_by_side),
    Section("sparkov-members", SPARKOV_MEMBERS, "python -m benchmarks.quality.members", members),
    Section("simulator", SIMULATOR, "python -m benchmarks.quality.compare simulator", side_by_side),
    Section("order", ORDER, "python -m benchmarks.quality.order", side_by_side),
    Section("ablation", ABLATION, "python -m benchmarks.quality.ablation", side_by_side),
    Section("pictures", HANDBOOK_PICTURES, "python -m benchmarks.quality.pictures", pictures),
)


def content(section: Section, results: Path) -> str:
    """What stands between a section's markers."""
    file = results / f"{section.result}.json"
    text = section.words(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ""
    return text or f"*Not measured yet: `{section.command}` makes `benchmarks/results/{file.name}`.*"


def written(page: str, results: Path) -> str:
    """The page with every section made anew from the results in a folder. Raises ValueError without a section's markers."""
    for section in SECTIONS:
        begin, end = f"<!-- begin: {section.name} -->", f"<!-- end: {section.name} -->"
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(end) < page.index(begin):
            raise ValueError(f"the page needs {begin} and, after it, {end}, once each")
        before, after = page[: page.index(begin) + len(begin)], page[page.index(end) :]
        page = f"{before}\n\n{content(section, results)}\n\n{after}"
    return page


def main() -> None:
    page = written(PAGE.read_text(encoding="utf-8"), RESULTS)
    with replaced_file(PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
