"""schemathesis against a real server process, by the description that the server gives."""

import pytest

from benchmarks.api_fuzz import SETTINGS, Fuzzed, fuzz
from benchmarks.processes import service
from serve.openapi import OPERATIONS


@pytest.fixture(scope="module")
def fuzzed(rich, tmp_path_factory) -> Fuzzed:
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "settings.toml").write_text(SETTINGS)
    with service(rich.path, folder / "state", "--settings", str(folder / "settings.toml")) as url:
        return fuzz(url, examples=5, seed=1)


def test_everything_is_answered_as_described(fuzzed):
    assert fuzzed.failures == []


def test_every_operation_was_asked_in_every_way(fuzzed):
    """Else the test above says little."""
    assert set(fuzzed.phases) == {"examples", "coverage", "fuzzing", "stateful"}
    every = {f"{operation.method} {operation.path}" for operation in OPERATIONS}
    assert every - set(fuzzed.operations) <= {"GET /openapi.json"}, "which it read to begin with"
    statuses = {status for counts in fuzzed.phases.values() for status in counts}
    assert statuses == {"200", "400", "404", "405", "409", "413", "415", "422"}
    assert fuzzed.phases["stateful"]["200"] > 0
    assert {
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "response_headers_conformance",
        "negative_data_rejection",
        "positive_data_acceptance",
        "unsupported_method",
        "allow_header_conformance",
        "ignored_auth",
    } <= set(fuzzed.checks)
