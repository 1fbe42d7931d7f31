"""Train neural networks with sparse weights, fast, on ordinary CPUs."""

from sparseprop import masks, nn
from sparseprop.backend import active_isa, available_isas
from sparseprop.conversion import ConversionReport, convert
from sparseprop.errors import SparsePropError
from sparseprop.pattern import SparsityPattern
from sparseprop.swap.masking import decouple_decay, freeze_modules, mask_modules
from sparseprop.swap.plan import LayerPlan, SwapPlan
from sparseprop.swap.planner import plan
from sparseprop.swap.replace import swap_modules, to_dense
from sparseprop.swap.state import dense_state_dict, swap_like

__all__ = [
    "ConversionReport",
    "LayerPlan",
    "SparsePropError",
    "SparsityPattern",
    "SwapPlan",
    "active_isa",
    "available_isas",
    "convert",
    "decouple_decay",
    "dense_state_dict",
    "freeze_modules",
    "mask_modules",
    "masks",
    "nn",
    "plan",
    "swap_like",
    "swap_modules",
    "to_dense",
]
__version__ = "0.1.0"
