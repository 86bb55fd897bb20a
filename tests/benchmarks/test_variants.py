"""The model with something taken away: that what is taken away is gone, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.quality.ablation import LIMITED, LINES, TRAINED, WHOLE, keep, made_lines
from benchmarks.quality.handbook import Fold
from benchmarks.quality.results import kept
from benchmarks.quality.variants import WithoutRecurrence, limited_logits, without_run_state
from seqfraud.config import DAY_MS, load_config
from seqfraud.nn.model import Network, SequenceModel
from training.loop import DeviceData, score_logits
from training.prepare import Prepared, fit_scaling, prepare
from training.simulate import Simulation, simulate_to

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    simulate_to(Simulation(users=40, days=120, fraud_share=0.1), folder / "data.parquet")
    return folder


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Prepared:
    config = load_config(ROOT / "configs" / "simulator.toml")
    return prepare(replace(config, model=replace(config.model, hidden=8)), folder / "data.parquet")


def untrained(prepared: Prepared, kind: type[SequenceModel] = SequenceModel) -> SequenceModel:
    torch.manual_seed(3)
    scaling, spec, graph = fit_scaling(prepared)
    model = kind(spec, graph)
    scaling.apply(model.encoder)
    return model.eval()


def logits(model: SequenceModel, prepared: Prepared) -> npt.NDArray[np.float32]:
    return score_logits(model, DeviceData(prepared.encoded, torch.device("cpu")), prepared.encoded, 16)


def with_other_pasts(prepared: Prepared, rows: npt.NDArray[np.int64]) -> Prepared:
    """Other amounts and categories in the rows; times and places stay."""
    numeric, categorical = prepared.encoded.numeric.copy(), prepared.encoded.categorical.copy()
    numeric[rows, 0] *= 50
    categorical[rows] = 1
    return replace(prepared, encoded=replace(prepared.encoded, numeric=numeric, categorical=categorical))


def test_without_recurrence_only_the_gap_and_the_way_remember(prepared: Prepared) -> None:
    last = prepared.encoded.end - 1
    changed = with_other_pasts(prepared, np.setdiff1d(np.arange(len(prepared.encoded)), last))
    for kind, remembers in ((WithoutRecurrence, False), (SequenceModel, True)):
        model = untrained(prepared, kind)
        same = np.isclose(logits(model, prepared)[last], logits(model, changed)[last], rtol=0, atol=1e-6)
        assert same.all() != remembers, kind
    encoded = prepared.encoded
    times = encoded.time.copy()
    times[last - 1] -= 3_600_000
    moved = replace(prepared, encoded=replace(encoded, time=times))
    model = untrained(prepared, WithoutRecurrence)
    assert (logits(model, prepared)[last] != logits(model, moved)[last]).mean() > 0.9


def test_without_recurrence_learns_in_every_cell(prepared: Prepared) -> None:
    model = untrained(prepared, WithoutRecurrence)
    network = model.networks[0]
    assert isinstance(network, Network)
    states, after = network.recur(torch.randn(2, 5, model.spec.input_width), torch.randn(1, 2, 8), torch.tensor([5, 5]))
    assert states.shape == (2, 6, 8)
    assert (states[:, 0] == 0).all()
    assert (after == 0).all()
    for name, weight in network.cells.named_parameters():
        if "_ih_" in name:
            assert torch.autograd.grad(states.sum(), weight, retain_graph=True)[0].abs().sum() > 0, name


def test_a_long_enough_limit_is_no_limit(prepared: Prepared) -> None:
    model = untrained(prepared)
    rows = np.flatnonzero(prepared.rows.test)
    longest = int(prepared.encoded.lengths().max())
    np.testing.assert_allclose(
        limited_logits(model, prepared, rows, longest), logits(model, prepared)[rows], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("last", [1, 5, 20])
def test_a_limited_history_holds_the_last_events_and_nothing_before(last: int, prepared: Prepared) -> None:
    model = untrained(prepared)
    end = prepared.encoded.end
    rows = (end - 1)[prepared.encoded.lengths() > last + 2]
    before = limited_logits(model, prepared, rows, last)
    out_of_reach = limited_logits(model, with_other_pasts(prepared, rows - last - 1), rows, last)
    in_reach = limited_logits(model, with_other_pasts(prepared, rows - last), rows, last)
    np.testing.assert_array_equal(out_of_reach, before)
    assert (in_reach != before).mean() > 0.5


def test_the_run_state_is_gone_and_the_sums_are_not(prepared: Prepared) -> None:
    names = prepared.context.names()
    less = without_run_state(prepared)
    for k, name in enumerate(names):
        before, after = prepared.encoded.context[:, k], less.encoded.context[:, k]
        if "run_" in name or "since_" in name:
            assert (after == 0).all(), name
        else:
            np.testing.assert_array_equal(after, before, err_msg=name)
    taken = [k for k, name in enumerate(names) if "run_" in name or "since_" in name]
    assert len(taken) == (6 if prepared.context.user is not None else 4) * len(prepared.context.columns)
    other = prepared.encoded.context.copy()
    other[:, taken] += 7
    model = untrained(less)
    noticed = replace(less, encoded=replace(prepared.encoded, context=other))
    np.testing.assert_array_equal(logits(model, noticed), logits(model, less))


def test_every_variant_makes_a_model_that_differs(prepared: Prepared, folder: Path) -> None:
    whole = untrained(prepared).spec
    for line, variant in TRAINED.items():
        seen = variant.prepared(prepared, folder / "data.parquet")
        model = untrained(seen, variant.kind)
        changed = (type(model), model.spec) != (SequenceModel, whole)
        assert changed == (line != "whole"), line
    context = TRAINED["without context"].prepared(prepared, folder / "data.parquet")
    assert context.encoded.context.shape[1] == 0
    np.testing.assert_array_equal(context.rows.test, prepared.rows.test)


def test_every_line_is_made_and_compared_with_the_whole(prepared: Prepared, folder: Path) -> None:
    config = replace(prepared.config, training=replace(prepared.config.training, epochs=1))
    encoded = prepared.encoded
    user = np.repeat(np.arange(len(encoded.begin)), encoded.lengths()).astype(np.int32)
    day = encoded.time // DAY_MS
    fold = Fold("all", "first", 0, replace(prepared, config=config), user, day, prepared.rows.test)
    lines = {row["line"]: row for row in made_lines(fold, LINES, folder / "data.parquet")}
    assert tuple(lines) == LINES
    whole = lines["whole"]["average_precision"]["estimate"]
    for line, row in lines.items():
        assert row["rows"] == prepared.rows.test.sum()
        if line == "whole":
            assert row["whole_minus_this"] is None
            continue
        difference = row["whole_minus_this"]["difference"]
        assert difference == pytest.approx(whole - row["average_precision"]["estimate"]), line
        if line in TRAINED:  # a limit may change so little in a small model that the ranks stay
            assert difference != 0, line


def test_lines_are_kept_in_the_order_in_which_they_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert kept(file, "lines") == []
    for line in reversed(LINES):
        less = None if line == WHOLE else {"difference": 0.1, "low": 0.0, "high": 0.2}
        own = {"estimate": 0.5, "low": 0.4, "high": 0.6}
        counts = {"fold": "2018-07-25", "rows": 9, "frauds": 3}
        keep(file, {"line": line, "seed": 0, **counts, "average_precision": own, "whole_minus_this": less})
    assert [row["line"] for row in kept(file, "lines")] == list(LINES)
    shown = json.loads(file.read_text())
    assert list(shown["models"]) == ["gru", *LINES[1:]]
    assert list(shown["differences"]) == list(LINES[1:])
    assert shown["differences"]["without context"] == {"average_precision": 0.1, "low": 0.0, "high": 0.2}
    assert set(LIMITED) < set(LINES)
