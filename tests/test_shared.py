"""Inputs that a sparse layer shares with other readers: one gradient for all, added where it is stored."""

import copy

import pytest
import torch
from torch import nn

from checks import running
from sparseprop import SparsePropError, backend, fuse
from sparseprop.backend import available_isas
from sparseprop.nn import SparseConv2d, SparseLinear
from sparseprop.nn.shared import shared

LAYERS = {
    "1x1": (1, {}),
    "3x3": (3, {"padding": 1}),
    "1x1 by 2": (1, {"stride": 2}),
    "3x3 by 2": (3, {"stride": 2, "padding": 1}),
    "2x2 by 3 dilated": (2, {"stride": 3, "dilation": 2}),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def layer_and_input(kind, layout="contiguous", dtype=torch.float64, batch=5):
    torch.manual_seed(0)
    kernel, options = LAYERS[kind]
    layer = SparseConv2d.random(20, 37, kernel, density=0.2, **options).to(dtype)
    x = LAYOUTS[layout](torch.randn(batch, 20, 9, 11, dtype=dtype)).requires_grad_()
    return layer, x


def is_shared(layer, x):
    out, others = shared(layer, x)
    return others is not x and out.grad_fn.name() == "SharedBackward"


def gradients(layer, x, out, others, transposed=False):
    """Those of something that reads both; the gradient of `others` in another layout, if so wanted."""
    torch.manual_seed(1)
    weigh = [torch.randn_like(out), torch.randn(others.transpose(2, 3).shape, dtype=x.dtype).transpose(2, 3)]
    loss = (out * weigh[0]).sum() + (others * (weigh[1] if transposed else weigh[1].contiguous())).sum()
    return torch.autograd.grad(loss, [x, layer.weight_values, layer.bias])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("isa", available_isas())
def test_gradients_are_those_of_separate_readers(isa, kind, layout):
    with running(isa):
        for dtype, transposed in ((torch.float32, False), (torch.float64, True)):
            layer, x = layer_and_input(kind, layout, dtype)
            wanted = gradients(layer, x, layer(x), x, transposed)
            assert is_shared(layer, x)
            for found, expected in zip(
                gradients(layer, x, *shared(layer, x), transposed), wanted, strict=True
            ):
                torch.testing.assert_close(
                    found, expected, rtol=0, atol=1e-5 if found.dtype is torch.float32 else 1e-13
                )


def test_the_reference_adds_it_too():
    with backend.use("reference"):
        layer, x = layer_and_input("3x3 by 2")
        wanted = gradients(layer, x, layer(x), x)
        for found, expected in zip(gradients(layer, x, *shared(layer, x)), wanted, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("used", ["output", "others", "expanded"])
def test_either_may_go_unused_or_get_a_gradient_without_memory(used):
    layer, x = layer_and_input("3x3")
    both = shared(layer, x)
    both[used == "others"].sum().backward() if used != "expanded" else (
        both[0].sum() + both[1].sum()
    ).backward()
    again = x.detach().requires_grad_()
    parts = {"output": [layer(again)], "others": [again], "expanded": [layer(again), again]}[used]
    sum(part.sum() for part in parts).backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_a_layer_without_non_zeros_hands_the_gradient_on():
    layer = SparseConv2d.from_mask(torch.zeros(3, 4, 1, 1, dtype=torch.bool))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    layer(x)
    out, others = shared(layer, x)
    (out.sum() + (others * 3).sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


def test_frozen_values_leave_the_input_gradient():
    layer, x = layer_and_input("1x1")
    layer.requires_grad_(False)
    out, others = shared(layer, x)
    found = torch.autograd.grad(out.sum() + (others**2).sum(), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(layer(x).sum() + (x**2).sum(), x)[0])


def test_it_is_differentiable_twice():
    layer, x = layer_and_input("3x3 by 2", batch=1)
    x = x.detach()[:, :, :4, :4].requires_grad_()
    layer(x)
    assert is_shared(layer, x)

    def run(x, values):
        out, others = torch.func.functional_call(_Shared(layer), {"layer.weight_values": values}, (x,))
        return out * out, others * others

    inputs = (x, layer.weight_values)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


class _Shared(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return shared(self.layer, x)


def test_what_keeps_a_layer_from_sharing():
    layer, x = layer_and_input("1x1")
    assert is_shared(layer, x)  # from the first call on
    assert is_shared(layer, x[:2])
    for wrong in (x.float(), x[:, :3], x[0, 0]):
        with pytest.raises(SparsePropError):
            shared(layer, wrong)
    assert not is_shared(layer, x[0])  # no batch: the layer makes it one
    assert shared(layer, x.detach())[1].grad_fn is None
    with torch.no_grad():
        assert shared(layer, x)[0].grad_fn is None
    calls = []
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    assert not is_shared(layer, x)
    assert calls
    hook.remove()
    assert is_shared(layer, x)
    with torch.autocast("cpu"):
        assert shared(layer.float(), x.float())[0].dtype is torch.bfloat16
    dense = nn.Conv2d(20, 4, 1, dtype=torch.float64)
    assert shared(dense, x)[1] is x
    padded = SparseConv2d.random(20, 4, 3, density=0.2, padding=1, padding_mode="circular").double()
    padded(x)
    assert not is_shared(padded, x)


class Block(nn.Module):
    """A residual block: its input is read by a sparse layer, then by the shortcut."""

    def __init__(self, shortcut: str) -> None:
        super().__init__()
        self.conv1 = SparseConv2d.random(6, 6, 3, density=0.5, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = SparseConv2d.random(6, 6, 1, density=0.5, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.down = nn.Sequential(
            SparseConv2d.random(6, 6, 1, density=0.5), nn.ReLU(inplace=shortcut == "writes")
        )
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut

    def forward(self, x):
        if self.shortcut == "first":
            identity = self.down(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut == "identity":
            identity = x
        elif self.shortcut != "first":
            identity = self.down(x)
        y = self.relu(y + identity)
        return (y, x) if self.shortcut == "returned" else y


def names_behind(out):
    found, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            found.add(node.name())
            todo.extend(above for above, _ in node.next_functions)
    return found


@pytest.mark.parametrize("shortcut", ["identity", "module", "first", "writes", "returned"])
def test_fused_blocks_share_what_they_may(shortcut):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 6, 1), Block(shortcut), *([] if shortcut == "returned" else [Block(shortcut)])
    )
    fused = fuse(copy.deepcopy(model))
    for _ in range(2):
        x = torch.randn(3, 6, 8, 8)
        outs = [net(x) for net in (fused, model)]
        outs = [out[0] if shortcut == "returned" else out for out in outs]
        torch.testing.assert_close(*outs)
        assert ("SharedBackward" in names_behind(outs[0])) == (shortcut in ("identity", "module"))
        for out in outs:
            (out**2).sum().backward()
    for (name, found), wanted in zip(fused.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("leading", [(2,), (3, 4), (5, 9)])  # by bits, by output rows, by input rows
@pytest.mark.parametrize("isa", available_isas())
def test_linear_layers_share_as_well(isa, leading):
    torch.manual_seed(0)
    layer = SparseLinear.random(19, 5, density=0.5).double()
    x = torch.randn(*leading, 19, dtype=torch.float64, requires_grad=True)
    with running(isa):
        layer(x)
        assert is_shared(layer, x)
        out, others = shared(layer, x)
        found = torch.autograd.grad((out**2).sum() + (others**2).sum(), x)[0]
        wanted = torch.autograd.grad((layer(x) ** 2).sum() + (x**2).sum(), x)[0]
    torch.testing.assert_close(found, wanted)
