"""Models in a folder, with who promoted which when and why.

bundles/ID/        a bundle under its content id, as it was added; never changed afterwards, but for its signatures
attached/ID/NAME   what else is known of a model, such as the gate's result; not part of its content
cards/ID.md        its card for people, written again whenever something is done to it (see `card`)
events.jsonl       the truth: every addition, promotion, rollback, challenge and withdrawal (see `modelevents`)

Readers need no lock, and any number of processes may write. A bundle is verified where it will lie before it has its
name, so that a name stands for a whole bundle, whenever the process dies.
"""

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from seqfraud import card
from seqfraud.bundle import FILES, MANIFEST, Bundle, open_bundle
from seqfraud.errors import BundleError, RegistryError, SeqfraudError
from seqfraud.files import replaced_file, sync_folder
from seqfraud.modelevents import Action, Event, EventLog, Standing, alone, iso
from seqfraud.signature import SIGNATURE, SIGNATURE_BYTES, TrustedKeys

EVENTS = "events.jsonl"
BUNDLES = "bundles"
ATTACHED = "attached"
CARDS = "cards"
PREFIX = 8
"""Digits of an id that are enough to name a model, where no other begins with them."""
_UNFINISHED = ".add-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Registry:
    """A registry folder. What is read is what the folder holds at that moment; nothing is kept here."""

    def __init__(
        self, folder: Path, trusted: TrustedKeys | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """Nothing is read or made yet.

        Args:
            folder: made by the first `add`.
            trusted: whose signature is asked for when a bundle is added, promoted, made a challenger or opened.
            clock: seconds since the epoch.
        """
        self.folder = folder
        self._trusted = trusted
        self._clock = clock
        self._log = EventLog(folder / EVENTS)
        self._bundles = folder / BUNDLES

    # ---- reading

    def standing(self) -> Standing:
        """Models, champions and challengers, of one moment. Raises RegistryError, as all that reads does."""
        self._require()
        return self._log.read()[1]

    def ids(self) -> tuple[str, ...]:
        """Content ids in the order in which the models were added."""
        return self.standing().models

    @property
    def champion(self) -> str | None:
        """Content id of the model that answers; None before the first promotion."""
        return self.standing().champion

    @property
    def previous(self) -> str | None:
        """Content id of the model that a rollback goes back to; None where there is nothing to go back to."""
        return self.standing().previous

    @property
    def challengers(self) -> tuple[str, ...]:
        """Content ids of the models that score in shadow, in the order in which they began."""
        return self.standing().challengers

    def events(self) -> list[Event]:
        """Everything that happened, in order."""
        self._require()
        return self._log.read()[0]

    def path(self, model: str) -> Path:
        """Folder of a model's bundle."""
        if model not in self.ids():
            raise RegistryError(f"{self.folder}: there is no model {model!r:.80}; see `seqfraud models list`")
        path = self._bundles / model
        if not path.is_dir():
            raise RegistryError(f"{path}: the bundle was added and is gone; add it again")
        return path

    def open(self, model: str) -> Bundle:
        """A model's bundle, checked as `open_bundle` does. Raises BundleError too."""
        bundle = open_bundle(self.path(model), self._trusted)
        if bundle.id != model:
            raise BundleError(f"{bundle.path}: holds the bundle {bundle.id}; expected {model}")
        return bundle

    def resolve(self, name: str) -> str:
        """The content id that a name stands for.

        Args:
            name: an id or the beginning of one, at least 8 digits of it; `champion`, `challenger` or `previous`.
        """
        standing = self.standing()
        if name in ("champion", "previous"):
            found: tuple[str | None, ...] = (standing.champion if name == "champion" else standing.previous,)
        elif name == "challenger":
            found = standing.challengers
        else:
            found = tuple(m for m in standing.models if m == name or (len(name) >= PREFIX and m.startswith(name)))
        held = [model for model in found if model is not None]
        if len(held) == 1:
            return held[0]
        if held:
            raise RegistryError(f"{self.folder}: {name!r} could be {', '.join(held)}; expected one of them")
        if name in ("champion", "previous", "challenger"):
            raise RegistryError(f"{self.folder}: there is no {name} yet")
        known = ", ".join(standing.models) or "none"
        raise RegistryError(
            f"{self.folder}: there is no model {name!r:.80}; expected an id ({known}), at least {PREFIX} digits of "
            "one, champion, previous or challenger"
        )

    # ---- changing

    def add(self, bundle: Path, author: str, note: str = "") -> str:
        """Copy a bundle into the registry, verified as it will lie there; its content id.

        One that is there already is left as it is, but for signatures that it has not.

        Raises:
            BundleError: it is not whole, not signed as asked, or its graphs do not compute what the trained model does.
        """
        from seqfraud.verification import verify_bundle  # onnxruntime takes a while

        opened = open_bundle(bundle, self._trusted)
        self._bundles.mkdir(parents=True, exist_ok=True)
        with alone(self._bundles):
            for unfinished in self._bundles.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            final = self._bundles / opened.id
            known = opened.id in self.ids()
            if final.exists():
                self._add_signatures(bundle, final)
                verify_bundle(final, self._trusted)
            else:
                temporary = self._bundles / f"{_UNFINISHED}{os.getpid()}"
                temporary.mkdir()
                try:
                    self._copy(opened, bundle, temporary)
                    verify_bundle(temporary, self._trusted)
                    temporary.rename(final)
                    sync_folder(self._bundles)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
            if not known:
                self._write("add", author, note, opened.id)
        return opened.id

    def promote(self, model: str, author: str, reason: str) -> None:
        """Make a model the champion; one that was a challenger is none any more."""
        self.open(model)
        self._write("promote", author, reason, model)

    def rollback(self, author: str, reason: str, to: str | None = None) -> str:
        """Go back to the champion before this one, whose id is returned.

        Done twice it goes back two. The model that is left is neither champion nor challenger, and can be promoted again.

        Args:
            to: the model that it has to go back to; None: whichever it is.
        """

        target = self.previous if to is None else to
        if target is None:
            raise RegistryError(f"{self.folder}: there was no champion before this one; nothing to go back to")
        self.open(target)
        return self._write("rollback", author, reason, target).model

    def challenge(self, model: str, author: str, reason: str) -> None:
        """Let a model score in shadow."""
        self.open(model)
        self._write("challenge", author, reason, model)

    def withdraw(self, model: str, author: str, reason: str) -> None:
        """End a challenge."""
        self._write("withdraw", author, reason, model)

    # ---- what belongs to a model without being part of it

    def attach(self, model: str, name: str, content: bytes) -> Path:
        """Keep a file by a model, such as `gate.json`; one of that name is replaced."""
        self.path(model)
        if not _NAME.fullmatch(name):
            raise RegistryError(f"name: seen {name!r:.80}; expected a file name of letters, digits and . _ -")
        file = self.folder / ATTACHED / model / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(file) as temporary, temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        self._write_cards([model])
        return file

    def attached(self, model: str) -> dict[str, Path]:
        """The files kept by a model, by name."""
        self.path(model)
        files = (self.folder / ATTACHED / model).glob("*")
        return {file.name: file for file in sorted(files) if _NAME.fullmatch(file.name)}

    def card(self, model: str) -> str:
        """A model's card in Markdown, as of now. Raises BundleError too."""
        bundle = self.open(model)
        files = {name: file.read_bytes() for name, file in self.attached(model).items()}
        return card.card(bundle, self.standing(), self.events(), files)

    # ---- inside

    def _require(self) -> None:
        if not self.folder.is_dir():
            raise RegistryError(f"{self.folder}: no such registry; `seqfraud models add BUNDLE` makes one")

    def _write(self, action: Action, author: str, reason: str, model: str) -> Event:
        self._require()
        event = self._log.write(
            lambda standing: Event(iso(self._clock()), author, action, model, reason, standing.champion)
        )
        self._write_cards([one for one in {model, event.before} if one is not None and card.concerns(event, one)])
        return event

    def _write_cards(self, models: list[str]) -> None:
        """What they say now; of a model whose bundle cannot be opened no card is left, so that none is stale."""
        folder = self.folder / CARDS
        for model in models:
            file = folder / f"{model}.md"
            try:
                folder.mkdir(exist_ok=True)
                with alone(folder), replaced_file(file) as temporary:
                    temporary.write_text(self.card(model), encoding="utf-8")
            except (OSError, SeqfraudError):
                file.unlink(missing_ok=True)

    def _copy(self, opened: Bundle, source: Path, to: Path) -> None:
        """The bytes that were checked, on disk."""
        held = dict(zip(FILES, (opened.sequence, opened.step, opened.reference), strict=True))
        held[MANIFEST] = opened.manifest_file
        signatures = _signatures(source)
        if signatures:
            held[SIGNATURE] = "".join(signatures).encode()
        try:
            for name, content in held.items():
                with (to / name).open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            sync_folder(to)
        except OSError as error:
            raise RegistryError(f"{to}: cannot be written: {error.strerror}") from error

    def _add_signatures(self, source: Path, final: Path) -> None:
        there = _signatures(final)
        new = [line for line in _signatures(source) if line not in there]
        if new:
            with replaced_file(final / SIGNATURE) as temporary:
                temporary.write_text("".join([*there, *new]), encoding="ascii")


def _signatures(bundle: Path) -> list[str]:
    """Lines of a bundle's signatures, if it has any; whether they hold is not looked at."""
    file = bundle / SIGNATURE
    if not file.is_file() or file.is_symlink() or file.stat().st_size > SIGNATURE_BYTES:
        return []
    lines = [line.split() for line in file.read_bytes().decode("ascii", "ignore").splitlines()]
    return [" ".join(words) + "\n" for words in lines if len(words) == 3]
