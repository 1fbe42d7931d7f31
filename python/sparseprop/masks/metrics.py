"""What a mask keeps, and how masks change over training."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparseprop.errors import SparsePropError
from sparseprop.masks._layout import check_mask, check_values

__all__ = ["SadMeter", "SadReading", "retained_magnitude", "sad"]

_BITS_SET = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.int64)


def retained_magnitude(scores: Tensor, mask: Tensor) -> float:
    """The fraction of the total score that ``mask`` keeps, 0..1; 1 if all scores are zero.

    ``scores``: any shape, finite and >= 0; ``mask``: bool of the same shape. Raises SparsePropError
    otherwise.

    >>> import torch
    >>> retained_magnitude(torch.tensor([3.0, 1.0]), torch.tensor([True, False]))
    0.75
    """
    scores = check_values(scores).double()
    _check_same_shape(check_mask(mask), scores, "mask", "scores")
    largest = float(scores.amax()) if scores.numel() else 0.0
    if largest == 0:
        return 1.0
    scores = scores / largest  # the sum of large ones would be inf
    return float((scores * mask).sum() / scores.sum())


def sad(
    mask_a: Tensor | Mapping[str, Tensor], mask_b: Tensor | Mapping[str, Tensor], normalize: bool = False
) -> float:
    """Sparse architecture divergence: how many mask entries differ; with ``normalize``, which fraction.

    Bool masks of equal shapes, or mappings from layer names to masks, summed over layers. Raises
    SparsePropError otherwise. From Zhou et al. (SR-STE), ICLR 2021.

    >>> import torch
    >>> a, b = torch.tensor([True, False, True]), torch.tensor([False, True, True])
    >>> sad(a, b), round(sad(a, b, normalize=True), 3)
    (2, 0.667)
    """
    layers_a, layers_b = _layers(mask_a), _layers(mask_b)
    _check_same_names(layers_a, layers_b)
    changed = numel = 0
    for name, a in layers_a.items():
        b = check_mask(layers_b[name], "mask_b")
        _check_same_shape(check_mask(a, "mask_a"), b, "mask_a", "mask_b")
        changed += int((a != b.to(a.device)).sum())
        numel += a.numel()
    return changed / max(numel, 1) if normalize else changed


@dataclass(frozen=True)
class SadReading:
    """Changes since the previous reading, per layer and in total, and since the first masks.

    >>> SadReading({"fc": 2}, total=2, flip_rate=0.5, from_start=2)
    SadReading(per_layer={'fc': 2}, total=2, flip_rate=0.5, from_start=2)
    """

    per_layer: dict[str, int]
    total: int
    flip_rate: float
    from_start: int


class SadMeter:
    """Follows masks over training at one bit per weight and reference point.

    ``every=k`` reads at the first call of `update` and at every k-th after it, and ignores the others.

    >>> import torch
    >>> meter = SadMeter()
    >>> meter.update({"fc": torch.tensor([True, False])})
    >>> meter.update({"fc": torch.tensor([False, True])})
    SadReading(per_layer={'fc': 2}, total=2, flip_rate=1.0, from_start=2)
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise SparsePropError(f"SadMeter got every={every}, wanted at least 1.")
        self.every = every
        self.cumulative = 0
        self._calls = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._first: dict[str, npt.NDArray[np.uint8]] = {}
        self._last: dict[str, npt.NDArray[np.uint8]] = {}

    def update(self, masks: Tensor | Mapping[str, Tensor]) -> SadReading | None:
        """Take the present masks; returns a reading, or None at the first call and between readings.

        Raises SparsePropError for masks that are not bool, or whose names or shapes have changed.
        """
        due = self._calls % self.every == 0
        self._calls += 1
        if not due:
            return None
        layers = {name: check_mask(mask, f"masks[{name!r}]") for name, mask in _layers(masks).items()}
        shapes = {name: tuple(mask.shape) for name, mask in layers.items()}
        packed = {name: np.packbits(mask.cpu().numpy().ravel()) for name, mask in layers.items()}
        if not self._last:
            self._shapes, self._first, self._last = shapes, packed, packed
            return None
        if shapes != self._shapes:
            raise SparsePropError(
                f"SadMeter got masks of {shapes}, wanted those of its first update, {self._shapes}; "
                "start a new meter when layers change."
            )
        per_layer = {name: _differing(packed[name], self._last[name]) for name in packed}
        from_start = sum(_differing(packed[name], self._first[name]) for name in packed)
        total, numel = sum(per_layer.values()), sum(mask.numel() for mask in layers.values())
        self._last = packed
        self.cumulative += total
        return SadReading(per_layer, total, total / max(numel, 1), from_start)


def _layers(masks: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return masks if isinstance(masks, Mapping) else {"": masks}


def _differing(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> int:
    return int(_BITS_SET[a ^ b].sum())


def _check_same_names(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if a.keys() != b.keys():
        raise SparsePropError(f"sad got layers {sorted(a)} and {sorted(b)}, wanted the same layers in both.")


def _check_same_shape(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    if a.shape != b.shape:
        raise SparsePropError(
            f"{name_a} got shape {tuple(a.shape)}, wanted that of {name_b}, {tuple(b.shape)}."
        )
