"""Which layers may become sparse, and the stated reason for each that may not."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize, prune

from sparseprop.errors import SparsePropError
from sparseprop.swap.kinds import SPARSE_CLASS, is_pruned

__all__ = ["NOT_FINITE", "Candidate", "FilterFn", "Target", "check_model", "shared_memory", "survey"]

FilterFn = Callable[[nn.Module, str], bool]

NOT_FINITE = "weight holds NaN or Inf"

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Wrappers by where they live: looked up in sys.modules, since importing them costs seconds and a model can
# only be an instance of what somebody has imported already.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "swap the model first, then wrap it"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "swap the model first, then wrap it"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "swap the model first, then wrap it"),
    ("torch.distributed.fsdp", "FSDPModule", "swap the model first, then call fully_shard"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "swap the plain model first, then call torch.compile"),
    ("torch.jit", "ScriptModule", "swap the eager model; a scripted one cannot be changed"),
)


@dataclass(frozen=True)
class Target:
    """What a swap asks of a layer's weights: where they are and of which type."""

    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    dtype_advice: str = "float32 and float64 are supported"


_CPU = Target()


@dataclass(frozen=True)
class Candidate:
    """A ``Linear`` or ``Conv`` layer, and why it must stay dense: None if it may become sparse."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    sparsity: float | None
    reason: str | None

    @property
    def kind(self) -> str:
        return type(self.module).__name__


def check_model(model: object, caller: str) -> nn.Module:
    """`model`, if it is a module that can be changed in place.

    Raises:
        SparsePropError: it is no module, or is or holds a wrapper (data parallel, compiled, scripted).
    """
    if not isinstance(model, nn.Module):
        raise SparsePropError(f"{caller} expects a torch.nn.Module, got {type(model).__name__}.")
    wrappers = list(_loaded_wrappers())
    for name, module in model.named_modules():
        for wrapper, advice in wrappers:
            if isinstance(module, wrapper):
                what = f"layer {name!r}" if name else "the model"
                raise SparsePropError(f"{caller} cannot handle {what}: it is a {wrapper.__name__}; {advice}.")
    return model


def survey(model: nn.Module, filter_fn: FilterFn | None, target: Target = _CPU) -> list[Candidate]:
    """All dense ``Linear`` and ``Conv`` layers of `model`, each module once, in the model's order."""
    shared = shared_memory(model)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | _ConvNd):
            continue
        reason = _reason_of_kind(module)
        if reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn said no"
        reason = reason or _reason_of_extras(module) or _reason_of_weight(module, target)
        if reason is None and id(module) in shared:
            reason = f"weights shared with {shared[id(module)]!r}"
        weight = _raw_weight(module)
        lazy = not isinstance(weight, torch.Tensor) or nn.parameter.is_lazy(weight)
        sparsity = _sparsity(module) if reason is None else None
        if sparsity is None and reason is None:
            reason = NOT_FINITE
        found.append(Candidate(name, module, () if lazy else tuple(weight.shape), sparsity, reason))
    return found


def shared_memory(model: nn.Module) -> dict[int, str]:
    """``id`` of each module that shares parameter memory with another, and the name of one such parameter.

    Overlapping memory counts, not only the same ``Parameter``: two parameters may view one tensor.
    """
    spans = []
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or type(parameter) is not nn.Parameter or parameter.is_meta:
                continue
            if parameter.numel():
                start = parameter.data_ptr()
                steps = zip(parameter.shape, parameter.stride(), strict=True)
                last = sum((size - 1) * stride for size, stride in steps)
                end = start + (last + 1) * parameter.element_size()
                spans.append((start, end, id(module), f"{name}.{key}" if name else key))
    shared: dict[int, str] = {}
    group_end, group = 0, list[tuple[int, str]]()
    for start, end, owner, name in sorted(spans):
        if start >= group_end:
            group = []
        group.append((owner, name))
        group_end = max(group_end, end)
        for member, _ in group:
            others = [other for other_owner, other in group if other_owner != member]
            if others:
                shared.setdefault(member, others[0])
    return shared


def _loaded_wrappers() -> Iterator[tuple[type[Any], str]]:
    for module_name, class_name, advice in _WRAPPERS:
        wrapper = getattr(sys.modules.get(module_name), class_name, None)
        if wrapper is not None:
            yield wrapper, advice


def _raw_weight(module: nn.Module) -> Any:
    return module._parameters.get("weight_orig" if is_pruned(module) else "weight")


def _reason_of_kind(module: nn.Module) -> str | None:
    if isinstance(module, LazyModuleMixin):
        return "lazy layer without weights yet; run the model once"
    if isinstance(module, _ConvTransposeNd):
        return "transposed convolutions have no sparse form"
    if parametrize.is_parametrized(module):
        return "parametrized; call parametrize.remove_parametrizations first"
    if type(module) not in SPARSE_CLASS:
        base = next(kind.__name__ for kind in type(module).__mro__ if kind in SPARSE_CLASS or kind is _ConvNd)
        return f"{type(module).__name__} is a subclass of {base}"
    return None


def _reason_of_extras(module: nn.Module) -> str | None:
    """Whatever hangs on the layer that the swap would lose."""
    pruned = is_pruned(module)
    hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
    prune_hooks = [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod)]
    if any(hook._tensor_name != "weight" for hook in prune_hooks):
        return "its bias is pruned; call torch.nn.utils.prune.remove(layer, 'bias') first"
    if len(hooks) > len(prune_hooks):
        return "has hooks that would be lost"
    if "forward" in vars(module) or module._compiled_call_impl is not None:
        return "its forward was replaced"
    usual = {"weight_orig", "bias"} if pruned else {"weight", "bias"}
    extra = (module._parameters.keys() - usual) | module._modules.keys()
    extra |= module._buffers.keys() - ({"weight_mask"} if pruned else set())
    if extra or _raw_weight(module) is None:
        return f"its parameters are not the usual ones: {', '.join(sorted(extra)) or 'no weight'}"
    return None


def _reason_of_weight(module: nn.Module, target: Target) -> str | None:
    for key in ("weight", "weight_orig", "bias"):
        tensor = module._parameters.get(key)
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter:
            return f"{key} is a {type(tensor).__name__}, not a plain parameter"
        if tensor.device.type not in target.devices:
            hint = "holds no values yet" if tensor.device.type == "meta" else "move the model to the CPU"
            return f"{key} is on device {tensor.device}; {hint}"
        if tensor.dtype not in target.dtypes:
            return f"{key} is {str(tensor.dtype).removeprefix('torch.')}; {target.dtype_advice}"
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            return f"{key} has hooks that would be lost"
    return "weight is empty" if _raw_weight(module).numel() == 0 else None


def _sparsity(module: nn.Module) -> float | None:
    """Share of weights outside the pattern, None where the weight is not finite."""
    weight = _raw_weight(module).detach()
    if not weight.sum().isfinite() and not weight.isfinite().all():
        return None
    kept = module.weight_mask if is_pruned(module) else weight
    assert isinstance(kept, torch.Tensor)
    return 1.0 - int(torch.count_nonzero(kept)) / int(weight.numel())
