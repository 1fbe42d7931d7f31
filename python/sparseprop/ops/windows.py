"""Windows that slide over planes, of a max pooling or a depthwise convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprop.ops.eligible import kernels_may_read

__all__ = ["Pair", "WindowSpec", "empty_result", "native_windows", "windows_fit"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class WindowSpec:
    """Options of 2-D windows, each (height, width)."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def output_size(self, size: Sequence[int]) -> Pair:
        """Height and width of the result, rounded down; negative if the window does not fit."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return height, width

    def fits(self, shape: torch.Size) -> bool:
        """Whether our kernels can slide such windows over a tensor (N, C, H, W)."""
        return (
            len(shape) == 4
            and shape.numel() > 0
            and self.dilation == (1, 1)  # else a window may lie in the padding alone
            and min(*self.kernel, *self.stride) > 0
            and all(0 <= 2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True))
            and self.kernel[0] * self.kernel[1] <= 255
            and min(self.output_size(shape[2:])) > 0
        )


def windows_fit(x: Tensor, spec: WindowSpec) -> bool:
    """Whether our kernels can slide such windows over `x`, (N, C, H, W)."""
    return kernels_may_read(x) and x.is_contiguous() and not x.is_neg() and spec.fits(x.shape)


def empty_result(x: Tensor, spec: WindowSpec) -> Tensor:
    """An empty tensor for the result."""
    return x.new_empty(*x.shape[:2], *spec.output_size(x.shape[2:]))


def native_windows(size: torch.Size, spec: WindowSpec) -> Any:
    """The windows on a tensor of that size as the kernels take them."""
    from sparseprop import _native as native

    sizes = tuple(size[2:]), spec.output_size(size[2:])
    return native.Windows(size[0] * size[1], *sizes, spec.kernel, spec.stride, spec.padding)
