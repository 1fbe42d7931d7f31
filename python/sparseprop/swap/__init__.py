"""From a dense model to one with sparse layers and back: plan first, then replace."""

from sparseprop.swap.plan import LayerPlan, SwapPlan
from sparseprop.swap.replace import NothingSwappedWarning, swap_modules, to_dense

__all__ = ["LayerPlan", "NothingSwappedWarning", "SwapPlan", "swap_modules", "to_dense"]
