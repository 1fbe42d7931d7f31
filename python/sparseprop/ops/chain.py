"""Depthwise convolution between batch norms, channel by channel, while planes are in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from sparseprop.ops.eligible import kernels_may_read
from sparseprop.ops.kept import keep, kept
from sparseprop.ops.norm import batch_norm
from sparseprop.ops.owned import holders, is_own
from sparseprop.ops.stage import Stage, addresses, running_arguments
from sparseprop.ops.windows import WindowSpec, empty_result, native_windows, windows_fit

__all__ = ["chain", "kernels_may_chain"]


def chain(x: Tensor, first: Stage | None, weight: Tensor, windows: WindowSpec, second: Stage) -> Tensor:
    """`second(depthwise(first(x)))`, with the batch norms' activations; updates running statistics.

    Saves `x` alone for the backward pass, which computes the rest again.

    Args:
        x: (N, C, H, W), as `kernels_may_chain` wants it.
        first: the batch norm in front of the convolution, or None.
        weight: of the convolution, (C, 1, height, width).
        windows: its kernel, stride and padding.
        second: the batch norm behind it.

    >>> from sparseprop.ops.stage import NormSpec
    >>> stage = Stage((None, None), None, None, NormSpec(training=True, eps=0.0))
    >>> x, weight = torch.tensor([[[[1.0, 3.0]]]]), torch.ones(1, 1, 1, 1)
    >>> chain(x, None, weight, WindowSpec((1, 1), (1, 1)), stage)
    tensor([[[[-1.,  1.]]]])
    """
    if torch.is_grad_enabled():
        params = (None, None) if first is None else (first.weight, first.bias)
        return _apply(x, *params, weight, second.weight, second.bias, first, windows, second)
    return _forward(x, first, weight, windows, second)[0]


def kernels_may_chain(
    x: Tensor, first: Stage | None, weight: Tensor, windows: WindowSpec, second: Stage
) -> bool:
    """Whether our kernels can do it, and torch would not refuse it."""
    stages = [second] if first is None else [first, second]
    tensors = [weight, *(tensor for stage in stages for tensor in stage.tensors())]
    if not (windows_fit(x, windows) and kernels_may_read(x, *tensors)):
        return False
    images, channels, *size = x.shape
    return (
        not torch.is_autocast_enabled("cpu")
        and weight.shape == (channels, 1, *windows.kernel)
        and weight.is_contiguous()
        and (first is None or first.fits(channels, images * math.prod(size)))
        and second.fits(channels, images * math.prod(windows.output_size(x.shape[2:])))
    )


def _native_stage(
    stage: Stage,
    known: Tensor,
    running: tuple[int, int, float] = (0, 0, 0.0),
    grads: tuple[Any, Any] = (None, None),
) -> Any:
    from sparseprop import _native as native

    tensors = (stage.weight, stage.bias, *grads)
    gamma, beta, *written = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    spec, (mean, variance, momentum) = stage.spec, running
    return native.Stage(
        spec.training, spec.eps, spec.cap, momentum, gamma, beta, *addresses(known), mean, variance, *written
    )


def _forward(
    x: Tensor, first: Stage | None, weight: Tensor, windows: WindowSpec, second: Stage
) -> tuple[Tensor, list[Tensor]]:
    from sparseprop import _native as native

    out, channels = empty_result(x, windows), x.shape[1]
    stages = [second] if first is None else [first, second]
    known = [x.new_empty(2, channels) for _ in stages]  # means and inverse deviations
    given = [
        _native_stage(stage, found, running_arguments(stage))
        for stage, found in zip(stages, known, strict=True)
    ]
    native.chain_forward(
        x.dtype is torch.float64, native_windows(x.shape, windows), channels, x.data_ptr(),
        None if first is None else given[0], weight.data_ptr(), given[-1], out.data_ptr(),
    )  # fmt: skip
    return out, known


class _Chain(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Any, bias1: Any, weight: Tensor, weight2: Any, bias2: Any,
        first: Stage | None, windows: WindowSpec, second: Stage,
    ) -> Tensor:  # fmt: skip
        out, known = _forward(x, first, weight, windows, second)
        keep(ctx, x, weight1, bias1, weight, weight2, bias2, *known)
        ctx.specs = None if first is None else first.spec, windows, second.spec
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = is_own(holders(grad), grad)
        x, weight1, bias1, weight, weight2, bias2, *known = kept(ctx, grad)
        first_spec, windows, second_spec = ctx.specs
        first = None if first_spec is None else Stage((None, None), weight1, bias1, first_spec)
        second = Stage((None, None), weight2, bias2, second_spec)
        if torch.is_grad_enabled():
            first = None if first is None else _again(first, known[0])
            second = _again(second, known[-1])
            found = _differentiable(grad, ctx.needs_input_grad, x, first, weight, windows, second)
        else:
            given, grad = grad, grad.resolve_neg().contiguous()
            own = own or grad is not given
            found = _backward(grad, ctx.needs_input_grad, x, first, weight, windows, second, known, own)
        return (*found, None, None, None)


_apply = cast("Callable[..., Tensor]", _Chain.apply)


def _again(stage: Stage, known: Tensor) -> Stage:
    """The stage of the forward pass, which leaves running statistics alone."""
    mean, inv_std = known
    running = (None, None) if stage.spec.training else (mean, inv_std**-2 - stage.spec.eps)
    return replace(stage, running=running, spec=replace(stage.spec, momentum=0.0))


def _backward(
    grad: Tensor,
    needs: Any,
    x: Tensor,
    first: Stage | None,
    weight: Tensor,
    windows: WindowSpec,
    second: Stage,
    known: list[Tensor],
    own: bool,  # grad may be overwritten
) -> tuple[Tensor | None, ...]:
    from sparseprop import _native as native

    on_the_way = any(needs[:3])  # to the first batch norm's parameters
    grad_x = None if not on_the_way else grad if own and grad.shape == x.shape else torch.empty_like(x)
    per_channel = [x.new_empty(x.shape[1]) if needs[i] else None for i in (1, 2, 4, 5)]
    grad_weight = torch.empty_like(weight) if needs[3] else None
    native.chain_backward(
        x.dtype is torch.float64, native_windows(x.shape, windows), x.shape[1], x.data_ptr(),
        None if first is None else _native_stage(first, known[0], grads=(per_channel[0], per_channel[1])),
        weight.data_ptr(), _native_stage(second, known[-1], grads=(per_channel[2], per_channel[3])),
        grad.data_ptr(), 0 if grad_x is None else grad_x.data_ptr(),
        0 if grad_weight is None else grad_weight.data_ptr(),
    )  # fmt: skip
    return grad_x if needs[0] else None, *per_channel[:2], grad_weight, *per_channel[2:]


def _differentiable(
    grad: Tensor,
    needs: Any,
    x: Tensor,
    first: Stage | None,
    weight: Tensor,
    windows: WindowSpec,
    second: Stage,
) -> tuple[Tensor | None, ...]:
    """The gradients by torch's functions, to be differentiated once more."""
    params = (None, None) if first is None else (first.weight, first.bias)
    tensors = (x, *params, weight, second.weight, second.bias)
    wanted = [cast(Tensor, tensor) for tensor, need in zip(tensors, needs, strict=False) if need]
    with torch.enable_grad():
        y = x if first is None else _normed(x, first)
        y = functional.conv2d(y, weight, None, windows.stride, windows.padding, 1, x.shape[1])
        found = iter(torch.autograd.grad(_normed(y, second), wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs[:6])


def _normed(x: Tensor, stage: Stage) -> Tensor:
    return batch_norm(x, stage.running, stage.weight, stage.bias, stage.spec)
