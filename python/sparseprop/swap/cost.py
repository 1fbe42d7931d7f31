"""Estimated step times of a layer, dense and sparse, for plans made without running anything."""

import math
from dataclasses import dataclass

from sparseprop.swap.kinds import Facts
from sparseprop.swap.machines import Machine, this_machine

__all__ = ["Estimate", "estimate", "keep_dense_rule"]


_TILE, _LANES = 128, 16  # columns
_DENSE_BLOCK = 8  # channels that dense convolutions work on at once: 3 of them cost as much as 8
_TINY, _SHORT = 4096, 1 << 19  # weights, and products of them in a pass: with fewer of both little is gained
_FEW, _FEWEST = 32, 8  # columns of a Linear layer: up to which values stay in order, or bitmaps take over


@dataclass(frozen=True)
class Estimate:
    """Estimated milliseconds of one forward and backward."""

    dense_ms: float
    sparse_ms: float


def estimate(
    layer: Facts, nnz: int, positions: int | None = None, machine: Machine | None = None
) -> Estimate:
    """Times of `layer` with `nnz` non-zeros at `positions` output columns (None: a nominal batch).

    On the machine most like this one, unless another is given.

    Dense: three contractions (output, gradient of the input, gradient of the weight) at the family's
    speed, no faster than the weights can be read, and a cost per activation. Sparse: each non-zero costs a
    fixed part per tile of 128 columns and a part per 16 of them, and activations are packed and stored;
    for few columns all weights cost a little, if that is less. Both have a fixed cost a call.
    Grows with `nnz`, so that a sparser layer never looks slower.

    >>> few, many = (estimate(Facts("Linear", 256, 256), nnz) for nnz in (6_000, 60_000))
    >>> few.sparse_ms < many.sparse_ms and few.dense_ms == many.dense_ms
    True
    """
    machine = this_machine() if machine is None else machine
    c = machine.families[layer.kind]
    shrink = math.prod(layer.stride)
    columns = _columns(layer, positions, machine)
    weights = layer.rows * layer.cols
    compute_ms = 1e-6 * 6.0 * weights * _padding(layer) * columns / c.dense_gflops
    read_ms = 1e-6 * 12.0 * weights / c.dense_gbytes
    tiles, lanes = math.ceil(columns / _TILE), math.ceil(columns / _LANES)
    linear = layer.kind == "Linear"
    call_ns = machine.few_call_ns if linear and columns <= _FEW else machine.call_ns
    window = math.prod(layer.kernel) > 1
    lanes_ns = machine.window_lanes_ns if window else machine.lanes_ns
    nonzeros_ns = nnz * (call_ns + machine.tile_ns * tiles + lanes_ns * lanes)
    if linear and columns <= _FEWEST:
        nonzeros_ns = min(nonzeros_ns, weights * (machine.weight_ns + machine.weight_column_ns * columns))
    moved = columns * (layer.in_features * shrink + layer.rows)
    moved_ns = c.window_moved_ns if window else c.moved_ns
    return Estimate(
        dense_ms=1e-3 * c.dense_call_us + max(compute_ms, read_ms) + 1e-6 * c.dense_moved_ns * moved,
        sparse_ms=1e-3 * c.sparse_call_us + 1e-6 * nonzeros_ns + 1e-6 * moved_ns * moved,
    )


def _padding(layer: Facts) -> float:
    channels = layer.cols // math.prod(layer.kernel)
    return 1.0 if layer.kind == "Linear" else math.ceil(channels / _DENSE_BLOCK) * _DENSE_BLOCK / channels


def keep_dense_rule(layer: Facts, positions: int | None = None) -> str | None:
    """Why an unmeasured layer stays dense whatever its sparsity, or None. Positions as for `estimate`."""
    weights = layer.rows * layer.cols
    if layer.depthwise:
        return "depthwise: too few weights a channel to gain"
    if weights < _TINY and weights * _columns(layer, positions, this_machine()) < _SHORT:
        return f"fewer than {_TINY} weights at few positions: too small to gain"
    return None


def _columns(layer: Facts, positions: int | None, machine: Machine) -> int:
    nominal = machine.families[layer.kind].positions
    return positions if positions is not None else max(1, nominal // math.prod(layer.stride))
