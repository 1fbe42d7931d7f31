"""What a user could pick instead: a masked dense layer, torch's CSR product, SparseLab where it is installed.

Run last, and apart from the rest: SparseLab brings a second OpenMP runtime into the process.
"""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from measure import record, sparse_layer, timed
from rows import Row
from shapes import FLAGSHIP, LinearShape
from sparseprop.timing import Step, module_step

SHAPES = {
    "tiny": (LinearShape(16, 24, 8),),
    "short": (FLAGSHIP,),
    "full": (FLAGSHIP, LinearShape(3072, 768, 1024), LinearShape(512, 512, 64)),
}
SPARSITIES = {"tiny": (0.9,), "short": (0.8, 0.9, 0.95, 0.98), "full": (0.5, 0.8, 0.9, 0.95, 0.98, 0.995)}


class Masked(nn.Module):
    """What `torch.nn.utils.prune` does: a dense weight, multiplied with its mask at every call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(layer.weight.detach()),
            nn.Parameter(layer.bias.detach().clone()),
        )
        self.register_buffer("mask", layer.mask.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def csr_forward(layer: nn.Module, x: torch.Tensor) -> Step:
    """torch's CSR times dense, forward only: it has no gradient for the non-zeros alone."""
    weight, x_t = layer.weight.detach().to_sparse_csr(), x.detach().t().contiguous()

    def step() -> None:
        torch.addmm(layer.bias.detach()[:, None], weight, x_t)

    return step


def pytest_generate_tests(metafunc):
    form = metafunc.config.getoption("form")
    cases = [(shape, s) for shape in SHAPES[form] for s in SPARSITIES[form]]
    metafunc.parametrize(("shape", "sparsity"), cases, ids=[f"{shape}-{s:.1%}" for shape, s in cases])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_peers(benchmark, shape, sparsity, effort):
    layer, x = sparse_layer(shape, sparsity), shape.input()
    dense = layer.to_dense()
    steps = {
        "sparse": module_step(layer, x),
        "dense": module_step(dense, x),
        "masked dense": module_step(Masked(layer), x),
        "sparse forward": module_step(layer, x, grad=False),
        "torch CSR forward": csr_forward(layer, x),
    }
    if find_spec("sparselab") is not None:
        from sparselab import SparseLinear

        theirs = SparseLinear(shape.in_features, shape.out_features, sparsity=sparsity)
        steps["SparseLab"] = module_step(theirs, x)
    fields = timed(effort.compare(steps), {name: name for name in steps}, "sparse", "dense")
    row = Row("peers", shape.group, str(shape), sparsity, nnz=layer.nnz, load=os.getloadavg()[0], **fields)
    record(benchmark, row, steps["sparse"])
