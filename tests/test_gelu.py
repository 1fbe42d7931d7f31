"""GELU with the gradient by our kernel: torch's results, in any layout, and modules that compute it."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparseprop
from checks import running
from sparseprop.backend import available_isas
from sparseprop.nn.gelu import NativeGELU, is_gelu
from sparseprop.ops.gelu import gelu

NODE = "_GeluBackward"


def gradient(function, x: Tensor, grad: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, grad)[0]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("n", [1, 15, 16, 17, 4097, 30_001])
def test_gradients_against_float64(isa, n):
    x, grad = torch.linspace(-12, 12, n) if n > 1 else torch.tensor([0.3]), torch.randn(n)
    with running(isa):
        ours = gradient(gelu, x, grad)
    truth = gradient(functional.gelu, x.double(), grad.double())
    assert float(((ours - truth) / grad.abs().clamp(min=1e-3)).abs().max()) < 3e-7


@pytest.mark.parametrize("isa", available_isas())
def test_far_out_and_odd_values(isa):
    x = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    with running(isa):
        found = gradient(gelu, x, torch.ones_like(x))
    assert found[:-1].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5, 1, 0, 1, 0], abs=1e-6)
    assert bool(found[-1].isnan())


LAYOUTS = {
    "plain": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3),
    "sliced": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "empty": lambda x: x[:0],
    "negated": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
}


@pytest.mark.parametrize("grad_layout", ["as the input", "plain", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, grad_layout):
    x = LAYOUTS[layout](torch.randn(4, 6, 5, 7))
    grad = {
        "as the input": lambda: torch.randn_like(x),
        "plain": lambda: torch.randn(x.shape),
        "expanded": lambda: torch.randn(()).expand(x.shape),
    }[grad_layout]()
    torch.testing.assert_close(gradient(gelu, x, grad), gradient(functional.gelu, x, grad))


def test_values_and_outputs_are_torchs():
    x = torch.randn(50, requires_grad=True)
    assert gelu(x).grad_fn.name() == NODE
    assert torch.equal(gelu(x), functional.gelu(x))
    assert gelu(x.double()).grad_fn.name() != NODE


def test_gradients_of_gradients():
    def twice(function) -> Tensor:
        x = torch.linspace(-3, 3, 40).requires_grad_()
        (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(twice(gelu), twice(functional.gelu))


def test_compiled_it_is_torchs():
    x = torch.randn(8, requires_grad=True)
    torch.testing.assert_close(torch.compile(gelu, fullgraph=True)(x), functional.gelu(x))


def transformers_gelu(**options) -> nn.Module:
    activations = pytest.importorskip("transformers.activations")
    return activations.GELUActivation(**options)


@pytest.mark.parametrize("make", [nn.GELU, transformers_gelu])
def test_fused_modules_use_it_until_unfused(make):
    plain = nn.Sequential(nn.Linear(4, 4), make())
    net = sparseprop.fuse(copy.deepcopy(plain))
    assert [fusion.name for fusion in sparseprop.plan_fusion(plain) if fusion.gelu] == ["1"]
    assert isinstance(net[1], NativeGELU)
    assert isinstance(net[1], type(plain[1]))
    for model in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert model(torch.randn(3, 4)).grad_fn.name() == NODE
    assert type(sparseprop.unfuse(net)[1]) is type(plain[1])


@pytest.mark.parametrize(
    "make", [lambda: nn.GELU("tanh"), lambda: transformers_gelu(use_gelu_python=True), nn.SiLU]
)
def test_other_activations_stay_as_they_are(make):
    module = make()
    assert not is_gelu(module)
    assert not any(fusion.gelu for fusion in sparseprop.plan_fusion(nn.Sequential(module)))


def test_an_option_that_changes_later_counts():
    net = sparseprop.fuse(nn.Sequential(nn.GELU()))
    net[0].approximate = "tanh"
    x = torch.linspace(-3, 3, 9)
    assert torch.equal(net(x), functional.gelu(x, approximate="tanh"))
