"""Sequences by user, as integer ramps: a wrong index is a wrong number."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfraud.context import ContextSpec, context_columns
from seqfraud.errors import DataError
from seqfraud.schema import Schema
from seqfraud.sequences import Encoded, chunks, encode, group_users, require_numbers
from seqfraud.table import Coded, Transactions
from seqfraud.vocabulary import UNSEEN, Vocabulary

Ints = npt.NDArray[np.int64]


def ramp(lengths: list[int]) -> Encoded:
    """Users of these lengths; event k of user u has time 1000 u + k, number 10 times that, category u, context k."""
    user = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(n) for n in lengths]) if lengths else np.zeros(0, dtype=np.int64)
    end = np.cumsum(lengths, dtype=np.int64)
    time = (1000 * user + step).astype(np.int64)
    return Encoded(
        time=time,
        numeric=(10 * time[:, None]).astype(np.float32),
        categorical=user[:, None].astype(np.int32),
        context=step[:, None].astype(np.float32),
        begin=end - lengths,
        end=end,
        arrival=np.arange(len(user))[::-1].copy(),
    )


def walk(encoded: Encoded, users: Ints, events: int) -> dict[int, list[int]]:
    """The times that the chunks give each user, in order; checks the form of every chunk on the way."""
    seen: dict[int, list[int]] = {int(u): [] for u in users}
    width = len(users)
    for number, chunk in enumerate(chunks(encoded, users, events)):
        assert chunk.first == (number == 0)
        assert chunk.rows.shape == (len(chunk.length), chunk.length.max())
        assert 0 < chunk.length.min() <= chunk.length.max() <= events
        assert len(chunk.length) <= width
        width = len(chunk.length)
        for user, rows, length in zip(users.tolist(), chunk.rows, chunk.length, strict=False):
            assert (rows[length:] == -1).all()
            seen[user] += encoded.time[rows[:length]].tolist()
    return seen


def test_chunks_by_hand() -> None:
    encoded = ramp([2, 5, 3])
    first, second, third = chunks(encoded, np.array([1, 2, 0]), 2)
    assert first.rows.tolist() == [[2, 3], [7, 8], [0, 1]]
    assert first.length.tolist() == [2, 2, 2]
    assert second.rows.tolist() == [[4, 5], [9, -1]]
    assert second.length.tolist() == [2, 1]
    assert third.rows.tolist() == [[6]]
    assert third.length.tolist() == [1]
    assert [c.first for c in (first, second, third)] == [True, False, False]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    events=st.integers(1, 6),
    size=st.integers(1, 5),
    seed=st.one_of(st.none(), st.integers(0, 9)),
)
def test_every_event_is_walked_once_and_in_order(lengths: list[int], events: int, size: int, seed: int | None) -> None:
    encoded = ramp(lengths)
    rng = None if seed is None else np.random.default_rng(seed)
    seen: dict[int, list[int]] = {}
    for group in group_users(encoded.lengths(), size, rng):
        assert len(group) <= size
        seen |= walk(encoded, group, events)
    assert seen == {u: [1000 * u + k for k in range(n)] for u, n in enumerate(lengths)}


def test_groups_are_of_similar_length_longest_first() -> None:
    groups = group_users(np.array([3, 9, 1, 7, 3]), 2)
    assert [group.tolist() for group in groups] == [[1, 3], [0, 4], [2]]
    assert group_users(np.zeros(0, dtype=np.int64), 2) == []


def test_drawn_groups_differ_but_hold_every_user_once() -> None:
    lengths = np.arange(1, 101)
    drawn = [group_users(lengths, 8, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    as_lists = [[group.tolist() for group in groups] for groups in drawn]
    assert as_lists[0] == as_lists[1] != as_lists[2]
    assert as_lists[0] != [group.tolist() for group in group_users(lengths, 8)]
    for groups in drawn:
        assert sorted(np.concatenate(groups).tolist()) == list(range(100))
        for group in groups:
            assert (np.diff(lengths[group]) <= 0).all(), "chunks drop the users at the end"
        spread = np.mean([np.ptp(np.log(lengths[group])) for group in groups if lengths[group].min() > 10])
        assert spread < 1.0, "jittered, not random: a batch is not mostly padding"


def test_until_ends_every_user_before_a_time() -> None:
    encoded = ramp([3, 4, 2])
    for time, lengths in ((0, [0, 0, 0]), (2, [2, 0, 0]), (1000, [3, 0, 0]), (1003, [3, 3, 0]), (2001, [3, 4, 1]),
                          (9999, [3, 4, 2])):  # fmt: skip
        earlier = encoded.until(time)
        assert earlier.lengths().tolist() == lengths
        assert earlier.begin.tolist() == encoded.begin.tolist()
        assert earlier.time is encoded.time
        walked = walk(earlier, group_users(earlier.lengths(), 3)[0], 2)
        assert walked == {u: [1000 * u + k for k in range(n)] for u, n in enumerate(lengths)}
    assert encoded.until(1003).until(1001).lengths().tolist() == [3, 1, 0]
    assert encoded.lengths().tolist() == [3, 4, 2]


def test_gather() -> None:
    encoded = ramp([2, 3])
    inputs = encoded.gather(np.array([[2, 3, 4], [0, 1, -1]]))
    assert inputs["event_time"].tolist() == [[1000, 1001, 1002], [0, 1, 0]]
    assert inputs["numeric"].tolist() == [[[10_000], [10_010], [10_020]], [[0], [10], [0]]]
    assert inputs["categorical"].tolist() == [[[1], [1], [1]], [[0], [0], [0]]]
    assert inputs["context"].tolist() == [[[0], [1], [2]], [[0], [1], [0]]]
    kinds = {name: array.dtype for name, array in inputs.items()}
    assert kinds == {
        "event_time": np.dtype(np.int64), "numeric": np.dtype(np.float32), "categorical": np.dtype(np.int64),
        "context": np.dtype(np.float32),
    }  # fmt: skip


def test_inputs_without_columns_are_left_out() -> None:
    encoded = ramp([2])
    bare = Encoded(
        time=encoded.time,
        numeric=encoded.numeric,
        categorical=encoded.categorical[:, :0],
        context=encoded.context[:, :0],
        begin=encoded.begin,
        end=encoded.end,
        arrival=encoded.arrival,
    )
    assert set(bare.gather(np.array([[0]]))) == {"event_time", "numeric"}


SPEC = ContextSpec(("shop",), (3_600_000,), 3_600_000)


def transactions(n: int, seed: int = 0) -> Transactions:
    """Drawn rows in arrival order; the user of a row and its number come from the row's index."""
    rng = np.random.default_rng(seed)
    schema = Schema("user", "time", amount="total", numeric=("x",), categorical=("kind", "shop"), context=("shop",),
                    geo=(("lat", "long"),))  # fmt: skip
    index = np.arange(n)
    return Transactions(
        schema=schema,
        user=Coded((index * 7 % 5).astype(np.int32), [f"u{i}" for i in range(6)]),
        time=np.sort(rng.integers(0, 20, n)) * 600_000,
        numbers=np.stack([index, index + 0.25, index + 0.5, rng.exponential(9, n)], axis=1).astype(np.float64),
        texts=(
            Coded((index % 3 - 1).astype(np.int32), ["a", "b"]),
            Coded(rng.integers(-1, 3, n).astype(np.int32), ["s", "t", "v"]),
        ),
        label=rng.integers(-1, 2, n).astype(np.int8),
        known_at=None,
        ids=None,
        file_row=index[::-1].copy(),
    )


def test_encode_sorts_by_user_then_arrival() -> None:
    table = transactions(60)
    vocabularies = [Vocabulary("shop", ("v", "s")), Vocabulary("kind", ("b",))]
    encoded = encode(table, vocabularies, SPEC)
    assert len(encoded) == 60
    assert encoded.lengths().tolist() == [12] * 5, "a user that no row has has no sequence"

    want = sorted(range(60), key=lambda i: (int(table.user.codes[i]), i))
    assert encoded.arrival.tolist() == want
    assert encoded.time.tolist() == table.time[want].tolist()
    assert encoded.numeric.tolist() == [[i, i + 0.25, i + 0.5] for i in want], "the amount is no input here"
    ids = [v.lookup() for v in vocabularies]
    shops, kinds = table.text("shop").texts(), table.text("kind").texts()
    assert encoded.categorical.tolist() == [
        [ids[0].get(shops[i] or "", UNSEEN), ids[1].get(kinds[i] or "", UNSEEN)] for i in want
    ]
    by_arrival = context_columns(SPEC, table.entities(), table.time, table.numbers[:, 3], table.label, table.known_at)
    assert by_arrival[:, 1].max() > 1, "the contexts are not all empty"
    assert encoded.context.tolist() == by_arrival[want].tolist()


def test_encode_without_rows() -> None:
    encoded = encode(transactions(3).take(np.zeros(0, dtype=np.int64)), [Vocabulary("kind", ("b",))], SPEC)
    assert len(encoded) == 0
    assert encoded.lengths().tolist() == []
    assert encoded.context.shape == (0, 9)


def test_missing_numbers_are_refused_where_training_had_none() -> None:
    table = transactions(6)
    require_numbers(table, ())
    table.numbers[[1, 4], 1] = np.nan
    table.numbers[2, 3] = np.nan  # the amount is no input
    require_numbers(table, ("lat",))
    with pytest.raises(DataError, match=r"column 'lat': no number in 2 of 6 rows, first in row 2, ") as error:
        require_numbers(table, ("x", "long"))
    assert "but none was missing in the model's training rows" in str(error.value)
