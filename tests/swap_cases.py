"""Models and tables that the tests of planning, swapping and checkpoints share."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparseprop
from sparseprop.swap import LayerPlan
from sparseprop.timing import Comparison


def sparsify(layer: nn.Module, sparsity: float) -> nn.Module:
    """Zero exactly the smallest `sparsity` of the weights of `layer`."""
    weight = layer.weight.detach()
    count = round(sparsity * weight.numel())
    weight.view(-1)[weight.abs().flatten().argsort()[:count]] = 0.0
    return layer


def plan_entry(**changes) -> LayerPlan:
    """A decision to make layer "0", an 8 x 8 Linear, sparse."""
    fields = {"name": "0", "kind": "Linear", "shape": (8, 8), "choice": "sparse", "reason": "asked for"}
    return LayerPlan(**{"sparsity": None, "dense_ms": None, "sparse_ms": None, **fields, **changes})


class FakeTimer:
    """Stands for the clock: runs each candidate once, to see that it can, and makes its time up."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = {"dense channels_last": 1e3, "sparse channels_last": 1e3, **seconds}
        self.calls: list[list[str]] = []

    def __call__(self, steps):
        self.calls.append(list(steps))
        for step in steps.values():
            step()
        return Comparison({name: (self.seconds[name],) for name in steps})


class TwoLayers(nn.Module):
    """A model one of whose layers no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used = sparsify(nn.Linear(128, 128), 0.9)
        self.unused = sparsify(nn.Linear(128, 128), 0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class Subclass(nn.Linear):
    """Might do anything in its forward."""


def small_cnn() -> nn.Sequential:
    """For inputs (N, 3, 8, 8); every kind of thing in it that planning could disturb."""
    return nn.Sequential(
        sparsify(nn.Conv2d(3, 8, 3, padding=1), 0.75),
        nn.BatchNorm2d(8),
        nn.Dropout(0.5),
        nn.Flatten(),
        sparsify(nn.Linear(8 * 64, 4), 0.75),
    )


def small_sparse_cnn() -> nn.Module:
    """The same, swapped."""
    return sparseprop.swap_modules(small_cnn(), min_sparsity=0.5)


def assert_same_state(got, wanted) -> None:
    """Two state dicts with the same keys in the same order, and equal tensors."""
    assert list(got) == list(wanted)
    for key in wanted:
        assert got[key].dtype == wanted[key].dtype, key
        assert torch.equal(got[key], wanted[key]), key


def _named(layer: nn.Module, **others: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layer": layer, **others})


def _changed(change: Callable[[nn.Linear], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        changed = nn.Linear(8, 8)
        change(changed)
        return _named(changed)

    return make


def tied() -> nn.Module:
    """A layer whose weight is an embedding's, as in language models."""
    embedding, head = nn.Embedding(8, 8), nn.Linear(8, 8)
    head.weight = embedding.weight
    return nn.ModuleDict({"embedding": embedding, "layer": head})


def overlapping() -> nn.Module:
    """Two parameters that view one tensor."""
    memory = torch.randn(12, 8)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    first.weight, second.weight = nn.Parameter(memory[:8]), nn.Parameter(memory[4:])
    return nn.ModuleDict({"layer": first, "other": second})


def _pruned_bias(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "bias", 0.5)


def _nan(layer: nn.Linear) -> None:
    layer.weight.data[0, 0] = float("nan")


SKIPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: _named(Subclass(8, 8)), "Subclass is a subclass of Linear"),
    "attention": (
        lambda: _named(nn.MultiheadAttention(8, 2).out_proj),
        "NonDynamicallyQuantizableLinear is a subclass of Linear",
    ),
    "transposed": (
        lambda: _named(nn.ConvTranspose2d(2, 2, 3)),
        "transposed convolutions have no sparse form",
    ),
    "lazy": (lambda: _named(nn.LazyLinear(8)), "lazy layer without weights yet; run the model once"),
    "parametrized": (_changed(parametrizations.orthogonal), "parametrized; call parametrize.remove"),
    "tied": (tied, "weights shared with 'embedding.weight'"),
    "overlapping": (overlapping, "weights shared with 'other.weight'"),
    "hook": (
        _changed(lambda layer: layer.register_forward_hook(lambda *_: None)),
        "has hooks that would be lost",
    ),
    "pre-hook": (_changed(lambda layer: layer.register_forward_pre_hook(lambda *_: None)), "has hooks"),
    "gradient hook": (
        _changed(lambda layer: layer.register_full_backward_hook(lambda *_: None)),
        "has hooks that would be lost",
    ),
    "state-dict hook": (
        _changed(lambda layer: layer._register_state_dict_hook(lambda *_: None)),
        "has hooks",
    ),
    "weight hook": (_changed(lambda layer: layer.weight.register_hook(lambda _: None)), "weight has hooks"),
    "forward replaced": (
        _changed(lambda layer: setattr(layer, "forward", layer.forward)),
        "its forward was replaced",
    ),
    "more parameters": (
        _changed(lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(1)))),
        "its parameters are not the usual ones: scale",
    ),
    "more buffers": (
        _changed(lambda layer: layer.register_buffer("scale", torch.ones(1))),
        "its parameters are not the usual ones: scale",
    ),
    "children": (
        _changed(lambda layer: layer.add_module("lora", nn.Linear(2, 2))),
        "its parameters are not the usual ones: lora",
    ),
    "pruned bias": (_changed(_pruned_bias), "its bias is pruned"),
    "half": (lambda: _named(nn.Linear(8, 8).half()), "weight is float16; float32 and float64 are supported"),
    "bfloat16": (lambda: _named(nn.Linear(8, 8, dtype=torch.bfloat16)), "weight is bfloat16"),
    "complex": (lambda: _named(nn.Linear(8, 8, dtype=torch.complex64)), "weight is complex64"),
    "meta": (lambda: _named(nn.Linear(8, 8, device="meta")), "on device meta; holds no values yet"),
    "nan": (_changed(_nan), "weight holds NaN or Inf"),
}


def _ddp_like() -> nn.Module:
    return nn.DataParallel(nn.Linear(4, 4))


def _compiled_inside() -> nn.Module:
    return nn.Sequential(nn.ReLU(), torch.compile(nn.Linear(4, 4), backend="eager"))


WRAPPED: dict[str, tuple[Callable[[], object], str]] = {
    "data parallel": (_ddp_like, "the model: it is a DataParallel; swap the model first, then wrap it"),
    "compiled": (
        lambda: torch.compile(nn.Linear(4, 4), backend="eager"),
        "the model: it is a OptimizedModule; swap the plain model first, then call torch.compile",
    ),
    "compiled inside": (_compiled_inside, "layer '1': it is a OptimizedModule"),
    "no module": (lambda: [nn.Linear(4, 4)], "expects a torch.nn.Module, got list"),
}
