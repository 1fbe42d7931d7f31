"""`profile`: build both forms of a model, time their steps whole and watched, and put them side by side."""

import statistics
from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from sparseprop.backend import active_isa
from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLayer
from sparseprop.profiling.forms import (
    LossFn,
    MakeOptimizer,
    Options,
    both_forms,
    default_loss,
    default_optimizer,
    first_shape,
    layouts,
    make_training,
)
from sparseprop.profiling.ledger import Key
from sparseprop.profiling.report import LayerTimes, Parts, StepProfile, StepTimes
from sparseprop.profiling.split import Shares, shares_of, together
from sparseprop.profiling.trace import (
    AUTOGRAD,
    LOSS,
    OPTIMIZER,
    CallSpec,
    Training,
    contractions,
    traced_step,
)
from sparseprop.swap.plan import SwapPlan
from sparseprop.swap.unchanged import random_states_kept
from sparseprop.timing import Comparison, Step, Timer, compare

__all__ = ["profile"]

# A layer called with ever other shapes is split by the most frequent ones, or timing would never end.
_MOST_CALLS = 16


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

    Works on copies: `model` keeps its weights, buffers and flags, and random generators their states. Its
    training mode and frozen parameters are respected. Convolutional models are tried in both dense layouts
    (contiguous and channels_last) on either side, all in turn, and the faster one is profiled. Cut a large
    batch: up to four copies of the model train side by side. Times taken on a busy machine with several
    threads tell little; use one thread there. What `fuse` merged is called part by part while watched.

    Args:
        model: swapped, or dense with zeros (then swapped by `plan`, or by what `sparseprop.plan` measures).
        example_input: one real batch: a tensor, a tuple of positional or a dict of named arguments.
        plan: for a dense `model`, what to swap.
        loss: maps the model's output to a scalar; by default cross-entropy of fixed random labels if the
            output is (batch, classes), else the mean of squares.
        optimizer: makes one from parameters; by default SGD with momentum.
        steps: how many steps of each form are timed whole, and how many of the faster ones are watched.

    Returns:
        A `StepProfile`: prints as a table; `to_json`, `save_png`.

    Raises:
        SparsePropError: a wrapper (compiled, data parallel), nothing to train, `steps` below 1, a loss
            that is not one number, or a `plan` for a model that is swapped already.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> _ = model[0].weight.data[:, :60].zero_()
    >>> import sparseprop
    >>> plan = sparseprop.plan(model, min_sparsity=0.9)
    >>> found = sparseprop.profile(model, torch.ones(4, 64), plan=plan, steps=1)
    >>> [layer.name for layer in found.layers]
    ['', '0', '1', '2', '(loss)', '(optimizer)', '(gradient sums)']
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise SparsePropError(f"profile needs steps >= 1, got {steps!r}.")
    options = Options(example_input, loss or default_loss, optimizer or default_optimizer)
    with random_states_kept():
        return _profile(model, options, plan, steps)


def _profile(model: nn.Module, options: Options, plan: SwapPlan | None, steps: int) -> StepProfile:
    example_input = options.example_input
    models = dict(zip(("dense", "sparse"), both_forms(model, example_input, plan), strict=True))
    with torch.enable_grad():
        trainings = {
            (form, layout): make_training(one, layout, options)
            for form, one in models.items()
            for layout in layouts(one, example_input)
        }
        whole = _whole_steps(trainings, steps)
        times, parts = {}, {}
        for form in models:
            ms = {layout: whole.median_ms(f"{form} {layout}") for which, layout in trainings if which == form}
            best = min(ms, key=ms.__getitem__)
            watched_ms, parts[form] = _watch(trainings[form, best], steps)
            times[form] = StepTimes(best, ms.pop(best), watched_ms, ms)
    return StepProfile(
        type(model).__name__,
        first_shape(example_input),
        torch.get_num_threads(),
        active_isa(),
        times["dense"],
        times["sparse"],
        _side_by_side(models["dense"], models["sparse"], parts["dense"], parts["sparse"]),
    )


def _short(steps: Mapping[str, Step]) -> Comparison:
    return compare(steps, budget_s=0.05, min_rounds=3, max_rounds=20)


def _whole_steps(trainings: Mapping[tuple[str, str], Training], steps: int) -> Comparison:
    """Times of all forms and layouts, run in turn, `steps` times each; fewer only if that takes minutes."""
    runs: dict[str, Step] = {" ".join(key): partial(_run, one) for key, one in trainings.items()}
    return compare(runs, budget_s=60.0, min_rounds=steps, max_rounds=steps)


def _run(training: Training) -> None:
    training.step()


def _watch(training: Training, steps: int) -> tuple[float, dict[str, Parts]]:
    """Milliseconds of a step with the stop-watch, and its parts by module."""
    watched = [traced_step(training) for _ in range(steps)]
    medians = {
        key: 1e3 * statistics.median(seconds.get(key, 0.0) for seconds, _ in watched) for key in watched[0][0]
    }
    whole = 1e3 * statistics.median(sum(seconds.values()) for seconds, _ in watched)
    return whole, _parts(medians, _shares(training.model, watched[0][1], _short))


def _shares(model: nn.Module, calls: Mapping[str, Counter[CallSpec]], timer: Timer) -> dict[str, Shares]:
    """Of each Linear and Conv layer; calls of layers alike in all that matters are timed once."""
    known: dict[object, Shares] = {}
    shares = {}
    for name, layer in contractions(model).items():
        if name not in calls:
            continue
        found = []
        nnz = layer.nnz if isinstance(layer, SparseLayer) else None
        trained = tuple(p.requires_grad for p in layer.parameters())
        for call, count in calls[name].most_common(_MOST_CALLS):
            alike = (layer.extra_repr(), nnz, call, trained)
            if alike not in known:
                known[alike] = shares_of(layer, call, timer)
            found.append((known[alike], count))
        shares[name] = together(found)
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
