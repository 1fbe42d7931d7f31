"""Modules of an inverted residual block, run as one call in evaluation where that can be done."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparseprop.nn.base import SparseLayer
from sparseprop.nn.chain import depthwise_chain, depthwise_windows, is_plain_depthwise
from sparseprop.nn.hooks import hooked, hooks_everywhere
from sparseprop.nn.norm import NativeNorm, norm_behind
from sparseprop.ops.eligible import kernels_may_read
from sparseprop.ops.inverted import InvertedBlock, SparseStep

__all__ = ["block_of", "inverted_residual"]


def inverted_residual(
    x: Tensor,
    layer: nn.Module | None,
    first: nn.Module | None,
    first_cap: float,
    conv: nn.Module,
    second: nn.Module,
    second_cap: float,
    project: nn.Module,
    third: nn.Module,
    third_cap: float,
) -> Tensor:
    """`third(project(depthwise_chain(x, ...)))`, with the activations of the batch norms.

    `layer` and `first` may be None. One call for contiguous inputs, in evaluation without gradients, if no
    hook would miss a call.

    >>> conv, project = nn.Conv2d(2, 2, 1, groups=2, bias=False), nn.Conv2d(2, 3, 1)
    >>> norms = nn.BatchNorm2d(2), nn.BatchNorm2d(3)
    >>> args = torch.ones(1, 2, 3, 3), None, None, 0.0, conv, norms[0], 0.0, project, norms[1], 0.0
    >>> inverted_residual(*args).shape
    torch.Size([1, 3, 3, 3])
    """
    if kernels_may_read(x) and not torch.is_grad_enabled() and not hooks_everywhere():
        modules = [conv, second, project, third, *(each for each in (layer, first) if each is not None)]
        block = block_of(modules, (first_cap, second_cap, third_cap))
        out = None if block is None else block(x)
        if out is not None:
            return out
    x = depthwise_chain(x, layer, first, first_cap, conv, second, second_cap)
    return norm_behind(third, project, x, cap=third_cap)


# by the depthwise convolution: the state of all modules when the block was made, and the block, if possible
_blocks: WeakKeyDictionary[nn.Module, tuple[list[Any], InvertedBlock | None]] = WeakKeyDictionary()


def block_of(modules: Sequence[nn.Module], caps: tuple[float, float, float]) -> InvertedBlock | None:
    """The block that these are now: convolution, norm, last layer and norm[, first layer and norm]."""
    state = [*caps, *_state(modules)]
    known = _blocks.get(modules[0])
    if known is None or known[0] != state:
        known = _blocks[modules[0]] = state, _made(modules, caps)
    return known[1]


_STATISTICS = ("running_mean", "running_var")
_dtype = attrgetter("dtype")


def _state(modules: Sequence[nn.Module]) -> list[Any]:
    """All that the kernels read of the modules but the numbers themselves, and what rules out one call."""
    state: list[Any] = []
    tensors: list[Any] = []
    for module in modules:
        tensors += module._parameters.values()
        fields = vars(module)
        state += type(module), type(module).forward, module.training, hooked(module), fields.get("eps")
        if isinstance(module, SparseLayer):
            state.append(module.operator())
        elif isinstance(module, nn.Conv2d):
            state += module.stride, module.padding, module.dilation, module.groups, module.padding_mode
        else:
            tensors += map(module._buffers.get, _STATISTICS)
    state += map(id, tensors)
    tensors = [tensor for tensor in tensors if tensor is not None]
    for what in (Tensor.data_ptr, Tensor.numel, Tensor.stride, Tensor.is_neg, _dtype):
        state += map(what, tensors)
    return state


def _made(modules: Sequence[nn.Module], caps: tuple[float, float, float]) -> InvertedBlock | None:
    conv, second, project, third, *before = modules
    if not is_plain_depthwise(conv) or not all(map(_is_plain, modules)) or len(before) == 1:
        return None
    expand = _step(before[0], before[1], caps[0]) if before else None
    norm = second.known(caps[1]) if isinstance(second, NativeNorm) else None
    last = _step(project, third, caps[2])
    if norm is None or last is None or (before and expand is None):
        return None
    conv = cast(nn.Conv2d, conv)
    return InvertedBlock(expand, conv.weight, depthwise_windows(conv), norm, last)


def _is_plain(module: nn.Module) -> bool:
    """Whether no hook would miss a call, and `_state` sees all that its numbers come from."""
    weight = "weight_values" if isinstance(module, SparseLayer) else "weight"
    named = {weight, "bias"} <= module._parameters.keys()
    readable = all(each is None or (each.is_contiguous() and not each.is_neg()) for each in _numbers(module))
    return not hooked(module) and not module._modules and named and readable


def _numbers(module: nn.Module) -> list[Tensor | None]:
    return [*module._parameters.values(), *map(module._buffers.get, _STATISTICS)]


def _step(layer: nn.Module, norm: nn.Module, cap: float) -> SparseStep | None:
    if not isinstance(layer, SparseLayer) or not isinstance(norm, NativeNorm):
        return None
    known = norm.known(cap)
    return None if known is None else layer.step(known)
