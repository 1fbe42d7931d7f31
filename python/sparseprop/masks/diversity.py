"""Mask diversity: how many different masks a pattern admits."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from sparseprop.errors import SparsePropError
from sparseprop.masks.pattern import NMPattern
from sparseprop.masks.unstructured import count_of

__all__ = ["Diversity", "mask_diversity", "unstructured_diversity"]

Formula = Literal["exact", "hubara"]
_STATES_LIMIT = 16  # beyond this side, and more than 2 kept or pruned, the count takes hours


@dataclass(frozen=True)
class Diversity:
    """``count`` of one group (row-wise), tile (transposable) or tensor; log2 and bits of the whole tensor.

    >>> Diversity(count=6, log2_count=2.584962500721156, bits_per_weight=0.646240625180289).count
    6
    """

    count: int
    log2_count: float
    bits_per_weight: float


def mask_diversity(
    pattern: NMPattern | str,
    numel: int | None = None,
    *,
    transposable: bool | None = None,
    formula: Formula = "exact",
) -> Diversity:
    """The number of masks that keep exactly n of every m (inputs, and outputs if transposable).

    ``pattern``: such as ``"2:4"``, ``"4:8T"``; ``transposable`` overrides it. ``numel``: the weights of the
    tensor, by default one group or tile; a multiple of it. ``formula="hubara"`` is the product
    m!(m-1)!...(m-n+1)! given for transposable tiles by Hubara et al. (arXiv 2102.08124), which counts too
    many unless n = 1; ``"exact"`` counts tiles by dynamic programming over the columns' remaining demands.
    Raises SparsePropError for exact counts beyond m = 16 with n and m - n above 2, and a numel that
    does not fit.

    >>> mask_diversity("2:4T").count, mask_diversity("2:4T", formula="hubara").count
    (90, 144)
    """
    pattern = NMPattern.parse(pattern)
    if formula not in get_args(Formula):
        raise SparsePropError(f"formula got {formula!r}, wanted one of {', '.join(get_args(Formula))}.")
    tiled = pattern.transposable if transposable is None else transposable
    n, m = pattern.n, pattern.m
    unit = m * m if tiled else m
    if not tiled:
        count = math.comb(m, n)
    elif formula == "hubara":
        count = math.prod(math.factorial(m - k) for k in range(n))
    else:
        count = _count_tiles(min(n, m - n), m)
    numel = unit if numel is None else numel
    if numel <= 0 or numel % unit:
        raise SparsePropError(f"numel got {numel}, wanted a positive multiple of {unit} for {pattern}.")
    log2_count = numel // unit * math.log2(count)
    return Diversity(count, log2_count, log2_count / numel)


def unstructured_diversity(numel: int, density: float) -> Diversity:
    """The number of masks with exactly round(density * numel) kept, C(numel, kept).

    >>> round(unstructured_diversity(64, 0.5).log2_count, 2)
    60.67
    """
    count = math.comb(numel, count_of(density, numel))
    log2_count = math.log2(count)
    return Diversity(count, log2_count, log2_count / max(numel, 1))


@cache
def _count_tiles(n: int, m: int) -> int:
    """0/1 matrices of side m with n per row and column.

    Rows are placed one by one. All that matters of them is how many columns still want how much, so a state
    is a histogram of demands. Half the rows suffice: what they leave is what the other half, mirrored, fills.
    """
    if n == 0:
        return 1
    if m > _STATES_LIMIT and n > 2:
        raise SparsePropError(
            f"mask_diversity got a transposable tile of {n}:{m} (or its complement), wanted m <= "
            f"{_STATES_LIMIT} or n <= 2 for an exact count; use formula='hubara'."
        )
    upper = _after_rows(n, m, m // 2)
    lower = upper if m % 2 == 0 else _after_rows(n, m, m - m // 2)
    return sum(
        ways * lower.get(tuple(reversed(state)), 0) // _arrangements(state, m)
        for state, ways in upper.items()
    )


def _after_rows(n: int, m: int, rows: int) -> dict[tuple[int, ...], int]:
    """How many ways lead to each histogram (columns by entries so far, 0..n), columns being distinct."""
    states = {(m, *([0] * n)): 1}
    for _ in range(rows):
        following: defaultdict[tuple[int, ...], int] = defaultdict(int)
        for state, ways in states.items():
            for after, choices in _place_row(state, n):
                following[after] += ways * choices
        states = dict(following)
    return states


def _place_row(state: tuple[int, ...], n: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Every way to give one more entry to n columns: the new histogram and the number of choices."""
    # (histogram so far, entries that rose to this level, entries left to give, choices)
    partial: list[tuple[tuple[int, ...], int, int, int]] = [((), 0, n, 1)]
    above = sum(state[:-1])
    for size in state[:-1]:
        above -= size
        partial = [
            ((*after, size - taken + risen), taken, left - taken, choices * math.comb(size, taken))
            for after, risen, left, choices in partial
            for taken in range(max(0, left - above), min(left, size) + 1)
        ]
    for after, risen, _, choices in partial:
        yield (*after, state[-1] + risen), choices


def _arrangements(state: tuple[int, ...], m: int) -> int:
    """Distinct assignments of a histogram's demands to m columns."""
    return math.factorial(m) // math.prod(math.factorial(size) for size in state)
