"""Estimated step times of a layer, dense and sparse, for plans made without running anything."""

import math
from dataclasses import dataclass

from sparseprop.swap.kinds import Facts

__all__ = ["CONSTANTS", "Constants", "Estimate", "estimate", "keep_dense_rule"]


@dataclass(frozen=True)
class Constants:
    """What one family of layers costs; refit from the benchmarks when the kernels change.

    Attributes:
        dense_gflops: speed of the dense layer, forward and backward alike.
        sparse_gflops: speed of the sparse kernels, counted on non-zeros.
        layout_ns: time to change the layout of one activation element, once each way.
        dense_call_us, sparse_call_us: fixed cost of one forward and backward.
        positions: columns of the contraction in a nominal batch, before any stride.
    """

    dense_gflops: float
    sparse_gflops: float
    layout_ns: float
    dense_call_us: float
    sparse_call_us: float
    positions: int


# Two Zen 4 cores, float32. A first guess from layers of 64 to 4096 features.
CONSTANTS = {
    "Linear": Constants(160.0, 95.0, 0.20, 30.0, 40.0, 256),
    "Conv1d": Constants(150.0, 75.0, 0.25, 60.0, 60.0, 16 * 256),
    "Conv2d": Constants(150.0, 75.0, 0.25, 60.0, 60.0, 16 * 14 * 14),
    "Conv3d": Constants(150.0, 75.0, 0.25, 60.0, 60.0, 4 * 8 * 14 * 14),
}
_TINY = 4096


@dataclass(frozen=True)
class Estimate:
    """Estimated milliseconds of one forward and backward."""

    dense_ms: float
    sparse_ms: float


def estimate(layer: Facts, nnz: int, positions: int | None = None) -> Estimate:
    """Times of `layer` with `nnz` non-zeros at `positions` output columns (None: a nominal batch).

    Three contractions of equal cost (output, gradient of the input, gradient of the weight) at the family's
    speed, plus a fixed cost a call; the sparse side also pays for the layout of what it reads and writes.
    Grows with `nnz`, so that a sparser layer never looks slower.

    >>> few, many = (estimate(Facts("Linear", 256, 256), nnz) for nnz in (6_000, 60_000))
    >>> few.sparse_ms < many.sparse_ms and few.dense_ms == many.dense_ms
    True
    """
    c = CONSTANTS[layer.kind]
    shrink = math.prod(layer.stride)
    columns = positions if positions is not None else max(1, c.positions // shrink)
    dense_flop = 3 * 2.0 * layer.rows * layer.cols * columns
    sparse_flop = 3 * 2.0 * nnz * columns
    moved = columns * (layer.in_features * shrink + layer.rows)
    return Estimate(
        dense_ms=1e-3 * c.dense_call_us + 1e-6 * dense_flop / c.dense_gflops,
        sparse_ms=1e-3 * c.sparse_call_us + 1e-6 * sparse_flop / c.sparse_gflops + 1e-6 * c.layout_ns * moved,
    )


def keep_dense_rule(layer: Facts) -> str | None:
    """Why an unmeasured layer stays dense whatever its sparsity, or None."""
    if layer.depthwise:
        return "depthwise: too few weights a channel to gain"
    if layer.rows * layer.cols < _TINY:
        return f"fewer than {_TINY} weights: too small to gain"
    return None
