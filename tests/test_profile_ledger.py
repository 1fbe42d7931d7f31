"""Whose time is whose in a watched step: modules, backward nodes, recomputation. No real times."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparseprop
from profile_cases import images, network, training
from sparseprop.profiling.ledger import Ledger
from sparseprop.profiling.trace import traced_step


def test_a_ledger_charges_the_innermost_and_loses_nothing():
    ledger = Ledger(clock=iter(range(100)).__next__)
    ledger.enter(("model", "forward"))
    for _ in range(3):
        ledger.enter(("layer", "forward"))
        ledger.leave()
    assert ledger.current == ("model", "forward")
    ledger.leave()
    assert ledger.current is None
    assert dict(ledger.seconds) == {("model", "forward"): 4, ("layer", "forward"): 3}


def test_every_module_and_every_backward_node_is_charged():
    model = network()
    seconds, calls = traced_step(training(model, images()))
    phases = {name: {phase for who, phase in seconds if who == name} for name, _ in seconds}
    assert phases[""] == {"forward"}
    assert phases["1"] == {"forward", "backward"}  # the residual addition
    assert phases["0"] == phases["1.conv"] == phases["1.bn"] == {"forward", "backward", "accumulate"}
    assert phases["1.relu"] == {"forward", "backward"}
    assert phases["(loss)"] == {"forward", "backward"}
    assert phases["(optimizer)"] == {"forward"}
    assert phases["(gradient sums)"] == {"backward"}
    assert set(calls) == {"0", "1.conv", "3"}
    (first,), (inner,) = calls["0"], calls["1.conv"]  # called once each
    assert inner.grad.shape == inner.input.shape
    assert not first.input.requires_grad  # nobody needs the gradient of the images
    assert inner.input.requires_grad


def test_a_watched_step_trains_as_any_other():
    x, plain = images(), network()
    watched = sparseprop.swap_modules(plain, min_sparsity=0.5, inplace=False)
    plain = sparseprop.swap_modules(plain, min_sparsity=0.5)
    training(plain, x).step()
    traced_step(training(watched, x))
    for one, other in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    hooks = (m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
    assert not any(hooks)


def test_frozen_layers_cost_forward_only():
    model = network()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    seconds, calls = traced_step(training(model, images()))
    assert {name for name, phase in seconds if phase == "backward"} == {"3", "(loss)", "(gradient sums)"}
    assert [call.grad for call in calls["1.conv"]] == [None]


def test_recomputed_layers_are_charged_once_more_in_backward():
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    seconds, _ = traced_step(training(Recomputing(), torch.ones(2, 4)))
    assert ("inner", "forward") in seconds
    assert ("inner", "accumulate") in seconds
