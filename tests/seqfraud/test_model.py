"""The module: what it computes from raw columns, against plain Python, and that every state is carried exactly."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqfraud.context import NEVER, ContextSpec
from seqfraud.graph import gru_graph
from seqfraud.nn.model import (
    EARTH_KM,
    EventEncoder,
    ModelSpec,
    SequenceModel,
    StepModel,
    haversine_km,
    signed_log,
)
from seqfraud.schema import Schema

torch.set_num_threads(1)

SECOND = 1000
HOUR = 3_600_000
DAY = 24 * HOUR
WEEK = 7 * DAY
JUNE_2025 = 1_748_736_000_123  # ms; as float32 this is 131 s coarse
CONTEXT = ContextSpec(("shop",), (DAY,), DAY)  # K = 9

VARIETIES = {
    "everything": {"numbers": 2, "places": 1, "context": True, "vocabularies": (7, 4), "missing": (1,), "layers": 2},
    "everything, one layer": {"numbers": 3, "places": 2, "context": True, "vocabularies": (5,), "missing": (0, 2)},
    "only time": {},
    "numbers": {"numbers": 2},
    "numbers that may be missing": {"numbers": 2, "missing": (0,), "layers": 2},
    "categories": {"vocabularies": (7, 4)},
    "context": {"context": True, "layers": 2},
    "places": {"places": 2},
    "context and categories": {"context": True, "vocabularies": (9,), "layers": 2},
    "three networks": {"numbers": 2, "context": True, "vocabularies": (7, 4), "layers": 2, "members": 3},
}


def make_model(
    numbers: int = 0,
    places: int = 0,
    context: bool = False,
    vocabularies: tuple[int, ...] = (),
    missing: tuple[int, ...] = (),
    layers: int = 1,
    random_constants: bool = True,
    forecast: bool = True,
    members: int = 1,
) -> SequenceModel:
    """A small model with random weights and, unless told otherwise, random scaling, bins and calibration."""
    schema = Schema(
        "user",
        "time",
        numeric=tuple(f"number{i}" for i in range(numbers)),
        categorical=tuple(f"category{i}" for i in range(len(vocabularies))),
        context=CONTEXT.columns if context else (),
        geo=tuple((f"lat{i}", f"long{i}") for i in range(places)),
    )
    kept = CONTEXT if context else ContextSpec((), CONTEXT.half_lives, CONTEXT.label_delay)
    sketch = ModelSpec(
        numeric=numbers + 2 * places,
        places=places,
        context=kept.width,
        vocabularies=vocabularies,
        missing=missing,
        bins=0,
        hidden=5,
        layers=layers,
        input_width=6,
        head_width=4,
        embedding=3,
        forecast=forecast,
        members=members,
    )
    drawn = {"bins": 2 * sketch.values, "steps": 2 * (sketch.values - 2 * places)} if random_constants else {}
    spec = ModelSpec(**{**sketch.as_dict(), **drawn})
    torch.manual_seed(3)
    model = SequenceModel(spec, gru_graph(schema, kept, layers, spec.state_width))
    if random_constants:
        encoder = model.encoder
        encoder.mean.uniform_(-1, 1)
        encoder.inverse_std.uniform_(0.2, 0.5)
        encoder.bin_value.copy_(torch.arange(spec.bins) // 2)
        encoder.bin_scale.uniform_(0.2, 1.0)
        encoder.bin_low.uniform_(-0.2, 1.0)
        encoder.step_value.copy_(torch.arange(spec.steps) // 2)
        encoder.step_threshold.uniform_(-0.5, 30.0)
        encoder.fill.uniform_(-3, 3)
        model.scale.fill_(1.7)
        model.shift.fill_(-0.4)
    return model.eval()


def make_inputs(model: SequenceModel, batch: int, events: int, seed: int, fresh: bool = True) -> dict[str, Tensor]:
    """Histories without states' special cases left out: gaps from 0 on, numbers and places missing where they may."""
    rng = np.random.default_rng(seed)
    spec = model.spec
    gaps = rng.choice([0, 1, 900, 47_000, 5 * HOUR, 3 * DAY], (batch, events))
    time = JUNE_2025 + np.cumsum(gaps, axis=1) + 7919 * np.arange(batch)[:, None]
    inputs: dict[str, np.ndarray] = {"event_time": time, "length": np.full(batch, events)}
    if spec.numeric:
        numeric = rng.normal(0, 20, (batch, events, spec.numeric)).astype(np.float32)
        for i in (*spec.missing, *range(spec.numeric - 2 * spec.places, spec.numeric)):
            numeric[..., i][rng.random((batch, events)) < 0.2] = np.nan
        inputs["numeric"] = numeric
    if spec.vocabularies:
        inputs["categorical"] = np.stack([rng.integers(1, n, (batch, events)) for n in spec.vocabularies], axis=-1)
    if spec.context:
        inputs["context"] = rng.exponential(3, (batch, events, spec.context)).astype(np.float32) - 1
    states = {s.name: s.initial_rows(batch) for s in model.graph.states}
    if not fresh:
        states["h"] = rng.uniform(-0.8, 0.8, states["h"].shape).astype(np.float32)
        states["last_time"] = time[:, 0] - rng.integers(-50, 10 * HOUR, batch)  # some are later than the first event
        if "last_place" in states:
            states["last_place"] = rng.uniform(-60, 60, states["last_place"].shape).astype(np.float32)
    inputs |= {s.name: s.to_batch(states[s.name]) for s in model.graph.states}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}


def call(module: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return module(inputs)


def dense_of(model: SequenceModel, inputs: dict[str, Tensor]) -> np.ndarray:
    """What the first linear layer of the module is given, [B, T, D]."""
    seen: list[Tensor] = []
    handle = model.networks[0].input.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    call(model, inputs)
    handle.remove()
    return seen[0].numpy()


def inverse_signed_log(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.expm1(np.abs(x.astype(np.float64)))


def user_of(model: SequenceModel, inputs: dict[str, Tensor], user: int, begin: int, end: int) -> dict[str, Tensor]:
    """Events begin to end of one user, with its states."""
    axes = {s.name: s.batch_axis for s in model.graph.states}
    out = {}
    for name, value in inputs.items():
        one = value.narrow(axes.get(name, 0), user, 1)
        out[name] = one[:, begin:end] if name not in axes and name != "length" else one
    return {**out, "length": torch.tensor([end - begin])}


def pairs(model: SequenceModel, a: dict[str, Tensor], b: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    return [(f"{s.name}_next", a[f"{s.name}_next"], b[f"{s.name}_next"]) for s in model.graph.states]


def assert_same(a: Tensor, b: Tensor, what: str, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}")


# --- Gap ---------------------------------------------------------------------------------------------------------


def test_gap_of_every_event_is_the_one_to_the_event_before() -> None:
    """User b's gap before event t is 1 + t + 100 b seconds: a wrong time index is a wrong number."""
    model = make_model(random_constants=False)
    gaps = 1 + np.arange(6)[None] + 100 * np.arange(3)[:, None]
    inputs = make_inputs(model, 3, 6, seed=0)
    inputs["last_time"] = torch.tensor([JUNE_2025, JUNE_2025 + 77_000, NEVER])
    start = np.array([JUNE_2025, JUNE_2025 + 77_000, 0])
    inputs["event_time"] = torch.from_numpy(start[:, None] + SECOND * np.cumsum(gaps, axis=1))
    got = inverse_signed_log(dense_of(model, inputs)[..., 0])
    expected = gaps.astype(float)
    expected[2, 0] = -1.0  # the third user has no event before: the sentinel
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_times_one_millisecond_apart_in_2025_have_different_gaps() -> None:
    model = make_model(random_constants=False)
    inputs = make_inputs(model, 2, 3, seed=0)
    inputs["event_time"] = JUNE_2025 + torch.tensor([[0, 1, 3], [0, 2, 2]])
    got = inverse_signed_log(dense_of(model, inputs)[..., 0])
    np.testing.assert_allclose(got, [[-1, 0.001, 0.002], [-1, 0.002, 0.0]], atol=2e-7)


def test_an_event_before_the_last_one_has_gap_0_and_is_then_the_last_one() -> None:
    model = make_model(random_constants=False)
    inputs = make_inputs(model, 1, 3, seed=0)
    inputs["event_time"] = JUNE_2025 + torch.tensor([[10_000, 4_000, 9_000]])
    np.testing.assert_allclose(inverse_signed_log(dense_of(model, inputs)[0, :, 0]), [-1, 0, 5], atol=1e-6)
    assert call(model, inputs)["last_time_next"].tolist() == [JUNE_2025 + 9_000]


def test_a_first_event_is_marked_below_everything_that_occurs() -> None:
    model = make_model(places=1, random_constants=False)
    inputs = make_inputs(model, 1, 2, seed=0)
    inputs["event_time"] = JUNE_2025 + torch.tensor([[0, 0]])
    inputs["numeric"] = torch.tensor([[[52.0, 13.0], [52.0, 13.0]]])
    gap, distance, speed = dense_of(model, inputs)[0, :, :3].T
    for values in (gap, distance, speed):
        assert values.tolist() == [pytest.approx(-math.log(2)), 0.0]


def test_a_call_without_events_leaves_a_new_user_new() -> None:
    model = make_model(places=1, random_constants=False)
    inputs = make_inputs(model, 2, 2, seed=0)
    inputs["length"] = torch.tensor([0, 2])
    after = call(model, inputs)
    assert after["last_time_next"].tolist() == [NEVER, int(inputs["event_time"][1, 1])]
    assert torch.equal(after["h_next"][:, 0], inputs["h"][:, 0])
    assert torch.equal(after["last_place_next"][0], inputs["last_place"][0])


# --- Clock -------------------------------------------------------------------------------------------------------


def test_clock_is_the_exact_phase_of_day_and_week_also_before_1970() -> None:
    times = [0, 1, 6 * HOUR, JUNE_2025, -1, -6 * HOUR, -WEEK - HOUR, -2_208_988_800_000 + 12_345, 4 * DAY - 1]
    got = EventEncoder(make_model().spec).clock(torch.tensor(times)[:, None]).numpy()
    for row, time in zip(got, times, strict=True):
        phases = [(DAY, 1), (DAY, 2), (WEEK, 1), (WEEK, 2)]
        angles = [2 * math.pi * k * (time % period) / period for period, k in phases]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        np.testing.assert_allclose(row, expected, atol=2e-6, err_msg=str(time))
    np.testing.assert_allclose(got[5, [0, 4]], [-1, 0], atol=1e-6)  # 18:00 on the last day of 1969


def test_clock_is_bit_for_bit_the_same_a_thousand_weeks_away() -> None:
    encoder = EventEncoder(make_model().spec)
    times = torch.tensor([[0], [123_456], [DAY - 1], [3 * DAY + 7 * HOUR + 1], [WEEK - 1]])
    for weeks in (-1000, -1, 1, 2900):
        assert torch.equal(encoder.clock(times + weeks * WEEK), encoder.clock(times))


# --- Places ------------------------------------------------------------------------------------------------------


def plain_haversine(lat_a: float, long_a: float, lat_b: float, long_b: float) -> float:
    a, b = math.radians(lat_a), math.radians(lat_b)
    s = math.sin((a - b) / 2) ** 2 + math.cos(a) * math.cos(b) * math.sin(math.radians(long_a - long_b) / 2) ** 2
    return 2 * EARTH_KM * math.asin(math.sqrt(s))


def test_haversine_of_known_distances() -> None:
    paris, london = [48.8567, 2.3508], [51.5072, -0.1275]
    here = torch.tensor([paris, paris, [0.0, 0.0], [90.0, 0.0], [0.0, 179.5], [10.0, 20.0]])
    there = torch.tensor([london, paris, [0.0, 180.0], [-90.0, 55.0], [0.0, -179.5], [10.0, 20.001]])
    got = haversine_km(here, there)[:, 0].tolist()
    half_way_round = math.pi * EARTH_KM
    assert got == pytest.approx(
        [343.5, 0.0, half_way_round, half_way_round, EARTH_KM * math.radians(1), 0.10950], rel=2e-3, abs=1e-4
    )


def test_distance_and_speed_of_every_event_against_plain_python() -> None:
    """Two places per event; columns are latitude 1, longitude 1, latitude 2, longitude 2 after one plain number."""
    model = make_model(numbers=1, places=2, random_constants=False)
    inputs = make_inputs(model, 3, 8, seed=5, fresh=False)
    rng = np.random.default_rng(0)
    places = np.stack([rng.uniform(-80, 80, (3, 8)), rng.uniform(-180, 180, (3, 8))] * 2, axis=-1)
    places[..., 2:] += rng.normal(0, 3, (3, 8, 2))
    inputs["numeric"][..., 1:] = torch.from_numpy(places)
    before = np.concatenate([inputs["last_place"].numpy()[:, None], inputs["numeric"][:, :-1, 1:].numpy()], axis=1)
    times = np.concatenate([inputs["last_time"].numpy()[:, None], inputs["event_time"].numpy()], axis=1)
    got = inverse_signed_log(dense_of(model, inputs)[..., 2:6])  # after the number and the gap
    for user in range(3):
        for event in range(8):
            here, there = inputs["numeric"][user, event, 1:].tolist(), before[user, event].tolist()
            km = [plain_haversine(*here[:2], *there[:2]), plain_haversine(*here[2:], *there[2:])]
            hours = max((times[user, event + 1] - times[user, event]) / HOUR, 1 / 3600)
            np.testing.assert_allclose(got[user, event], [*km, km[0] / hours, km[1] / hours], rtol=1e-4, atol=2e-3)


def test_a_missing_place_is_an_unknown_distance_for_its_event_and_the_next() -> None:
    model = make_model(places=1, random_constants=False)
    inputs = make_inputs(model, 1, 4, seed=0)
    inputs["event_time"] = JUNE_2025 + HOUR * torch.tensor([[0, 1, 2, 3]])
    inputs["numeric"] = torch.tensor([[[10.0, 20.0], [float("nan"), 20.0], [10.0, 20.0], [11.0, 20.0]]])
    gap, distance, speed = inverse_signed_log(dense_of(model, inputs)[0, :, :3]).T
    degree = math.radians(1) * EARTH_KM
    np.testing.assert_allclose(gap, [-1, 3600, 3600, 3600], rtol=1e-6)
    np.testing.assert_allclose(distance, [-1, -1, -1, degree], rtol=1e-5)
    np.testing.assert_allclose(speed, [-1, -1, -1, degree], rtol=1e-5)
    after = call(model, {**inputs, "length": torch.tensor([2])})
    assert bool(torch.isfinite(after["logit"]).all())
    assert after["last_place_next"][0, 1] == 20.0
    assert bool(torch.isnan(after["last_place_next"][0, 0]))


# --- Numbers, bins, categories -----------------------------------------------------------------------------------


def test_numbers_and_context_come_as_scaled_signed_logarithms_in_the_declared_order() -> None:
    model = make_model(numbers=2, context=True, random_constants=False)
    ramp = torch.arange(model.spec.values, dtype=torch.float32)
    model.encoder.mean.copy_(ramp)
    model.encoder.inverse_std.copy_(1 + ramp)
    inputs = make_inputs(model, 1, 1, seed=0)
    inputs["numeric"] = torch.tensor([[[-2.0, 1e9]]])
    inputs["context"] = torch.arange(9.0)[None, None] - 1
    logs = [math.copysign(math.log1p(abs(c - 1)), c - 1) for c in range(9)]
    raw = [-math.log(3), math.log1p(1e9), *logs, -math.log(2)]
    expected = [(x - v) * (1 + v) for v, x in enumerate(raw)]
    np.testing.assert_allclose(dense_of(model, inputs)[0, 0, :12], expected, rtol=1e-5, atol=1e-6)
    assert signed_log(torch.tensor([0.0, -0.0])).tolist() == [0.0, 0.0]


def test_a_missing_number_is_flagged_and_stands_for_its_fill_value() -> None:
    model = make_model(numbers=3, missing=(0, 2))
    inputs = make_inputs(model, 1, 4, seed=0)
    nan = float("nan")
    inputs["numeric"] = torch.tensor([[[5.0, 6.0, 7.0], [nan, 6.0, 7.0], [5.0, 6.0, nan], [nan, 6.0, nan]]])
    filled = inputs["numeric"].clone()
    filled[..., 0][torch.isnan(filled[..., 0])] = model.encoder.fill[0]
    filled[..., 2][torch.isnan(filled[..., 2])] = model.encoder.fill[2]
    with_gaps, without = dense_of(model, inputs)[0], dense_of(model, {**inputs, "numeric": filled})[0]
    np.testing.assert_array_equal(with_gaps[:, :-2], without[:, :-2])
    np.testing.assert_array_equal(with_gaps[:, -2:], [[0, 0], [1, 0], [0, 1], [1, 1]])
    np.testing.assert_array_equal(without[:, -2:], 0)


def test_bins_are_piecewise_linear_between_their_edges() -> None:
    """Value 1 has the edges 0, 1, 3; value 0 the edges -2, 2."""
    spec = ModelSpec(**{**make_model(numbers=1, random_constants=False).spec.as_dict(), "bins": 3})
    encoder = EventEncoder(spec)
    encoder.bin_value.copy_(torch.tensor([1, 1, 0]))
    encoder.bin_scale.copy_(torch.tensor([1.0, 0.5, 0.25]))
    encoder.bin_low.copy_(torch.tensor([0.0, 1.0, -2.0]))
    values = torch.tensor([[0.0, -9.0], [-9.0, 0.25], [9.0, 1.0], [1.0, 2.0], [-1.0, 3.0], [0.0, 50.0]])
    expected = [[0, 0, 0.5], [0.25, 0, 0], [1, 0, 1], [1, 0.5, 0.75], [1, 1, 0.25], [1, 1, 0.5]]
    assert encoder.bins(values).tolist() == expected


def test_a_step_is_reached_at_its_threshold_before_the_logarithm() -> None:
    """Value 0 has the steps 2 and 220.5, value 1 has the step -1."""
    spec = ModelSpec(**{**make_model(numbers=1, random_constants=False).spec.as_dict(), "steps": 3})
    encoder = EventEncoder(spec)
    encoder.step_value.copy_(torch.tensor([0, 0, 1]))
    encoder.step_threshold.copy_(torch.tensor([2.0, 220.5, -1.0]))
    values = torch.tensor([[1.9, -1.1], [2.0, -1.0], [220.49, 5.0], [220.5, -9.0]])
    assert encoder.steps(values)[0].tolist() == [[0, 0, 0], [1, 0, 1], [1, 0, 1], [1, 1, 0]]


def test_each_category_has_its_own_table() -> None:
    """The first layer's other inputs, after the dense ones, are the rows of the tables in the declared order."""
    model = make_model(vocabularies=(7, 4))
    assert model.spec.embedding_widths() == [3, 2]
    with torch.no_grad():
        for c, table in enumerate(model.networks[0].embeddings):
            ramp = 100 * (c + 1) + torch.arange(len(table.weight))[:, None] + torch.tensor([0.0, 0.25, 0.5])
            table.weight.copy_(ramp[:, : table.embedding_dim])
    inputs = make_inputs(model, 1, 2, seed=0)
    inputs["categorical"] = torch.tensor([[[6, 1], [0, 3]]])
    got = dense_of(model, inputs)[0, :, model.spec.dense_width :]
    assert got.tolist() == [[106, 106.25, 106.5, 201, 201.25], [100, 100.25, 100.5, 203, 203.25]]


def test_a_surprise_is_the_distance_from_the_forecast_in_its_spread() -> None:
    model = make_model(numbers=1, places=1)
    forecast = model.networks[0].forecast
    assert forecast is not None
    gap = 1 + model.spec.context
    assert model.spec.forecasts == (0, gap, gap + 1)
    with torch.no_grad():
        forecast.linear.weight.zero_()
        forecast.linear.bias.copy_(torch.tensor([0.5, 1.0, -1.0, -math.log(2), 0.0, 9.0]))
    scaled = torch.tensor([[2.5, 3.0, 99.0]])
    away, loss = forecast.surprise(torch.zeros(1, 5), scaled, torch.tensor([[-7.0, 0.0, -math.log(2)]]))
    expected = [1.0, 2.0, 0.0]  # the distance is not known: below 0, unlike the number, which may be negative
    np.testing.assert_allclose(away[0].tolist(), expected, rtol=1e-6)
    np.testing.assert_allclose(loss[0].tolist(), [0.5 + math.log(2), 2.0, 0.0], rtol=1e-6)
    units = forecast.units(torch.tensor([[1.5, -20.0, 0.25]]))
    assert units.shape == (1, 3 * 9)
    np.testing.assert_allclose(units[0, 3:11].tolist(), [1, 1, 1, 0.5, 0, 0, 0, 0])
    assert units[0, 11:19].tolist() == [0.0] * 8
    assert units[0, 19:].tolist() == [1.0, 1.0, 0.25] + [0.0] * 5


def test_a_forecast_sees_only_what_was_before() -> None:
    """Its error at an event changes with the events before it, never with those after."""
    model = make_model(numbers=2)
    inputs = make_inputs(model, 2, 6, seed=4)
    whole = call(model, inputs)["forecast_loss"]
    later = {**inputs, "numeric": inputs["numeric"].clone()}
    later["numeric"][:, 4] += 5.0
    changed = call(model, later)["forecast_loss"]
    np.testing.assert_array_equal(changed[:, :4], whole[:, :4])
    assert (changed[:, 4] != whole[:, 4]).all()
    assert (changed[:, 5] != whole[:, 5]).all()


def test_features_keep_float32_under_mixed_precision() -> None:
    """An amount of 70,000 is infinite in float16, and bfloat16 has two digits."""
    model = make_model(numbers=1, context=True)
    inputs = make_inputs(model, 2, 5, seed=1)
    inputs["numeric"] = torch.full((2, 5, 1), 70_001.0) + torch.arange(5)[None, :, None]
    exact = dense_of(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = dense_of(model, inputs)
    np.testing.assert_array_equal(mixed, exact)
    assert len(np.unique(mixed[0, :, 0])) == 5


def test_probability_is_the_calibrated_logit() -> None:
    model = make_model(numbers=1)
    out = call(model, make_inputs(model, 3, 4, seed=2))
    expected = 1 / (1 + np.exp(-(1.7 * out["logit"].numpy().astype(np.float64) - 0.4)))
    np.testing.assert_allclose(out["probability"].numpy(), expected, rtol=1e-6)


def test_shapes_survive_json() -> None:
    spec = make_model(**VARIETIES["everything"]).spec
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


# --- Carrying ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variety", ["everything", "everything, one layer", "only time", "context and categories"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(takes=st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=6), fresh=st.booleans())
def test_any_split_of_histories_into_calls_gives_the_same(
    variety: str, takes: Sequence[tuple[int, int, int]], fresh: bool
) -> None:
    """Call i takes takes[i][b] events of user b, which may be none; the reference scores each user alone, at once."""
    model = make_model(**VARIETIES[variety])
    counts = np.array([take for take in takes if max(take) > 0]).reshape(-1, 3)
    totals = counts.sum(axis=0)
    whole = make_inputs(model, 3, int(max(totals.max(initial=0), 1)), seed=len(takes), fresh=fresh)
    states = {s.name: whole[s.name] for s in model.graph.states}
    logits: list[list[Tensor]] = [[], [], []]
    done = np.zeros(3, dtype=np.int64)
    for take in counts:
        # rows beyond a user's events in this call are whatever comes next in its history, or its last event again
        at = torch.from_numpy(np.minimum(done[:, None] + np.arange(take.max()), whole["event_time"].shape[1] - 1))
        part = {k: v[torch.arange(3)[:, None], at] for k, v in whole.items() if k not in states and k != "length"}
        out = call(model, {**part, "length": torch.from_numpy(take), **states})
        states = {s.name: out[f"{s.name}_next"] for s in model.graph.states}
        for user in range(3):
            logits[user].append(out["logit"][user, : take[user]])
        done += take
    for user in range(3):
        end = int(totals[user])
        alone = user_of(model, whole, user, 0, max(end, 1))
        expected = call(model, {**alone, "length": torch.tensor([end])})
        if end:
            assert_same(torch.cat(logits[user]), expected["logit"][0], "logit")
        for s in model.graph.states:
            mine = states[s.name].narrow(s.batch_axis, user, 1)
            assert_same(mine, expected[f"{s.name}_next"], s.name, atol=2e-6 if s.name == "h" else 0)


@pytest.mark.parametrize("variety", VARIETIES)
def test_padding_is_ignored_whatever_it_holds(variety: str) -> None:
    model = make_model(**VARIETIES[variety])
    lengths = [5, 0, 3, 1]
    clean = {**make_inputs(model, 4, 5, seed=4, fresh=False), "length": torch.tensor(lengths)}
    dirty = {k: v.clone() for k, v in clean.items()}
    for user, length in enumerate(lengths):
        dirty["event_time"][user, length:] = torch.tensor([-5, 2**61, 0, NEVER, 1])[length:]
        for name, garbage in (("numeric", float("nan")), ("context", float("inf")), ("categorical", 0)):
            if name in dirty:
                dirty[name][user, length:] = garbage
    a, b = call(model, clean), call(model, dirty)
    for user, length in enumerate(lengths):
        assert torch.equal(a["logit"][user, :length], b["logit"][user, :length])
    for name, x, y in pairs(model, a, b):
        assert_same(x, y, name, atol=0)


def test_a_model_of_networks_says_the_mean_of_their_logits() -> None:
    model = make_model(numbers=2, context=True, vocabularies=(7, 4), layers=2, members=3)
    inputs = make_inputs(model, 4, 6, seed=2, fresh=False)
    out = call(model, inputs)
    one = make_model(numbers=2, context=True, vocabularies=(7, 4), layers=2)
    one.encoder.load_state_dict(model.encoder.state_dict())
    logits = []
    for i, network in enumerate(model.networks):
        one.networks[0].load_state_dict(network.state_dict())
        mine = slice(5 * i, 5 * i + 5)
        alone = call(one, {**inputs, "h": inputs["h"][..., mine].contiguous()})
        logits.append(alone["logit"])
        assert_same(out["h_next"][..., mine], alone["h_next"], "h_next", atol=2e-6)
        assert_same(out["member_logits"][i], alone["logit"], "member_logits")
    assert float((logits[0] - logits[1]).abs().max()) > 0.01
    assert_same(out["logit"], torch.stack(logits).mean(dim=0), "logit")


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("variety", VARIETIES)
def test_the_folded_step_is_the_sequence_event_by_event(variety: str, fresh: bool) -> None:
    model = make_model(**VARIETIES[variety])
    step = StepModel(model)
    whole = make_inputs(model, 3, 9, seed=6, fresh=fresh)
    expected = call(model, whole)
    states = {s.name: whole[s.name] for s in model.graph.states}
    logits, probabilities = [], []
    for t in range(9):
        ids = [whole["categorical"][:, t]] if "categorical" in whole else []
        packed = {"integers": torch.cat([whole["event_time"][:, t, None], *ids], dim=1)}
        values = [whole[n][:, t] for n in ("numeric", "context") if n in whole]
        if values:
            packed["values"] = torch.cat(values, dim=1)
        out = call(step, {**packed, **states})
        states = {s.name: out[f"{s.name}_next"] for s in model.graph.states}
        logits.append(out["logit"])
        probabilities.append(out["probability"])
    assert float(expected["logit"].std()) > 0.01  # the inputs matter
    assert_same(torch.stack(logits, dim=1), expected["logit"], "logit")
    assert_same(torch.stack(probabilities, dim=1), expected["probability"], "probability")
    for name, x, y in pairs(model, out, expected):
        assert_same(x, y, name, atol=2e-6 if name == "h_next" else 0)


def test_the_order_of_events_matters() -> None:
    """The same events in another order leave another state: there is a memory at all."""
    model = make_model(numbers=1)
    inputs = make_inputs(model, 1, 4, seed=0)
    turned = {**inputs, "numeric": inputs["numeric"].flip(1)}
    assert float((call(model, inputs)["h_next"] - call(model, turned)["h_next"]).abs().max()) > 1e-3
