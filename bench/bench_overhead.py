"""Fixed cost of a call: layers so small that nothing but Python, the binding and thread start remains.

Beside it what no layer written in Python can do without: a module whose autograd function computes nothing.
"""

import os

import pytest
import torch
from torch import nn

import sparseprop
from measure import record, timed
from rows import Row
from sparseprop.timing import module_step

CALLS = 50  # in a row, so that the clock does not count


class Nothing(torch.autograd.Function):
    """Memory for the results of a layer, and for those of its backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, shape):
        ctx.save_for_backward(x, weight, bias)
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx, grad):
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors), None


class Idle(nn.Module):
    """As many parameters as a layer, no work."""

    def __init__(self, layer, x):
        super().__init__()
        self.weight = nn.Parameter(layer.weight_values.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.shape = layer(x).shape

    def forward(self, x):
        return Nothing.apply(x, self.weight, self.bias, self.shape)


def layers():
    linear = sparseprop.nn.SparseLinear.random(16, 16, density=0.1)
    conv = sparseprop.nn.SparseConv2d.random(4, 4, 3, density=0.1)
    return {"Linear": (linear, torch.randn(1, 16)), "Conv": (conv, torch.randn(1, 4, 4, 4))}


def in_a_row(step):
    def many():
        for _ in range(CALLS):
            step()

    return many


@pytest.mark.parametrize("variant", ["forward", "forward + backward"])
@pytest.mark.parametrize("kind", ["Linear", "Conv"])
def test_call(benchmark, kind, variant, effort):
    layer, x = layers()[kind]
    grad = variant != "forward"
    x.requires_grad_(grad)
    modules = {"sparse": layer, "dense": layer.to_dense(), "idle": Idle(layer, x)}
    steps = {name: in_a_row(module_step(module, x, grad=grad)) for name, module in modules.items()}
    times = effort.compare(steps)
    fields = timed(times, {name: name for name in steps}, "sparse", "dense")
    fields["ms"] = {name: ms / CALLS for name, ms in fields["ms"].items()}
    row = Row(
        "overhead",
        kind,
        f"{kind}, {x.numel()} inputs",
        0.9,
        variant=variant,
        load=os.getloadavg()[0],
        **fields,
    )
    record(benchmark, row, steps["sparse"])
