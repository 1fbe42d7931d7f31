"""`profile`: build both forms of a model, time their steps whole and watched, and put them side by side."""

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparseprop.backend import active_isa
from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLayer
from sparseprop.profiling.ledger import Key
from sparseprop.profiling.report import LayerTimes, Parts, StepProfile, StepTimes
from sparseprop.profiling.split import Shares, shares_of
from sparseprop.profiling.trace import (
    AUTOGRAD,
    LOSS,
    OPTIMIZER,
    CallSpec,
    Training,
    contractions,
    traced_step,
)
from sparseprop.swap.decide import check_model
from sparseprop.swap.measure import as_arguments
from sparseprop.swap.plan import SwapPlan
from sparseprop.swap.replace import swap_modules, to_dense
from sparseprop.timing import Comparison, Step, Timer, compare

__all__ = ["profile"]

LossFn = Callable[[Any], Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def profile(
    model: nn.Module,
    example_input: object,
    *,
    plan: SwapPlan | None = None,
    loss: LossFn | None = None,
    optimizer: MakeOptimizer | None = None,
    steps: int = 5,
) -> StepProfile:
    """Say where the time of a training step goes, layer by layer, dense and sparse side by side.

    Works on copies: `model` keeps its weights, buffers and flags. Its training mode and frozen parameters are
    respected. Convolutional models are tried in both dense layouts (contiguous and channels_last) on either
    side, and the faster one is profiled. Cut a large batch: a second copy of the model is trained beside it.

    Args:
        model: swapped, or dense with zeros (then swapped by `plan`, or by what `sparseprop.plan` measures).
        example_input: one real batch: a tensor, a tuple of positional or a dict of named arguments.
        plan: for a dense `model`, what to swap.
        loss: maps the model's output to a scalar; by default cross-entropy of fixed random labels if the
            output is (batch, classes), else the mean of squares.
        optimizer: makes one from parameters; by default SGD with momentum.
        steps: how many steps are watched.

    Returns:
        A `StepProfile`: prints as a table; `to_json`, `save_png`.

    Raises:
        SparsePropError: a wrapper (compiled, data parallel), nothing to train, `steps` below 1, or a `plan`
            for a model that is swapped already.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> _ = model[0].weight.data[:, :60].zero_()
    >>> import sparseprop
    >>> plan = sparseprop.plan(model, min_sparsity=0.9)
    >>> found = sparseprop.profile(model, torch.ones(4, 64), plan=plan, steps=1)
    >>> [layer.name for layer in found.layers]
    ['', '0', '1', '2', '(loss)', '(optimizer)', '(gradient sums)']
    """
    if steps < 1:
        raise SparsePropError(f"profile needs steps >= 1, got {steps}.")
    dense, sparse = _both_forms(model, example_input, plan)
    options = _Options(example_input, loss or _default_loss, optimizer or _default_optimizer, steps)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        found = {"dense": _measure(dense, options), "sparse": _measure(sparse, options)}
    layers = _side_by_side(dense, sparse, found["dense"].parts, found["sparse"].parts)
    return StepProfile(
        type(model).__name__,
        _first_shape(example_input),
        torch.get_num_threads(),
        active_isa(),
        found["dense"].times,
        found["sparse"].times,
        layers,
    )


@dataclass(frozen=True)
class _Options:
    example_input: object
    loss: LossFn
    optimizer: MakeOptimizer
    steps: int


def _short(steps: Mapping[str, Step]) -> Comparison:
    return compare(steps, budget_s=0.05, min_rounds=3, max_rounds=20)


@dataclass(frozen=True)
class _Measured:
    times: StepTimes
    parts: Mapping[str, Parts]


def _both_forms(model: nn.Module, example: object, plan: SwapPlan | None) -> tuple[nn.Module, nn.Module]:
    check_model(model, "profile")
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        if plan is not None:
            raise SparsePropError("profile takes a plan for a dense model; this one is swapped already.")
        sparse = copy.deepcopy(model)
        return to_dense(model, inplace=False), sparse
    sparse = swap_modules(model, None if plan else example, plan=plan, inplace=False)
    return to_dense(sparse, inplace=False), sparse


def _measure(model: nn.Module, options: _Options) -> _Measured:
    trainings = {layout: _training(model, layout, options) for layout in _layouts(model, options)}
    runs: dict[str, Step] = {layout: partial(_run, one) for layout, one in trainings.items()}
    whole = compare(runs, budget_s=0.5, min_rounds=max(3, options.steps), max_rounds=max(20, options.steps))
    best = whole.fastest()
    training = trainings.pop(best)
    others = {layout: whole.median_ms(layout) for layout in trainings}
    trainings.clear()
    watched = [traced_step(training) for _ in range(options.steps)]
    medians = {
        key: 1e3 * statistics.median(seconds.get(key, 0.0) for seconds, _ in watched) for key in watched[0][0]
    }
    watched_ms = 1e3 * statistics.median(sum(seconds.values()) for seconds, _ in watched)
    shares = _shares(training.model, watched[0][1], _short)
    return _Measured(StepTimes(best, whole.median_ms(best), watched_ms, others), _parts(medians, shares))


def _run(training: Training) -> None:
    training.step()


def _layouts(model: nn.Module, options: _Options) -> list[str]:
    args, kwargs = as_arguments(options.example_input)
    images = any(isinstance(x, Tensor) and x.dim() == 4 for x in (*args, *kwargs.values()))
    convolves = any(getattr(module, "kernel_size", None) is not None for module in model.modules())
    return ["contiguous", "channels_last"] if images and convolves else ["contiguous"]


def _training(model: nn.Module, layout: str, options: _Options) -> Training:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=form)
    args, kwargs = as_arguments(options.example_input)
    args, kwargs = tuple(_laid(x, form) for x in args), {key: _laid(x, form) for key, x in kwargs.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise SparsePropError("profile found nothing to train: no parameter requires a gradient.")
    return Training(model, lambda: model(*args, **kwargs), options.loss, options.optimizer(trained))


def _laid(x: Any, form: torch.memory_format) -> Any:
    return x.contiguous(memory_format=form) if isinstance(x, Tensor) and x.dim() == 4 else x


def _shares(model: nn.Module, calls: Mapping[str, CallSpec], timer: Timer) -> dict[str, Shares]:
    """Of each Linear and Conv layer; layers alike in all that matters are timed once."""
    known: dict[object, Shares] = {}
    shares = {}
    for name, layer in contractions(model).items():
        if name not in calls:
            continue
        nnz = layer.nnz if isinstance(layer, SparseLayer) else None
        trained = tuple(p.requires_grad for p in layer.parameters())
        alike = (layer.extra_repr(), nnz, calls[name], trained)
        if alike not in known:
            known[alike] = shares_of(layer, calls[name], timer)
        shares[name] = known[alike]
    return shares


def _parts(medians: Mapping[Key, float], shares: Mapping[str, Shares]) -> dict[str, Parts]:
    parts: dict[str, Parts] = {}
    for (name, phase), ms in medians.items():
        share = shares.get(name, Shares())
        if name in (OPTIMIZER, AUTOGRAD) or phase == "accumulate":
            part = Parts(other=ms)
        elif phase == "forward":
            part = Parts(forward=ms * (1 - share.forward_layout), layout=ms * share.forward_layout)
        else:
            part = Parts(
                grad_input=ms * share.grad_input,
                grad_weight=ms * share.grad_weight,
                layout=ms * share.backward_layout,
            )
        parts[name] = parts.get(name, Parts()) + part
    return parts


def _side_by_side(
    dense: nn.Module, sparse: nn.Module, dense_parts: Mapping[str, Parts], sparse_parts: Mapping[str, Parts]
) -> tuple[LayerTimes, ...]:
    forms = dict(sparse.named_modules())
    kinds = {name: type(module).__name__ for name, module in dense.named_modules()}
    kinds |= dict.fromkeys((LOSS, OPTIMIZER, AUTOGRAD), "step")
    layers = []
    for name, kind in kinds.items():
        form = forms.get(name)
        density = form.density if isinstance(form, SparseLayer) else None
        pair = (dense_parts.get(name, Parts()), sparse_parts.get(name, Parts()))
        if any(parts.total for parts in pair):
            layers.append(LayerTimes(name, kind, density, *pair))
    return tuple(layers)


def _default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)


def _default_loss(output: Any) -> Tensor:
    tensor = _first_tensor(output)
    if tensor.dim() == 2 and tensor.is_floating_point():
        classes = tensor.shape[1]
        labels = torch.arange(tensor.shape[0], device=tensor.device) % classes
        return functional.cross_entropy(tensor, labels)
    return tensor.square().mean()


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(output, Mapping | tuple | list) else ():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise SparsePropError(
        f"profile cannot make a loss of a {type(output).__name__}; pass loss=..., a function of the output."
    )


def _first_shape(example: object) -> tuple[int, ...]:
    args, kwargs = as_arguments(example)
    return next((tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), ())
