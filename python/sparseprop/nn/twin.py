"""A sparse layer made of its dense twin, and back."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparseprop.errors import SparsePropError
from sparseprop.geometry import Geometry
from sparseprop.nn.convert import dense_source, finished_mask, pattern_of
from sparseprop.nn.storage import Pattern
from sparseprop.pattern import SparsityPattern

__all__ = ["DenseTwin"]


class DenseTwin(nn.Module):
    """What sparse layers know of the layers that they stand for."""

    weight_values: Parameter
    bias: Parameter | None
    _geometry: Geometry
    _dense_type: type[nn.Module]

    @property
    def pattern(self) -> SparsityPattern:
        """Where the weights are."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        raise NotImplementedError

    @classmethod
    def _options_of(cls, module: nn.Module) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def _build(cls, options: dict[str, Any], pattern: Pattern | None, **kwargs: Any) -> Self:
        return cls(**options, pattern=pattern, **kwargs)

    @classmethod
    def from_dense(cls, module: nn.Module, *, mask: Tensor | None = None, pattern: str | None = None) -> Self:
        """The sparse twin of a plain torch layer, with copies of its weights.

        The pattern is `mask` (bool, zeros inside it stay trainable), else the mask of `torch.nn.utils.prune`
        if it has one, else `weight != 0`. `pattern="2:4"` (any N:M) demands besides that at most N of M
        consecutive input channels are kept; if it is exactly N, and M is 4, 8, 16 or 32, the indices are
        stored in a few bits each. `"auto"` does so for the smallest M that fits, if any does.

        Keeps `training`, `requires_grad` and dtype. Refuses subclasses, parametrized layers, other devices
        than the CPU, and layers with hooks: a hook may rely on the dense weight, so remove it, then register
        it on the result.
        """
        weight, found = dense_source(module, cls._dense_type)
        keep = finished_mask(weight, found if mask is None else mask)
        layer = cls._build(
            cls._options_of(module),
            pattern_of(keep, pattern),
            bias=module.bias is not None,
            device="cpu",
            dtype=weight.dtype,
        )
        layer._fill(weight, module.bias if isinstance(module.bias, Tensor) else None)
        original = getattr(module, "weight_orig", module.weight)
        assert isinstance(original, Tensor)
        layer.weight_values.requires_grad_(original.requires_grad)
        return layer.train(module.training)

    def _fill(self, weight: Tensor | None, bias: Tensor | None) -> None:
        with torch.no_grad():
            if weight is not None:
                self.weight_values.copy_(weight.detach().reshape(-1)[self.pattern.flat_index()])
            if bias is not None and self.bias is not None:
                self.bias.copy_(bias.detach())
                self.bias.requires_grad_(bias.requires_grad)

    @classmethod
    def _from_mask(
        cls,
        options: dict[str, Any],
        mask: Tensor,
        *,
        weight: Tensor | None,
        bias: bool | Tensor,
        dtype: torch.dtype | None,
    ) -> Self:
        if weight is not None and weight.shape != mask.shape:
            raise SparsePropError(
                f"weight must have the shape of mask, {tuple(mask.shape)}, got {tuple(weight.shape)}."
            )
        if dtype is None and weight is not None:
            dtype = weight.dtype
        layer = cls._build(
            options, SparsityPattern.from_mask(mask), bias=bias is not False, device="cpu", dtype=dtype
        )
        if isinstance(bias, Tensor) and bias.shape != (layer._geometry.out_channels,):
            raise SparsePropError(
                f"bias must have shape ({layer._geometry.out_channels},), got {tuple(bias.shape)}."
            )
        layer._fill(weight, bias if isinstance(bias, Tensor) else None)
        return layer

    def to_dense(self) -> nn.Module:
        """The plain torch layer with the same weights, bit for bit, `training` and `requires_grad`."""
        bias = self.bias
        dense = self._dense_type(**self._options_of(self), bias=bias is not None, device="meta")
        dense.weight = Parameter(self.weight.detach(), self.weight_values.requires_grad)
        if bias is not None:
            dense.bias = Parameter(bias.detach().clone(), bias.requires_grad)
        return dense.train(self.training)
