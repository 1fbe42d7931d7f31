"""What a data set is."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["ImageData", "Split"]


class Split(Protocol):
    """Images that are fetched by index, with their labels (int64)."""

    labels: Tensor

    def fetch(self, indices: Tensor) -> Tensor:
        """Normalised float32 images ``(len(indices), channels, side, side)``."""
        ...


@dataclass(frozen=True)
class ImageData:
    """A data set: what its classes are called, what an image looks like, a training and a held-out split."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    train: Split
    test: Split
    mirror: bool  # a mirrored photo is still a photo; a mirrored digit is not
