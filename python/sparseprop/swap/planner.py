"""`plan`: decide, layer by layer, which form to use."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import nn

from sparseprop.errors import SparsePropError
from sparseprop.swap.cost import estimate, keep_dense_rule
from sparseprop.swap.cuda import is_cuda, parse_cuda_pattern, plan_semi_structured
from sparseprop.swap.decide import Candidate, FilterFn, check_model, survey
from sparseprop.swap.kinds import Facts, facts
from sparseprop.swap.measure import (
    CHANNELS_LAST,
    InputSpec,
    Measured,
    Times,
    capture,
    least_layout,
    measure_layer,
)
from sparseprop.swap.plan import LayerPlan, SwapPlan
from sparseprop.timing import Timer, compare

__all__ = ["CLEARLY_FASTER", "Planner", "plan"]

logger = logging.getLogger(__name__)

# A layer becomes sparse only if its time is below this fraction of the dense one: repeated runs of one and
# the same layer differ by 2 % on a quiet machine, estimates by more from what is measured then.
CLEARLY_FASTER = 0.95

_SAME_SPARSITY = 0.01


def plan(
    model: nn.Module,
    example_input: object = None,
    *,
    min_sparsity: float | None = None,
    filter_fn: FilterFn | None = None,
    measure: bool = True,
    device: torch.device | str | None = None,
    pattern: str | None = None,
) -> SwapPlan:
    """Decide which ``Linear`` and ``Conv`` layers of `model` should become sparse; change nothing.

    Args:
        model: any eager module. It is left as it is: weights, buffers, training flags, random state.
        example_input: one real batch: a tensor, a tuple of positional or a dict of named arguments. The
            model runs on it once, then both forms of each layer are timed on inputs of the shapes seen there,
            forward and backward; under ``torch.no_grad()`` forward only. Images are timed contiguous and
            channels_last, and all layers choose within the layout in which their faster forms cost least
            together: `SwapPlan.layout`, which model and images are best in. Without it times are estimated.
        min_sparsity: from 0 to 1. Each eligible layer at least that sparse becomes sparse, however slow.
        filter_fn: ``filter_fn(module, name) -> bool``; layers for which it is false stay dense.
        measure: False estimates the times even where `example_input` tells the shapes.
        device: None or ``"cpu"``; ``"cuda"`` plans 2:4 layers over torch's semi-structured tensors, for
            which nothing is measured and weights need not be sparse: they are pruned by magnitude.
        pattern: with ``device="cuda"``: ``"2:4"`` or ``"2:4T"``, whose input gradients are sparse too.

    Returns:
        A `SwapPlan` with one entry, and one reason, for each dense ``Linear`` or ``Conv`` layer.

    Raises:
        SparsePropError: a wrapper (DDP, FSDP, compiled, scripted), an example the model fails on or writes
            to its parameters on, an example for lazy layers without weights yet, or a bad `min_sparsity`.

    >>> import sparseprop
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> _ = model[0].weight.data[:, :60].zero_()
    >>> [layer.choice for layer in sparseprop.plan(model, min_sparsity=0.8)]
    ['sparse', 'dense']
    """
    if is_cuda(device):
        _check_min_sparsity(min_sparsity)
        wanted = parse_cuda_pattern(pattern)
        check_model(model, "plan")
        return plan_semi_structured(model, wanted, min_sparsity=min_sparsity, filter_fn=filter_fn)
    return Planner(min_sparsity, filter_fn, measure).plan(model, example_input)


def _check_min_sparsity(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise SparsePropError(f"min_sparsity must be a number from 0 to 1 (0.9: 90 % zeros), got {value!r}.")


@dataclass(frozen=True)
class _Key:
    """Layers equal in this have equal times, if also their sparsity is the same."""

    facts: Facts
    spec: InputSpec
    parameters: tuple[tuple[torch.dtype, bool], ...]


class Measurements:
    """Times layers with `timer`, equal layers once."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._known: list[tuple[_Key, float, Measured]] = []

    def of(self, layer: nn.Module, name: str, sparsity: float, spec: InputSpec) -> Measured:
        """Times of `layer` on inputs like `spec`; those of an equal layer within 1 % sparsity if known."""
        parameters = tuple((p.dtype, p.requires_grad) for p in layer.parameters())
        key = _Key(facts(layer), spec, parameters)
        for known_key, known_sparsity, measured in self._known:
            same_forms = (known_sparsity > 0) == (sparsity > 0)
            if known_key == key and same_forms and abs(known_sparsity - sparsity) <= _SAME_SPARSITY:
                return measured
        with torch.inference_mode(False):  # the example may have run in it, its tensors cannot be stepped on
            measured = measure_layer(layer, name, sparsity, spec, self._timer)
        self._known.append((key, sparsity, measured))
        return measured


def _check_initialized(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(map(nn.parameter.is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            what = f"layer {name!r}" if name else "the model"
            raise SparsePropError(
                f"plan cannot run the model on example_input: {what} is a {type(module).__name__} without "
                "weights yet; run the model once first, then plan."
            )


@dataclass(frozen=True)
class Planner:
    """The options of `plan`, and the `timer` that measures."""

    min_sparsity: float | None = None
    filter_fn: FilterFn | None = None
    measure: bool = True
    timer: Timer = compare

    def plan(self, model: nn.Module, example_input: object = None) -> SwapPlan:
        """As the function `plan`."""
        _check_min_sparsity(self.min_sparsity)
        with torch.random.fork_rng(devices=[]):
            return self._plan(model, example_input)

    def _plan(self, model: nn.Module, example_input: object) -> SwapPlan:
        candidates = survey(check_model(model, "plan"), self.filter_fn)
        specs: dict[int, InputSpec] = {}
        if example_input is not None and self.min_sparsity is None:
            _check_initialized(model)
            specs = capture(model, example_input, [c.module for c in candidates if c.reason is None])
        measured = self._measured(candidates, specs)
        layout = least_layout(measured.values())
        estimated = "estimated" if example_input is None else "not reached by example_input, estimated"
        layers = []
        for candidate in candidates:
            spec = specs.get(id(candidate.module))
            times = measured[candidate.name].within(layout) if candidate.name in measured else None
            how = estimated if spec is None else "measured" if self.measure else "estimated"
            if times is not None and layout == CHANNELS_LAST:
                how += f" in {layout}"
            layer = self._decide(candidate, spec, times, how)
            logger.debug("%s: %s, %s", layer.name, layer.choice, layer.reason)
            layers.append(layer)
        return SwapPlan(tuple(layers), layout)

    def _measured(self, candidates: list[Candidate], specs: dict[int, InputSpec]) -> dict[str, Measured]:
        """By name, layers that may become sparse, and convolutions of images that stay dense in any case.

        Not depthwise ones: `fuse` runs those with what surrounds them, contiguous, faster than either.
        """
        measurements, found = Measurements(self.timer), {}
        for candidate in candidates:
            module, sparsity, spec = candidate.module, candidate.sparsity, specs.get(id(candidate.module))
            if not self.measure or spec is None or candidate.reason is not None or sparsity is None:
                continue
            images = isinstance(module, nn.Conv2d | nn.Conv3d) and not facts(module).depthwise
            if sparsity > 0 or images:
                found[candidate.name] = measurements.of(module, candidate.name, sparsity, spec)
        return found

    def _decide(
        self, candidate: Candidate, spec: InputSpec | None, times: Times | None, how: str
    ) -> LayerPlan:
        sparsity = candidate.sparsity
        if candidate.reason is not None or sparsity is None:
            return _layer(candidate, "dense", candidate.reason or "sparsity unknown")
        if self.min_sparsity is not None:
            enough = sparsity >= self.min_sparsity
            reason = f"{'at least' if enough else 'sparsity is below'} min_sparsity {self.min_sparsity:g}"
            return _layer(candidate, "sparse" if enough else "dense", reason)
        if sparsity == 0:
            return _layer(candidate, "dense", "dense weight, no zeros")
        if times is not None and times.ratio is not None and times.sparse_ms is not None:
            return _by_ratio(candidate, times.ratio, (times.dense_ms, times.sparse_ms), how)
        return _estimated(candidate, sparsity, spec, how)


def _estimated(candidate: Candidate, sparsity: float, spec: InputSpec | None, how: str) -> LayerPlan:
    layer = facts(candidate.module)
    positions = _positions(candidate.module, spec)
    rule = keep_dense_rule(layer, positions)
    if rule is not None:
        return _layer(candidate, "dense", rule if how == "estimated" else f"{how}: {rule}")
    weights = math.prod(candidate.shape)
    times = estimate(layer, round((1 - sparsity) * weights), positions)
    return _by_ratio(candidate, times.sparse_ms / times.dense_ms, (times.dense_ms, times.sparse_ms), how)


def _by_ratio(candidate: Candidate, ratio: float, times: tuple[float, float], how: str) -> LayerPlan:
    speed = f"{1 / max(ratio, 1e-9):.2f}x dense speed"
    if ratio < CLEARLY_FASTER:
        return _layer(candidate, "sparse", f"{how}: {speed}", times)
    return _layer(candidate, "dense", f"{how}: sparse is not clearly faster ({speed})", times)


def _layer(
    candidate: Candidate, choice: str, reason: str, times: tuple[float | None, float | None] = (None, None)
) -> LayerPlan:
    c = candidate
    return LayerPlan(c.name, c.kind, c.shape, c.sparsity, choice, times[0], times[1], reason)


def _positions(module: nn.Module, spec: InputSpec | None) -> int | None:
    """Output columns of the layer on an input like `spec`."""
    if spec is None:
        return None
    layer = facts(module)
    if layer.kind == "Linear":
        return math.prod(spec.shape[:-1])
    spatial = len(layer.kernel)
    batch = math.prod(spec.shape[: -spatial - 1])
    # Padding moves the border only: close enough for an estimate.
    return max(1, batch * math.prod(spec.shape[-spatial:]) // math.prod(layer.stride))
