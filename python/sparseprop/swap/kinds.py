"""Which dense class becomes which sparse one, and the few facts about a layer that the swap needs."""

import math
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from sparseprop.errors import SparsePropError
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


def is_pruned(module: nn.Module) -> bool:
    """Whether ``torch.nn.utils.prune`` masks the weight of `module`."""
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight" for hook in hooks)


def sparse_from_dense(module: nn.Module, name: str) -> SparseLayer:
    """The sparse form of a dense layer; errors carry the layer's name."""
    try:
        return SPARSE_CLASS[type(module)].from_dense(module)
    except SparsePropError as error:
        raise SparsePropError(f"Layer {name!r} cannot become sparse: {error}") from error
