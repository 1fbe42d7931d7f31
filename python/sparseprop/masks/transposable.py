"""Transposable N:M masks: at most n of every m inputs and of every m outputs, so the transpose is N:M too."""

from dataclasses import dataclass
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from sparseprop import _native
from sparseprop.errors import SparsePropError
from sparseprop.masks._enumerate import enumerate_tiles
from sparseprop.masks._layout import (
    NativeArgs,
    Tail,
    as_planes,
    check_mask,
    check_scores,
    check_tail,
    check_tile,
    empty_mask,
    from_tiles,
    regions,
    to_tiles,
)
from sparseprop.masks._linprog import linprog_tiles
from sparseprop.masks._tsenor import tsenor_tiles
from sparseprop.masks.pattern import check_pattern

__all__ = ["DualCertificate", "transposable_nm_mask"]

Method = Literal["exact", "greedy", "greedy_fill", "enumerate", "tsenor", "linprog"]
_NATIVE = ("exact", "greedy", "greedy_fill")


@dataclass(frozen=True)
class DualCertificate:
    """Potentials that prove a mask optimal: kept => score >= row + col, not kept => score <= row + col.

    ``row`` and ``col``: float64 (groups, tile rows, tile columns, kernel positions, m).

    >>> import torch
    >>> scores = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    >>> mask, certificate = transposable_nm_mask(scores, 1, 2, return_duals=True)
    >>> certificate.violation(scores, mask), certificate.bound(scores, 1)
    (0.0, 5.0)
    """

    row: Tensor
    col: Tensor

    def _sums(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        groups, m = self.row.shape[0], self.row.shape[-1]
        tiles = to_tiles(as_planes(scores.detach().double().cpu(), groups, what="scores"), (m, m))
        return tiles, self.row.reshape(-1, m, 1) + self.col.reshape(-1, 1, m)

    def violation(self, scores: Tensor, mask: Tensor) -> float:
        """By how much a condition fails at worst; 0 up to rounding proves ``mask`` optimal for ``scores``."""
        tiles, sums = self._sums(scores)
        keep = to_tiles(
            as_planes(check_mask(mask).cpu(), self.row.shape[0]), (tiles.shape[1], tiles.shape[2])
        )
        return float(torch.where(keep, sums - tiles, tiles - sums).clamp_min(0.0).amax())

    def bound(self, scores: Tensor, n: int) -> float:
        """The dual value: no mask with n per row and column of each tile can keep more than this."""
        tiles, sums = self._sums(scores)
        return float(n * (self.row.sum() + self.col.sum()) + (tiles - sums).clamp_min(0.0).sum())


@overload
def transposable_nm_mask(
    scores: Tensor,
    n: int,
    m: int,
    *,
    method: Method = ...,
    exact_count: bool = ...,
    tail: Tail = ...,
    groups: int = ...,
    return_duals: Literal[False] = ...,
) -> Tensor: ...
@overload
def transposable_nm_mask(
    scores: Tensor,
    n: int,
    m: int,
    *,
    method: Method = ...,
    exact_count: bool = ...,
    tail: Tail = ...,
    groups: int = ...,
    return_duals: Literal[True],
) -> tuple[Tensor, DualCertificate]: ...
def transposable_nm_mask(
    scores: Tensor,
    n: int,
    m: int,
    *,
    method: Method = "exact",
    exact_count: bool = True,
    tail: Tail = "pad",
    groups: int = 1,
    return_duals: bool = False,
) -> Tensor | tuple[Tensor, DualCertificate]:
    """Keep ``n`` per row and per column of every ``m`` x ``m`` tile of the (out, in) plane, heaviest in sum.

    ``scores``: a Linear (out, in) or Conv (out, in/groups, *kernel) weight's scores, finite and >= 0; any
    float dtype and memory format. Conv layers pass their ``groups``; tiles never straddle them. Returns a
    bool mask of the same shape; with ``return_duals`` also a `DualCertificate` (exact, whole tiles only).

    ``method``: ``"exact"`` (shortest augmenting paths, m <= 64); ``"greedy"`` (heaviest first, at most n, at
    least half of the optimum); ``"greedy_fill"`` (completed to exactly n); ``"enumerate"`` (exact, m <= 4);
    ``"tsenor"`` (entropic transport in torch, on any device); ``"linprog"`` (exact, scipy, slow: an oracle).
    ``exact_count=False`` (exact and linprog) asks for at most n, which may keep slightly more mass.
    ``tail`` for incomplete edge tiles: ``"pad"`` keeps at most n per row and column, optimally (greedily
    under the greedy methods); ``"dense"`` keeps them whole; ``"error"`` refuses them. Ties are broken the
    same way every time, whatever the number of threads or, but for linprog, the rest of the weight.

    Raises SparsePropError for NaN, inf, negative or integer scores, options that do not go together, and
    layers smaller than one tile. Hubara et al., "Accelerated Sparse Neural Training" (arXiv 2102.08124), for
    the masks and the 2-approximation; arXiv 2505.23949 for TSENOR.

    >>> import torch
    >>> scores = torch.tensor([[4, 3, 2, 1], [0, 0, 0.5, 0.5], [1, 2, 3, 4], [10, 2, 1, 5]])
    >>> transposable_nm_mask(scores, 2, 4).int()
    tensor([[1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1],
            [1, 0, 0, 1]], dtype=torch.int32)
    """
    _check_options(n, m, method, exact_count, tail)
    scores = check_scores(scores)
    planes = as_planes(scores, groups, what="scores")
    _check_size(planes, m, tail, groups)
    if method in _NATIVE:
        planes = planes.cpu()
    mask, out = empty_mask(scores, groups)
    certificate = None
    if return_duals:
        certificate = _empty_certificate(planes, m, method, exact_count)
    if method in _NATIVE:
        _solve_native(planes, out, (n, m), method, not exact_count, tail, certificate)
    else:
        _solve_tiles(planes, out, (n, m), method, not exact_count, tail)
    mask = mask.to(scores.device)
    return mask if certificate is None else (mask, certificate)


def _check_options(n: int, m: int, method: str, exact_count: bool, tail: str) -> None:
    check_pattern(n, m)
    check_tail(tail)
    check_tile(m)
    if method not in get_args(Method):
        raise SparsePropError(f"method got {method!r}, wanted one of {', '.join(get_args(Method))}.")
    if method == "enumerate" and m > 4:
        raise SparsePropError(f"method 'enumerate' got m={m}, wanted m <= 4; use method='exact'.")
    if not exact_count and method not in ("exact", "linprog"):
        raise SparsePropError(
            f"exact_count=False got method {method!r}, wanted 'exact' or 'linprog'; leave it at True."
        )


def _check_size(planes: Tensor, m: int, tail: str, groups: int) -> None:
    rows, cols = planes.shape[1:3]
    if min(rows, cols) < m:
        raise SparsePropError(
            f"transposable_nm_mask got a layer of {rows} outputs and {cols} inputs per group "
            f"(groups={groups}), wanted at least m={m} of both; leave this layer out or use a smaller m."
        )
    if tail == "error" and (rows % m or cols % m):
        raise SparsePropError(
            f"transposable_nm_mask got {rows} outputs and {cols} inputs per group, wanted multiples of "
            f"m={m}; use tail='pad' or 'dense'."
        )


def _empty_certificate(planes: Tensor, m: int, method: str, exact_count: bool) -> DualCertificate:
    groups, rows, cols, positions = planes.shape
    if method != "exact" or not exact_count or rows % m or cols % m:
        raise SparsePropError(
            f"return_duals got method={method!r}, exact_count={exact_count} and planes of {rows} x {cols}, "
            f"wanted method='exact', exact_count=True and multiples of m={m}; crop the scores to whole tiles."
        )
    row, col = torch.zeros(2, groups, rows // m, cols // m, positions, m, dtype=torch.float64)
    return DualCertificate(row, col)


def _solve_native(
    planes: Tensor,
    out: Tensor,
    pattern: tuple[int, int],
    method: str,
    at_most: bool,
    tail: str,
    certificate: DualCertificate | None = None,
) -> None:
    args = NativeArgs.of(planes, out)
    _native.transposable_nm_mask(
        method,
        at_most,
        args.dtype,
        args.shape,
        *pattern,
        tail == "dense",
        args.scores,
        args.scores_strides,
        args.mask,
        args.mask_strides,
        certificate.row.data_ptr() if certificate else 0,
        certificate.col.data_ptr() if certificate else 0,
    )


def _solve_tiles(
    planes: Tensor, out: Tensor, pattern: tuple[int, int], method: str, at_most: bool, tail: str
) -> None:
    n, m = pattern
    for region in regions(planes, m):
        part, result = region.of(planes), region.of(out)
        if not region.whole and tail == "dense":
            result.fill_(True)
        elif method == "linprog":
            tiles = to_tiles(part, region.tile)
            from_tiles(linprog_tiles(tiles, n, at_most=at_most or not region.whole), result)
        elif region.whole:
            solve = enumerate_tiles if method == "enumerate" else tsenor_tiles
            from_tiles(solve(to_tiles(part, region.tile), n), result)
        else:
            _solve_native(part.cpu(), result, pattern, "exact", at_most, tail)
