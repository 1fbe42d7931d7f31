"""Max pooling of planes: torch's results and gradients, by kernels that use the vector units."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from sparseprop.ops.kept import keep, kept
from sparseprop.ops.windows import WindowSpec, empty_result, native_windows, windows_fit

__all__ = ["max_pool2d"]


def max_pool2d(x: Tensor, spec: WindowSpec) -> Tensor:
    """`torch.nn.functional.max_pool2d` of `x`, shape (N, C, H, W).

    Contiguous float32 or float64 on the CPU, in windows of at most 255 elements without dilation, goes
    through our kernels, all else through torch's.

    >>> max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), WindowSpec((2, 2), (2, 2)))
    tensor([[[[ 5.,  7.],
              [13., 15.]]]])
    """
    if not windows_fit(x, spec):
        return functional.max_pool2d(x, spec.kernel, spec.stride, spec.padding, spec.dilation)
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _MaxPool.apply(x, spec))  # type: ignore[no-untyped-call]
    return _forward(x, spec, None)


def _forward(x: Tensor, spec: WindowSpec, taps: Tensor | None) -> Tensor:
    """The maxima; the number of each in its window goes to `taps`."""
    from sparseprop import _native as native

    out = empty_result(x, spec)
    wide, address = x.dtype is torch.float64, 0 if taps is None else taps.data_ptr()
    native.max_pool2d(wide, native_windows(x.shape, spec), x.data_ptr(), out.data_ptr(), address)
    return out


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: WindowSpec) -> Tensor:
        taps = torch.empty(empty_result(x, spec).shape, dtype=torch.uint8)
        out = _forward(x, spec, taps)
        keep(ctx, taps)
        ctx.size, ctx.spec = x.shape, spec
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (taps,) = kept(ctx, grad)
        if torch.is_grad_enabled():
            return _differentiable(grad, taps, ctx.size, ctx.spec), None
        from sparseprop import _native as native

        grad = grad.resolve_neg().contiguous()
        grad_x = grad.new_empty(ctx.size)
        pool = native_windows(ctx.size, ctx.spec)
        wide = grad.dtype is torch.float64
        native.max_pool2d_backward(wide, pool, grad.data_ptr(), taps.data_ptr(), grad_x.data_ptr())
        return grad_x, None


def _differentiable(grad: Tensor, taps: Tensor, size: torch.Size, spec: WindowSpec) -> Tensor:
    """The gradient by torch's function, to be differentiated once more."""
    height, width = (
        torch.arange(n).mul(s).sub(p)
        for n, s, p in zip(taps.shape[2:], spec.stride, spec.padding, strict=True)
    )
    taps = taps.long()
    index = (height[:, None] + taps // spec.kernel[1]) * size[3] + width + taps % spec.kernel[1]
    options = (spec.kernel, spec.stride, spec.padding, spec.dilation, False)
    shaped = grad.new_empty(1).expand(size)  # of its input torch reads the size alone
    return cast(Tensor, torch.ops.aten.max_pool2d_with_indices_backward(grad, shaped, *options, index))
