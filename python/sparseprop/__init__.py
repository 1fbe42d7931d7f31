"""Train neural networks with sparse weights, fast, on ordinary CPUs."""

from sparseprop.errors import SparsePropError

__all__ = ["SparsePropError"]
__version__ = "0.1.0"
