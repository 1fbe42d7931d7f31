"""Inverted residual blocks one after the other, looked through before the first one runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparseprop.nn.hooks import hooked, hooks_everywhere
from sparseprop.nn.inverted import block_of
from sparseprop.nn.mixin import Mixin
from sparseprop.ops.eligible import kernels_may_read
from sparseprop.ops.inverted import InvertedBlock

__all__ = ["BlockParts", "MaybeInverted", "inverted_blocks"]


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

    def may_be_inverted(self) -> bool:
        """Whether it may be one in evaluation, whatever its mode is now."""
        return False

    def inverted_parts(self) -> BlockParts | None:
        """Its parts if it is one as it stands now, else None."""
        return None


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
    made = block_of(found, parts.caps)
    return None if made is None else (made, adds + parts.adds)
