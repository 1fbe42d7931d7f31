"""N:M patterns by name: how many of each group are kept, and in which directions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparseprop.errors import SparsePropError

__all__ = ["NMPattern"]

_NAME = re.compile(r"(\d+):(\d+)(-?T)?")


@dataclass(frozen=True)
class NMPattern:
    """At most ``n`` kept in every group of ``m`` consecutive inputs, and of ``m`` outputs if transposable.

    N counts what is kept, as in NM-sparsity (SR-STE), TSENOR and torch's 2:4; some papers count zeros.
    Raises SparsePropError unless 1 <= n <= m.

    >>> NMPattern.parse("2:4"), str(NMPattern(4, 8, transposable=True))
    (NMPattern(n=2, m=4, transposable=False), '4:8T')
    """

    n: int
    m: int
    transposable: bool = False

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m)

    @classmethod
    def parse(cls, text: "str | NMPattern") -> "NMPattern":
        """Read ``"2:4"``, or ``"2:4T"`` for a transposable pattern; a pattern passes through.

        >>> NMPattern.parse("4:8T").transposable
        True
        """
        if isinstance(text, NMPattern):
            return text
        match = _NAME.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise SparsePropError(
                f"pattern got {text!r}, wanted 'N:M' such as '2:4', or 'N:MT' such as '4:8T' (transposable)."
            )
        return cls(int(match[1]), int(match[2]), match[3] is not None)

    @property
    def density(self) -> float:
        """Fraction kept, n / m.

        >>> NMPattern(1, 4).density
        0.25
        """
        return self.n / self.m

    def fits(self, shape: Sequence[int], *, groups: int = 1) -> bool:
        """Whether a weight ``shape`` (Co, Ci/groups, *kernel) is large enough for one whole group or tile.

        Callers skip layers that are not, such as depthwise convolutions and first layers of 3 channels.

        >>> NMPattern(2, 4).fits((64, 3, 7, 7)), NMPattern(2, 4).fits((64, 64))
        (False, True)
        """
        rows = shape[0] // groups
        return shape[1] >= self.m and (rows >= self.m or not self.transposable)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{'T' if self.transposable else ''}"


def check_pattern(n: int, m: int) -> None:
    for name, value in (("n", n), ("m", m)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise SparsePropError(f"{name} got {value!r}, wanted an integer.")
    if not 1 <= n <= m:
        raise SparsePropError(f"pattern got n={n}, m={m}, wanted 1 <= n <= m: n of every m are kept.")
