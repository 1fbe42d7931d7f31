"""Small jobs and what must be refused, shared by the tests of training and of the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparseprop.train import FinetuneConfig

# A whole job in about a second: 8x8 images, a network of 8 to 32 channels, three phases of nine steps.
SMALL: dict[str, Any] = {
    "model": "small:8",
    "source": "none",
    "image_size": 8,
    "min_sparsity": 0.5,
    "prune_epochs": 1,
    "finetune_epochs": 1,
    "checkpoint_every": 4,
    "threads": 1,
    "plots": False,
}

# (what is asked for, a part of the sentence that refuses it)
REFUSED_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 0.0}, "sparsity must be between 0 and 1, such as 0.9; got 0.0"),
    ({"sparsity": 1.0}, "sparsity must be between 0 and 1, such as 0.9; got 1.0"),
    ({"sparsity": 90.0}, "got 90.0"),
    ({"sparsity": float("nan")}, "got nan"),
    ({"min_sparsity": 1.5}, "min_sparsity must be from 0 to below 1; got 1.5"),
    ({"scope": "everywhere"}, "scope must be layer or global; got everywhere"),
    ({"optimizer": "lion"}, "optimizer must be sgd or adamw; got lion"),
    ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
    ({"finetune_epochs": 0}, "finetune_epochs must be 1 or more; got 0"),
    ({"prune_epochs": -1}, "prune_epochs must be 0 or more; got -1"),
    ({"lr": 0.0}, "lr must be a positive number, such as 0.05; got 0.0"),
    ({"weight_decay": -1.0}, "weight_decay must be 0 or more; got -1.0"),
    ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1; got 1.0"),
    ({"threads": 0}, "threads must be 1 or more; got 0"),
    ({"threads": 99999999999}, "threads must be 1024 or fewer; got 99999999999"),
    ({"batch_size": 1.5}, "batch_size must be a whole number; got 1.5"),
    ({"batch_size": True}, "batch_size must be a whole number; got True"),
    ({"sparsity": "0.9"}, "sparsity must be a number; got '0.9'"),
    ({"plots": 1}, "plots must be true or false; got 1"),
    ({"model": 3}, "model must be text; got 3"),
    ({"scope": 3}, "scope must be a word; got 3"),
]


def small_job(out: Path, **changes: Any) -> FinetuneConfig:
    """The small job with ``changes``, to be run into ``out``."""
    return FinetuneConfig(**{**SMALL, "out": str(out), **changes})


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are bitwise equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def image_folder(root: Path, *, count: int = 4, classes: Sequence[str] = ("cat", "dog")) -> Path:
    """A folder with a subfolder of PNGs per class."""
    from PIL import Image

    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture = Image.new("RGB", (12, 12 + number), (40 * number, 100 * index, 7))
            picture.save(root / name / f"{number}.png")
    return root
