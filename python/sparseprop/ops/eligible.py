"""Which tensors the native kernels may work on where they lie."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from sparseprop.errors import SparsePropError

__all__ = ["PLAIN_TYPES", "kernels_may_read", "refuse_differentiation", "watched"]

PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)  # not a subclass, which may be anything
_tracing, _modes = torch._C._get_tracing_state, torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_DTYPES = (torch.float32, torch.float64)


def watched() -> bool:
    """Whether a compiler, trace, transform or dispatch mode follows the calls, and would miss the kernels.

    >>> watched()
    False
    """
    return is_compiling() or _tracing() is not None or _modes() > 0 or _transforms()


def refuse_differentiation() -> None:
    """Refuse the transforms of `torch.func` that would find no derivative, or zeros."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    found = [level.key().name for level in stack if level.key() in (TransformType.Grad, TransformType.Jvp)]
    if found:
        raise SparsePropError(
            f"sparse layers cannot be differentiated by torch.func, got {found[0].lower()}; use `backward`, "
            "`torch.autograd.grad` or a loop over samples (`torch.func.vmap` alone is fine)."
        )


def kernels_may_read(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors of one floating type, and nobody traces or transforms the call.

    >>> kernels_may_read(torch.ones(2)), kernels_may_read(torch.ones(2), torch.ones(2, dtype=torch.float64))
    (True, False)
    """
    from sparseprop import backend

    dtype = tensors[0].dtype
    return (
        backend.name == "native"
        and not watched()
        and forward_ad._current_level < 0
        and dtype in _DTYPES
        and all(
            type(tensor) in PLAIN_TYPES
            and tensor.dtype is dtype
            and tensor.is_cpu
            and tensor.layout is torch.strided
            for tensor in tensors
        )
    )
