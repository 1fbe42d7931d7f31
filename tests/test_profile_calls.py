"""Layers that a step calls several times, and models and losses that are not the usual ones."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseprop
from profile_cases import training
from sparseprop import SparsePropError
from sparseprop.nn import SparseLinear
from sparseprop.profiling import split
from sparseprop.profiling.run import _shares
from sparseprop.profiling.split import Shares, together
from sparseprop.profiling.trace import traced_step
from sparseprop.timing import Comparison


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = self.fc(x).relu()
        return x


def even_timer(steps):
    for step in steps.values():
        step()
    return Comparison({name: (2e-3 if name == "both" else 1e-3,) for name in steps})


def test_all_calls_of_a_layer_count():
    model = Looping()
    _, calls = traced_step(training(model, torch.randn(2, 8)))
    assert {call.input.requires_grad: count for call, count in calls["fc"].items()} == {False: 1, True: 3}
    assert all(call.grad is not None for call in calls["fc"])
    found = _shares(model, calls, even_timer)["fc"]
    # milliseconds: 1 of the first call and 2 of each other, half of which are for the input
    assert (found.grad_input, found.grad_weight) == pytest.approx((3 / 7, 4 / 7))


def test_calls_without_a_backward_pass_leave_the_shares_of_the_others():
    both = Shares(0.5, 0.2, 0.3, 0.5, forward_ms=1.0, backward_ms=2.0)
    found = together([(both, 2), (Shares(0.1, forward_ms=3.0), 1)])
    assert found.forward_layout == pytest.approx((2 * 0.5 + 3 * 0.1) / 5)
    assert (found.backward_layout, found.grad_input, found.grad_weight) == pytest.approx((0.2, 0.3, 0.5))
    assert together([(Shares(forward_ms=1.0), 3)]).grad_input == 1.0


@pytest.mark.parametrize(("threads", "wanted"), [(1, 1), (4, 51)])
def test_small_layers_are_not_timed_against_themselves(monkeypatch, threads, wanted):
    layer = SparseLinear.random(64, 64, density=0.125)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    _, calls = traced_step(training(nn.Sequential(layer), torch.randn(4, 64)))
    assert split._thin(layer, next(iter(calls["0"]))).nnz == wanted


def test_a_partly_swapped_model_may_still_be_pruned():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.5)
    swapped = sparseprop.swap_modules(model, min_sparsity=0.1, filter_fn=lambda _, name: name == "0")
    found = sparseprop.profile(swapped, torch.randn(4, 8), steps=1)
    assert {layer.name for layer in found.layers if layer.density is not None} == {"0"}
    assert prune.is_pruned(swapped[2])


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = SparseLinear.random(4, 4, density=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).argmax(-1)


def sparse_layer() -> nn.Module:
    return SparseLinear.random(4, 4, density=0.5)


REFUSED = {
    "text for steps": (sparse_layer, {"steps": "3"}, "steps >= 1, got '3'"),
    "half a step": (sparse_layer, {"steps": 1.5}, r"steps >= 1, got 1\.5"),
    "integer output": (Counting, {}, r"cannot make a loss of a torch\.int64 tensor; pass loss="),
    "many losses": (
        sparse_layer,
        {"loss": lambda y: y.sum(1)},
        r"one real number, got a torch\.float32 tensor of shape \(2,\)",
    ),
    "a number": (sparse_layer, {"loss": lambda y: 1.0}, r"one real number, got a float"),
    "complex loss": (sparse_layer, {"loss": lambda y: (1j * y).sum()}, "one real number, got a torch.compl"),
}


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=list(REFUSED))
def test_bad_steps_and_losses_are_refused_in_words(make, options, message):
    with pytest.raises(SparsePropError, match=message):
        sparseprop.profile(make(), torch.ones(2, 4), **options)
