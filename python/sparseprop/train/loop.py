"""The training loop of one phase: all of it follows from the seed and the step, nothing from the clock."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseprop.data import ImageData, augment, batch_order, in_order, mix_seed
from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLayer
from sparseprop.train.config import FinetuneConfig
from sparseprop.train.phases import Phase
from sparseprop.train.prune import CubicSchedule, magnitude_masks, sparsity_of

__all__ = ["Hooks", "Progress", "State", "evaluate", "make_optimizer", "rate_at", "train_phase"]

_LOG_EVERY = 5
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_OPTIMIZER = "optimizer::"


@dataclass(frozen=True)
class Progress:
    """What a job tells whoever watches it: the phase, the step in it, and what was just measured."""

    phase: str
    step: int
    steps: int
    loss: float | None = None
    accuracy: float | None = None
    sparsity: float | None = None
    message: str = ""


@dataclass
class State:
    """What a phase changes; with the phase's name and step it is all that resuming needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    masks: dict[str, Tensor] = field(default_factory=dict)  # of pruned layers that stay dense modules
    initial_sparsity: float = 0.0  # where gradual pruning sets out
    step: int = 0

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, flat, by the number of the parameter."""
        state: Mapping[int, Mapping[str, Any]] = self.optimizer.state_dict()["state"]
        return {
            f"{_OPTIMIZER}{index}::{key}": torch.as_tensor(value)
            for index, entries in state.items()
            for key, value in entries.items()
            if value is not None
        }

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `optimizer_tensors` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(_OPTIMIZER):
                index, key = name.removeprefix(_OPTIMIZER).split("::")
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True)
class Hooks:
    """Where a phase reports: a record for the metrics, a chance to save, news for a watcher."""

    record: Callable[[dict[str, Any]], None]
    save: Callable[[State], None]
    progress: Callable[[Progress], None]


def train_phase(config: FinetuneConfig, phase: Phase, data: ImageData, state: State, hooks: Hooks) -> float:
    """Run ``phase`` from ``state.step`` to its end and return the held-out accuracy; ``state`` is changed.

    Raises `SparsePropError` if the loss is no longer a number.
    """
    count = len(data.train.labels)
    per_epoch = count // min(config.batch_size, count)
    steps = phase.epochs * per_epoch
    schedule = _schedule(config, phase, state, steps)
    order = torch.empty(0)
    while state.step < steps:
        epoch, within = divmod(state.step, per_epoch)
        if within == 0 or not len(order):
            order = batch_order(count, config.batch_size, seed=mix_seed(config.seed, phase.name), epoch=epoch)
        if schedule is not None and schedule.is_event(state.step):
            _prune(config, state, schedule.at(state.step))
        loss = _train_step(config, phase, data, state, order[within], steps)
        state.step += 1
        _report_step(phase, state, steps, loss, hooks, epoch_ends=state.step % per_epoch == 0, config=config)
        if state.step % per_epoch == 0:
            _report_epoch(phase, state, steps, data, hooks)
        if state.step % config.checkpoint_every == 0 and state.step < steps:
            hooks.save(state)
    if schedule is not None:
        _prune(config, state, schedule.final)
    return evaluate(state.model, data)[0]


def make_optimizer(config: FinetuneConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW. Biases and norms do not decay; sparse values, though 1-D, do."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            sparse = isinstance(module, SparseLayer) and name == "weight_values"
            plain = isinstance(module, _NORMS) or name == "bias" or (parameter.dim() < 2 and not sparse)
            (kept if plain else decayed).append(parameter)
    decayed, kept = list(dict.fromkeys(decayed)), list(dict.fromkeys(kept))
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)


def evaluate(model: nn.Module, data: ImageData, batch_size: int = 256) -> tuple[float, float]:
    """Accuracy and mean loss on the held-out split; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    right, loss, count = 0, 0.0, 0
    with torch.no_grad():
        for images, labels in in_order(data.test, batch_size):
            logits = model(images)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    model.train(was_training)
    return right / count, loss / count


def rate_at(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step: linear warm-up over a twentieth of the phase, then a cosine to zero.

    >>> [round(rate_at(step, 100, 1.0), 3) for step in (0, 4, 5, 52, 99)]
    [0.2, 1.0, 1.0, 0.508, 0.0]
    """
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _schedule(config: FinetuneConfig, phase: Phase, state: State, steps: int) -> CubicSchedule | None:
    if phase.kind != "prune":
        return None
    ramp = max(1, round(0.75 * steps))
    return CubicSchedule(state.initial_sparsity, config.sparsity, ramp, max(1, ramp // 20))


def _train_step(
    config: FinetuneConfig, phase: Phase, data: ImageData, state: State, indices: Tensor, steps: int
) -> float:
    rate = rate_at(state.step, steps, config.learning_rate)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(mix_seed(config.seed, phase.name, "step", state.step))  # for dropout and its like
    images = augment(
        data.train.fetch(indices),
        seed=mix_seed(config.seed, phase.name, "augment", state.step),
        mirror=data.mirror,
    )
    state.model.train()
    state.optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(
        state.model(images), data.train.labels[indices], label_smoothing=config.label_smoothing
    )
    value = loss.item()
    if not math.isfinite(value):
        raise SparsePropError(
            f"the loss became {value} at step {state.step} of {phase.name}; expected a finite number; lower "
            f"the learning rate (now {config.learning_rate:g})"
        )
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    _apply_masks(state)
    return value


def _prune(config: FinetuneConfig, state: State, sparsity: float) -> None:
    weights = {name: _weight(state.model, name) for name in state.masks}
    state.masks = magnitude_masks(weights, sparsity, scope=config.scope, masks=state.masks)
    _apply_masks(state)


def _apply_masks(state: State) -> None:
    with torch.no_grad():
        for name, mask in state.masks.items():
            _weight(state.model, name).mul_(mask)


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def _report_step(
    phase: Phase,
    state: State,
    steps: int,
    loss: float,
    hooks: Hooks,
    *,
    epoch_ends: bool,
    config: FinetuneConfig,
) -> None:
    sparsity = sparsity_of(state.masks) if state.masks and phase.kind == "prune" else None
    if state.step % _LOG_EVERY == 0 or epoch_ends:
        rate = rate_at(state.step - 1, steps, config.learning_rate)
        record = {"kind": "train", "phase": phase.name, "step": state.step, "loss": loss, "lr": rate}
        hooks.record(record if sparsity is None else {**record, "sparsity": sparsity})
    hooks.progress(Progress(phase.name, state.step, steps, loss=loss, sparsity=sparsity))


def _report_epoch(phase: Phase, state: State, steps: int, data: ImageData, hooks: Hooks) -> None:
    accuracy, loss = evaluate(state.model, data)
    hooks.record(
        {"kind": "test", "phase": phase.name, "step": state.step, "loss": loss, "accuracy": accuracy}
    )
    hooks.progress(Progress(phase.name, state.step, steps, loss=loss, accuracy=accuracy))
