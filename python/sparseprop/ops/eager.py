"""Autograd of the contractions in eager mode: forward and backward, each differentiable through the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from sparseprop.ops.call import Call
from sparseprop.ops.kept import require_kept
from sparseprop.ops.layout import sum_channels
from sparseprop.ops.operator import Operator
from sparseprop.ops.owned import holders, is_own
from sparseprop.ops.quick import quick_apply

__all__ = ["contract", "contract_backward", "contract_shared"]


class Forward(Function):
    """out = contract(x, values) + bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, operator: Operator, call: Call
    ) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, values if needs[0] else None)
        ctx.operator, ctx.call = operator, call
        return operator.forward(call, x, values, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            return (*ctx.operator.backward(ctx.call, grad, x, values, needs), None, None)
        grad_x = grad_values = grad_bias = None
        if needs[0] or needs[1]:
            grad_x, grad_values = contract_backward(grad, x, values, ctx.operator, ctx.call, needs)
        if needs[2]:
            grad_bias = sum_channels(grad, ctx.operator.geometry.dims)
        return grad_x, grad_values, grad_bias, None, None


class Shared(Function):
    """(contract(x, values) + bias, x) for an `x` that has other readers, which take the second in its place.

    Their gradient comes through here then, and is added where the input gradient is stored rather than by
    autograd in a pass of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, operator: Operator, call: Call
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return Forward.forward(ctx, x, values, bias, operator, call), x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, added: Tensor | None) -> tuple[Tensor | None, ...]:
        own = added is not None and is_own(holders(added), added)
        if grad is None:
            return added, None, None, None, None
        if added is None:
            return Forward.backward(ctx, grad)
        if torch.is_grad_enabled():
            grad_x, *others = Forward.backward(ctx, grad)
            return added if grad_x is None else grad_x + added, *others
        x, values = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        return (*ctx.operator.backward(ctx.call, grad, x, values, needs, added, own), None, None)


class Backward(Function):
    """(grad_x, grad_values) of a contraction, bilinear like the contraction itself."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor | None,
        values: Tensor | None,
        operator: Operator,
        call: Call,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(grad, x, values)
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.call = operator, call
        return operator.backward(call, grad, x, values, (needs[0], needs[1], False))[:2]

    @staticmethod
    def backward(
        ctx: Any, grad_of_x: Tensor | None, grad_of_values: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad, x, values = ctx.saved_tensors
        operator, call, needs = ctx.operator, ctx.call, ctx.needs_input_grad
        d_grad = d_x = d_values = None
        if grad_of_x is not None:
            inner = operator.call_for(grad_of_x)
            if needs[0]:
                require_kept("weight values", values, operator.values_shape, inner.wide)
                d_grad = contract(grad_of_x, values, None, operator, inner)
            if needs[2]:
                _, d_values = contract_backward(grad, grad_of_x, None, operator, inner, (False, True, False))
        if grad_of_values is not None:
            if needs[0]:
                require_kept("input", x, call.in_shape, grad.dtype)
                term = contract(x, grad_of_values, None, operator, operator.call_for(x))
                d_grad = term if d_grad is None else d_grad + term
            if needs[1]:
                d_x, _ = contract_backward(grad, None, grad_of_values, operator, call, (True, False, False))
        return d_grad, d_x, d_values, None, None, None


contract = cast("Callable[[Tensor, Tensor, Tensor | None, Operator, Call], Tensor]", quick_apply(Forward))
contract_shared = cast("Callable[..., tuple[Tensor, Tensor]]", quick_apply(Shared))
contract_backward = cast("Callable[..., tuple[Tensor | None, Tensor | None]]", quick_apply(Backward))
