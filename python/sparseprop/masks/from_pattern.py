"""The mask of a named N:M pattern, and why a weight may be too small for it."""

from collections.abc import Sequence

from torch import Tensor

from sparseprop.masks._layout import Tail
from sparseprop.masks.nm import nm_mask
from sparseprop.masks.pattern import NMPattern
from sparseprop.masks.transposable import Method, transposable_nm_mask

__all__ = ["misfit", "pattern_mask"]


def pattern_mask(
    scores: Tensor, pattern: str | NMPattern, *, groups: int = 1, tail: Tail = "pad", method: Method = "exact"
) -> Tensor:
    """The best mask of ``pattern`` for ``scores``: `nm_mask`, or `transposable_nm_mask` for "4:8T" and such.

    ``scores``, ``groups``, ``tail``: as in those two; ``method`` matters to transposable patterns only.
    Raises SparsePropError as they do.

    >>> import torch
    >>> pattern_mask(torch.tensor([[3.0, 1.0, 4.0, 1.0]]), "2:4").tolist()
    [[True, False, True, False]]
    """
    pattern = NMPattern.parse(pattern)
    if pattern.transposable:
        return transposable_nm_mask(scores, pattern.n, pattern.m, method=method, tail=tail, groups=groups)
    return nm_mask(scores, pattern.n, pattern.m, tail=tail)


def misfit(shape: Sequence[int], pattern: NMPattern, *, groups: int = 1) -> str | None:
    """Why a weight of this shape (Co, Ci/groups, *kernel) has no whole group or tile, None if it has one.

    >>> misfit((64, 3, 7, 7), NMPattern(2, 4))
    '3 inputs per group, fewer than 4'
    """
    if pattern.fits(shape, groups=groups):
        return None
    if shape[1] < pattern.m:
        return f"{shape[1]} inputs per group, fewer than {pattern.m}"
    return f"{shape[0] // groups} outputs per group, fewer than {pattern.m}"
