"""Reading a dense layer: its weight, the mask it implies, and that mask's pattern."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from sparseprop.errors import SparsePropError
from sparseprop.nn.storage import Pattern
from sparseprop.packed import PACKED_SIZES, PackedNM
from sparseprop.pattern import SparsityPattern

__all__ = ["dense_source", "finished_mask", "finished_weight", "pattern_of"]


def dense_source(module: nn.Module, expected: type[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """The finished dense weight of a plain layer, and its `torch.nn.utils.prune` mask if it has one."""
    if parametrize.is_parametrized(module):
        raise SparsePropError(
            f"{type(module).__name__} is parametrized; call "
            "torch.nn.utils.parametrize.remove_parametrizations first."
        )
    if type(module) is not expected:
        raise SparsePropError(f"expected a plain torch.nn.{expected.__name__}, got {type(module).__name__}.")
    _refuse_hooks(module)
    weight = getattr(module, "weight_orig", module.weight)
    assert isinstance(weight, Tensor)
    if weight.device.type != "cpu":
        raise SparsePropError(f"the weight must be on the CPU, got {weight.device}; use `.to('cpu')` first.")
    if weight.dtype not in (torch.float32, torch.float64):
        raise SparsePropError(
            f"the weight must be float32 or float64, got {weight.dtype}; use `.float()` first."
        )
    return _pruned(module)


def finished_weight(module: nn.Module) -> Tensor:
    """A layer's weight as it is now, zero where `torch.nn.utils.prune` pruned it.

    Of a pruned layer, ``module.weight`` is what the last forward pass made of the parameter.

    >>> finished_weight(nn.Linear(3, 2)).shape
    torch.Size([2, 3])
    """
    weight, keep = _pruned(module)
    return weight if keep is None else torch.where(keep, weight, 0.0)


def _pruned(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    prune_mask = getattr(module, "weight_mask", None)
    weight = module.weight if prune_mask is None else module.weight_orig
    assert isinstance(weight, Tensor)
    if prune_mask is None:
        return weight.detach(), None
    keep = prune_mask != 0
    return (weight * torch.where(keep, prune_mask, 1)).detach(), keep  # a mask may scale as well


def _refuse_hooks(module: nn.Module) -> None:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [hook for kind in kinds for hook in getattr(module, kind).values()]
    if any(not isinstance(hook, BasePruningMethod) for hook in found):
        raise SparsePropError(
            f"{type(module).__name__} has hooks; remove them, convert, and register them on the sparse layer."
        )


def finished_mask(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The mask to use for a weight: the one given, checked, or where the weight is not zero."""
    if mask is None:
        return weight != 0
    if mask.dtype is not torch.bool:
        raise SparsePropError(f"mask must be a bool tensor, got {mask.dtype}; use e.g. `weight != 0`.")
    if mask.shape != weight.shape:
        raise SparsePropError(
            f"mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}."
        )
    if mask.device.type != "cpu":
        raise SparsePropError(f"mask must be on the CPU, got {mask.device}.")
    return mask


def pattern_of(mask: Tensor, wanted: str | None) -> Pattern:
    """A weight mask's pattern, packed if it is exactly the N:M wanted, or any for "auto".

    Refuses a mask that keeps more than N of M consecutive input channels anywhere.
    """
    packed = None
    if wanted == "auto":
        packed = PackedNM.detect(mask)
    elif wanted is not None:
        packed = _checked_nm(mask, wanted)
    return SparsityPattern.from_mask(mask) if packed is None else packed


def _checked_nm(mask: Tensor, pattern: str) -> PackedNM | None:
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if found is None or not 0 < int(found[1]) <= int(found[2]):
        raise SparsePropError(
            f"pattern must read 'N:M' with 0 < N <= M, such as '2:4', or 'auto', got {pattern!r}."
        )
    kept, of = int(found[1]), int(found[2])
    rows, channels = mask.shape[0], mask.shape[1]
    ragged = -channels % of  # a last group that is too short counts as filled up with zeros
    by_channel = nn.functional.pad(mask.reshape(rows, channels, -1).transpose(1, 2), (0, ragged))
    counts = by_channel.reshape(rows, -1, of).sum(-1)
    crowded = (counts > kept).sum().item()
    if crowded:
        raise SparsePropError(
            f"the weight is not {pattern}: {crowded} groups of {of} consecutive input channels keep more "
            f"than {kept}; prune it to {pattern} first or leave `pattern` out."
        )
    exact = not ragged and of in PACKED_SIZES and rows * channels > 0 and bool((counts == kept).all())
    return PackedNM.from_mask(mask, kept, of) if exact else None
