"""Token buckets by key."""

import pytest

from serve.limits import LimitSettings, RateLimiter


def limiter(**settings: object) -> RateLimiter:
    return RateLimiter(LimitSettings(**({"requests_per_second": 10.0, "burst": 3} | settings)))  # type: ignore[arg-type]


def test_a_burst_passes_then_the_rate():
    bucket = limiter()
    assert [bucket.allow("a", 5.0) for _ in range(3)] == [None] * 3
    assert bucket.allow("a", 5.0) == pytest.approx(0.1)
    assert bucket.allow("a", 5.04) == pytest.approx(0.06)
    assert bucket.allow("a", 5.1) is None
    assert bucket.allow("a", 5.1) == pytest.approx(0.1)


def test_a_refused_request_costs_nothing():
    bucket = limiter(burst=1)
    assert bucket.allow("a", 0.0) is None
    for _ in range(50):
        assert bucket.allow("a", 0.05) is not None
    assert bucket.allow("a", 0.1) is None


def test_a_pause_gives_the_burst_again_and_no_more():
    bucket = limiter()
    for now in (0.0, 1000.0):
        assert [bucket.allow("a", now) is None for _ in range(4)] == [True, True, True, False]


def test_the_wait_that_is_said_is_enough():
    bucket = limiter(requests_per_second=3.0, burst=7)
    now = 12345.678
    passed = 0
    for _ in range(200):
        wait = bucket.allow("a", now)
        passed += wait is None
        now += wait or 0.0
        if wait:
            assert bucket.allow("a", now) is None
            passed += 1
    assert passed == pytest.approx(7 + 3.0 * (now - 12345.678), abs=1)


def test_keys_do_not_share():
    bucket = limiter(burst=1)
    assert bucket.allow("a", 0.0) is None
    assert bucket.allow("b", 0.0) is None
    assert bucket.allow("a", 0.0) is not None


def test_the_number_of_buckets_is_bounded_and_the_longest_unseen_goes():
    bucket = limiter(burst=1, remembered_keys=2)
    for key in ("a", "b"):
        assert bucket.allow(key, 0.0) is None
    assert bucket.allow("c", 0.01) is None
    assert bucket.allow("b", 0.02) is not None, "still remembered"
    assert bucket.allow("a", 0.02) is None, "forgotten"
    for i in range(1000):
        bucket.allow(f"key {i}", 1.0)
    assert len(bucket._full_at) == 2


@pytest.mark.parametrize("wrong", [{"requests_per_second": -1.0}, {"burst": 0}, {"remembered_keys": 0}])
def test_a_wrong_setting_is_named(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        limiter(**wrong)
