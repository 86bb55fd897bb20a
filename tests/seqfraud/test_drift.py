"""Drift statistics: properties of the measures, and that neither small samples nor users with many rows make an alarm."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfraud.drift import (
    LEAST_ROWS,
    Distribution,
    Moved,
    bins_of,
    chi_square_tail,
    compare,
    counts_of,
    distribution_of,
    edges_of,
    groups_of,
    jensen_shannon,
    psi,
    share_of,
    shares_of,
)

COUNTS = st.lists(st.integers(0, 1000), min_size=2, max_size=12)


def shares(counts: list[int]) -> np.ndarray:
    return shares_of(np.array(counts, dtype=np.float64))


@given(COUNTS)
def test_both_measures_are_zero_between_equals(counts):
    assert psi(shares(counts), shares(counts)) == 0
    assert jensen_shannon(shares(counts), shares(counts)) == 0


@given(COUNTS, st.randoms(use_true_random=False))
def test_both_measures_are_symmetric_and_bounded(counts, random):
    other = counts.copy()
    random.shuffle(other)
    a, b = shares(counts), shares(other)
    assert psi(a, b) == pytest.approx(psi(b, a), abs=1e-12) and psi(a, b) >= 0
    assert jensen_shannon(a, b) == pytest.approx(jensen_shannon(b, a), abs=1e-9)
    assert 0 <= jensen_shannon(a, b) <= 1


def test_the_measures_are_those_of_the_literature():
    """By hand: ln 3 for shares of 1/4 and 3/4 against the other way round; the distance of what has nothing in common is 1."""
    assert psi([0.25, 0.75], [0.75, 0.25]) == pytest.approx(math.log(3))
    assert jensen_shannon([1.0, 0.0], [0.0, 1.0]) == pytest.approx(1.0)
    # H(3/4, 1/4) - H(1/2, 1/2) / 2, in bits
    bits = -0.75 * math.log2(0.75) - 0.25 * math.log2(0.25) - 0.5
    assert jensen_shannon([0.5, 0.5], [1.0, 0.0]) == pytest.approx(math.sqrt(bits))


@pytest.mark.parametrize(
    ("value", "freedom", "tail"), [(3.841, 1, 0.05), (11.070, 5, 0.05), (21.666, 9, 0.01), (16.919, 9, 0.05)]
)
def test_tails_of_chi_square_are_those_of_the_tables(value, freedom, tail):
    assert chi_square_tail(value, freedom) == pytest.approx(tail, rel=0.06)


@given(st.lists(st.floats(-1e6, 1e6, width=32) | st.just(math.nan), min_size=1, max_size=200))
def test_every_value_has_a_bin_and_what_is_missing_has_none(values):
    edges = edges_of(values)
    bins = bins_of(values, edges)
    assert edges == sorted(set(edges))
    for value, found in zip(values, bins.tolist(), strict=True):
        if math.isnan(value):
            assert found == -1
        else:
            assert 0 <= found <= len(edges)
            assert found == 0 or edges[found - 1] < value
            assert found == len(edges) or value <= edges[found]


def test_an_atom_has_a_bin_of_its_own_and_a_constant_shows_what_is_above_it():
    values = np.r_[np.zeros(950), np.linspace(1, 2, 50)]
    counts = np.bincount(bins_of(values, edges_of(values)))
    assert counts[0] == 950
    assert bins_of([3.0, 4.0], edges_of([3.0] * 9)).tolist() == [0, 1]


# ---- samples


def drawn(seed: int, users: int, each: int, shift: float = 0.0, together: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Users of the rows and normal values; `together` is the variance that the rows of one user share."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), each)
    own = rng.normal(0, math.sqrt(together), users)[user] if together else 0.0
    return user, own + rng.normal(0, math.sqrt(1 - together), users * each) + shift


def reference_of(values: np.ndarray, user: np.ndarray) -> Distribution:
    edges = edges_of(values)
    found = distribution_of(
        bins_of(values, edges), edges, len(edges) + 1, groups_of(user), np.ones(len(user), dtype=bool), {}
    )
    assert found is not None
    return found


def moved(reference: Distribution, user: np.ndarray, values: np.ndarray) -> Moved:
    return compare(reference, counts_of(bins_of(values, reference.edges), groups_of(user), len(reference.share)))


@pytest.mark.parametrize("together", [0.0, 0.9])
def test_without_drift_the_shift_is_about_nothing_however_rows_hang_together(together):
    user, values = drawn(0, 2000, 20, together=together)
    reference = reference_of(values, user)
    found = [moved(reference, *drawn(seed, 60, 20, together=together)) for seed in range(1, 60)]
    raw = np.array([one.psi for one in found])
    assert all(one.chance is not None for one in found)
    # what the sample adds is what was taken off, on average
    expected = np.array([one.psi - one.moved for one in found if one.moved > 0])
    assert len(expected) > 5
    assert raw.mean() == pytest.approx(expected.mean(), rel=0.5)
    # as a test it is rarely sure; without regard to users it would be, nearly always, where rows hang together
    assert np.mean([one.chance is not None and one.chance < 0.01 for one in found]) <= 0.12
    if together:
        alone = [moved(reference, np.arange(1200), drawn(seed, 60, 20, together=together)[1]) for seed in range(1, 20)]
        assert np.mean([one.chance is not None and one.chance < 0.01 for one in alone]) > 0.8
    assert max(one.low for one in found) < 0.1


@pytest.mark.parametrize("users", [1, 5, 30])
def test_a_tiny_sample_says_nothing_and_a_small_one_no_drift(users):
    user, values = drawn(0, 2000, 5)
    reference = reference_of(values, user)
    for seed in range(1, 30):
        found = moved(reference, *drawn(seed, users, 6))
        assert found.chance is None and users * 6 < LEAST_ROWS
        assert found.low == 0
    few_users = moved(reference, *drawn(9, 4, 200))
    assert few_users.chance is None


def test_a_shifted_input_is_found_with_its_interval_around_the_truth():
    user, values = drawn(0, 2000, 20)
    reference = reference_of(values, user)
    _, many = drawn(5, 50_000, 20, shift=0.6)
    truth = float(
        psi(
            reference.share,
            shares_of(np.bincount(bins_of(many, reference.edges), minlength=len(reference.share)).astype(float)),
        )
    )
    found = [moved(reference, *drawn(seed, 300, 5, shift=0.6)) for seed in range(1, 120)]
    assert all(one.chance is not None and one.chance < 1e-6 and one.low > 0.1 for one in found)
    assert np.mean([one.low <= truth <= one.high for one in found]) > 0.85
    assert np.mean([one.moved for one in found]) == pytest.approx(truth, rel=0.1)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 2000), st.integers(1, 50))
def test_groups_keep_users_whole_and_are_bounded(users, groups):
    user = np.random.default_rng(0).integers(0, users, 3000)
    group = groups_of(user, groups)
    assert group.max() < groups
    for one in np.unique(user)[:20]:
        assert len(set(group[user == one].tolist())) == 1


def test_a_share_knows_how_rows_hang_together():
    """Ten users who each do one thing only are ten observations, not a thousand."""
    user = np.repeat(np.arange(40), 100)
    alone = np.tile([True, False], 2000)
    together = np.repeat(np.arange(40) % 2 == 0, 100)
    free, bound = share_of(alone, groups_of(user)), share_of(together, groups_of(user))
    assert free is not None and bound is not None
    assert free.share == bound.share == 0.5
    assert bound.high - bound.low > 5 * (free.high - free.low)
    assert share_of(np.zeros(0, dtype=bool), np.zeros(0, dtype=np.intp)) is None
