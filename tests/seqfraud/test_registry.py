"""A registry of models: what is in it is whole, who did what is kept, and a crash leaves nothing half done."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import seqfraud.verification
from seqfraud.bundle import MANIFEST, STEP, Bundle, sign_bundle
from seqfraud.errors import BundleError, ParityError, RegistryError
from seqfraud.modelevents import Event, Standing
from seqfraud.registry import Registry
from seqfraud.signature import SIGNATURE, new_key, read_signing_key, read_trusted_keys

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_700_000_000.5
WHY = "it is better"


@pytest.fixture(scope="session")
def bundles(make_bundle: Callable[..., Bundle], plain_toml: str) -> tuple[Bundle, Bundle, Bundle]:
    """Three models that differ in their weights only."""
    first, second, third = (make_bundle(plain_toml, seed=seed) for seed in (0, 1, 2))
    return first, second, third


@pytest.fixture(scope="session")
def filled(bundles: tuple[Bundle, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry") / "models"
    for bundle in bundles:
        Registry(folder, clock=lambda: NOW).add(bundle.path, "ann", "nightly")
    return folder


@pytest.fixture
def registry(filled: Path, tmp_path: Path) -> Registry:
    """One with three models and no champion."""
    return Registry(Path(shutil.copytree(filled, tmp_path / "models")), clock=lambda: NOW)


@pytest.fixture
def abc(bundles: tuple[Bundle, ...]) -> list[str]:
    return [bundle.id for bundle in bundles]


# --- Adding


def test_a_bundle_lies_under_its_content_id_as_it_was(registry: Registry, bundles: tuple[Bundle, ...]) -> None:
    assert registry.ids() == tuple(bundle.id for bundle in bundles)
    for bundle in bundles:
        stored = registry.path(bundle.id)
        assert stored == registry.folder / "bundles" / bundle.id
        assert {f.name: f.read_bytes() for f in stored.iterdir()} == {
            f.name: f.read_bytes() for f in bundle.path.iterdir()
        }
        assert registry.open(bundle.id).manifest == bundle.manifest
    first = registry.events()[0]
    assert first == Event("2023-11-14T22:13:20.500Z", "ann", "add", bundles[0].id, "nightly")
    assert (registry.champion, registry.previous, registry.challengers) == (None, None, ())


def test_adding_again_changes_nothing(registry: Registry, bundles: tuple[Bundle, ...]) -> None:
    before = registry.events()
    assert registry.add(bundles[1].path, "bob") == bundles[1].id
    assert registry.events() == before


def test_a_bundle_that_fails_its_checks_is_refused_and_leaves_nothing(
    registry: Registry, cards: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Path(shutil.copytree(cards.path, tmp_path / "changed"))
    (changed / STEP).write_bytes((changed / STEP).read_bytes()[:-1] + b"x")
    before = registry.events()
    with pytest.raises(BundleError, match=r"step\.onnx is not the file"):
        registry.add(changed, "ann")
    monkeypatch.setattr(seqfraud.verification, "LOGIT_TOLERANCE", 0.0)
    with pytest.raises(ParityError, match="differs by"):
        registry.add(cards.path, "ann")
    with pytest.raises(BundleError, match="no such bundle"):
        registry.add(tmp_path / "nowhere", "ann")
    assert registry.events() == before
    assert sorted(f.name for f in (registry.folder / "bundles").iterdir()) == sorted(registry.ids())


def test_what_a_killed_process_left_is_cleared_and_the_addition_can_be_repeated(
    registry: Registry, abc: list[str], bundles: tuple[Bundle, ...]
) -> None:
    """It died while copying one bundle, and after the other had its name but no event yet."""
    half = registry.folder / "bundles" / ".add-half"
    half.mkdir()
    (half / MANIFEST).write_text("{")
    events = registry.folder / "events.jsonl"
    events.write_bytes(b"".join(events.read_bytes().splitlines(keepends=True)[:2]))
    assert registry.ids() == (abc[0], abc[1])
    assert registry.add(bundles[2].path, "ann") == abc[2]
    assert registry.ids() == tuple(abc)
    assert not half.exists()


ADD = """
import sys
from pathlib import Path
from seqfraud.registry import Registry
sys.stdin.readline()
for bundle in sys.argv[3:]:
    Registry(Path(sys.argv[1])).add(Path(bundle), sys.argv[2])
"""


def test_two_processes_add_at_once(bundles: tuple[Bundle, ...], tmp_path: Path) -> None:
    """The same bundle once, and none is lost."""
    orders = {"ann": bundles[:2], "bob": (bundles[0], bundles[2])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, str(tmp_path / "models"), who, *(str(b.path) for b in order)],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        )
        for who, order in orders.items()
    ]  # fmt: skip
    for process in running:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    registry = Registry(tmp_path / "models")
    assert sorted(event.model for event in registry.events()) == sorted(bundle.id for bundle in bundles)
    for bundle in bundles:
        registry.open(bundle.id)


def test_threads_that_write_at_once_lose_nothing(registry: Registry, abc: list[str]) -> None:
    registry.promote(abc[0], "ann", WHY)

    def back_and_forth(model: str) -> None:
        for _ in range(20):
            registry.challenge(model, model, WHY)
            registry.withdraw(model, model, WHY)

    threads = [threading.Thread(target=back_and_forth, args=(model,)) for model in abc[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.events()) == 3 + 1 + 80
    assert registry.challengers == ()


# --- Champion and challengers


def test_promotion_and_rollback_go_over_what_was_champion_before(registry: Registry, abc: list[str]) -> None:
    a, b, c = abc
    registry.promote(a, "ann", WHY)
    registry.promote(b, "ann", WHY)
    registry.promote(c, "ann", WHY)
    assert (registry.champion, registry.previous) == (c, b)
    assert registry.rollback("bob", "too many declined") == b
    assert registry.rollback("bob", "still too many") == a
    assert (registry.champion, registry.previous) == (a, None)
    with pytest.raises(RegistryError, match="nothing to go back to"):
        registry.rollback("bob", "worse")
    registry.promote(c, "ann", "repaired")
    assert registry.rollback("bob", "not repaired") == a
    registry.promote(b, "ann", WHY)
    registry.promote(a, "ann", "the first again")
    assert registry.rollback("bob", WHY) == b
    assert [(e.author, e.action, e.model, e.before) for e in registry.events()[3:]] == [
        ("ann", "promote", a, None),
        ("ann", "promote", b, a),
        ("ann", "promote", c, b),
        ("bob", "rollback", b, c),
        ("bob", "rollback", a, b),
        ("ann", "promote", c, a),
        ("bob", "rollback", a, c),
        ("ann", "promote", b, a),
        ("ann", "promote", a, b),
        ("bob", "rollback", b, a),
    ]


def test_a_challenger_that_is_promoted_challenges_no_more(registry: Registry, abc: list[str]) -> None:
    a, b, c = abc
    registry.promote(a, "ann", WHY)
    registry.challenge(c, "ann", "three weeks newer")
    registry.challenge(b, "ann", "wider")
    assert registry.challengers == (c, b)
    registry.promote(c, "ann", WHY)
    assert registry.standing() == Standing(models=(a, b, c), champions=(a, c), challengers=(b,))
    registry.withdraw(b, "ann", "no better")
    assert not registry.challengers


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda r, a, b: r.promote("0123456789abcdef", "ann", WHY), "there is no model '0123456789abcdef'"),
        (lambda r, a, b: r.promote("../../etc", "ann", WHY), r"there is no model '\.\./\.\./etc'"),
        (lambda r, a, b: r.promote(a, "ann", WHY), "is the champion already"),
        (lambda r, a, b: r.promote(b, "", WHY), "author: seen ''; expected who it is"),
        (lambda r, a, b: r.promote(b, "a\nb", WHY), "author: seen"),
        (lambda r, a, b: r.promote(b, "ann", " "), "reason: seen ' '; expected why"),
        (lambda r, a, b: r.promote(b, "ann", "x" * 5000), "reason: 5,000 characters"),
        (lambda r, a, b: r.promote(b, "ann", "x\x1b[2J"), r"printable ones"),
        (lambda r, a, b: r.rollback("ann", WHY), "nothing to go back to"),
        (lambda r, a, b: r.rollback("ann", WHY, to=b), "the champion before .* was None, not"),
        (lambda r, a, b: r.challenge(a, "ann", WHY), "cannot challenge itself"),
        (lambda r, a, b: r.withdraw(a, "ann", WHY), "is no challenger; those are none"),
        (lambda r, a, b: r.withdraw("x", "ann", WHY), "model: seen 'x'"),
        (lambda r, a, b: r.attach("0123456789abcdef", "gate.json", b""), "there is no model"),
        (lambda r, a, b: r.attach(a, "../gate.json", b""), r"name: seen '\.\./gate\.json'"),
        (lambda r, a, b: r.attach(a, ".hidden", b""), "name: seen"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_changes_nothing(
    registry: Registry, abc: list[str], act: Callable[[Registry, str, str], object], words: str
) -> None:
    registry.promote(abc[0], "ann", WHY)
    before = (registry.folder / "events.jsonl").read_bytes()
    with pytest.raises(RegistryError, match=words):
        act(registry, abc[0], abc[1])
    assert (registry.folder / "events.jsonl").read_bytes() == before


def test_a_challenger_twice_is_refused(registry: Registry, abc: list[str]) -> None:
    registry.challenge(abc[0], "ann", WHY)
    with pytest.raises(RegistryError, match="is a challenger already"):
        registry.challenge(abc[0], "ann", WHY)


def test_a_bundle_that_was_changed_since_is_not_promoted_nor_gone_back_to(registry: Registry, abc: list[str]) -> None:
    a, b, c = abc
    registry.promote(a, "ann", WHY)
    registry.promote(b, "ann", WHY)
    for model in (a, c):
        (registry.path(model) / STEP).write_bytes(b"another")
    with pytest.raises(BundleError, match=f"{c}: step.onnx is not the file"):
        registry.promote(c, "ann", WHY)
    with pytest.raises(BundleError, match=f"{a}: step.onnx is not the file"):
        registry.rollback("ann", WHY)
    assert registry.champion == b
    shutil.rmtree(registry.path(a))
    with pytest.raises(RegistryError, match="was added and is gone; add it again"):
        registry.rollback("ann", WHY)
    assert registry.champion == b


def test_a_bundle_in_the_place_of_another_is_refused(registry: Registry, abc: list[str]) -> None:
    shutil.rmtree(registry.path(abc[0]))
    shutil.copytree(registry.path(abc[1]), registry.folder / "bundles" / abc[0])
    with pytest.raises(BundleError, match=f"holds the bundle {abc[1]}; expected {abc[0]}"):
        registry.promote(abc[0], "ann", WHY)


# --- The file of events


def test_a_torn_last_line_was_never_done_and_the_next_event_takes_its_place(registry: Registry, abc: list[str]) -> None:
    registry.promote(abc[0], "ann", WHY)
    events = registry.folder / "events.jsonl"
    whole = events.read_bytes()
    registry.promote(abc[1], "ann", WHY)
    line = events.read_bytes()[len(whole) :]
    for torn in (line[:-1], line[:20], b"\0" * 4096):
        events.write_bytes(whole + torn)
        assert registry.champion == abc[0]
        registry.challenge(abc[2], "bob", WHY)
        assert registry.challengers == (abc[2],)
        assert events.read_bytes().startswith(whole + b'{"at"')
        assert len(registry.events()) == 5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "line 4: "),
        (b"[]", "line 4: no JSON object"),
        (b"\xff", "line 4: "),
        (b'{"at": "2023-11-14", "author": "a", "action": "delete", "model": "M", "reason": "r"}', "line 4: .*action"),
        (b'{"at": "2023-11-14", "author": "a", "action": "add", "model": "M"}', "line 4: .*event.reason is missing"),
        (b'{"at": "today", "author": "a", "action": "add", "model": "0123456789abcdef", "reason": ""}', "at: 'today'"),
        (
            b'{"at": "2023-11-14", "author": "a", "action": "promote", "model": "0123456789abcdef", "reason": "r"}',
            "line 4: there is no model",
        ),
    ],
)
def test_a_line_in_the_middle_that_cannot_be_is_refused_with_its_number(
    registry: Registry, abc: list[str], line: bytes, words: str
) -> None:
    """A crash does not leave that; somebody edited the file, or the disk lost something."""
    events = registry.folder / "events.jsonl"
    events.write_bytes(events.read_bytes() + line + b"\n")
    before = events.read_bytes()
    for act in (registry.ids, lambda: registry.promote(abc[0], "ann", WHY), registry.standing):
        with pytest.raises(RegistryError, match=words):
            act()
    assert events.read_bytes() == before


def test_an_event_that_was_taken_out_of_the_middle_is_noticed(registry: Registry, abc: list[str]) -> None:
    for model in abc:
        registry.promote(model, "ann", WHY)
    events = registry.folder / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join(lines[:4] + lines[5:]))
    with pytest.raises(RegistryError, match=f"line 5: the champion is {abc[0]}, not '{abc[1]}'"):
        registry.events()


def test_a_full_disk_leaves_the_file_as_it_was(
    registry: Registry, abc: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (registry.folder / "events.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqfraud.modelevents.os.fsync", full)
    with pytest.raises(RegistryError, match=r"events\.jsonl: cannot be written: No space left"):
        registry.promote(abc[0], "ann", WHY)
    assert (registry.folder / "events.jsonl").read_bytes() == before


# --- Names


def test_a_model_has_several_names(registry: Registry, abc: list[str]) -> None:
    a, b, c = abc
    registry.promote(a, "ann", WHY)
    registry.promote(b, "ann", WHY)
    registry.challenge(c, "ann", WHY)
    names = {a: (a, a[:8], "previous"), b: (b, b[:15], "champion"), c: (c, "challenger")}
    for model, called in names.items():
        assert {registry.resolve(name) for name in called} == {model}
    registry.challenge(a, "ann", WHY)
    with pytest.raises(RegistryError, match=f"'challenger' could be {c}, {a}; expected one of them"):
        registry.resolve("challenger")


@pytest.mark.parametrize("name", ["", "champion", "previous", "challenger", "0123456789abcdef", "..", "nobody"])
def test_a_name_that_stands_for_nothing_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError, match=f"there is no (model )?'?{name}"):
        registry.resolve(name)


def test_seven_digits_of_an_id_are_no_name_and_eight_of_two_models_neither(registry: Registry, abc: list[str]) -> None:
    with pytest.raises(RegistryError, match="at least 8 digits"):
        registry.resolve(abc[0][:7])
    events = registry.folder / "events.jsonl"
    twin = abc[0][:8] + "00000000"
    line = {"at": "2024-01-01", "author": "ann", "action": "add", "model": twin, "reason": ""}
    events.write_text(events.read_text() + json.dumps(line) + "\n")
    with pytest.raises(RegistryError, match=f"could be {abc[0]}, {twin}"):
        registry.resolve(abc[0][:8])
    assert registry.resolve(abc[0]) == abc[0]


def test_a_registry_that_is_not_there_is_not_made_by_looking(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "none")
    for act in (registry.ids, registry.events, lambda: registry.promote("0" * 16, "ann", WHY)):
        with pytest.raises(RegistryError, match="no such registry; `seqfraud models add BUNDLE` makes one"):
            act()
    assert not (tmp_path / "none").exists()


# --- Signatures


def test_a_registry_that_trusts_some_keys_takes_and_promotes_only_what_they_signed(
    registry: Registry, abc: list[str], bundles: tuple[Bundle, ...], tmp_path: Path
) -> None:
    new_key(tmp_path / "release.key")
    careful = Registry(registry.folder, read_trusted_keys(tmp_path / "release.key.pub"))
    with pytest.raises(BundleError, match="not signed"):
        careful.add(bundles[0].path, "ann")
    with pytest.raises(BundleError, match="not signed"):
        careful.promote(abc[0], "ann", WHY)
    signed = Path(shutil.copytree(bundles[0].path, tmp_path / "signed"))
    signer = sign_bundle(signed, read_signing_key(tmp_path / "release.key"))
    assert careful.add(signed, "ann") == abc[0], "there already; the signature is new"
    assert careful.open(abc[0]).signed_by == signer
    careful.promote(abc[0], "ann", WHY)
    fresh = Registry(tmp_path / "fresh", read_trusted_keys(tmp_path / "release.key.pub"))
    fresh.add(signed, "ann")
    assert (fresh.path(abc[0]) / SIGNATURE).read_bytes() == (signed / SIGNATURE).read_bytes()


# --- Attachments


def test_what_is_attached_is_kept_by_the_model_and_changes_no_id(registry: Registry, abc: list[str]) -> None:
    assert registry.attached(abc[0]) == {}
    registry.attach(abc[0], "gate.json", b"{}")
    registry.attach(abc[0], "monitor-2024-01-01.html", b"<p>")
    file = registry.attach(abc[0], "gate.json", b'{"passed": true}')
    assert file.read_bytes() == b'{"passed": true}'
    assert list(registry.attached(abc[0])) == ["gate.json", "monitor-2024-01-01.html"]
    assert registry.attached(abc[1]) == {}
    assert registry.open(abc[0]).id == abc[0]


# --- Cards


def test_the_card_of_every_model_that_an_event_concerns_is_written_again(registry: Registry, abc: list[str]) -> None:
    def on_disk(model: str) -> str:
        return (registry.folder / "cards" / f"{model}.md").read_text()

    a, b, _ = abc
    assert "| role | in the registry |" in on_disk(a)
    registry.promote(a, "ann", WHY)
    assert "| role | champion |" in on_disk(a)
    registry.challenge(b, "ann", "newer")
    assert "| role | challenger |" in on_disk(b)
    registry.promote(b, "ann", WHY)
    assert "| role | champion |" in on_disk(b)
    assert f"replaced by {b} | ann | {WHY} |" in on_disk(a)
    registry.rollback("bob", "too many declined")
    assert f"champion again, after {b} | bob | too many declined |" in on_disk(a)
    assert "| role | in the registry |" in on_disk(b)
    registry.attach(b, "gate.json", b'{"passed": false, "champion": "the first"}')
    assert "It did not pass against the first." in on_disk(b)
    for model in abc:
        assert on_disk(model) == registry.card(model)


def test_a_bundle_that_cannot_be_opened_can_be_withdrawn_and_has_no_card(registry: Registry, abc: list[str]) -> None:
    registry.challenge(abc[0], "ann", WHY)
    (registry.path(abc[0]) / STEP).write_bytes(b"another")
    registry.withdraw(abc[0], "ann", "it is damaged")
    assert not registry.challengers
    assert not (registry.folder / "cards" / f"{abc[0]}.md").exists()
