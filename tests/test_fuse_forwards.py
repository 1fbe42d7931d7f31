"""Code in a forward that a trace of it would not repeat: `fuse` leaves it as it is."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fuse_cases import Base, X, assert_alike, pair
from sparseprop import plan_fusion


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
