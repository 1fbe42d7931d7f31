"""What every call into a sparse layer is checked for, whoever computes it."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from sparseprop.errors import SparsePropError
from sparseprop.geometry import Geometry
from sparseprop.ops.call import DTYPE_CODES

__all__ = ["checked_input"]


def checked_input(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, geometry: Geometry
) -> Tensor:
    """`x`, cast as autocast wants it, after all checks that do not need the indices' contents."""
    if x.is_nested or x.layout is not torch.strided:
        form = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise SparsePropError(f"sparse layers take strided tensors, got {form}; pad, or use `.to_dense()`.")
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu") and values.dtype is torch.float32:
        wanted = torch.get_autocast_dtype("cpu")
        if wanted is not torch.bfloat16:
            wanted = torch.float32
        if dtype is not wanted and dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = x.to(wanted)
        dtype = torch.float32 if x.dtype is wanted else dtype
    dims = x.dim()
    channels_fit = dims > 0 and x.shape[1 if geometry.dims else -1] == geometry.in_channels
    if (
        dtype is not values.dtype
        or dtype not in DTYPE_CODES
        or dtype is torch.bfloat16
        or not channels_fit
        or (geometry.dims and dims != geometry.dims + 2)
        or (index.dtype is not torch.uint8 and values.shape != index.shape)  # packed: known to the operator
        or (bias is not None and (bias.dtype is not values.dtype or bias.shape != (geometry.out_channels,)))
        or x.device != values.device
        or not (x.is_cpu or x.is_meta)
    ):
        _refuse(x, values, bias, index, geometry)
    return x


def _refuse(x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, geometry: Geometry) -> NoReturn:
    shape, channels = tuple(x.shape), geometry.in_channels
    if values.dtype not in (torch.float32, torch.float64):
        raise SparsePropError(
            f"sparse layers compute in float32 or float64, got weight values of {values.dtype}; use "
            "`.float()`, and torch.autocast for bfloat16 activations."
        )
    if x.device != values.device or not (x.is_cpu or x.is_meta):
        raise SparsePropError(
            f"sparse layers run on the CPU, got input on {x.device} and weight values on {values.device}; "
            "move both with `.to('cpu')`."
        )
    if x.dtype is not values.dtype:
        raise SparsePropError(
            f"input and weight values must have the same dtype, got {x.dtype} and {values.dtype}; cast the "
            f"input with `.to({values.dtype})` or use torch.autocast('cpu') for bfloat16."
        )
    if geometry.dims and x.dim() != geometry.dims + 2:
        raise SparsePropError(
            f"expected {geometry.dims + 1}-D (unbatched) or {geometry.dims + 2}-D input, got shape {shape}."
        )
    if x.dim() == 0 or x.shape[1 if geometry.dims else -1] != channels:
        form = f"(batch, {channels}, ...)" if geometry.dims else f"(..., {channels})"
        raise SparsePropError(f"expected {form} inputs, got shape {shape}.")
    if bias is not None and (bias.dtype is not values.dtype or bias.shape != (geometry.out_channels,)):
        raise SparsePropError(
            f"bias must have shape ({geometry.out_channels},) and dtype {values.dtype}, got "
            f"{tuple(bias.shape)} and {bias.dtype}."
        )
    raise SparsePropError(
        f"weight values must have one entry per column index, got shapes {tuple(values.shape)} and "
        f"{tuple(index.shape)}."
    )
