"""GELU modules of torch and transformers, with the gradient by our kernel."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from sparseprop.nn.mixin import Mixin
from sparseprop.ops.gelu import gelu

__all__ = ["NativeGELU", "is_gelu"]


def is_gelu(module: nn.Module) -> bool:
    """Whether the module computes GELU by the error function, as its options are now.

    >>> is_gelu(nn.GELU()), is_gelu(nn.GELU("tanh"))
    (True, False)
    """
    kind = getattr(type(module), "_base", type(module))
    if "forward" in vars(module):
        return False
    if kind is nn.GELU:
        return module.approximate == "none"
    of_transformers = kind.__name__ == "GELUActivation" and kind.__module__.startswith("transformers.")
    return of_transformers and getattr(module, "act", None) is functional.gelu


class NativeGELU(Mixin):
    """Mixed into such a module's class."""

    def forward(self, input: Tensor) -> Tensor:
        """The activation of `input`."""
        return gelu(input) if is_gelu(self) else cast(Tensor, self._base.forward(self, input))
