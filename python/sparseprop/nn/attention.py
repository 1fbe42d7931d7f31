"""Modules whose forwards call torch's attention, computed by our kernels in its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparseprop.nn.mixin import Mixin
from sparseprop.ops.attention import attention
from sparseprop.ops.eligible import PLAIN_TYPES

__all__ = ["NativeAttention", "computes_attention"]

# In the code of a forward that computes attention: torch's functions, and where transformers finds its own.
_NAMES = {"scaled_dot_product_attention", "multi_head_attention_forward", "ALL_ATTENTION_FUNCTIONS"}


def computes_attention(module: nn.Module) -> bool:
    """Whether the module's own forward, or one of a class it derives from, calls torch's attention or may.

    >>> computes_attention(nn.MultiheadAttention(16, 1)), computes_attention(nn.Linear(16, 1))
    (True, False)
    """
    if "forward" in vars(module):
        return False
    forwards = [vars(kind)["forward"] for kind in type(module).__mro__ if "forward" in vars(kind)]
    codes = [getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards]
    return any(code is not None and not _NAMES.isdisjoint(code.co_names) for code in codes)


def _never(*args: Any) -> bool:
    return False


def _with_ours(function: Any) -> Any:
    """One of torch's functions in Python, calling ours. It must not look for modes: it would call itself."""
    ours = {"scaled_dot_product_attention": attention, "has_torch_function": _never}
    return FunctionType(function.__code__, {**function.__globals__, **ours}, argdefs=function.__defaults__)


_OURS = {
    functional.scaled_dot_product_attention: attention,
    functional.multi_head_attention_forward: _with_ours(functional.multi_head_attention_forward),
}


_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _OurKernels(TorchFunctionMode):
    """Not for what has hooks on saved tensors of its own, as checkpointing within the forward has: that is
    computed again where this mode no longer is."""

    def __init__(self) -> None:
        super().__init__()
        self._hooks = _saved_tensors_hooks(True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if all(kind in PLAIN_TYPES for kind in types) and _saved_tensors_hooks(True) == self._hooks:
            func = _OURS.get(func, func)
        return func(*args, **(kwargs or {}))


class NativeAttention(Mixin):
    """Mixed into a module's class; within its forward attention is ours, except while compiling."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        if is_compiling():
            return self._base.forward(self, *args, **kwargs)
        with _OurKernels():
            return self._base.forward(self, *args, **kwargs)
