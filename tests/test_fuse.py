"""Native batch norm in models: what is fused, what is not and why, and the way back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sparseprop
from checks import LAYOUTS
from fuse_cases import network
from sparseprop import SparsePropError, fuse, plan_fusion, unfuse
from sparseprop.nn.norm import BatchNorm2d


def test_the_plan_says_what_is_fused_and_why_not():
    plan = {fusion.name: fusion for fusion in plan_fusion(network())}
    assert {name: fusion.relu for name, fusion in plan.items()} == {
        "0.bn1": "0.relu", "0.bn2": "0.relu", "0.bn3": "0.relu", "1": "2",
        "3.bn1": "3.relu", "3.bn2": "3.relu", "3.bn3": "3.relu",
    }  # fmt: skip
    assert [name for name, fusion in plan.items() if fusion.adds] == ["0.bn3", "3.bn3"]


@pytest.mark.parametrize("training", [True, False])
def test_hooks_registered_later_see_and_change_the_norms_own_output(training):
    plain = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).train(training)
    fused, x, seen = fuse(plain, inplace=False), torch.randn(4, 2, 5, 5), []
    for model in (plain, fused):
        model[1].register_forward_hook(lambda _, inputs, out: seen.append(out.clone()))
        model[1].register_forward_hook(lambda _, inputs, out: out.sub_(0.5))
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(*seen)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(x)) if x.sum() > 0 else self.bn(x)


class Reused(Branching):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.relu(self.bn(x)))


class TwoUsers(Branching):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(x)
        return self.relu(y) + y


class OwnNorm(nn.BatchNorm1d):
    pass


def hooked() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    model[0].register_forward_hook(lambda *_: None)
    return model


UNFUSED = [
    (Branching, "cannot trace the model: TraceError", True),
    (TwoUsers, "no ReLU alone behind it", True),
    (hooked, "hooks between it and its ReLU", True),
    (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.SiLU()), "no ReLU alone behind it", True),
    (lambda: nn.Sequential(OwnNorm(4), nn.ReLU()), "OwnNorm is not torch's own batch norm", False),
]


@pytest.mark.parametrize(("make", "reason", "native"), UNFUSED)
def test_what_cannot_be_fused_is_left_with_a_reason(make, reason, native):
    model = make()
    (fusion,) = plan_fusion(model)
    assert (fusion.relu, fusion.native) == (None, native)
    assert reason in fusion.reason
    x = torch.randn(6, 4)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(fuse(model)(x), expected)


def test_each_call_of_a_norm_is_fused_with_what_follows_that_call():
    model, x = Reused().double(), torch.randn(6, 4, dtype=torch.float64)
    assert [fusion.relu for fusion in plan_fusion(model)] == ["relu"]
    fused = fuse(model, inplace=False)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused.state_dict(), model.state_dict())


@pytest.mark.parametrize("layout", ["plain", "channels_last", "batch_last"])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_a_fused_model_trains_like_its_origin(mode, layout):
    plain, fused = network(), fuse(network())
    for model in (plain, fused):
        model.train(mode != "eval")
        for norm in model.modules():
            if mode == "frozen" and isinstance(norm, nn.BatchNorm2d):
                norm.eval().requires_grad_(False)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1, 0.9) for m in (plain, fused)
    ]
    for step in range(3):
        make = torch.Generator().manual_seed(step)
        x = LAYOUTS[layout](torch.randn(4, 8, 6, 6, dtype=torch.float64, generator=make))
        outputs = []
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(x))
            outputs[-1].square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(*outputs)
    for one, other in zip(plain.state_dict().values(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


def test_fusing_changes_classes_only_and_unfusing_undoes_it():
    model = network()
    model[1].register_forward_hook(lambda *_: None)
    parameters, kinds = list(model.parameters()), [type(m) for m in model.modules()]
    assert fuse(model) is model
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(network().state_dict())
    assert isinstance(model[1], nn.BatchNorm2d)
    assert len(model[1]._forward_hooks) == 1
    again = pickle.loads(pickle.dumps(unfuse(fuse(copy.deepcopy(network())), inplace=False)))
    assert [type(m) for m in again.modules()] == kinds
    fuse(model)  # twice is once
    assert [type(m) for m in unfuse(model).modules()] == kinds
    assert vars(model[3].bn1).keys() == vars(network()[3].bn1).keys()


def test_to_dense_gives_torchs_modules_back():
    dense = network()
    swapped = fuse(sparseprop.swap_modules(dense, min_sparsity=0.0, inplace=False))
    assert type(swapped) is not type(dense)
    assert [type(m) for m in sparseprop.to_dense(swapped).modules()] == [type(m) for m in dense.modules()]


def test_autocast_trains_a_fused_model_with_relus_in_place():
    plain, fused = network().float(), fuse(network().float())
    x, grads = torch.randn(4, 8, 6, 6), []
    for model in (plain, fused):
        with torch.autocast("cpu"):
            loss = model(x).float().square().mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.01)


def test_a_copy_is_fused_if_asked_for():
    model = network()
    fused = fuse(model, inplace=False)
    assert type(model[1]) is nn.BatchNorm2d
    assert type(fused[1]) is BatchNorm2d


def test_a_compiled_fused_model_agrees():
    plain, fused = network(), fuse(network())
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    outputs = [model(x) for model in (plain, compiled)]
    torch.testing.assert_close(*outputs)


def test_refusals():
    with pytest.raises(SparsePropError, match=r"fuse expects a torch\.nn\.Module, got int"):
        fuse(3)
    with pytest.raises(SparsePropError, match=r"unfuse expects a torch\.nn\.Module, got int"):
        unfuse(3)
