"""What threads, wider vectors and narrower activations bring: one layer under each setting in turn."""

import os
from functools import partial

import pytest
import torch
from torch import nn

import sparseprop
from measure import compare_settings, record, sparse_layer, timed
from rows import Row
from shapes import FLAGSHIP, ConvShape, LinearShape
from sparseprop import _native
from sparseprop.timing import module_step

SHORT = (
    FLAGSHIP,
    LinearShape(3072, 768, 1024),
    ConvShape(256, 256, 3, 14, 1, 16),
    ConvShape(512, 128, 1, 28, 1, 16),
)
MORE = (LinearShape(4096, 4096, 512), ConvShape(64, 64, 3, 56, 1, 16), ConvShape(512, 512, 3, 7, 1, 16))
SHAPES = {"tiny": (LinearShape(16, 24, 8),), "short": SHORT, "full": SHORT + MORE}
SPARSITIES = {"tiny": (0.9,), "short": (0.9,), "full": (0.8, 0.9, 0.95)}


def pytest_generate_tests(metafunc):
    form = metafunc.config.getoption("form")
    cases = [(shape, s) for shape in SHAPES[form] for s in SPARSITIES[form]]
    metafunc.parametrize(("shape", "sparsity"), cases, ids=[f"{shape}-{s:.1%}" for shape, s in cases])


@pytest.fixture
def best_isa():
    """Whatever a test chose, the instruction set is what it was."""
    before = sparseprop.active_isa()
    yield before
    _native.set_max_isa(before)


def run(benchmark, family, settings, shape, sparsity, effort):
    """Time a layer under each setting in turn; the first one is the base, the last one is ours."""
    layer = sparse_layer(shape, sparsity)
    step = module_step(layer, shape.input())
    times = compare_settings(settings, step, effort)
    names = list(settings)
    base, ours = names[0], names[-1]
    fields = timed(times, {name: name for name in names}, ours, base)
    row = Row(family, shape.group, str(shape), sparsity, nnz=layer.nnz, load=os.getloadavg()[0], **fields)
    record(benchmark, row, step)


def test_threads(benchmark, shape, sparsity, effort, pytestconfig):
    most = pytestconfig.getoption("threads")
    if most == 1:
        pytest.skip("one thread has nothing to scale to")
    counts = sorted({1, *(2**k for k in range(1, 10) if 2**k <= most), most})
    run(
        benchmark,
        "threads",
        {f"{n} thread{'s' * (n > 1)}": partial(torch.set_num_threads, n) for n in counts},
        shape,
        sparsity,
        effort,
    )


def test_isa(benchmark, best_isa, shape, sparsity, form, effort):
    isas = sparseprop.available_isas()
    isas = isas[isas.index("avx2") :] if "avx2" in isas and form != "full" else isas
    run(benchmark, "isa", {isa: partial(_native.set_max_isa, isa) for isa in isas}, shape, sparsity, effort)


class Autocast(nn.Module):
    """A layer under autocast to bfloat16."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x)


def test_bfloat16(benchmark, shape, sparsity, effort):
    layer, x = sparse_layer(shape, sparsity), shape.input()
    x_half = x.detach().bfloat16().requires_grad_()
    steps = {
        "dense bfloat16": module_step(Autocast(layer.to_dense()), x_half),
        "sparse float32": module_step(layer, x),
        "sparse bfloat16": module_step(Autocast(layer), x_half),
    }
    fields = timed(effort.compare(steps), {name: name for name in steps}, "sparse bfloat16", "sparse float32")
    row = Row("bfloat16", shape.group, str(shape), sparsity, nnz=layer.nnz, load=os.getloadavg()[0], **fields)
    record(benchmark, row, steps["sparse bfloat16"])
