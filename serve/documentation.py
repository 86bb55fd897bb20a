"""The OpenAPI document as a page for people: one piece of HTML, no script, everything in it escaped."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from serve.decoding import NO_CONTROL_CHARACTERS, NUMBER_AS_TEXT

__all__ = ["render"]

Json = dict[str, Any]

_COMPONENT = "#/components/schemas/"
_RESPONSE = "#/components/responses/"
_CODE = re.compile(r"`([^`]*)`")
_PATTERNS = {NO_CONTROL_CHARACTERS: "no control characters", NUMBER_AS_TEXT: "a number"}


def render(document: Json, style: str) -> str:
    """A whole page; `style` is the address of its style sheet."""
    info = document["info"]
    operations = list(_operations(document))
    sections = [
        _section(tag, [op for op in operations if tag["name"] in op[2]["tags"]], document) for tag in document["tags"]
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(info["title"])} API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{escape(style)}">
</head>
<body>
<nav aria-label="Contents">
<a class="brand" href="#top">{escape(info["title"])} <small>{escape(info["version"])}</small></a>
<ul>
{_contents(document["tags"], operations)}
<li class="group"><a href="#errors">Errors</a></li>
<li class="group"><a href="#types">Types</a></li>
</ul>
</nav>
<main id="top">
<header>
<h1>{escape(info["title"])} API</h1>
<p class="lead">{_words(info["summary"])}</p>
<p>{_words(info["description"])}</p>
<p>The same as <a href="/openapi.json">OpenAPI {escape(document["openapi"])}</a>, for programs. The examples are made for this
model; before trying one:</p>
<pre><code>SEQFRAUD=http://127.0.0.1:8000</code></pre>
</header>
{"".join(sections)}
{_errors(document)}
{_types(document["components"]["schemas"])}
</main>
</body>
</html>
"""


def _operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def _contents(tags: list[Json], operations: list[tuple[str, str, Json]]) -> str:
    lines = []
    for tag in tags:
        lines.append(f'<li class="group">{escape(tag["name"])}</li>')
        lines += [
            f'<li><a href="#{operation["operationId"]}">{_badge(method)} {escape(operation["summary"])}</a></li>'
            for method, _, operation in operations
            if tag["name"] in operation["tags"]
        ]
    return "\n".join(lines)


def _section(tag: Json, operations: list[tuple[str, str, Json]], document: Json) -> str:
    return f"""<section>
<h2>{escape(tag["name"])}</h2>
<p class="lead">{_words(tag["description"])}</p>
{"".join(_operation(*operation, document) for operation in operations)}
</section>
"""


def _operation(method: str, path: str, operation: Json, document: Json) -> str:
    parts = [
        f'<article id="{operation["operationId"]}">',
        f"<h3>{escape(operation['summary'])}</h3>",
        f'<p class="address">{_badge(method)} <code>{_path(path)}</code></p>',
    ]
    if "description" in operation:
        parts.append(f"<p>{_words(operation['description'])}</p>")
    parts.append(_keys(operation["security"]))
    body = operation.get("requestBody")
    if body is not None:
        content = body["content"]["application/json"]
        parts += ["<h4>Body</h4>", _described(content["schema"], document)]
    for place, title in (("path", "In the path"), ("query", "Behind the question mark")):
        parameters = [p for p in operation.get("parameters", []) if p["in"] == place]
        if parameters:
            parts.append(f"<h4>{title}</h4>")
            parts.append(_fields({p["name"]: {**p["schema"], "description": p["description"]} for p in parameters}))
    parts += _examples(method, path, operation)
    parts.append("<h4>Answers</h4>")
    parts.append(_answers(operation["responses"], document["components"]["responses"]))
    parts.append("</article>\n")
    return "\n".join(parts)


def _keys(security: list[dict[str, list[str]]]) -> str:
    roles = sorted({role for scheme in security for roles in scheme.values() for role in roles})
    if not roles:
        return '<p class="keys">Takes no API key.</p>'
    words = ", ".join(f"<code>{escape(role)}</code>" for role in roles)
    optional = " where the service has keys" if {} in security else ""
    return f'<p class="keys">API key with the role {words}{optional}: <code>Authorization: Bearer KEY</code> or <code>X-API-Key: KEY</code>.</p>'


def _examples(method: str, path: str, operation: Json) -> list[str]:
    """A curl line per example of the body, or one."""
    filled = path
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            filled = filled.replace(f"{{{parameter['name']}}}", str(parameter["example"]))
    if "requestBody" not in operation:
        return ["<h4>Example</h4>", _pre(f'curl -s "$SEQFRAUD{filled}"')]
    verb = "" if method.upper() == "POST" else f" -X {method.upper()}"
    parts = ["<h4>Examples</h4>"]
    content = operation["requestBody"]["content"]["application/json"]
    for i, example in enumerate(content["examples"].values()):
        posted = shlex.quote(_pretty(example["value"]))
        shown = _pre(f"curl -s{verb} \"$SEQFRAUD{filled}\" -H 'Content-Type: application/json' -d {posted}")
        opened = " open" if i == 0 else ""
        parts.append(f"<details{opened}><summary>{_words(example['summary'])}</summary>{shown}</details>")
    return parts


def _answers(responses: Json, components: Json) -> str:
    rows, shown = [], ""
    for status, response in responses.items():
        if "$ref" in response:
            name = response["$ref"].removeprefix(_RESPONSE)
            words = f'<a href="#{name}">{_words(components[name]["description"])}</a>'
        else:
            content = response.get("content", {})
            kinds = [f"{_type(media['schema'])} <small>{escape(kind)}</small>" for kind, media in content.items()]
            words = ", ".join(kinds) or _words(response["description"])
            shown += "".join(
                f"<details><summary>An answer</summary>{_pre(_pretty(media['example']))}</details>"
                for media in content.values()
                if "example" in media
            )
        rows.append(f"<tr><td>{_status(status)}</td><td>{words}</td></tr>")
    return f'<table class="answers"><tbody>{"".join(rows)}</tbody></table>\n{shown}'


def _errors(document: Json) -> str:
    """Every refusal once, with its status and an example."""
    statuses = {
        response["$ref"].removeprefix(_RESPONSE): status
        for _, _, operation in _operations(document)
        for status, response in operation["responses"].items()
        if "$ref" in response
    }
    items = "\n".join(
        f'<article id="{name}"><h3>{_status(statuses[name])} {_words(response["description"])}</h3>'
        f"{_pre(_pretty(response['content']['application/json']['example']))}</article>"
        for name, response in document["components"]["responses"].items()
    )
    return f"""<section id="errors">
<h2>Errors</h2>
<p class="lead">One shape for all of them. <code>code</code> is for programs and stays, <code>message</code> is for people, <code>field</code>
names what is wrong. A request that is refused has changed nothing.</p>
{items}
</section>
"""


def _types(schemas: Json) -> str:
    items = "\n".join(
        f'<article id="type-{escape(name)}"><h3>{escape(name)}</h3>{_object(schema)}</article>'
        for name, schema in schemas.items()
    )
    return f'<section id="types">\n<h2>Types</h2>\n{items}\n</section>'


def _described(schema: Json, document: Json) -> str:
    """What a body holds: the fields of an object here, since nobody should have to look for them."""
    target = schema.get("items", schema)
    words = f"<p>{_type(schema)}{_limits_of(schema)}</p>"
    if schema.get("type") == "array" and "Label" not in target.get("$ref", ""):
        return words
    return words + _object(document["components"]["schemas"][target["$ref"].removeprefix(_COMPONENT)])


def _object(schema: Json) -> str:
    words = f"<p>{_words(schema['description'])}</p>" if "description" in schema else ""
    return words + _fields(schema["properties"], schema.get("required", []))


def _fields(properties: Json, required: Iterable[str] | None = None) -> str:
    rows = []
    for name, schema in properties.items():
        optional = required is not None and name not in required
        note = ' <small class="optional">optional</small>' if optional else ""
        about = _words(schema.get("description", ""))
        rows.append(
            f"<tr><th scope='row'><code>{escape(name)}</code>{note}</th>"
            f"<td>{_type(schema)}{_limits_of(schema)}{f'<p>{about}</p>' if about else ''}</td></tr>"
        )
    return f'<table class="fields"><tbody>{"".join(rows)}</tbody></table>'


def _type(schema: Json) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(_COMPONENT))
        return f'<a href="#type-{name}">{name}</a>'
    if "anyOf" in schema:
        kinds = list(dict.fromkeys(_type(s) + _limits_of(s) for s in schema["anyOf"]))
        return " or ".join(kinds)
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"[{', '.join(map(_type, schema['prefixItems']))}]"
    kind = schema.get("type")
    if kind == "array":
        return f"array of {_type(schema['items'])}"
    return escape(kind) if isinstance(kind, str) else "anything"


def _limits_of(schema: Json) -> str:
    said = []
    for unit, low, high in (
        (" characters", "minLength", "maxLength"),
        (" items", "minItems", "maxItems"),
        ("", "minimum", "maximum"),
        ("", "minimum", "exclusiveMaximum"),
    ):
        if high in schema:
            below = " to below " if high == "exclusiveMaximum" else " to "
            start = f"{_number(schema[low])}{below}" if low in schema else "at most "
            said.append(f"{start}{_number(schema[high])}{unit}")
    if "minimum" in schema and not {"maximum", "exclusiveMaximum"} & set(schema):
        said.append(f"{_number(schema['minimum'])} or more")
    if schema.get("minLength") == 1 and "maxLength" not in schema:
        said.append("not empty")
    said += [str(schema["format"])] if "format" in schema else []
    said += [_PATTERNS.get(schema["pattern"], f"matches {schema['pattern']}")] if "pattern" in schema else []
    said += [f"default {json.dumps(schema['default'])}"] if schema.get("default") is not None else []
    return f' <small class="limits">{escape(", ".join(said))}</small>' if said else ""


def _number(value: float) -> str:
    """A limit as a person reads it."""
    return f"{value:g}" if isinstance(value, float) and abs(value) >= 1e6 else f"{value:,}"


def _status(status: str) -> str:
    return f'<span class="status s{status[0]}">{status}</span>'


def _badge(method: str) -> str:
    return f'<span class="method {method.lower()}">{method}</span>'


def _path(path: str) -> str:
    return re.sub(r"(\{[^}]*\})", r"<var>\1</var>", escape(path))


def _words(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", escape(text))


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _pre(text: str) -> str:
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
