"""From index tensors to what the kernels run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseprop import backend
from sparseprop.errors import SparsePropError
from sparseprop.geometry import Geometry
from sparseprop.ops.layout import lift
from sparseprop.packed import PackedNM
from sparseprop.pattern import SparsityPattern

__all__ = ["lower"]


def lower(geometry: Geometry, head: Tensor, index: Tensor) -> Any:
    """The contraction of a pattern, checked; it borrows the tensors' memory."""
    if head.device.type != "cpu" or index.device.type != "cpu":
        raise SparsePropError(
            f"the pattern must be on the CPU, got {index.device}; load a checkpoint or use `.to('cpu')`."
        )
    layer = (
        geometry.out_channels,
        geometry.in_channels,
        geometry.groups,
        lift(geometry.kernel_size, 1),
        lift(geometry.stride, 1),
        lift(geometry.dilation, 1),
    )
    head, index = head.detach().contiguous(), index.detach().contiguous()
    packed = index.dtype is torch.uint8
    pattern: SparsityPattern | PackedNM
    if packed:
        pattern = PackedNM(geometry.weight_shape, head, index)
    else:
        pattern = SparsityPattern(geometry.out_channels, geometry.cols, head, index)
    pattern.validate()
    try:
        if packed:
            return backend.Contraction.from_nm(*layer, *head.tolist(), index.numpy())
        return backend.Contraction(*layer, head.numpy(), index.numpy())
    except ValueError as error:
        raise SparsePropError(f"the pattern cannot be lowered: {error}") from error
