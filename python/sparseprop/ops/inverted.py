"""Inverted residual blocks in evaluation: sparse, depthwise and sparse layer as one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprop.geometry import Geometry
from sparseprop.ops.eligible import kernels_may_read
from sparseprop.ops.finish import Finish
from sparseprop.ops.layout import lift
from sparseprop.ops.operator import Operator
from sparseprop.ops.windows import WindowSpec, native_windows

__all__ = ["InvertedBlock", "SparseStep"]


@dataclass(frozen=True, slots=True)
class SparseStep:
    """A sparse layer of images with the batch norm and activation behind it.

    Attributes:
        operator: the layer's.
        values, bias: (nnz,), and (out_channels,) or None.
        finish: what follows, of known statistics; its residual is None.
    """

    operator: Operator
    values: Tensor
    bias: Tensor | None
    finish: Finish

    def tensors(self) -> list[Tensor]:
        """All that its kernels read."""
        return [t for t in (self.values, self.bias, *self.finish.per_channel()) if t is not None]

    def fits(self) -> bool:
        """Whether our kernels can do it."""
        bias, geometry = self.bias, self.operator.geometry
        return (
            geometry.dims == 2
            and geometry.padding_mode == "zeros"
            and self.operator.nnz > 0
            and self.values.shape == (self.operator.nnz,)
            and self.values.is_contiguous()
            and (bias is None or (bias.shape == (geometry.out_channels,) and bias.is_contiguous()))
            and self.finish.fits_channels(geometry.out_channels)
        )

    def arguments(self, sizes: Any) -> tuple[Any, ...]:
        """As `_native` takes it."""
        bias = 0 if self.bias is None else self.bias.data_ptr()
        norm = self.finish.norm_arguments()
        return self.operator.contraction, sizes, self.values.data_ptr(), bias, norm


@dataclass(frozen=True, slots=True)
class _Call:
    """What follows from an input's shape: that of the output, what the native call takes beside both."""

    out_shape: torch.Size
    arguments: tuple[Any, ...]


class InvertedBlock:
    """`project(norm(depthwise(expand(x))))` for images and no gradient.

    Borrows the memory of its tensors as it is now: the owner makes a new one when any of them is replaced.

    Args:
        expand: the layer in front, or None.
        weight: of the depthwise convolution, (channels, 1, height, width).
        windows: its kernel, stride and padding.
        norm: what follows it, of known statistics; its residual is None.
        project: the layer behind.
    """

    def __init__(
        self,
        expand: SparseStep | None,
        weight: Tensor,
        windows: WindowSpec,
        norm: Finish,
        project: SparseStep,
    ) -> None:
        self._expand, self._weight, self._windows, self._norm, self._project = (
            expand, weight, windows, norm, project
        )  # fmt: skip
        steps = [project] if expand is None else [expand, project]
        tensors = [weight, *norm.per_channel(), *(tensor for step in steps for tensor in step.tensors())]
        channels = project.operator.geometry.in_channels
        self._dtype = weight.dtype
        self._possible = (
            kernels_may_read(*tensors)
            and all(step.fits() for step in steps)
            and (expand is None or expand.operator.geometry.out_channels == channels)
            and weight.shape == (channels, 1, *windows.kernel)
            and weight.is_contiguous()
            and norm.fits_channels(channels)
        )
        # of the last call: the input's shape and what follows from it
        self._last: tuple[torch.Size, _Call | None] | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        """The output for (N, C, H, W), contiguous, that kernels may read; None if these cannot do it."""
        if (
            not self._possible
            or x.dtype is not self._dtype
            or not x.is_contiguous()
            or x.is_neg()
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        last = self._last
        if last is None or last[0] != x.shape:
            last = self._last = x.shape, self._call_for(x.shape)
        call = last[1]
        if call is None:
            return None
        from sparseprop import _native as native

        out = x.new_empty(call.out_shape)
        native.inverted_forward(x.data_ptr(), out.data_ptr(), *call.arguments)
        return out

    def _call_for(self, shape: torch.Size) -> _Call | None:
        """None for shapes that are not for the kernels."""
        expand, project = self._expand, self._project
        first_layer = (expand or project).operator
        if len(shape) != 4 or shape[1] != first_layer.geometry.in_channels:
            return None
        images, first = shape[0], None
        if expand is not None:
            geometry = expand.operator.geometry
            first = expand.arguments(_image(geometry, shape))
            shape = torch.Size((images, geometry.out_channels, *geometry.output_size(shape[2:])))
        if not self._windows.fits(shape):
            return None
        geometry = project.operator.geometry
        between = torch.Size((*shape[:2], *self._windows.output_size(shape[2:])))
        out = torch.Size((images, geometry.out_channels, *geometry.output_size(between[2:])))
        last = project.arguments(_image(geometry, between))
        return _Call(out, (
            self._dtype is torch.float64, images, first, native_windows(shape, self._windows), shape[1],
            self._weight.data_ptr(), self._norm.norm_arguments(), last,
        ))  # fmt: skip


def _image(geometry: Geometry, shape: torch.Size) -> tuple[Any, Any, Any]:
    """Size of an image, padding and size of its result."""
    size = shape[2:]
    padding = [left for left, _ in geometry.padding]
    return lift(size, 1), lift(padding, 0), lift(geometry.output_size(size), 1)
