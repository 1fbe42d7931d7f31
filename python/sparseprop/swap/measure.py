"""What each layer is given by an example input, and how fast its dense and sparse forms are on that."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparseprop.errors import SparsePropError
from sparseprop.swap.kinds import sparse_from_dense
from sparseprop.swap.unchanged import ModelState, random_states_kept
from sparseprop.timing import Comparison, Timer, module_step

__all__ = [
    "CHANNELS_LAST",
    "CONTIGUOUS",
    "InputSpec",
    "Measured",
    "Times",
    "as_arguments",
    "capture",
    "least_layout",
    "measure_layer",
]

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
# by dimensions of the images
_FORMATS = {4: (nn.Conv2d, torch.channels_last), 5: (nn.Conv3d, torch.channels_last_3d)}


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
class Times:
    """Milliseconds a step of both forms, and the median ratio of sparse over dense of paired runs; None for a
    layer without zeros.
    """

    dense_ms: float
    sparse_ms: float | None = None
    ratio: float | None = None

    @property
    def least_ms(self) -> float:
        """Of the faster form."""
        return self.dense_ms if self.sparse_ms is None else min(self.dense_ms, self.sparse_ms)


@dataclass(frozen=True)
class Measured:
    """Times by layout of the images; of a layer without images, as contiguous ones."""

    by_layout: Mapping[str, Times]

    def within(self, layout: str | None) -> Times:
        """Times where the images of a model are in this layout."""
        return self.by_layout.get(layout or CONTIGUOUS, self.by_layout[CONTIGUOUS])


def least_layout(measured: Iterable[Measured]) -> str | None:
    """The layout in which layers cost least together, each in its faster form; None if none takes images.

    >>> convolution = Measured({CONTIGUOUS: Times(4.0, 3.0, 0.75), CHANNELS_LAST: Times(2.0, 5.0, 2.5)})
    >>> least_layout([convolution, Measured({CONTIGUOUS: Times(9.0, 1.0, 0.1)})])
    'channels_last'
    """
    known = list(measured)
    layouts = {layout: None for each in known for layout in each.by_layout}
    if len(layouts) < 2:
        return None
    return min(layouts, key=lambda layout: sum(each.within(layout).least_ms for each in known))


def capture(model: nn.Module, example_input: object, layers: Iterable[nn.Module]) -> dict[int, InputSpec]:
    """Run `model` once on `example_input` and note what each of `layers` gets first, by ``id`` of the layer.

    Buffers (batch-norm statistics), attributes, training flags and random state are as before afterwards,
    and so are the parameters of layers with a ``max_norm``, which each forward renormalizes.

    Raises:
        SparsePropError: `example_input` is neither tensor, tuple nor dict, the model fails on it, or it
            writes to another parameter.
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
    found = ModelState(model)
    try:
        with random_states_kept():
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
        found.put_back()
    found.check()
    return specs


def measure_layer(layer: nn.Module, name: str, sparsity: float, spec: InputSpec, timer: Timer) -> Measured:
    """Time both forms of `layer` in turn on inputs like `spec`, images contiguous and channels_last.

    Inputs that are neither count as contiguous, as they are. A layer without zeros has a dense form alone.
    """
    x = spec.make()
    layouts = _layouts(layer, x)
    sparse = sparse_from_dense(layer, name)
    forms: dict[str, nn.Module] = {"sparse": sparse} if sparsity > 0 else {}
    forms["dense"] = sparse.to_dense()
    steps = {}
    for layout, (form, given) in layouts.items():
        for kind, module in forms.items():
            laid = copy.deepcopy(module).to(memory_format=form)  # type: ignore[call-overload]  # torch's stub lacks it
            steps[_step(kind, layout)] = module_step(laid, given, grad=spec.grad_enabled)
    times = timer(steps)
    return Measured({layout: _times(times, layout, sparsity > 0) for layout in layouts})


def _layouts(layer: nn.Module, x: torch.Tensor) -> dict[str, tuple[torch.memory_format, torch.Tensor]]:
    """Memory format of the weights and input of each layout."""
    kind, form = _FORMATS.get(x.dim(), (None, None))
    if kind is None or form is None or not isinstance(layer, kind):
        return {CONTIGUOUS: (torch.contiguous_format, x)}
    plain, last = (
        x.detach().contiguous(memory_format=each).requires_grad_(x.requires_grad)
        for each in (torch.contiguous_format, form)
    )
    if not x.is_contiguous(memory_format=form):
        plain = x
    return {CONTIGUOUS: (torch.contiguous_format, plain), CHANNELS_LAST: (form, last)}


def _step(kind: str, layout: str) -> str:
    return kind if layout == CONTIGUOUS else f"{kind} {layout}"


def _times(times: Comparison, layout: str, both: bool) -> Times:
    dense, sparse = _step("dense", layout), _step("sparse", layout)
    if not both:
        return Times(times.median_ms(dense))
    return Times(times.median_ms(dense), times.median_ms(sparse), times.ratio(sparse, dense))


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
