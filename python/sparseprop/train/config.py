"""What a fine-tuning job is asked to do."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from sparseprop.errors import SparsePropError

__all__ = ["FinetuneConfig"]

MOST_THREADS = 1024
_WANTED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning job; every field has a default and the defaults are a whole job.

    ``model`` is ``"small"`` (or ``"small:WIDTH"``), a timm or torchvision name, or a checkpoint file
    (``.safetensors``, ``.pt``, ``.pth``); a file without a note of its architecture needs ``arch`` too.
    ``data`` is ``"digits"``, ``"mnist5k"`` or a folder with one subfolder of images per class.

    With a ``source``, data like ``data``, the job first pretrains (and prunes) on it and then transfers.
    ``"auto"`` is MNIST-5k for the built-in model on the digits and nothing else, so a checkpoint keeps its
    weights; ``"none"`` or None is never.

    ``sparsity`` counts over the layers that are pruned: all plain ``Linear`` and ``Conv`` layers but the
    first and the classifier. ``scope`` ``"layer"`` prunes each of them that far, ``"global"`` ranks all
    weights together. ``min_sparsity`` swaps every layer at least that sparse; without it a cost model
    decides, or measurements if ``measure`` (then two runs of one job may differ in their last bits). ``fuse``
    lets `sparseprop.fuse` speed up what lies between the layers of the sparse model.

    Raises `SparsePropError` for a value out of range or of another type, by name.

    >>> from sparseprop.train import FinetuneConfig
    >>> FinetuneConfig(sparsity=0.95, seed=3).model
    'small'
    """

    model: str = "small"
    arch: str | None = None
    data: str = "digits"
    source: str | None = "auto"
    sparsity: float = 0.9
    scope: Literal["layer", "global"] = "layer"
    min_sparsity: float | None = None
    measure: bool = False
    fuse: bool = True
    pretrain_epochs: int = 3
    prune_epochs: int = 4
    finetune_epochs: int = 8
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    image_size: int | None = None
    seed: int = 0
    threads: int | None = None
    checkpoint_every: int = 25
    plots: bool = True
    out: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        _check(0 < self.sparsity < 1, "sparsity", self.sparsity, "between 0 and 1, such as 0.9")
        if self.min_sparsity is not None:
            _check(0 <= self.min_sparsity < 1, "min_sparsity", self.min_sparsity, "from 0 to below 1")
        _check(self.scope in ("layer", "global"), "scope", self.scope, "layer or global")
        _check(self.optimizer in ("sgd", "adamw"), "optimizer", self.optimizer, "sgd or adamw")
        for name in ("pretrain_epochs", "prune_epochs"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("finetune_epochs", "batch_size", "checkpoint_every", "image_size", "threads"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "1 or more")
        most = self.threads is None or self.threads <= MOST_THREADS
        _check(most, "threads", self.threads, f"{MOST_THREADS} or fewer")
        if self.lr is not None:
            _check(0 < self.lr < math.inf, "lr", self.lr, "a positive number, such as 0.05")
        _check(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more")
        _check(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "from 0 to below 1")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: ``lr``, or what suits the optimizer."""
        return self.lr if self.lr is not None else {"sgd": 0.05, "adamw": 1e-3}[self.optimizer]

    def to_json(self) -> str:
        """The configuration as JSON, one field per line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str | Path = "the configuration") -> Self:
        """Read what `to_json` wrote; raises `SparsePropError` for anything else."""
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(**fields)
        except (ValueError, TypeError, RecursionError) as error:
            raise SparsePropError(
                f"{where} is not the configuration of a run: {error}; start a new run"
            ) from error


def _check_type(name: str, value: object, hint: Any) -> None:
    """Python does not check what a file or a caller fills in; Literals are checked by their values."""
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        fits = bool in kinds
    elif isinstance(value, int):
        fits = int in kinds or float in kinds
    elif isinstance(value, os.PathLike):
        fits = str in kinds
    else:
        fits = get_origin(hint) is Literal or isinstance(value, kinds)
    _check(fits, name, repr(value), next((_WANTED[kind] for kind in kinds if kind in _WANTED), "a word"))


def _check(fits: bool, name: str, got: object, wanted: str) -> None:
    if not fits:
        raise SparsePropError(f"{name} must be {wanted}; got {got}")
