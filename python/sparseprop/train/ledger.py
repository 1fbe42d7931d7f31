"""What a run keeps while it trains: its state as tensors, the lines of its metrics, the time it took."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprop.train.checkpoint import append_line, write_text
from sparseprop.train.loop import State

__all__ = ["MASK", "Clock", "Metrics", "pack", "restore"]

MASK, _MODEL, _RNG = "mask::", "model::", "rng::torch"


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


class Metrics:
    """The lines of ``metrics.jsonl``; what a stopped run wrote past its last checkpoint is dropped."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
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
