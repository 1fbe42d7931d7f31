"""Sparsity patterns: which entries of a weight exist, row by row, in canonical order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparseprop.errors import SparsePropError

__all__ = ["SparsityPattern"]

_MAX_COLS = 2**31 - 1  # col_idx is int32


@dataclass(frozen=True, eq=False)
class SparsityPattern:
    """Positions of the non-zeros of a `rows x cols` weight: CSR without values, sorted inside each row.

    `row_ptr` is int64 of shape `(rows + 1,)`, `col_idx` int32 of shape `(nnz,)`; the order is that of
    `weight[mask]`. A convolution's weight counts as `(out_channels, everything else)`; `validate` it.

    >>> pattern = SparsityPattern.from_mask(torch.tensor([[True, False], [True, True]]))
    >>> pattern.nnz, pattern.row_ptr.tolist(), pattern.col_idx.tolist()
    (3, [0, 1, 3], [0, 0, 1])
    """

    rows: int
    cols: int
    row_ptr: Tensor
    col_idx: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> SparsityPattern:
        """The pattern of a bool mask of any shape, whose first dimension gives the rows."""
        if mask.dtype is not torch.bool:
            raise SparsePropError(f"mask must be a bool tensor, got {mask.dtype}; use e.g. `weight != 0`.")
        if mask.dim() < 1:
            raise SparsePropError("mask must have at least one dimension, got a scalar.")
        rows = mask.shape[0]
        cols = mask.numel() // rows if rows else _product(mask.shape[1:])
        return cls._from_flat(np.flatnonzero(mask.detach().reshape(-1).numpy()), rows, cols)

    @classmethod
    def from_coo(cls, row_idx: Tensor, col_idx: Tensor, shape: tuple[int, int]) -> SparsityPattern:
        """The pattern of integer coordinates in any order. Refuses duplicates and indices outside `shape`."""
        rows, cols = shape
        for name, index, bound in (("row_idx", row_idx, rows), ("col_idx", col_idx, cols)):
            _check_integer(name, index)
            _check_range(name, index, bound)
        if row_idx.shape != col_idx.shape:
            raise SparsePropError(
                f"row_idx and col_idx must be equally long, got {len(row_idx)} and {len(col_idx)}."
            )
        flat = np.sort((row_idx.to(torch.int64) * cols + col_idx.to(torch.int64)).numpy())
        if len(flat) > 1 and bool((flat[1:] == flat[:-1]).any()):
            raise SparsePropError("coordinates must be unique, got duplicate entries; coalesce them first.")
        return cls._from_flat(flat, rows, cols)

    @classmethod
    def from_csr(cls, row_ptr: Tensor, col_idx: Tensor, cols: int) -> SparsityPattern:
        """The pattern of CSR index arrays (any integer dtype), copied and validated."""
        _check_integer("row_ptr", row_ptr)
        _check_integer("col_idx", col_idx)
        if row_ptr.dim() != 1 or not len(row_ptr):
            raise SparsePropError(
                f"row_ptr must hold one entry more than there are rows, got shape {tuple(row_ptr.shape)}."
            )
        _check_range("col_idx", col_idx, min(cols, _MAX_COLS))
        pattern = cls(
            len(row_ptr) - 1, cols, row_ptr.to(torch.int64, copy=True), col_idx.to(torch.int32, copy=True)
        )
        pattern.validate()
        return pattern

    @classmethod
    def random(
        cls,
        rows: int,
        cols: int,
        *,
        density: float | None = None,
        nnz: int | None = None,
        generator: torch.Generator | None = None,
    ) -> SparsityPattern:
        """A uniformly random pattern with exactly `nnz` (or `round(density * rows * cols)`) entries.

        Memory follows the non-zeros, never `rows * cols`.

        >>> SparsityPattern.random(1_000_000, 1_000_000, nnz=5).nnz
        5
        """
        numel = rows * cols
        if (density is None) == (nnz is None):
            raise SparsePropError("give exactly one of density and nnz.")
        if density is not None:
            if not 0.0 <= density <= 1.0:
                raise SparsePropError(f"density must lie between 0 and 1, got {density}.")
            nnz = round(density * numel)
        if nnz is None or not 0 <= nnz <= numel:
            raise SparsePropError(f"nnz must lie between 0 and rows * cols = {numel}, got {nnz}.")
        if (
            2 * nnz > numel
        ):  # drawing what to leave out is the shorter job, and a byte per entry is affordable
            keep = np.ones(numel, dtype=np.bool_)
            keep[_sample(numel, numel - nnz, generator)] = False
            return cls._from_flat(np.flatnonzero(keep), rows, cols)
        return cls._from_flat(_sample(numel, nnz, generator), rows, cols)

    @classmethod
    def _from_flat(cls, flat: npt.NDArray[np.int64], rows: int, cols: int) -> SparsityPattern:
        if cols > _MAX_COLS:
            raise SparsePropError(f"a row may have at most {_MAX_COLS} columns, got {cols}.")
        starts = np.arange(rows + 1, dtype=np.int64) * cols
        row_ptr = np.searchsorted(flat, starts).astype(np.int64, copy=False)
        if cols:
            flat = flat % cols
        return cls(rows, cols, torch.from_numpy(row_ptr), torch.from_numpy(flat.astype(np.int32)))

    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return self.col_idx.numel()

    def row_nnz(self) -> Tensor:
        """Number of non-zeros in each row, int64, shape `(rows,)`."""
        return self.row_ptr.diff()

    def flat_index(self) -> Tensor:
        """Positions in the flattened weight, int64, shape `(nnz,)`, ascending."""
        if self.rows == 0:
            return torch.empty(0, dtype=torch.int64, device=self.row_ptr.device)
        row = torch.arange(self.rows, device=self.row_ptr.device)
        return torch.repeat_interleave(row * self.cols, self.row_ptr.diff()).add_(self.col_idx)

    def to_mask(self) -> Tensor:
        """The dense bool mask, shape `(rows, cols)`."""
        mask = torch.zeros(self.rows * self.cols, dtype=torch.bool, device=self.row_ptr.device)
        mask[self.flat_index()] = True
        return mask.view(self.rows, self.cols)

    def validate(self) -> None:
        """Raise SparsePropError, naming what is wrong, unless every index is fit for a kernel."""
        row_ptr, col_idx = self.row_ptr, self.col_idx
        for name, index, dtype in (("row_ptr", row_ptr, torch.int64), ("col_idx", col_idx, torch.int32)):
            if index.dtype is not dtype or index.dim() != 1:
                raise SparsePropError(
                    f"{name} must be a 1-D {dtype} tensor, got {index.dtype} of shape {tuple(index.shape)}."
                )
        if len(row_ptr) != self.rows + 1:
            raise SparsePropError(
                f"row_ptr must have rows + 1 = {self.rows + 1} entries, got {len(row_ptr)}."
            )
        if self.cols > _MAX_COLS:
            raise SparsePropError(f"a row may have at most {_MAX_COLS} columns, got {self.cols}.")
        first, last = int(row_ptr[0]), int(row_ptr[-1])
        if first != 0 or last != self.nnz or bool((row_ptr.diff() < 0).any()):
            raise SparsePropError(
                f"row_ptr must rise from 0 to nnz = {self.nnz}, got {first} to {last} or a fall between them."
            )
        _check_range("col_idx", col_idx, self.cols)
        self._check_order()

    def _check_order(self) -> None:
        steps = self.col_idx.diff()
        fine = steps > 0
        boundaries = self.row_ptr[1:-1]  # a step from one row into the next may go down
        boundaries = boundaries[(boundaries > 0) & (boundaries < self.nnz)]
        fine[boundaries - 1] = True
        if not bool(fine.all()):
            step = int(steps[~fine][0])
            problem = "a duplicate column" if step == 0 else "unsorted columns"
            raise SparsePropError(f"col_idx must strictly increase inside each row, got {problem} in a row.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsityPattern):
            return NotImplemented
        return (
            (self.rows, self.cols) == (other.rows, other.cols)
            and torch.equal(self.row_ptr, other.row_ptr)
            and torch.equal(self.col_idx, other.col_idx)
        )

    __hash__ = None  # type: ignore[assignment]  # tensors inside: equal by content, so not hashable


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _sample(high: int, count: int, generator: torch.Generator | None) -> npt.NDArray[np.int64]:
    """`count` distinct integers below `high`, sorted; `count` at most half of `high`."""
    chosen = np.empty(0, dtype=np.int64)
    while len(chosen) < count:
        missing = count - len(chosen)
        extra = missing + missing * missing // (2 * high) + missing // 64 + 16
        fresh = torch.randint(high, (extra,), dtype=torch.int64, generator=generator, device="cpu")
        chosen = np.concatenate([chosen, fresh.numpy()]) if len(chosen) else fresh.numpy()
        chosen.sort()
        distinct = np.ones(len(chosen), dtype=np.bool_)
        np.not_equal(chosen[1:], chosen[:-1], out=distinct[1:])
        chosen = chosen[distinct]
    surplus = len(chosen) - count
    if surplus:  # drop at random: dropping at the end would leave the last rows emptier
        drop = torch.randperm(len(chosen), generator=generator, device="cpu")[:surplus].numpy()
        chosen = np.delete(chosen, drop)
    return chosen


def _check_integer(name: str, index: Tensor) -> None:
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
        raise SparsePropError(
            f"{name} must be a 1-D int32 or int64 tensor, got {index.dtype} of shape {tuple(index.shape)}."
        )


def _check_range(name: str, index: Tensor, bound: int) -> None:
    if index.numel() == 0:
        return
    low, high = (int(edge) for edge in index.aminmax())
    if low < 0 or high >= bound:
        raise SparsePropError(
            f"{name} is out of range: entries must lie in [0, {bound}), got {low} to {high}."
        )
