"""Questions in a forward that a trace cannot answer: code asks tensors, arguments and children themselves."""

import collections
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fuse_cases import Base, X, assert_alike, pair
from sparseprop.swap import graphs


def model_of(forward, prepare=lambda model: None) -> type[nn.Module]:
    """A class of models with this forward, prepared by this function."""

    def start(self):
        Base.__init__(self)
        prepare(self)

    return type("Model", (Base,), {"__init__": start, "forward": forward})


def asks_in_torch(self, x):
    x = x * 3 if torch.is_tensor(x) else x
    return self.relu(self.bn(x)) - x


def asks_for_attributes(self, x):
    x = x * 3 if hasattr(x, "quaternion") else x
    return self.relu(self.bn(x)) - x


def catches(self, x):
    try:
        x = x * len(x)
    except (TypeError, RuntimeError):
        x = x * 7
    return self.relu(self.bn(x)) - x


def decides_by_numbers(self, x):
    try:
        x = x * 3 if x.sum() > 0 else x
    except Exception:
        x = x * 7
    return self.relu(self.bn(x)) - x


def writes_by_operator(self, x):
    x = x * 1
    y = self.bn(self.c1(x))
    torch.ops.aten.relu_.default(x)
    return F.relu(y + x)


def replaces_data(self, x):
    y = x * 1
    y.data = x.detach() * 3
    return self.relu(self.bn(y)) - x


@pytest.mark.parametrize(
    "forward",
    [asks_in_torch, asks_for_attributes, catches, decides_by_numbers, writes_by_operator, replaces_data],
)
def test_questions_that_a_trace_cannot_answer_are_asked_of_tensors(forward):
    plain, fused = (model.eval() for model in pair(model_of(forward)))
    with torch.no_grad():
        torch.testing.assert_close(fused(X), plain(X))


def options(self, x, mode="a", flag=False):
    y = self.relu(self.bn(x)) - x
    y = y * 2 if mode in {"b"} else y
    y = y * {"a": 1, "b": 2}.get(mode, 5)
    return y * 3 if flag is True else y


def states(self, x, state):
    y = self.relu(self.bn(x))
    return y if state[0] is None else y + state[0]


@pytest.mark.parametrize(
    ("forward", "args"),
    [
        (options, ()),
        (options, ("b",)),
        (options, ("c", True)),
        (states, ((None, None),)),
        (states, ((X, None),)),
    ],
)
def test_arguments_besides_tensors_count_as_they_are(forward, args):
    assert_alike(*pair(model_of(forward)), *args)


def test_what_a_child_returns_besides_tensors_counts():
    class Two(nn.Module):
        def forward(self, x):
            return x, None

    def forward(self, x):
        y, weights = self.two(x)
        y = self.relu(self.bn(y))
        return y if weights is None else y + weights

    assert_alike(*pair(model_of(forward, lambda model: setattr(model, "two", Two()))))


def test_a_child_is_called_as_it_wants_to_be():
    class Doubled(nn.Module):
        def __call__(self, x):
            return super().__call__(x * 2)

        def forward(self, x):
            return x

    def forward(self, x):
        return self.act(self.relu(self.bn(x)))

    assert_alike(*pair(model_of(forward, lambda model: setattr(model, "act", Doubled()))))


def draws(self, x):
    return x if self.rng.random() < 0.3 else self.relu(self.bn(x))


def counts(self, x):
    self.counter["calls"] += 1
    self.nested["a"]["calls"] += 1
    return self.relu(self.bn(x)) * self.counter["calls"]


def prepare(model):
    model.rng = np.random.default_rng(0)
    model.counter, model.nested = collections.Counter(), {"a": {"calls": 0}}


@pytest.mark.parametrize("forward", [draws, counts])
def test_own_generators_and_counters_go_on(forward):
    plain, fused = pair(model_of(forward, prepare))
    assert plain.nested == {"a": {"calls": 0}}
    for _ in range(8):
        torch.testing.assert_close(fused(X), plain(X))
    assert plain.counter == fused.counter


def test_a_norm_shared_with_a_child_keeps_the_order_of_its_calls():
    def forward(self, x):
        y, z = self.bn(x), self.branch(x)
        return self.relu(y) + z

    kind = model_of(forward, lambda model: setattr(model, "branch", nn.Sequential(model.c2, model.bn)))
    assert_alike(*pair(kind))


def test_traces_grow_with_the_depth_and_no_faster(monkeypatch):
    class Nested(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.inner = Nested(depth - 1) if depth else nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.inner(x)

    def forward(self, x):
        y, z = self.bn(x), self.nested(x)
        return self.relu(y) + z

    traces = mock.Mock(wraps=graphs._traced)
    monkeypatch.setattr(graphs, "_traced", traces)
    counts = []
    for depth in (4, 8):
        traces.reset_mock()
        assert_alike(*pair(model_of(forward, lambda model, d=depth: setattr(model, "nested", Nested(d)))))
        counts.append(traces.call_count)
    assert counts[1] < 2 * counts[0]
