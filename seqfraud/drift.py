"""How far a distribution has moved from a reference, and how surely.

Letters: N rows, K bins, G groups of users, M windows. Rows of one user hang together, so everything uncertain is counted
over groups of users, never over rows. A population stability index is biased: two samples of one distribution give a
positive one. Its expectation (the *noise*) is estimated and taken off, so that a small sample shows no drift by being
small.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.metrics import wilson

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]

WATCH, ALARM = 0.1, 0.25
"""The usual bands of a population stability index: below the first nothing has changed, above the second much has."""
GROUPS = 400
"""Users are drawn in at most so many random groups: a bootstrap of groups costs the same however many users there are."""
LEAST_ROWS = 200
LEAST_GROUPS = 20
"""Users, or groups of them. With fewer of either nothing is said."""
ROUNDS = 200
LEVEL = 0.95
SURE = 0.01
"""Of all comparisons that are made together, the chance that any is called drift without one."""
HALF = 0.5
"""Added to every bin, so that none is empty (Jeffreys)."""
LEAST_SHARE = 1e-3
"""Of a bin of a reference: against a bin that was as good as empty, a few rows would be infinitely many."""


def groups_of(user: npt.ArrayLike, groups: int = GROUPS) -> Codes:
    """int [N]: a group for every row, the same for all rows of a user; at most `groups`, of about equally many users."""
    _, code = np.unique(np.asarray(user), return_inverse=True)
    count = int(code.max()) + 1 if len(code) else 0
    return (np.random.default_rng(0).permutation(count) % groups)[code]


def counts_of(bins: npt.NDArray[np.integer[Any]], group: Codes, k: int) -> Counts:
    """float [G, K]: how many rows [N] of each group are in each bin; rows with a negative bin are left out."""
    inside = bins >= 0
    groups = int(group.max()) + 1 if len(group) else 0
    flat = np.bincount(group[inside] * k + bins[inside], minlength=groups * k)
    return flat.reshape(groups, k).astype(np.float64)


def edges_of(values: npt.ArrayLike) -> list[float]:
    """Edges of about ten bins of equal frequency and of the highest hundredth, NaN left out; atoms have one of their own.

    Bin i holds what is above edge i - 1 and at most edge i; where all values are one, the last bin is what is above it.
    """
    present = np.asarray(values, dtype=np.float64)
    present = present[~np.isnan(present)]
    if not len(present):
        return []
    levels = [*np.linspace(0, 1, 11)[1:-1], 0.99]
    found = np.unique(np.quantile(present, levels, method="inverted_cdf"))
    edges: list[float] = found[found < present.max()].tolist()
    return edges or [float(present.max())]


def bins_of(values: npt.ArrayLike, edges: Sequence[float]) -> npt.NDArray[np.intp]:
    """int [N]: the bin of each value, -1 where it is NaN; there are `len(edges) + 1`."""
    numbers = np.asarray(values, dtype=np.float64)
    bins = np.searchsorted(np.asarray(edges, dtype=np.float64), numbers, side="left")
    return np.where(np.isnan(numbers), -1, bins)


def psi(reference: npt.ArrayLike, current: npt.ArrayLike) -> Floats:
    """Population stability index of shares [..., K]: sum of (c - r) ln(c / r), the Kullback-Leibler divergences both ways.

    Siddiqi, Credit Risk Scorecards (2006). Symmetric, 0 where equal; every share has to be above 0.
    """
    r, c = np.asarray(reference, dtype=np.float64), np.asarray(current, dtype=np.float64)
    total: Floats = ((c - r) * np.log(c / r)).sum(axis=-1)
    return total


def jensen_shannon(reference: npt.ArrayLike, current: npt.ArrayLike) -> Floats:
    """Jensen-Shannon distance of shares [..., K], 0 to 1: root of the divergence in bits.

    Endres and Schindelin, "A new metric for probability distributions", IEEE Trans. Inf. Theory 49 (2003). Symmetric.
    """
    r, c = np.asarray(reference, dtype=np.float64), np.asarray(current, dtype=np.float64)
    middle = (r + c) / 2

    def divergence(p: Floats) -> Floats:
        ratio = np.divide(p, middle, out=np.ones(np.broadcast(p, middle).shape), where=p > 0)
        total: Floats = (p * np.log2(ratio)).sum(axis=-1)
        return total

    root: Floats = np.sqrt(np.maximum((divergence(r) + divergence(c)) / 2, 0.0))
    return root


def shares_of(counts: Counts) -> Floats:
    """float [..., K]: shares of counts [..., K], with half a row added to each bin."""
    smoothed = counts + HALF
    shares: Floats = smoothed / smoothed.sum(axis=-1, keepdims=True)
    return shares


def noise_of(counts: Counts, shares: Floats) -> float:
    """What a sample [G, K] alone adds to a population stability index against shares [K], at least that of free rows.

    sum over bins of Var(c_k) / r_k, the variance from the groups: (K - 1) / N for independent rows (Yurdakul,
    "Statistical properties of population stability index", Western Michigan University 2018), times the mean generalised
    design effect for rows that hang together (Rao and Scott, "On chi-squared tests for multiway contingency tables with
    cell proportions estimated from survey data", Annals of Statistics 12 (1984)).
    """
    rows = counts.sum()
    size = counts.sum(axis=1, keepdims=True)
    mean = counts.sum(axis=0) / rows
    used = int((size > 0).sum())
    spread = np.square(counts - mean * size).sum(axis=0) / rows**2 * used / max(used - 1, 1)
    least: float = (counts.shape[1] - 1) / float(rows)
    return max(float((spread / shares).sum()), least)


def chi_square_tail(value: float, freedom: int) -> float:
    """P(chi-square of so many degrees of freedom >= value), by Wilson and Hilferty's cube root (PNAS 17 (1931))."""
    if value <= 0 or freedom < 1:
        return 1.0
    spread = 2 / (9 * freedom)
    return 0.5 * math.erfc((math.cbrt(value / freedom) - (1 - spread)) / math.sqrt(2 * spread))


@dataclass(frozen=True)
class Distribution:
    """A reference: what a bundle's fingerprint says of one input.

    Attributes:
        edges: of numbers; empty where the bins are categories.
        share: [K], none of them 0.
        rows: that it was counted over.
        noise: what this sample alone adds to an index against it.
        quiet: by window, such as "7d": the largest index, noise taken off, of any such window of the training time. That
            much it moves where nothing is wrong: seasons, counters that grow, new users.
    """

    edges: tuple[float, ...]
    share: tuple[float, ...]
    rows: int
    noise: float
    quiet: Mapping[str, float]

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "Distribution":
        """The inverse of `dataclasses.asdict`."""
        return Distribution(
            tuple(map(float, raw["edges"])),
            tuple(map(float, raw["share"])),
            int(raw["rows"]),
            float(raw["noise"]),
            {str(k): float(v) for k, v in raw["quiet"].items()},
        )


def distribution_of(
    bins: npt.NDArray[np.integer[Any]],
    edges: Sequence[float],
    k: int,
    group: Codes,
    reference: npt.NDArray[np.bool_],
    windows: Mapping[str, Sequence[npt.NDArray[np.bool_]]],
) -> Distribution | None:
    """The distribution of the bins [N] of the reference rows (mask [N]), and how it moves from window to window.

    Args:
        windows: by length, masks [N] of windows of the training time.

    Returns:
        None where no reference row has a value.
    """
    counts = counts_of(bins[reference], group[reference], k)
    if not counts.sum():
        return None
    share = np.maximum(shares_of(counts.sum(axis=0)), LEAST_SHARE)
    share /= share.sum()
    noise = noise_of(counts, share)
    quiet = {}
    for name, masks in windows.items():
        moved = [0.0]
        for mask in masks:
            inside = counts_of(bins[mask], group[mask], k)
            if inside.sum() >= LEAST_ROWS:
                index = float(psi(share, shares_of(inside.sum(axis=0))))
                moved.append(index - noise - noise_of(inside, share))
        quiet[name] = max(moved)
    return Distribution(tuple(edges), tuple(share.tolist()), int(counts.sum()), noise, quiet)


@dataclass(frozen=True)
class Moved:
    """How far a distribution is from its reference.

    Attributes:
        rows: of the sample that have a value.
        share: [K] of the sample.
        psi: as it is; `moved` has what the samples' sizes add taken off, `low` and `high` are its 95 % interval.
        js: Jensen-Shannon distance, and its interval, with the same taken off.
        chance: that it would be as large without any drift; None where there are too few rows or users to say.
    """

    rows: int
    share: tuple[float, ...]
    psi: float
    moved: float
    low: float
    high: float
    js: float
    js_low: float
    js_high: float
    chance: float | None


@lru_cache(maxsize=8)
def drawn_groups(groups: int, rounds: int = ROUNDS, seed: int = 0) -> Floats:
    """[rounds, G]: how often each group is drawn in each round of a bootstrap; the same for the same arguments."""
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=rounds).astype(np.float64)
    drawn.flags.writeable = False
    return drawn


def compare(reference: Distribution, counts: Counts, rounds: int = ROUNDS, seed: int = 0) -> Moved:
    """A sample [G, K] of groups against a reference; the interval by drawing groups, and the reference with them.

    The index of a draw has the noise of the samples twice: that of the samples themselves, and that of drawing from them.
    """
    share = np.array(reference.share)
    k = len(share)
    total = counts.sum(axis=0)
    rows = int(total.sum())
    current = shares_of(total)
    index = float(psi(share, current))
    groups = counts[counts.sum(axis=1) > 0]
    if rows < LEAST_ROWS or len(groups) < LEAST_GROUPS or k < 2:
        js = float(jensen_shannon(share, current))
        return Moved(
            rows, tuple(current.tolist()), index, 0.0, 0.0, max(index, 0.0), js, 0.0, js, None if k > 1 else 1.0
        )
    noise = reference.noise + noise_of(groups, share)
    drawn = shares_of(drawn_groups(len(groups), rounds, seed) @ groups)
    before = np.random.default_rng(seed).dirichlet(share * (k - 1) / reference.noise, size=rounds)
    before = (before + 1e-9) / (1 + k * 1e-9)
    indices = psi(before, drawn) - 2 * noise
    low, high = np.quantile(indices, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # for small changes a divergence in bits is an eighth of the index, by ln 2
    bits = noise / (8 * math.log(2))
    squares = np.square(jensen_shannon(before, drawn)) - 2 * bits
    js_low, js_high = np.sqrt(np.maximum(np.quantile(squares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]), 0.0))
    js = math.sqrt(max(float(jensen_shannon(share, current)) ** 2 - bits, 0.0))
    return Moved(
        rows=rows,
        share=tuple(current.tolist()),
        psi=index,
        moved=max(index - noise, 0.0),
        low=max(float(low), 0.0),
        high=max(float(high), 0.0),
        js=js,
        js_low=float(js_low),
        js_high=float(js_high),
        chance=chi_square_tail(index / noise * (k - 1), k - 1),
    )


@dataclass(frozen=True)
class Share:
    """A share of rows, its 95 % interval by groups of users (low, high), and the rows it is of."""

    share: float
    low: float
    high: float
    rows: int


def share_of(inside: npt.NDArray[np.bool_], group: Codes) -> Share | None:
    """The share of a mask [N]; Wilson's interval, with the rows that count for as many as the groups make of them.

    None without rows.
    """
    rows = len(inside)
    if not rows:
        return None
    counts = counts_of(inside.astype(np.intp), group, 2)
    share = float(inside.mean())
    size = counts.sum(axis=1)
    used = max(int((size > 0).sum()), 2)
    spread = float(np.square(counts[:, 1] - share * size).sum()) / rows**2 * used / (used - 1)
    free = share * (1 - share) / rows
    effective = rows / max(spread / free, 1.0) if free > 0 else float(min(rows, 10 * used))
    low, high = wilson(share * effective, effective)
    return Share(share, low, high, rows)
