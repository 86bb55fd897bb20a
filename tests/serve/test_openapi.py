"""The API's description: valid, complete, in agreement with the decoder, and a page that loads nothing."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import jsonschema_rs
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

import serve.app
from benchmarks.api_fuzz import TIMES, cannot_be_said
from seqfraud.config import Duration, Instant
from seqfraud.errors import RequestError
from serve.alerts import AlertQuery, decode_change
from serve.app import create_app
from serve.decoding import InputSettings, Limits, TransactionDecoder, decode_labels
from serve.description import Description
from serve.documentation import render
from serve.openapi import OPERATIONS, describe, example_transactions

LIMIT = 1 << 20
WIDE = InputSettings(earliest=Instant(-62_135_596_800_000), latest_ahead=Duration(10**15))
"""Every time that a description can allow."""
STRICT = '[cleaning]\nnegative_amount = "drop"\nmissing_number = "error"\n'


@pytest.fixture(params=["cards", "plain", "rich", "strict"])
def bundle(request, make_bundle, rich_toml):
    if request.param == "strict":
        return make_bundle(rich_toml + STRICT, missing=("age",))
    return request.getfixturevalue(request.param)


def described(bundle: Any, inputs: InputSettings | None = None, **options: Any) -> dict[str, Any]:
    return describe(bundle, TransactionDecoder(bundle.manifest, Limits(inputs)), LIMIT, **options)


def call(app: Any, method: str, path: str, content: Any = None, **environ: str) -> tuple[int, dict[str, str], bytes]:
    body = b"" if content is None else json.dumps(content).encode()
    started = []
    variables = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "SERVER_NAME": "test",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
        **environ,
    }
    answer = b"".join(app(variables, lambda status, headers, *_: started.append((status, headers))))
    ((status, headers),) = started
    return int(status[:3]), {name.lower(): value for name, value in headers}, answer


def schema_of(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    return jsonschema_rs.validator_for({**schema, "components": document["components"]}, validate_formats=True)


# ---- the document


def test_the_document_is_openapi_3_1(bundle):
    document = json.loads(json.dumps(described(bundle)))
    OPENAPI_31_VALIDATOR.validate(document)
    assert not OPENAPI_31_VALIDATOR.is_valid({**document, "paths": {"x": {}}}), "the validator looks"
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_every_route_of_the_app_is_described_and_nothing_else(service, monkeypatch):
    routes = []
    declare = serve.app._route

    def recording(*arguments: Any) -> Any:
        routes.append(tuple(a for a in arguments if isinstance(a, str)))
        return declare(*arguments)

    monkeypatch.setattr(serve.app, "_route", recording)
    create_app(service)
    document = described(service.bundle)
    assert sorted(routes) == sorted((m.upper(), path) for path, methods in document["paths"].items() for m in methods)
    ids = [operation.id for operation in OPERATIONS]
    assert len(set(ids)) == len(ids)


def test_every_refusal_that_a_request_can_meet_is_described(service):
    document = described(service.bundle)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            statuses = set(operation["responses"])
            assert "200" in statuses
            if method == "post":
                assert {"400", "401", "403", "413", "415", "422", "429", "503"} <= statuses, path
            for status, response in operation["responses"].items():
                if not status.startswith(("2", "3")):
                    name = response["$ref"].removeprefix("#/components/responses/")
                    content = document["components"]["responses"][name]["content"]
                    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/Refusal"}


# ---- examples


NOT_THERE = {"settleDeadLetter": 404, "changeModel": 409}
"""What an example names without a webhook, or a registry."""


def test_every_example_is_accepted_and_answered_as_shown(service):
    """Made, then posted in the order of the page, then what is looked up is there; what is made is deleted at last.

    Everything is an alert.
    """
    service.engine.policy = replace(
        service.engine.policy, thresholds=replace(service.engine.policy.thresholds, review=0.0)
    )
    app = create_app(service)
    document = described(service.bundle)
    every = [(p, method, o) for p, methods in document["paths"].items() for method, o in methods.items()]
    for path, method, operation in sorted(every, key=lambda one: ("put", "", "delete").index(place(*one[:2]))):
        answer = schema_of(document, operation["responses"]["200"]["content"].popitem()[1]["schema"])
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "path":
                path = path.replace(f"{{{parameter['name']}}}", str(parameter["example"]))
        if method == "get" and path.startswith(("/v1", "/healthz", "/readyz")):
            status, _, body = call(app, "GET", path)
            assert status == 200, path
            answer.validate(json.loads(body))
        body = operation.get("requestBody", {"content": {"application/json": {"examples": {}}}})
        for example in body["content"]["application/json"]["examples"].values():
            status, _, body = call(app, method.upper(), path, example["value"])
            if operation["operationId"] in NOT_THERE:
                assert status == NOT_THERE[operation["operationId"]], body
                continue
            assert status == 200, body
            answer.validate(json.loads(body))


def place(path: str, method: str) -> str:
    """Whether an operation comes first or last; the entries of a list go before the list."""
    return method if method == "put" or (method == "delete" and not path.endswith("/entries")) else ""


def test_the_shown_refusals_are_real(service):
    app = create_app(service)
    document = described(service.bundle)
    responses = document["components"]["responses"]
    shown = {name: r["content"]["application/json"]["example"] for name, r in responses.items()}
    for example in shown.values():
        schema_of(document, {"$ref": "#/components/schemas/Refusal"}).validate(example)
    batch = document["paths"]["/v1/score/batch"]["post"]
    sent = batch["requestBody"]["content"]["application/json"]["examples"]["mixed"]["value"]
    assert json.loads(call(app, "POST", "/v1/score/batch", sent)[2])["results"][-1] == shown["WrongField"]
    assert json.loads(call(app, "POST", "/v1/score", sent[-1])[2]) == shown["WrongField"]
    status, _, body = call(app, "POST", "/v1/score", **{"wsgi.input": io.BytesIO(b'{"user"'), "CONTENT_LENGTH": "7"})
    assert (status, json.loads(body)) == (400, shown["Unreadable"])


def test_examples_of_answers_are_what_is_described(bundle):
    document = described(bundle)
    shown = 0
    for methods in document["paths"].values():
        for operation in methods.values():
            content = operation["responses"]["200"]["content"]
            for media in content.values():
                if "example" in media:
                    schema_of(document, media["schema"]).validate(media["example"])
                    shown += 1
    assert shown >= 7


def test_examples_come_from_the_training_rows(cards):
    """The median, the most frequent value, the last day; within the limits in force."""
    deciles = [float(i) for i in range(11)]
    fingerprint = {"last": "2020-05-16T23:59:48Z", "numeric_deciles": {"amount": deciles}}
    manifest = type(cards.manifest)(**{**vars(cards.manifest), "fingerprint": fingerprint})
    full = example_transactions(manifest, TransactionDecoder(manifest))["full"]
    assert (full["amount"], full["kind"], full["time"]) == (5.0, "food", 1_589_673_588_000)
    later = TransactionDecoder(manifest, Limits(InputSettings(earliest=Instant(1_600_000_000_000))))
    assert example_transactions(manifest, later)["full"]["time"] == 1_600_000_000_000


# ---- fields


def strategy(document: dict[str, Any], path: str, mode: str) -> st.SearchStrategy[Any]:
    schemathesis.openapi.format("date-time", TIMES)
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    modes = {"positive": schemathesis.GenerationMode.POSITIVE, "negative": schemathesis.GenerationMode.NEGATIVE}
    return operation.as_strategy(generation_mode=modes[mode])


def agrees(document: dict[str, Any], path: str, decode: Any, examples: int) -> None:
    """What fits the description is decoded, what does not is refused."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = schema_of(document, schema)
    seen = {True: 0, False: 0}

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(st.one_of(*(strategy(document, path, mode) for mode in ("positive", "negative"))))
    def check(case: Any) -> None:
        try:
            body = json.dumps(case.body)
            valid = validator.is_valid(json.loads(body))
        except (TypeError, ValueError):  # no JSON at all
            return
        seen[valid] += 1
        try:
            decode(body.encode())
        except RequestError as error:
            assert error.status in (413, 422)
            assert not valid or cannot_be_said(case.body, {"field": error.field}), error.message
        else:
            assert valid, body

    check()
    assert min(seen.values()) > examples / 10, seen


def test_the_fields_of_a_transaction_are_those_that_the_decoder_takes(bundle):
    decoder = TransactionDecoder(bundle.manifest, Limits(WIDE))
    agrees(describe(bundle, decoder, LIMIT), "/v1/score", decoder.decode, 40)


def test_the_fields_of_a_label_are_those_that_the_decoder_takes(cards):
    agrees(described(cards, WIDE), "/v1/labels", lambda body: decode_labels(body, Limits(WIDE)), 40)


def test_the_fields_of_a_change_are_those_that_the_decoder_takes(cards):
    agrees(described(cards), "/v1/alerts/{transaction_id}", decode_change, 40)


def test_the_parameters_of_a_page_are_those_that_the_decoder_takes(cards):
    parameters = described(cards)["paths"]["/v1/alerts"]["get"]["parameters"]
    assert [p["name"] for p in parameters] == [f.encode_name for f in msgspec.structs.fields(AlertQuery)]
    by = {p["name"]: p["schema"] for p in parameters}
    assert by["state"] == {"enum": ["confirmed", "dismissed", "in_review", "open"]}
    assert by["sort"] == {"enum": ["newest", "probability", "risk"], "default": "newest"}
    assert by["limit"] == {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
    assert by["min_probability"] == {"type": "number", "minimum": 0, "maximum": 1}
    assert by["from"] == by["to"] == {"type": "string", "format": "date-time"}
    assert by["user"] == by["cursor"] == {"type": "string"}
    assert all(p["in"] == "query" and not p["required"] and p["description"] for p in parameters)


def test_policies_and_limits_are_in_the_schema(make_bundle, rich_toml, rich):
    inputs = InputSettings(longest_text=9, control_characters=True, numbers_as_text=True, max_labels=3)
    strict = described(make_bundle(rich_toml + STRICT, missing=("age",)), inputs)
    loose = described(rich)

    def field(document: dict[str, Any], name: str) -> Any:
        return document["components"]["schemas"]["Transaction"]["properties"][name]

    assert field(loose, "total")["anyOf"][0]["minimum"] == -1e30
    assert [kind.get("minimum") for kind in field(strict, "total")["anyOf"]] == [None, 0]
    assert {"age", "total", "lat"} & set(loose["components"]["schemas"]["Transaction"]["required"]) == set()
    assert {"age", "total", "lat"} <= set(strict["components"]["schemas"]["Transaction"]["required"])
    assert field(strict, "user")["anyOf"][0] == {"type": "string", "minLength": 1, "maxLength": 9}
    assert field(loose, "kind")["anyOf"][0]["pattern"].startswith("^[^")
    labels = [d["paths"]["/v1/labels"]["post"]["requestBody"]["content"] for d in (loose, strict)]
    assert [c["application/json"]["schema"]["maxItems"] for c in labels] == [10_000, 3]


def test_numbers_as_text_are_described_as_they_are_taken(cards):
    """The pattern, which is checked by hand, against the decoder."""
    inputs = InputSettings(numbers_as_text=True)
    decoder = TransactionDecoder(cards.manifest, Limits(inputs))
    document = describe(cards, decoder, LIMIT)
    validator = schema_of(document, {"$ref": "#/components/schemas/Transaction"})
    full = example_transactions(cards.manifest, decoder)["full"]
    for text in ("1", "-1.5", "2e3", "0.0", "1E-2", "", "01", "+1", ".5", "1.", "NaN", "1e", " 1", "0x1", "one", "1_0"):
        row = {**full, "amount": text}
        try:
            decoder.decode(json.dumps(row).encode())
        except RequestError:
            assert not validator.is_valid(row), text
        else:
            assert validator.is_valid(row), text


# ---- keys


def test_keys_and_roles_are_described(cards):
    document = described(cards)
    assert document["paths"]["/v1/labels"]["post"]["security"] == [
        {"bearer": ["admin", "label"]}, {"header": ["admin", "label"]}, {},
    ]  # fmt: skip
    assert document["paths"]["/healthz"]["get"]["security"] == []
    closed = described(cards, roles={("GET", "/healthz"): {"admin"}}, keys_required=True)
    assert closed["paths"]["/healthz"]["get"]["security"] == [{"bearer": ["admin"]}, {"header": ["admin"]}]
    assert {"401", "403", "429"} <= set(closed["paths"]["/healthz"]["get"]["responses"])
    assert closed["paths"]["/v1/score"]["post"]["security"] == []


# ---- the page


class Page(HTMLParser):
    """What a page links, loads and names; whether its elements are closed in order."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: set[str] = set()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                assert value not in self.ids, value
                self.ids.add(str(value))
            elif name == "href":
                (self.links if tag == "a" else self.loaded).add(str(value))
            elif name in ("src", "srcset", "data", "action"):
                self.loaded.add(str(value))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_everything_and_loads_only_its_style(bundle):
    document = described(bundle)
    text = render(document, "/docs/style.css")
    page = Page(text)
    assert page.loaded == {"/docs/style.css", "data:,"}
    assert page.links - {"/openapi.json"} == {link for link in page.links if link.removeprefix("#") in page.ids}
    assert {operation.id for operation in OPERATIONS} <= page.ids
    assert "script" not in page.elements
    assert not {name for name in page.attributes if name.startswith("on") or name == "style"}
    for column in bundle.manifest.schema.fields:
        assert f"<code>{column}</code>" in text
    for status in ("400", "409", "413", "415", "422", "429", "503"):
        assert f">{status}</span>" in text


def test_names_of_columns_are_only_text_on_the_page(make_bundle, cards_toml):
    """A bundle may come from elsewhere."""
    evil = "</code><script>alert(1)</script>"
    bundle = make_bundle(cards_toml.replace('"merchant"', json.dumps(evil)))
    page = Page(render(described(bundle), "/docs/style.css"))
    assert "script" not in page.elements
    assert f"<code>{evil}" not in render(described(bundle), "/docs/style.css")


def test_the_curl_lines_of_the_page_are_what_a_shell_sends(cards):
    """An apostrophe in a category would end the quotes."""
    import shlex
    from html import unescape

    document = described(cards)
    examples = document["paths"]["/v1/score"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    examples["full"]["value"]["kind"] = "it's $HOME"
    text = render(document, "/docs/style.css")
    lines = [unescape(code) for code in re.findall(r"<pre[^>]*><code>(curl.*?)</code></pre>", text, re.DOTALL)]
    words = shlex.split(next(line for line in lines if "it's" in line.replace("'\"'\"'", "'")))
    assert words[:3] == ["curl", "-s", "$SEQFRAUD/v1/score"]
    assert json.loads(words[-1]) == examples["full"]["value"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/openapi.json", "application/json"),
        ("/docs", "text/html; charset=utf-8"),
        ("/docs/style.css", "text/css; charset=utf-8"),
    ],
)
def test_pages_are_revalidated_cheaply(service, path, kind):
    app = create_app(service)
    status, headers, body = call(app, "GET", path)
    assert (status, headers["content-type"], headers["cache-control"]) == (200, kind, "no-cache")
    assert body
    etag = headers["etag"]
    for known in (etag, f'"other", W/{etag}', "*"):
        status, headers, nothing = call(app, "GET", path, HTTP_IF_NONE_MATCH=known)
        assert (status, nothing, headers["etag"]) == (304, b"", etag)
    assert call(app, "GET", path, HTTP_IF_NONE_MATCH='"other"')[0] == 200
    assert call(app, "HEAD", path)[::2] == (200, b"")


def test_the_page_may_use_nothing_but_its_style(service):
    policy = call(create_app(service), "GET", "/docs")[1]["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "style-src 'self'" in policy
    assert "script-src" not in policy
    css = call(create_app(service), "GET", "/docs/style.css")[2].decode()
    assert not re.search(r"url\(|@import|https?:", css)


def test_pages_are_made_once_for_a_bundle(cards, plain):
    description = Description(LIMIT, keys_required=False)
    engines = [SimpleNamespace(bundle=b, decoder=TransactionDecoder(b.manifest)) for b in (cards, plain)]
    first = description.of(engines[0])
    assert description.of(engines[0]) is first
    assert b'"merchant"' in first.document.content
    assert b'"merchant"' not in description.of(engines[1]).document.content
