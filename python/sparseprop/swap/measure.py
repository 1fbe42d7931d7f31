"""What each layer is given by an example input, and how fast its dense and sparse forms are on that."""

import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparseprop.errors import SparsePropError
from sparseprop.swap.kinds import Facts, facts, sparse_from_dense
from sparseprop.timing import Timer, module_step

__all__ = ["InputSpec", "Measured", "Measurements", "as_arguments", "capture", "measure_layer"]

_SAME_SPARSITY = 0.01


@dataclass(frozen=True)
class InputSpec:
    """All that the speed of a layer can depend on in its input."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    grad_enabled: bool

    def make(self) -> torch.Tensor:
        """A tensor like this, of fixed pseudo-random values that leave the global random state alone."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        memory = torch.empty(max(extent, 0), dtype=self.dtype)
        memory.normal_(generator=torch.Generator().manual_seed(0))
        return memory.as_strided(self.shape, self.strides).requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Measured:
    """Milliseconds a step of both forms, and the median ratio of sparse over dense of paired runs."""

    dense_ms: float
    sparse_ms: float
    ratio: float


@dataclass(frozen=True)
class _Key:
    """Layers equal in this have equal times, if also their sparsity is the same."""

    facts: Facts
    spec: InputSpec
    parameters: tuple[tuple[torch.dtype, bool], ...]


def capture(model: nn.Module, example_input: object, layers: Iterable[nn.Module]) -> dict[int, InputSpec]:
    """Run `model` once on `example_input` and note what each of `layers` gets first, by ``id`` of the layer.

    Buffers (batch-norm statistics), training flags and random state are as before afterwards.

    Raises:
        SparsePropError: `example_input` is neither tensor, tuple nor dict, or the model fails on it.
    """
    args, kwargs = as_arguments(example_input)
    wanted = {id(layer) for layer in layers}
    specs: dict[int, InputSpec] = {}
    running: list[str] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], *, name: str) -> None:
        running.append(name)
        x = inputs[0] if inputs else named.get("input")
        if id(module) in wanted and id(module) not in specs and isinstance(x, torch.Tensor) and x.numel():
            needs = x.requires_grad
            specs[id(module)] = InputSpec(tuple(x.shape), x.stride(), x.dtype, needs, torch.is_grad_enabled())

    def leave(*_: object) -> None:
        running.pop()

    handles: list[RemovableHandle] = []
    try:
        with _left_as_found(model):
            for name, module in model.named_modules():
                before = partial(enter, name=name)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
            model(*args, **kwargs)
    except Exception as error:
        where = f"layer {running[-1]!r}" if running and running[-1] else "the model itself"
        raise SparsePropError(
            f"The model fails on example_input in {where}: {type(error).__name__}: {error} "
            "Pass an input that model(input), model(*tuple) or model(**dict) accepts."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return specs


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
            if known_key == key and abs(known_sparsity - sparsity) <= _SAME_SPARSITY:
                return measured
        with torch.inference_mode(False):  # the example may have run in it, its tensors cannot be stepped on
            measured = measure_layer(layer, name, spec, self._timer)
        self._known.append((key, sparsity, measured))
        return measured


def measure_layer(layer: nn.Module, name: str, spec: InputSpec, timer: Timer) -> Measured:
    """Time both forms of `layer` in turn on inputs like `spec`.

    A dense convolution counts with the faster of the contiguous and the channels_last layout of its input and
    weight; the sparse layer gets the input in the layout that the model really hands it.
    """
    sparse = sparse_from_dense(layer, name)
    dense = sparse.to_dense()
    x = spec.make()
    steps = {"sparse": module_step(sparse, x, grad=spec.grad_enabled)}
    layouts = {"dense": torch.contiguous_format}
    if isinstance(dense, nn.Conv2d) and x.dim() == 4:
        layouts["dense channels_last"] = torch.channels_last
    elif isinstance(dense, nn.Conv3d) and x.dim() == 5:
        layouts["dense channels_last"] = torch.channels_last_3d
    for form, layout in layouts.items():
        like = copy.deepcopy(dense).to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
        theirs = x.detach().contiguous(memory_format=layout).requires_grad_(spec.requires_grad)
        steps[form] = module_step(like, theirs, grad=spec.grad_enabled)
    times = timer(steps)
    best = times.fastest(*layouts)
    return Measured(times.median_ms(best), times.median_ms("sparse"), times.ratio("sparse", best))


def as_arguments(example_input: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, torch.Tensor):
        return (example_input,), {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, tuple | list):
        return tuple(example_input), {}
    raise SparsePropError(
        "example_input must be a tensor, a tuple of positional or a dict of named arguments of the model, "
        f"got {type(example_input).__name__}."
    )


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    flags = [module.training for module in modules]
    buffers = [
        (module, key, buffer, buffer.detach().clone())
        for module in modules
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        with torch.no_grad():
            for module, key, buffer, before in buffers:
                module._buffers[key] = buffer
                if not torch.equal(buffer, before):  # some buffers are expanded views: they refuse writes
                    buffer.copy_(before)
