"""docs/quality.md: tables from the results, prose untouched, a missing result with its command."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.processes import RESULTS
from benchmarks.quality.handbook import FOLDS
from benchmarks.quality.page import (
    PAGE,
    SECTIONS,
    differences_table,
    each_fold,
    figure,
    folds_beside_published,
    members,
    models_table,
    money_columns,
    pictures,
    segments,
    side_by_side,
    top_bins,
    written,
)
from benchmarks.quality.page import PROBABILITIES as PROBABILITY_COLUMNS
from benchmarks.quality.page import RANKING as RANKING_COLUMNS

PROSE = "# A page\n\nWords with | bars | and `code`.\n"


def blank() -> str:
    """A page with every section, prose between them."""
    parts = [f"{PROSE}\n<!-- begin: {s.name} -->\nold words\n<!-- end: {s.name} -->\n" for s in SECTIONS]
    return "".join(parts) + "The end.\n"


def prose_of(page: str) -> str:
    return re.sub(r"(<!-- begin: (\S+) -->).*?(<!-- end: \2 -->)", r"\1\3", page, flags=re.DOTALL)


def between(page: str, name: str) -> str:
    return page.split(f"<!-- begin: {name} -->")[1].split(f"<!-- end: {name} -->")[0].strip()


def cells(table: str) -> dict[str, list[str]]:
    """First cell of each row -> the others; the header's first cell may be empty."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"---"}
    return {line[0]: line[1:] for line in [lines[0], *lines[2:]]}


COMPARISON = {
    "note": "Four folds, seed 0.",
    "models": {
        "gru": {
            "average_precision": 0.7482,
            "interval": [0.7311, 0.7654],
            "roc_auc": 0.891,
            "money_caught": {"50": 0.5, "100": 0.625, "200": 0.75},
            "log_loss": 0.01234,
            "calibration": {"slope": 0.9, "intercept": -0.7, "in_the_large": -0.2},
            "top_bins": [{"count": 1234, "mean_probability": 0.25, "observed_rate": 0.125}],
            "segments": {"amount": {"under 20": {"rows": 5000, "frauds": 12, "average_precision": 0.5}}},
        },
        "boosted_trees": {
            "average_precision": 0.75,
            "roc_auc": None,
            "money_caught": {"50": 0.4, "100": 0.65, "200": 0.7},
            "log_loss": 0.02,
            "calibration": {"slope": 1.05, "intercept": 0.3, "in_the_large": 0.1},
            "segments": {"amount": {"under 20": {"rows": 5000, "frauds": 12, "average_precision": None}}},
        },
        "isolation_forest": {"average_precision": 0.05},
    },
    "differences": {
        "boosted_trees": {"average_precision": -0.0018, "low": -0.011, "high": 0.007},
        "isolation_forest": {"average_precision": 0.6982, "low": 0.66, "high": 0.73},
    },
}


def run(setting: str, fold: str, seed: int, value: float) -> dict:
    return {
        "setting": setting, "fold": fold, "seed": seed,
        "average_precision": value, "roc_auc": 0.9, "card_precision_100": 0.3,
    }  # fmt: skip


HANDBOOK = {
    "runs": [
        *(run("all", fold, 0, value) for fold, value in zip(FOLDS, (0.70, 0.72, 0.74, 0.76), strict=True)),
        *(run("all", fold, 1, value) for fold, value in zip(FOLDS, (0.72, 0.74, 0.76, 0.78), strict=True)),
        *(run("week", fold, 0, 0.71) for fold in FOLDS),
        run("week", FOLDS[0], 1, 0.61),
    ]
}
CHOICES = [([0], 0.98, 0.99), ([1], 0.982, 0.992), ([0, 1], 0.9851, 0.9935)]
MEMBERS = {"measured": [{"networks": who, "average_precision": ap, "recall": recall} for who, ap, recall in CHOICES]}
PICTURES = {
    "setting": "all", "fold": "2018-07-25", "seed": 0,
    "pictures": [{"file": "customer-1.svg", "title": "Customer 7", "rule": "the first of all", "description": "Dots [N]."}],
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with every result."""
    made = {s.result: COMPARISON for s in SECTIONS} | {
        "handbook_quality": HANDBOOK,
        "handbook_peers": {"settings": {"all": COMPARISON, "week": COMPARISON}},
        "handbook_pictures": PICTURES,
        "sparkov_members": MEMBERS,
    }
    for name, content in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_the_prose_is_left_alone_and_a_second_time_changes_nothing(results):
    page = written(blank(), results)
    assert prose_of(page) == prose_of(blank())
    assert "old words" not in page
    assert written(page, results) == page


def test_a_missing_result_names_the_command_that_makes_it(tmp_path):
    page = written(blank(), tmp_path)
    for section in SECTIONS:
        assert f"`{section.command}`" in between(page, section.name)
        assert f"{section.result}.json" in between(page, section.name)


def test_a_result_that_has_nothing_for_a_section_counts_as_missing(tmp_path):
    (tmp_path / "handbook_peers.json").write_text(json.dumps({"settings": {"week": {"models": {"gru": {}}}}}))
    page = written(blank(), tmp_path)
    assert "Not measured" in between(page, "segments")
    assert "Not measured" in between(page, "calibration")


@pytest.mark.parametrize("broken", ["<!-- begin: order -->", "<!-- end: order -->"])
def test_a_page_without_a_marker_is_refused(broken, tmp_path):
    with pytest.raises(ValueError, match="order"):
        written(blank().replace(broken, ""), tmp_path)


def test_the_page_in_the_repository_has_every_section_and_its_pictures():
    page = PAGE.read_text(encoding="utf-8")
    assert prose_of(written(page, RESULTS)) == prose_of(page)
    for file in re.findall(r"\]\((quality/[^)]*)\)", page):
        assert (PAGE.parent / file).is_file()


def test_the_handbook_table_means_over_folds_and_whole_seeds():
    text = folds_beside_published(HANDBOOK)
    rows = cells(text.split("\n\n")[0])
    assert rows[""] == ["ROC AUC", "average precision", "card precision@100"]
    assert rows["published, XGBoost"] == [".8694", ".6865", ".3032"]
    assert rows["**GRU, all**"][1] == "**.7400 ± .0258 (.7300 to .7500)**"
    assert rows["**GRU, week**"][1] == "**.7100 ± .0000**"  # seed 1 has one fold only
    assert list(rows)[-2:] == ["**GRU, week**", "**GRU, all**"]
    assert "week 1, all 2" in text


def test_the_table_of_folds_has_every_run():
    rows = cells(each_fold(HANDBOOK))
    assert rows["average precision"] == list(FOLDS)
    assert rows["all"][0] == ".7100 (.7000 to .7200)"
    assert rows["week"][:2] == [".6600 (.6100 to .7100)", ".7100"]


def test_models_have_the_columns_that_there_are_and_the_best_is_bold():
    rows = cells(models_table(COMPARISON, RANKING_COLUMNS))
    assert rows[""] == ["average precision", "ROC AUC"]
    assert rows["GRU"] == [".7482 (.731 to .765)", ".8910"]  # the only one with a ROC AUC: nothing to be best of
    assert rows["boosted trees"] == ["**.7500**", "–"]
    assert rows["isolation forest"] == [".0500", "–"]


def test_calibration_is_best_near_one_and_zero():
    rows = cells(models_table(COMPARISON, PROBABILITY_COLUMNS))
    assert rows[""] == ["log-loss", "calibration slope", "calibration intercept", "with the slope free"]
    assert rows["GRU"] == ["**.01234**", ".900", "−.200", "−.700"]
    assert rows["boosted trees"] == [".02000", "**1.050**", "**.100**", ".300"]


def test_money_goes_by_the_number_of_alerts():
    rows = cells(models_table(COMPARISON, money_columns(COMPARISON)))
    assert rows[""] == [f"money caught, {n} alerts a day" for n in (50, 100, 200)]
    assert rows["GRU"] == ["**.500**", ".625", "**.750**"]


def test_a_difference_says_whether_chance_explains_it():
    rows = cells(differences_table(COMPARISON["differences"]))
    assert rows["boosted trees"] == ["−.0018", "−.0110 to +.0070", "not told apart"]
    assert rows["isolation forest"][2] == "GRU ahead"
    behind = differences_table({"x": {"average_precision": -0.2, "low": -0.3, "high": -0.1}})
    assert cells(behind)["x"][2] == "GRU behind"


def test_variants_have_words_and_a_note():
    text = side_by_side({**COMPARISON, "what": {"isolation_forest": "no labels"}})
    assert text.startswith("Four folds, seed 0.")
    assert text.endswith("- isolation forest: no labels")


def test_networks_are_counted_alone_and_together():
    assert cells(members(MEMBERS)) == {
        "networks": ["average precision", "recall at 1 % false positives"],
        "1": [".9810 (.9800 to .9820)", ".9910 (.9900 to .9920)"],
        "2": [".9851", ".9935"],
    }


def test_bins_and_segments():
    assert cells(top_bins(COMPARISON))["1,234"] == [".250", ".125"]
    rows = cells(segments(COMPARISON))
    assert rows[""] == ["segment", "rows", "frauds", "GRU", "boosted trees"]
    assert rows["amount"] == ["under 20", "5,000", "12", ".5000", "–"]


def test_a_picture_has_its_words_and_its_rule():
    text = pictures(PICTURES)
    assert "![Customer 7. Dots (N).](quality/customer-1.svg)" in text
    assert "the first of all" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.7131, ".7131"), (1.0, "1.0000"), (-0.00001, ".0000"), (-0.5, "−.5000"), (12.5, "12.5000"), (None, "–")],
)
def test_figures_are_short(value, text):
    assert figure(value) == text


def test_each_setting_has_its_tables(results):
    page = written(blank(), results)
    text = between(page, "handbook-peers")
    assert [line for line in text.splitlines() if line in ("**week**", "**all**")] == ["**week**", "**all**"]
    assert text.count("| GRU |") == 6
