"""Gradients that nobody else can see: a backward pass may write its own results over them.

That saves an allocation, and reading memory only to overwrite it. On its way through autograd a gradient may
be held by others: by a second reader of a sum, a hook, the caller of `backward`. Torch counts holders of
tensors and of their memory, Python those of objects; a gradient is one's own if all counts are what they are
in a graph where nobody else can be.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["holders", "is_own"]


def holders(grad: Tensor) -> tuple[int, int, int] | None:
    """How many hold this argument of a backward function, which is to ask this itself, before all else.

    None if torch does not say.
    """
    try:
        return (
            grad._use_count(),  # type: ignore[attr-defined]
            sys.getrefcount(grad),
            torch._C._storage_Use_Count(grad.untyped_storage()._cdata),
        )
    except (AttributeError, RuntimeError):
        return None


class _Alone(Function):
    """Notes the counts for a gradient made by another function for this one."""

    found: tuple[int, int, int] | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _Alone.found = holders(grad)
        return grad


@cache
def _alone() -> tuple[int, int, int] | None:
    """Counted in the first backward pass, not on import: processes may fork before autograd has run."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(2, device="cpu", requires_grad=True)
        y = _Alone.apply(x)  # type: ignore[no-untyped-call]
        torch.autograd.grad((y * 3).sum(), x)
    return _Alone.found


def is_own(found: tuple[int, int, int] | None, grad: Tensor) -> bool:
    """Whether a gradient with these `holders` may be overwritten.

    Not while the backward pass is recorded, nor under modes of torch, which see and may keep all tensors.
    """
    if found is None or type(grad) is not Tensor or torch.is_grad_enabled():
        return False
    watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    # memory that torch did not allocate, such as numpy's, may have an owner whom nobody counts
    return not watched and found == _alone() and grad.untyped_storage().resizable()
