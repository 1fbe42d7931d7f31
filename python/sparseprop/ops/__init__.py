"""The contractions as functions of tensors: checked at this border, differentiable, eager or traced."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional

from sparseprop.geometry import Geometry
from sparseprop.ops import eager, traced
from sparseprop.ops.call import DTYPE_CODES, Call
from sparseprop.ops.check import checked_input
from sparseprop.ops.eligible import PLAIN_TYPES, kernels_may_read, refuse_differentiation, watched
from sparseprop.ops.finish import Finish
from sparseprop.ops.operator import Operator, operator_for

__all__ = [
    "Finish",
    "Operator",
    "apply",
    "apply_again",
    "apply_finished",
    "apply_shared",
    "operator_for",
    "sparse_conv",
    "sparse_linear",
]


def sparse_linear(
    x: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, in_features: int, bias: Tensor | None = None
) -> Tensor:
    """`x @ W.T + bias` for the sparse `W` (out x in) with these values, row pointers and column indices.

    `x` is (..., in_features), of the dtype of `values` (float32 or float64) and of any strides; the result is
    feature-major if `x` is, else row-major. Differentiable any number of times in `x`, `values` and `bias`.

    >>> values, row_ptr = torch.ones(2), torch.tensor([0, 1, 2])
    >>> sparse_linear(torch.eye(2), values, row_ptr, torch.tensor([1, 0], dtype=torch.int32), 2)
    tensor([[0., 1.],
            [1., 0.]])
    """
    geometry = Geometry.linear(in_features, row_ptr.numel() - 1)
    return apply(x, values, bias, row_ptr, col_idx, geometry, None)


def sparse_conv(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    geometry: Geometry,
    bias: Tensor | None = None,
) -> Tensor:
    """The convolution of `x`, shape (N, C, ...) or (C, ...), with a sparse weight.

    `col_idx` counts inside a flattened weight row (in_channels / groups, *kernel_size). A channels-last or
    batch-last `x` gives a result in that layout.

    >>> geometry = Geometry.conv(1, 1, 1, 2)
    >>> values, row_ptr, col_idx = torch.ones(1), torch.tensor([0, 1]), torch.tensor([1], dtype=torch.int32)
    >>> sparse_conv(torch.arange(3.0).view(1, 1, 3), values, row_ptr, col_idx, geometry)
    tensor([[[1., 2.]]])
    """
    return apply(x, values, bias, row_ptr, col_idx, geometry, None)


def apply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    head: Tensor,
    index: Tensor,
    geometry: Geometry,
    operator: Operator | None,
) -> Tensor:
    """Any sparse layer on any input.

    `head` and `index` are the pattern: row pointers and column indices, or (N, M) and the bits of a packed
    pattern. `operator` is one made from them, if at hand.
    """
    if geometry.dims:
        if x.dim() == geometry.dims + 1:
            batch = x.unsqueeze(0)
            return apply(batch, values, bias, head, index, geometry, operator).squeeze(0)
        if geometry.padding_mode != "zeros":
            x = functional.pad(x, geometry.functional_padding(), mode=geometry.padding_mode)
            geometry = geometry.without_padding()
    x = checked_input(x, values, bias, index, geometry)
    followed = watched()
    if followed and not is_compiling():
        refuse_differentiation()
    plain = type(x) in PLAIN_TYPES and type(values) in PLAIN_TYPES and x.is_cpu
    if not plain or followed:
        result: Tensor = traced.contract(x, values, bias, head, index, geometry.to_ints())
        return result
    if operator is None:
        operator = operator_for(geometry, head, index)
    operator.check_values(values)
    return _run(operator, operator.call_for(x), x, values, bias)


def apply_again(operator: Operator, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor | None:
    """The short way for an eager call like an earlier one; None if this is not known to be one.

    Not for layers that pad their input first: the operator knows padded shapes only.
    """
    call = _recalled(operator, x, values, bias)
    return None if call is None else _run(operator, call, x, values, bias)


def apply_shared(
    operator: Operator, x: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The output, and an `x` for other readers, whose gradients become part of the layer's input gradient.

    None if the kernels cannot do it. Not for layers that pad first.
    """
    if forward_ad._current_level >= 0:
        return None
    call = _recalled(operator, x, values, bias)
    if call is None and _may_call(operator, x, values):
        operator.call_for(x)  # shared from the first call on: sums are rounded in another order than apart
        call = _recalled(operator, x, values, bias)
    if call is None:
        return None
    return eager.contract_shared(x, values, bias, operator, call)


def _may_call(operator: Operator, x: Tensor, values: Tensor) -> bool:
    """Whether the dtype and channels of an input are right, and the layer does not unsqueeze it first."""
    dims = operator.geometry.dims
    return (
        x.dtype is values.dtype
        and x.dtype in DTYPE_CODES
        and x.is_cpu
        and (x.dim() == dims + 2 if dims else x.dim() > 0)
        and x.shape[1 if dims else -1] == operator.geometry.in_channels
    )


def _recalled(operator: Operator, x: Tensor, values: Tensor, bias: Tensor | None) -> Call | None:
    call = operator.recall(x)
    if (
        call is None
        or values.dtype is not call.wide
        or values.shape != operator.values_shape
        or (bias is not None and (bias.dtype is not call.wide or bias.shape != call.bias_shape))
        or not (x.is_cpu and values.is_cpu)
        or type(x) not in PLAIN_TYPES
        or type(values) not in PLAIN_TYPES
        or x.dtype is torch.bfloat16
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    return call


def apply_finished(
    operator: Operator, x: Tensor, values: Tensor, bias: Tensor | None, finish: Finish
) -> Tensor | None:
    """`finish` of the output of a layer with images, for no gradient; None if the kernels cannot do it.

    Not for layers that pad their input first.
    """
    geometry = operator.geometry
    if (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or x.dim() != geometry.dims + 2
        or x.shape[1] != geometry.in_channels
        or not kernels_may_read(x, values, *([] if bias is None else [bias]))
        or (bias is not None and bias.shape != (geometry.out_channels,))
    ):
        return None
    operator.check_values(values)
    call = operator.call_for(x)
    if call.trivial or not finish.fits(x, call.out_shape):
        return None
    return operator.forward(call, x, values, bias, finish)


def _run(operator: Operator, call: Call, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    # forward-mode tangents are invisible to the kernels: let autograd refuse them rather than drop them
    if (
        torch.is_grad_enabled()
        and (x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad))
    ) or forward_ad._current_level >= 0:
        return eager.contract(x, values, bias, operator, call)
    return operator.forward(call, x, values, bias)
