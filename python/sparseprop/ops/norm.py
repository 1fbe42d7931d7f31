"""Batch norm with an addition and a ReLU, or a ReLU and max pooling, after it, in one pass where torch needs
three; any layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from sparseprop.ops.eligible import kernels_may_read
from sparseprop.ops.kept import keep, kept
from sparseprop.ops.owned import holders, is_own
from sparseprop.ops.pool import max_pool2d
from sparseprop.ops.stage import NormSpec, Stage, addresses, running_arguments
from sparseprop.ops.windows import empty_result, native_windows, windows_fit

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    spec: NormSpec,
    residual: Tensor | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """`max_pool(activation(batch_norm(x) + residual))`, each if asked for; updates running statistics.

    `x` is (N, C, ...), float32 or float64 on the CPU in one of the layouts contiguous, channels-last and
    batch-last, which the result keeps; all else is left to torch's functions. `residual` has its shape. A sum
    `in_place` has the shape and dtype of the norm's result, whatever those of the residual.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> batch_norm(x, (None, None), None, None, NormSpec(training=True, cap=torch.inf, eps=0.0))
    tensor([[0.],
            [1.]])
    """
    pool = spec.pool
    if pool is not None and (residual is not None or not windows_fit(x, pool) or x.shape[2:].numel() == 1):
        unpooled = replace(spec, pool=None)
        return max_pool2d(batch_norm(x, running, weight, bias, unpooled, residual, in_place=in_place), pool)
    shape = _shape(x)
    if shape is None or not _native(x, shape, running, weight, bias, spec, residual):
        return _by_torch(x, running, weight, bias, spec, residual, in_place)
    if residual is not None:
        residual = _like(residual, x)
    if torch.is_grad_enabled():
        return _apply(x, weight, bias, residual, running, spec, shape)
    return _forward(x, weight, bias, residual, running, spec, shape, None)[0]


def _by_torch(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    spec: NormSpec,
    residual: Tensor | None,
    in_place: bool,
) -> Tensor:
    y = functional.batch_norm(x, *running, weight, bias, spec.training, spec.momentum, spec.eps)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    if spec.cap:
        y = functional.relu(y) if spec.cap == torch.inf else functional.hardtanh(y, 0.0, spec.cap)
    return y if spec.pool is None else max_pool2d(y, spec.pool)


Shape = tuple[int, int, int]


def _shape(x: Tensor) -> Shape | None:
    """`x` as (outer, channels, inner) with contiguous inner, None if its layout is another one."""
    if x.dim() < 2 or not x.numel() or x.layout is not torch.strided:
        return None
    batch, channels = x.shape[:2]
    inner = x[0, 0].numel()
    if x.is_contiguous():
        return batch, channels, inner
    dims = tuple(range(2, x.dim()))
    if x.permute(0, *dims, 1).is_contiguous():
        return batch * inner, channels, 1
    return (1, channels, inner * batch) if x.permute(1, *dims, 0).is_contiguous() else None


def _native(
    x: Tensor, shape: Shape, running: Any, weight: Any, bias: Any, spec: NormSpec, residual: Any
) -> bool:
    """Whether the kernel can do what is asked for, and torch would not refuse it."""
    stage = Stage(running, weight, bias, spec)
    others = stage.tensors() if residual is None else [residual, *stage.tensors()]
    return (
        kernels_may_read(x, *others)
        and (residual is None or residual.shape == x.shape)
        and stage.fits(shape[1], shape[0] * shape[2])
    )


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in the layout of `x`."""
    if tensor.stride() == x.stride() and not tensor.is_neg():
        return tensor
    return torch.empty_like(x).copy_(tensor)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _forward(
    x: Tensor, weight: Any, bias: Any, residual: Any, running: Any, spec: NormSpec, shape: Shape, taps: Any
) -> tuple[Tensor, Tensor]:
    from sparseprop import _native as native

    x = x.resolve_neg()
    out = torch.empty_like(x) if spec.pool is None else empty_result(x, spec.pool)
    pool = None if spec.pool is None else native_windows(x.shape, spec.pool)
    known = x.new_empty(2, shape[1])  # mean and inverse deviation
    running_mean, running_variance, momentum = running_arguments(Stage(running, weight, bias, spec))
    native.norm_forward(
        x.dtype is torch.float64, *shape, spec.cap, spec.training, spec.eps,
        x.data_ptr(), _pointer(residual), _pointer(weight), _pointer(bias),
        *addresses(known), out.data_ptr(), running_mean, running_variance, momentum, pool, _pointer(taps),
    )  # fmt: skip
    return out, known


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, running: Any, spec: NormSpec, shape: Shape
    ) -> Tensor:
        needs = ctx.needs_input_grad[:4]
        taps = None  # where the maxima lie
        if spec.pool is not None and any(needs):
            taps = torch.empty(empty_result(x, spec.pool).shape, dtype=torch.uint8)
        out, known = _forward(x, weight, bias, residual, running, spec, shape, taps)
        signs = out if spec.cap and residual is not None and any(needs) else None
        # not the residual: the signs of the sum say as much, and often nobody else keeps it
        keep(ctx, x, weight, bias, known, signs, taps)
        ctx.spec, ctx.shape = spec, shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = is_own(holders(grad), grad)
        x, weight, bias, known, signs, taps = kept(ctx, grad)
        if torch.is_grad_enabled():
            running = (None, None) if ctx.spec.training else (known[0], known[1] ** -2 - ctx.spec.eps)
            return (*_differentiable(grad, ctx, (x, weight, bias), running, signs), None, None, None)
        given, grad = grad, _like(grad, x) if taps is None else grad.resolve_neg().contiguous()
        own = taps is None and (own or grad is not given)
        return (*_backward(grad, ctx, x, weight, bias, known, signs, taps, own), None, None, None)


def _differentiable(
    grad: Tensor, ctx: Any, tensors: tuple[Any, Any, Any], running: Any, signs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients by torch's functions, to be differentiated once more."""
    needs, spec = ctx.needs_input_grad[:4], ctx.spec
    if signs is not None:  # the activation of a sum with a residual, which is not kept
        passes = ~(signs <= 0) if spec.cap == torch.inf else ~(signs <= 0) & ~(signs >= spec.cap)
        grad, spec = grad * passes, replace(spec, cap=0.0)
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=False) if need]
    found: Any = iter(())
    if wanted:
        with torch.enable_grad():
            again = _by_torch(tensors[0], running, *tensors[1:], spec, None, False)
            found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
    return *(next(found) if need else None for need in needs[:3]), grad if needs[3] else None


_apply = cast("Callable[..., Tensor]", _BatchNorm.apply)


def _backward(
    grad: Tensor,
    ctx: Any,
    x: Tensor,
    weight: Any,
    bias: Any,
    known: Tensor,
    signs: Any,
    taps: Any,
    own: bool,  # grad may be overwritten
) -> tuple[Tensor | None, ...]:
    from sparseprop import _native as native

    for_x, for_weight, for_bias, for_residual = ctx.needs_input_grad[:4]
    spec: NormSpec = ctx.spec
    shape: Shape = ctx.shape
    x = x.resolve_neg()
    pool = None if spec.pool is None else native_windows(x.shape, spec.pool)
    # after a ReLU the gradient of the residual is that of the sum, which the kernel needs in any case
    masked = None if signs is None else grad if own else torch.empty_like(x)
    in_place = own and masked is None and not for_residual
    grad_x = None if not for_x else grad if in_place else torch.empty_like(x)
    grad_weight = x.new_empty(shape[1]) if for_weight else None
    grad_bias = x.new_empty(shape[1]) if for_bias else None
    native.norm_backward(
        x.dtype is torch.float64, *shape, spec.cap, spec.training, grad.data_ptr(), x.data_ptr(),
        _pointer(signs), _pointer(weight), _pointer(bias), *addresses(known),
        _pointer(grad_x), _pointer(masked), _pointer(grad_weight), _pointer(grad_bias), pool, _pointer(taps),
    )  # fmt: skip
    grad_residual = (masked if masked is not None else grad) if for_residual else None
    return grad_x, grad_weight, grad_bias, grad_residual
