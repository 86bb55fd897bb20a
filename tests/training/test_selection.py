"""`train --select`: what is dropped, on whose word, and that the run folder is one like any other."""

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from export.bundle import export_run
from seqfraud.bulk import read_for_bundle, score_table
from seqfraud.cli import main
from seqfraud.config import Config, load_config, parse_config
from seqfraud.errors import ConfigError
from seqfraud.nn.checkpoint import load_run
from training import selection
from training.importance import FILE, Figure, Importance, Input, inputs_of, read_importance
from training.run import evaluate_run, train_run
from training.selection import MARGIN, TRIALS, Scores, doubtful, select_inputs, without_inputs

torch.set_num_threads(1)

DAY = 86_400_000
START = 1_735_689_600_000  # 2025-01-01
CPU = torch.device("cpu")
CONFIG = """# the user's own words
[data]
path = "data.parquet"
transaction = "id"
user = "user"
time = "time"
time_unit = "ms"
label = "fraud"
label_delay = "1d"
amount = "amount"

[features]
numeric = [
    "amount",  # says nothing here
    "risk",
]
categorical = ["kind", "dice"]  # one of them is thrown
context = ["ghost"]
half_lives = ["1d"]
bins = 4

[split]
train_start = 2025-01-03
train_end = 2025-01-23
validation = "7d"
test_end = 2025-01-29

[model]
hidden = 6
input_width = 12
head_width = 12

[training]
epochs = 5
learning_rate = 2e-2
users_per_batch = 8
events_per_chunk = 16
"""
NOISE = ["numeric amount", "categorical dice", "context ghost"]
TRAIN_END = START + 22 * DAY


def make_data(rows: int = 1600) -> pa.Table:
    """Thirty days; a high risk of kind "web" is fraud; amount, dice and ghost are thrown."""
    rng = np.random.default_rng(0)
    risk = rng.choice([1.0, 2.0, 9.0], rows, p=[0.3, 0.4, 0.3])
    web = rng.random(rows) < 0.4
    return pa.table(
        {
            "id": np.arange(rows),
            "user": rng.integers(0, 30, rows),
            "time": np.sort(rng.integers(START, START + 30 * DAY, rows)),
            "amount": rng.lognormal(3, 1, rows),
            "risk": risk,
            "kind": np.where(web, "web", "shop"),
            "dice": [f"d{d}" for d in rng.integers(1, 7, rows)],
            "ghost": [f"g{s}" for s in rng.integers(0, 9, rows)],
            "fraud": (web & (risk == 9.0)).astype(int),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selected run in `run`."""
    folder = tmp_path_factory.mktemp("selection")
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    pq.write_table(make_data(), folder / "data.parquet")
    train_run(folder / "config.toml", None, folder / "run", "cpu", select=True)
    return folder


# --- A selected run ----------------------------------------------------------------------------------------------


def test_noise_is_dropped_and_what_the_label_is_made_of_is_kept(folder: Path) -> None:
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    found = metrics["selection"]
    assert found["kept"] == ["numeric risk", "categorical kind"]
    assert sorted(found["dropped"]) == sorted(NOISE)
    assert found["full"]["importance"].keys() == {*found["kept"], *NOISE}
    last = found["trials"][-1]
    assert last["accepted"]
    assert last["without"] == found["dropped"]
    assert last["difference"] >= -MARGIN
    assert last["average_precision"] == pytest.approx(found["full"]["average_precision"] + last["difference"])
    assert last["average_precision"] == pytest.approx(metrics["validation"]["average_precision"], abs=1e-3)
    assert metrics["chosen_on"] == "validation rows: inputs, epochs, calibration, thresholds, decisions"


def test_the_configuration_as_used_has_the_inputs_that_are_left_and_the_users_words(folder: Path) -> None:
    text = (folder / "run" / "config.toml").read_text()
    assert text.startswith("# By seqfraud train --select from config.toml: dropped from [features]")
    assert "#   context ghost: importance " in text
    assert '    # dropped: "amount",  # says nothing here\n    "risk",\n' in text
    assert 'categorical = ["kind"]  # one of them is thrown\ncontext = []\n' in text
    config = load_config(folder / "run" / "config.toml")
    given = load_config(folder / "config.toml")
    assert config == without_inputs(given, [i for i in inputs_of(given.features) if str(i) in NOISE])
    assert config.data.amount == "amount"


def test_a_selected_run_is_evaluated_exported_and_scored_like_any_other(folder: Path, tmp_path: Path) -> None:
    """Money figures stay: the amount is no input any more, but still the amount."""
    run = load_run(folder / "run")
    evaluated = evaluate_run(run, None, "cpu")
    assert evaluated["test"] == run.metrics["test"]
    assert evaluated["test"]["money_caught"] is not None
    bundle = export_run(run, tmp_path / "bundle")
    scores = score_table(bundle, read_for_bundle(bundle, folder / "data.parquet"), threads=1)
    label = make_data()["fraud"].to_numpy()
    assert scores[label == 1].min() > np.quantile(scores[label == 0], 0.9)


def test_the_report_shows_what_the_model_uses(folder: Path) -> None:
    page = (folder / "run" / "report.html").read_text()
    assert '<section id="importance">' in page
    assert "Dropped as not needed: " in page
    importance = read_importance(folder / "run")
    assert importance is not None
    assert {str(f.input) for f in importance.figures} == {"numeric risk", "categorical kind"}
    for figure in importance.figures:
        assert f'<th scope="row">{figure.input}</th><td data-value="{figure.mean}">' in page


def test_test_rows_have_no_say(folder: Path) -> None:
    """The same file with nonsense in every row after the validation days: the same choice, by the same figures."""
    table = make_data()
    later = table["time"].to_numpy() >= TRAIN_END
    assert later.sum() > 300
    rng = np.random.default_rng(5)
    nonsense: dict[str, Any] = {
        "amount": rng.normal(0, 1e6, len(table)),
        "risk": np.full(len(table), 9.0),
        "kind": np.full(len(table), "never seen"),
        "dice": np.full(len(table), "d1"),
        "ghost": np.full(len(table), "g1"),
        "fraud": rng.integers(0, 2, len(table)),
    }
    for name, values in nonsense.items():
        mixed = np.where(later, values, table[name].to_numpy(zero_copy_only=False))
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(mixed))
    pq.write_table(table, folder / "nonsense.parquet")
    metrics = train_run(folder / "config.toml", folder / "nonsense.parquet", folder / "other", "cpu", select=True)
    true = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["selection"] == true["selection"]
    assert metrics["test"] != true["test"]
    assert (folder / "other" / FILE).read_bytes() == (folder / "run" / FILE).read_bytes()


class Stopped(Exception):
    """Stands for an interruption."""


def test_an_interrupted_selection_goes_on_to_the_result_it_would_have_had(folder: Path) -> None:
    seen = [0]

    def stop(epoch: int, share: float, events: int, report: object) -> None:
        seen.append(epoch)
        again = any(before > after for before, after in pairwise(seen))
        if again and epoch == 1:  # the second epoch of the second fit
            raise Stopped

    out = folder / "stopped"
    with pytest.raises(Stopped):
        train_run(folder / "config.toml", None, out, "cpu", stop, select=True)
    epochs: list[int] = []
    train_run(folder / "config.toml", None, out, "cpu", lambda e, *_: epochs.append(e), resume=True, select=True)
    assert epochs[0] == 1  # the first fit and the first epoch of the second were kept
    for name in ("model.safetensors", "config.toml", FILE):
        assert (out / name).read_bytes() == (folder / "run" / name).read_bytes()
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in (folder / "run").iterdir())


def test_a_configuration_that_could_not_be_written_is_refused_before_training(tmp_path: Path) -> None:
    text = 'features = { numeric = ["a", "b"] }\n[data]\npath = "none"\nuser = "u"\ntime = "t"\nlabel = "l"\n'
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match="--select rewrites"):
        train_run(tmp_path / "config.toml", None, tmp_path / "run", "cpu", select=True)


# --- seqfraud importance -----------------------------------------------------------------------------------------


def test_the_command_measures_a_run_and_a_new_training_forgets_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = tmp_path / "quick.toml"
    quick.write_text(CONFIG.replace("epochs = 5", "epochs = 1"))
    run = tmp_path / "run"
    train_run(quick, folder / "data.parquet", run, "cpu")
    assert not (run / FILE).exists()
    assert 'id="importance"' not in (run / "report.html").read_text()
    capsys.readouterr()
    assert main(["importance", str(run), "--repeats", "2", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / FILE).read_text())
    importance = read_importance(run)
    assert importance is not None
    assert {len(figure.permuted) for figure in importance.figures} == {2}
    assert 'id="importance"' in (run / "report.html").read_text()
    assert main(["importance", str(run), "--repeats", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert [line.rsplit(None, 2)[0] for line in printed.splitlines()[2:]] == [str(f.input) for f in importance.figures]
    train_run(quick, folder / "data.parquet", run, "cpu")
    assert not (run / FILE).exists()


# --- The search --------------------------------------------------------------------------------------------------

NAMES = "abcdef"


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[selection.Selection, list[str]]]:
    """`searched(means, loss)`: a search in which nothing is trained; `loss` says what a set of inputs scores below all."""

    def search(
        means: Callable[[str], Mapping[str, float]], loss: Callable[[str], float]
    ) -> tuple[selection.Selection, list[str]]:
        trained: list[str] = []

        def train(config: Config) -> Any:
            trained.append("".join(config.features.numeric))
            return SimpleNamespace(prepared=SimpleNamespace(config=config), model=None, names=trained[-1])

        def measure(_: Any, prepared: Any, device: torch.device) -> Importance:
            names = "".join(prepared.config.features.numeric)
            found = [Figure(Input("numeric", (n,)), (), means(names)[n], 0.01) for n in names]
            return Importance(0.5, 10, 5, 10, 0, tuple(sorted(found, key=lambda f: -f.mean)))

        def scores(fitted: Any, _: torch.device) -> Any:
            return fitted.names

        def tried(without: tuple[Input, ...], _: str, reduced: str) -> selection.Trial:
            return selection.Trial(without, 0.5 - loss(reduced), -loss(reduced), loss(reduced) <= MARGIN)

        monkeypatch.setattr(selection, "measure_importance", measure)
        monkeypatch.setattr(selection, "validation_scores", scores)
        monkeypatch.setattr(selection, "_tried", tried)
        toml = f'[data]\nuser = "u"\ntime = "t"\n[features]\nnumeric = {json.dumps(list(NAMES))}\n'
        return select_inputs(parse_config(toml, "test"), train, CPU), trained

    return search


def test_all_that_is_doubtful_goes_at_once_and_the_rest_is_measured_again(searched: Any) -> None:
    def means(names: str) -> dict[str, float]:
        return {n: 0.0 if n in "ef" or (n == "d" and "e" not in names) else 0.2 for n in names}

    found, trained = searched(means, lambda names: 0.0)
    assert trained == ["abcdef", "abcd", "abc"]
    assert [one.columns[0] for one in found.dropped] == ["f", "e", "d"]
    assert found.chosen.names == "abc"


def test_of_two_columns_that_say_the_same_one_stays(searched: Any) -> None:
    """Each alone seems useless, for the other says it too; without both the model is worse."""

    def means(names: str) -> dict[str, float]:
        twins = {n for n in "ab" if n in names}
        return {n: (0.001 if len(twins) == 2 else 0.3) if n in "ab" else 0.2 for n in names}

    found, trained = searched(means, lambda names: 0.0 if "a" in names or "b" in names else 0.3)
    assert trained == ["abcdef", "cdef", "acdef"]
    assert [trial.accepted for trial in found.trials] == [False, True]
    assert found.chosen.names == "acdef"


def test_where_every_trial_is_worse_the_full_model_stays(searched: Any) -> None:
    found, trained = searched(lambda names: dict.fromkeys(names, 0.0), lambda names: 0.1)
    assert trained == ["abcdef", "a", "abcd", "abcde"]  # five, two, one: of the least important
    assert found.dropped == ()
    assert found.chosen.names == "abcdef"


def test_the_last_input_is_never_dropped(searched: Any) -> None:
    found, trained = searched(lambda names: dict.fromkeys(names, -0.1), lambda names: 0.0)
    assert trained == ["abcdef", "a"]
    assert found.chosen.names == "a"


def test_a_set_that_was_refused_is_not_trained_again_and_the_number_of_trials_is_bounded(searched: Any) -> None:
    """Without e and f the model is worse, without one of them it is not: whoever goes first, the other stays."""
    losses = {"abcd": 0.1}
    found, trained = searched(lambda names: {n: 0.0 if n in "ef" else 0.2 for n in names}, lambda n: losses.get(n, 0.0))
    assert trained == ["abcdef", "abcd", "abcde"]
    assert found.chosen.names == "abcde"
    rising = {n: 0.001 * (6 - i) for i, n in enumerate(NAMES)}
    found, trained = searched(lambda names: {n: rising[n] for n in names}, lambda n: 0.1 if len(n) < 6 else 0.0)
    assert len(trained) - 1 == len(found.trials) <= TRIALS


def test_doubtful_is_what_chance_could_lift_as_high() -> None:
    def figure(name: str, mean: float, deviation: float) -> Figure:
        return Figure(Input("numeric", (name,)), (), mean, deviation)

    found = doubtful(
        Importance(
            0.5,
            1,
            1,
            1,
            0,
            (figure("a", 0.5, 0.4), figure("b", 0.3, 0.1), figure("c", 0.0, 0.0), figure("d", -0.2, 0.0)),
        )
    )
    assert [one.columns[0] for one in found] == ["d", "c", "a"]


def test_models_are_compared_on_the_rows_that_both_have() -> None:
    """A dropped column may be the one for whose missing numbers the cleaning dropped rows."""

    def scores(rows: list[int], logits: list[float]) -> Scores:
        label = np.array([row % 2 for row in rows], dtype=np.int8)
        return Scores(np.array(rows), label, np.array(logits))

    full = scores([4, 1, 2], [0.0, 1.0, 2.0])  # row 1 is a fraud, behind row 2: 1/2
    reduced = scores([1, 2, 4, 6, 3], [3.0, 2.0, 1.0, 9.0, 0.0])
    trial = selection._tried((), full, reduced)
    assert trial.difference == pytest.approx(1 - 1 / 2)
    assert trial.average_precision == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert trial.accepted
