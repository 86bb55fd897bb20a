"""The drift part of a fingerprint: which rows it is of, what of a context is compared, and that it is read as it was written."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.drawn import CARDS
from seqfraud.config import DAY_MS, parse_config
from seqfraud.context import ContextSpec, context_spec
from seqfraud.drift import compare, counts_of, groups_of
from seqfraud.errors import BundleError
from seqfraud.fingerprint import KEY, Columns, Groupings, drift_reference, gaps_of, read_reference, views
from seqfraud.schema import Schema, schema_of
from seqfraud.vocabulary import Vocabulary

BEGIN = 1_600_000_000_000 // DAY_MS * DAY_MS
END = BEGIN + 70 * DAY_MS
VALIDATION = END - 7 * DAY_MS
ROWS = 14_000
VOCABULARIES = (Vocabulary("kind", ("food", "fuel")),)


@pytest.fixture(scope="module")
def parts() -> tuple[Schema, ContextSpec, Columns, np.ndarray]:
    config = parse_config(CARDS, "test")
    schema = schema_of(config)
    context = context_spec(config, schema)
    rng = np.random.default_rng(0)
    time = BEGIN - DAY_MS + np.arange(ROWS) * (72 * DAY_MS // ROWS)
    user = rng.integers(0, 200, ROWS)
    numeric = rng.lognormal(3, 1, (ROWS, 1))
    numeric[rng.random(ROWS) < 0.1] = np.nan
    categorical = rng.integers(2, 4, (ROWS, 1))
    categorical[(time >= VALIDATION) & (rng.random(ROWS) < 0.2)] = 1
    numbers = rng.random((ROWS, context.width)).astype(np.float32)
    columns = Columns(
        time,
        user,
        numeric,
        categorical,
        numbers,
        gaps_of(user, time),
        {"amount": np.isnan(numeric[:, 0])},
        rng.integers(0, 300, (ROWS, len(context.columns))),
    )
    probability = np.where(time < VALIDATION, 0.9, rng.beta(1, 50, ROWS))
    return schema, context, columns, probability


def reference(parts: Any) -> dict[str, Any]:
    schema, context, columns, probability = parts
    return drift_reference(schema, context, VOCABULARIES, columns, probability, BEGIN, VALIDATION, END)


def test_it_is_read_as_it_was_written(parts):
    raw = reference(parts)
    found = read_reference({KEY: json.loads(json.dumps(raw, allow_nan=False))})
    assert found is not None and found.score is not None
    assert list(found.inputs) == ["amount", "kind", *parts[1].names(), "time.gap", "time.hour"]
    assert found.inputs["time.hour"].share == tuple(raw["inputs"]["time.hour"]["share"])
    for one in (*found.inputs.values(), *found.absent.values(), *found.unseen.values(), found.score):
        assert sum(one.share) == pytest.approx(1) and min(one.share) > 0 and one.noise > 0
        assert set(one.quiet) == {"1d", "7d"} and all(0 <= x < 1 for x in one.quiet.values())
    assert read_reference({"rows": 3}) is None
    with pytest.raises(BundleError, match=KEY):
        read_reference({KEY: {**raw, "inputs": {"amount": {"share": ["a"]}}}})


def test_scores_and_unseen_values_are_those_of_the_days_that_nothing_was_fitted_on(parts):
    found = read_reference({KEY: reference(parts)})
    assert found is not None and found.score is not None
    _, _, columns, probability = parts
    held_out = (columns.time >= VALIDATION) & (columns.time < END)
    assert found.score.rows == held_out.sum()
    assert found.score.edges[-1] <= probability[held_out].max() < 0.9
    assert found.unseen["kind"].share[1] == pytest.approx((columns.categorical[held_out] == 1).mean(), abs=1e-3)
    inside = (columns.time >= END - 28 * DAY_MS) & (columns.time < END)
    assert found.rows == inside.sum() and found.rows_per_day == pytest.approx(inside.sum() / 28)
    assert found.inputs["amount"].rows == (~np.isnan(columns.numeric[inside, 0])).sum()
    assert found.absent["amount"].share[1] == pytest.approx(0.1, abs=0.02)


def test_a_week_of_the_training_time_is_as_its_reference_and_a_season_widens_what_is_quiet(parts):
    schema, context, columns, probability = parts
    found = read_reference({KEY: reference(parts)})
    assert found is not None
    week = (columns.time >= END - 7 * DAY_MS) & (columns.time < END)
    for view in views(schema, context, VOCABULARIES, columns):
        bins, k = view.binned(found.inputs[view.name].edges)
        moved = compare(found.inputs[view.name], counts_of(bins[week], groups_of(columns.user[week]), k))
        assert moved.low < 0.05, view.name
    assert found.inputs["amount"].quiet["7d"] < 0.05
    season = columns.numeric * (1 + (columns.time[:, None] - BEGIN) // (7 * DAY_MS) % 4)
    seasonal = read_reference({KEY: reference((schema, context, replace(columns, numeric=season), probability))})
    assert seasonal is not None and seasonal.inputs["amount"].quiet["7d"] > 0.2


def test_what_is_read_of_one_entity_by_many_users_is_as_unsure_as_entities_are(parts):
    """One of thirty devices that everybody uses is another than it was: for users alone that would be sure."""
    schema, context, columns, probability = parts
    rng = np.random.default_rng(1)
    entity, numbers = columns.entity.copy(), columns.context.copy()
    entity[:, 1] = np.where(rng.random(ROWS) < 0.3, 0, rng.integers(1, 30, ROWS))
    at = context.names().index("device.count_0.5d")
    later = columns.time >= VALIDATION
    numbers[:, at] = np.random.default_rng(2).random(30)[entity[:, 1]]
    known = replace(columns, entity=entity, context=numbers.copy())
    numbers[later & (entity[:, 1] == 0), at] += 1
    changed = replace(known, context=numbers)
    found = read_reference({KEY: reference((schema, context, known, probability))})
    assert found is not None
    view = {view.name: view for view in views(schema, context, VOCABULARIES, changed)}["device.count_0.5d"]
    assert view.entity == 1
    bins, k = view.binned(found.inputs[view.name].edges)
    groupings = Groupings(changed.take(later)).of(view)
    by_user, by_device = (compare(found.inputs[view.name], counts_of(bins[later], g, k)) for g in groupings)
    assert by_user.psi == by_device.psi > 0.3
    assert by_user.chance < 0.01 and by_device.chance > 0.1
    apart = replace(known, entity=np.arange(ROWS)[:, None].repeat(len(context.columns), axis=1))
    alone = read_reference({KEY: reference((schema, context, apart, probability))})
    assert alone is not None and alone.inputs[view.name].noise < found.inputs[view.name].noise


def test_what_is_left_of_fraud_of_long_ago_is_none_in_what_is_compared(parts):
    schema, context, columns, _ = parts
    at = context.names().index("device.fraud_0.5d")
    numbers = np.ones((3, context.width), dtype=np.float32)
    numbers[:, at] = (0.01, 0.06, 0.0)
    three = replace(columns.take(np.arange(3)), context=numbers)
    seen = {view.name: view.values for view in views(schema, context, VOCABULARIES, three)}
    assert seen["device.fraud_0.5d"].tolist() == [0.0, np.float32(0.06), 0.0]
    assert seen["device.run_length"].tolist() == [1.0, 1.0, 1.0]
    assert numbers[0, at] == np.float32(0.01)


def test_gaps_are_to_the_same_users_event_before(parts):
    user = np.array([1, 2, 1, 1, 2])
    time = np.array([0, 1000, 5000, 4000, 9000])
    gap = gaps_of(user, time)
    assert np.isnan(gap[:2]).all()
    # the fourth came late: it is no time after the one before it
    assert gap[2:].tolist() == [5.0, 0.0, 8.0]
