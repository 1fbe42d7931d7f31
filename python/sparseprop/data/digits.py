"""The built-in sets: digits that other packages ship, so nothing is downloaded."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparseprop.data.batches import stratified
from sparseprop.data.sets import ImageData
from sparseprop.errors import SparsePropError

__all__ = ["BUILT_IN", "digit_data", "packaged_table"]

BUILT_IN = ("digits", "mnist5k")


@dataclass
class _TensorSplit:
    images: Tensor
    labels: Tensor

    def fetch(self, indices: Tensor) -> Tensor:
        return self.images[indices]


def packaged_table(
    package: str, install: str, name: str
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """A table shipped inside a package, read without importing it: imports there cost seconds, and
    scikit-learn's would map a second OpenMP runtime into the process."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places or not Path(places[0], name).is_file():
        raise SparsePropError(
            f"the built-in data needs the file {name} of the package {package}, which is not installed; "
            f"run `pip install {install}`"
        )
    return np.loadtxt(Path(places[0], name), delimiter=",", dtype=np.float32)


def digit_data(
    name: str,
    table: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    side: int,
    image_size: int,
    channels: int,
    *,
    held_out: float,
    seed: int,
) -> ImageData:
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    images = torch.from_numpy(np.ascontiguousarray(table[:, :-1])).reshape(-1, 1, side, side)
    if side != image_size:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    train, test = stratified(labels, held_out, seed)
    images = (images - images[train].mean()) / images[train].std()
    images = images.expand(-1, channels, -1, -1).contiguous()
    return ImageData(
        name,
        tuple(str(digit) for digit in range(10)),
        channels,
        image_size,
        _TensorSplit(images[train], labels[train]),
        _TensorSplit(images[test], labels[test]),
        mirror=False,
    )
