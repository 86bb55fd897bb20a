"""`report.html`: every section, the figures of metrics.json, nothing from outside, nobody named, whatever the data lack."""

import json
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqfraud.choosing import Choice
from seqfraud.config import parse_config
from seqfraud.metrics import CalibrationBin, wilson
from seqfraud.policy import NEVER, Costs, Policy, Thresholds
from training.prepare import Prepared, prepare
from training.report import (
    Baselines,
    ReportContent,
    percent,
    pooled,
    read_baselines,
    render_report,
    report_content,
    write_report,
)
from training.report_data import Bin, amount_bands, assess, history_bands, money_text
from training.run import measure_worth, qualities
from training.worth import described_choice, scored_days

CONFIG = """
[data]
transaction = "id"
user = "card"
time = "time"
label = "fraud"
label_delay = "1d"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["<script>alert(1)</script>"]
context = ["shop"]
ip = ["ip"]
geo = [["lat", "long"]]
[split]
train_start = "2025-01-03"
validation = "5d"
train_end = "2025-01-21"
test_start = "2025-01-22"
test_end = "2025-01-31"
"""
HOSTILE = "<script>alert(1)</script>"
VALUES = ['<img src=x onerror="alert(2)">', "a & b", "$\\frac{1}{2}$", "plain"]
START = np.datetime64("2025-01-01T00:00:00", "ms")
SECTIONS = {
    "verdict", "models", "curves", "worth", "choices", "training", "segments", "misses", "cleaning", "configuration", "glossary"
}  # fmt: skip


class Page(HTMLParser):
    """What the tests ask of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self._table: list[list[str]] | None = None
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs).get("id") or f"table {len(self.tables)}", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self._table and self._table[-1] and {"td", "th"} & set(self.open):
            self._table[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def sections(self) -> set[str]:
        return {str(attrs["id"]) for tag, attrs in self.tags if tag == "section"}


@dataclass(frozen=True)
class Made:
    """Transactions with drawn scores, and what a training would say of them."""

    prepared: Prepared
    probability: Any
    policy: Policy
    metrics: dict[str, Any]


def table(rows: int = 3000, users: int = 40, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, 30 * 86_400_000, rows))
    return pa.table(
        {
            "id": np.arange(rows) + 7000,
            "card": [f"card-of-person-{u}" for u in rng.integers(0, users, rows)],
            "time": START + time,
            "amount": np.round(rng.lognormal(3, 1.2, rows), 2),
            HOSTILE: [VALUES[i] for i in rng.integers(0, 4, rows)],
            "shop": [f"shop-secret-{i}" for i in rng.integers(0, 50, rows)],
            "ip": [f"198.51.100.{i}" for i in rng.integers(0, 255, rows)],
            "lat": rng.uniform(48, 49, rows),
            "long": rng.uniform(11, 12, rows),
            "fraud": (rng.random(rows) < 0.06).astype(int),
        }
    )


def made(folder: Path, data: pa.Table, config: str = CONFIG, cut: float = 0.5, good: float = 2.0) -> Made:
    """Scores are drawn: `good` says how far apart the classes are, in log-odds."""
    pq.write_table(data, folder / "data.parquet")
    prepared = prepare(parse_config(config, "test"), folder / "data.parquet")
    rng = np.random.default_rng(1)
    odds = rng.normal(-3, 1.5, len(prepared.label)) + good * (prepared.label == 1)
    probability = 1 / (1 + np.exp(-odds))
    policy = Policy(Thresholds(is_fraud=cut, review=cut, decline=NEVER))
    validation = scored_days(prepared, probability, "validation")
    assert validation is not None
    choice = described_choice(prepared.config.decision, validation, Choice(policy))
    epochs = [{"epoch": i, "loss": 1 / i, "validation_average_precision": 0.1 * i} for i in (1, 2, 3)]
    metrics = {
        "best_epoch": 2,
        "epochs": epochs,
        "device": "cpu",
        "rows": {name: int(mask.sum()) for name, mask in vars(prepared.rows).items()},
        **qualities(prepared, probability, policy.thresholds),
        "choice": choice,
        "worth": measure_worth(prepared, probability, policy, choice["alternatives"]),
    }
    return Made(prepared, probability, policy, metrics)


def baselines(of: Made, names: tuple[str, ...] = ("boosted_trees", "logistic_regression")) -> Baselines:
    arrival = of.prepared.encoded.arrival[of.prepared.rows.test]
    rng = np.random.default_rng(2)
    ids = of.prepared.table.take(arrival).id_texts()
    return Baselines(
        ids, {name: rng.random(len(ids)) for name in names}, {names[0]: {"parameters": {"C": 1}, "seconds": 2.4}}
    )


def content(of: Made, others: Baselines | None = None) -> ReportContent:
    return report_content(
        of.prepared, of.probability, of.metrics, of.policy, title="run <b>1</b>", config_text=CONFIG,
        command=("seqfraud train c.toml", ), baselines=others, versions={"seqfraud": "1.2.3"},
    )  # fmt: skip


def shown(of: ReportContent) -> Page:
    """The page with one of its misses: each is two charts, which take time."""
    return Page(render_report(replace(of, misses=of.misses[:1])))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("run"), table())


@pytest.fixture(scope="module")
def page(run: Made) -> Page:
    return Page(render_report(content(run, baselines(run))))


def test_every_section_is_there_and_every_link_leads_to_one(page: Page) -> None:
    assert page.sections == SECTIONS
    links = {str(attrs["href"]) for tag, attrs in page.tags if tag == "a"}
    assert links == {f"#{name}" for name in SECTIONS - {"verdict"}}
    titles = [
        "Precision and recall", "Scores by class", "Calibration over all rows", "Calibration in the top 1 %",
        "Alerts against fraud money caught", "Alerts against precision", "Cost against reviews", "Loss on the training days",
        "Average precision on the validation days",
    ]  # fmt: skip
    for title in titles:
        assert title in page.text
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(charts) == len(titles) + 5, "and the timelines of five misses"
    assert all(attrs["aria-label"] for attrs in charts)


def test_nothing_is_loaded_from_outside_and_no_script_runs(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "foreignobject"} & {
        t for t, _ in page.tags
    }
    for _, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), (name, value)
            if name in ("href", "src", "xlink:href", "data", "action"):
                assert str(value).startswith("#"), "only places in the page itself"
            assert "url(" not in str(value) or "url(#" in str(value)
    assert not re.search(r"https?://|@import|url\((?!#)", page.raw)
    assert len(page.raw.encode()) < 1_500_000


def test_no_two_charts_share_an_id(page: Page) -> None:
    """A clip path of another chart would cut this one."""
    ids = [str(attrs["id"]) for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_hostile_names_and_values_are_text(page: Page) -> None:
    assert "Category <script>alert(1)</script>" in page.text
    assert "run <b>1</b>" in page.text
    assert '<img src=x onerror="alert(2)">' in page.text
    assert "$\\frac{1}{2}$" in page.text, "and no mathematics"


def test_nobody_is_named(run: Made, page: Page) -> None:
    """Users are letters, entities numbers; a finding's examples from such columns are not shown."""
    for secret in ("card-of-person", "shop-secret", "198.51.100"):
        assert secret not in page.raw
    for letter in "ABCDE":
        assert f"User {letter}: amount" in page.text
    assert "#1" in page.text
    report = {"rows_read": 9, "rows_used": 8, "findings": [
        {"reason": "missing user", "column": "card", "rows": 1, "share": 1 / 9, "action": "dropped", "examples": ["row 3: x-person"]},
        {"reason": "outlier", "column": "amount", "rows": 1, "share": 1 / 9, "action": "kept", "examples": ["row 4: 5e+09"]},
    ]}  # fmt: skip
    dirty = shown(content(replace(run, prepared=replace(run.prepared, cleaning=report))))
    assert "x-person" not in dirty.raw
    assert dirty.tables["cleaning-table"][1:] == [
        ["missing user", "card", "1", "11.1 %", "dropped", "not shown"],
        ["outlier", "amount", "1", "11.1 %", "kept", "row 4: 5e+09"],
    ]
    assert "9 rows were read and 8 used" in dirty.text


def test_a_user_who_is_a_category_too_is_not_named(tmp_path: Path) -> None:
    data = made(tmp_path, table(), CONFIG.replace(f'["{HOSTILE}"]', '["card"]'))
    assert "card-of-person" not in shown(content(data)).raw


def test_figures_are_those_of_metrics_json(run: Made, page: Page, tmp_path: Path) -> None:
    test = json.loads(json.dumps(run.metrics))["test"]
    header, gru, *others = page.tables["model-table"]
    values = {attrs["data-value"] for tag, attrs in page.tags if tag == "td" and "data-value" in attrs}
    for key in ("average_precision", "roc_auc", "recall_at_1pct_fpr", "precision_at_budget", "money_caught", "brier"):
        assert str(test[key]) in values, key
    assert gru[0] == "GRU"
    assert gru[1].startswith(f"{test['average_precision']:.3f}")
    assert re.search(r"\d \d|\d−|to", gru[1]), "with its interval"
    assert [row[0] for row in others] == ["boosted treesC 1, fitted in 2 s", "logistic regression"]
    assert all(len(row) == len(header) for row in page.tables["model-table"])
    assert f"{test['rows']:,} transactions and {test['frauds']:,} frauds" in page.text
    choice = next(row for row in page.tables["choice-table"] if row[0] == "“is fraud” from")
    flagged = f"{100 * test['flagged'] / test['rows']:.2f} %"
    assert choice[-1].startswith(flagged)
    assert f"{100 * test['recall']:.1f} %" in choice[-1]
    assert "Better than every baseline" in page.text


def test_what_decisions_are_worth_stands_there_for_both_parts(run: Made, page: Page) -> None:
    worth = run.metrics["worth"]
    for part in ("validation", "test"):
        header, *rows = page.tables[f"worth-{part}"]
        policies = worth[part]["policies"]
        assert [row[0] for row in rows] == list(policies)
        assert list(policies)[:2] == ["no model", "this policy"]
        assert len(policies) > 2, "and something to compare it with"
        for row, of in zip(rows, policies.values(), strict=True):
            assert len(row) == len(header)
            assert row[1].startswith(f"{of['alerts']:,.1f}")
            assert row[8].startswith(money_text(of["cost"]["estimate"]))
    mine = worth["test"]["policies"]["this policy"]["saved"]
    assert f"it saves {money_text(mine['estimate'])} a day" in page.text
    assert "[decision] names no costs" in page.text


@pytest.mark.parametrize(
    ("decision", "policy", "words"),
    [
        (
            'by = "budget"\nalerts_per_day = 9\ndeclines_per_day = 2',
            Policy(Thresholds(0.5, 0.4, 0.9), review_loss=5.0),
            [
                "an expected loss of 5.00",
                "a mean of 9 alerts a day",
                "a mean of 2 declines a day",
                "a budget of 9 alerts",
            ],
        ),
        (
            'by = "cost"\nreview_cost = 2\ninsult_share = 0.5',
            Policy(Thresholds(0.5, 0.4, 0.9), costs=Costs(2.0, insult_share=0.5, margin=2.0)),
            [
                "margin",
                "1, unless another cost less",
                "review from 0.4000",
                "a review 2.00",
                "declined 0.5 × its amount",
            ],
        ),
        (
            "review = 0.4\ndecline = 0.9",
            Policy(Thresholds(0.5, 0.4, 0.9)),
            ["Decided is by thresholds", "0.4000 given", "0.9000 given"],
        ),
    ],
)
def test_what_decides_is_said_with_what_it_took_in(run: Made, decision: str, policy: Policy, words: list[str]) -> None:
    prepared = replace(run.prepared, config=parse_config(f"{CONFIG}[decision]\n{decision}\n", "test"))
    metrics = {**run.metrics, "worth": measure_worth(prepared, run.probability, policy, {})}
    page = shown(content(replace(run, prepared=prepared, policy=policy, metrics=metrics)))
    shown_words = " ".join(" ".join(part.split()) for row in page.tables["choice-table"] for part in row) + page.text
    for one in words:
        assert one in shown_words, one
    arrival = prepared.encoded.arrival[prepared.rows.test]
    amount = prepared.table.amount()
    assert amount is not None
    acts = policy.decide_many(run.probability[prepared.rows.test], amount[arrival]) > 0
    row = next(row for row in page.tables["choice-table"] if row[0] in ("review from", "review or decline"))
    assert row[-1].startswith(percent(float(acts.mean())))


def test_segments_add_up(run: Made) -> None:
    found = assess(content(run))
    held = content(run).held_out
    assert [part.name for part in found.segmentations] == ["Amount", "Events of the user before", f"Category {HOSTILE}"]
    for part in found.segmentations:
        assert sum(s.rows for s in part.segments) == len(held)
        assert sum(s.frauds for s in part.segments) == int(held.fraud.sum())


def test_calibration_bins_hold_equally_many_rows_in_the_top_too(run: Made) -> None:
    found = assess(content(run))
    rows = len(content(run).held_out)
    assert sum(b.bin.count for b in found.calibration) == rows
    assert sum(b.bin.count for b in found.calibration_top) == pytest.approx(rows / 100, abs=1)
    for bins in (found.calibration, found.calibration_top):
        counts = [b.bin.count for b in bins]
        assert max(counts) - min(counts) <= 1


def test_misses_are_frauds_below_the_threshold_with_their_users_events_in_order(run: Made) -> None:
    misses = content(run).misses
    assert len(misses) == 5
    table, amount = run.prepared.table, run.prepared.table.amount()
    assert amount is not None
    ids = table.id_texts()
    users = set()
    for miss in misses:
        fraud = miss.events[miss.at]
        row = ids.index(miss.transaction)
        assert (fraud.time, fraud.amount, fraud.label) == (table.time[row], amount[row], 1)
        assert fraud.probability is not None
        assert fraud.probability < run.policy.thresholds.is_fraud
        times = [event.time for event in miss.events]
        assert times == sorted(times)
        own = np.sort(table.time[table.user.codes == table.user.codes[row]])
        assert set(times) <= set(own.tolist())
        users.add(int(table.user.codes[row]))
    assert len(users) == 5
    assert [miss.why for miss in misses] == ["among the highest amounts missed"] * 3 + [
        "among the lowest scores of a fraud"
    ] * 2


def test_the_same_content_gives_the_same_bytes_in_a_file_that_is_whole(run: Made, page: Page, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", content(run, baselines(run)))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.raw


# ---- what may be missing


def changed(config: str, *lines: str) -> str:
    """The configuration without some of its lines."""
    for line in lines:
        assert line in config
        config = config.replace(line + "\n", "")
    return config


def test_without_baselines(run: Made) -> None:
    page = shown(content(run))
    assert page.sections == SECTIONS
    assert "No baseline to compare with" in page.text
    assert "`seqfraud baselines RUN` puts simpler models beside this one" in page.text
    assert len(page.tables["model-table"]) == 2
    assert "GRU minus this" not in page.text


def test_baselines_of_other_rows_are_left_out_with_a_note(run: Made) -> None:
    others = baselines(run)
    page = shown(content(run, replace(others, ids=[f"x{i}" for i in others.ids])))
    assert "The run folder's baselines scored other rows and are left out" in page.text
    assert len(page.tables["model-table"]) == 2
    scores = {"half": np.where(np.arange(len(others.ids)) % 2, np.nan, 0.5)}
    page = shown(content(run, replace(others, scores=scores)))
    assert "The baseline half has test rows without a score and is left out" in page.text


def test_a_baseline_that_only_ranks_has_no_probabilities(run: Made) -> None:
    others = baselines(run, ("isolation_forest",))
    scores = {"isolation_forest": 5 - 10 * others.scores["isolation_forest"]}
    page = shown(content(run, replace(others, scores=scores)))
    row = page.tables["model-table"][-1]
    assert row[0].startswith("isolation forest")
    assert row[-1] == "–", "no Brier score"
    assert re.fullmatch(r"0\.\d{3}", row[3]), "but a ROC AUC"


def test_without_an_amount_money_is_not_spoken_of(tmp_path: Path) -> None:
    config = changed(CONFIG, 'amount = "amount"')
    page = shown(content(made(tmp_path, table(), config)))
    assert page.sections == SECTIONS
    assert "Alerts against frauds caught" in page.text
    before_glossary = page.text.partition("Glossary Average precision")[0]
    assert "money" not in before_glossary.lower()


def test_with_numbers_alone(tmp_path: Path) -> None:
    lines = (f'categorical = ["{HOSTILE}"]', 'context = ["shop"]', 'ip = ["ip"]', 'geo = [["lat", "long"]]')
    data = made(tmp_path, table(), changed(CONFIG, 'transaction = "id"', *lines))
    page = shown(content(data, baselines(data)))
    assert page.sections == SECTIONS
    assert "Category" not in page.text
    assert "km from the last" not in page.text


def test_with_a_handful_of_test_rows(tmp_path: Path) -> None:
    rows = table()
    test = rows["time"].to_numpy() >= np.datetime64("2025-01-22")
    few = np.flatnonzero(test & (rows["fraud"].to_numpy() == 1))[:2].tolist() + np.flatnonzero(test)[:4].tolist()
    keep = np.sort(np.unique(np.r_[np.flatnonzero(~test), few]))
    page = shown(content(made(tmp_path, rows.take(keep))))
    assert page.sections == SECTIONS
    assert "every figure here is uncertain" in page.text


def test_without_test_rows_the_report_says_that_it_knows_nothing(tmp_path: Path) -> None:
    rows = table()
    before = rows.filter(pa.array(rows["time"].to_numpy() < np.datetime64("2025-01-21")))
    page = shown(content(made(tmp_path, before)))
    assert "Not tested" in page.text
    assert "Nothing to draw" in page.text
    assert page.sections == SECTIONS - {"segments"}


@pytest.mark.parametrize("value", [0, 1])
def test_with_one_class_in_the_test_days(tmp_path: Path, value: int) -> None:
    rows = table()
    label = np.where(rows["time"].to_numpy() >= np.datetime64("2025-01-22"), value, rows["fraud"].to_numpy())
    rows = rows.set_column(rows.column_names.index("fraud"), "fraud", pa.array(label))
    page = shown(content(made(tmp_path, rows)))
    if value == 0:
        assert "No fraud in the test days" in page.text
        assert "No fraud of the test days is below the threshold" in page.text
    else:
        assert "frauds (100 %)" in page.text
    assert page.sections == SECTIONS


def test_with_no_fraud_missed_and_with_every_fraud_missed(tmp_path: Path) -> None:
    page = shown(content(made(tmp_path, table(), cut=0.0)))
    assert "No fraud of the test days is below the threshold for “is fraud”." in page.text
    page = shown(content(made(tmp_path, table(), cut=NEVER)))
    assert "User A" in page.text


def test_with_missing_amounts_and_values(tmp_path: Path) -> None:
    rows = table()
    gone = np.arange(len(rows)) % 3 == 0
    for column in ("amount", HOSTILE, "shop"):
        values = pa.array([None if g else v for g, v in zip(gone, rows[column].to_pylist(), strict=True)])
        rows = rows.set_column(rows.column_names.index(column), column, values)
    page = shown(content(made(tmp_path, rows)))
    assert page.sections == SECTIONS
    assert ">missing</th>" in page.raw


def test_without_epochs_there_is_no_training_section(run: Made) -> None:
    metrics = {k: v for k, v in run.metrics.items() if k not in ("epochs", "best_epoch")}
    assert shown(content(replace(run, metrics=metrics))).sections == SECTIONS - {"training"}


# ---- files


def test_baselines_are_read_from_the_run_folder(run: Made, tmp_path: Path) -> None:
    assert read_baselines(tmp_path) is None
    scores = pa.table(
        {"transaction_id": ["7", "8"], "label": pa.array([0, 1], pa.int8()), "boosted_trees": [0.5, 0.25]}
    )
    pq.write_table(scores, tmp_path / "test_scores.parquet")
    (tmp_path / "baselines.json").write_text('{"models": {"boosted_trees": {"seconds": 3}}}')
    found = read_baselines(tmp_path)
    assert found is not None
    assert list(found.ids) == ["7", "8"]
    assert {name: values.tolist() for name, values in found.scores.items()} == {"boosted_trees": [0.5, 0.25]}
    assert found.details == {"boosted_trees": {"seconds": 3}}


# ---- arithmetic


def test_a_wilson_interval_is_that_of_the_literature() -> None:
    """Newcombe 1998, table I: 81 of 263, and 0 of 20."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_pooled_bins_weigh_rows() -> None:
    bins = [Bin(CalibrationBin(10, 0.1, 0.2), 0, 1), Bin(CalibrationBin(30, 0.3, 0.4), 0, 1)]
    said, came = pooled(bins)
    assert said == pytest.approx(0.25)
    assert came.value == pytest.approx(14 / 40)


def test_bands_leave_no_row_out_and_take_none_twice() -> None:
    amount = np.array([0.0, 1.0, 1.0, 5.0, 100.0, np.nan, 7.0])
    assert np.array([mask for _, mask in amount_bands(amount)]).sum(axis=0).tolist() == [1] * 7
    assert amount_bands(np.full(3, 2.0))[0][0] == "2.00"
    history = np.array([0, 1, 4, 5, 19, 20, 99, 100, 499, 500, 10_000])
    names = [name for name, mask in history_bands(history) for _ in range(int(mask.sum()))]
    assert names == ["0", "1 to 4", "1 to 4", "5 to 19", "5 to 19", "20 to 99", "20 to 99", "100 to 499", "100 to 499",
                     "500 and more", "500 and more"]  # fmt: skip
