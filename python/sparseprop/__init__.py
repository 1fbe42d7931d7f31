"""Train neural networks with sparse weights, fast, on ordinary CPUs."""

from sparseprop import masks, nn
from sparseprop.backend import active_isa, available_isas
from sparseprop.conversion import ConversionReport, convert
from sparseprop.errors import SparsePropError
from sparseprop.memory import keep_freed_memory
from sparseprop.optim import ParameterMemory, param_groups, parameter_memory
from sparseprop.pattern import SparsityPattern
from sparseprop.profiling import StepProfile, profile
from sparseprop.swap.fuse import Fusion, fuse, plan_fusion, unfuse
from sparseprop.swap.masking import decouple_decay, freeze_modules, mask_modules
from sparseprop.swap.plan import LayerPlan, SwapPlan
from sparseprop.swap.planner import plan
from sparseprop.swap.replace import swap_modules, to_dense
from sparseprop.swap.state import dense_state_dict, swap_like

__all__ = [
    "ConversionReport",
    "Fusion",
    "LayerPlan",
    "ParameterMemory",
    "SparsePropError",
    "SparsityPattern",
    "StepProfile",
    "SwapPlan",
    "active_isa",
    "available_isas",
    "convert",
    "decouple_decay",
    "dense_state_dict",
    "freeze_modules",
    "fuse",
    "keep_freed_memory",
    "mask_modules",
    "masks",
    "nn",
    "param_groups",
    "parameter_memory",
    "plan",
    "plan_fusion",
    "profile",
    "swap_like",
    "swap_modules",
    "to_dense",
    "unfuse",
]
__version__ = "0.1.0"
