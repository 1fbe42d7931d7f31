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
        dense_gbytes: GB/s at which a dense layer reads its weights, which bounds small batches.
        dense_moved_ns: time of the dense layer per activation element, whatever its weights.
        moved_ns: time to pack and store one activation element, forward and backward together.
        window_moved_ns: the same where the kernel is larger than one position.
        dense_call_us, sparse_call_us: fixed cost of one forward and backward.
        positions: columns of the contraction in a nominal batch, before any stride.
    """

    dense_gflops: float
    dense_gbytes: float
    dense_moved_ns: float
    moved_ns: float
    window_moved_ns: float
    dense_call_us: float
    sparse_call_us: float
    positions: int


# Two cores of a 2.5 GHz Cascade Lake Xeon (AVX-512), float32, two threads. Fitted to the logarithm of the
# speed-ups of the short benchmark, run three times, of four layers of 64 to 256 features, and of five strided
# 1x1 convolutions down to 10 % sparsity, which without them looked faster sparse at any.
_CONV = (127.0, 27.9, 1.67, 1.65, 2.07, 150.0, 191.0)
CONSTANTS = {
    "Linear": Constants(132.0, 27.9, 1.48, 2.16, 2.16, 146.0, 175.0, 256),
    "Conv1d": Constants(*_CONV, 16 * 256),
    "Conv2d": Constants(*_CONV, 16 * 14 * 14),
    "Conv3d": Constants(*_CONV, 4 * 8 * 14 * 14),
}
# Nanoseconds on both cores: per non-zero and call (reordering values and their gradients), per non-zero and
# tile (index, value, dot product), and per 16 columns of it.
_CALL_NS, _TILE_NS, _LANES_NS, _TILE, _LANES = 0.71, 0.65, 1.20, 128, 16
_DENSE_BLOCK = 8  # channels that dense convolutions work on at once: 3 of them cost as much as 8
_TINY = 4096


@dataclass(frozen=True)
class Estimate:
    """Estimated milliseconds of one forward and backward."""

    dense_ms: float
    sparse_ms: float


def estimate(layer: Facts, nnz: int, positions: int | None = None) -> Estimate:
    """Times of `layer` with `nnz` non-zeros at `positions` output columns (None: a nominal batch).

    Dense: three contractions (output, gradient of the input, gradient of the weight) at the family's
    speed, no faster than the weights can be read, and a cost per activation. Sparse: each non-zero costs a
    fixed part per tile of 128 columns and a part per 16 of them, and activations are packed and stored. Both
    have a fixed cost a call.
    Grows with `nnz`, so that a sparser layer never looks slower.

    >>> few, many = (estimate(Facts("Linear", 256, 256), nnz) for nnz in (6_000, 60_000))
    >>> few.sparse_ms < many.sparse_ms and few.dense_ms == many.dense_ms
    True
    """
    c = CONSTANTS[layer.kind]
    shrink = math.prod(layer.stride)
    columns = positions if positions is not None else max(1, c.positions // shrink)
    weights = layer.rows * layer.cols
    compute_ms = 1e-6 * 6.0 * weights * _padding(layer) * columns / c.dense_gflops
    read_ms = 1e-6 * 12.0 * weights / c.dense_gbytes
    tiles, lanes = math.ceil(columns / _TILE), math.ceil(columns / _LANES)
    per_nonzero_ns = _CALL_NS + _TILE_NS * tiles + _LANES_NS * lanes
    moved = columns * (layer.in_features * shrink + layer.rows)
    moved_ns = c.window_moved_ns if math.prod(layer.kernel) > 1 else c.moved_ns
    return Estimate(
        dense_ms=1e-3 * c.dense_call_us + max(compute_ms, read_ms) + 1e-6 * c.dense_moved_ns * moved,
        sparse_ms=1e-3 * c.sparse_call_us + 1e-6 * nnz * per_nonzero_ns + 1e-6 * moved_ns * moved,
    )


def _padding(layer: Facts) -> float:
    channels = layer.cols // math.prod(layer.kernel)
    return 1.0 if layer.kind == "Linear" else math.ceil(channels / _DENSE_BLOCK) * _DENSE_BLOCK / channels


def keep_dense_rule(layer: Facts) -> str | None:
    """Why an unmeasured layer stays dense whatever its sparsity, or None."""
    if layer.depthwise:
        return "depthwise: too few weights a channel to gain"
    if layer.rows * layer.cols < _TINY:
        return f"fewer than {_TINY} weights: too small to gain"
    return None
