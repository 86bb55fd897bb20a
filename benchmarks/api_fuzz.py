"""schemathesis against a running service, by its own description: everything documented, and nothing else.

    python -m benchmarks.api_fuzz [--examples 1000] [--seed 1] [--configuration RICH]

Starts a service with drawn weights on an empty state folder, generates requests that fit the description and requests that
do not (the description's examples, every boundary of every field, random ones, and chains by its links), and checks every
answer: status, headers, content type and body as described, valid requests accepted, invalid ones refused, no 5xx. Prints
how many of which status there were; any failure is printed as a curl line and makes the exit code 1.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema_rs
import schemathesis
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from benchmarks import drawn
from benchmarks.processes import service
from seqfraud.config import parse_config

SETTINGS = """
[input]
earliest = "0001-01-01"
latest_ahead = "3000000d"
"""
"""Every time that the description allows: what is taken by default moves on with the clock, which it cannot say."""

CONFIGURATIONS = {"CARDS": drawn.CARDS, "PLAIN": drawn.PLAIN, "RICH": drawn.RICH}
BATCH = "POST /v1/score/batch"
ALERTS = "GET /v1/alerts"


@dataclass
class Fuzzed:
    """What was asked and what came back.

    Attributes:
        described: the OpenAPI document.
        phases: phase -> status or "no answer" -> requests.
        operations: operation -> requests.
        checks: check -> how often it was made.
        failures: what failed, each with a curl line.
    """

    described: dict[str, Any]
    phases: dict[str, Counter[str]] = field(default_factory=dict)
    operations: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """How many there were."""
        return sum(self.operations.values())

    def add(self, event: events.ScenarioFinished) -> None:
        """What a scenario of schemathesis did."""
        statuses = self.phases.setdefault(event.phase.value, Counter())
        recorder = event.recorder
        for case_id, interaction in recorder.interactions.items():
            response = interaction.response
            statuses["no answer" if response is None else str(response.status_code)] += 1
            if case_id in recorder.cases:
                self.operations[recorder.cases[case_id].value.operation.label] += 1
        for case_id, checks in recorder.checks.items():
            case, response = recorder.cases[case_id].value, recorder.interactions[case_id].response
            for check in checks:
                self.checks[check.name] += 1
                failed = check.failure_info
                if failed is not None and not self._excused(check.name, case, response):
                    words = f"{failed.failure.title}: {failed.failure.message}"
                    self.failures.append(
                        f"{case.operation.label}: {check.name}: {words}\n{response.status_code} {response.content[:300]!r}\n{failed.code_sample}"
                    )

    def _excused(self, check: str, case: Any, response: Any) -> bool:
        """Whether the service is right though schemathesis does not see it."""
        if check == "positive_data_acceptance":
            if case.operation.label == ALERTS:
                return json.loads(response.content)["error"]["field"] == "cursor"  # only a page knows one
            return response.status_code == 422 and cannot_be_said(case.body, json.loads(response.content)["error"])
        if check == "use_after_free":
            return str(case.operation.path).endswith("/history")  # what is deleted keeps its history
        if check != "negative_data_rejection":
            return False
        if case.operation.label == BATCH and any("error" in r for r in json.loads(response.content)["results"]):
            return True  # an item that is refused has its error in its place
        return self._is_valid(case)

    def _is_valid(self, case: Any) -> bool:
        """Whether what should break the description does not: 1e30 + 1 is 1e30."""
        path, method = case.operation.path, case.operation.method
        try:
            schema = self.described["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
        except KeyError:
            return False
        components = {"components": self.described["components"]}
        return bool(jsonschema_rs.is_valid({**schema, **components}, case.body, validate_formats=True))


def cannot_be_said(body: Any, error: dict[str, str]) -> bool:
    """Whether what was refused is a limit that JSON schema has no words for.

    It takes 7.0 for an integer, where an id is one that is spelled so; cannot limit the length of a number as text; and
    seconds as floats are rounded up to a millisecond beyond the year 9999.
    """
    rows = body if isinstance(body, list) else [body]
    values = [leaf for row in rows for leaf in leaves(row.get(error["field"].partition("[")[0]))]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return any(
        (isinstance(x, float) and x.is_integer()) or len(str(x)) > 200 or abs(x) > 1e200 or 0 < 253402300800 - x < 0.001
        for x in numbers
    )


def leaves(value: Any) -> Iterator[Any]:
    """What is in a JSON value, at any depth."""
    if isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)
    else:
        yield value


def fuzz(url: str, examples: int, seed: int) -> Fuzzed:
    """Run all phases of schemathesis against a service, at most `examples` random requests per operation."""
    schemathesis.openapi.format("date-time", TIMES)
    schemathesis.openapi.format("cel", CONDITIONS)
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "generation": {"max-examples": examples, "deterministic": True, "database": "none"},
            "continue-on-failure": True,
            "checks": {
                # 413: an array that is too long
                "negative_data_rejection": {"expected-statuses": ["400", "404", "409", "413", "415", "422"]},
                "positive_data_acceptance": {"expected-statuses": ["2xx", "404", "409"]},
            },
        }
    )
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
    out = Fuzzed(described=schema.raw_schema)
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError):
            out.failures.append(f"{event.label}: {event.value!r}")
        elif isinstance(event, events.FatalError):
            raise event.exception
        elif isinstance(event, events.ScenarioFinished):
            out.add(event)
    return out


_ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
TIMES = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=_ZONES).map(datetime.isoformat)
"""schemathesis would also make the second 60, which is no time to Python."""

CONDITIONS = st.lists(
    st.sampled_from(["probability > 0.5", "count_1h >= 3", "hour < 6", "since_last < 60", "late", "!late"]),
    min_size=1,
    max_size=9,
).map(" || ".join)
"""What JSON schema cannot say of a rule's expression."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="random requests per operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--configuration", choices=CONFIGURATIONS, help="default: all, one after the other")
    options = parser.parse_args()
    failed = False
    for name in [options.configuration] if options.configuration else CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            config = parse_config(CONFIGURATIONS[name], name)
            bundle = drawn.drawn_bundle(work / "bundle", config, ("age",) if name == "RICH" else (), 0, 2.5)
            (work / "settings.toml").write_text(SETTINGS)
            with service(bundle.path, work / "state", "--settings", str(work / "settings.toml")) as url:
                result = fuzz(url, options.examples, options.seed)
        print(f"{name}: {result.requests:,} requests, {sum(result.checks.values()):,} checks")
        for phase, statuses in result.phases.items():
            print(f"  {phase:10} " + "  ".join(f"{status} {count:,}" for status, count in sorted(statuses.items())))
        print(f"  {len(result.failures)} failures")
        for failure in result.failures:
            print(failure[:2000])
        failed = failed or bool(result.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
