"""A sparse layer whose input has other readers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseprop.nn.base import SparseLayer
from sparseprop.nn.hooks import hooked, hooks_everywhere

__all__ = ["shared"]


def shared(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """`layer(x)`, and `x` for whoever reads it besides.

    Gradients of those others then reach the layer, which adds them to its own where it stores its input
    gradient. If that cannot be done, or a hook would miss the call, autograd adds them up as ever.

    >>> layer = nn.Linear(2, 2)
    >>> x = torch.ones(1, 2)
    >>> shared(layer, x)[1] is x
    True
    """
    if (
        isinstance(layer, SparseLayer)
        and torch.is_grad_enabled()
        and x.requires_grad
        and not hooked(layer)
        and not hooks_everywhere()
        and not torch.compiler.is_compiling()
    ):
        both = layer.shared(x)
        if both is not None:
            return both
    return layer(x), x
