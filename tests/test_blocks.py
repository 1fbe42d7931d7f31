"""Inverted residual blocks called one after the other: looked through at once, run one by one."""

import copy
import pickle

import pytest
import torch
from torch import nn

from inverted_cases import CHANGES, CONVOLUTIONS, block, check, images
from sparseprop import fuse, unfuse
from sparseprop._native import ModuleWatch
from sparseprop.nn import SparseConv2d, blocks
from sparseprop.nn.blocks import MaybeInverted
from sparseprop.swap.blocks import calls_blocks


class Wrapped(nn.Module):
    """As torchvision writes its blocks."""

    def __init__(self, conv: nn.Module, adds: bool) -> None:
        super().__init__()
        self.conv = conv
        self.adds = adds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


def one(adds=False, nested=False):
    """A block of 6 channels."""
    layers = list(block(CONVOLUTIONS["3x3"]))
    layers[6] = SparseConv2d.random(20, 6, 1, density=0.3, bias=False, dtype=torch.float64)
    layers[7] = nn.BatchNorm2d(6).double()
    if nested:
        return Wrapped(
            nn.Sequential(nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:6]), *layers[6:]), adds
        )
    return Wrapped(nn.Sequential(*layers), adds)


def network(nested=False):
    return nn.Sequential(*(one(adds, nested) for adds in (False, True, True)), one(nested=not nested)).eval()


@pytest.fixture
def looked_through(monkeypatch):
    """The blocks that were looked through in Python."""
    found, usual = [], blocks._ready

    def counting(module, child, adds):
        found.append(module)
        return usual(module, child, adds)

    monkeypatch.setattr(blocks, "_ready", counting)
    return found


def test_blocks_fused_while_they_train_are_joined_too():
    model = network().train()
    fused, x = fuse(model, inplace=False), images((3, 8, 8))
    assert calls_blocks(fused) is not None
    assert type(fused) is not nn.Sequential
    for training in (True, False):
        torch.testing.assert_close(fused.train(training)(x), model.train(training)(x))


@pytest.mark.parametrize("nested", [False, True])
def test_blocks_are_looked_through_once_and_run_as_one_call_each(at_once, looked_through, nested):
    model = network(nested)
    fused = fuse(model, inplace=False)
    assert calls_blocks(fused) is not None
    for count in (1, 4, 1):
        check(model, fused, images((count, 8, 8)), rtol=1e-12, atol=1e-12)
    assert at_once == [True] * 12
    assert looked_through == list(fused)


# other_pattern is of another shape; with other_stride the second block could not add its input
COUNTED = [
    pytest.param(at, change, id=f"{at}-{name}")
    for at in (0, 2)
    for name, change in CHANGES.items()
    if name != "other_pattern" and (at, name) != (2, "other_stride")
]


@pytest.mark.parametrize(("at", "change"), COUNTED)
def test_what_changes_between_calls_counts(at_once, at, change):
    model = network()
    fused, x = fuse(model, inplace=False), images((3, 8, 8))
    check(model, fused, x)
    for each in (model, fused):
        torch.manual_seed(8)
        change(each[at].conv)
    check(copy.deepcopy(model), fused, x, rtol=1e-12, atol=1e-12)
    assert at_once[:4] == [True] * 4


OTHERS = {
    "child replaced": lambda model: model[1].conv.__setitem__(3, copy.deepcopy(model[0].conv[3])),
    "block replaced": lambda model: model.__setitem__(1, copy.deepcopy(model[0])),
    "block added": lambda model: model.insert(1, copy.deepcopy(model[0])),
    "block removed": lambda model: model.__delitem__(1),
    "activation replaced": lambda model: model[1].conv.__setitem__(5, nn.Identity()),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_other_children_count(change):
    model = network()
    fused, x = fuse(model, inplace=False), images((2, 8, 8))
    check(model, fused, x)
    check(model, fused, x)
    for each in (model, fused):
        change(each)
    check(model, fused, x, rtol=1e-12, atol=1e-12)


def test_hooks_wherever_they_are_are_called(at_once):
    model = network()
    fused, x, called = fuse(model, inplace=False), images((2, 8, 8)), []
    check(model, fused, x)
    hooked = {"0", "1", "1.conv", "1.conv.0", "1.conv.3", "1.conv.7", "2", "3", "3.conv.0.1"}
    for name in sorted(hooked):
        with fused.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name)):
            check(model, fused, x)
    assert called == sorted(hooked)


def test_gradients_training_and_other_layouts_go_the_usual_way(at_once):
    model = network()
    fused, x = fuse(model, inplace=False), images((2, 8, 8))
    torch.testing.assert_close(fused(x), model(x))
    for each in (model, fused):
        each.train()
    torch.testing.assert_close(fused(x), model(x))
    for each in (model, fused):
        each.eval()
    assert not at_once
    check(model, fused, x.to(memory_format=torch.channels_last))
    assert not any(at_once)


def test_copies_pickles_and_unfuse(at_once):
    model = network()
    fused, x = fuse(model, inplace=False), images((2, 8, 8))
    check(model, fused, x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        check(model, other, x)
        with torch.no_grad():
            other[1].conv[6].weight_values.zero_()
            model_too = copy.deepcopy(model)
            model_too[1].conv[6].weight_values.zero_()
        check(model_too, other, x)
    assert all(at_once)
    assert not any(isinstance(module, MaybeInverted) for module in unfuse(fused).modules())
    check(model, fused, x)


def test_attributes_may_lead_back_to_the_module(at_once):
    model = network()
    fused, x = fuse(model, inplace=False), images((2, 8, 8))
    for wrapped in fused:
        vars(wrapped)["parent"], wrapped.relations = fused, {"parent": fused}
        vars(wrapped.conv)["parent"] = wrapped
    for _ in range(2):
        check(model, fused, x)
    assert at_once == [True] * 8


def test_a_watch_sees_changes_and_nothing_else():
    model = one(adds=True).eval()
    watch = ModuleWatch(model)
    assert watch.holds(model)
    assert not watch.holds(copy.deepcopy(model))
    with torch.no_grad():
        model(images((2, 8, 8)))
        model.conv[0].weight_values.mul_(2)
    watch = ModuleWatch(model)  # layers keep what they have lowered
    with torch.no_grad():
        model(images((3, 8, 8)))
        model.conv[0].weight_values.mul_(2)
        model.conv[4].running_mean.add_(1)
    assert watch.holds(model)
    changes = [
        lambda: setattr(model, "adds", 1),
        lambda: setattr(model.conv[4], "eps", 0.25),
        lambda: model.conv[4].register_forward_hook(print),
        lambda: model.conv[0].weight_col_idx.add_(0),
        lambda: setattr(model.conv[3].weight, "data", model.conv[3].weight.data.clone()),
        lambda: setattr(model.conv[3].weight, "data", model.conv[3].weight.data[:3]),
        lambda: setattr(model.conv[3], "weight", nn.Parameter(model.conv[3].weight.data)),
        lambda: model.conv.append(nn.ReLU()),
        lambda: setattr(model.conv[-1], "__class__", nn.ReLU6),
        lambda: model.train(),
    ]
    for change in changes:
        watch = ModuleWatch(model)
        assert watch.holds(model)
        change()
        assert not watch.holds(model)
