"""`SparseLinear`."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from sparseprop.errors import SparsePropError
from sparseprop.geometry import Geometry
from sparseprop.nn.base import SparseLayer
from sparseprop.pattern import SparsityPattern

__all__ = ["SparseLinear"]


class SparseLinear(SparseLayer):
    """`torch.nn.Linear` with a sparse weight: (..., in_features) to (..., out_features).

    Without a pattern the layer has no weights yet, and awaits a state dict.

    >>> layer = SparseLinear.random(64, 32, density=0.125)
    >>> layer(torch.ones(8, 64)).shape, layer.nnz
    (torch.Size([8, 32]), 256)
    """

    _dense_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: SparsityPattern | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(Geometry.linear(in_features, out_features), pattern, bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def _options_of(cls, module: nn.Module) -> dict[str, Any]:
        return {"in_features": module.in_features, "out_features": module.out_features}

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        weight: Tensor | None = None,
        bias: bool | Tensor = True,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer with the pattern of a bool mask (out, in), and the values of `weight` there or fresh ones.

        >>> mask = torch.eye(3, dtype=torch.bool)
        >>> SparseLinear.from_mask(mask, weight=torch.ones(3, 3), bias=False)(torch.ones(3)).tolist()
        [1.0, 1.0, 1.0]
        """
        if mask.dim() != 2:
            raise SparsePropError(f"mask must have 2 dimensions (out, in), got shape {tuple(mask.shape)}.")
        options = {"in_features": mask.shape[-1], "out_features": mask.shape[0]}
        return cls._from_mask(options, mask, weight=weight, bias=bias, dtype=dtype)

    @classmethod
    def random(
        cls,
        in_features: int,
        out_features: int,
        *,
        density: float,
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer with `round(density * in * out)` random weights; never builds the dense weight."""
        pattern = SparsityPattern.random(out_features, in_features, density=density, generator=generator)
        layer = cls(in_features, out_features, bias, pattern=pattern, device=device, dtype=dtype)
        if generator is not None:
            layer.reset_parameters(generator)
        return layer

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._sparsity_repr()}"
