"""The service's settings file: defaults, sections, and errors that name the key."""

import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from seqfraud.config import from_plain
from seqfraud.errors import ConfigError
from serve.decoding import InputSettings
from serve.settings import Settings, load_settings
from serve.tls import TlsSettings

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "service.md"


def test_without_a_file_the_defaults_hold():
    assert load_settings(None) == Settings()


def test_a_file_sets_a_section_and_leaves_the_rest(tmp_path: Path):
    file = tmp_path / "serve.toml"
    file.write_text('[server]\nport = 9000\nhost = "::1"\n')
    server = load_settings(file).server
    assert (server.host, server.port, server.threads) == ("::1", 9000, Settings().server.threads)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nprt = 1\n", "the nearest valid key is server.port"),
        ("[sever]\nport = 1\n", "the nearest valid section is server"),
        ('[server]\nport = "a"\n', "server.port: expected a whole number, got 'a'"),
        ("[server\n", "not valid TOML"),
        ('[log]\nformat = "xml"\n', "'xml' is not one of 'json', 'text'"),
        ("[input]\nlongest = 1\n", "the nearest valid key is input.longest_text"),
        ("[input]\nlatest_ahead = 5\n", "input.latest_ahead: expected a duration"),
        ('[input]\nearliest = "soon"\n', "input.earliest: 'soon' is not an ISO 8601 date"),
        ("[input]\nmax_labels = 0\n", "input: max_labels is 0; expected 1 or more"),
    ],
)
def test_an_error_names_what_is_wrong(tmp_path: Path, text: str, words: str):
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"serve\.toml") as caught:
        load_settings(file)
    assert words in str(caught.value)


def blocks() -> list[str]:
    found: list[str] = re.findall(r"```toml\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in found if "columns =" not in block]  # that is the bundle's configuration


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.split("]")[0].strip("["))
def test_what_the_documentation_shows_is_a_settings_file(block: str):
    from_plain(Settings, tomllib.loads(block), "service.md")


def test_the_whole_file_in_the_documentation_has_the_defaults():
    (block,) = (block for block in blocks() if "[server]" in block)
    given = from_plain(Settings, tomllib.loads(block), "service.md")
    assert (given.keys.file, given.tls) == ("keys.json", TlsSettings("tls.crt", "tls.key"))
    assert replace(given, keys=replace(given.keys, file=""), tls=None) == Settings()


def test_a_section_of_tls_needs_both_files(tmp_path: Path):
    file = tmp_path / "serve.toml"
    file.write_text('[tls]\ncertificate = "a"\n')
    with pytest.raises(ConfigError, match=r"the key tls\.key is missing"):
        load_settings(file)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read"):
        load_settings(tmp_path / "absent.toml")


def test_the_input_settings_in_the_documentation_are_the_defaults(tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "service.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(\[input\]\n.*?)```", page, re.DOTALL)
    file = tmp_path / "serve.toml"
    file.write_text(block, encoding="utf-8")
    assert load_settings(file) == Settings()
    assert {f.name for f in fields(InputSettings)} == set(tomllib.loads(block)["input"])
