"""Sparse layers that take the batch norm behind them along, where nothing is kept for gradients."""

import copy
import pickle

import pytest
import torch
from torch import nn

from cases import CONVS
from checks import LAYOUTS
from fuse_cases import network
from sparseprop import fuse, swap_modules, to_dense
from sparseprop.nn import SparseConv1d, SparseConv2d, SparseConv3d, SparseLinear
from sparseprop.nn.base import SparseLayer
from sparseprop.nn.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, norm_behind

LAYERS = {1: (SparseConv1d, BatchNorm1d), 2: (SparseConv2d, BatchNorm2d), 3: (SparseConv3d, BatchNorm3d)}


def make(name, dtype=torch.float64, **options):
    """A layer of the case table, a batch norm in evaluation that fits, an input and a residual."""
    dims, in_channels, out_channels, kernel, size, more = CONVS[name]
    layer_type, norm_type = LAYERS[dims]
    layer = layer_type.random(in_channels, out_channels, kernel, density=0.4, dtype=dtype, **more)
    norm = norm_type(out_channels, dtype=dtype, **options).eval()
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        if tensor is not None:
            nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(3, in_channels, *size, dtype=dtype)
    return layer, norm, x, torch.randn_like(layer.to_dense()(x))


@pytest.fixture
def finished(monkeypatch):
    """Counts the layers that finish in one step."""
    done, usual = [], SparseLayer.finished

    def counting(layer, x, finish):
        out = usual(layer, x, finish)
        done.append(out is not None)
        return out

    monkeypatch.setattr(SparseLayer, "finished", counting)
    return done


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("layout", ["plain", "channels_last", "batch_last"])
def test_every_layer_finishes_as_its_steps_do(backend, finished, name, layout):
    layer, norm, x, residual = make(name)
    place = LAYOUTS[layout]
    with torch.no_grad():
        for cap, added in ((0.0, None), (torch.inf, None), (6.0, residual), (torch.inf, residual)):
            wanted = norm(layer(place(x)), added, cap)
            out = norm_behind(norm, layer, place(x), None if added is None else place(added), cap)
            torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
            assert out.stride() == layer(place(x)).stride() or backend == "reference"
    pads_first = CONVS[name][5].get("padding_mode", "zeros") != "zeros"
    assert any(finished) == (backend != "reference" and not pads_first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_residual_may_lie_anywhere(finished, layout):
    layer, norm, x, residual = make("3x3")
    residual = LAYOUTS[layout](residual)
    with torch.no_grad():
        wanted = (norm(layer(x)) + residual).relu()
        torch.testing.assert_close(norm_behind(norm, layer, x, residual, torch.inf), wanted)
    assert finished == [True]


@pytest.mark.parametrize("batch", [1, 5, 300])
@pytest.mark.parametrize("layout", ["plain", "batch_last", "sliced"])
def test_linear_layers_finish_too(backend, batch, layout):
    layer = SparseLinear.random(33, 17, density=0.3, dtype=torch.float64)
    norm = BatchNorm1d(17, dtype=torch.float64).eval()
    nn.init.normal_(norm.running_mean)
    x, residual = (LAYOUTS[layout](torch.randn(batch, size, dtype=torch.float64)) for size in (33, 17))
    with torch.no_grad():
        wanted = (norm(layer(x)) + residual).relu()
        torch.testing.assert_close(norm_behind(norm, layer, x, residual, torch.inf), wanted)
        rows = x[:, None]
        if layout == "plain":
            with pytest.raises((RuntimeError, ValueError)):  # 17 channels wanted, got 1
                norm_behind(norm, layer, rows)


def test_float32_many_chunks_and_two_threads(two_threads, finished):
    layer = SparseConv2d.random(64, 192, 3, density=0.05, padding=1, bias=False)
    norm = BatchNorm2d(192, affine=False).eval()
    nn.init.normal_(norm.running_mean)
    x, residual = torch.randn(4, 64, 40, 41), torch.randn(4, 192, 40, 41)
    with torch.no_grad():
        out = norm_behind(norm, layer, x, residual, torch.inf)
        exact = layer.to_dense().double()(x.double()) - norm.running_mean.double().view(-1, 1, 1)
        exact = (exact / (1 + norm.eps) ** 0.5 + residual).relu()
        torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)
        torch.set_num_threads(1)
        assert torch.equal(out, norm_behind(norm, layer, x, residual, torch.inf))
    assert finished == [True, True]


def test_nan_passes_through():
    layer, norm, x, _ = make("pointwise")
    norm.running_mean[2] = torch.nan
    with torch.no_grad():
        assert norm_behind(norm, layer, x, None, torch.inf).isnan().any((0, 2, 3)).nonzero().tolist() == [[2]]


def no_statistics(layer, norm):
    norm.running_mean = norm.running_var = None


OBSTACLES = {
    "training": lambda layer, norm: norm.train(),
    "no running statistics": no_statistics,
    "hook on the layer": lambda layer, norm: layer.register_forward_hook(lambda *_: None),
    "hook on the norm": lambda layer, norm: norm.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_steps_are_taken_one_by_one(finished, obstacle):
    layer, norm, x, residual = make("3x3")
    OBSTACLES[obstacle](layer, norm)
    with torch.no_grad():
        wanted = norm(layer(x), residual, torch.inf)
        torch.testing.assert_close(norm_behind(norm, layer, x, residual, torch.inf), wanted)
    assert not any(finished)


def test_gradients_and_autocast_take_the_steps_one_by_one(finished):
    layer, norm, x, _ = make("3x3", torch.float32)
    norm_behind(norm, layer, x.requires_grad_()).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm_behind(norm, layer, x), norm(layer(x)))
    assert not any(finished)


@pytest.mark.parametrize("wrong", ["channels", "residual", "bias"])
def test_what_does_not_fit_is_refused_as_before(wrong):
    layer, norm, x, residual = make("3x3")
    if wrong == "channels":
        x = x[:, :-1]
    elif wrong == "residual":
        residual = residual[..., :-1]
    else:
        layer.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        norm_behind(norm, layer, x, residual, torch.inf)


def swapped_and_fused():
    dense = network().eval()
    for module in dense.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.rand_like(module.weight) < 0.3
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    swapped = swap_modules(dense, min_sparsity=0.0, inplace=False)
    return dense, swapped, fuse(swapped, inplace=False)


def test_a_fused_network_finishes_every_layer_and_comes_back(finished):
    dense, _, fused = swapped_and_fused()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), dense(x))
        assert finished == [True] * 6
        for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(again(x), fused(x))
    back = to_dense(fused)
    assert [type(module) for module in back.modules()] == [type(module) for module in dense.modules()]


def test_training_gives_the_same_gradients_and_statistics():
    _, swapped, fused = swapped_and_fused()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    for model in (swapped.train(), fused.train()):
        model(x).square().sum().backward()
    for (name, mine), (_, theirs) in zip(fused.named_parameters(), swapped.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(swapped.named_buffers()))


def test_a_compiled_network_takes_the_steps_one_by_one(finished):
    _, swapped, fused = swapped_and_fused()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), swapped(x))
    assert not finished


def test_a_layer_called_on_its_own_gives_its_own_output():
    _, swapped, fused = swapped_and_fused()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(fused[0].conv1(x), swapped[0].conv1(x))


@pytest.fixture
def sequence():
    layer = SparseConv2d.random(3, 4, 1, density=0.5)
    return fuse(nn.Sequential(layer, nn.BatchNorm2d(4), nn.ReLU()).eval()), torch.randn(2, 3, 5, 5)


def test_a_sequence_may_change_afterwards(sequence):
    model, x = sequence
    with torch.no_grad():
        whole = model(x)
        assert torch.equal(model[:2](x).relu(), whole)
        model.append(nn.Flatten())
        assert torch.equal(model(x), whole.flatten(1))
        del model[3]
        model[1] = nn.Identity()
        assert torch.equal(model(x), model[0](x).relu())


def test_a_layer_whose_output_is_read_twice_stays_as_it_is(finished):
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = SparseConv2d.random(3, 3, 1, density=0.5), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    model, x = Reads().eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(fuse(model)(x), wanted)
    assert not finished
