"""What a forward pass keeps comes back in another form: backward copies or refuses, never misreads."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import sparseprop
from checks import LAYOUTS
from sparseprop import SparsePropError
from sparseprop.nn import SparseConv2d, SparseLinear


def as_it_is(kept):
    return kept


def turned(kept):
    return kept.detach().mT.contiguous() if kept.dim() > 1 else kept


def turned_back(kept):
    return kept.mT if kept.dim() > 1 else kept


OTHER_STRIDES = {
    "contiguous": (lambda kept: kept.contiguous(), as_it_is),
    "numpy": (lambda kept: kept.detach().numpy().copy(), torch.from_numpy),
    "transposed": (turned, turned_back),
}
OTHER_FORMS = {
    "dtype": (as_it_is, lambda kept: kept.double()),
    "shape": (as_it_is, lambda kept: kept[:1]),
}
MODULES = {
    "linear": (lambda: SparseLinear.random(12, 7, density=0.4), (5, 12)),
    "conv": (lambda: SparseConv2d.random(4, 5, 3, density=0.4, padding=1), (3, 4, 6, 7)),
    "norm": (lambda: native(nn.BatchNorm2d(4), nn.ReLU()), (3, 4, 6, 7)),
    "pool": (lambda: native(nn.MaxPool2d(2)), (3, 4, 6, 7)),
    "gelu": (lambda: native(nn.GELU()), (3, 4, 6, 7)),
    "chain": (
        lambda: native(nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.BatchNorm2d(4), nn.ReLU6()),
        (3, 4, 6, 7),
    ),
}


def native(*modules):
    return sparseprop.fuse(nn.Sequential(*modules))


def gradients(module, x, hooks=None):
    x = x.detach().requires_grad_()
    if hooks is None:
        out = module(x)
    else:
        with saved_tensors_hooks(*hooks):
            out = module(x)
    return torch.autograd.grad(out, (x, *module.parameters()), torch.ones_like(out))


@pytest.mark.parametrize("hooks", OTHER_STRIDES)
@pytest.mark.parametrize("layout", ["plain", "channels_last", "sliced"])
@pytest.mark.parametrize("name", MODULES)
def test_saved_tensors_may_come_back_with_other_strides(name, layout, hooks):
    make, shape = MODULES[name]
    module, x = make(), LAYOUTS[layout](torch.randn(shape))
    expected = gradients(deepcopy(module), x)
    torch.testing.assert_close(gradients(module, x, OTHER_STRIDES[hooks]), expected)


@pytest.mark.parametrize("hooks", OTHER_FORMS)
@pytest.mark.parametrize("name", ["linear", "conv", "norm"])
def test_saved_tensors_of_another_form_are_refused(name, hooks):
    make, shape = MODULES[name]
    with pytest.raises(SparsePropError, match=r"(?s)kept for the backward pass .* got .* forward again"):
        gradients(make(), torch.randn(shape), OTHER_FORMS[hooks])


def test_they_are_refused_in_second_derivatives_too():
    layer, x = SparseLinear.random(6, 5, density=0.5), torch.randn(4, 6, requires_grad=True)
    out = layer(x).square().sum()
    with saved_tensors_hooks(*OTHER_FORMS["shape"]):
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(SparsePropError, match="kept for the backward pass"):
        torch.autograd.grad(grad.sum(), (x, layer.weight_values))


@pytest.mark.parametrize(
    "replace",
    [
        lambda layer, x: layer.double(),
        lambda layer, x: setattr(layer.weight_values, "data", torch.zeros(0)),
        lambda layer, x: setattr(x, "data", torch.zeros(2, 6)),
    ],
    ids=["dtype", "values", "input"],
)
def test_tensors_replaced_between_forward_and_backward_are_refused(replace):
    layer, x = SparseLinear.random(6, 5, density=0.5), torch.randn(4, 6, requires_grad=True)
    out = layer(x)
    replace(layer, x)
    with pytest.raises(SparsePropError, match="kept for the backward pass"):
        out.sum().backward()


def test_assigning_another_state_leaves_a_recorded_pass_alone():
    layer, other = SparseLinear.random(16, 9, density=0.5), SparseLinear.random(16, 9, density=0.1)
    x = torch.randn(4, 16, requires_grad=True)
    dense = layer.to_dense()
    out = layer(x)
    layer.load_state_dict(other.state_dict(), assign=True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(dense(x).sum(), x)[0])
    torch.testing.assert_close(layer(x), other(x))


def test_copying_another_state_in_makes_a_recorded_pass_fail():
    layer, other = SparseLinear.random(16, 9, density=0.5), SparseLinear.random(16, 9, density=0.1)
    out = layer(torch.randn(4, 16, requires_grad=True))
    layer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed between forward"):
        out.sum().backward()
