"""Code in a forward that a trace of it would not repeat: `fuse` leaves it as it is."""

import collections
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fuse_cases import Base, X, assert_alike, pair
from sparseprop import plan_fusion
from sparseprop.swap import graphs


class WithoutGradients(Base):
    def forward(self, x):
        with torch.no_grad():
            gate = self.c2(x)
        return F.relu(self.bn(self.c1(x)) + gate)


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        return F.relu(self.bn(self.c1(x)) + x)


class InLowerPrecision(Base):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.c2(x)
        return F.relu(self.bn(self.c1(x)) + y)


class AsksForGradients(Base):
    def forward(self, x):
        z = self.c2(x) if torch.is_grad_enabled() else self.c2(x) * 5
        return F.relu(self.bn(self.c1(x)) + z)


class AsksForAChildsMode(Base):
    def forward(self, x):
        z = self.c2(x) if self.bn.training else self.c2(x) * 5
        return F.relu(self.bn(self.c1(x)) + z)


class Scaled(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 3


class OwnActivation(Base):
    def __init__(self):
        super().__init__()
        self.relu = Scaled()


class AddsToAnother(Base):
    def forward(self, x):
        skip = self.c2(x)
        out = skip
        out += self.bn(self.c1(x))
        return F.relu(out) + skip


class WritesToItsInput(nn.Module):
    def forward(self, x):
        return F.relu(x, inplace=True)


class ReadsWhatIsOverwritten(Base):
    def __init__(self):
        super().__init__()
        self.act = WritesToItsInput()

    def forward(self, x):
        x = x * 1
        y = self.bn(self.c1(x))
        return F.relu(y + self.act(x))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        Base, WithoutGradients, Decorated, AsksForGradients, AsksForAChildsMode, OwnActivation, AddsToAnother
    ],
)  # fmt: skip
def test_whatever_a_forward_does_its_results_stay(kind, swap):
    assert_alike(*pair(kind, swap=swap))


def test_what_a_childs_code_overwrites_is_read_before():
    plain, fused = (model.eval() for model in pair(ReadsWhatIsOverwritten, swap=True))
    with torch.no_grad():
        torch.testing.assert_close(fused(X), plain(X))


def test_autocast_within_a_forward_stays():
    plain, fused = (model.float() for model in pair(InLowerPrecision))
    torch.testing.assert_close(fused(X.float()), plain(X.float()), rtol=1e-5, atol=1e-5)


class Stochastic(Base):
    def forward(self, x):
        y = self.bn(self.c1(x))
        return x * 2 if np.random.rand() < 0.3 else F.relu(y + x)  # noqa: NPY002


def test_numpys_random_numbers_are_drawn_at_every_call():
    random_state = np.random.get_state()[1].copy()  # noqa: NPY002
    plain, fused = pair(Stochastic)
    assert np.array_equal(np.random.get_state()[1], random_state)  # noqa: NPY002
    for model in (plain, fused):
        np.random.seed(1)  # noqa: NPY002
        model.outputs = torch.cat([model(X) for _ in range(6)])
    torch.testing.assert_close(plain.outputs, fused.outputs)


LOG: list[torch.Tensor] = []


class Logs(Base):
    def forward(self, x):
        y = self.c2(x)
        LOG.append(y)
        return F.relu(self.bn(self.c1(x)) + y)


def test_a_forward_that_keeps_values_elsewhere_goes_on_keeping_them():
    _, fused = pair(Logs)
    assert [fusion.reason for fusion in plan_fusion(pair(Logs)[0])] == ["its forward keeps what it computes"]
    LOG.clear()
    fused(X)
    assert [type(kept) for kept in LOG] == [torch.Tensor]
    LOG.clear()


@pytest.mark.parametrize("low", [False, True])
def test_sums_have_the_type_that_torch_gives_them(low):
    class Adds(Base):
        def forward(self, x, other):
            y = self.bn(self.c1(x))
            y += other
            return F.relu(y)

    plain, fused = pair(Adds)
    plain, fused, x = plain.float(), fused.float(), X.float()
    other = x if low else X
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        assert fused(x, other).dtype is plain(x, other).dtype
    with pytest.raises(RuntimeError, match="shape"):
        fused(x[:1], x)


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
