"""What the result files of the quality benchmark hold: benchmarks/results/NAME.json.

Every file may have more beside this (`environment`, settings, seconds); a figure that the rows do not define is null or
left out. Shares are in 0..1, money in the currency of the data, log-loss in nats.
"""

import json
from pathlib import Path
from typing import Any, TypedDict

HANDBOOK = "handbook_quality"
HANDBOOK_PEERS = "handbook_peers"
HANDBOOK_PICTURES = "handbook_pictures"
SPARKOV = "sparkov_quality"
SPARKOV_MEMBERS = "sparkov_members"
SIMULATOR = "simulator_quality"
ORDER = "order_quality"
ABLATION = "ablation_quality"

GRU = "gru"
"""The name of the model that the others are compared with; where variants are compared, that of the whole model."""


class Run(TypedDict):
    """A fit on one fold of the handbook, measured on its test rows."""

    setting: str
    """week or all."""
    fold: str
    """ISO date of the first train day."""
    seed: int
    average_precision: float
    roc_auc: float
    card_precision_100: float


class HandbookQuality(TypedDict):
    """`HANDBOOK`: the GRU alone, by fold and seed."""

    runs: list[Run]


class Subset(TypedDict):
    """Some of a model's networks, their logits averaged."""

    networks: list[int]
    average_precision: float
    recall: float


class Members(TypedDict):
    """`SPARKOV_MEMBERS`: every choice among the networks of one model, on months before the test."""

    measured: list[Subset]


class Calibration(TypedDict):
    """Slope and intercept of the label on the log-odds, fitted together (`metrics.calibration_slope`), and the intercept with
    the slope held at 1 (`metrics.calibration_in_the_large`); 1, 0 and 0 are calibrated."""

    slope: float | None
    intercept: float | None
    in_the_large: float | None


class Bin(TypedDict):
    """Rows of neighbouring probabilities (`metrics.CalibrationBin`)."""

    count: int
    mean_probability: float
    observed_rate: float


class Segment(TypedDict, total=False):
    """Some of the test rows. All but the first two are figures of a model on them."""

    rows: int
    frauds: int
    average_precision: float | None
    roc_auc: float | None
    recall_at_1pct_fpr: float | None


class Figures(TypedDict, total=False):
    """A model on the test rows."""

    rows: int
    frauds: int
    average_precision: float | None
    interval: tuple[float, float] | None
    """Of the average precision, 95 %, by user."""
    roc_auc: float | None
    card_precision_100: float | None
    recall_at_1pct_fpr: float | None
    money_caught: dict[str, float | None]
    """By alerts a day ("50", "100", "200"): the share of a day's fraud money in them, mean over days."""
    log_loss: float | None
    brier: float | None
    calibration: Calibration | None
    top_bins: list[Bin]
    """Inside the highest-scored 1 % of the rows, from the lowest probability up."""
    segments: dict[str, dict[str, Segment]]
    """Property -> name of the segment, in order; the same rows for every model of a file."""


class Difference(TypedDict):
    """Average precision of the GRU less that of another model, on the same rows and draws; 95 % interval, by user."""

    average_precision: float
    low: float
    high: float


class Comparison(TypedDict, total=False):
    """Models, or variants of one, on the same rows. `SPARKOV`, `SIMULATOR`, `ORDER` and `ABLATION` are one each.

    The first of `models` is the GRU, or the whole model; the others come in the order in which they are shown.
    """

    models: dict[str, Figures]
    differences: dict[str, Difference]
    what: dict[str, str]
    """A few words on a model or a variant, where its name does not say it."""
    note: str
    """A sentence on rows, folds and seeds, that stands over the tables."""


class HandbookPeers(TypedDict):
    """`HANDBOOK_PEERS`: the models by setting, week and all; figures are means over folds, bins and segments pooled."""

    settings: dict[str, Comparison]


class Picture(TypedDict):
    """A file in docs/quality: what it shows, and the rule by which it was chosen."""

    file: str
    title: str
    rule: str
    description: str


class HandbookPictures(TypedDict):
    """`HANDBOOK_PICTURES`: the fit from which the pictures were drawn."""

    setting: str
    fold: str
    seed: int
    pictures: list[Picture]


def kept(file: Path, part: str) -> list[dict[str, Any]]:
    """What a result has of a part so far, row by row; nothing where there is no result yet."""
    rows: list[dict[str, Any]] = json.loads(file.read_text())[part] if file.is_file() else []
    return rows
