"""Code that a traced forward would not repeat, or that runs around merged modules: `fuse` leaves it alone."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseprop
from sparseprop import fuse, plan_fusion
from sparseprop.nn import SparseConv2d

X = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Base(nn.Module):
    """A residual block of convolutions, a batch norm and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.bn, self.relu = nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.c1(x)) + x)


def pair(kind, *, swap=False) -> tuple[nn.Module, nn.Module]:
    """A model, half of its weights pruned and swapped if asked for; and a fused copy."""
    torch.manual_seed(0)
    model = kind().double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.weight.data *= torch.rand_like(module.weight) > 0.5
    if swap:
        model = sparseprop.swap_modules(model, min_sparsity=0.3)
    return model, fuse(model, inplace=False)


def results(model: nn.Module, *args: torch.Tensor) -> list[torch.Tensor | None]:
    """Output and, if there are any, the gradients of input and parameters."""
    x = X.clone().requires_grad_()
    out = model(x, *args)
    if not out.requires_grad:
        return [out]
    wanted = [x, *model.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)]


def assert_alike(plain: nn.Module, fused: nn.Module, *args: torch.Tensor) -> None:
    """Same results and buffers, in training, in evaluation and without gradients."""
    for training, recorded in ((True, True), (False, True), (False, False)):
        plain.train(training)
        fused.train(training)
        with torch.set_grad_enabled(recorded):
            for one, other in zip(results(fused, *args), results(plain, *args), strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(list(fused.buffers()), list(plain.buffers()))


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


def negate(module, *_):
    return -_[-1]


WHERE = {"norm": "bn", "activation": "relu", "first layer": "c1", "second layer": "c2", "later norm": "bn2"}


class TwoNorms(Base):
    def __init__(self):
        super().__init__()
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.relu(self.bn2(self.c2(F.relu(self.bn(self.c1(x))))) + x)


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "class"])
@pytest.mark.parametrize("swap", [False, True])
def test_what_is_put_around_a_merged_module_later_counts(where, how, swap):
    plain, fused = pair(TwoNorms, swap=swap)
    for model in (plain, fused):
        part = model.get_submodule(where)
        if how == "hook":
            part.register_forward_hook(negate)
        elif how == "pre-hook":
            part.register_forward_pre_hook(lambda _, args: (-args[0],))
        elif how == "forward":
            part.forward = (lambda own: lambda x: -own(x))(part.forward)
        else:
            kind = type(part)
            part.__class__ = type(
                "Other", (kind,), {"forward": lambda self, x: -super(type(self), self).forward(x)}
            )
    assert_alike(plain, fused)
    if how != "class":
        fuse(fused)  # again
        assert_alike(plain, fused)


def test_hooks_on_every_module_see_what_each_computes():
    plain, fused = pair(TwoNorms)
    for model in (plain, fused):
        model.eval().seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, seen=model.seen: seen.append((type(module).__name__, out.min()))
        )
        model(X)
        handle.remove()
    assert len(plain.seen) == len(fused.seen)
    for (_, one), (_, other) in zip(plain.seen, fused.seen, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sparse_layer_of_a_derived_class_runs_its_own_forward():
    class Adapted(SparseConv2d):
        def forward(self, x):
            return -super().forward(x)

    plain, _ = pair(TwoNorms, swap=True)
    plain.c1.__class__ = Adapted
    assert_alike(plain, fuse(plain, inplace=False))


def test_parts_of_a_fused_model_compute_what_they_did():
    def sequence():
        return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))

    class Negative(nn.Module):
        def forward(self, x):
            return -x

    plain, fused = pair(sequence)
    assert_alike(plain[:2], fused[:2])
    for model in (plain, fused):
        model.insert(2, Negative())
    assert_alike(plain, fused)
    for model in (plain, fused):
        del model[2:4]
    assert_alike(plain, fused)


class Embeds(Base):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def embed(self, x):
        return self.bn(self.c1(x))

    def forward(self, x):
        return self.relu(self.body(self.relu(self.embed(x))))


def test_other_methods_and_containers_of_a_fused_model_compute_what_they_did():
    plain, fused = pair(Embeds)
    torch.testing.assert_close(fused.embed(X), plain.embed(X))
    assert_alike(plain, fused)
    for model in (plain, fused):
        model.body.register_forward_hook(negate)
    assert_alike(plain, fused)


def test_a_models_own_way_to_be_copied_is_kept():
    class Locked(Base):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

        def __getstate__(self):
            return {key: value for key, value in vars(self).items() if key != "lock"}

        def __setstate__(self, state):
            super().__setstate__(state)
            self.lock = threading.Lock()

    _, model = pair(Locked)
    assert_alike(model, copy.deepcopy(model))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 0, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_is_not_finite_reaches_all_of_its_channel(value, place, memory_format):
    x = torch.randn(4, 2, 5, 5)
    x[place] = value
    norm = nn.BatchNorm2d(2)
    fused = fuse(norm, inplace=False)
    x = x.contiguous(memory_format=memory_format)
    assert torch.equal(fused(x).isnan(), norm(x).isnan())
    assert torch.equal(fused.running_var.isnan(), norm.running_var.isnan())
    assert torch.equal(fused.running_mean.isfinite(), norm.running_mean.isfinite())


@pytest.mark.parametrize("change", ["strides", "padding mode"])
def test_inverted_blocks_notice_how_their_convolution_lies(change):
    def block():
        layers = [nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        return nn.Sequential(nn.Sequential(*layers, nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)))

    plain, fused = pair(block, swap=True)
    with torch.no_grad():
        fused.eval()(X)
        for model in (plain.eval(), fused):
            conv = model[0][3]
            if change == "strides":
                conv.weight.data = conv.weight.data.transpose(2, 3)
            else:
                conv.padding_mode = "reflect"
        torch.testing.assert_close(fused(X), plain(X))
