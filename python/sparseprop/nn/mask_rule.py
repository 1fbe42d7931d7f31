"""How a masked layer's mask comes about and changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from sparseprop.errors import SparsePropError
from sparseprop.masks.pattern import NMPattern
from sparseprop.masks.transposable import Method

__all__ = ["MaskRule"]


@dataclass(frozen=True)
class MaskRule:
    """How a masked layer's mask comes about and changes.

    Attributes:
        pattern: ``"2:4"``, ``"4:8T"`` (transposable) and so on.
        every: weight updates between two masks, those between two forward passes as one; 0 keeps the first
            mask, and then pruned weights are zero and get no gradient. None: 1 for row-wise patterns, 40 for
            transposable ones.
        decay: of weights that are pruned at the moment, SR-STE's lambda; 0 is the plain straight-through
            estimator.
        decoupled: leave the decay to `sparseprop.decouple_decay` instead of adding it to the gradient.
        method: how transposable masks are found.

    Raises SparsePropError for numbers below 0 and for a bad pattern.

    >>> MaskRule("2:4").every, MaskRule("4:8T").every, MaskRule("2:4", every=0).every
    (1, 40, 0)
    """

    pattern: str
    every: int | None = None
    decay: float = 2e-4
    decoupled: bool = False
    method: Method = "exact"

    def __post_init__(self) -> None:
        parsed = NMPattern.parse(self.pattern)
        object.__setattr__(self, "pattern", str(parsed))
        if self.every is None:
            object.__setattr__(self, "every", 40 if parsed.transposable else 1)
        for name, value in (("every", self.every), ("decay", self.decay)):
            known = isinstance(value, int | float) and not isinstance(value, bool)
            if not known or not 0 <= value < math.inf:  # type: ignore[operator]  # NaN neither
                raise SparsePropError(f"MaskRule got {name}={value!r}, wanted a number of at least 0.")
        if self.every != int(self.every or 0):
            raise SparsePropError(f"MaskRule got every={self.every!r}, wanted a whole number of updates.")
        if self.method not in get_args(Method):
            raise SparsePropError(
                f"MaskRule got method={self.method!r}, wanted one of {', '.join(get_args(Method))}."
            )
