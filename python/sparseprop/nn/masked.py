"""The masked twins of torch's Linear and Conv layers: dense weights, of which the mask keeps a part."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sparseprop.nn.conv import SparseConv1d, SparseConv2d, SparseConv3d
from sparseprop.nn.linear import SparseLinear
from sparseprop.nn.mask_rule import MaskRule
from sparseprop.nn.masked_base import MaskedLayer

__all__ = ["MaskedConv1d", "MaskedConv2d", "MaskedConv3d", "MaskedLinear"]


class MaskedLinear(MaskedLayer, nn.Linear):
    """`torch.nn.Linear` whose forward pass uses ``weight * mask``.

    >>> layer = MaskedLinear.from_dense(nn.Linear(8, 4), pattern="2:4")
    >>> layer(torch.ones(3, 8)).shape
    torch.Size([3, 4])
    """

    _sparse_type = SparseLinear
    _dense_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rule: MaskRule | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, **kwargs)
        self._start(rule)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(input, self.masked_weight(), self.bias)


class _MaskedConv(MaskedLayer):
    def __init__(self, *args: Any, rule: MaskRule | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start(rule)

    def forward(self, input: Tensor) -> Tensor:
        """As the dense layer."""
        result: Tensor = self._conv_forward(input, self.masked_weight(), self.bias)  # type: ignore[operator]
        return result


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """`torch.nn.Conv1d` whose forward pass uses ``weight * mask``.

    >>> MaskedConv1d.from_dense(nn.Conv1d(4, 8, 3), pattern="2:4")(torch.ones(1, 4, 5)).shape
    torch.Size([1, 8, 3])
    """

    _sparse_type = SparseConv1d
    _dense_type = nn.Conv1d


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """`torch.nn.Conv2d` whose forward pass uses ``weight * mask``.

    >>> MaskedConv2d.from_dense(nn.Conv2d(4, 8, 3), pattern="2:4T")(torch.ones(1, 4, 5, 5)).shape
    torch.Size([1, 8, 3, 3])
    """

    _sparse_type = SparseConv2d
    _dense_type = nn.Conv2d


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    """`torch.nn.Conv3d` whose forward pass uses ``weight * mask``.

    >>> MaskedConv3d.from_dense(nn.Conv3d(4, 8, 3), pattern="1:4")(torch.ones(1, 4, 5, 5, 5)).shape
    torch.Size([1, 8, 3, 3, 3])
    """

    _sparse_type = SparseConv3d
    _dense_type = nn.Conv3d
