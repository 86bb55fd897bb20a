"""The language of rules: what it knows, what it refuses, and that nobody can harm the service by it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfraud.config import IdentifiersConfig
from seqfraud.errors import RequestError
from seqfraud.identifiers import Identifiers
from serve.expressions import LONGEST, Language, activation, ever_true, holds, identifier_of

CARD = "4111111111111111"
KNOWN = {"amount": 150.0, "merchant": "m1", "hour": 3.0, "probability": 0.2, "count_1h": 4.0, "has_device": False}


@pytest.fixture(scope="module")
def language(cards) -> Language:
    return Language(cards.manifest, Identifiers(cards.manifest.schema, IdentifiersConfig("cards"), bytes(32)))


def said(language: Language, text: str, values=KNOWN):
    return holds(language.compile(text).program, activation(values))


def refused(language: Language, text: str) -> str:
    with pytest.raises(RequestError) as caught:
        language.compile(text)
    assert (caught.value.status, caught.value.field) == (422, "expression")
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("amount > 100", True),
        ("amount == 150", True),
        ("amount * 2 >= 300.0 && hour < 6", True),
        ("-amount / 3 < -49.9", True),
        ("amount > 1e3 || merchant in ['m1', \"m2\"]", True),
        ("!(merchant.startsWith('x')) && merchant.matches('^m[0-9]+$')", True),
        ("merchant.contains('\"') || merchant == 'it\\'s'", False),
        ("count_1h > 3 ? probability > 0.1 : probability > 0.9", True),
        ("has_device", False),
        ("amount in [1, 150]", True),
    ],
)
def test_conditions(language, text, wanted):
    assert said(language, text) is wanted


def test_a_missing_value_fails_only_where_it_decides(language):
    assert said(language, "device == 'd'") is None
    assert said(language, "device == 'd' || amount > 100") is True
    assert said(language, "device == 'd' && amount < 100") is False
    # infinities, and what is no number, are no errors
    assert said(language, "1 / (hour - hour) > 1e300") is True
    assert said(language, "0 / (hour - hour) > 0") is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("amont > 100", "'amont' is no name here"),
        ("amont > 100", "the nearest is amount"),
        ("count_1w > 1", "the nearest is count_24h"),
        ("count_91d > 1", "a window is at most 90d"),
        ("distinct_merchant_1h > 2", "distinct is known of amount, kind"),
        ("amount > 'x'", "applied to '(number, text)'"),
        ("merchant > 5", "applied to '(text, number)'"),
        ("amount", "it is neither true nor false"),
        ("amount >", "expected an expression"),
        ("", "expected an expression"),
        ("null == null", "'null' is no name here"),
        ("amount > 1" + "0" * 400, "not so large"),
        ("merchant.matches(merchant)", "without a pattern in quotes"),
        ("merchant.matches('(a{100}){100}')", "no counted repetition"),
        ("merchant.matches('[')", "a regular expression of RE2"),
        ("merchant.size() > 1", "expected one of startsWith"),
    ],
)
def test_what_is_wrong_is_said(language, text, words):
    assert words in refused(language, text)


ATTACKS = [
    "merchant.__class__ == 'x'",
    "merchant.__class__.__mro__",
    "__import__('os')",
    "().__class__.__bases__[0].__subclasses__()",
    "[1, 2].all(x, x > 0)",
    "[1].map(x, [1].map(y, y)) == []",
    "[0,1].exists(a, [0,1].exists(b, true))",
    "dyn(merchant).f",
    "type(merchant) == string",
    "timestamp('2020-01-01T00:00:00Z') > timestamp(0)",
    "{'a': 1}['a'] == 1",
    "9 ** 9 ** 9 > 1",
    "merchant == '''x'''",
    "merchant == r'x'",
    "merchant == b'x'",
    "merchant == '\\x41'",
    "amount > 1 // '",
    "amount > 1; true",
    "amount > 0x10",
    "`amount` > 1",
    "amount > 1\x00",
    "lambda: 1",
    "exec('1')",
    "x := 1",
    "(" * 200 + "true" + ")" * 200,
    "[" * 200 + "]" * 200 + " == []",
    "amount > 1 ? true : " * 45 + "true",
    "(amount" + " + amount" * 100 + ") > 1",
    "true || " * (LONGEST // 8) + "true",
    "merchant.matches('" + "(a|b)*" * 100 + "')",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_attacks_are_refused(language, text):
    refused(language, text)


def test_a_pattern_takes_linear_time(language):
    """`(a+)+$` over 256 characters would not end with `re`."""
    assert said(language, "merchant.matches('(a+)+$')", {"merchant": "a" * 255 + "b"}) is False


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from(
                [
                    "amount",
                    "merchant",
                    "true",
                    "in",
                    "(",
                    ")",
                    "[",
                    "]",
                    "&&",
                    "||",
                    "!",
                    "==",
                    ">",
                    "+",
                    "-",
                    ".",
                    ",",
                    "?",
                    ":",
                    "1",
                    "2.5",
                    "'x'",
                    "matches",
                    "__class__",
                ]
            ),
            max_size=30,
        ).map(" ".join),
    )
)
def test_any_text_is_taken_or_refused_and_evaluates_to_yes_no_or_nothing(language, text):
    try:
        expression = language.compile(text)
    except RequestError as error:
        assert error.status == 422
        return
    assert holds(expression.program, activation(KNOWN)) in (True, False, None)
    assert expression.names <= {"amount", "merchant"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["amount > 100", "device == 'd'", "hour > 5", "merchant == 'm1'", "kind == 'a'"]), max_size=6
    )
)
def test_many_at_once_are_false_exactly_where_each_is_and_none_fails(language, texts):
    together = ever_true([language.compile(text).source for text in texts] or ["false"])
    one_by_one = [said(language, text) for text in texts]
    assert (holds(together, activation(KNOWN)) is False) == all(one is False for one in one_by_one)


def test_card_numbers_do_not_stay_in_an_expression(language):
    expression = language.compile(f"merchant == '{CARD}' || merchant == 'm1'")
    assert CARD not in expression.text and CARD not in expression.source
    hidden = Identifiers(language.schema, IdentifiersConfig("cards"), bytes(32)).without_cards(CARD)
    assert holds(expression.program, activation({"merchant": hidden})) is True


def test_hashed_columns_are_for_lists(make_bundle, cards_toml):
    manifest = make_bundle(cards_toml + '\n[identifiers]\ndefault = "hash"\n').manifest
    for key in (bytes(32), None):  # the command may not have it
        language = Language(manifest, Identifiers(manifest.schema, manifest.identifiers, key))
        assert "expected a list, or has_merchant" in refused(language, "merchant == 'm1'")
        language.compile("has_merchant && kind == 'd1'")


def test_any_column_has_a_name():
    assert [identifier_of(c) for c in ("TX_AMOUNT", "merchant id", "1st", "in", "", "größe")] == [
        "TX_AMOUNT", "merchant_id", "_1st", "in_", "_", "gr__e",
    ]  # fmt: skip
