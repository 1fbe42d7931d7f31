"""Which N of M suits a layer, from how sparse it already is."""

import math

from sparseprop.errors import SparsePropError
from sparseprop.masks.pattern import check_pattern

__all__ = ["choose_n", "expected_loss"]


def choose_n(
    sparsity: float, m: int, *, confidence: float | None = None, max_loss: float | None = None
) -> int:
    """The fewest kept of ``m`` that suit a layer with this fraction of zeros, taken as placed at random.

    By ``confidence`` (0.95 unless ``max_loss`` is given): the most zeros that a group has with more than this
    probability (the rule of AdaPrune, Hubara et al., arXiv 2102.08124). By ``max_loss``: the fewest kept
    with an `expected_loss` within it. Never less than 1. Raises SparsePropError for numbers outside 0..1.

    >>> choose_n(0.9, 8), choose_n(0.8, 4, max_loss=0.05)
    (2, 2)
    """
    check_pattern(1, m)
    if confidence is not None and max_loss is not None:
        raise SparsePropError("choose_n got both confidence and max_loss, wanted one of them.")
    if max_loss is not None:
        _check_fraction("max_loss", max_loss)
        return next(n for n in range(1, m + 1) if expected_loss(sparsity, n, m) <= max_loss)
    confidence = 0.95 if confidence is None else confidence
    _check_fraction("confidence", confidence)
    chances = _chances(sparsity, m)
    return next(n for n in range(1, m + 1) if n == m or math.fsum(chances[: n + 1]) > confidence)


def expected_loss(sparsity: float, n: int, m: int) -> float:
    """The expected fraction of a layer's non-zeros that n:m must drop, these being placed at random.

    ``sparsity``: the layer's fraction of zeros, 0..1. Raises SparsePropError outside it or for a bad pattern.

    >>> round(expected_loss(0.8, 2, 4), 3), round(expected_loss(0.8, 4, 8), 3)
    (0.036, 0.007)
    """
    check_pattern(n, m)
    chances = _chances(sparsity, m)
    mean = (1.0 - sparsity) * m
    lost = math.fsum((count - n) * chances[count] for count in range(n + 1, m + 1))
    return lost / mean if mean > 0 else 0.0


def _chances(sparsity: float, m: int) -> list[float]:
    """The probability of 0..m non-zeros in a group."""
    _check_fraction("sparsity", sparsity)
    return [math.comb(m, k) * (1.0 - sparsity) ** k * sparsity ** (m - k) for k in range(m + 1)]


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise SparsePropError(f"{name} got {value}, wanted 0..1.")
