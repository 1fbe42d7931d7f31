"""Modules of an inverted residual block, run as one call in evaluation where that can be done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparseprop.nn.base import SparseLayer
from sparseprop.nn.chain import depthwise_chain, depthwise_windows, is_plain_depthwise
from sparseprop.nn.hooks import hooked, hooks_everywhere
from sparseprop.nn.mixin import Mixin
from sparseprop.nn.norm import NativeNorm, norm_behind
from sparseprop.ops.eligible import kernels_may_read
from sparseprop.ops.inverted import InvertedBlock, SparseStep

__all__ = ["BlockParts", "MaybeInverted", "inverted_blocks", "inverted_residual"]


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
        block = _block(modules, (first_cap, second_cap, third_cap))
        out = None if block is None else block(x)
        if out is not None:
            return out
    x = depthwise_chain(x, layer, first, first_cap, conv, second, second_cap)
    return norm_behind(third, project, x, cap=third_cap)


@dataclass(frozen=True)
class BlockParts:
    """Where a module's forward, in evaluation little else than `inverted_residual`, finds what it calls.

    Attributes:
        paths: names on the way to the convolution, second norm, last layer and norm[, first layer and norm].
        caps: of the three activations.
        adds: whether it adds its input to the result.
    """

    paths: tuple[tuple[str, ...], ...]
    caps: tuple[float, float, float]
    adds: bool


class MaybeInverted(Mixin):
    """A module whose forward may be an inverted residual block in evaluation."""

    def inverted_parts(self) -> BlockParts | None:
        """Its parts if it is one as it stands now."""
        raise NotImplementedError


def inverted_blocks(x: Tensor, *blocks: tuple[nn.Module, str | None, bool]) -> Tensor:
    """`module(x)` for one module after the other: (module, child, adds).

    Each is a `MaybeInverted`, or calls its child of that name, which is one, and may add its input to that.
    In evaluation without gradients all are looked through before the first one runs: beside kernels, which
    fill the caches, the same takes three times as long.
    """
    may = kernels_may_read(x) and not torch.is_grad_enabled() and not hooks_everywhere()
    done = 0
    for block, additions in list(_ready_ones(blocks)) if may else []:
        out = block(x)
        if out is None or (additions and out.shape != x.shape):
            break
        x = out.add_(x, alpha=additions) if additions else out
        done += 1
    for module, _, _ in blocks[done:]:
        x = module(x)
    return x


# by the first module: of each, how it was when it was looked through, and its block
_Ready = tuple[InvertedBlock, int]  # and how often the input is added to its output
_watched: WeakKeyDictionary[nn.Module, list[tuple[Any, _Ready] | None]] = WeakKeyDictionary()


def _ready_ones(blocks: Sequence[tuple[nn.Module, str | None, bool]]) -> Iterator[_Ready]:
    """The blocks up to the first that cannot be one call as it stands."""
    from sparseprop._native import ModuleWatch

    first = blocks[0][0]
    watched = _watched.get(first)
    if watched is None or len(watched) != len(blocks):
        watched = _watched[first] = [None] * len(blocks)
    for i, (module, child, adds) in enumerate(blocks):
        known = watched[i]
        if known is None or not known[0].holds(module):
            ready = _ready(module, child, adds)
            if ready is None:
                return
            known = watched[i] = ModuleWatch(module), ready
        yield known[1]


def _ready(module: nn.Module, child: str | None, adds: bool) -> _Ready | None:
    block: Any = module
    if child is not None:
        if hooked(module) or module.training or "forward" in vars(module):
            return None
        block = module._modules.get(child)
    if not isinstance(block, MaybeInverted) or hooked(block):
        return None
    parts = block.inverted_parts()
    if parts is None:
        return None
    found: list[nn.Module] = []
    for path in parts.paths:
        part: Any = block
        for name in path:
            part = part._modules[name]
        found.append(part)
    made = _block(found, parts.caps)
    return None if made is None else (made, adds + parts.adds)


# by the depthwise convolution: the state of all modules when the block was made, and the block, if possible
_blocks: WeakKeyDictionary[nn.Module, tuple[list[Any], InvertedBlock | None]] = WeakKeyDictionary()


def _block(modules: Sequence[nn.Module], caps: tuple[float, float, float]) -> InvertedBlock | None:
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
        state += type(module), module.training, hooked(module), fields.get("eps")
        if isinstance(module, SparseLayer):
            state.append(module.operator())
        elif isinstance(module, nn.Conv2d):
            state += module.stride, module.padding, module.dilation, module.groups
        else:
            tensors += map(module._buffers.get, _STATISTICS)
    state += map(id, tensors)
    tensors = [tensor for tensor in tensors if tensor is not None]
    for what in (Tensor.data_ptr, Tensor.numel, _dtype):
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
    return not (hooked(module) or module._modules or {weight, "bias"} - module._parameters.keys())


def _step(layer: nn.Module, norm: nn.Module, cap: float) -> SparseStep | None:
    if not isinstance(layer, SparseLayer) or not isinstance(norm, NativeNorm):
        return None
    known = norm.known(cap)
    return None if known is None else layer.step(known)
