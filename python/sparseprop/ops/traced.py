"""The same contractions as registered torch operators, for `torch.compile`, `torch.export` and fake tensors.

The pattern reaches them as tensors and the geometry as numbers; `Geometry.to_ints` gives those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseprop.geometry import Geometry
from sparseprop.ops.layout import empty, layout_of, sum_channels
from sparseprop.ops.operator import operator_for

__all__ = ["contract", "contract_backward"]


@torch.library.custom_op("sparseprop::contract", mutates_args=())
def contract(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    head: Tensor,
    index: Tensor,
    geometry: Sequence[int],
) -> Tensor:
    """Output of a sparse layer for an input of shape (N, C, ...), or (..., features) for Linear."""
    operator = operator_for(Geometry.from_ints(geometry), head, index)
    operator.check_values(values)
    return operator.forward(operator.call_for(x), x, values, bias)


@torch.library.custom_op("sparseprop::contract_backward", mutates_args=())
def contract_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    head: Tensor,
    index: Tensor,
    geometry: Sequence[int],
    needs_input: bool,
    needs_values: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients for input and values; one that is not needed comes back empty."""
    operator = operator_for(Geometry.from_ints(geometry), head, index)
    operator.check_values(values)
    needs = (needs_input, needs_values, False)
    grad_x, grad_values, _ = operator.backward(operator.call_for(x), grad, x, values, needs)
    nothing = grad.new_empty(0)
    return (nothing if grad_x is None else grad_x), (
        values.new_empty(0) if grad_values is None else grad_values
    )


@contract.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    head: Tensor,
    index: Tensor,
    geometry: Sequence[int],
) -> Tensor:
    layer = Geometry.from_ints(geometry)
    if layer.dims:
        size = layer.output_size(x.shape[2:])
        return empty((x.shape[0], layer.out_channels, *size), layout_of(x, layer.dims), layer.dims, x)
    return empty((*x.shape[:-1], layer.out_channels), layout_of(x, 0), 0, x)


@contract_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    head: Tensor,
    index: Tensor,
    geometry: Sequence[int],
    needs_input: bool,
    needs_values: bool,
) -> tuple[Tensor, Tensor]:
    dims = Geometry.from_ints(geometry).dims
    grad_x = empty(x.shape, layout_of(x, dims), dims, grad) if needs_input else grad.new_empty(0)
    wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
    return grad_x, values.new_empty(values.shape if needs_values else (0,), dtype=wide)


def _save_contract(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, head, index, geometry = inputs
    ctx.save_for_backward(x, values, head, index)
    ctx.geometry = geometry


def _differentiate_contract(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, head, index = ctx.saved_tensors
    needs_x, needs_values, needs_bias, *_ = ctx.needs_input_grad
    grad_x = grad_values = None
    if needs_x or needs_values:
        grad_x, grad_values = contract_backward(
            grad, x, values, head, index, ctx.geometry, needs_x, needs_values
        )
    grad_bias = sum_channels(grad, Geometry.from_ints(ctx.geometry).dims) if needs_bias else None
    return grad_x if needs_x else None, grad_values if needs_values else None, grad_bias, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.geometry, ctx.needs_input, ctx.needs_values = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, grad_of_x: Tensor, grad_of_values: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, values, head, index = ctx.saved_tensors
    pattern = (head, index, ctx.geometry)
    d_grad = d_x = d_values = None
    if ctx.needs_input:
        d_grad = contract(grad_of_x, values, None, *pattern)
        _, d_values = contract_backward(grad, grad_of_x, values, *pattern, False, True)
    if ctx.needs_values:
        term = contract(x, grad_of_values, None, *pattern)
        d_grad = term if d_grad is None else d_grad + term
        d_x, _ = contract_backward(grad, x, grad_of_values, *pattern, True, False)
    return d_grad, d_x, d_values, None, None, None, None, None


contract.register_autograd(_differentiate_contract, setup_context=_save_contract)
contract_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
