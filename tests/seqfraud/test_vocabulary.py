"""Category -> id: 0 padding, 1 unseen or missing, then the frequent values."""

import numpy as np

from seqfraud.table import MISSING, Coded
from seqfraud.vocabulary import PADDING, UNSEEN, Vocabulary, fit_vocabulary


def coded(texts: list[str | None], values: list[str]) -> Coded:
    return Coded(np.array([MISSING if t is None else values.index(t) for t in texts], dtype=np.int32), values)


TEXTS = coded(["b", "c", "a", None, "b", "c", "d", None, None, "a", "b"], ["a", "b", "c", "d", "never"])


def test_most_frequent_first_ties_by_text() -> None:
    assert fit_vocabulary("kind", TEXTS, 1) == Vocabulary("kind", ("b", "a", "c", "d"))
    assert fit_vocabulary("kind", coded(["x", "B", "a", "é"], ["é", "x", "a", "B"]), 1).values == ("B", "a", "x", "é")


def test_rare_and_missing_values_are_left_out() -> None:
    assert fit_vocabulary("kind", TEXTS, 2).values == ("b", "a", "c")
    assert fit_vocabulary("kind", TEXTS, 3).values == ("b",), "three missing ones are no value"
    assert fit_vocabulary("kind", TEXTS, 4).values == ()


def test_no_rows() -> None:
    empty = fit_vocabulary("kind", coded([], []), 1)
    assert (empty.values, len(empty)) == ((), 2)
    assert empty.encode(coded(["a", None], ["a"])).tolist() == [UNSEEN, UNSEEN]


def test_ids() -> None:
    vocabulary = fit_vocabulary("kind", TEXTS, 2)
    assert vocabulary.lookup() == {"b": 2, "a": 3, "c": 4}
    assert len(vocabulary) == 5
    assert PADDING not in vocabulary.lookup().values()


def test_encode_has_its_own_codes() -> None:
    """Another table numbers the same texts differently."""
    vocabulary = fit_vocabulary("kind", TEXTS, 2)
    other = coded(["a", None, "new", "c", "b", "d"], ["new", "c", "unused", "b", "a", "d"])
    ids = vocabulary.encode(other)
    assert ids.tolist() == [3, 1, 1, 4, 2, 1]
    assert ids.dtype == np.int64
    lookup = vocabulary.lookup()
    assert ids.tolist() == [lookup.get(text or "", UNSEEN) for text in other.texts()]


def test_some_values_are_left_out_by_their_text() -> None:
    assert fit_vocabulary("kind", TEXTS, 1, lambda text: text in ("a", "d")).values == ("b", "c")
