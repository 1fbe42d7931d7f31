"""Make what lies between the sparse layers cheaper: batch norm and what follows it, attention, GELU."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import cast

from torch import nn

from sparseprop.errors import SparsePropError
from sparseprop.nn.attention import NativeAttention, computes_attention
from sparseprop.nn.gelu import NativeGELU, is_gelu
from sparseprop.nn.mixin import Mixin, mix, unmix
from sparseprop.nn.norm import NATIVE_NORMS, NativeNorm
from sparseprop.nn.norm_act import NativeNormAct, has_own_activation, obstacle, own_cap
from sparseprop.nn.pool import MaxPool2d
from sparseprop.swap.blocks import calls_blocks
from sparseprop.swap.decide import check_model
from sparseprop.swap.graphs import FUNCTION
from sparseprop.swap.matches import NormCall, norm_calls, why_alone
from sparseprop.swap.rewrite import rewrite

__all__ = ["Fusion", "fuse", "plan_fusion", "unfuse"]

_TORCH_NORMS = {native: torch_class for torch_class, native in NATIVE_NORMS.items()}


@dataclass(frozen=True)
class Fusion:
    """What becomes of one batch norm, of a module that computes attention, or of a GELU.

    Attributes:
        name: of the batch norm or module in ``model.named_modules()``.
        relu: name of the ReLU or ReLU6 that it takes along, "relu()" for a function, None if none.
        native: whether it becomes native at all.
        reason: why no ReLU, or nothing at all, in a few words; "" if both, or if there is none to take.
        adds: whether it takes an addition along as well, of a residual connection.
        pool: name of the max pooling behind the ReLU that it takes along, None if none.
        conv: name of the depthwise convolution that it runs in one chain with, None if none.
        attention: whether it is no batch norm, but a module whose attention our kernels compute.
        gelu: whether it is no batch norm, but a GELU.
    """

    name: str
    relu: str | None
    native: bool
    reason: str
    adds: bool = False
    pool: str | None = None
    conv: str | None = None
    attention: bool = False
    gelu: bool = False


def plan_fusion(model: nn.Module) -> tuple[Fusion, ...]:
    """Which batch norms of `model` can become native, and which can take the ReLU behind them along; the
    modules that compute attention, and the GELUs that are modules.

    What follows a batch norm is found by tracing (`torch.fx`) the forward of the module that owns it, or of
    the one around that container. What cannot be traced still gets native batch norms. Changes nothing.

    >>> plan_fusion(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))[0].relu
    '1'
    """
    check_model(model, "fuse")
    calls = _own_calls(model)
    plan = []
    for name, module in model.named_modules():
        if computes_attention(module) and not isinstance(module, Mixin) and not norm_calls(module):
            plan.append(Fusion(name, None, True, "", attention=True))
        if is_gelu(module) and not isinstance(module, Mixin):
            plan.append(Fusion(name, None, True, "", gelu=True))
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, (NativeNorm, Mixin)):
            continue
        if has_own_activation(module):
            plan.append(Fusion(name, _join(name, "act") if own_cap(module) else None, True, obstacle(module)))
        elif type(module) not in NATIVE_NORMS or "forward" in vars(module):
            plan.append(Fusion(name, None, False, f"{type(module).__name__} is not torch's own batch norm"))
        elif name in calls:
            call = calls[name]
            plan.append(Fusion(name, call.relu, True, "", call.adds, call.pool, call.conv))
        else:
            owner, _, child = name.rpartition(".")
            plan.append(Fusion(name, None, True, why_alone(model.get_submodule(owner), child)))
    return tuple(plan)


def fuse(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Make the batch norms of `model` native, with the addition and ReLU behind each, as `plan_fusion` says.

    2-D max pooling becomes native too, the GELUs of torch and transformers, and attention:
    `scaled_dot_product_attention` in modules that call it, as those of torch, timm and transformers do (not
    while compiling). In evaluation mode, while no gradients are recorded, a sparse layer runs the batch norm
    behind it, if both are called in one forward, and sparse layers around a depthwise convolution run with it
    as one call, image by image: swap first, then fuse. In training, where a sparse layer's input is read
    again (a residual connection), the layer adds the gradients of both.

    Same results within float32 rounding, forward, backward, running statistics; modules keep their names,
    parameters, buffers and hooks, and `isinstance` tests still hold. `unfuse` is the exact inverse. Hooks,
    children and their classes count whenever they come: what they touch is called one by one again.

    A changed forward runs where all its arguments are tensors and none with a default is given. It computes
    what it would have computed; of all else that its code does, such as printing, nothing happens, plain
    attributes that steer it are read now, and `type()` of a value is not that of a tensor: `unfuse` before
    you change such an attribute, then `fuse` again. (Forwards that draw random numbers, set attributes, keep
    tensors, or switch gradients or autocast are recognised, and left as they are.) Queries, keys and values
    that attention is computed of, if all are parts of one tensor, get no gradients of their own: that one
    does.

    Args:
        model: any eager module, swapped or not.
        inplace: change `model` itself (default), or leave it alone and return a changed copy.

    >>> model = fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    >>> isinstance(model, nn.Sequential), isinstance(model[1], nn.BatchNorm2d)
    (True, True)
    """
    plan = plan_fusion(model)
    if not inplace:
        model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for fusion in plan:
        if not fusion.native:
            continue
        norm = modules[fusion.name]
        mixin = _mixin_for(fusion, norm)
        if mixin is not None:
            mix(mixin, norm)
            continue
        norm.__class__ = NATIVE_NORMS[type(norm)]
    for module in list(model.modules()):
        if type(module) is nn.MaxPool2d:
            module.__class__ = MaxPool2d
    for module in reversed(list(model.modules())):  # children first: a module knows their classes
        if norm_calls(module) or calls_blocks(module):
            rewrite(module)
    return model


def unfuse(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Give every module that `fuse` changed its torch class back.

    >>> type(unfuse(fuse(nn.Sequential(nn.BatchNorm1d(4))))[0]) is nn.BatchNorm1d
    True
    """
    if not isinstance(model, nn.Module):
        raise SparsePropError(f"unfuse expects a torch.nn.Module, got {type(model).__name__}.")
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Mixin):
            unmix(module)
        if type(module) in _TORCH_NORMS:
            module.__class__ = _TORCH_NORMS[type(module)]
        elif type(module) is MaxPool2d:
            cast(nn.Module, module).__class__ = nn.MaxPool2d
    return model


def _mixin_for(fusion: Fusion, module: nn.Module) -> type[Mixin] | None:
    """What is mixed into the module's class, None for torch's batch norms, which get another class."""
    if fusion.attention:
        return NativeAttention
    if fusion.gelu:
        return NativeGELU
    return NativeNormAct if has_own_activation(module) else None


def _own_calls(model: nn.Module) -> dict[str, NormCall]:
    """The batch norms, by name, that the module owning them calls together with what follows."""
    found: dict[str, NormCall] = {}
    for name, module in model.named_modules():
        for call in norm_calls(module):
            if call.relu is None and call.conv is None:
                continue
            relu = call.relu if call.relu == FUNCTION else _join(name, call.relu)
            pool, conv = _join(name, call.pool), _join(name, call.conv)
            # a module that looks into its containers comes before them
            found.setdefault(
                cast(str, _join(name, call.norm)), dataclasses.replace(call, relu=relu, pool=pool, conv=conv)
            )
    return found


def _join(module: str, child: str | None) -> str | None:
    return f"{module}.{child}" if module and child else child
