"""Windows that slide over planes, of a max pooling or a depthwise convolution."""

from __future__ import annotations

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

    def output_size(self, size: torch.Size) -> Pair:
        """Height and width of the result, rounded down; negative if the window does not fit."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return height, width


def windows_fit(x: Tensor, spec: WindowSpec) -> bool:
    """Whether our kernels can slide such windows over `x`, (N, C, H, W)."""
    return (
        x.dim() == 4
        and kernels_may_read(x)
        and x.is_contiguous()
        and not x.is_neg()
        and x.numel() > 0
        and spec.dilation == (1, 1)  # else a window may lie in the padding alone
        and min(*spec.kernel, *spec.stride) > 0
        and all(0 <= 2 * p <= k for p, k in zip(spec.padding, spec.kernel, strict=True))
        and spec.kernel[0] * spec.kernel[1] <= 255
        and min(spec.output_size(x.shape[2:])) > 0
    )


def empty_result(x: Tensor, spec: WindowSpec) -> Tensor:
    """An empty tensor for the result."""
    return x.new_empty(*x.shape[:2], *spec.output_size(x.shape[2:]))


def native_windows(size: torch.Size, spec: WindowSpec) -> Any:
    """The windows on a tensor of that size as the kernels take them."""
    from sparseprop import _native as native

    sizes = tuple(size[2:]), spec.output_size(size[2:])
    return native.Windows(size[0] * size[1], *sizes, spec.kernel, spec.stride, spec.padding)
