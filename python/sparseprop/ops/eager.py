"""Autograd of the contractions in eager mode: forward and backward, each differentiable through the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from sparseprop.ops.layout import PLAIN
from sparseprop.ops.operator import Operator

__all__ = ["contract", "contract_backward"]


class Forward(Function):
    """out = contract(x, values) + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, operator: Operator) -> Tensor:
        needs_x, needs_values, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_values else None, values if needs_x else None)
        ctx.operator, ctx.shape = operator, x.shape
        ctx.layout = PLAIN if x.is_contiguous() else operator.view(x).layout
        return operator.forward(x, values, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            return (*ctx.operator.backward(grad, x, values, ctx.shape, ctx.layout, needs), None)
        grad_x = grad_values = grad_bias = None
        if needs[0] or needs[1]:
            grad_x, grad_values = contract_backward(
                grad, x, values, ctx.operator, ctx.shape, ctx.layout, needs
            )
        if needs[2]:
            grad_bias = ctx.operator.sum_channels(grad)
        return grad_x, grad_values, grad_bias, None


class Backward(Function):
    """(grad_x, grad_values) of a contraction, bilinear like the contraction itself."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor | None,
        values: Tensor | None,
        operator: Operator,
        shape: torch.Size,
        layout: int,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(grad, x, values)
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.shape, ctx.layout = operator, shape, layout
        return operator.backward(grad, x, values, shape, layout, (needs[0], needs[1], False))[:2]

    @staticmethod
    def backward(
        ctx: Any, grad_of_x: Tensor | None, grad_of_values: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad, x, values = ctx.saved_tensors
        operator, needs = ctx.operator, ctx.needs_input_grad
        d_grad = d_x = d_values = None
        if grad_of_x is not None:
            if needs[0]:
                d_grad = contract(grad_of_x, values, None, operator)
            if needs[2]:
                wanted = (False, True, False)
                _, d_values = contract_backward(
                    grad, grad_of_x, None, operator, ctx.shape, ctx.layout, wanted
                )
        if grad_of_values is not None:
            if needs[0]:
                term = contract(x, grad_of_values, None, operator)
                d_grad = term if d_grad is None else d_grad + term
            if needs[1]:
                wanted = (True, False, False)
                d_x, _ = contract_backward(
                    grad, None, grad_of_values, operator, ctx.shape, ctx.layout, wanted
                )
        return d_grad, d_x, d_values, None, None, None, None


contract = cast("Callable[[Tensor, Tensor, Tensor | None, Operator], Tensor]", Forward.apply)
contract_backward = cast("Callable[..., tuple[Tensor | None, Tensor | None]]", Backward.apply)
