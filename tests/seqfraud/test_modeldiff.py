"""What differs between two bundles is listed, all of it and nothing else."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seqfraud.bundle import Bundle, open_bundle, write_manifest
from seqfraud.modeldiff import Compared, compare
from seqfraud.policy import Costs, Policy, Thresholds
from seqfraud.vocabulary import Vocabulary


def listed(compared: Compared) -> dict[str, tuple[Any, Any, str]]:
    return {f"{d.section}: {d.name}": (d.a, d.b, d.words) for d in compared.differences}


@pytest.fixture
def changed(cards: Bundle, tmp_path: Path) -> Callable[..., Bundle]:
    """`changed(**changes)`: the bundle of CARDS with another manifest."""

    def make(**changes: Any) -> Bundle:
        folder = Path(shutil.copytree(cards.path, tmp_path / "changed"))
        write_manifest(folder, dataclasses.replace(cards.manifest, **changes))
        return open_bundle(folder)

    return make


def test_a_model_does_not_differ_from_itself(cards: Bundle) -> None:
    assert compare(cards, cards) == Compared(cards.id, cards.id, (), ())


def test_weights_alone(make_bundle: Callable[..., Bundle], plain_toml: str) -> None:
    found = listed(compare(make_bundle(plain_toml, seed=0), make_bundle(plain_toml, seed=1)))
    assert set(found) <= {"calibration: scale", "calibration: shift", "graphs: sequence.onnx", "graphs: step.onnx"}
    assert found["graphs: step.onnx"][2] == "weights or structure differ"


def test_every_part_of_the_manifest_is_compared(cards: Bundle, changed: Callable[..., Bundle]) -> None:
    (kind,) = cards.manifest.vocabularies
    values = tuple("car" if value == "fuel" else value for value in kind.values)
    other = changed(
        vocabularies=(Vocabulary("kind", values),),
        context=dataclasses.replace(cards.manifest.context, label_delay=3 * 86_400_000),
        policy=Policy(Thresholds(0.6, 0.4, 0.8), costs=Costs(review_cost=5.0)),
        versions={"torch": "2.13.0"},
        fingerprint={"rows": 10, "last": "2025-01-01", "numeric_deciles": {"amount": [1.0]}},
        calibration={**cards.manifest.calibration, "shift": 0.5},
        cleaning=dataclasses.replace(cards.manifest.cleaning, negative_amount="drop"),
        metrics={"test": {"rows": 9, "average_precision": 0.5, "roc_auc": None}},
    )
    compared = compare(cards, other)
    found = listed(compared)
    assert found.pop("decision: review_cost") == (None, 5.0, "")
    assert {name for name in found if name.startswith("decision: ")} >= {"decision: by", "decision: margin"}
    assert {name: of for name, of in found.items() if not name.startswith("decision: ")} == {
        "vocabularies: kind": (8, 8, "1 new, 1 gone"),
        "context: label_delay": ("2 h", "3 d", ""),
        "versions: torch": (None, "2.13.0", ""),
        "training data: rows": (None, 10, ""),
        "training data: last": (None, "2025-01-01", ""),
        "calibration: shift": (cards.manifest.calibration["shift"], 0.5, ""),
        "cleaning: negative_amount": (cards.manifest.cleaning.negative_amount, "drop", ""),
    }
    assert compared.figures == (("test", "rows", None, 9), ("test", "average_precision", None, 0.5))


def test_other_inputs_and_states(cards: Bundle, rich: Bundle) -> None:
    found = listed(compare(cards, rich))
    assert found["schema: numeric"] == (("amount",), ("amount", "age"), "+age")
    assert found["schema: context"][2] == "+kind, -merchant, -device"
    assert found["states: h"] == ("float32 [1, 'B', 8] by user", "float32 [1, 'B', 6] by user", "")
    assert found["states: last_place"][0] is None
    assert found["missing: missing"][2] == "+age, +lat, +long"
    assert found["context: numbers read"] == (26, 18, "18 new, 26 gone")


def test_another_order_is_a_difference(cards: Bundle, changed: Callable[..., Bundle]) -> None:
    """Ids follow the order, and so what the weights mean."""
    (kind,) = cards.manifest.vocabularies
    other = changed(vocabularies=(Vocabulary("kind", kind.values[::-1]),))
    assert listed(compare(cards, other)) == {"vocabularies: kind": (8, 8, "in another order")}


def test_durations_that_people_would_call_the_same_differ(cards: Bundle, changed: Callable[..., Bundle]) -> None:
    context = dataclasses.replace(cards.manifest.context, label_delay=cards.manifest.context.label_delay + 1)
    assert listed(compare(cards, changed(context=context))) == {"context: label_delay": ("2 h", "7200001 ms", "")}
