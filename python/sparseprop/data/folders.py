"""Folders of images, one subfolder a class."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparseprop.data.batches import stratified
from sparseprop.data.digits import BUILT_IN
from sparseprop.data.sets import ImageData
from sparseprop.errors import SparsePropError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["folder_data"]

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_COLOUR_MEAN, _COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
                picture = _in_eight_bits(_upright(opened)).convert("L" if self.channels == 1 else "RGB")
                picture = ImageOps.fit(picture, (self.image_size, self.image_size))
        except Exception as error:  # a broken file leads Pillow's readers into errors of any kind
            raise SparsePropError(
                f"cannot read the image {path}: {error}; expected a whole picture file; remove or replace it"
            ) from error
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
        if self.channels == 1:
            return (pixels[None] - 0.5) / 0.25
        return ((pixels - torch.tensor(_COLOUR_MEAN)) / torch.tensor(_COLOUR_STD)).permute(2, 0, 1)


def _upright(picture: "Image.Image") -> "Image.Image":
    """Turned as its EXIF orientation says."""
    from PIL import ImageOps

    picture.load()
    with suppress(Exception):  # pixels that are whole are worth having even if their EXIF is not
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _in_eight_bits(picture: "Image.Image") -> "Image.Image":
    """Grey of 16 bits, or of floats in 0..1, scaled to 8, where Pillow's own conversion cuts it off."""
    from PIL import Image

    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    grey = np.nan_to_num(np.asarray(picture).astype(np.float32))
    if picture.mode == "F":
        grey *= 255 if grey.max(initial=0.0) <= 1 else 1
    else:
        grey *= 255 / 65535
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


_HELD_OUT = ("val", "valid", "validation", "test")


def folder_data(root: Path, *, image_size: int, channels: int, seed: int) -> ImageData:
    wanted = "expected one subfolder of images per class"
    if not root.is_dir():
        found = "not a folder" if root.exists() else "missing"
        raise SparsePropError(
            f"the data folder {root} is {found}; {wanted}, or a built-in set: {', '.join(BUILT_IN)}"
        )
    if importlib.util.find_spec("PIL") is None:
        raise SparsePropError("image folders need Pillow, which is not installed; run `pip install pillow`")
    parts = [root / name for name in _HELD_OUT if (root / name).is_dir()]
    train_part, held_out = root / "train", parts[0] if parts else None
    nested = train_part.is_dir() and any(entry.is_dir() for entry in train_part.iterdir())
    if nested and held_out is None:
        raise SparsePropError(
            f"{root} holds a train folder with subfolders and none of {', '.join(_HELD_OUT)}; rename its "
            f"other split to one of these, or pass {train_part} to hold a fifth of it out"
        )
    if train_part.is_dir() and held_out is not None:
        classes, paths, labels = _listing(train_part, wanted)
        test_classes, test_paths, test_labels = _listing(held_out, wanted)
        if test_classes != classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise SparsePropError(
                f"the classes of {train_part} and {held_out} differ ({', '.join(odd)}); "
                "expected the same subfolders in both; rename or remove the odd ones"
            )
        splits = (paths, labels), (test_paths, test_labels)
    else:
        classes, paths, labels = _listing(root, wanted)
        _refuse_single_images(root, classes, labels)
        train, test = stratified(labels, 0.2, seed)
        splits = tuple(([paths[i] for i in rows.tolist()], labels[rows]) for rows in (train, test))  # type: ignore[assignment]
    train_split, test_split = (_FolderSplit(tuple(p), y, channels, image_size) for p, y in splits)
    return ImageData(root.name, classes, channels, image_size, train_split, test_split, mirror=True)


def _refuse_single_images(root: Path, classes: tuple[str, ...], labels: Tensor) -> None:
    single = [name for name, count in zip(classes, labels.bincount().tolist(), strict=True) if count == 1]
    if single:
        raise SparsePropError(
            f"the data folder {root} has a single image in {', '.join(single)}; expected two or more, "
            "as some are held out; add images or remove the class"
        )


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
