"""Patterns of non-zeros as bool masks: spread at random, and the uneven ones that pruning leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Mask = npt.NDArray[np.bool_]
Generator = np.random.Generator


def _random(rows: int, cols: int, density: float, rng: Generator) -> Mask:
    keep = np.zeros(rows * cols, np.bool_)
    keep[rng.permutation(rows * cols)[: round(density * rows * cols)]] = True
    return keep.reshape(rows, cols)


def _scaled(share: npt.NDArray[np.float64], mean: float) -> npt.NDArray[np.float64]:
    """Probabilities in these proportions, cut at 1, with this mean."""
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.minimum(1.0, middle * share).mean() < mean else (low, middle)
    return np.minimum(1.0, high * share)


def _skewed(rows: int, cols: int, density: float, rng: Generator) -> Mask:
    """As global magnitude pruning leaves it: lognormal row densities, some rows empty, some full."""
    share = rng.lognormal(0.0, 1.0, rows)
    share[: rows // 10] = 0.0
    full = min(rows // 50, int(0.3 * density * rows))
    share = rng.permutation(share)
    full_rows = np.flatnonzero(share)[:full]
    share[full_rows] = np.inf
    chance = _scaled(share, density)
    return rng.random((rows, cols)) < chance[:, None]


def _banded(rows: int, cols: int, density: float, rng: Generator) -> Mask:
    """A band around the diagonal of a stretched weight, twice as wide as needed, half filled."""
    centre = (np.arange(rows) * cols / rows)[:, None]
    distance = np.abs(np.arange(cols)[None, :] - centre)
    near = np.minimum(distance, cols - distance) <= min(1.0, 2 * density) * cols / 2
    return near & (rng.random((rows, cols)) < density / max(near.mean(), 1e-9))


def _blocks(rows: int, cols: int, density: float, rng: Generator) -> Mask:
    """Squares of 16 x 16, a quarter of them twelve times as dense as the rest."""
    tiles = rng.random((-(-rows // 16), -(-cols // 16))) < 0.25
    chance = _scaled(np.where(tiles, 12.0, 1.0), density)
    return rng.random((rows, cols)) < np.kron(chance, np.ones((16, 16)))[:rows, :cols]


PATTERNS: dict[str, Callable[[int, int, float, Generator], Mask]] = {
    "random": _random,
    "skewed": _skewed,
    "banded": _banded,
    "blocks": _blocks,
}


def make_mask(weight_shape: torch.Size, sparsity: float, pattern: str = "random") -> Tensor:
    """A mask of this shape with about `1 - sparsity` of its entries True; the same at every call."""
    rows, cols = weight_shape[0], weight_shape[1:].numel()
    mask = PATTERNS[pattern](rows, cols, 1 - sparsity, np.random.default_rng(0))
    return torch.from_numpy(mask).view(weight_shape)
