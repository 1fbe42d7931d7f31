"""An operator: one pattern with one geometry, lowered for the kernels, and the calls into them."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparseprop import backend
from sparseprop.errors import SparsePropError
from sparseprop.geometry import Geometry
from sparseprop.ops.call import Call, new_call
from sparseprop.ops.finish import Finish
from sparseprop.ops.kept import refuse_batch, refuse_changed
from sparseprop.ops.layout import PLAIN, Five, five_strides, plain, sum_channels
from sparseprop.ops.lower import lower

__all__ = ["Operator", "operator_for"]

_MOST_CALLS = 256  # remembered per operator; more shapes than that do not repeat
_ABSENT = (0, 0, 0, 0, 0)
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Operator:
    """Belongs to the index tensors as they are; if `matches` denies that, make a new one."""

    def __init__(self, geometry: Geometry, head: Tensor, index: Tensor) -> None:
        self.geometry = geometry
        self.contraction: Any = lower(geometry, head, index)
        self.nnz: int = self.contraction.nnz
        self.values_shape = (self.nnz,)
        self._backend = backend.Contraction
        self._head, self._index = weakref.ref(head), weakref.ref(index)
        self._head_state, self._index_state = _state(head), _state(index)
        self._calls: dict[Any, Call] = {}

    def matches(self, head: Tensor, index: Tensor) -> bool:
        """False once an index tensor was replaced or written to, or the backend was switched."""
        return (
            self._index() is index
            and self._head() is head
            and self._backend is backend.Contraction
            and self._index_state == _state(index)
            and self._head_state == _state(head)
        )

    def require_unchanged(self) -> None:
        """Refuse a backward pass whose pattern was overwritten since; kernels may borrow it."""
        head, index = self._head(), self._index()
        if (head is not None and _state(head) != self._head_state) or (
            index is not None and _state(index) != self._index_state
        ):
            raise SparsePropError(
                "the sparsity pattern was changed between forward and backward; run backward before changing "
                "it (by load_state_dict, for example), or run forward again."
            )

    def check_values(self, values: Tensor) -> None:
        """Refuse values of another number or form than the pattern has."""
        if values.shape != self.values_shape:
            raise SparsePropError(
                f"weight values must have shape ({self.nnz},) for this pattern, got {tuple(values.shape)}."
            )

    def recall(self, x: Tensor) -> Call | None:
        """The call for an input like one seen before, whose dtype and channels were right."""
        try:
            return self._calls.get((x.shape, x.stride(), x.dtype))
        except RuntimeError:  # a tensor without: sparse or nested
            return None

    def call_for(self, x: Tensor) -> Call:
        """The call for an input of right dtype and channels, worked out once per shape and strides."""
        call = self.recall(x)
        if call is None:
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            call = self._calls[x.shape, x.stride(), x.dtype] = new_call(self.geometry, self.nnz, x)
        return call

    def forward(
        self, call: Call, x: Tensor, values: Tensor, bias: Tensor | None, finish: Finish | None = None
    ) -> Tensor:
        """Output for checked tensors, in the layout of `x`; knows nothing of autograd.

        `finish` follows at once: native kernels, float32 and float64, not for a trivial call.
        """
        if call.layout == PLAIN:
            out = x.new_empty(call.out_shape)
        else:
            out = x.new_empty_strided(call.out_shape, call.out_memory)
        if call.trivial:
            return out.zero_() if bias is None else out.copy_(bias.view(-1, *(1,) * self.geometry.dims))
        x_strides = call.in_strides
        if x_strides is None or x.is_neg():
            x, x_strides = self._readable(x)
        if not values.is_contiguous() or values.is_neg():
            values = _row(values)
        if bias is not None and (not bias.is_contiguous() or bias.is_neg()):
            bias = _row(bias)
        finishing = () if finish is None else (finish.arguments(self.geometry.dims),)
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
            *finishing,
        )
        return out

    def backward(
        self,
        call: Call,
        grad: Tensor,
        x: Tensor | None,
        values: Tensor | None,
        needs: tuple[bool, bool, bool],
        added: Tensor | None = None,
        overwrite: bool = False,
    ) -> Gradients:
        """Gradients for (input, values, bias) where `needs` says so, else None; `grad` may have any strides.

        `x` may be None if no values gradient is needed, `values` if no input gradient is. `added`, of the
        input's shape and dtype, becomes part of the input gradient, which may `overwrite` it.
        """
        self.require_unchanged()
        refuse_batch("sparse layers", grad)
        grad_values = grad_bias = None
        reuse = added if overwrite and not call.trivial else None
        grad_x = self._input_gradient(call, grad, reuse) if needs[0] else None
        if needs[1]:
            grad_values = torch.empty(self.nnz, dtype=call.wide)
        if needs[2]:
            grad_bias = torch.empty(self.geometry.out_channels, dtype=call.wide)
        if call.trivial:
            return self._trivial_gradients(grad, grad_x, grad_values, grad_bias, added)
        also: tuple[int, Five] | tuple[()] = ()
        if added is not None:
            added, added_strides = self._readable(added)
            also = added.data_ptr(), added_strides
        grad_strides: Five | None = call.out_strides
        if grad.stride() != call.out_memory or grad.is_neg():
            grad, grad_strides = self._readable(grad)
        x, x_strides = self._kept_input(call, grad.dtype, x if needs[1] else None)
        if values is not None:
            values = self._kept_values(call, values)
        self.contraction.backward(
            call.code,
            call.batch,
            call.in_size,
            call.padding,
            call.out_size,
            0 if x is None else x.data_ptr(),
            x_strides,
            0 if values is None else values.data_ptr(),
            grad.data_ptr(),
            grad_strides,
            0 if grad_x is None else grad_x.data_ptr(),
            call.grad_strides,
            0 if grad_values is None else grad_values.data_ptr(),
            0 if grad_bias is None else grad_bias.data_ptr(),
            *also,
        )
        return grad_x, grad_values, grad_bias

    def _kept_input(self, call: Call, dtype: torch.dtype, x: Tensor | None) -> tuple[Tensor | None, Five]:
        """What a forward pass kept of its input, as the kernels can read it, and its strides."""
        if x is None:
            return None, _ABSENT
        if x.shape != call.in_shape or x.dtype is not dtype or not x.is_cpu:
            refuse_changed("input", x, call.in_shape, dtype)
        if call.in_strides is None or x.stride() != call.in_memory or x.is_neg():
            return self._readable(x)
        return x, call.in_strides

    def _kept_values(self, call: Call, values: Tensor) -> Tensor:
        """The values that a forward pass kept, as the kernels can read them."""
        if values.shape != self.values_shape or values.dtype is not call.wide or not values.is_cpu:
            refuse_changed("weight values", values, self.values_shape, call.wide)
        return values if values.is_contiguous() and not values.is_neg() else _row(values)

    @staticmethod
    def _input_gradient(call: Call, grad: Tensor, reuse: Tensor | None) -> Tensor:
        """Memory for one: that of `reuse` if it has the form."""
        if reuse is not None and reuse.stride() == call.grad_memory and not reuse.is_neg():
            return reuse
        if call.layout == PLAIN:
            return grad.new_empty(call.in_shape)
        return grad.new_empty_strided(call.in_shape, call.grad_memory)

    def _readable(self, tensor: Tensor) -> tuple[Tensor, Five]:
        """A tensor of any strides, copied if the kernels could not read it, and its strides."""
        dims = self.geometry.dims
        strides = None if tensor.is_neg() else five_strides(tensor.shape, tensor.stride(), dims)
        if strides is None:
            tensor = plain(tensor)
            strides = five_strides(tensor.shape, tensor.stride(), dims)
        assert strides is not None
        return tensor, strides

    def _trivial_gradients(
        self,
        grad: Tensor,
        grad_x: Tensor | None,
        grad_values: Tensor | None,
        grad_bias: Tensor | None,
        added: Tensor | None,
    ) -> Gradients:
        for tensor in (grad_x, grad_values):
            if tensor is not None:
                tensor.zero_()
        if grad_bias is not None:
            grad_bias = sum_channels(grad, self.geometry.dims)
        return grad_x if added is None else added, grad_values, grad_bias


def _state(tensor: Tensor) -> tuple[int, int]:
    """Another one once the tensor was written to or, as `share_memory_` does, moved."""
    try:
        return tensor._version, tensor.data_ptr()
    except RuntimeError:  # inference tensors keep no count
        return -1, tensor.data_ptr()


def _row(tensor: Tensor) -> Tensor:
    """Values or a bias as the kernels read them."""
    return tensor.resolve_neg().contiguous()


_known: MutableMapping[Tensor, Operator] = WeakTensorKeyDictionary()


def operator_for(geometry: Geometry, head: Tensor, index: Tensor) -> Operator:
    """The operator of these index tensors, kept for as long as `index` lives."""
    found = _known.get(index)
    if found is not None and found.geometry == geometry and found.matches(head, index):
        return found
    made = _known[index] = Operator(geometry, head, index)
    return made
