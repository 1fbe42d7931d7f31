"""Planning with an example leaves the model and all random generators as they were, or refuses."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import sparseprop
from sparseprop import SparsePropError
from sparseprop.nn import MaskedLinear, MaskRule
from sparseprop.swap.measure import capture
from sparseprop.swap.planner import Planner, plan
from swap_cases import FakeTimer, assert_same_state, sparsify


def planned(model: nn.Module, x: torch.Tensor) -> sparseprop.SwapPlan:
    return Planner(timer=FakeTimer(dense=1.0, sparse=0.5)).plan(model, x)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_renormalize_keep_their_weights(kind, inference):
    embedding = kind(10, 8, max_norm=0.1)
    model = nn.Sequential(embedding, sparsify(nn.Linear(8, 8), 0.5))
    before = embedding.weight.detach().clone()
    with torch.inference_mode(inference):
        planned(model, torch.arange(6).reshape(2, 3))
    assert torch.equal(embedding.weight, before)


class Clipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(8), sparsify(nn.Linear(8, 8), 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.fc.weight.clamp_(-0.1, 0.1)
        return self.fc(self.norm(x))


def test_other_parameters_written_by_a_forward_are_named():
    model = Clipping()
    with pytest.raises(SparsePropError, match=r"writes to parameter 'fc\.weight', which cannot be undone"):
        plan(model, torch.randn(4, 8))
    assert torch.equal(model.norm.running_mean, torch.zeros(8))
    plan(model)


class Graph(nn.Module):
    """Its buffers are of every kind, and its forward changes them in every way."""

    def __init__(self, adjacency: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.register_buffer("cache", None)
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("center", torch.zeros(8))
        self.register_buffer("ones", torch.ones(1).expand(8))  # refuses writes
        self.ready = False
        self.norm, self.fc = nn.BatchNorm1d(8), sparsify(nn.Linear(8, 8), 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(self.norm(torch.sparse.mm(self.adjacency, x)))
        self.adjacency.mul_(0.5)
        self.steps = self.steps + 1
        self.center.data.add_(1.0)
        if not self.ready:
            self.cache, self.ready = x.detach(), True
        return x - self.cache


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("form", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_buffers_of_every_kind_are_put_back(form):
    model = Graph(form(torch.eye(4)))
    steps, keys = model.steps, list(model.state_dict())
    wanted = {key: value.clone() for key, value in model.norm.state_dict().items()}
    planned(model, torch.randn(4, 8))
    assert torch.equal(model.adjacency.to_dense(), torch.eye(4))
    assert model.cache is None
    assert not model.ready
    assert list(model.state_dict()) == keys
    assert model.steps is steps
    assert torch.equal(model.center, torch.zeros(8))
    assert_same_state(model.norm.state_dict(), wanted)
    model(torch.randn(4, 8))


def test_a_masked_layer_counts_the_update_that_a_plan_saw():
    layer = MaskedLinear.from_dense(nn.Linear(8, 8), pattern=MaskRule("2:4", every=5))
    layer(torch.ones(2, 8))
    with torch.no_grad():
        layer.weight.mul_(2.0)
    capture(layer, torch.ones(2, 8), [])
    assert layer.mask_age == 0
    layer(torch.ones(2, 8))
    assert layer.mask_age == 1


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = sparsify(nn.Linear(8, 8), 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x * (random.random() + np.random.rand() + torch.rand(1)))  # noqa: NPY002


@pytest.mark.parametrize("run", ["plan", "profile"])
def test_random_generators_go_on_as_if_nobody_had_drawn(run):
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    model = Drawing()
    swaps = plan(model, min_sparsity=0.5)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    wanted = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    if run == "plan":
        planned(model, torch.ones(2, 8))
    else:
        sparseprop.profile(model, torch.ones(2, 8), plan=swaps, steps=1)
    assert draw() == wanted


LAZY = {
    "linear": (lambda: nn.LazyLinear(8), "layer '1' is a LazyLinear without weights yet; run the model once"),
    "norm": (lambda: nn.LazyBatchNorm1d(affine=False), "layer '1' is a LazyBatchNorm1d without weights yet"),
}


@pytest.mark.parametrize(("make", "message"), LAZY.values(), ids=list(LAZY))
def test_lazy_layers_are_refused_before_anything_runs(make, message):
    model, x = nn.Sequential(nn.BatchNorm1d(8), make()), torch.randn(4, 8)
    for run in (plan, sparseprop.swap_modules):
        with pytest.raises(SparsePropError, match=message):
            run(model, x)
    assert type(model[1]) is type(make())
    assert torch.equal(model[0].running_mean, torch.zeros(8))
    model(x)
    planned(model, x)
