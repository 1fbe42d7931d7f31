"""Layers with sparse weights, shaped and named like torch's own."""

from sparseprop.nn.base import SparseLayer
from sparseprop.nn.conv import SparseConv1d, SparseConv2d, SparseConv3d
from sparseprop.nn.linear import SparseLinear

__all__ = ["SparseConv1d", "SparseConv2d", "SparseConv3d", "SparseLayer", "SparseLinear"]
