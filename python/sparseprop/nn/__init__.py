"""Layers with sparse weights, shaped and named like torch's own."""

from sparseprop.nn.base import SparseLayer
from sparseprop.nn.conv import SparseConv1d, SparseConv2d, SparseConv3d
from sparseprop.nn.linear import SparseLinear
from sparseprop.nn.mask_rule import MaskRule
from sparseprop.nn.masked import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear
from sparseprop.nn.masked_base import MaskedLayer

__all__ = [
    "MaskRule",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedLayer",
    "MaskedLinear",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseLayer",
    "SparseLinear",
]
