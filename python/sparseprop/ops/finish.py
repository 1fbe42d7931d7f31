"""What a sparse layer's kernel does to its output while that is in the cache, if no gradient is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseprop.ops.eligible import kernels_may_read
from sparseprop.ops.layout import five_strides

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
        others = [] if self.residual is None else [self.residual]
        return (
            kernels_may_read(x, *self.per_channel(), *others)
            and self.fits_channels(out_shape[1])
            and all(t.shape == out_shape and not t.is_neg() for t in others)
        )

    def per_channel(self) -> list[Tensor]:
        """Tensors of (out_channels,), those there are."""
        return [t for t in (self.mean, self.variance, self.weight, self.bias) if t is not None]

    def fits_channels(self, channels: int) -> bool:
        """Whether these are as long as that, and contiguous."""
        return all(t.shape == (channels,) and t.is_contiguous() for t in self.per_channel())

    def norm_arguments(self) -> tuple[Any, ...]:
        """The batch norm and activation as `_native` takes them; addresses, 0 for what is absent."""
        return (
            self.mean.data_ptr(),
            self.variance.data_ptr(),
            0 if self.weight is None else self.weight.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            self.eps,
            self.cap,
        )

    def arguments(self, dims: int) -> tuple[Any, ...]:
        """All of it as `_native.Contraction.forward` takes it."""
        if self.residual is None:
            return self.norm_arguments(), 0, (0, 0, 0, 0, 0)
        strides = five_strides(self.residual.shape, self.residual.stride(), dims)
        return self.norm_arguments(), self.residual.data_ptr(), strides
