"""Gradual magnitude pruning: how sparse at which step (Zhu & Gupta 2017), and which weights go."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseprop.errors import SparsePropError
from sparseprop.masks import global_unstructured_masks, unstructured_mask

__all__ = ["CubicSchedule", "magnitude_masks", "prunable_layers", "sparsity_of"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class CubicSchedule:
    """Sparsity as a pure function of the step: from ``initial`` to ``final`` over ``ramp`` steps, fast at
    first and slow at the end, changing every ``every`` steps.

    >>> schedule = CubicSchedule(initial=0.0, final=0.9, ramp=100, every=10)
    >>> [round(schedule.at(step), 3) for step in (0, 10, 19, 50, 100, 1000)]
    [0.0, 0.244, 0.244, 0.787, 0.9, 0.9]
    """

    initial: float
    final: float
    ramp: int
    every: int

    def at(self, step: int) -> float:
        """The sparsity that holds while step ``step`` runs."""
        if step >= self.ramp:
            return self.final
        left = 1 - (step // self.every * self.every) / self.ramp
        return self.final + (self.initial - self.final) * left**3

    def is_event(self, step: int) -> bool:
        """Whether the sparsity changes before step ``step``."""
        return step == self.ramp or (0 < step < self.ramp and step % self.every == 0)


def prunable_layers(model: nn.Module, *, num_classes: int) -> dict[str, nn.Module]:
    """The layers a job prunes, by name: exact ``Linear`` and ``Conv`` layers, without the first (it sees the
    image), the classifier, depthwise convolutions and layers that share a weight. Raises `SparsePropError`
    if nothing is left.
    """
    plain = {name: module for name, module in model.named_modules() if type(module) in _KINDS}
    names = list(plain)[1:]
    last = plain[names[-1]] if names else None
    if isinstance(last, nn.Linear) and last.out_features == num_classes:
        names.pop()
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = {
        name: plain[name]
        for name in names
        if owners[id(plain[name].weight)] == 1 and getattr(plain[name], "groups", 1) == 1
    }
    if not layers:
        raise SparsePropError(
            f"the model has nothing to prune or swap: {len(plain)} plain Linear and Conv layers, none "
            "besides the first and the classifier; use a deeper model"
        )
    return layers


def magnitude_masks(
    weights: Mapping[str, Tensor], sparsity: float, *, scope: str, masks: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Boolean masks that keep the largest weights; exact counts, and the earlier of equal weights stays.

    ``scope`` ``"layer"`` keeps the same share of each weight, ``"global"`` ranks all weights together. What
    ``masks`` has pruned stays pruned as long as the counts allow it.

    >>> import torch
    >>> magnitude_masks({"fc": torch.tensor([[3.0, -1.0], [1.0, 0.5]])}, 0.5, scope="layer")["fc"].tolist()
    [[True, True], [False, False]]
    """
    scores = {name: weight.detach().abs() for name, weight in weights.items()}
    for name, mask in (masks or {}).items():  # a kept weight of zero still ranks above a pruned one
        score = scores[name].to(torch.promote_types(scores[name].dtype, torch.float32))
        scores[name] = score.clamp_min(torch.finfo(score.dtype).tiny).where(mask, 0.0)
    if scope == "layer":
        return {name: unstructured_mask(score, 1 - sparsity) for name, score in scores.items()}
    return global_unstructured_masks(scores, 1 - sparsity, min_keep_per_layer=1)


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """The share of zeros over all of ``masks``."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.count_nonzero()) for mask in masks.values()) / total
