"""An operator: one pattern with one geometry, lowered for the kernels, and the calls into them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseprop import backend
from sparseprop.errors import SparsePropError
from sparseprop.geometry import Geometry
from sparseprop.ops.layout import (
    BATCH_LAST,
    PLAIN,
    Five,
    collapse,
    empty_conv,
    empty_linear,
    layout_of,
    lift,
    plain,
)
from sparseprop.pattern import SparsityPattern

__all__ = ["Operator", "operator_for"]

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class View(NamedTuple):
    """A tensor as the kernels see it; `tensor` is a copy where its own strides would not do."""

    tensor: Tensor
    batch: int
    strides: Five
    layout: int


class Sizes(NamedTuple):
    """Spatial sizes of one call: lifted input, left padding, lifted output, and the output of torch."""

    input: tuple[int, int, int]
    padding: tuple[int, int, int]
    output: tuple[int, int, int]
    spatial: tuple[int, ...]


class Operator:
    """Belongs to the index tensors as they are; if `matches` denies that, make a new one."""

    def __init__(self, geometry: Geometry, row_ptr: Tensor, col_idx: Tensor) -> None:
        self.geometry = geometry
        self.nnz = col_idx.numel()
        self._versions = (_version(row_ptr), _version(col_idx))
        self._row_ptr, self._col_idx = weakref.ref(row_ptr), weakref.ref(col_idx)
        self._backend = backend.Contraction
        self.contraction: Any = _lower(geometry, row_ptr, col_idx)
        self._sizes: dict[tuple[int, ...], Sizes] = {}

    def matches(self, row_ptr: Tensor, col_idx: Tensor) -> bool:
        """False once an index tensor was replaced or written to, or the backend was switched."""
        return (
            self._row_ptr() is row_ptr
            and self._col_idx() is col_idx
            and (_version(row_ptr), _version(col_idx)) == self._versions
            and self._backend is backend.Contraction
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

    def sizes(self, spatial: tuple[int, ...]) -> Sizes:
        """The sizes of a call on an input of this spatial size (remembered)."""
        found = self._sizes.get(spatial)
        if found is None:
            output = self.geometry.output_size(spatial)
            left = lift([left for left, _ in self.geometry.padding], 0)
            found = self._sizes[spatial] = Sizes(lift(spatial, 1), left, lift(output, 1), output)
        return found

    def view(self, x: Tensor) -> View:
        """`x` with five strides. For Linear the leading dimensions become one, by a copy if it must be."""
        if self.geometry.dims:
            if x.is_neg():
                x = plain(x)
            stride = x.stride()
            return View(x, x.shape[0], (stride[0], stride[1], *lift(stride[2:], 0)), layout_of(x))
        features = x.shape[-1]
        if not x.is_contiguous() or x.is_neg():
            leading = None if x.is_neg() else collapse(x.shape, x.stride())
            if leading is not None:
                batch, step = leading
                layout = BATCH_LAST if step == 1 and batch > 1 and x.stride(-1) != 1 else PLAIN
                return View(x, batch, (step, x.stride(-1), 0, 0, 0), layout)
            x = plain(x)
        return View(x, x.numel() // features if features else 0, (features, 1, 0, 0, 0), PLAIN)

    def empty(self, shape: Sequence[int], view: View, size: Sequence[int]) -> tuple[Tensor, Five]:
        """An uninitialised tensor of this shape in the layout of `view`."""
        if self.geometry.dims:
            return empty_conv(shape, size, view.layout, view.tensor)
        return empty_linear(shape, view.batch, view.layout, view.tensor)

    def output_shape(self, x_shape: torch.Size, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the output for an input of shape `x_shape`."""
        if self.geometry.dims:
            return (x_shape[0], self.geometry.out_channels, *sizes.spatial)
        return (*x_shape[:-1], self.geometry.out_channels)

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Output for checked tensors of any strides, in the layout of `x`. Knows nothing of autograd."""
        sizes = self.sizes(x.shape[2:] if self.geometry.dims else ())
        view = self.view(x)
        out, out_strides = self.empty(self.output_shape(x.shape, sizes), view, sizes.output)
        if not self.nnz or not out.numel():
            return out.zero_() if bias is None else out.copy_(self._over_channels(bias))
        values = values if values.is_contiguous() else values.contiguous()
        bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
        self.contraction.forward(
            DTYPE_CODES[x.dtype],
            view.batch,
            sizes.input,
            sizes.padding,
            sizes.output,
            view.tensor.data_ptr(),
            view.strides,
            values.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            out_strides,
        )
        return out

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        values: Tensor | None,
        shape: torch.Size,
        layout: int | None = None,
        needs: tuple[bool, bool, bool] = (True, True, True),
    ) -> Gradients:
        """Gradients for (input, values, bias) where `needs` says so, else None.

        `x` may be None if no values gradient is needed, `values` if no input gradient is. The input gradient
        has `shape`, in `layout` (that of `grad` by default).
        """
        self.require_unchanged()
        sizes = self.sizes(shape[2:] if self.geometry.dims else ())
        grad_view = self.view(grad)
        x_view = None if x is None else self.view(x)
        like = grad_view if layout is None else grad_view._replace(layout=layout)
        grad_x, grad_x_strides = self.empty(shape, like, sizes.input) if needs[0] else (None, (0,) * 5)
        wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
        grad_values = grad.new_empty((self.nnz,), dtype=wide) if needs[1] else None
        grad_bias = grad.new_empty((self.geometry.out_channels,), dtype=wide) if needs[2] else None
        if not self.nnz or not grad.numel():
            for tensor in (grad_x, grad_values):
                if tensor is not None:
                    tensor.zero_()
            return grad_x, grad_values, None if grad_bias is None else self.sum_channels(grad)
        if values is not None and not values.is_contiguous():
            values = values.contiguous()
        self.contraction.backward(
            DTYPE_CODES[grad.dtype],
            grad_view.batch,
            sizes.input,
            sizes.padding,
            sizes.output,
            0 if x_view is None else x_view.tensor.data_ptr(),
            (0,) * 5 if x_view is None else x_view.strides,
            0 if values is None else values.data_ptr(),
            grad_view.tensor.data_ptr(),
            grad_view.strides,
            0 if grad_x is None else grad_x.data_ptr(),
            grad_x_strides,
            0 if grad_values is None else grad_values.data_ptr(),
            0 if grad_bias is None else grad_bias.data_ptr(),
        )
        return grad_x, grad_values, grad_bias

    def sum_channels(self, grad: Tensor) -> Tensor:
        """Sum of a gradient over all but the channels; at least float32."""
        return sum_channels(grad, self.geometry.dims)

    def _over_channels(self, bias: Tensor) -> Tensor:
        return bias.reshape(-1, *(1,) * self.geometry.dims)


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


_known: Any = None


def operator_for(geometry: Geometry, row_ptr: Tensor, col_idx: Tensor) -> Operator:
    """The operator of these index tensors, kept for as long as `col_idx` lives."""
    global _known
    if _known is None:
        from torch.utils.weak import WeakTensorKeyDictionary

        _known = WeakTensorKeyDictionary()
    found = _known.get(col_idx)
    if isinstance(found, Operator) and found.geometry == geometry and found.matches(row_ptr, col_idx):
        return found
    made = _known[col_idx] = Operator(geometry, row_ptr, col_idx)
    return made
