"""The API's description (OpenAPI 3.1), made from the types that decode requests and encode answers.

Everything about a field that a type says comes from the type; here stand the operations, the words, and examples that
are made from the bundle and accepted by its decoder.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

import seqfraud
from seqfraud.bundle import Bundle, Manifest
from seqfraud.canonical import EARLIEST_MS, LATEST_MS, spell_time
from seqfraud.config import DAY_MS, TimeUnit, format_instant, parse_instant
from seqfraud.errors import RequestError
from seqfraud.schema import Schema
from serve.alerts import AlertQuery, ChangeAlert
from serve.answers import (
    AlertDetail,
    AlertPage,
    Answer,
    Attribution,
    Explanation,
    GivenAnswer,
    GivenLabel,
    LabelCounts,
    ModelInForce,
    OutboxState,
    PastEvent,
    Reason,
    Refusal,
    State,
    UserHistory,
)
from serve.decoding import NO_CONTROL_CHARACTERS, Label, Limits, Transaction, TransactionDecoder, decode_labels
from serve.desk import NAME
from serve.keys import ADMIN, LABEL, METRICS, OPEN, SCORE, Roles
from serve.metrics import CONTENT_TYPE
from serve.models import ChangeModel
from serve.outbox import Settling
from serve.rule_bodies import (
    MAX_ENTRIES,
    DraftPosted,
    EntriesPosted,
    EntryCounts,
    Gone,
    History,
    ListInForce,
    ListPage,
    ListPosted,
    Lists,
    RuleInForce,
    RulePosted,
    Rules,
    RuleTest,
    ValuesPosted,
    Why,
)

__all__ = ["OPERATIONS", "ROLES", "Operation", "describe", "example_transactions"]

Json = dict[str, Any]

JSON = "application/json"
HTML = "text/html; charset=utf-8"
CSS = "text/css; charset=utf-8"
STYLE_PATH = "/docs/style.css"
HOUR_MS = 3_600_000

TAGS = {
    "Scoring": "A transaction in, a probability and a decision out.",
    "Labels": "What turned out to be fraud, or honest.",
    "Looking": "What was answered, and by what.",
    "Rules": "Conditions and lists beside the model, for its owners.",
    "Alerts": "What was not approved, and what people make of it.",
    "Operation": "For whoever runs the service.",
    "Description": "This description.",
}


@dataclass(frozen=True)
class Operation:
    """One method of one route. `refusals` are the statuses of the one error shape; `answers` names a component or, for
    what is no JSON, is None.
    """

    method: str
    path: str
    id: str
    tag: str
    summary: str
    description: str
    answers: str | None = None
    content_type: str = JSON
    refusals: tuple[int, ...] = ()
    revalidated: bool = False
    """Carries an ETag, so that asking again is cheap."""
    query: type[msgspec.Struct] | None = None
    """The parameters behind the question mark."""


_POSTED = (400, 413, 415, 422, 503)

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "POST",
        "/v1/score",
        "score",
        "Scoring",
        "Score one transaction",
        "Scores a transaction by its user's history and what its other entities have been through, stores both in the "
        "journal and then answers. The same id with the same declared content gets the first answer again, marked as "
        "a duplicate; with other content it is refused, and nothing changes. Undeclared fields are ignored.",
        "Answer",
        refusals=(*_POSTED, 409),
    ),
    Operation(
        "POST",
        "/v1/score/batch",
        "scoreBatch",
        "Scoring",
        "Score many transactions",
        "What the transactions posted one by one, in the order of the array, would get: one result each. One that is "
        "refused has its error in its place; the others are scored.",
        "BatchAnswer",
        refusals=_POSTED,
    ),
    Operation(
        "POST",
        "/v1/labels",
        "addLabels",
        "Labels",
        "Say what was fraud",
        "All labels of a request are taken, or none. A label takes effect before the first transaction whose time is at or "
        "after `known_at`; without `known_at` it is known now. A label of an unknown transaction is kept until that comes. "
        "Honest labels need not be sent: silence for one label delay says it.",
        "LabelCounts",
        refusals=_POSTED,
    ),
    Operation(
        "GET",
        "/v1/transactions/{transaction_id}",
        "getTransaction",
        "Looking",
        "The answer to a transaction",
        "The answer exactly as it was given, and the labels that were said of it since, each with its source and author.",
        "GivenAnswer",
        refusals=(400, 404, 503),
    ),
    Operation(
        "GET",
        "/v1/transactions/{transaction_id}/explanation",
        "explainTransaction",
        "Looking",
        "What a score is made of",
        "Scores the transaction again with each of its inputs at the user's usual value, and without each of the user's "
        "transactions before it. Of transactions that are still among their user's recent ones in memory; 409 for others.",
        "Explanation",
        refusals=(400, 404, 409, 503),
    ),
    Operation(
        "GET",
        "/v1/users/{user}",
        "getUser",
        "Looking",
        "The recent events of a user",
        "Newest first, each with its answer.",
        "UserHistory",
        refusals=(400, 404, 503),
    ),
    Operation(
        "GET",
        "/v1/alerts",
        "listAlerts",
        "Alerts",
        "The queue of alerts",
        "Every scored transaction that was not approved, but those that a backfill brought. Pages go by `next`: of the "
        "alerts that were there at the first page each comes once, whatever is added meanwhile.",
        "AlertPage",
        refusals=(422, 503),
        query=AlertQuery,
    ),
    Operation(
        "GET",
        "/v1/alerts/{transaction_id}",
        "getAlert",
        "Alerts",
        "An alert with its whole life",
        "As the queue shows it, and every change of its state.",
        "AlertDetail",
        refusals=(400, 404, 503),
    ),
    Operation(
        "POST",
        "/v1/alerts/{transaction_id}",
        "changeAlert",
        "Alerts",
        "Take an alert up, or close it",
        "`in_review` assigns it to the key that asks, `open` gives it back, `confirmed` and `dismissed` close it and say that "
        "the transaction was fraud, or honest: a label by the source `analyst`, stored together with the change. A closed "
        "alert goes to `in_review` again first. With `expected` it is refused where its state is another one. Asked again "
        "by the same key in the same words it changes nothing.",
        "AlertDetail",
        refusals=(*_POSTED, 404, 409),
    ),
    Operation(
        "GET",
        "/v1/outbox",
        "getOutbox",
        "Alerts",
        "What leaves for the webhook",
        "How far delivery has come, the event whose turn it is, and those that were given up.",
        "OutboxState",
        refusals=(503,),
    ),
    Operation(
        "POST",
        "/v1/outbox/dead/{seq}",
        "settleDeadLetter",
        "Alerts",
        "Try a dead letter again, or drop it",
        "`retry` makes one more attempt before what waits; `drop` lets it go.",
        "OutboxState",
        refusals=(*_POSTED, 404),
    ),
    Operation(
        "GET",
        "/v1/model",
        "getModel",
        "Looking",
        "The model in force",
        "Which bundle scores, what it declares, and how much the service has seen.",
        "ModelInForce",
        refusals=(503,),
    ),
    Operation(
        "POST",
        "/v1/model",
        "changeModel",
        "Operation",
        "Let another model come into force, or score in shadow",
        "`promote` and `rollback` bring a model of the service's registry into force, `shadow` lets one score beside it "
        "and answer nobody, `withdraw` ends that. A model is verified and worked into the history of the journal beside "
        "the one that answers, which takes as long as it takes: the answer comes when it is done. A change that cannot be "
        "made changes nothing. One at a time.",
        "ModelInForce",
        refusals=(*_POSTED, 404, 409),
    ),
    Operation(
        "GET",
        "/v1/rules",
        "getRules",
        "Rules",
        "Every rule",
        "In their order: by priority, then by name; drafts too.",
        "Rules",
    ),
    Operation(
        "POST",
        "/v1/rules/test",
        "testRule",
        "Rules",
        "What a draft would have hit",
        "Evaluates a condition on the newest transactions of the journal, as they were answered. Nothing is changed, and "
        "scoring goes on meanwhile. One is tested at a time.",
        "RuleTest",
        refusals=_POSTED,
    ),
    Operation(
        "GET",
        "/v1/rules/{name}",
        "getRule",
        "Rules",
        "One rule",
        "As it stands, with how often it was true since the start.",
        "RuleInForce",
        refusals=(404,),
    ),
    Operation(
        "PUT",
        "/v1/rules/{name}",
        "putRule",
        "Rules",
        "Make or change a rule",
        "Checked against the model's fields, stored with its author and why, and in force for the next transaction.",
        "RuleInForce",
        refusals=(*_POSTED, 409),
    ),
    Operation(
        "DELETE",
        "/v1/rules/{name}",
        "deleteRule",
        "Rules",
        "Delete a rule",
        "Its history stays.",
        "Gone",
        refusals=(*_POSTED, 404),
    ),
    Operation(
        "GET",
        "/v1/rules/{name}/history",
        "getRuleHistory",
        "Rules",
        "Every change of a rule",
        "Who, when, why, oldest first; of a deleted rule too.",
        "History",
        refusals=(404, 503),
    ),
    Operation("GET", "/v1/lists", "getLists", "Rules", "Every list", "In their order: allow lists first.", "Lists"),
    Operation(
        "GET",
        "/v1/lists/{name}",
        "getList",
        "Rules",
        "A list and its entries",
        "A page of them from `offset` on.",
        "ListPage",
        refusals=(404, 422),
    ),
    Operation(
        "PUT",
        "/v1/lists/{name}",
        "putList",
        "Rules",
        "Make a list",
        "An empty one; a list that is there keeps its entries, its kind and its field.",
        "ListInForce",
        refusals=(*_POSTED, 409),
    ),
    Operation(
        "DELETE",
        "/v1/lists/{name}",
        "deleteList",
        "Rules",
        "Delete a list",
        "With its entries; its history stays.",
        "Gone",
        refusals=(*_POSTED, 404),
    ),
    Operation(
        "POST",
        "/v1/lists/{name}/entries",
        "addEntries",
        "Rules",
        "Put values on a list",
        "All or none. A value that is there gets the new end and the new why.",
        "EntryCounts",
        refusals=(*_POSTED, 404, 409),
    ),
    Operation(
        "DELETE",
        "/v1/lists/{name}/entries",
        "removeEntries",
        "Rules",
        "Take values off a list",
        "Those that are not on it are counted.",
        "EntryCounts",
        refusals=(*_POSTED, 404, 409),
    ),
    Operation(
        "GET",
        "/v1/lists/{name}/history",
        "getListHistory",
        "Rules",
        "Every change of a list",
        "Who, when, why, oldest first; of values the first hundred of each change.",
        "History",
        refusals=(404, 503),
    ),
    Operation("GET", "/healthz", "isAlive", "Operation", "Alive?", "The process answers.", "State"),
    Operation(
        "GET",
        "/readyz",
        "isReady",
        "Operation",
        "Ready to score?",
        "Whether a transaction posted now would be scored.",
        "State",
        refusals=(503,),
    ),
    Operation(
        "GET",
        "/metrics",
        "getMetrics",
        "Operation",
        "Metrics",
        "Counters, gauges and histograms in the text format of Prometheus; nothing of users or transactions. 404 where the "
        "service does not measure.",
        content_type=CONTENT_TYPE,
        refusals=(404,),
    ),
    Operation(
        "GET",
        "/openapi.json",
        "getDescription",
        "Description",
        "This description as OpenAPI 3.1",
        "Made from the types that decode requests, for the model in force.",
        "Description",
        revalidated=True,
    ),
    Operation(
        "GET",
        "/docs",
        "getDocumentation",
        "Description",
        "This description as a page",
        "Without scripts, and without anything from elsewhere.",
        content_type=HTML,
        revalidated=True,
    ),
    Operation(
        "GET",
        STYLE_PATH,
        "getStyle",
        "Description",
        "The style of that page",
        "",
        content_type=CSS,
        revalidated=True,
    ),
)

ROLES: dict[tuple[str, str], Roles] = {
    ("POST", "/v1/score"): SCORE,
    ("POST", "/v1/score/batch"): SCORE,
    ("POST", "/v1/labels"): LABEL,
    ("GET", "/v1/transactions/{transaction_id}"): SCORE | LABEL,
    ("GET", "/v1/transactions/{transaction_id}/explanation"): LABEL,
    ("GET", "/v1/users/{user}"): LABEL,
    ("GET", "/v1/alerts"): LABEL,
    ("GET", "/v1/alerts/{transaction_id}"): LABEL,
    ("POST", "/v1/alerts/{transaction_id}"): LABEL,
    ("GET", "/v1/outbox"): ADMIN,
    ("POST", "/v1/outbox/dead/{seq}"): ADMIN,
    ("GET", "/v1/model"): SCORE,
    ("POST", "/v1/model"): ADMIN,
    ("GET", "/v1/rules"): ADMIN,
    ("POST", "/v1/rules/test"): ADMIN,
    ("GET", "/v1/rules/{name}"): ADMIN,
    ("PUT", "/v1/rules/{name}"): ADMIN,
    ("DELETE", "/v1/rules/{name}"): ADMIN,
    ("GET", "/v1/rules/{name}/history"): ADMIN,
    ("GET", "/v1/lists"): ADMIN,
    ("GET", "/v1/lists/{name}"): ADMIN,
    ("PUT", "/v1/lists/{name}"): ADMIN,
    ("DELETE", "/v1/lists/{name}"): ADMIN,
    ("POST", "/v1/lists/{name}/entries"): ADMIN,
    ("DELETE", "/v1/lists/{name}/entries"): ADMIN,
    ("GET", "/v1/lists/{name}/history"): ADMIN,
    ("GET", "/healthz"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("GET", "/metrics"): METRICS,
    ("GET", "/openapi.json"): OPEN,
    ("GET", "/docs"): OPEN,
    ("GET", STYLE_PATH): OPEN,
}
"""Which keys an operation takes, where the service has keys; the edge asks here too."""

_TEXT: Json = {"type": "string", "minLength": 1}
_PATH_PARAMETERS: dict[str, tuple[str, Json]] = {
    "transaction_id": ("A transaction's id as text. Percent-encoded UTF-8.", _TEXT),
    "user": ("A user's id as text. Percent-encoded UTF-8.", _TEXT),
    "name": ("The name of a rule or a list.", {"type": "string", "pattern": NAME}),
    "seq": ("Its number in the journal.", {"type": "integer", "minimum": 1, "maximum": 10**18 - 1}),
}
_OFFSET = {
    "name": "offset",
    "in": "query",
    "required": False,
    "description": "How many entries to pass over.",
    "example": 0,
    "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999, "default": 0},
}
_BODIES: dict[str, type[msgspec.Struct]] = {
    "changeAlert": ChangeAlert,
    "settleDeadLetter": Settling,
    "changeModel": ChangeModel,
    "putRule": RulePosted,
    "deleteRule": Why,
    "testRule": DraftPosted,
    "putList": ListPosted,
    "deleteList": Why,
    "addEntries": EntriesPosted,
    "removeEntries": ValuesPosted,
}

_RULE_ANSWERS = (Rules, RuleInForce, RuleTest, Lists, ListInForce, ListPage, EntryCounts, Gone, History)

_REFUSALS: dict[int, tuple[str, str, tuple[str, str, str]]] = {
    400: ("Unreadable", "Not JSON, cut off, or an address that cannot be read.", ("", "", "")),
    401: ("NoKey", "No API key, or one that is not in force.", ("unauthorized", "expected an API key in force", "")),
    403: ("WrongRole", "The key is not for this.", ("forbidden", "this key's role may not do this", "")),
    404: ("Unknown", "Nothing is known of it.", ("unknown_transaction", "no transaction 'T-9' was scored here", "")),
    409: (
        "Conflict",
        "The same id with other content, or a transaction that is too old to be explained; nothing changed.",
        ("conflict", "transaction 'T-1' was scored before with other content", ""),
    ),
    413: (
        "TooLarge",
        "A body or a batch beyond the limits.",
        ("payload_too_large", "the body is larger than {limit} bytes; send smaller batches", ""),
    ),
    415: (
        "WrongType",
        "A content type or an encoding that is not taken.",
        ("unsupported_media_type", "expected application/json", ""),
    ),
    422: ("WrongField", "JSON, but a field is missing or wrong; `field` names it.", ("", "", "")),
    429: ("TooOften", "More requests than the key may send.", ("too_many_requests", "ask again later", "")),
    503: (
        "NotNow",
        "Starting, stopping, overloaded, or unable to store. What was asked is not acknowledged.",
        ("storage_unavailable", "the transaction could not be stored; nothing changed", ""),
    ),
}
"""Status -> name of the component, description, and (code, message, field) of an example where it is not a real one."""

_AGAIN = {"Retry-After": {"description": "Seconds until it is worth asking again.", "schema": {"type": "string"}}}
_CHALLENGE = {"WWW-Authenticate": {"description": "Which scheme is expected.", "schema": {"type": "string"}}}
_ETAG = {
    "ETag": {"description": "For `If-None-Match`.", "schema": {"type": "string"}},
    "Cache-Control": {"schema": {"type": "string"}},
}


def describe(
    bundle: Bundle,
    decoder: TransactionDecoder,
    max_body_bytes: int,
    *,
    roles: Mapping[tuple[str, str], Roles] = ROLES,
    keys_required: bool = False,
) -> Json:
    """The OpenAPI document of the service over a bundle.

    Args:
        bundle: whose schema transactions have.
        decoder: of the bundle's transactions, with the limits in force.
        max_body_bytes: the limit of a body, for the words.
        roles: which keys an operation takes, by method and path.
        keys_required: whether the service has keys, and so refuses whoever brings none.
    """
    manifest = bundle.manifest
    examples = _Examples(bundle, decoder)
    with_keys = {operation: sorted(roles[operation]) for operation in roles if roles[operation]}
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        needs = with_keys.get((operation.method, operation.path), [])
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(
            operation, examples, manifest, decoder.limits, needs, keys_required
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "seqfraud",
            "summary": "Fraud scores of transactions, by their order.",
            "description": f"Every error has one shape, `Refusal`. A body has at most {max_body_bytes:,} bytes, a batch "
            f"at most {manifest.serve.max_batch:,} transactions. The model in force is `{bundle.id}`.",
            "version": seqfraud.__version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": words} for name, words in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(decoder, manifest),
            "responses": {
                name: _refusal(status, examples.refusal(status, max_body_bytes))
                for status, (name, _, _) in _REFUSALS.items()
            },
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key: `Authorization: Bearer KEY`.",
                },
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
            },
        },
    }


# ---- operations


def _operation(
    operation: Operation,
    examples: "_Examples",
    manifest: Manifest,
    limits: Limits,
    roles: Sequence[str],
    keys_required: bool,
) -> Json:
    about: Json = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        **({"description": operation.description} if operation.description else {}),
    }
    if "{" in operation.path:
        name = operation.path.partition("{")[2].partition("}")[0]
        about["parameters"] = [
            {
                "name": name,
                "in": "path",
                "required": True,
                "description": _PATH_PARAMETERS[name][0],
                "schema": _PATH_PARAMETERS[name][1],
                "example": examples.in_path(name, operation.path),
            }
        ]
    if operation.query is not None:
        about["parameters"] = _query_parameters(operation.query)
    if operation.id == "getList":
        about["parameters"].append(_OFFSET)
    if operation.id in examples.requests:
        about["requestBody"] = {
            "required": True,
            "content": {
                JSON: {
                    "schema": _request_schema(operation.id, manifest, limits),
                    "examples": examples.requests[operation.id],
                }
            },
        }
    about["responses"] = _responses(operation, examples, manifest, bool(roles))
    about["security"] = [{scheme: roles} for scheme in ("bearer", "header")] if roles else []
    if roles and not keys_required:
        about["security"].append({})
    return about


def _query_parameters(query: type[msgspec.Struct]) -> list[Json]:
    """What may stand behind the question mark, all of it optional; that it may be left out is not "or null" there."""
    _, schemas = msgspec.json.schema_components([query], ref_template=_REF)
    parameters = []
    for name, schema in schemas[query.__name__]["properties"].items():
        default, description = schema.pop("default", None), schema.pop("description", "")
        kind = next((k for k in schema.pop("anyOf", []) if k.get("type") != "null"), schema)
        kind = {**schema, **kind} if kind is not schema else schema
        description = description or kind.pop("description", "")
        if "enum" in kind:
            kind["enum"] = [value for value in kind["enum"] if value is not None]
        if default is not None:
            kind["default"] = default
        parameters.append({"name": name, "in": "query", "required": False, "description": description, "schema": kind})
    return parameters


def _request_schema(operation_id: str, manifest: Manifest, limits: Limits) -> Json:
    if operation_id == "score":
        return _ref("Transaction")
    if operation_id in _BODIES:
        return _ref(_BODIES[operation_id].__name__)
    if operation_id == "scoreBatch":
        return {"type": "array", "maxItems": manifest.serve.max_batch, "items": _ref("Transaction")}
    return {"type": "array", "maxItems": limits.settings.max_labels, "items": _ref("Label")}


def _responses(operation: Operation, examples: "_Examples", manifest: Manifest, with_keys: bool) -> Json:
    schema = {"type": "string"} if operation.answers is None else _ref(operation.answers)
    content: Json = {"schema": schema}
    if operation.id in examples.answers:
        content["example"] = examples.answers[operation.id]
    success: Json = {"description": "Done.", "content": {operation.content_type: content}}
    if operation.id == "score":
        success["links"] = _links(manifest.schema)
    responses: Json = {"200": success}
    if operation.revalidated:
        success["headers"] = _ETAG
        responses["304"] = {"description": "What `If-None-Match` names is still true.", "headers": _ETAG}
    statuses = {*operation.refusals, *((401, 403, 429) if with_keys else ())}
    responses |= {str(s): {"$ref": f"#/components/responses/{_REFUSALS[s][0]}"} for s in sorted(statuses)}
    return responses


def _links(schema: Schema) -> Json:
    user = schema.user.replace("~", "~0").replace("/", "~1")
    answered = "$response.body#/transaction_id"
    return {
        "answer": {"operationId": "getTransaction", "parameters": {"transaction_id": answered}},
        "user": {"operationId": "getUser", "parameters": {"user": f"$request.body#/{user}"}},
        "label": {"operationId": "addLabels", "requestBody": [{"transaction_id": answered, "is_fraud": True}]},
    }


def _refusal(status: int, example: Json) -> Json:
    headers = _AGAIN if status in (429, 503) else _CHALLENGE if status == 401 else None
    return {
        "description": _REFUSALS[status][1],
        **({"headers": headers} if headers else {}),
        "content": {JSON: {"schema": _ref("Refusal"), "example": example}},
    }


# ---- schemas


_REF = "#/components/schemas/{name}"


def _ref(name: str) -> Json:
    return {"$ref": _REF.format(name=name)}


def _schemas(decoder: TransactionDecoder, manifest: Manifest) -> Json:
    requests = [decoder.posted, Label, *_BODIES.values()]
    answers = [
        Answer, GivenAnswer, Explanation, LabelCounts, UserHistory, ModelInForce, State, Refusal, AlertPage, AlertDetail,
        OutboxState, *_RULE_ANSWERS,
    ]  # fmt: skip
    posted = {"Transaction", "Label", "EntryPosted", *(kind.__name__ for kind in _BODIES.values())}
    _, schemas = msgspec.json.schema_components([*requests, *answers], ref_template=_REF)
    for name, schema in schemas.items():
        if "description" in schema:
            schema["description"] = " ".join(schema["description"].split())
        if name not in posted:
            schema["required"] = list(schema["properties"])  # an answer always has all of them
    for name in ("Answer", "GivenAnswer"):
        for sometimes in ("degraded", "control"):  # there only where true
            schemas[name]["required"].remove(sometimes)
    _describe_transaction(schemas["Transaction"], manifest, decoder.limits)
    _describe_label(schemas["Label"]["properties"], decoder.limits)
    _describe_rules(schemas, manifest, decoder.limits)
    result = {"anyOf": [_ref("Answer"), _ref("Refusal")]}
    schemas["BatchAnswer"] = {
        "title": "BatchAnswer",
        "description": "One result per transaction, in order.",
        "type": "object",
        "properties": {"results": {"type": "array", "items": result}},
        "required": ["results"],
    }
    schemas["Description"] = {
        "title": "Description",
        "description": "An OpenAPI document.",
        "type": "object",
        "properties": {"openapi": {"type": "string"}},
        "required": ["openapi"],
    }
    return schemas


def _describe_transaction(transaction: Json, manifest: Manifest, limits: Limits) -> None:
    """Says of every field what it is for, and within which limits."""
    schema = manifest.schema
    transaction["description"] = "Fields that are not declared here are ignored, and never reach the model."
    known = {v.column: v.values for v in manifest.vocabularies}
    for column, field in transaction["properties"].items():
        words = _words_of(column, schema)
        if column in known:
            words.append(f"A category; {len(known[column])} values are known, others count as unseen.")
        if column == schema.time:
            words.append(_time_words(limits))
            _limit(field, limits, schema.time_unit)
        elif column in (schema.transaction, schema.user):
            _limit(field, limits, empty=False)
        elif column not in schema.numbers:
            _limit(field, limits)
        field["description"] = " ".join(words)


def _describe_label(fields: Json, limits: Limits) -> None:
    _limit(fields["transaction_id"], limits, empty=False)
    fields["transaction_id"]["description"] = "As in the answer."
    fields["is_fraud"]["description"] = "What it turned out to be."
    text, *numbers, _null = fields["known_at"]["anyOf"]
    _limit(text, limits, "iso")
    for number in numbers:
        _limit(number, limits, "ms")
    _join_numbers(fields["known_at"])
    fields["known_at"]["description"] = (
        f"ISO 8601, or milliseconds since 1970; null or left out: now. {_time_words(limits)}"
    )
    _limit(fields["source"], limits)
    fields["source"]["description"] = (
        "Where it is known from, such as `chargeback`; who says it is known by the API key."
    )


def _describe_rules(schemas: Json, manifest: Manifest, limits: Limits) -> None:
    """Says within which limits what is posted to rules and lists is taken."""
    posted = [schemas[kind.__name__]["properties"] for kind in dict.fromkeys(_BODIES.values())]
    control = "" if limits.settings.control_characters else NO_CONTROL_CHARACTERS[3:-3]
    why = f"^[^{control}]*[^{control} ][^{control}]*$" if control else "[^ ]"
    for fields in posted:
        if "why" in fields:
            fields["why"] |= limits.text_schema() | {"pattern": why}
    _limit(schemas["RulePosted"]["properties"]["words"], limits)
    schema = manifest.schema
    schemas["ListPosted"]["properties"]["field"]["enum"] = list(dict.fromkeys((schema.user, *schema.texts)))
    entry = schemas["EntryPosted"]["properties"]
    _limit(entry["value"], limits, empty=False)
    text, *numbers, _null = entry["expires"]["anyOf"]
    text |= {"format": "date-time"}
    for number in numbers:
        number |= {"minimum": EARLIEST_MS, "maximum": LATEST_MS - 1}
    schemas["EntriesPosted"]["properties"]["entries"] |= {"minItems": 1, "maxItems": MAX_ENTRIES}
    values = schemas["ValuesPosted"]["properties"]["values"]
    values |= {"minItems": 1, "maxItems": MAX_ENTRIES}
    _limit(values["items"], limits, empty=False)


def _limit(field: Json, limits: Limits, unit: TimeUnit | None = None, empty: bool = True) -> None:
    """Adds what the decoder checks after the types: of times in a unit, or of what is compared as text."""
    for kind in field.get("anyOf", [field]):
        if unit is not None:
            if kind["type"] != "string" or unit == "iso":
                kind |= limits.time_schema(unit)
        elif kind["type"] == "string":
            kind |= {**({} if empty else {"minLength": 1}), **limits.text_schema()}
    _join_numbers(field)


def _join_numbers(field: Json) -> None:
    """Drops "integer" beside "number", which says it too."""
    kinds = field.get("anyOf", [])
    if any(kind["type"] == "number" for kind in kinds):
        field["anyOf"] = [kind for kind in kinds if kind["type"] != "integer"]


def _time_words(limits: Limits) -> str:
    earliest, hours = format_instant(limits.settings.earliest), limits.settings.latest_ahead / HOUR_MS
    return f"Not before {earliest}, nor more than {hours:g} hours ahead of the clock here."


def _words_of(column: str, schema: Schema) -> list[str]:
    latitudes, longitudes = ([pair[i] for pair in schema.geo] for i in (0, 1))
    roles: dict[str, Collection[str | None]] = {
        "Identifies the transaction; as text no longer than a text may be.": [schema.transaction],
        "Identifies the user; as text no longer than a text may be.": [schema.user],
        "The amount, in the currency of the training data.": [schema.amount],
        "A number.": [c for c in schema.numeric if c != schema.amount],
        "Latitude of a place, in degrees.": latitudes,
        "Longitude of a place, in degrees.": longitudes,
        "Identifies an entity whose recent activity and known fraud count.": schema.context,
        "An IP address; the recent activity and known fraud of its network count.": schema.ip,
    }
    words = [words for words, columns in roles.items() if column in columns]
    if column == schema.time:
        unit = {"s": "Seconds since 1970.", "ms": "Milliseconds since 1970."}
        words.append(unit.get(schema.time_unit, "ISO 8601; UTC where it names no zone."))
    return words


# ---- examples


def example_transactions(manifest: Manifest, decoder: TransactionDecoder) -> dict[str, Json]:
    """Transactions that the decoder takes: with every field, and with those only that it has to have."""
    schema = manifest.schema
    required = {f.encode_name for f in msgspec.structs.fields(decoder.posted) if f.required}
    full = {column: _example_value(column, manifest, decoder.limits) for column in schema.fields}
    least = {column: value for column, value in full.items() if column in required}
    if schema.transaction is not None:
        least[schema.transaction] = next(text for text in ("T-2", "2") if _is_taken(text, decoder.limits))
    return {"full": full, "least": least}


def _example_value(column: str, manifest: Manifest, limits: Limits) -> Any:
    schema = manifest.schema
    if column == schema.time:
        last = parse_instant(manifest.fingerprint.get("last", "2025-04-08T10:00:00Z"))
        return spell_time(limits.nearest_time(last), schema.time_unit)
    if column in schema.numbers:
        return _median(column, manifest)
    known = next((v.values for v in manifest.vocabularies if v.column == column), ())
    made = {schema.transaction: "T-1", schema.user: "U-42"}.get(column, f"{column}-7")
    made = "192.0.2.77" if column in schema.ip else made
    return next(text for text in (*known, made, made[-1]) if _is_taken(text, limits))


def _is_taken(text: str, limits: Limits) -> bool:
    try:
        limits.check_text(text, "")
    except RequestError:
        return False
    return bool(text)


def _median(column: str, manifest: Manifest) -> float:
    """The median of the training rows, where the manifest has it."""
    deciles = manifest.fingerprint.get("numeric_deciles", {}).get(column)
    if not deciles or deciles[5] is None:
        return 12.5
    median = float(f"{deciles[5]:.6g}")
    return abs(median) if column == manifest.schema.amount else median


class _Examples:
    """What the operations are shown with.

    Attributes:
        requests: operation id -> name -> an OpenAPI example.
        answers: operation id -> a value.
    """

    def __init__(self, bundle: Bundle, decoder: TransactionDecoder) -> None:
        manifest = bundle.manifest
        transactions = example_transactions(manifest, decoder)
        full = transactions["full"]
        self._posted = {name: decoder.decode(msgspec.json.encode(row)) for name, row in transactions.items()}
        transaction = self._posted["full"]
        answer = msgspec.to_builtins(_example_answer(transaction, bundle, decoder))
        refused = {k: v for k, v in full.items() if k != manifest.schema.user}
        self._unreadable = _error_of(lambda: decoder.decode(b"{" + msgspec.json.encode(manifest.schema.user)))
        self._wrong_field = _error_of(lambda: decoder.decode(msgspec.json.encode(refused)))
        known_at = spell_time(decoder.limits.nearest_time(transaction.time + DAY_MS), "iso")
        label = {"transaction_id": transaction.id, "is_fraud": True, "known_at": known_at}
        decode_labels(msgspec.json.encode([label]), decoder.limits)
        self._user = transaction.user
        self._transaction = transaction.id
        self.requests: dict[str, Json] = {
            "score": {
                "full": {"summary": "Every field", "value": full},
                "least": {"summary": "What has to be there", "value": transactions["least"]},
            },
            "scoreBatch": {
                "mixed": {"summary": "Two, and one that is refused", "value": [*transactions.values(), refused]}
            },
            "addLabels": {
                "fraud": {"summary": "Known the day after", "value": [label]},
                "now": {"summary": "Known now", "value": [{"transaction_id": transaction.id, "is_fraud": False}]},
            },
            "changeAlert": {
                "take": {"summary": "Take it up", "value": {"state": "in_review"}},
                "confirm": {
                    "summary": "It was fraud",
                    "value": {"state": "confirmed", "note": "the card was stolen", "expected": "in_review"},
                },
            },
            "settleDeadLetter": {"retry": {"summary": "Once more", "value": {"action": "retry"}}},
            "changeModel": {
                "promote": {
                    "summary": "The challenger comes into force",
                    "value": {"action": "promote", "model": "challenger", "reason": "the gate is passed"},
                },
                "rollback": {
                    "summary": "Back to the one before",
                    "value": {"action": "rollback", "reason": "too many alerts since this morning"},
                },
            },
        }
        self.requests |= _rule_requests(manifest.schema)
        second = msgspec.to_builtins(_example_answer(self._posted["least"], bundle, decoder)) | {"history": 1}
        self.answers: dict[str, Any] = {
            "score": answer,
            "scoreBatch": {"results": [answer, second, self._wrong_field]},
            "addLabels": msgspec.to_builtins(LabelCounts(new=1, changed=0, unchanged=0, unknown=0)),
            **_rule_answers(manifest.schema),
            "getTransaction": {**answer, "labels": [msgspec.to_builtins(_EXAMPLE_LABEL)]},
            "getUser": {"user": transaction.user, "history": 1, "events": [{"transaction": full, "answer": answer}]},
            "explainTransaction": msgspec.to_builtins(_example_explanation(transaction, bundle, decoder)),
            "isAlive": {"status": "ok"},
            "isReady": {"status": "ready"},
        }

    def in_path(self, parameter: str, path: str) -> str | int:
        """An identifier of the examples."""
        if parameter == "seq":
            return 1
        if parameter == "name":
            return "stolen" if path.startswith("/v1/lists") else "likely"
        return self._user if parameter == "user" else self._transaction

    def refusal(self, status: int, max_body_bytes: int) -> Json:
        """An error of a status: a real one where the decoder makes it."""
        if status in (400, 422):
            return self._unreadable if status == 400 else self._wrong_field
        code, message, field = _REFUSALS[status][2]
        return {"error": {"code": code, "message": message.format(limit=max_body_bytes), "field": field}}


def _rule_requests(schema: Schema) -> dict[str, Json]:
    """Examples of what is posted to rules and lists."""
    rule = {"expression": "probability > 0.5 && count_1h > 3", "decision": "review"}
    why = "Many small payments in a row were fraud last week."
    value = "192.0.2.0/24" if schema.user in schema.ip else "U-42"
    bodies: dict[str, Json] = {
        "putRule": {**rule, "enabled": True, "words": "many payments within an hour", "why": why},
        "deleteRule": {"why": "Replaced."},
        "testRule": {**rule, "last": 1000},
        "putList": {"kind": "block", "field": schema.user, "why": "Cards that were reported as stolen."},
        "deleteList": {"why": "Replaced."},
        "addEntries": {"entries": [{"value": value, "expires": "2030-01-01T00:00:00Z"}], "why": "Reported as stolen."},
        "removeEntries": {"values": [value], "why": "A mistake."},
    }
    return {name: {"example": {"summary": "An example", "value": body}} for name, body in bodies.items()}


def _rule_answers(schema: Schema) -> dict[str, Json]:
    """Examples of what rules and lists answer."""
    said: Json = {"at": 1_735_689_600_000, "author": "0f1e2d3c4b5a", "why": "Reported as stolen."}
    about = {"name": "stolen", "kind": "block", "field": schema.user, "entries": 1, **said}
    rule = {
        "name": "likely", "expression": "probability > 0.5 && count_1h > 3", "decision": "review", "enabled": True,
        "priority": 100, "words": "many payments within an hour", **said, "matched": 12, "failed": 0, "broken": "",
    }  # fmt: skip
    counts = {"new": 1, "changed": 0, "removed": 0, "unknown": 0, "entries": 1}
    return {
        "getRule": rule,
        "putRule": rule,
        "getRules": {"rules": [rule]},
        "putList": about,
        "getLists": {"lists": [about]},
        "getList": {"about": about, "entries": [{"value": "U-42", "expires": None, **said}], "next": None},
        "addEntries": counts,
        "removeEntries": {**counts, "new": 0, "removed": 1, "entries": 0},
        "deleteRule": {"name": "likely"},
        "deleteList": {"name": "stolen"},
    }


_EXAMPLE_LABEL = GivenLabel(True, 1_735_776_000_000, 1_735_776_000_250, "chargeback", "k7c2m4qa")


def _example_answer(transaction: Transaction, bundle: Bundle, decoder: TransactionDecoder) -> Answer:
    policy = bundle.manifest.policy
    probability = 0.0125
    decision = policy.decide(probability, decoder.amount_of(transaction))
    return Answer(
        transaction_id=transaction.id,
        fraud_probability=probability,
        is_fraud=probability >= policy.thresholds.is_fraud,
        decision=decision,
        reasons=[] if decision == "approve" else [_EXAMPLE_REASON],
        model=bundle.id,
        history=0,
        late=False,
        duplicate=False,
    )


_EXAMPLE_REASON = Reason("rapid_succession", "4 transactions within 11 minutes; this user's usual gap is 9 hours", 1.25)


def _example_explanation(transaction: Transaction, bundle: Bundle, decoder: TransactionDecoder) -> Explanation:
    return Explanation(
        transaction_id=transaction.id,
        model=bundle.id,
        fraud_probability=0.0125,
        answer=_example_answer(transaction, bundle, decoder),
        log_odds=-4.3694,
        base=-6.25,
        inputs=[Attribution(f"{bundle.manifest.schema.time}.gap", "3 minutes", "9 hours", 1.8806)],
        without_history=-5.5,
        events=[PastEvent("T-0", "2025-04-08T09:57:00Z", 1.125)],
    )


def _error_of(refused: Callable[[], object]) -> Json:
    """The body of what is raised. Raises ValueError where nothing is."""
    try:
        refused()
    except RequestError as error:
        return {"error": {"code": error.code, "message": error.message, "field": error.field}}
    raise ValueError("an example of a refusal was not refused")
