"""What every mask producer does at its border: checks of scores and masks, and their view as planes.

A weight (Co, Ci/g, *kernel) is viewed as planes (g, Co/g, Ci/g, positions): rows are outputs, columns are
inputs, one plane per group and kernel position. A Linear weight is one plane.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sparseprop.errors import SparsePropError

Tail = Literal["pad", "dense", "error"]

_FLOATS = {torch.float32: 0, torch.float64: 1}
_REDUCED = (torch.bfloat16, torch.float16)
_MAX_TILE = 64


def check_values(scores: Tensor, *, what: str = "scores") -> Tensor:
    """Detached, float32 or float64, finite and non-negative; any shape."""
    if not isinstance(scores, Tensor):
        raise SparsePropError(f"{what} got {type(scores).__name__}, wanted a tensor.")
    if scores.layout != torch.strided:
        raise SparsePropError(
            f"{what} got layout {scores.layout}, wanted a strided tensor; call .to_dense()."
        )
    if scores.dtype not in _FLOATS and scores.dtype not in _REDUCED:
        raise SparsePropError(
            f"{what} got {scores.dtype}, wanted float32, float64, bfloat16 or float16; use .float()."
        )
    if scores.is_meta:
        raise SparsePropError(f"{what} got a tensor on the meta device, wanted one with values.")
    scores = scores.detach().resolve_neg()  # kernels read the memory as it is
    if scores.dtype in _REDUCED:
        scores = scores.float()
    if scores.numel():
        low, high = (x.item() for x in torch.aminmax(scores))
        if math.isnan(low) or math.isinf(low) or math.isinf(high):
            raise SparsePropError(f"{what} got NaN or inf, wanted finite values; repair the tensor first.")
        if low < 0:
            raise SparsePropError(
                f"{what} got negative values (lowest {low:g}), wanted values >= 0 such as weight.abs()."
            )
    return scores


def check_scores(scores: Tensor) -> Tensor:
    """Like check_values, for the scores of a Linear or Conv weight."""
    scores = check_values(scores)
    _check_dims(scores, "scores")
    return scores


def check_mask(mask: Tensor, what: str = "mask") -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise SparsePropError(f"{what} got {got}, wanted a bool tensor; of a weight, pass weight != 0.")
    return mask


def check_tail(tail: str) -> None:
    if tail not in get_args(Tail):
        raise SparsePropError(f"tail got {tail!r}, wanted one of {', '.join(get_args(Tail))}.")


def check_tile(m: int) -> None:
    if m > _MAX_TILE:
        raise SparsePropError(f"m got {m}, wanted at most {_MAX_TILE}.")


def _check_dims(tensor: Tensor, what: str) -> None:
    if not 2 <= tensor.dim() <= 5:
        raise SparsePropError(
            f"{what} got shape {tuple(tensor.shape)}, wanted a Linear (out, in) or "
            "Conv (out, in/groups, *kernel) weight of 2 to 5 dimensions."
        )


def _plane_shape(tensor: Tensor, groups: int) -> tuple[int, int, int, int]:
    if groups < 1 or tensor.shape[0] % groups:
        raise SparsePropError(
            f"groups got {groups} for {tensor.shape[0]} outputs, wanted a divisor; pass the layer's groups."
        )
    return groups, tensor.shape[0] // groups, tensor.shape[1], math.prod(tensor.shape[2:])


def as_planes(tensor: Tensor, groups: int = 1, *, what: str = "mask") -> Tensor:
    """(groups, rows, columns, positions); a view where the strides allow one."""
    _check_dims(tensor, what)
    return tensor.reshape(_plane_shape(tensor, groups))


def empty_mask(scores: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """A CPU mask for the scores, in their memory format, and its planes (a view)."""
    shape = _plane_shape(scores, groups)
    mask = torch.empty_like(scores, dtype=torch.bool, device="cpu")
    try:
        return mask, mask.view(shape)
    except RuntimeError:  # the kernel dimensions do not collapse in these strides
        mask = torch.empty(scores.shape, dtype=torch.bool)
        return mask, mask.view(shape)


@dataclass(frozen=True)
class NativeArgs:
    """What every native producer takes after the pattern; the tensors must outlive the call."""

    dtype: int
    shape: tuple[int, ...]
    scores: int
    scores_strides: tuple[int, ...]
    mask: int
    mask_strides: tuple[int, ...]

    @classmethod
    def of(cls, scores: Tensor, mask: Tensor) -> "NativeArgs":
        return cls(
            _FLOATS[scores.dtype],
            tuple(scores.shape),
            scores.data_ptr(),
            scores.stride(),
            mask.data_ptr(),
            mask.stride(),
        )


@dataclass(frozen=True)
class Region:
    """A part of the planes that whole tiles of one size cover."""

    rows: slice
    cols: slice
    tile: tuple[int, int]
    whole: bool

    def of(self, planes: Tensor) -> Tensor:
        return planes[:, self.rows, self.cols]


def regions(planes: Tensor, m: int) -> Iterator[Region]:
    """The m x m tiles, then the incomplete ones: below, at the right, and in the corner."""
    rows, cols = planes.shape[1:3]
    cuts = [(slice(0, size - size % m), slice(size - size % m, size)) for size in (rows, cols)]
    for row_part in cuts[0]:
        for col_part in cuts[1]:
            tile = (min(m, row_part.stop - row_part.start), min(m, col_part.stop - col_part.start))
            if min(tile) > 0:
                yield Region(row_part, col_part, tile, tile == (m, m))


def to_tiles(planes: Tensor, tile: tuple[int, int]) -> Tensor:
    """(tiles, *tile) in the order (group, tile row, tile column, position)."""
    groups, rows, cols, positions = planes.shape
    split = planes.reshape(groups, rows // tile[0], tile[0], cols // tile[1], tile[1], positions)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(-1, *tile)


def from_tiles(tiles: Tensor, planes: Tensor) -> None:
    """Write tiles made by to_tiles back into planes."""
    groups, rows, cols, positions = planes.shape
    height, width = tiles.shape[1:]
    split = tiles.reshape(groups, rows // height, cols // width, positions, height, width)
    planes.copy_(split.permute(0, 1, 4, 2, 5, 3).reshape(planes.shape))
