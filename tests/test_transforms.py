"""Tracing, transforms and dispatch modes: followed, or refused by name."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import sparseprop
from sparseprop import SparsePropError
from sparseprop.nn import SparseConv2d, SparseLinear
from sparseprop.ops.attention import attention
from sparseprop.ops.gelu import gelu
from sparseprop.ops.norm import batch_norm
from sparseprop.ops.pool import max_pool2d
from sparseprop.ops.stage import NormSpec
from sparseprop.ops.windows import WindowSpec


def linear():
    return SparseLinear.random(12, 7, density=0.4), torch.randn(5, 12)


def network():
    conv = SparseConv2d.random(3, 8, 3, density=0.4, padding=1)
    tail = (nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.GELU())
    return sparseprop.fuse(nn.Sequential(conv, *tail)).eval(), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", [linear, network])
@pytest.mark.parametrize("used", [False, True])
def test_a_graph_made_by_proxies_computes(make, used, grad):
    module, x = make()
    with torch.set_grad_enabled(grad):
        if used:
            module(x)
        graph = make_fx(module)(x)
        torch.testing.assert_close(graph(2 * x), module(2 * x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", [linear, network])
def test_a_trace_computes(make, grad):
    module, x = make()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, x)
        torch.testing.assert_close(traced(2 * x), module(2 * x))


def test_dispatch_modes_change_nothing():
    module, x = network()
    with FlopCounterMode(display=False):
        counted = module(x)
    torch.testing.assert_close(counted, module(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_computes():
    layer, x = linear()
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
        lambda layer, x: torch.func.jacrev(layer)(x),
        lambda layer, x: torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(x),
    ],
    ids=["grad", "jvp", "jacrev", "per sample"],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_derivatives_of_torch_func_are_refused(transform, recorded):
    layer, x = linear()
    layer(x)
    with (
        torch.set_grad_enabled(recorded),
        pytest.raises(SparsePropError, match=r"by torch\.func, got (grad|jvp)"),
    ):
        transform(layer, x)


def test_a_batch_of_gradients_is_refused():
    layer, x = linear()
    x.requires_grad_()
    out = layer(x)
    with pytest.raises(SparsePropError, match="batch of gradients"):
        torch.autograd.grad(out, x, torch.ones(3, *out.shape), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    "form",
    [
        lambda x: torch.nested.nested_tensor([x, x[:2]]),
        lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        torch.Tensor.to_mkldnn,
    ],
    ids=["nested", "jagged", "coo", "csr", "mkldnn"],
)
@pytest.mark.parametrize("used", [False, True])
def test_tensors_without_strides_are_refused(form, used):
    layer, x = linear()
    if used:
        layer(x)
    with pytest.raises(SparsePropError, match=r"take strided tensors, got"):
        layer(form(x))


FUSED = {
    "gelu": gelu,
    "pool": lambda x: max_pool2d(x, WindowSpec((2, 2), (2, 2))),
    "norm": lambda x: batch_norm(x, (None, None), None, None, NormSpec(training=True)),
    "attention": lambda x: attention(x, x, x),
}


@pytest.mark.parametrize("function", FUSED.values(), ids=FUSED)
def test_a_batch_of_gradients_is_refused_by_fused_layers_too(function):
    x = torch.randn(2, 2, 16, 16, requires_grad=True)
    out = function(x)
    with pytest.raises(SparsePropError, match="fused layers cannot take a batch of gradients"):
        torch.autograd.grad(out, x, torch.ones(2, *out.shape), is_grads_batched=True)
