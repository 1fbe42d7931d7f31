"""What a module holds is compared and put back, whatever kind of container or generator it is in."""

import collections
import random

import numpy as np
import pytest
import torch
from torch import nn

from sparseprop.swap.unchanged import attributes, put_back, same


def deep(value):
    return {"a": [{"b": [value]}]}


# what a module holds, and how it is changed
HELD = {
    "counter": (lambda: collections.Counter(a=-3), lambda held: held.update(a=1)),
    "set": (lambda: {1, 2}, lambda held: held.add(3)),
    "deque": (lambda: collections.deque([1], maxlen=2), lambda held: held.append(2)),
    "ordered": (lambda: collections.OrderedDict(a=1, b=2), lambda held: held.move_to_end("a")),
    "nested": (lambda: {"a": {"b": 1}}, lambda held: held["a"].update(b=2)),
    "python": (lambda: random.Random(0), lambda held: held.random()),
    "numpy": (lambda: np.random.default_rng(0), lambda held: held.random()),
    "torch": (lambda: torch.Generator().manual_seed(0), lambda held: torch.rand(1, generator=held)),
}


@pytest.mark.parametrize(("make", "change"), HELD.values(), ids=HELD)
def test_changes_are_seen_and_undone(make, change):
    module = nn.Module()
    module.held = make()
    before = attributes(module)
    assert same(before, attributes(module))
    change(module.held)
    assert not same(before, attributes(module))
    put_back(module, before)
    assert same(before, attributes(module))
    if isinstance(module.held, dict):
        assert list(module.held.items()) == list(make().items())


def test_what_lies_too_deep_and_keys_that_are_tensors_are_left_alone():
    module = nn.Module()
    module.deep, module.by_tensor = deep(random.Random(0)), {torch.ones(2): 1}
    before = attributes(module)
    assert same(before, attributes(module))
    module.new = 1
    put_back(module, before)
    assert not hasattr(module, "new")
