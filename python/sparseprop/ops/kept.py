"""Tensors that a forward pass leaves to its backward pass.

Hooks on saved tensors, or `.data`, may have changed their form since, and kernels read addresses. Torch
itself notices only writing in place.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from sparseprop.errors import SparsePropError

__all__ = ["keep", "kept", "refuse_batch", "refuse_changed", "require_kept"]

_batched = torch._C._functorch.is_legacy_batchedtensor
_Form = tuple[torch.Size, tuple[int, ...], torch.dtype]


def require_kept(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a tensor of another shape, dtype or device than the forward pass had.

    >>> require_kept("input", torch.ones(2), (2,), torch.float32)
    """
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        refuse_changed(what, tensor, shape, dtype)


def refuse_changed(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> NoReturn:
    """Raise what `require_kept` raises."""
    raise SparsePropError(
        f"the {what} kept for the backward pass had shape {tuple(shape)} and dtype {dtype} on the CPU, "
        f"got {tuple(tensor.shape)} and {tensor.dtype} on {tensor.device}: something replaced it after "
        "the forward pass (`.data`, `module.to`, a hook on saved tensors); run backward before that, or "
        "forward again."
    )


def refuse_batch(who: str, grad: Tensor) -> None:
    """Refuse what stands for several gradients at once and has no memory.

    >>> refuse_batch("sparse layers", torch.ones(2))
    """
    if _batched(grad):
        raise SparsePropError(
            f"{who} cannot take a batch of gradients (is_grads_batched, vectorize=True); take one after the "
            "other."
        )


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, with what the tensors look like."""
    ctx.save_for_backward(*tensors)
    ctx.forms = [None if each is None else (each.shape, each.stride(), each.dtype) for each in tensors]


def kept(ctx: Any, grad: Tensor) -> list[Any]:
    """`ctx.saved_tensors` as `keep` found them, for one gradient; copied where their strides have changed."""
    refuse_batch("fused layers", grad)
    return [_as_kept(each, form) for each, form in zip(ctx.saved_tensors, ctx.forms, strict=True)]


def _as_kept(tensor: Tensor | None, form: _Form | None) -> Tensor | None:
    if tensor is None or form is None:
        return None
    shape, strides, dtype = form
    require_kept("tensor", tensor, shape, dtype)
    if tensor.stride() == strides and not tensor.is_neg():
        return tensor
    return tensor.new_empty_strided(shape, strides).copy_(tensor)
