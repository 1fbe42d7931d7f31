"""Which tensors the native kernels may work on where they lie."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

__all__ = ["PLAIN_TYPES", "kernels_may_read"]

PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)  # not a subclass, which may be anything
_DTYPES = (torch.float32, torch.float64)


def kernels_may_read(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors of one floating type, and nobody traces or transforms the call.

    >>> kernels_may_read(torch.ones(2)), kernels_may_read(torch.ones(2), torch.ones(2, dtype=torch.float64))
    (True, False)
    """
    from sparseprop import backend

    dtype = tensors[0].dtype
    return (
        backend.name == "native"
        and not is_compiling()
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and dtype in _DTYPES
        and all(type(tensor) in PLAIN_TYPES and tensor.dtype is dtype and tensor.is_cpu for tensor in tensors)
    )
