"""Modules around a depthwise convolution, run as one chain where that can be done."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sparseprop.nn.hooks import hooked, hooks_everywhere
from sparseprop.nn.norm import NativeNorm, norm_behind
from sparseprop.ops.chain import chain, kernels_may_chain
from sparseprop.ops.windows import WindowSpec

__all__ = ["depthwise_chain", "depthwise_windows", "is_plain_depthwise"]


def is_plain_depthwise(module: nn.Module | None) -> bool:
    """Whether it is a depthwise `nn.Conv2d`: one output a channel, no bias, no dilation, padded by zeros.

    >>> is_plain_depthwise(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))
    True
    """
    return (
        isinstance(module, nn.Conv2d)
        and type(module) is nn.Conv2d
        and module.groups == module.in_channels == module.out_channels
        and module.bias is None
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def depthwise_windows(conv: nn.Conv2d) -> WindowSpec:
    """The windows of a plain depthwise convolution."""
    return WindowSpec(*cast("list[tuple[int, int]]", [conv.kernel_size, conv.stride, conv.padding]))


def depthwise_chain(
    x: Tensor,
    layer: nn.Module | None,
    first: nn.Module | None,
    first_cap: float,
    conv: nn.Module,
    second: nn.Module,
    second_cap: float,
) -> Tensor:
    """`second(conv(first(layer(x))))`, with the activations of the batch norms `first` and `second`.

    `layer` and `first` may be None. As one chain for contiguous inputs, if no hook would miss a call.

    >>> conv, norm = nn.Conv2d(2, 2, 1, groups=2, bias=False), nn.BatchNorm2d(2)
    >>> depthwise_chain(torch.ones(1, 2, 3, 3), None, None, 0.0, conv, norm, 0.0).shape
    torch.Size([1, 2, 3, 3])
    """
    if not (x.is_contiguous() and _may_skip_calls(first, conv, second)):
        if first is not None:
            x = _call(first, x, first_cap) if layer is None else norm_behind(first, layer, x, None, first_cap)
        return _call(second, conv(x), second_cap)
    if layer is not None:
        x = layer(x)
    norms = [cast(NativeNorm, norm) for norm in (first, second) if norm is not None]
    before = None if first is None else norms[0].stage(first_cap)
    behind = norms[-1].stage(second_cap)
    conv = cast(nn.Conv2d, conv)
    windows = depthwise_windows(conv)
    if not kernels_may_chain(x, before, conv.weight, windows, behind):
        return _call(second, conv(x if first is None else _call(first, x, first_cap)), second_cap)
    for norm in norms:
        norm.count()
    return chain(x, before, conv.weight, windows, behind)


def _may_skip_calls(first: nn.Module | None, conv: nn.Module, second: nn.Module) -> bool:
    norms = [norm for norm in (first, second) if norm is not None]
    return (
        is_plain_depthwise(conv)
        and all(isinstance(norm, NativeNorm) for norm in norms)
        and not torch.compiler.is_compiling()
        and not any(map(hooked, (conv, *norms)))
        and not hooks_everywhere()
    )


def _call(norm: nn.Module, x: Tensor, cap: float) -> Tensor:
    return cast(Tensor, norm(x, cap=cap) if isinstance(norm, NativeNorm) else _torchs(norm(x), cap))


def _torchs(x: Tensor, cap: float) -> Tensor:
    return x.clamp(0.0, cap) if cap else x
