"""Which dense class becomes which sparse one, and the few facts about a layer that the swap needs."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from sparseprop.errors import SparsePropError
from sparseprop.masks import NMPattern, check_nm
from sparseprop.nn import SparseConv1d, SparseConv2d, SparseConv3d, SparseLayer, SparseLinear

__all__ = ["SPARSE_CLASS", "Facts", "facts", "is_pruned", "sparse_from_dense"]

SPARSE_CLASS: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.Conv3d: SparseConv3d,
}


@dataclass(frozen=True)
class Facts:
    """A layer as a contraction: `rows` outputs, each a sum over `cols` inputs, at many positions.

    Attributes:
        kind: class name of the dense layer.
        rows, cols: shape of the weight, everything after its first dimension flattened.
        groups: 1 for ``Linear``.
        kernel, stride, padding, dilation, padding_mode: as in the torch module; empty for ``Linear``.
    """

    kind: str
    rows: int
    cols: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"

    @property
    def in_features(self) -> int:
        """Inputs (features or channels) a position reads: what a change of layout has to move."""
        return self.cols * self.groups // max(1, math.prod(self.kernel))

    @property
    def depthwise(self) -> bool:
        """Whether each output reads one channel only."""
        return self.groups > 1 and self.cols == math.prod(self.kernel)


def facts(module: nn.Module) -> Facts:
    """The facts of a dense ``Linear`` or ``Conv`` layer, pruned or not."""
    if isinstance(module, nn.Linear):
        return Facts("Linear", module.out_features, module.in_features)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return Facts(
        type(module).__name__,
        module.out_channels,
        module.in_channels // module.groups * math.prod(module.kernel_size),
        module.groups,
        tuple(module.kernel_size),
        tuple(module.stride),
        module.padding if isinstance(module.padding, str) else tuple(module.padding),
        tuple(module.dilation),
        module.padding_mode,
    )


def _checked_pattern(module: nn.Module, pattern: str | None) -> str | None:
    """The pattern as `from_dense` takes it: N:M, "auto", or None."""
    if pattern in (None, "auto"):
        return pattern
    groups = int(getattr(module, "groups", 1))
    mask = torch.as_tensor(module.weight_mask if is_pruned(module) else module.weight).detach() != 0
    wanted = NMPattern.parse(pattern)
    if wanted.transposable and not check_nm(mask, wanted.n, wanted.m, transposable=True, groups=groups):
        raise SparsePropError(
            f"the weight is not {wanted}: its mask or its mask's transpose is not {wanted.n}:{wanted.m}; "
            f"convert it to {wanted} first or leave `pattern` out."
        )
    return f"{wanted.n}:{wanted.m}"


def is_pruned(module: nn.Module) -> bool:
    """Whether ``torch.nn.utils.prune`` masks the weight of `module`."""
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight" for hook in hooks)


def sparse_from_dense(module: nn.Module, name: str, pattern: str | None = None) -> SparseLayer:
    """The sparse form of a dense layer, which must have the N:M pattern; errors carry the layer's name.

    ``"auto"`` takes the tightest N:M pattern that the layer has, or none.
    """
    try:
        return SPARSE_CLASS[type(module)].from_dense(module, pattern=_checked_pattern(module, pattern))
    except SparsePropError as error:
        raise SparsePropError(f"Layer {name!r} cannot become sparse: {error}") from error
