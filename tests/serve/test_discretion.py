"""What a log says of requests and crashes names nobody."""

import pytest

from serve.discretion import ROUTES, route_of, stack_of


def test_the_stack_of_a_crash_has_kinds_and_places_and_no_words():
    try:
        try:
            int("4111111111111111x")
        except ValueError as error:
            raise KeyError("4111111111111111") from error
    except KeyError as crash:
        words = stack_of(crash)
    assert "4111" not in words.replace('int("4111111111111111x")', "").replace('KeyError("4111111111111111")', "")
    first, second = words.split("\nafter\n")
    assert first.splitlines()[-1] == "KeyError"
    assert second.splitlines()[-1] == "ValueError"
    assert __file__ in first
    assert __file__ in second


def test_exceptions_that_come_from_each_other_end():
    a, b = ValueError("secret"), ValueError("secret")
    a.__cause__, b.__cause__ = b, a
    assert stack_of(a).count("ValueError") == 2
    assert "secret" not in stack_of(a)


@pytest.mark.parametrize(
    ("path", "route"),
    [
        *((path, path) for path in ROUTES),
        ("/v1/users/4111111111111111", "/v1/users/{user}"),
        ("/v1/users/a/b", "/v1/users/{user}"),
        ("/v1/transactions/1", "/v1/transactions/{transaction_id}"),
        ("/v1/transactions/1/explanation", "/v1/transactions/{transaction_id}/explanation"),
        ("/4111111111111111", "(other)"),
        ("/v1/score/4111111111111111", "(other)"),
        ("", "(other)"),
    ],
)
def test_a_path_is_logged_as_its_route(path, route):
    assert route_of(path) == route
