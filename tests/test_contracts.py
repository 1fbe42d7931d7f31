"""Sparse layers inside the rest of torch: copies, compilers, autocast, checkpointing, optimizers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.utils.checkpoint import checkpoint

from checks import LAYOUTS
from sparseprop import SparsePropError
from sparseprop.nn import SparseConv1d, SparseConv2d, SparseLinear


def network(dtype=torch.float32):
    """A small one of all kinds, with normalisation and a reflected border between sparse layers."""
    common = {"density": 0.4, "dtype": dtype}
    return nn.Sequential(
        SparseConv2d.random(3, 8, 3, padding=1, **common),
        nn.BatchNorm2d(8, dtype=dtype),
        nn.ReLU(),
        SparseConv2d.random(8, 6, 3, stride=2, padding=1, padding_mode="reflect", groups=2, **common),
        nn.Flatten(2),
        SparseConv1d.random(6, 4, 3, dilation=2, **common),
        nn.Flatten(),
        SparseLinear.random(4 * 12, 5, **common),
    )


def densified(model):
    return nn.Sequential(
        *(layer.to_dense() if hasattr(layer, "to_dense") else copy.deepcopy(layer) for layer in model)
    )


def picture(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, 8, 8, dtype=dtype)


def gradients(model, x):
    x = x.detach().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def assert_same(ones, others, **close):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_work_and_share_nothing(backend, copied):
    model, x = network().eval(), picture()
    model(x)  # lowered by now; the copy lowers for itself
    twin = copied(model)
    assert_same(gradients(twin, x), gradients(model, x), rtol=0, atol=0)
    wanted = model(x)
    with torch.no_grad():
        twin[-1].weight_values.zero_()
        twin[0].weight_col_idx.copy_(twin[0].weight_col_idx.clone())
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_in_full_graphs_forward_and_backward(compiler):
    model, x = network(), picture()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=compiler)
    assert_same(gradients(compiled, x), gradients(model, x), rtol=1e-4, atol=1e-5)
    compiled.eval()
    with torch.no_grad():
        assert_same([compiled(x)], [model.eval()(x)], rtol=1e-4, atol=1e-5)


def test_compiled_layers_take_any_batch_and_layout():
    layer = SparseConv2d.random(3, 8, 3, padding=1, density=0.4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for layout in ("plain", "channels_last", "batch_last", "sliced"):
        for batch in (2, 3, 5):
            x = LAYOUTS[layout](picture(batch)).requires_grad_()
            out, wanted = compiled(x), layer(x)
            assert out.stride() == wanted.stride()
            grad = torch.randn_like(out)
            assert_same(
                torch.autograd.grad(out, (x, layer.weight_values, layer.bias), grad),
                torch.autograd.grad(wanted, (x, layer.weight_values, layer.bias), grad),
            )


def test_compiled_layers_follow_a_changed_pattern():
    layer, other, x = (
        (SparseLinear.random(12, 8, density=0.5) for _ in range(2)).__iter__().__next__(),
        None,
        None,
    )
    other = SparseLinear.random(12, 8, density=0.5)
    x = torch.randn(3, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))


def test_compiled_autocast_gives_bfloat16():
    layer, x = SparseLinear.random(16, 8, density=0.5), torch.randn(4, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))
        assert compiled(x).dtype is torch.bfloat16


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_our_operators_and_dynamic_batches(strict):
    model, x = network().eval(), picture()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("sparseprop.contract.default") == 4
    more = picture(7)
    torch.testing.assert_close(program.module()(more), model(more))


@pytest.mark.parametrize("inner", ["plain", "batch_last"])
def test_autocast_runs_in_bfloat16_with_float32_values(backend, inner):
    model, x = network(), picture(16)
    x = LAYOUTS[inner](x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        dense = densified(model)
        wanted = dense(x)
    assert out.dtype is torch.bfloat16
    wanted32 = dense(x)
    assert (out - wanted32).abs().max() <= 2 * (wanted - wanted32).abs().max() + 0.05
    out.sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_autocast_gradients_have_the_dtype_of_what_they_are_for(backend):
    layer = SparseLinear.random(16, 8, density=0.5)
    x = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    weight, ones = layer.weight.detach(), torch.ones(4, 8)
    torch.testing.assert_close(x.grad.float(), ones @ weight, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(layer.weight_values.grad, (ones.t() @ x.float())[layer.mask].detach())
    assert layer.bias.grad.dtype is torch.float32


def test_autocast_leaves_float64_alone_and_computes_in_float32_for_half():
    double = SparseLinear.random(6, 4, density=0.5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert double(torch.randn(2, 6, dtype=torch.float64)).dtype is torch.float64
        with pytest.raises(SparsePropError, match=r"got torch.float32 and torch.float64"):
            double(torch.randn(2, 6))
    with torch.autocast("cpu", torch.float16):
        layer = SparseLinear.random(6, 4, density=0.5)
        assert layer(torch.randn(2, 6, dtype=torch.float16)).dtype is torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_gradients(backend, reentrant):
    model, x = network().eval(), picture()
    wanted = gradients(model, x)

    def recomputed(x):
        return checkpoint(model, x, use_reentrant=reentrant)

    x = x.detach().requires_grad_()
    model.zero_grad()
    recomputed(x).square().sum().backward()
    assert_same([x.grad, *(parameter.grad for parameter in model.parameters())], wanted, rtol=0, atol=0)


def test_functional_call_uses_the_given_values_and_gives_them_gradients(backend):
    model, x = network().eval(), picture()
    values = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    values["7.weight_values"].requires_grad_()
    torch.func.functional_call(model, values, (x,)).sum().backward()
    assert values["7.weight_values"].grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    model.load_state_dict(values, strict=False)
    assert torch.equal(torch.func.functional_call(model, values, (x,)), model(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, foreach=True),
        lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, 0.01, foreach=True),
        lambda parameters: torch.optim.AdamW(parameters, 0.01, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, 0.01, foreach=False),
    ],
    ids=["sgd-foreach", "sgd-fused", "adamw-foreach", "adamw-fused", "adamw"],
)
def test_ten_steps_stay_with_the_masked_dense_model(backend, make):
    sparse = network(torch.float64)
    dense = nn.Sequential(
        *(layer.to_dense() if hasattr(layer, "to_dense") else copy.deepcopy(layer) for layer in sparse)
    )
    masks = {i: layer.mask for i, layer in enumerate(sparse) if hasattr(layer, "mask")}
    optimizers = [make(model.parameters()) for model in (sparse, dense)]
    for _ in range(10):
        x = picture(4, torch.float64)
        for model, optimizer in zip((sparse, dense), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if model is dense:
                for i, mask in masks.items():
                    dense[i].weight.grad *= mask
            optimizer.step()
    for i in masks:
        torch.testing.assert_close(sparse[i].weight_values, dense[i].weight[masks[i]])
        torch.testing.assert_close(sparse[i].bias, dense[i].bias)
    state = optimizers[0].state[sparse[0].weight_values]
    assert all(entry.numel() in (1, sparse[0].nnz) for entry in state.values())


def test_clip_grad_norm_sees_the_norm_of_the_dense_gradient():
    model, x = network().eval(), picture()
    gradients(model, x)
    norm = torch.stack([parameter.grad.square().sum() for parameter in model.parameters()]).sum().sqrt()
    torch.testing.assert_close(clip_grad_norm_(model.parameters(), 1e-3), norm)


class _Doubled(nn.Module):
    def forward(self, values):
        return 2 * values


def test_values_may_be_parametrized(backend):
    layer, x = SparseLinear.random(6, 4, density=0.5, bias=False), torch.randn(3, 6)
    wanted = 2 * layer(x)
    parametrize.register_parametrization(layer, "weight_values", _Doubled())
    torch.testing.assert_close(layer(x), wanted)
    layer(x).sum().backward()
    assert layer.parametrizations.weight_values.original.grad.shape == (layer.nnz,)


def test_the_dense_view_serves_code_that_reads_weights():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with torch.no_grad():
        encoder.linear1.weight *= torch.rand(32, 16) < 0.3
    x = torch.randn(2, 5, 16)
    wanted = encoder(x)
    encoder.linear1 = SparseLinear.from_dense(encoder.linear1)
    with torch.no_grad():  # the fast path, which takes `linear1.weight`
        torch.testing.assert_close(encoder(x), wanted)
    torch.testing.assert_close(encoder(x), wanted)


def test_changing_dtype_keeps_indices_and_parameters():
    layer, x = SparseLinear.random(6, 4, density=0.5), torch.randn(3, 6)
    parameter, wanted = layer.weight_values, layer(x)
    layer.double()
    assert layer.weight_values is parameter
    assert (layer.weight_row_ptr.dtype, layer.weight_col_idx.dtype) == (torch.int64, torch.int32)
    torch.testing.assert_close(layer(x.double()).float(), wanted)
    layer.half()
    assert (layer.weight_row_ptr.dtype, layer.weight_col_idx.dtype) == (torch.int64, torch.int32)
    with pytest.raises(SparsePropError, match=r"float32 or float64, got weight values of torch.float16"):
        layer(x.half())
    torch.testing.assert_close(layer.to(torch.float32)(x), wanted, rtol=1e-2, atol=1e-2)


def test_threads_may_share_a_layer(backend):
    from concurrent.futures import ThreadPoolExecutor

    layer, inputs = SparseLinear.random(64, 48, density=0.3), torch.randn(8, 5, 64)
    wanted = layer(inputs)
    fresh = copy.deepcopy(layer)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(fresh, inputs))
    torch.testing.assert_close(torch.stack(outputs), wanted)
