"""Whether a weight was updated: under any optimizer, without a copy of it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WeightWatch"]


class WeightWatch:
    """Remembers a weight. Its version tells of updates, but not of those written to ``weight.data``.

    So the sizes of its rows are remembered too.

    >>> watch, weight = WeightWatch(), torch.ones(2, 3)
    >>> watch.changed(weight)
    False
    >>> watch.remember(weight)
    >>> weight.data.mul_(2).sum().item(), watch.changed(weight)
    (12.0, True)
    """

    def __init__(self) -> None:
        self._version: int | None = None
        self._sizes: list[float] | None = None

    def changed(self, weight: Tensor) -> bool:
        """Whether the weight differs from what was remembered; False if nothing was."""
        if self._version is None or self._version != weight._version:
            return self._version is not None
        return self._sizes is not None and self._sizes != _sizes_of(weight)

    def remember(self, weight: Tensor) -> None:
        """Take the weight as it is for known."""
        self._version, self._sizes = weight._version, _sizes_of(weight)


def _sizes_of(weight: Tensor) -> list[float] | None:
    if weight.is_meta:
        return None
    # of |w|: sums of w itself stay what they are behind a softmax or in front of normalized inputs
    wide = torch.promote_types(weight.dtype, torch.float32)
    sizes: list[float] = weight.detach().flatten(1).abs().sum(1, dtype=wide).tolist()
    return sizes
