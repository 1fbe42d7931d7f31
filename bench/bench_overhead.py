"""Fixed cost of a call: layers so small that nothing but Python, the binding and thread start remains."""

import os

import pytest
import torch

import sparseprop
from measure import record, timed
from rows import Row
from sparseprop.timing import module_step

CALLS = 50  # in a row, so that the clock does not count


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
    modules = {"sparse": layer, "dense": layer.to_dense()}
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
