"""State dicts of sparse layers: what is written, and what is accepted when loading.

Written: `weight_values`, the pattern (`weight_row_ptr` and `weight_col_idx`, or `weight_nm` and
`weight_nm_bits`), `weight_shape`, `bias`. Accepted: that, with this or another pattern of the same shape in
either form, or the `weight` of the dense layer. All is checked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparseprop.errors import SparsePropError
from sparseprop.nn.storage import PATTERN_KEYS, Pattern, buffers_of, pattern_in

if TYPE_CHECKING:
    from sparseprop.nn.base import SparseLayer

__all__ = ["fitted"]


def fitted(layer: SparseLayer, state_dict: Mapping[str, Any], prefix: str, assign: bool) -> dict[str, Any]:
    """The layer's entries of a state dict, in the layer's own terms; makes room for them in the layer.

    `assign`: they take the place of the layer's tensors, which stay as they are.

    Raises SparsePropError before it changes anything if they do not fit.
    """
    own = {key[len(prefix) :]: entry for key, entry in state_dict.items() if key.startswith(prefix)}
    _check_tensors(layer, own)
    if "weight" in own and "weight_values" not in own:
        own = _gathered(layer, own)
    pattern = _checked(layer, own)
    if pattern is not None:
        _resize(layer, pattern, assign)
    return {prefix + key: entry for key, entry in own.items()}


def _gathered(layer: SparseLayer, own: dict[str, Any]) -> dict[str, Any]:
    """A dense layer's entries as this layer's: the weight at the pattern, zero elsewhere."""
    weight, shape = own["weight"], layer._geometry.weight_shape
    if weight.shape != shape:
        raise SparsePropError(f"weight must have shape {shape}, got {tuple(weight.shape)} in the state dict.")
    if layer.weight_shape.is_meta:
        raise SparsePropError(
            "a dense weight cannot be loaded into a layer on the meta device, whose pattern is not known; "
            "build the layer with `from_dense` or load a sparse state dict with assign=True."
        )
    values = weight.detach().reshape(-1)[layer.pattern.flat_index().to(weight.device)]
    outside = int(weight.count_nonzero()) - int(values.count_nonzero())
    if outside:
        raise SparsePropError(
            f"the dense weight in the state dict has {outside} non-zeros outside the layer's pattern of "
            f"{layer.nnz}; prune it to the layer's mask, or convert the dense layer with `from_dense`."
        )
    rest = {key: entry for key, entry in own.items() if key != "weight"}
    return rest | buffers_of(layer._held) | {"weight_shape": layer.weight_shape} | {"weight_values": values}


def _checked(layer: SparseLayer, own: dict[str, Any]) -> Pattern | None:
    """The pattern to adopt, if it differs from the layer's; refuses entries that do not fit together."""
    shape = layer._geometry.weight_shape
    if "weight_shape" in own and own["weight_shape"].tolist() != list(shape):
        raise SparsePropError(
            f"weight_shape must be {shape}, got {tuple(own['weight_shape'].tolist())} in the state dict."
        )
    _check_bias(layer, own)
    pattern = pattern_in(own, shape)
    if pattern is not None:
        pattern.validate()
        if not layer.weight_shape.is_meta and _same(pattern, layer._held):
            pattern = None
        elif "weight_values" not in own:
            raise SparsePropError("the state dict has another pattern but no weight_values to go with it.")
    nnz = layer.nnz if pattern is None else pattern.nnz
    if "weight_values" in own and own["weight_values"].shape != (nnz,):
        raise SparsePropError(
            f"weight_values must have shape ({nnz},) to match the pattern, got "
            f"{tuple(own['weight_values'].shape)} in the state dict."
        )
    if "weight_values" in own and not own["weight_values"].is_floating_point():
        raise SparsePropError(
            f"weight_values must be floating point, got {own['weight_values'].dtype} in the state dict."
        )
    return pattern


def _check_tensors(layer: SparseLayer, own: dict[str, Any]) -> None:
    """All that the layer reads must be tensors, with values unless the layer has none either."""
    for key in {"weight", "weight_values", "weight_shape", "bias", *PATTERN_KEYS} & own.keys():
        entry = own[key]
        if not isinstance(entry, Tensor):
            raise SparsePropError(f"{key} must be a tensor, got {type(entry).__name__} in the state dict.")
        if entry.is_meta and not layer.weight_shape.is_meta and key not in ("weight_values", "bias"):
            raise SparsePropError(
                f"{key} is on the meta device in the state dict, and has no values to load."
            )
    if "weight_shape" in own and (own["weight_shape"].dtype, own["weight_shape"].dim()) != (torch.int64, 1):
        raise SparsePropError("weight_shape must be a row of int64 in the state dict.")


def _check_bias(layer: SparseLayer, own: dict[str, Any]) -> None:
    bias = own.get("bias")
    if isinstance(bias, Tensor) and layer.bias is not None and bias.shape != layer.bias.shape:
        raise SparsePropError(
            f"bias must have shape {tuple(layer.bias.shape)}, got {tuple(bias.shape)} in the state dict."
        )


def _same(one: Pattern, other: Pattern) -> bool:
    devices = [next(iter(buffers_of(pattern).values())).device for pattern in (one, other)]
    return type(one) is type(other) and devices[0] == devices[1] and one == other


def _resize(layer: SparseLayer, pattern: Pattern, assign: bool) -> None:
    """Make room for another pattern's entries; the Parameter stays the same object unless it is replaced."""
    wanted, held = buffers_of(pattern), buffers_of(layer._held)
    if {key: part.shape for key, part in wanted.items()} != {key: part.shape for key, part in held.items()}:
        device = layer.weight_shape.device
        layer._hold({key: torch.empty_like(part, device=device) for key, part in wanted.items()})
    values = layer.weight_values
    if values.shape == (pattern.nnz,):
        return
    room = values.data.new_empty(pattern.nnz)
    if assign:
        layer.weight_values = Parameter(room, values.requires_grad)
        return
    values.grad = None
    values.data = room
    torch.autograd.graph.increment_version(values)  # a graph that holds them refuses its backward pass
