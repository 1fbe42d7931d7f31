"""Which layers of a model become 2:4 on a CUDA device, and why the others do not."""

from dataclasses import dataclass

import torch
from torch import nn

from sparseprop import semi_structured_backend
from sparseprop.errors import SparsePropError
from sparseprop.masks import NMPattern, retained_magnitude
from sparseprop.nn.convert import finished_weight
from sparseprop.semi_structured import DTYPES, SemiStructuredLinear, best_mask
from sparseprop.semi_structured_backend import shape_misfit
from sparseprop.swap.decide import Candidate, FilterFn, Target, survey
from sparseprop.swap.plan import LayerPlan, SwapPlan

__all__ = ["CUDA", "is_cuda", "make_semi_structured", "parse_cuda_pattern", "plan_semi_structured"]

CUDA = Target(
    devices=("cpu", "cuda"),  # a model may be moved after the swap
    dtypes=DTYPES,
    dtype_advice="2:4 on CUDA wants float16 or bfloat16, use .bfloat16() or .half()",
)


def is_cuda(device: torch.device | str | None) -> bool:
    """Whether a swap is for CUDA; SparsePropError for devices that are neither that nor the CPU."""
    kind = "cpu" if device is None else torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise SparsePropError(f"device got {device!r}, wanted 'cpu' or 'cuda'.")
    return kind == "cuda"


def parse_cuda_pattern(pattern: str | None) -> NMPattern:
    """2:4 or 2:4T, the only patterns that CUDA devices multiply by."""
    parsed = NMPattern.parse("2:4" if pattern is None else pattern)
    if (parsed.n, parsed.m) != (2, 4):
        raise SparsePropError(
            f"device='cuda' got pattern {str(parsed)!r}, wanted '2:4', or '2:4T', which makes input "
            "gradients sparse too."
        )
    return parsed


def plan_semi_structured(
    model: nn.Module, pattern: NMPattern, *, min_sparsity: float | None, filter_fn: FilterFn | None
) -> SwapPlan:
    """The plan of a swap for CUDA: every Linear that can be 2:4, without measuring anything."""
    layers = []
    for candidate in survey(model, filter_fn, CUDA):
        choice, reason = _Decision(pattern, min_sparsity).of(candidate)
        c = candidate
        layers.append(LayerPlan(c.name, c.kind, c.shape, c.sparsity, choice, None, None, reason))
    return SwapPlan(tuple(layers))


def make_semi_structured(layer: nn.Module, name: str, pattern: NMPattern) -> nn.Module:
    """The 2:4 form of a Linear; errors carry the layer's name."""
    if not isinstance(layer, nn.Linear):
        raise SparsePropError(
            f"Layer {name!r} cannot be 2:4 on CUDA: it is a {type(layer).__name__}, not a Linear; plan anew."
        )
    try:
        return SemiStructuredLinear.from_dense(layer, pattern=str(pattern))
    except SparsePropError as error:
        raise SparsePropError(f"Layer {name!r} cannot be 2:4 on CUDA: {error}") from error


@dataclass(frozen=True)
class _Decision:
    pattern: NMPattern
    min_sparsity: float | None

    def of(self, candidate: Candidate) -> tuple[str, str]:
        if not isinstance(candidate.module, nn.Linear):
            return "dense", f"{candidate.kind}: torch's semi-structured tensors serve Linear only"
        if candidate.reason is not None or candidate.sparsity is None:
            return "dense", candidate.reason or "sparsity unknown"
        backend = semi_structured_backend.torch_backend()
        misfit = shape_misfit(candidate.shape, backend, transposable=self.pattern.transposable)
        if misfit is not None:
            return "dense", misfit
        if self.min_sparsity is not None and candidate.sparsity < self.min_sparsity:
            return "dense", f"sparsity is below min_sparsity {self.min_sparsity:g}"
        weight = finished_weight(candidate.module)
        kept = retained_magnitude(weight.abs(), best_mask(weight, self.pattern))
        return "sparse", f"{self.pattern} on CUDA keeps {100 * kept:.1f} % of |w|"
