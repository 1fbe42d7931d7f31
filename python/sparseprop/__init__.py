"""Train neural networks with sparse weights, fast, on ordinary CPUs."""

from sparseprop import nn
from sparseprop.backend import active_isa, available_isas
from sparseprop.errors import SparsePropError
from sparseprop.pattern import SparsityPattern

__all__ = ["SparsePropError", "SparsityPattern", "active_isa", "available_isas", "nn"]
__version__ = "0.1.0"
