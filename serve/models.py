"""Models beside the one in force, and how another comes into force: `POST /v1/model`.

Models come from the service's registry, whose events are the truth about which one is the champion: an event is written
before the service acts on it, so that a start after a crash serves what the registry says, whatever the service was at. What
was done, with what came of it, is an action in the journal too.

A model that comes into force is loaded, verified and brought into step beside the one that answers, on the thread of the
request, and changes places with it between two transactions. One that was in shadow and in step has its memory already.
"""

import gc
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import msgspec

from seqfraud.bundle import Bundle
from seqfraud.errors import (
    BundleError,
    JournalError,
    ModelError,
    ParityError,
    RegistryError,
    RequestError,
    RunError,
    SeqfraudError,
)
from seqfraud.modelevents import REASON_CHARACTERS, Standing
from seqfraud.registry import Registry
from seqfraud.verification import verify_opened
from serve.answers import ModelInShadow
from serve.catchup import CLOSE, CatchUp
from serve.challenger import Challenger
from serve.decoding import decode_object
from serve.engine import Engine
from serve.metrics import Registry as Metrics
from serve.records import ActionRecord

__all__ = ["MODEL", "ChangeModel", "Models"]

_log = logging.getLogger(__name__)

MODEL = "model"
"""Kind of the journal's actions."""

Action = Literal["promote", "rollback", "shadow", "withdraw"]


class ChangeModel(msgspec.Struct):
    """What is to become of which model, and why. A rollback needs no model: it goes to the champion before."""

    action: Action
    reason: str
    model: str = ""


class ModelChanged(msgspec.Struct):
    """What the journal holds of a change."""

    action: Action
    model: str
    before: str
    """The model in force until then."""
    reason: str


_DECODER = msgspec.json.Decoder(ChangeModel)
_WORDS = {
    "action": "promote, rollback, shadow or withdraw",
    "model": "an id of the registry or the beginning of one, champion, previous or challenger",
    "reason": "a text that says why",
}


class House(Protocol):
    """The service, as far as models are concerned."""

    engine: Engine
    check_deadline: Callable[[], None]
    before_waiting: Callable[[], None]

    @property
    def closing(self) -> bool:
        """No change can be made any more."""

    def new_engine(self, bundle: Bundle) -> Engine:
        """An engine beside the one in force. Raises RequestError 409 where it does not belong to this journal."""

    def bind_rules(self, engine: Engine) -> None:
        """Give it the rules. Raises RequestError 409 where one that works does not fit."""

    def catch_up(self, engine: Engine) -> CatchUp:
        """Begin to bring an engine into step with the journal."""

    def put_in_force(self, ready: CatchUp, author: str, body: bytes) -> Engine:
        """Change places; the engine that was in force until then."""

    def store_action(self, kind: str, author: str, body: bytes) -> ActionRecord:
        """Store what somebody did. Raises RequestError 503."""

    def challenge(self, engine: Engine) -> Challenger:
        """Let an engine score in shadow."""

    def rest(self, seconds: float) -> None:
        """Give up the processor."""


class Models:
    """See the module. One change at a time; what it shows is for any thread."""

    def __init__(self, house: House, registry: Registry | None, most: int) -> None:
        """Nothing is started. Without a registry there is nothing but the model in force.

        Args:
            most: challengers at a time.
        """
        self._house = house
        self._registry = registry
        self._most = most
        self._one = threading.Lock()
        self._encode = msgspec.json.Encoder().encode
        self.changing = ""
        """What goes on, in words."""
        self.swaps = 0
        """Models that came into force since the start."""
        self.swap_seconds = 0.0
        """How long the last one took to."""
        self.challengers: dict[str, Challenger] = {}
        """By model; replaced as a whole, for readers."""

    # ---- start and stop

    def start(self) -> None:
        """Let the registry's challengers score, the newest first where there are too many; one that cannot is logged."""
        if self._registry is None:
            return
        for model in self._registry.challengers[-self._most :]:
            self._try_begin(self._registry, model)

    def stop(self, snapshots: bool) -> None:
        """End the challengers."""
        for challenger in self.challengers.values():
            challenger.stop(snapshots)
        self.challengers = {}

    def shown(self) -> list[ModelInShadow]:
        """How the challengers stand."""
        return [challenger.shown() for challenger in self.challengers.values()]

    def declare(self, metrics: Metrics) -> None:
        """What is read of models at a scrape."""
        metrics.counter(
            "seqfraud_model_swaps_total", "Models that came into force while it ran.", read=lambda: self.swaps
        )
        metrics.gauge(
            "seqfraud_shadow_behind_records", "Records a challenger has not come to.", ("model",), self._each("behind")
        )
        metrics.counter(
            "seqfraud_shadow_scored_total", "Live transactions a challenger scored.", ("model",), self._each("scored")
        )
        metrics.counter(
            "seqfraud_shadow_dropped_total", "Scores of it that were dropped.", ("model",), self._each("dropped")
        )
        metrics.gauge(
            "seqfraud_shadow_stopped",
            "1 where a challenger stopped, since it failed.",
            ("model",),
            lambda: {(one.model,): int(one.state == "stopped") for one in self.shown()},
        )

    def _each(self, field: str) -> Callable[[], dict[tuple[str, ...], float]]:
        return lambda: {(one.model,): getattr(one, field) for one in self.shown()}

    # ---- changes

    def change(self, body: bytes, author: str) -> None:
        """Do what a request asks for; returns when it is done.

        Raises:
            RequestError: 409 where there is no registry, another change goes on, or the model cannot do it: nothing is
                changed; 404 for a model that is not there; 422; 503 where the journal fails.
        """
        asked = decode_object(body, _DECODER, _WORDS)
        if not asked.reason.strip() or len(asked.reason) > REASON_CHARACTERS:
            words = f"reason: {len(asked.reason)} characters; expected {_WORDS['reason']}"
            raise RequestError(422, "invalid_field", words, "reason")
        registry = self._registry
        if registry is None:
            raise RequestError(
                409,
                "no_registry",
                "this service has no registry of models; start it with --registry instead of --bundle",
            )
        self._house.check_deadline()
        if not self._one.acquire(blocking=False):
            raise RequestError(409, "conflict", f"another change goes on: {self.changing}; ask again", retry_after=5)
        try:
            self._house.before_waiting()
            with _refused_in_words(self._house):
                model = self._named(registry, asked)
                self.changing = f"{asked.action} {model}"
                if asked.action == "shadow":
                    self._shadow(registry, model, author, asked.reason)
                elif asked.action == "withdraw":
                    self._withdraw(registry, model, author, asked.reason)
                else:
                    self._replace(registry, asked.action, model, author, asked.reason)
        finally:
            self.changing = ""
            self._one.release()

    def _named(self, registry: Registry, asked: ChangeModel) -> str:
        name = asked.model or ("previous" if asked.action == "rollback" else "")
        if not name:
            raise RequestError(422, "invalid_field", f"model: missing; expected {_WORDS['model']}", "model")
        try:
            return registry.resolve(name)
        except RegistryError as error:
            raise RequestError(404, "unknown_model", str(error), "model") from None

    # ---- another model in force

    def _replace(self, registry: Registry, action: Action, model: str, author: str, reason: str) -> None:
        began, before = time.perf_counter(), self._house.engine.bundle.id
        standing = registry.standing()
        if model == before:
            raise RequestError(409, "conflict", f"{model} is in force already", "model")
        if action == "rollback" and model != standing.previous:
            raise RequestError(409, "conflict", f"the champion before was {standing.previous}, not {model}", "model")
        ready: CatchUp | None = None
        try:
            ready = self._ready(registry, model)
            ready.follow_to(CLOSE, self._note_progress)
            # the registry may have been changed without the service, and name it already
            written = registry.champion != model
            if written:
                self._write(registry, action, model, author, reason)
            try:
                body = self._encode(ModelChanged(action, model, before, reason))
                old = self._house.put_in_force(ready, author, body)
            except BaseException as error:
                if written:
                    self._take_back(registry, model, standing, author, error)
                raise
        except BaseException:
            if ready is not None:
                ready.close()
            if model in standing.challengers and model not in self.challengers:
                self._try_begin(registry, model)
            raise
        ready.close()
        self.swaps, self.swap_seconds = self.swaps + 1, time.perf_counter() - began
        _log.warning(
            "%s: the model in force is %s, before it was %s (%.2f s)", action, model, before, self.swap_seconds
        )
        old.dismantle(self._house.rest)
        gc.freeze()  # as at the start: what stays is not looked through again and again

    def _ready(self, registry: Registry, model: str) -> CatchUp:
        """An engine that fits and has its rules, and its memory, or begins to."""
        shadow = self.challengers.get(model)
        if shadow is not None:
            self._house.bind_rules(shadow.engine)
            released = self._end(model)
            if released is not None:
                released.pause = self._house.rest
                return released
        engine = self._house.new_engine(_verified(registry, model))
        self._house.bind_rules(engine)
        return self._house.catch_up(engine)

    def _note_progress(self, behind: int) -> None:
        self.changing = f"{self.changing.partition(',')[0]}, {behind} records left"

    def _write(self, registry: Registry, action: Action, model: str, author: str, reason: str) -> None:
        if action == "rollback":
            registry.rollback(author, reason, to=model)
        else:
            registry.promote(model, author, reason)

    def _take_back(self, registry: Registry, model: str, before: Standing, author: str, error: BaseException) -> None:
        """What was written to the registry is undone by other events: the model could not come into force after all."""
        words = f"{model} could not come into force: {type(error).__name__}"
        try:
            if before.champion is not None:
                back: Action = "rollback" if registry.previous == before.champion else "promote"
                self._write(registry, back, before.champion, author, words)
            if model in before.challengers:
                registry.challenge(model, author, words)
        except (RegistryError, BundleError) as failed:
            _log.error("the registry names a champion that is not in force: %s", failed)

    # ---- challengers

    def _shadow(self, registry: Registry, model: str, author: str, reason: str) -> None:
        if model == self._house.engine.bundle.id:
            raise RequestError(409, "conflict", f"{model} is in force; it cannot challenge itself", "model")
        running = self.challengers.get(model)
        if running is not None and not running.why:
            raise RequestError(409, "conflict", f"{model} scores in shadow already", "model")
        if running is None and len(self.challengers) >= self._most:
            raise RequestError(
                409, "conflict", f"{len(self.challengers)} models score in shadow; at most {self._most} (shadow.most)"
            )
        bundle = _verified(registry, model)
        engine = self._house.new_engine(bundle)
        if model not in registry.challengers:
            registry.challenge(model, author, reason)
        if running is not None:
            self._end(model)
        self._begin(bundle, engine)
        self._store("shadow", model, author, reason)

    def _withdraw(self, registry: Registry, model: str, author: str, reason: str) -> None:
        if model in registry.challengers:
            registry.withdraw(model, author, reason)
        elif model not in self.challengers:
            raise RequestError(409, "conflict", f"{model} does not score in shadow", "model")
        challenger = self.challengers.get(model)
        if challenger is not None:
            self._end(model)
            challenger.forget()
        self._store("withdraw", model, author, reason)

    def _try_begin(self, registry: Registry, model: str) -> None:
        try:
            self._begin(registry.open(model))
        except (SeqfraudError, OSError) as error:
            _log.error("the challenger %s does not score: %s", model, error)

    def _begin(self, bundle: Bundle, engine: Engine | None = None) -> None:
        self._house.rest(0)  # not where the service is being closed
        challenger = self._house.challenge(engine or self._house.new_engine(bundle))
        self.challengers = {**self.challengers, bundle.id: challenger}

    def _end(self, model: str) -> CatchUp | None:
        """Stop a challenger; what it has in memory, where that is of use."""
        released = self.challengers[model].release()
        self.challengers = {name: one for name, one in self.challengers.items() if name != model}
        return released

    def _store(self, action: Action, model: str, author: str, reason: str) -> None:
        before = self._house.engine.bundle.id
        self._house.store_action(MODEL, author, self._encode(ModelChanged(action, model, before, reason)))


def _verified(registry: Registry, model: str) -> Bundle:
    """A model's bundle, its content and its graphs checked. Raises RegistryError, BundleError, ParityError."""
    bundle = registry.open(model)
    verify_opened(bundle)
    return bundle


@contextmanager
def _refused_in_words(house: House) -> Iterator[None]:
    """Whatever keeps a model from coming into force as a refusal: nothing was changed by it."""
    try:
        try:
            yield
        except (SeqfraudError, OSError, sqlite3.Error) as error:
            if house.closing:  # the journal may be closed under it at any point
                raise RequestError(503, "not_ready", "the service is stopping; nothing changed") from error
            raise
    except (BundleError, ParityError, ModelError, RunError) as error:
        raise RequestError(409, "model_refused", f"the model cannot come into force: {error}", "model") from error
    except RegistryError as error:
        raise RequestError(409, "conflict", str(error)) from error
    except (JournalError, OSError, sqlite3.Error) as error:
        _log.error("a change of models: %s", error)
        raise RequestError(503, "storage_unavailable", "it could not be stored or read; nothing changed") from error
