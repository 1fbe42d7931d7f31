"""From masked dense layers to sparse ones, by a plan that a run keeps."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sparseprop
from sparseprop import SwapPlan
from sparseprop.errors import SparsePropError
from sparseprop.train.checkpoint import read_text, write_text
from sparseprop.train.config import FinetuneConfig
from sparseprop.train.models import ModelSpec
from sparseprop.train.prune import magnitude_masks

__all__ = ["NOT_PRUNED", "check_swap", "example_batch", "planned", "swap_pruned", "with_masks"]

NOT_PRUNED = "not pruned: first layer, classifier or depthwise"


def swap_pruned(
    model: nn.Module, masks: Mapping[str, Tensor], config: FinetuneConfig, spec: ModelSpec, plan_file: Path
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Swap the masked layers of ``model`` as the plan in ``plan_file`` says, made and written there first if
    need be, and fuse what lies between. Returns the model and the masks of the layers that stay dense."""
    with_masks(model, masks)
    if plan_file.is_file():
        plan = SwapPlan.from_json(read_text(plan_file))
    else:
        plan = planned(model, masks, config, spec)
        _require_sparse(plan)
        write_text(plan_file, plan.to_json())
    model = sparseprop.swap_modules(model, plan=plan)
    if plan.layout == "channels_last":  # images follow the first dense convolution
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    left = {name: mask for name, mask in masks.items() if name not in plan.sparse_names}
    for name in left:
        prune.remove(model.get_submodule(name), "weight")  # type: ignore[no-untyped-call]
    return sparseprop.fuse(model) if config.fuse else model, left


def check_swap(
    model: nn.Module, layers: Mapping[str, nn.Module], config: FinetuneConfig, spec: ModelSpec
) -> None:
    """Raise `SparsePropError` if the plan would swap nothing once ``layers`` are pruned: better now than
    after hours of training. Measurements are left for later."""
    trial = copy.deepcopy(model)
    weights = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    with_masks(trial, magnitude_masks(weights, config.sparsity, scope=config.scope))
    _require_sparse(planned(trial, layers, dataclasses.replace(config, measure=False), spec))


def with_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Attach masks the way torch's own pruning does, so that a kept weight that is zero stays kept."""
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", mask)  # type: ignore[no-untyped-call]


def planned(
    model: nn.Module, names: Mapping[str, object], config: FinetuneConfig, spec: ModelSpec
) -> SwapPlan:
    """The plan for the layers called ``names``: measured, by least sparsity, or by the cost model."""
    example = example_batch(config.batch_size, spec)
    plan = sparseprop.plan(
        model,
        example,
        min_sparsity=config.min_sparsity,
        filter_fn=lambda _, name: name in names,
        measure=config.measure,
    )
    unpruned = {layer.name for layer in plan} - set(names)
    layers = (
        dataclasses.replace(layer, reason=NOT_PRUNED) if layer.name in unpruned else layer for layer in plan
    )
    return dataclasses.replace(plan, layers=tuple(layers))


def example_batch(batch_size: int, spec: ModelSpec) -> Tensor:
    """A batch of zeros; raises `SparsePropError` if there is no memory for so many."""
    try:
        return torch.zeros(batch_size, spec.channels, spec.image_size, spec.image_size)
    except (RuntimeError, TypeError, MemoryError):  # a TypeError if a number does not fit 64 bits
        side = spec.image_size
        raise SparsePropError(
            f"{batch_size} images of {spec.channels}x{side}x{side} do not fit in memory; choose a smaller "
            "batch size or smaller images"
        ) from None


def _require_sparse(plan: SwapPlan) -> None:
    if plan.sparse_names:
        return
    reasons = sorted({layer.reason for layer in plan if layer.reason != NOT_PRUNED})
    raise SparsePropError(
        f"no layer of the model would become sparse ({'; '.join(reasons[:3])}); expected at least one; ask "
        "for a higher sparsity, or force the swap with a min_sparsity below it"
    )
