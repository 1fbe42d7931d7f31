"""Tensors that are parts of one, as the query, key and value that one layer computes.

Autograd would collect their gradients in a copy; whoever computes all of them can put them there at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparseprop.ops.eligible import PLAIN_TYPES

__all__ = ["Parts", "in_one"]

# Nodes of autograd that do nothing to gradients but give them another form.
_VIEWS = {
    f"{name}Backward0"
    for name in (
        "Alias", "Permute", "ReshapeAlias", "Select", "Split", "Squeeze", "Transpose", "Unbind", "Unflatten",
        "UnsafeView", "Unsqueeze", "View",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Where equally shaped tensors lie in one that they cover exactly."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offsets: tuple[int, ...]  # from the first element of the whole

    def of(self, whole: Tensor) -> list[Tensor]:
        """The parts of a contiguous tensor, as views."""
        start = whole.storage_offset()
        return [whole.as_strided(self.shape, self.strides, start + offset) for offset in self.offsets]


def in_one(*tensors: Tensor) -> tuple[Tensor, Parts] | tuple[None, None]:
    """The contiguous tensor that these are all of, with their places in it; (None, None) if there is none.

    Nothing but views lies between it and them, so that its gradient is theirs side by side; hooks on views
    in between do not count.

    >>> whole = torch.ones(2, 6, requires_grad=True) * 1
    >>> in_one(*whole.view(2, 3, 2).unbind(1))[1].offsets
    (0, 2, 4)
    """
    first, whole = tensors[0], tensors[0]._base
    if whole is None or type(whole) not in PLAIN_TYPES or not (whole.is_contiguous() and whole.requires_grad):
        return None, None
    shape, strides, start = first.shape, first.stride(), whole.storage_offset()
    offsets = tuple(int(tensor.storage_offset()) - int(start) for tensor in tensors)
    step = offsets[1] - offsets[0]
    alike = all(
        tensor._base is whole
        and tensor.shape == shape
        and tensor.stride() == strides
        and tensor.dtype is whole.dtype
        and tensor._backward_hooks is None
        and not tensor.retains_grad
        for tensor in tensors
    )
    if not alike or offsets != tuple(range(0, len(tensors) * step, step) if step > 0 else ()):
        return None, None
    if not _covers(whole, (*shape, len(tensors)), (*strides, step)):
        return None, None
    if not all(_is_view_of(tensor, whole) for tensor in tensors):
        return None, None
    return whole, Parts(shape, strides, offsets)


def _covers(whole: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether every element of `whole` is met once."""
    reach = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size != 1:
            if stride != reach:
                return False
            reach *= size
    return reach == whole.numel()


def _is_view_of(tensor: Tensor, whole: Tensor) -> bool:
    """Whether autograd passes through views alone from one to the other."""
    node, end = tensor.grad_fn, whole.grad_fn
    while node is not end:
        if node is None or node.name() not in _VIEWS or len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
    return end is not None
