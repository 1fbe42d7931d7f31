"""What a sparse layer's kernel does to its output while that is in the cache, if no gradient is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseprop.ops.eligible import kernels_may_read
from sparseprop.ops.layout import Five, five_strides

__all__ = ["Finish"]


@dataclass(frozen=True)
class Finish:
    """Batch norm by known statistics, the addition of a residual, an activation.

    Attributes:
        mean, variance: (out_channels,).
        weight, bias: of the batch norm, (out_channels,), or None.
        eps: added to the variance.
        cap: of the activation: 0 none, infinity ReLU, 6 ReLU6.
        residual: of the output's shape, any strides, or None.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    cap: float
    residual: Tensor | None

    def fits(self, x: Tensor, out_shape: tuple[int, ...]) -> bool:
        """Whether kernels can do this to the output, of that shape, for an input `x`."""
        per_channel = [t for t in (self.mean, self.variance, self.weight, self.bias) if t is not None]
        others = [] if self.residual is None else [self.residual]
        return (
            kernels_may_read(x, *per_channel, *others)
            and all(t.shape == (out_shape[1],) and t.is_contiguous() for t in per_channel)
            and all(t.shape == out_shape and not t.is_neg() for t in others)
        )

    def arguments(self, dims: int) -> tuple[Any, ...]:
        """As `_native.Contraction.forward` takes them; addresses, 0 for what is absent."""
        strides: Five | None = (0, 0, 0, 0, 0)
        if self.residual is not None:
            strides = five_strides(self.residual.shape, self.residual.stride(), dims)
        return (
            self.mean.data_ptr(),
            self.variance.data_ptr(),
            0 if self.weight is None else self.weight.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            self.eps,
            self.cap,
            0 if self.residual is None else self.residual.data_ptr(),
            strides,
        )
