"""The features of a row alone, against the datetime module and plain Python."""

import math
from datetime import UTC, datetime

import numpy as np
import torch

from seqfraud.nn.baseline import RowFeatures, RowSpec

TIMES = [0, -1, 86_399_999, 1_735_689_600_123, 1_741_564_799_999, -62_135_596_800_000]
NUMERIC = [[5.0, np.nan], [-5.0, 0.0], [0.1, 1e6], [np.nan, -1.0], [3.0, 7.0], [1.0, 2.0]]
CONTEXT = [[0.0], [-1.0], [4.0], [2.5], [1e9], [0.3]]
IDS = [[1], [7], [0], [3], [2**24 - 1], [2]]


def raw() -> dict[str, torch.Tensor]:
    return {
        "event_time": torch.tensor(TIMES),
        "numeric": torch.tensor(NUMERIC, dtype=torch.float32),
        "context": torch.tensor(CONTEXT, dtype=torch.float32),
        "categorical": torch.tensor(IDS),
    }


def clock(ms: int) -> tuple[float, int]:
    moment = datetime.fromtimestamp(ms // 1000, UTC)
    seconds = moment.hour * 3600 + moment.minute * 60 + moment.second + ms % 1000 / 1000
    return seconds / 3600, moment.weekday()


def test_features_of_a_row() -> None:
    """Numbers, contexts, hour, weekday, ids; before 1970 and at the last millisecond of a day too."""
    got = RowFeatures(RowSpec(2, 1, 1))(raw()).numpy()
    assert got.dtype == np.float64
    expected = [
        [*np.float32(n), *np.float32(k), np.float32(clock(ms)[0]), clock(ms)[1], *i]
        for ms, n, k, i in zip(TIMES, NUMERIC, CONTEXT, IDS, strict=True)
    ]
    np.testing.assert_array_equal(got, np.array(expected, dtype=np.float64))


def test_missing_numbers_and_the_logarithm_leave_ids_alone() -> None:
    plain = RowFeatures(RowSpec(2, 1, 1))(raw()).numpy()
    filled = RowFeatures(RowSpec(2, 1, 1, missing=-1.0))(raw()).numpy()
    np.testing.assert_array_equal(filled, np.where(np.isnan(plain), -1.0, plain))
    logarithms = RowFeatures(RowSpec(2, 1, 1, missing=0.0, logarithm=True))(raw()).numpy()
    for before, after in zip(plain, logarithms, strict=True):
        for x, y in zip(before[:5], after[:5], strict=True):
            assert y == (0.0 if math.isnan(x) else math.copysign(math.log(1 + abs(x)), x))
        assert before[5] == after[5]


def test_inputs_of_width_0_are_absent() -> None:
    got = RowFeatures(RowSpec(0, 0, 0))({"event_time": torch.tensor([[3_600_000]])})
    assert got.tolist() == [[[1.0, 3.0]]]  # the epoch was a Thursday
