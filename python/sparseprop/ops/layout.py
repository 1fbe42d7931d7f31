"""How activations lie in memory, as five element strides (batch, channel, depth, height, width).

Three layouts are handed on: plain (contiguous), channels-last, and batch-last (physical C, D, H, W, N;
for Linear: feature-major). Sizes and strides are lifted to three spatial dimensions; a Linear layer has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "BATCH_LAST",
    "CHANNELS_LAST",
    "PLAIN",
    "dense_strides",
    "empty",
    "five_strides",
    "layout_of",
    "lift",
    "plain",
    "sum_channels",
]

PLAIN, CHANNELS_LAST, BATCH_LAST = range(3)
Five = tuple[int, int, int, int, int]


def lift(sizes: Sequence[int], fill: int) -> tuple[int, int, int]:
    """Up to three numbers as exactly three, filled up in front."""
    return (*(fill,) * (3 - len(sizes)), *sizes)  # type: ignore[return-value]


def five_strides(shape: Sequence[int], strides: Sequence[int], dims: int) -> Five | None:
    """Strides lifted to five; None if the leading dimensions of a Linear input are not evenly spaced."""
    if dims:
        return (strides[0], strides[1], *lift(strides[2:], 0))
    spacing = _collapse(shape, strides)
    return None if spacing is None else (spacing, strides[-1], 0, 0, 0)


def layout_of(x: Tensor, dims: int) -> int:
    """The layout to answer an input with; Linear (`dims` 0) knows no channels-last."""
    if x.is_contiguous():
        return PLAIN
    shape, strides = x.shape, x.stride()
    if dims:
        if strides[1] == 1 and shape[1] > 1:
            return CHANNELS_LAST
        return BATCH_LAST if strides[0] == 1 and shape[0] > 1 else PLAIN
    feature_major = _collapse(shape, strides) == 1 and math.prod(shape[:-1]) > 1 and strides[-1] != 1
    return BATCH_LAST if feature_major else PLAIN


def dense_strides(shape: Sequence[int], layout: int, dims: int) -> tuple[int, ...]:
    """Strides of a tensor of this shape without gaps, in a layout."""
    order = list(range(len(shape)))  # outermost first
    if layout == CHANNELS_LAST:
        order = [0, *order[2:], 1]
    elif layout == BATCH_LAST:
        order = [*order[1:], 0] if dims else [order[-1], *order[:-1]]
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return tuple(strides)


def empty(shape: Sequence[int], layout: int, dims: int, like: Tensor) -> Tensor:
    """An uninitialised tensor in a layout."""
    if layout == PLAIN:
        return like.new_empty(shape)
    return like.new_empty_strided(shape, dense_strides(shape, layout, dims))


def plain(x: Tensor) -> Tensor:
    """A contiguous copy."""
    return torch.clone(x, memory_format=torch.contiguous_format)


def sum_channels(grad: Tensor, dims: int) -> Tensor:
    """Sum over all dimensions but the channels', in the dtype of a bias."""
    kept = 1 if dims else grad.dim() - 1
    wide = torch.float32 if grad.dtype is torch.bfloat16 else grad.dtype
    others = [dim for dim in range(grad.dim()) if dim != kept]
    return grad.sum(others, dtype=wide) if others else grad.to(wide)


def _collapse(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of all leading dimensions taken as one, or None if they are not evenly spaced."""
    length, step = 1, 0
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if length == 1:
            step = stride
        elif stride != length * step:
            return None
        length *= size
    return step
