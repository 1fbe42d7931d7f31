"""`SparseConv1d`, `SparseConv2d`, `SparseConv3d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sparseprop.errors import SparsePropError
from sparseprop.geometry import Geometry, Size, expand
from sparseprop.nn.base import SparseLayer
from sparseprop.pattern import SparsityPattern

__all__ = ["SparseConv1d", "SparseConv2d", "SparseConv3d"]

_OPTIONS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


class _SparseConv(SparseLayer):
    _dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        pattern: SparsityPattern | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = Geometry.conv(
            self._dims,
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
        )
        super().__init__(geometry, pattern, bias, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = (
            geometry.kernel_size,
            geometry.stride,
            geometry.dilation,
        )
        self.padding = padding if isinstance(padding, str) else expand("padding", padding, self._dims, 0)
        self.groups, self.padding_mode = groups, padding_mode

    @classmethod
    def _options_of(cls, module: nn.Module) -> dict[str, Any]:
        return {name: getattr(module, name) for name in _OPTIONS}

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        weight: Tensor | None = None,
        bias: bool | Tensor = True,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer with the pattern of a bool mask (out, in / groups, *kernel_size).

        Its values are those of `weight` inside the mask, or fresh ones. Convolution options as in torch.
        """
        if mask.dim() != cls._dims + 2:
            raise SparsePropError(
                f"mask must have {cls._dims + 2} dimensions (out, in / groups, *kernel_size), got shape "
                f"{tuple(mask.shape)}."
            )
        options = {
            "in_channels": mask.shape[1] * groups,
            "out_channels": mask.shape[0],
            "kernel_size": tuple(mask.shape[2:]),
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
        }
        return cls._from_mask(options, mask, weight=weight, bias=bias, dtype=dtype)

    @classmethod
    def random(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        density: float,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer with `round(density * weights)` weights at random places; never builds the dense weight."""
        geometry = Geometry.conv(cls._dims, in_channels, out_channels, kernel_size, groups=groups)
        pattern = SparsityPattern.random(out_channels, geometry.cols, density=density, generator=generator)
        layer = cls(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            pattern=pattern,
            device=device,
            dtype=dtype,
        )
        if generator is not None:
            layer.reset_parameters(generator)
        return layer

    def extra_repr(self) -> str:
        """Shown by `print(module)`; options at their defaults are left out, as torch does."""
        defaults: Sequence[tuple[str, Any]] = (
            ("padding", (0,) * self._dims),
            ("dilation", (1,) * self._dims),
            ("groups", 1),
            ("padding_mode", "zeros"),
        )
        shown = [
            f"{name}={getattr(self, name)!r}" for name, usual in defaults if getattr(self, name) != usual
        ]
        head = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        return ", ".join([head, *shown, self._sparsity_repr()])


class SparseConv1d(_SparseConv):
    """`torch.nn.Conv1d` with a sparse weight, all options included: (N, C, L) or (C, L).

    >>> SparseConv1d.random(4, 8, 3, density=0.5, padding="same")(torch.ones(2, 4, 10)).shape
    torch.Size([2, 8, 10])
    """

    _dims = 1
    _dense_type = nn.Conv1d


class SparseConv2d(_SparseConv):
    """`torch.nn.Conv2d` with a sparse weight, all options included: (N, C, H, W) or (C, H, W).

    A channels-last input gives a channels-last output; likewise batch-last (physically C, H, W, N).

    >>> SparseConv2d.random(4, 8, 3, density=0.5, stride=2)(torch.ones(2, 4, 9, 9)).shape
    torch.Size([2, 8, 4, 4])
    """

    _dims = 2
    _dense_type = nn.Conv2d


class SparseConv3d(_SparseConv):
    """`torch.nn.Conv3d` with a sparse weight, all options included: (N, C, D, H, W) or (C, D, H, W).

    >>> SparseConv3d.random(4, 8, (1, 3, 3), density=0.5)(torch.ones(2, 4, 2, 5, 5)).shape
    torch.Size([2, 8, 2, 3, 3])
    """

    _dims = 3
    _dense_type = nn.Conv3d
