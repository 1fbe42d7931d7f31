"""Modules whose own code adds to a batch norm: rewritten where that is safe, left alone where it is not."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from fuse_cases import Block, network
from sparseprop import fuse, plan_fusion, unfuse


class Functional(nn.Module):
    """Functions instead of modules, dropout that follows the mode, and a residual that is itself a match."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        y = functional.relu(self.bn1(x))
        z = functional.dropout(gain * y, 1.0, self.training)
        return torch.add(y, self.bn2(z)).relu()


class WritesBetween(Functional):
    """The norm's input changes before the addition."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = self.bn2(y)
        y.mul_(3)
        return functional.relu(z + y)


class Twice(Functional):
    """One norm called twice: its running statistics see the inputs in this order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.bn1(x)
        second = self.bn1(2 * x + 1)
        return functional.relu(first + x) + second


class Scaled(Functional):
    """An addition that is more than one, and one of a number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(torch.add(self.bn1(x), x, alpha=2)) + functional.relu(self.bn2(x) + 1)


def test_functions_are_taken_along_in_either_mode():
    model = Functional()
    assert [(f.relu, f.adds) for f in plan_fusion(model)] == [("relu()", False), ("relu()", True)]
    fused = fuse(model, inplace=False)
    x = torch.randn(5, 4)
    for mode in (True, False):
        for gain in (1.0, 0.5):
            torch.testing.assert_close(fused.train(mode)(x, gain=gain), model.train(mode)(x, gain=gain))
    assert isinstance(fused, Functional)
    assert type(unfuse(fused)) is Functional


class Optional(Functional):
    """Decides by what it is given, which a traced value hides."""

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        if shortcut is None:
            shortcut = x
        return functional.relu(self.bn1(x) + shortcut)


class Required(Functional):
    """The same of an argument without a default."""

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None) -> torch.Tensor:
        if shortcut is None:
            shortcut = x
        return functional.relu(self.bn1(x) + shortcut)


class AsksForClass(Functional):
    """Decides by the class of what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            x = 2 * x
        return functional.relu(self.bn1(x) + x)


@pytest.mark.parametrize("kind", [Optional, Required])
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy])
def test_arguments_that_may_be_none_are_seen(kind, copied):
    model, x, other = kind(), torch.randn(5, 4), torch.randn(5, 4)
    fused = copied(fuse(model, inplace=False))
    torch.testing.assert_close(fused(x, None), model(x, None))
    torch.testing.assert_close(fused(x, other), model(x, other))
    torch.testing.assert_close(fused(x, shortcut=other), model(x, shortcut=other))
    if kind is Optional:
        assert next((f.relu, f.adds) for f in plan_fusion(model)) == ("relu()", True)
        torch.testing.assert_close(fused(x), model(x))


def test_code_that_asks_for_classes_is_left_as_it_is():
    model, x = AsksForClass(), torch.randn(5, 4)
    assert [fusion.relu for fusion in plan_fusion(model)] == [None, None]
    torch.testing.assert_close(fuse(model, inplace=False)(x), model(x))


class Remembers(Functional):
    """Keeps what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = functional.relu(self.bn1(x) + x)
        self.seen.append(self.last)
        return self.last


class Drops(Functional):
    """Skips its work now and then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if random.random() < 0.5:
            return x
        return functional.relu(self.bn1(x) + x)


class Counts(Functional):
    """Counts its calls in a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return super().forward(x)


def test_what_a_forward_does_to_its_buffers_is_done_once_a_call():
    model, x = Counts(), torch.randn(3, 4)
    assert any(fusion.relu for fusion in plan_fusion(model))
    fused = fuse(model, inplace=False)
    assert model.calls == fused.calls == 0
    torch.testing.assert_close(fused(x), model(x))
    assert model.calls == fused.calls == 1


def test_forwards_that_do_more_than_compute_are_left_as_they_are():
    model = fuse(Remembers())
    assert (model.seen, hasattr(model, "last")) == ([], False)
    out = model(torch.randn(5, 4))
    assert out is model.last
    assert len(model.seen) == 1
    random.seed(1)
    before = random.getstate()
    model, x = fuse(Drops()), torch.randn(5, 4)
    assert random.getstate() == before
    assert {model(x) is x for _ in range(50)} == {True, False}


@pytest.mark.parametrize("kind", [WritesBetween, Twice, Scaled])
def test_other_code_is_left_as_it_is(kind):
    model = kind()
    assert not any(fusion.adds for fusion in plan_fusion(model))
    x = torch.randn(5, 4)
    fused = fuse(model, inplace=False)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused.state_dict(), model.state_dict())


def test_a_hook_on_the_relu_behind_an_addition_prevents_it():
    block, seen = Block(), []
    block.relu.register_forward_hook(lambda *_: seen.append(1))
    assert not any(fusion.adds for fusion in plan_fusion(block))
    fuse(block)(torch.randn(2, 8, 4, 4))
    assert len(seen) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_fused_blocks_are_fused_and_independent(copied):
    fused = fuse(network())
    twin = copied(fused)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    assert torch.equal(twin(x), fused(x))
    with torch.no_grad():
        twin[0].bn3.weight.zero_()
    assert not torch.equal(twin(x), fused(x))
