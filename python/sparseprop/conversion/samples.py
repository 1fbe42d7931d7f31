"""What a layer reads, as rows: one row of inputs for each output position that is looked at."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseprop.geometry import Geometry

__all__ = ["Sampler"]


@dataclass(frozen=True)
class Sampler:
    """Turns inputs of one Linear or Conv layer into rows in the order of its flattened weight rows.

    ``positions``: output positions taken per image of a convolution, spread evenly and drawn by seed.
    """

    geometry: Geometry
    positions: int = 64

    @classmethod
    def of(cls, layer: nn.Module, positions: int = 64) -> "Sampler":
        """The sampler of a plain torch layer.

        >>> sampler = Sampler.of(nn.Conv2d(2, 4, 3))
        >>> sampler.rows(torch.zeros(5, 2, 8, 8), seed=0).shape  # (groups, samples, inputs of an output)
        torch.Size([1, 180, 18])
        """
        if isinstance(layer, nn.Linear):
            return cls(Geometry.linear(layer.in_features, layer.out_features), positions)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        geometry = Geometry.conv(
            len(layer.kernel_size),
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
        )
        return cls(geometry, positions)

    def rows(self, x: Tensor, seed: int) -> Tensor:
        """Rows (groups, samples, inputs per output) of an input of the layer; equal seeds, equal places."""
        dims, groups = self.geometry.dims, self.geometry.groups
        if dims == 0:
            return x.reshape(1, -1, x.shape[-1])
        if x.dim() == dims + 1:
            x = x[None]
        taken = self._taken(self._windows(x), seed)
        return taken.reshape(len(taken), groups, self.geometry.cols).transpose(0, 1)

    def _windows(self, x: Tensor) -> Tensor:
        """A view (N, *out, C, *kernel) of the padded input."""
        geometry, dims = self.geometry, self.geometry.dims
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x = F.pad(x, geometry.functional_padding(), mode=mode)
        for axis, (kernel, stride, dilation) in enumerate(
            zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
        ):
            x = x.unfold(axis + 2, dilation * (kernel - 1) + 1, stride)
        for axis, dilation in enumerate(geometry.dilation):
            x = x[(slice(None),) * (2 + dims + axis) + (slice(None, None, dilation),)]
        out = range(2, 2 + dims)
        return x.permute(0, *out, 1, *range(2 + dims, 2 + 2 * dims))

    def _taken(self, windows: Tensor, seed: int) -> Tensor:
        images, dims = len(windows), self.geometry.dims
        out = windows.shape[1 : 1 + dims]
        total = out.numel()
        if total <= self.positions:
            return windows.reshape(images * total, *windows.shape[1 + dims :])
        # One position in each of `positions` equal stretches: spread like a grid, with no period of its own.
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(images, self.positions, generator=generator, dtype=torch.float64)
        stretch = torch.arange(self.positions) + drawn
        flat = (stretch * (total / self.positions)).long().clamp_(max=total - 1)
        places = torch.unravel_index(flat.to(windows.device), out)
        image = torch.arange(images, device=windows.device)[:, None]
        return windows[(image, *places)].reshape(images * self.positions, *windows.shape[1 + dims :])
