"""How the time of one Linear or Conv layer divides into its contractions and the change of layout.

The three cannot be told apart inside a running step: one backward call serves both gradients, and the kernels
pack and unpack as they go. So each layer is timed alone, on tensors like those of the step: with one gradient
wanted, with the other, and, if sparse, with next to no weights, which leaves what a layer pays for layouts
and for being called. The shares found are applied to the time the layer took in the step.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseprop.nn import SparseLayer
from sparseprop.pattern import SparsityPattern
from sparseprop.profiling.trace import CallSpec
from sparseprop.timing import Step, Timer

__all__ = ["Shares", "shares_of", "together"]

# Fewer multiply-adds run on one thread only, which would make the layout change look slow.
_PARALLEL_WORK = 1 << 20
# One weight in so many is few enough not to count, however small the layer.
_FEW = 10


@dataclass(frozen=True)
class Shares:
    """Shares of a layer's forward and of its backward time; the backward ones add up to 1. What both took
    when they were found weighs them against those of other calls.
    """

    forward_layout: float = 0.0
    backward_layout: float = 0.0
    grad_input: float = 1.0
    grad_weight: float = 0.0
    forward_ms: float = 0.0
    backward_ms: float = 0.0


def together(calls: Iterable[tuple[Shares, int]]) -> Shares:
    """Shares of all calls of a layer in a step, each given with how often it occurs.

    >>> first, later = Shares(backward_ms=2.0), Shares(grad_input=0.5, grad_weight=0.5, backward_ms=3.0)
    >>> found = together([(first, 1), (later, 2)])
    >>> found.grad_input, found.grad_weight, found.backward_ms
    (0.625, 0.375, 8.0)
    """
    known = list(calls)
    forward_ms = sum(count * one.forward_ms for one, count in known)
    backward_ms = sum(count * one.backward_ms for one, count in known)
    layout = sum(count * one.forward_ms * one.forward_layout for one, count in known)
    forward_layout = _share(layout, forward_ms)
    if not backward_ms:
        return Shares(forward_layout, forward_ms=forward_ms)
    weighted = [(one, count * one.backward_ms / backward_ms) for one, count in known]
    return Shares(
        forward_layout,
        sum(weight * one.backward_layout for one, weight in weighted),
        sum(weight * one.grad_input for one, weight in weighted),
        sum(weight * one.grad_weight for one, weight in weighted),
        forward_ms,
        backward_ms,
    )


def shares_of(layer: nn.Module, call: CallSpec, timer: Timer) -> Shares:
    """Time the parts of `layer` in turn; its parameters keep values and flags."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    try:
        with torch.enable_grad():
            steps = _steps(layer, call, trained)
            for parameter in trained:
                parameter.requires_grad_(True)
            found = timer(steps)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    ms = {name: found.median_ms(name) for name in steps}
    thin_forward, thin_backward = ms.get("thin forward", 0.0), ms.get("thin backward", 0.0)
    forward_layout = _share(thin_forward, ms["forward"])
    only_input, only_weight = ms.get("grad input"), ms.get("grad weight")
    if only_input is None or only_weight is None:
        whole = only_input or only_weight or 0.0
        layout = _share(thin_backward, whole)
        rest = 1.0 - layout
        halves = rest * (only_weight is None), rest * (only_weight is not None)
        return Shares(forward_layout, layout, *halves, ms["forward"], whole)
    layout = _share(thin_backward, ms["both"])
    for_input, for_weight = (max(ms_ - thin_backward, 1e-9) for ms_ in (only_input, only_weight))
    rest = (1.0 - layout) / (for_input + for_weight)
    return Shares(forward_layout, layout, rest * for_input, rest * for_weight, ms["forward"], ms["both"])


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0 else 0.0


def _steps(layer: nn.Module, call: CallSpec, trained: list[nn.Parameter]) -> dict[str, Step]:
    wants_input = call.input.requires_grad
    thin = _thin(layer, call) if isinstance(layer, SparseLayer) else None
    steps = {"forward": _forward(layer, call)}
    if thin is not None:
        steps["thin forward"] = _forward(thin, call)
    if call.grad is None:
        return steps
    if wants_input:
        steps["grad input"] = _backward(layer, call, [])
    if trained:
        steps["grad weight"] = _backward(layer, call, trained, for_input=False)
    if wants_input and trained:
        steps["both"] = _backward(layer, call, trained)
    if thin is not None:
        like = [
            p for name, p in thin.named_parameters() if any(layer.get_parameter(name) is t for t in trained)
        ]
        steps["thin backward"] = _backward(thin, call, like)
    return steps


def _thin(layer: SparseLayer, call: CallSpec) -> SparseLayer:
    """The same layer with so few weights that only its layout costs."""
    geometry = layer._geometry
    columns = max(1, torch.Size(call.input.shape).numel() // geometry.in_channels)
    nnz = 1 if torch.get_num_threads() == 1 else max(1, min(layer.nnz // _FEW, _PARALLEL_WORK // columns))
    pattern = SparsityPattern.random(
        geometry.out_channels, geometry.cols, nnz=nnz, generator=torch.Generator().manual_seed(0)
    )
    return layer._build(
        layer._options_of(layer), pattern, bias=layer.bias is not None, dtype=layer.weight_values.dtype
    )


def _forward(layer: nn.Module, call: CallSpec) -> Step:
    x = call.input.make().detach()

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return forward


def _backward(
    layer: nn.Module, call: CallSpec, trained: list[nn.Parameter], *, for_input: bool = True
) -> Step:
    assert call.grad is not None
    x = call.input.make().detach().requires_grad_(for_input and call.input.requires_grad)
    for parameter in layer.parameters():
        parameter.requires_grad_(any(parameter is one for one in trained))
    output: Tensor = layer(x)  # keeps only what these gradients need
    wanted = [tensor for tensor in (x, *trained) if tensor.requires_grad]
    grad = call.grad.make().detach()

    def backward() -> None:
        torch.autograd.grad(output, wanted, grad, retain_graph=True)

    return backward
