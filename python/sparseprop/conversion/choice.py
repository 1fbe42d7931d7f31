"""Which pattern and which mask a layer gets."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparseprop.errors import SparsePropError
from sparseprop.masks import NMPattern, choose_n, misfit

__all__ = ["SCORES", "PatternRule", "score_of"]

_AUTO = re.compile(r"auto:(\d+)(-?T)?")
SCORES = ("magnitude", "wx2")


@dataclass(frozen=True)
class PatternRule:
    """A pattern for all layers, or ``"auto:M"``: N of M by each layer's own sparsity.

    >>> rule = PatternRule.parse("auto:8")
    >>> str(rule.choose((64, 64), 1, 0.9)), rule.choose((64, 3, 3, 3), 1, 0.9)
    ('2:8', '3 inputs per group, fewer than 8')
    """

    text: str
    choose_pattern: Callable[[float], NMPattern]

    @classmethod
    def parse(cls, pattern: str | NMPattern) -> "PatternRule":
        """Read ``"2:4"``, ``"4:8T"``, ``"auto:8"`` or ``"auto:8T"``; SparsePropError for anything else."""
        found = _AUTO.fullmatch(pattern.strip()) if isinstance(pattern, str) else None
        if found is not None:
            m, transposable = int(found[1]), found[2] is not None
            NMPattern(1, m)
            return cls(str(pattern), lambda sparsity: NMPattern(choose_n(sparsity, m), m, transposable))
        try:
            fixed = NMPattern.parse(pattern)
        except SparsePropError as error:
            raise SparsePropError(f"{error} Or 'auto:8' for N of 8 by each layer's sparsity.") from None
        return cls(str(fixed), lambda _: fixed)

    def choose(self, shape: tuple[int, ...], groups: int, sparsity: float) -> NMPattern | str:
        """The pattern for a weight of this shape, or why there is none for it."""
        pattern = self.choose_pattern(sparsity)
        if pattern.n == pattern.m:
            return f"{100 * sparsity:.1f} % zeros: too dense for N of {pattern.m}"
        return misfit(shape, pattern, groups=groups) or pattern


def score_of(weight: Tensor, mean_square: Tensor | None, score: str) -> Tensor:
    """|w|, or w² E[x²], what a weight adds to the output, from the inputs' mean squares (groups, K)."""
    if score == "magnitude" or mean_square is None:
        return weight.abs()
    groups, columns = mean_square.shape
    squares = weight.double().square().reshape(groups, -1, columns)
    return (squares * mean_square[:, None, :]).reshape(weight.shape)
