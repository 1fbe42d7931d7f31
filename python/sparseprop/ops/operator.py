"""An operator: one pattern with one geometry, lowered for the kernels, and the calls into them."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparseprop import backend
from sparseprop.errors import SparsePropError
from sparseprop.geometry import Geometry
from sparseprop.ops.layout import PLAIN, Five, dense_strides, five_strides, layout_of, lift, plain
from sparseprop.pattern import SparsityPattern

__all__ = ["Call", "Operator", "operator_for"]

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_MOST_CALLS = 256  # remembered per operator; more shapes than that do not repeat
_ABSENT = (0, 0, 0, 0, 0)
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class Call:
    """All about a call that follows from the shape, strides and dtype of its input."""

    code: int  # of the dtype
    wide: torch.dtype  # of values and bias
    channels: int  # of the output
    batch: int
    in_size: tuple[int, int, int]
    padding: tuple[int, int, int]
    out_size: tuple[int, int, int]
    in_shape: torch.Size
    out_shape: torch.Size
    in_strides: Five | None  # None: the input's leading dimensions are uneven, copy it
    layout: int  # of output and input gradient
    out_memory: tuple[int, ...]  # torch's strides of the output
    out_strides: Five
    grad_memory: tuple[int, ...]  # and of the input gradient
    grad_strides: Five
    trivial: bool  # nothing to multiply


class Operator:
    """Belongs to the index tensors as they are; if `matches` denies that, make a new one."""

    def __init__(self, geometry: Geometry, row_ptr: Tensor, col_idx: Tensor) -> None:
        self.geometry = geometry
        self.nnz = col_idx.numel()
        self.contraction: Any = _lower(geometry, row_ptr, col_idx)
        self._backend = backend.Contraction
        self._row_ptr, self._col_idx = weakref.ref(row_ptr), weakref.ref(col_idx)
        self._versions = (_version(row_ptr), _version(col_idx))
        self._calls: dict[Any, Call] = {}

    def matches(self, row_ptr: Tensor, col_idx: Tensor) -> bool:
        """False once an index tensor was replaced or written to, or the backend was switched."""
        return (
            self._col_idx() is col_idx
            and self._row_ptr() is row_ptr
            and self._backend is backend.Contraction
            and self._versions == (_version(row_ptr), _version(col_idx))
        )

    def require_unchanged(self) -> None:
        """Refuse a backward pass whose pattern was overwritten since; kernels may borrow it."""
        row_ptr, col_idx = self._row_ptr(), self._col_idx()
        if (row_ptr is not None and _version(row_ptr) != self._versions[0]) or (
            col_idx is not None and _version(col_idx) != self._versions[1]
        ):
            raise SparsePropError(
                "the sparsity pattern was changed between forward and backward; run backward before changing "
                "it (by load_state_dict, for example), or run forward again."
            )

    def recall(self, x: Tensor) -> Call | None:
        """The call for an input like one seen before, whose dtype and channels were right."""
        return self._calls.get((x.shape, x.stride(), x.dtype))

    def call_for(self, x: Tensor) -> Call:
        """The call for an input of right dtype and channels, worked out once per shape and strides."""
        call = self.recall(x)
        if call is None:
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            call = self._calls[x.shape, x.stride(), x.dtype] = self._new_call(x)
        return call

    def _new_call(self, x: Tensor) -> Call:
        geometry, dims, shape = self.geometry, self.geometry.dims, x.shape
        size = shape[2:] if dims else ()
        out_size = geometry.output_size(size)
        out_shape = (
            (shape[0], geometry.out_channels, *out_size) if dims else (*shape[:-1], geometry.out_channels)
        )
        layout = layout_of(x, dims)
        memory = [dense_strides(each, layout, dims) for each in (out_shape, shape)]
        fives = [
            five_strides(each, strides, dims)
            for each, strides in zip((out_shape, shape), memory, strict=True)
        ]
        assert fives[0] is not None
        assert fives[1] is not None
        return Call(
            code=DTYPE_CODES[x.dtype],
            wide=torch.float64 if x.dtype is torch.float64 else torch.float32,
            channels=geometry.out_channels,
            batch=shape[0] if dims else math.prod(shape[:-1]),
            in_size=lift(size, 1),
            padding=lift([left for left, _ in geometry.padding], 0),
            out_size=lift(out_size, 1),
            in_shape=shape,
            out_shape=torch.Size(out_shape),
            in_strides=five_strides(shape, x.stride(), dims),
            layout=layout,
            out_memory=memory[0],
            out_strides=fives[0],
            grad_memory=memory[1],
            grad_strides=fives[1],
            trivial=not self.nnz or not math.prod(out_shape),
        )

    def forward(self, call: Call, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Output for checked tensors, in the layout of `x`; knows nothing of autograd."""
        if call.layout == PLAIN:
            out = x.new_empty(call.out_shape)
        else:
            out = x.new_empty_strided(call.out_shape, call.out_memory)
        if call.trivial:
            return out.zero_() if bias is None else out.copy_(bias.view(-1, *(1,) * self.geometry.dims))
        x_strides = call.in_strides
        if x_strides is None or x.is_neg():
            x, x_strides = plain(x), self._plain_strides(call)
        if not values.is_contiguous():
            values = values.contiguous()
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        self.contraction.forward(
            call.code,
            call.batch,
            call.in_size,
            call.padding,
            call.out_size,
            x.data_ptr(),
            x_strides,
            values.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            call.out_strides,
        )
        return out

    def backward(
        self,
        call: Call,
        grad: Tensor,
        x: Tensor | None,
        values: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> Gradients:
        """Gradients for (input, values, bias) where `needs` says so, else None; `grad` may have any strides.

        `x` may be None if no values gradient is needed, `values` if no input gradient is.
        """
        self.require_unchanged()
        grad_x = grad_values = grad_bias = None
        if needs[0]:
            if call.layout == PLAIN:
                grad_x = grad.new_empty(call.in_shape)
            else:
                grad_x = grad.new_empty_strided(call.in_shape, call.grad_memory)
        if needs[1]:
            grad_values = torch.empty(self.nnz, dtype=call.wide)
        if needs[2]:
            grad_bias = torch.empty(self.geometry.out_channels, dtype=call.wide)
        if call.trivial:
            return self._trivial_gradients(grad, grad_x, grad_values, grad_bias)
        grad_strides: Five | None = call.out_strides
        if grad.stride() != call.out_memory or grad.is_neg():
            grad, grad_strides = self._readable(grad)
        x_strides: Five | None = _ABSENT
        if x is not None and needs[1]:
            x_strides = call.in_strides
            if x_strides is None or x.is_neg():
                x, x_strides = plain(x), self._plain_strides(call)
        if values is not None and not values.is_contiguous():
            values = values.contiguous()
        self.contraction.backward(
            call.code,
            call.batch,
            call.in_size,
            call.padding,
            call.out_size,
            x.data_ptr() if x is not None and needs[1] else 0,
            x_strides,
            0 if values is None else values.data_ptr(),
            grad.data_ptr(),
            grad_strides,
            0 if grad_x is None else grad_x.data_ptr(),
            call.grad_strides,
            0 if grad_values is None else grad_values.data_ptr(),
            0 if grad_bias is None else grad_bias.data_ptr(),
        )
        return grad_x, grad_values, grad_bias

    def _readable(self, tensor: Tensor) -> tuple[Tensor, Five]:
        """A tensor of any strides, copied if the kernels could not read it, and its strides."""
        dims = self.geometry.dims
        strides = None if tensor.is_neg() else five_strides(tensor.shape, tensor.stride(), dims)
        if strides is None:
            tensor = plain(tensor)
            strides = five_strides(tensor.shape, tensor.stride(), dims)
        assert strides is not None
        return tensor, strides

    def _plain_strides(self, call: Call) -> Five | None:
        dims = self.geometry.dims
        return five_strides(call.in_shape, dense_strides(call.in_shape, PLAIN, dims), dims)

    def _trivial_gradients(
        self, grad: Tensor, grad_x: Tensor | None, grad_values: Tensor | None, grad_bias: Tensor | None
    ) -> Gradients:
        for tensor in (grad_x, grad_values):
            if tensor is not None:
                tensor.zero_()
        if grad_bias is not None:
            grad_bias = sum_channels(grad, self.geometry.dims)
        return grad_x, grad_values, grad_bias


def sum_channels(grad: Tensor, dims: int) -> Tensor:
    """Sum over all dimensions but the channels', in the dtype of a bias."""
    kept = 1 if dims else grad.dim() - 1
    wide = torch.float32 if grad.dtype is torch.bfloat16 else grad.dtype
    others = [dim for dim in range(grad.dim()) if dim != kept]
    return grad.sum(others, dtype=wide) if others else grad.to(wide)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors keep no count


def _lower(geometry: Geometry, row_ptr: Tensor, col_idx: Tensor) -> Any:
    if row_ptr.device.type != "cpu" or col_idx.device.type != "cpu":
        raise SparsePropError(
            f"the pattern must be on the CPU, got {col_idx.device}; load a checkpoint or use `.to('cpu')`."
        )
    SparsityPattern(geometry.out_channels, geometry.cols, row_ptr, col_idx).validate()
    try:
        return backend.Contraction(
            geometry.out_channels,
            geometry.in_channels,
            geometry.groups,
            lift(geometry.kernel_size, 1),
            lift(geometry.stride, 1),
            lift(geometry.dilation, 1),
            row_ptr.detach().contiguous().numpy(),
            col_idx.detach().contiguous().numpy(),
        )
    except ValueError as error:
        raise SparsePropError(f"the pattern cannot be lowered: {error}") from error


_known = WeakTensorKeyDictionary()


def operator_for(geometry: Geometry, row_ptr: Tensor, col_idx: Tensor) -> Operator:
    """The operator of these index tensors, kept for as long as `col_idx` lives."""
    found = _known.get(col_idx)
    if isinstance(found, Operator) and found.geometry == geometry and found.matches(row_ptr, col_idx):
        return found
    made = _known[col_idx] = Operator(geometry, row_ptr, col_idx)
    return made
