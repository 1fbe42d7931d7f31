"""Whole training steps, as bench_step.py times them: same losses, no more memory, compiled too."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseprop

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import bench_step
from step_models import MODELS, Net, prune


class Small(nn.Module):
    """Convolution, batch norm, residual addition, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        return self.fc(torch.relu(self.bn2(self.conv(x)) + x).mean((2, 3)))


SMALL = Net(
    lambda small: Small(),
    lambda batch, small: torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    4,
    {0.9: 2.0},
    10,
    ("stem",),
)


def test_twenty_steps_agree_with_the_masked_dense_model():
    found = bench_step.agreement(SMALL, 0.9)
    assert found["largest difference"] < 1e-3
    assert found["loss after 20 steps"].keys() == {"masked dense", "sparse", "dense again"}


def test_one_row_of_the_bench_and_its_table():
    options = Namespace(short=True, cpu_time=True, compile=False)
    row = bench_step.bench("small", SMALL, 0.9, options)
    assert row["batch"] == 1
    assert set(row["step"]["ms"]) == {
        f"{form} {layout}"
        for form in ("dense", "sparse", "fused")
        for layout in ("contiguous", "channels_last")
    }
    assert row["memory"]["ratio"] < row["memory"]["ratio with indices"]
    lines = bench_step.table([row]).splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_the_peak_of_a_step_is_no_higher_than_dense():
    masks = prune(dense := Small(), SMALL, 0.9)
    sparse = bench_step.swapped(dense, masks)
    runs = [bench_step.Run(model, SMALL.example(16, False), 10, "contiguous") for model in (dense, sparse)]
    for run in runs:
        run.step()
    peaks = [bench_step.peak_bytes(run) for run in runs]
    assert 0 < peaks[1] <= peaks[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_layers_of_each_network_exist(name):
    net = MODELS[name]
    with torch.device("meta"):
        layers = dict(net.make(True).named_modules())
    assert all(isinstance(layers[layer], nn.Linear | nn.Conv2d) for layer in net.dense)


def test_a_compiled_step_trains_like_an_eager_one():
    torch.manual_seed(0)
    masks = prune(dense := Small(), SMALL, 0.8)
    sparse = bench_step.swapped(dense, masks)
    x = SMALL.example(4, False)
    losses = []
    for backend in (None, "aot_eager"):  # inductor needs a C++ compiler at run time
        run = bench_step.Run(sparse, x, 10, "contiguous")
        if backend:
            run.call = torch.compile(run.model, backend=backend, fullgraph=True)
        losses.append([run.step() for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_frozen_batch_norm_and_eval_mode():
    masks = prune(dense := Small(), SMALL, 0.8)
    sparse = bench_step.swapped(dense, masks)
    x = SMALL.example(4, False)
    for model in (dense, sparse):
        model.train()
        for bn in (model.bn1, model.bn2):
            bn.eval().requires_grad_(False)
        model(x).sum().backward()
    torch.testing.assert_close(sparse.conv.weight_values.grad, dense.conv.weight.grad[masks["conv"]])
    torch.testing.assert_close(sparse.eval()(x), dense.eval()(x))
    assert sparseprop.to_dense(sparse).conv.weight.equal(dense.conv.weight)
