"""The training loop: what the loss is over, what is carried, which weights are kept, and that it learns."""

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from seqfraud.config import Config, TrainingConfig, parse_config
from seqfraud.errors import ConfigError
from seqfraud.metrics import average_precision
from seqfraud.nn.model import SequenceModel
from seqfraud.sequences import Chunk, chunks, group_users
from training import loop
from training.loop import (
    FINAL_RATE,
    DeviceData,
    Epoch,
    carried,
    fit,
    learning_rate,
    pick_device,
    positive_weight,
    score_logits,
    walk,
)
from training.prepare import Prepared, fit_scaling, prepare

torch.set_num_threads(1)

HOUR = 3_600_000
DAY = 24 * HOUR
START = 1_735_689_600_000  # 2025-01-01
CPU = torch.device("cpu")
CONFIG = """
[data]
user = "user"
time = "time"
time_unit = "ms"
label = "fraud"
label_known_at = "known_at"
[features]
numeric = ["amount"]
bins = 4
[split]
train_start = 2025-01-06
train_end = 2025-01-25
validation = "5d"
test_start = 2025-01-26
[model]
hidden = 12
input_width = 12
head_width = 12
layers = 2
"""
TINY = 1.0
LARGE = 300.0


def make_data(users: int, days: int, per_day: float, seed: int = 0) -> pa.Table:
    """A large amount right after a tiny one is a fraud; without the order, one in five large amounts is."""
    rng = np.random.default_rng(seed)
    rows = int(users * days * per_day)
    user = rng.integers(0, users, rows)
    time = np.sort(rng.integers(START, START + days * DAY, rows))
    amount = rng.choice([TINY, 20.0, LARGE], rows, p=[0.2, 0.5, 0.3])
    fraud = np.zeros(rows, dtype=np.int64)
    last: dict[int, float] = {}
    for i in range(rows):
        fraud[i] = amount[i] == LARGE and last.get(int(user[i])) == TINY
        last[int(user[i])] = amount[i]
    labels = [None if i % 17 == 0 else int(label) for i, label in enumerate(fraud)]
    return pa.table({"user": user, "time": time, "amount": amount, "fraud": labels, "known_at": time + HOUR})


def prepared_of(folder: Path, table: pa.Table, config: Config | None = None) -> Prepared:
    pq.write_table(table, folder / "data.parquet")
    return prepare(config or parse_config(CONFIG, "config.toml"), folder / "data.parquet")


def model_of(prepared: Prepared, seed: int = 0) -> SequenceModel:
    torch.manual_seed(seed)
    scaling, spec, graph = fit_scaling(prepared)
    model = SequenceModel(spec, graph)
    scaling.apply(model.encoder)
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A month of twelve users."""
    return prepared_of(tmp_path_factory.mktemp("loop"), make_data(users=12, days=30, per_day=1.5))


def settings(**changes: object) -> TrainingConfig:
    defaults: dict[str, object] = {"epochs": 1, "users_per_batch": 5, "events_per_chunk": 8, "learning_rate": 1e-2}
    return TrainingConfig(**{**defaults, **changes})  # type: ignore[arg-type]


def weights_after(prepared: Prepared, model: SequenceModel, chosen: TrainingConfig) -> dict[str, torch.Tensor]:
    trained = copy.deepcopy(model)
    fit(trained, prepared, CPU, chosen)
    return trained.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


def with_labels_flipped(prepared: Prepared, rows: np.ndarray) -> Prepared:
    label = prepared.label.copy()
    label[rows] = np.where(label[rows] == 1, 0, 1)
    return dataclasses.replace(prepared, label=label)


# --- Several networks ---------------------------------------------------------------------------------------------


def test_each_network_learns_as_it_would_alone(small: Prepared) -> None:
    """Also the clipped gradient is its own: with a tight clip, one network's step would shorten the other's."""
    config = small.config
    pair = dataclasses.replace(
        small, config=dataclasses.replace(config, model=dataclasses.replace(config.model, members=2))
    )
    chosen = settings(epochs=2, clip=0.05)
    both = model_of(pair)
    fitted = weights_after(pair, both, chosen)
    drawn = [network.state_dict() for network in both.networks]
    assert not same(drawn[0], drawn[1])
    for i, weights in enumerate(drawn):
        alone = model_of(small)
        alone.networks[0].load_state_dict(weights)
        # the epoch that is kept is the pair's
        after = weights_after(small, alone, dataclasses.replace(chosen, patience=99))
        for name, value in after.items():
            mine = fitted[name.replace("networks.0.", f"networks.{i}.")]
            torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        moved = max(float((weights[n] - after["networks.0." + n]).abs().max()) for n in weights)
        assert moved > 0.01


# --- What the loss is over ---------------------------------------------------------------------------------------


def test_labels_outside_the_train_rows_have_no_influence_on_the_weights(small: Prepared) -> None:
    """Events before train_start, events without a label, the validation days and everything later: carried only."""
    model = model_of(small)
    expected = weights_after(small, model, settings())
    others = np.flatnonzero(~small.rows.train)
    time = small.encoded.time
    kinds = {
        "history": time[others] < small.split.train_start,
        "unlabelled": small.label[others] == -1,
        "validation": small.rows.validation[others],
        "test": small.rows.test[others],
    }
    assert all(kind.sum() > 5 for kind in kinds.values())
    assert same(weights_after(with_labels_flipped(small, others), model, settings()), expected)


@pytest.mark.parametrize("which", ["first", "last"])
def test_every_train_label_has_an_influence_on_the_weights(small: Prepared, which: str) -> None:
    model = model_of(small)
    rows = np.flatnonzero(small.rows.train & (small.label == 0))
    row = rows[np.argsort(small.encoded.time[rows])][0 if which == "first" else -1]
    expected = weights_after(small, model, settings())
    assert not same(weights_after(with_labels_flipped(small, np.array([row])), model, settings()), expected)


def test_events_from_the_validation_days_on_are_not_even_seen_in_training(small: Prepared) -> None:
    encoded = small.encoded
    late = encoded.time >= small.split.validation_start
    changed = dataclasses.replace(encoded, numeric=np.where(late[:, None], np.float32(7e7), encoded.numeric))
    model = model_of(small)
    other = dataclasses.replace(small, encoded=changed)
    assert same(weights_after(other, model, settings()), weights_after(small, model, settings()))


def test_history_is_seen_as_state(small: Prepared) -> None:
    """Numbers before train_start do change the weights: their events carry the state into the train rows."""
    encoded = small.encoded
    early = encoded.time < small.split.train_start
    changed = dataclasses.replace(encoded, numeric=np.where(early[:, None], np.float32(7e3), encoded.numeric))
    model = model_of(small)
    other = dataclasses.replace(small, encoded=changed)
    assert not same(weights_after(other, model, settings()), weights_after(small, model, settings()))


@pytest.mark.parametrize(("setting", "weight"), [(1.0, 1.0), (7.5, 7.5), ("balanced", None), ("sqrt", None)])
def test_the_loss_is_the_mean_weighted_cross_entropy_of_the_train_rows(
    small: Prepared, setting: float | str, weight: float | None
) -> None:
    """With one group and one chunk the only loss is that of the first weights, written out here."""
    model = model_of(small)
    logit = score_logits(model, DeviceData(small.encoded, CPU), small.encoded, 1000).astype(np.float64)
    use, fraud = small.rows.train, small.label == 1
    if weight is None:
        ratio = (use & ~fraud).sum() / (use & fraud).sum()
        weight = ratio if setting == "balanced" else math.sqrt(ratio)
    losses = np.where(fraud, weight * np.logaddexp(0, -logit), np.logaddexp(0, logit))
    outcome = fit(model, small, CPU, settings(users_per_batch=100, events_per_chunk=1000, positive_weight=setting))
    assert outcome.history[0].loss == pytest.approx(losses[use].mean(), rel=1e-5)


def test_the_weight_of_a_fraud() -> None:
    label = np.array([0] * 90 + [1] * 10, dtype=np.int8)
    assert positive_weight(2.5, label) == 2.5
    assert positive_weight("balanced", label) == 9.0
    assert positive_weight("sqrt", label) == 3.0
    assert positive_weight("balanced", label[:90]) == 90.0  # no fraud: as if there were one


# --- Carrying ----------------------------------------------------------------------------------------------------


def test_logits_do_not_depend_on_how_histories_are_cut_into_chunks(small: Prepared) -> None:
    model = model_of(small)
    data = DeviceData(small.encoded, CPU)
    whole = score_logits(model, data, small.encoded, 10_000)
    assert np.isfinite(whole).all()
    assert np.std(whole) > 0.01
    for events in (1, 4, 7, 64):
        np.testing.assert_allclose(score_logits(model, data, small.encoded, events), whole, atol=2e-6)
    for begin, end in zip(small.encoded.begin, small.encoded.end, strict=True):  # each user alone, by the module
        alone = {name: column[None, begin:end] for name, column in data.columns.items()}
        with torch.no_grad():
            out = model({**alone, "length": torch.tensor([end - begin]), **model.initial_states(1, CPU)})
        np.testing.assert_allclose(out["logit"][0].numpy(), whole[begin:end], atol=2e-6)


def test_rows_beyond_the_given_end_have_no_logit(small: Prepared) -> None:
    model = model_of(small)
    data = DeviceData(small.encoded, CPU)
    until = small.encoded.until(small.split.train_end)
    got = score_logits(model, data, until, 8)
    late = small.encoded.time >= small.split.train_end
    assert np.isnan(got[late]).all()
    np.testing.assert_allclose(got[~late], score_logits(model, data, small.encoded, 8)[~late], atol=2e-6)


def test_scoring_leaves_dropout_off(small: Prepared) -> None:
    model = model_of(small)
    model.networks[0].dropout.p = 0.5
    data = DeviceData(small.encoded, CPU)
    model.train()
    first = score_logits(model, data, small.encoded, 8)
    np.testing.assert_array_equal(score_logits(model, data, small.encoded, 8), first)
    model.train()
    assert not np.array_equal(
        np.concatenate([x["logit"].detach().numpy().ravel() for _, x in whole_walk(model, small, data)]), first
    )


def whole_walk(
    model: SequenceModel, prepared: Prepared, data: DeviceData
) -> list[tuple[Chunk, dict[str, torch.Tensor]]]:
    users = group_users(prepared.encoded.lengths(), 1000)[0]
    return list(walk(model, data, prepared.encoded, users, 8, lambda chunk: True, mixed=False))


def test_states_go_from_chunk_to_chunk_without_their_gradient(small: Prepared) -> None:
    model = model_of(small)
    out = {
        "h_next": torch.arange(2 * 4 * 12.0).reshape(2, 4, 12).requires_grad_().to(torch.bfloat16),
        "last_time_next": torch.tensor([5, 6, 7, 8]),
    }
    states = carried(model, out, 3)
    assert states["h"].dtype == torch.float32
    assert not states["h"].requires_grad
    assert states["h"][1, 2].tolist() == out["h_next"][1, 2].tolist()
    assert states["h"].shape == (2, 3, 12)
    assert states["last_time"].tolist() == [5, 6, 7]
    assert states["last_time"].dtype == torch.int64


def test_chunks_without_a_train_row_have_no_gradient(small: Prepared) -> None:
    model = model_of(small)
    data = DeviceData(small.encoded, CPU)
    users = group_users(small.encoded.lengths(), 5)[0]
    seen = {True: 0, False: 0}
    use = small.rows.train
    for chunk, outputs in walk(
        model, data, small.encoded, users, 4, lambda c: bool(use[c.rows[c.rows >= 0]].any()), mixed=False
    ):
        wanted = bool(use[chunk.rows[chunk.rows >= 0]].any())
        assert outputs["logit"].requires_grad == wanted
        seen[wanted] += 1
    assert min(seen.values()) > 1


def test_every_event_is_in_exactly_one_chunk(small: Prepared) -> None:
    encoded = small.encoded.until(small.split.validation_start)
    seen = np.zeros(len(encoded), dtype=int)
    for users in group_users(encoded.lengths(), 5, np.random.default_rng(3)):
        before = len(users)
        for chunk in chunks(encoded, users, 6):
            assert 0 < len(chunk.length) <= before
            assert (chunk.length == (chunk.rows >= 0).sum(axis=1)).all()
            before = len(chunk.length)
            np.add.at(seen, chunk.rows[chunk.rows >= 0], 1)
    np.testing.assert_array_equal(seen, encoded.time < small.split.validation_start)


def test_events_without_a_label_teach_the_forecast_and_nothing_else_does_without_its_weight(small: Prepared) -> None:
    """With no forecast weight the labels alone move the weights; with it the forecast becomes better."""

    def error(weight: float) -> float:
        model = model_of(small)
        fit(model, small, CPU, settings(epochs=4, forecast_weight=weight, learning_rate=1e-2, patience=9))
        found = whole_walk(model.eval(), small, DeviceData(small.encoded, CPU))
        losses = [(chunk.rows, outputs["forecast_loss"].detach().numpy()) for chunk, outputs in found]
        return float(np.concatenate([loss[rows >= 0] for rows, loss in losses]).mean())

    assert error(1.0) < error(0.0) - 0.2


# --- Seeds and epochs --------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_one_others(small: Prepared) -> None:
    model = model_of(small)
    first = weights_after(small, model, settings(epochs=2, seed=4, dropout=0.1))
    assert same(weights_after(small, model, settings(epochs=2, seed=4, dropout=0.1)), first)
    assert not same(weights_after(small, model, settings(epochs=2, seed=5, dropout=0.1)), first)
    assert not same(model.state_dict(), first)


def test_early_stop_keeps_the_weights_of_the_best_epoch(small: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([0.2, 0.5, 0.4, 0.5, 0.45, 0.9, 0.9])
    monkeypatch.setattr(loop, "average_precision", lambda *_: next(figures))
    model = model_of(small)
    snapshots: list[dict[str, torch.Tensor]] = []

    def progress(epoch: int, share: float, events: int, report: Epoch | None) -> None:
        if report is not None:
            snapshots.append({k: v.clone() for k, v in model.state_dict().items()})

    outcome = fit(model, small, CPU, settings(epochs=7, patience=3), progress)
    assert outcome.best_epoch == 2
    assert [e.validation_average_precision for e in outcome.history] == [0.2, 0.5, 0.4, 0.5, 0.45]  # a tie is no better
    assert [e.epoch for e in outcome.history] == [1, 2, 3, 4, 5]
    assert same(model.state_dict(), snapshots[1])
    assert not any(same(snapshots[1], other) for i, other in enumerate(snapshots) if i != 1)


def test_the_last_epoch_is_kept_where_it_is_the_best(small: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([0.2, 0.1, 0.3])
    monkeypatch.setattr(loop, "average_precision", lambda *_: next(figures))
    assert fit(model_of(small), small, CPU, settings(epochs=3, patience=2)).best_epoch == 3


def test_the_watched_figure_is_the_average_precision_of_the_validation_rows(small: Prepared) -> None:
    model = model_of(small)
    outcome = fit(model, small, CPU, settings(epochs=1))
    logits = score_logits(model, DeviceData(small.encoded, CPU), small.encoded, 100)
    mask = small.rows.validation
    expected = average_precision(small.label[mask], logits[mask])
    assert outcome.history[0].validation_average_precision == pytest.approx(expected, abs=1e-9)


def test_progress_counts_every_event_before_the_validation_days_once_an_epoch(small: Prepared) -> None:
    calls: list[tuple[int, float, int, bool]] = []
    fit(model_of(small), small, CPU, settings(epochs=2), lambda e, share, n, r: calls.append((e, share, n, r is None)))
    count = int((small.encoded.time < small.split.validation_start).sum())
    for epoch in (0, 1):
        mine = [call for call in calls if call[0] == epoch]
        assert [call[1] for call in mine] == pytest.approx([1 / 3, 2 / 3, 1, 1])  # 12 users in groups of 5
        assert mine[-1][2:] == (count, False)
        assert mine[-2][2:] == (count, True)


def test_learning_rate_rises_and_then_falls_along_a_cosine() -> None:
    peak = 4e-3
    assert learning_rate(0.0, peak) == pytest.approx(peak * 0.02)
    assert learning_rate(0.025, peak) == pytest.approx(peak / 2)
    assert learning_rate(0.05, peak) == pytest.approx(peak)
    assert learning_rate(0.525, peak) == pytest.approx(peak * (1 + FINAL_RATE) / 2)
    assert learning_rate(1.0, peak) == pytest.approx(peak * FINAL_RATE)
    falling = [learning_rate(x, peak) for x in np.linspace(0.05, 1, 50)]
    assert falling == sorted(falling, reverse=True)


# --- Devices -----------------------------------------------------------------------------------------------------


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(ConfigError, match="--device cuda: torch sees no CUDA device here; use --device cpu or auto"):
        pick_device("cuda")
    for name in ("gpu", "CPU", "cuda:0", ""):
        with pytest.raises(ConfigError, match=f"--device: {name!r} is not one of auto, cpu, cuda"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == CPU


# --- Learning ----------------------------------------------------------------------------------------------------


def test_it_learns_a_fraud_that_only_the_order_of_events_shows(tmp_path: Path) -> None:
    """A score of the event alone reaches an average precision of about 0.2; the true rule reaches 1."""
    prepared = prepared_of(tmp_path, make_data(users=80, days=30, per_day=2, seed=1))
    model = model_of(prepared)
    outcome = fit(model, prepared, CPU, settings(epochs=12, patience=12, users_per_batch=8, events_per_chunk=16))
    test = prepared.rows.test
    label = prepared.label[test]
    large = average_precision(label, prepared.encoded.numeric[test, 0])
    assert large is not None
    assert large < 0.3
    logits = score_logits(model, DeviceData(prepared.encoded, CPU), prepared.encoded, 64)
    reached = average_precision(label, logits[test])
    assert reached is not None
    assert reached > 0.9
    assert outcome.history[-1].loss < outcome.history[0].loss / 2
