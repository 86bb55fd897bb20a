"""What a manifest may say: read as strictly as it is written, and bounded in everything that costs memory later.

A bundle comes from elsewhere. Its manifest decides how much is kept per user and per entity, so each number has a limit, and
so has what they come to together.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from seqfraud.config import CONTEXT_INPUTS
from seqfraud.context import FOREVER, ContextSpec
from seqfraud.errors import BundleError
from seqfraud.graph import NEXT, GraphSpec, StateSpec
from seqfraud.schema import Schema
from seqfraud.vocabulary import Vocabulary

MANIFEST_BYTES = 16 * 1024**2
MAX_DEPTH = 16
MAX_COLUMNS = 512
"""Of each role."""
MAX_NAME = 200
MAX_VALUES = 1_000_000
"""In all vocabularies together."""
MAX_VALUE = 1024
"""Characters of one."""
MAX_HALF_LIVES = 32
MAX_DURATION_MS = 100 * 366 * 86_400_000
MAX_STATES = 8
MAX_AXIS = 65_536
MAX_WINDOW = 65_536
MAX_BATCH = 100_000
USER_BYTES = 512 * 1024
"""That a user may take in memory: states, ring of events, anchor."""
RECENT = 4
"""Newest events of a user before which a service keeps the states, so that a history without the last few is not run again."""
ENTITY_BYTES = 4096

_STATE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_ITEMSIZE = {"float32": 4, "int64": 8}


def parse_manifest(content: bytes) -> dict[str, Any]:
    """The JSON object of a manifest: no key twice, no NaN or infinity, not deep, text that is Unicode.

    Raises BundleError.
    """
    try:
        raw = json.loads(
            content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise BundleError(f"the manifest is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise BundleError(f"the manifest is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BundleError("the manifest is not a JSON object")
    level: list[Any] = [raw]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                _require_unicode(item)
        if not below:
            return raw
        level = below
    raise BundleError(f"the manifest is nested deeper than {MAX_DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BundleError(f"the manifest has the key {twice!r:.80} twice in one object")
    return out


def _no_constant(word: str) -> float:
    raise BundleError(f"the manifest holds {word}, which is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BundleError(f"the manifest holds {text:.80}, which is no finite number")
    return value


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BundleError(f"the manifest holds {text!r:.80}, which is half of a character") from None


def require_same(raw: Any, read: Any, where: str = "manifest") -> None:
    """Everything that is in `raw` was read as it stands: no unknown key, no number that became another.

    What `raw` leaves out has a default. Raises BundleError.
    """
    if isinstance(raw, Mapping) and isinstance(read, Mapping):
        for key, value in raw.items():
            if key not in read:
                raise BundleError(f"{where}: the key {key!r:.80} is unknown to this version")
            require_same(value, read[key], f"{where}.{key:.80}")
    elif isinstance(raw, list) and isinstance(read, Sequence) and not isinstance(read, str) and len(raw) == len(read):
        for i, (item, other) in enumerate(zip(raw, read, strict=True)):
            require_same(item, other, f"{where}[{i}]")
    elif isinstance(raw, bool) is not isinstance(read, bool) or raw != read:
        raise BundleError(f"{where}: seen {raw!r:.200}; expected {read!r:.200}")


def check_manifest(
    schema: Schema,
    context: ContextSpec,
    vocabularies: Sequence[Vocabulary],
    graph: GraphSpec,
    missing: Sequence[str],
    window: int,
    max_batch: int,
) -> None:
    """The parts of a manifest fit each other, and what they ask for is bounded. Raises BundleError."""
    _check_columns(schema)
    _check_context(context)
    for what, seen, expected in (
        ("vocabularies of", [v.column for v in vocabularies], list(schema.categorical)),
        ("context.columns:", list(context.columns), list(schema.entities)),
        ("context.user:", context.user, schema.user_entity),
        ("graph.numeric:", graph.numeric, len(schema.numeric_inputs)),
        ("graph.categorical:", graph.categorical, len(schema.categorical)),
        ("graph.context:", graph.context, context.width),
    ):
        if seen != expected:
            raise BundleError(f"manifest: {what} {seen!r:.200}; the schema says {expected!r:.200}")
    for column in missing:
        if column not in schema.numeric_inputs:
            raise BundleError(f"manifest: missing: {column!r:.80} is no numeric input")
    _check_vocabularies(vocabularies)
    if len(graph.states) > MAX_STATES:
        raise BundleError(f"manifest: {len(graph.states)} states; at most {MAX_STATES}")
    names = {tensor.name for tensor in (*graph.sequence_inputs(), *graph.step_inputs(), *graph.sequence_outputs())}
    for state in graph.states:
        _check_state(state, schema)
        for name in (state.name, state.name + NEXT):
            if name in names:
                raise BundleError(f"manifest: state {state.name!r}: the name {name!r} is taken")
            names.add(name)
    _require_within("serve.window", window, 1, MAX_WINDOW)
    _require_within("serve.max_batch", max_batch, 1, MAX_BATCH)
    need = user_bytes(graph, window)
    if need > USER_BYTES:
        raise BundleError(
            f"manifest: {need:,} bytes of memory per user (states, serve.window {window}); at most {USER_BYTES:,}"
        )


def user_bytes(graph: GraphSpec, window: int) -> int:
    """What a service keeps per user: each state 3 + RECENT times, the ring of 2 W + 1 events, some counters."""
    states = sum(math.prod(s.row_shape) * _ITEMSIZE[s.dtype] for s in graph.states)
    event = 8 * (1 + graph.categorical) + 4 * (graph.numeric + graph.context)
    return (3 + RECENT) * states + (2 * window + 1) * event + 40 + 8 * RECENT


def entity_bytes(context: ContextSpec) -> int:
    """What a service keeps per entity: the newest time, four sums per half-life, the run, and where its effects begin."""
    return 8 + 4 * (len(context.half_lives) + 1) * 8 + 5 * 8 + 8


def _check_columns(schema: Schema) -> None:
    for role in (schema.numeric_inputs, schema.categorical, schema.entities):
        if len(role) > MAX_COLUMNS:
            raise BundleError(f"manifest: schema: {len(role)} columns of one role; at most {MAX_COLUMNS}")
        if len(set(role)) != len(role):
            raise BundleError(f"manifest: schema: a column is listed twice in {role!r:.200}")
    for column in schema.fields:
        if not 0 < len(column) <= MAX_NAME:
            raise BundleError(
                f"manifest: schema: a column's name has {len(column)} characters; expected 1 to {MAX_NAME}"
            )
    both = {*schema.texts} & {*schema.numbers}
    reserved = {schema.time, schema.transaction} & {*schema.texts, *schema.numbers}
    if both or reserved:
        raise BundleError(
            f"manifest: schema: {min(c for c in both | reserved if c)!r:.80} has two roles that exclude each other"
        )
    own = [c for c in (schema.user, schema.time, schema.transaction) if c is not None]
    if len(set(own)) != len(own):
        raise BundleError(f"manifest: schema: user, time and transaction are {own!r:.200}; expected different columns")


def _check_vocabularies(vocabularies: Sequence[Vocabulary]) -> None:
    total = sum(len(v.values) for v in vocabularies)
    if total > MAX_VALUES:
        raise BundleError(f"manifest: {total:,} values in the vocabularies; at most {MAX_VALUES:,}")
    for v in vocabularies:
        for value in v.values:
            if not isinstance(value, str) or len(value) > MAX_VALUE:
                raise BundleError(
                    f"manifest: vocabulary of {v.column!r:.80}: {value!r:.80} is no text of at most {MAX_VALUE} characters"
                )
        if len(set(v.values)) != len(v.values):
            raise BundleError(f"manifest: vocabulary of {v.column!r:.80}: a value is listed twice")


def _check_context(context: ContextSpec) -> None:
    _require_within("the number of context.half_lives", len(context.half_lives), 1, MAX_HALF_LIVES)
    for half_life in context.half_lives:
        _require_within("context.half_lives", half_life, 1, MAX_DURATION_MS)
    _require_within("context.habit_half_life", context.habit_half_life, 1, MAX_DURATION_MS)
    _require_within("context.label_delay", context.label_delay, 0, MAX_DURATION_MS)
    _require_within("context.run_memory", context.run_memory, 1, FOREVER)
    for name, inputs in (("inputs", context.inputs), ("user_inputs", context.user_inputs)):
        if not inputs or inputs != tuple(kind for kind in CONTEXT_INPUTS if kind in inputs):
            raise BundleError(
                f"manifest: context.{name}: seen {list(inputs)!r:.200}; expected some of "
                f"{', '.join(CONTEXT_INPUTS)}, each once and in this order"
            )
    need = entity_bytes(context)
    if need > ENTITY_BYTES:
        raise BundleError(
            f"manifest: {need:,} bytes of memory per entity (context.half_lives); at most {ENTITY_BYTES:,}"
        )


def _check_state(state: StateSpec, schema: Schema) -> None:
    where = f"manifest: state {state.name!r:.80}"
    if not isinstance(state.name, str) or not _STATE_NAME.fullmatch(state.name):
        raise BundleError(f"{where}: expected a name of letters, digits and _")
    if state.dtype not in _ITEMSIZE:
        raise BundleError(f"{where}: dtype {state.dtype!r:.80}; expected one of {', '.join(_ITEMSIZE)}")
    sizes = [axis for axis in state.axes if axis != "B"]
    if len(sizes) != len(state.axes) - 1 or len(sizes) > 3:
        raise BundleError(f"{where}: axes {list(state.axes)!r:.80}; expected 'B' once, and at most three sizes")
    for size in sizes:
        _require_within(f"state {state.name}: an axis", size, 1, MAX_AXIS)
    if isinstance(state.initial, bool) or not isinstance(state.initial, int if state.dtype == "int64" else int | float):
        raise BundleError(f"{where}: initial {state.initial!r:.80}; expected a number of its dtype")
    if abs(state.initial) > (2**62 if state.dtype == "int64" else 1e30):
        raise BundleError(f"{where}: initial {state.initial!r:.80} is too large")
    if state.key == "user":
        return
    if state.key in schema.entities:
        raise BundleError(f"{where}: key {state.key!r:.80}; this version keeps states per user only")
    raise BundleError(f"{where}: key {state.key!r:.80}; expected 'user' or a context column")


def _require_within(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BundleError(f"manifest: {name}: seen {value!r:.80}; expected a whole number from {least:,} to {most:,}")
