"""What a call into the kernels needs beside addresses, worked out once for each kind of input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprop.geometry import Geometry
from sparseprop.ops.layout import Five, dense_strides, five_strides, layout_of, lift

__all__ = ["DTYPE_CODES", "Call", "new_call"]

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


@dataclass(frozen=True, slots=True)
class Call:
    """All about a call that follows from the shape, strides and dtype of its input."""

    code: int  # of the dtype
    wide: torch.dtype  # of values and bias
    bias_shape: tuple[int]
    batch: int
    in_size: tuple[int, int, int]
    padding: tuple[int, int, int]
    out_size: tuple[int, int, int]
    in_shape: torch.Size
    in_memory: tuple[int, ...]  # torch's strides of the input
    out_shape: torch.Size
    in_strides: Five | None  # None: the input's leading dimensions are uneven, copy it
    layout: int  # of output and input gradient
    out_memory: tuple[int, ...]  # torch's strides of the output
    out_strides: Five
    grad_memory: tuple[int, ...]  # and of the input gradient
    grad_strides: Five
    trivial: bool  # nothing to multiply


def new_call(geometry: Geometry, nnz: int, x: Tensor) -> Call:
    """The call for an input of right dtype and channels; refuses one smaller than the kernel."""
    dims, shape = geometry.dims, x.shape
    size = shape[2:] if dims else ()
    out_size = geometry.output_size(size)
    out_shape = torch.Size(
        (shape[0], geometry.out_channels, *out_size) if dims else (*shape[:-1], geometry.out_channels)
    )
    layout = layout_of(x, dims)
    out_memory, grad_memory = (dense_strides(each, layout, dims) for each in (out_shape, shape))
    out_strides, grad_strides = (
        five_strides(out_shape, out_memory, dims),
        five_strides(shape, grad_memory, dims),
    )
    assert out_strides is not None
    assert grad_strides is not None
    return Call(
        code=DTYPE_CODES[x.dtype],
        wide=torch.float64 if x.dtype is torch.float64 else torch.float32,
        bias_shape=(geometry.out_channels,),
        batch=shape[0] if dims else math.prod(shape[:-1]),
        in_size=lift(size, 1),
        padding=lift([left for left, _ in geometry.padding], 0),
        out_size=lift(out_size, 1),
        in_shape=shape,
        in_memory=x.stride(),
        out_shape=out_shape,
        in_strides=five_strides(shape, x.stride(), dims),
        layout=layout,
        out_memory=out_memory,
        out_strides=out_strides,
        grad_memory=grad_memory,
        grad_strides=grad_strides,
        trivial=not nnz or not math.prod(out_shape),
    )
