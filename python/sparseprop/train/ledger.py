"""What a run keeps while it trains: its state as tensors, the lines of its metrics, the time it took."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprop.errors import SparsePropError
from sparseprop.train.checkpoint import append_line, load_tensors, read_text, write_text
from sparseprop.train.config import FinetuneConfig
from sparseprop.train.loop import State

__all__ = ["MASK", "Clock", "Metrics", "check_unchanged", "pack", "read_saved", "restore"]

MASK, _MODEL, _RNG = "mask::", "model::", "rng::torch"
_FREE = ("out", "plots", "threads", "checkpoint_every")  # what may change without changing what is learned


def pack(state: State) -> dict[str, Tensor]:
    tensors = {_MODEL + name: tensor for name, tensor in state.model.state_dict().items()}
    tensors |= {MASK + name: mask for name, mask in state.masks.items()}
    return tensors | state.optimizer_tensors() | {_RNG: torch.get_rng_state()}


def restore(state: State, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    state.model.load_state_dict(
        {key.removeprefix(_MODEL): value for key, value in tensors.items() if key.startswith(_MODEL)}
    )
    state.masks = {key.removeprefix(MASK): value for key, value in tensors.items() if key.startswith(MASK)}
    state.load_optimizer(tensors)
    state.initial_sparsity = note["initial_sparsity"]
    state.step = note["step"]
    torch.set_rng_state(tensors[_RNG])


def read_saved(path: Path, phase: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What was saved in the middle of ``phase``; None if nothing was."""
    if not path.is_file():
        return None
    try:
        tensors, note = load_tensors(path)
    except SparsePropError as error:
        raise SparsePropError(
            f"{str(error).rstrip('.')}; or delete it, and the phase {phase} starts anew"
        ) from error
    return (tensors, note) if note.get("phase") == phase else None


def check_unchanged(config: FinetuneConfig, note: Mapping[str, Any], folder: Path) -> None:
    """Raise `SparsePropError` if ``config.json`` was edited since the run wrote ``note``, which may be older
    than notes of the configuration."""
    before, now = note.get("config", {}), dataclasses.asdict(config)
    for name in now:
        if name not in _FREE and name in before and before[name] != now[name]:
            raise SparsePropError(
                f"{name} in {folder / 'config.json'} was changed since the run began ({before[name]} then, "
                f"{now[name]} now); put it back or start a new run"
            )


class Metrics:
    """The lines of ``metrics.jsonl``; what a stopped run wrote past its last checkpoint is dropped."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        lines = read_text(path).splitlines(keepends=True) if path.exists() else []
        if len(lines) > count:
            write_text(path, "".join(lines[:count]))

    def add(self, record: Mapping[str, Any]) -> None:
        append_line(self.path, json.dumps(record))
        self.count += 1


class Clock:
    def __init__(self, before: float) -> None:
        self.start = time.perf_counter() - before

    def seconds(self) -> float:
        return round(time.perf_counter() - self.start, 3)
