"""How activations lie in memory, as five element strides (batch, channel, depth, height, width).

Three are handed on: plain (contiguous), channels-last, and batch-last (physical C, D, H, W, N;
for Linear: feature-major). Sizes and strides are lifted to three spatial dimensions; a Linear layer has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "BATCH_LAST",
    "CHANNELS_LAST",
    "PLAIN",
    "collapse",
    "empty_conv",
    "empty_linear",
    "layout_of",
    "lift",
]

PLAIN, CHANNELS_LAST, BATCH_LAST = range(3)
Five = tuple[int, int, int, int, int]


def lift(sizes: Sequence[int], fill: int) -> tuple[int, int, int]:
    """Up to three numbers as exactly three, filled up in front."""
    return (*(fill,) * (3 - len(sizes)), *sizes)  # type: ignore[return-value]


def layout_of(x: Tensor) -> int:
    """The layout to answer a convolution's input (N, C, ...) with."""
    if x.is_contiguous():
        return PLAIN
    stride = x.stride()
    if stride[1] == 1 and x.shape[1] > 1:
        return CHANNELS_LAST
    return BATCH_LAST if stride[0] == 1 and x.shape[0] > 1 else PLAIN


def conv_strides(batch: int, channels: int, size: Sequence[int], layout: int) -> Five:
    """Strides of a dense tensor in a layout; `size` is lifted."""
    _, height, width = size
    plane = size[0] * height * width
    if layout == PLAIN:
        return (channels * plane, plane, height * width, width, 1)
    if layout == CHANNELS_LAST:
        return (plane * channels, 1, height * width * channels, width * channels, channels)
    return (1, plane * batch, height * width * batch, width * batch, batch)


def empty_conv(shape: Sequence[int], size: Sequence[int], layout: int, like: Tensor) -> tuple[Tensor, Five]:
    """An uninitialised (N, C, ...) tensor in a layout, and its strides; `size` is the lifted spatial size."""
    strides = conv_strides(shape[0], shape[1], size, layout)
    if layout == PLAIN:
        return like.new_empty(shape), strides
    return like.new_empty_strided(shape, (*strides[:2], *strides[7 - len(shape) :])), strides


def empty_linear(shape: Sequence[int], batch: int, layout: int, like: Tensor) -> tuple[Tensor, Five]:
    """An uninitialised (..., features) tensor, plain or feature-major, and its strides with one batch."""
    if layout == PLAIN:
        return like.new_empty(shape), (shape[-1], 1, 0, 0, 0)
    strides, step = [batch], 1
    for length in reversed(shape[:-1]):
        strides.append(step)
        step *= length
    return like.new_empty_strided(shape, strides[::-1]), (1, batch, 0, 0, 0)


def collapse(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Leading dimensions as one (length, stride) where memory allows it, else None."""
    length, step = 1, 0
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if length == 1:
            step = stride
        elif stride != length * step:
            return None
        length *= size
    return length, step


def plain(x: Tensor) -> Tensor:
    """A copy that is contiguous and free of lazy negation."""
    return torch.clone(x, memory_format=torch.contiguous_format)
