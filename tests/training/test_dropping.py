"""The text of a configuration without some inputs: what is kept of it, and that it says what was meant."""

import pytest

from seqfraud.config import parse_config
from seqfraud.errors import ConfigError
from training.dropping import dropped_text
from training.importance import Input, inputs_of
from training.selection import without_inputs

TEXT = """# the user's own words
[data]
user = "u"      # numeric = ["not", "this"]
time = "t"
path = '''a # no comment, [no] "list"'''

[features]
# money
numeric = [
    "amount",  # in euros
    # a long reason why this one
    # was taken
    "age",
    'rate'     # no comma
]
categorical = ["kind", "a \\"b\\" # c", "last"]  # embedded
context = ["shop", "device",
           "agent"]
geo = [["lat", "long"], [ "home_lat", "home_long" ]]
"ip" = [ "ip" ]
bins = 6

[split]
train_end = 2025-01-21
"""
NAMES = ("amount", "age", "rate", "kind", 'a "b" # c', "last", "shop", "device", "agent", "ip", "lat", "home_lat")


def without(text: str, *names: str) -> str:
    config = parse_config(text, "c.toml")
    gone = [one for one in inputs_of(config.features) if one.columns[0] in names]
    assert len(gone) == len(names)
    found = dropped_text(text, "c.toml", config, {one: f"because {one}" for one in gone}, "Dropped:")
    assert parse_config(found, "c.toml") == without_inputs(config, gone)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_input_can_go_alone_and_each_can_stay_alone(name: str) -> None:
    assert "# the user's own words" in without(TEXT, name)
    assert "# embedded" in without(TEXT, *(other for other in NAMES if other != name))


def test_comments_stay_and_the_head_says_what_went_and_why() -> None:
    found = without(TEXT, "age", "kind", "last", "lat")
    assert found.startswith(
        "# Dropped:\n#   numeric age: because numeric age\n#   categorical kind: because categorical kind\n"
        "#   categorical last: because categorical last\n#   geo lat/long: because geo lat/long\n\n"
        "# the user's own words\n"
    )
    assert '    # was taken\n    # dropped: "age",\n' in found
    assert 'categorical = ["a \\"b\\" # c"]  # embedded\n' in found
    assert 'geo = [[ "home_lat", "home_long" ]]\n' in found
    assert '"amount",  # in euros' in found


@pytest.mark.parametrize(
    "features", ['features.numeric = ["a", "b"]\n[data]', '[ features ]\nnumeric = ["a", "b"]\n[data]']
)
def test_other_spellings(features: str) -> None:
    assert parse_config(without(f'{features}\nuser = "u"\ntime = "t"\n', "a"), "c").features.numeric == ("b",)


def test_a_spelling_that_is_not_read_is_refused() -> None:
    text = 'features = { numeric = ["a", "b"] }\n[data]\nuser = "u"\ntime = "t"\n'
    config = parse_config(text, "c.toml")
    with pytest.raises(ConfigError, match=r"c.toml: --select rewrites the lists of \[features\] and cannot read them"):
        dropped_text(text, "c.toml", config, {Input("numeric", ("a",)): ""}, "")
