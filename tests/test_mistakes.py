"""Mistakes that published sparse training systems made, each as a test that it does not happen here."""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from checks import LAYOUTS, assert_right
from sparseprop import SparsityPattern
from sparseprop.nn import SparseConv1d, SparseConv2d, SparseConv3d, SparseLinear


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"plain"}))
def test_permuted_inputs_and_gradients_are_not_taken_for_contiguous(backend, layout):
    layer = SparseConv2d.random(6, 8, 3, density=0.3, padding=1)
    x, grad = torch.randn(4, 6, 5, 7), torch.randn(4, 8, 5, 7)
    assert_right(layer, LAYOUTS[layout](x), grad)
    assert_right(layer, x, LAYOUTS[layout](grad))


def test_float64_is_not_computed_in_float32(backend):
    for layer, shape in (
        (SparseLinear.random(300, 20, density=0.5, dtype=torch.float64), (4, 300)),
        (SparseConv2d.random(30, 20, 3, density=0.5, dtype=torch.float64), (2, 30, 4, 4)),
    ):
        x = torch.randn(shape, dtype=torch.float64) * (1 + torch.rand(shape, dtype=torch.float64) * 1e-9)
        out, wanted = layer(x), layer.to_dense()(x)
        assert out.dtype is torch.float64
        assert (out - wanted).abs().max() < 1e-13 * wanted.abs().max() * 100


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"dilation": (1, 2)},
        {"kernel_size": (1, 3)},
        {"padding": "same"},
        {"stride": (2, 1)},
        *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    ],
    ids=str,
)
def test_no_convolution_option_is_ignored(backend, options):
    options = {"kernel_size": 3} | options
    layer = SparseConv2d.random(4, 6, density=0.5, **options)
    assert_right(layer, torch.randn(2, 4, 8, 9))


@pytest.mark.parametrize("in_features", [40_000, 140_000])
def test_rows_longer_than_16_bit_offsets_hold(backend, in_features):
    mask = torch.zeros(3, in_features, dtype=torch.bool)
    mask[0] = True  # more non-zeros than 2^15, and than 2^16
    mask[2, ::7] = True
    layer = SparseLinear.from_mask(mask, dtype=torch.float64)
    assert_right(
        layer, torch.randn(3, in_features, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    )


# taps, or phases of a stride, further apart than 16 bits count: class, arguments, options, input shape
FAR = {
    "phases": (SparseConv2d, (1, 16, 3), {"stride": 2, "padding": 1}, (8, 1, 320, 320)),
    "planes": (SparseConv3d, (1, 2, 3), {"padding": 1}, (1, 1, 3, 260, 260)),
    "planes of two phases": (
        SparseConv3d,
        (1, 2, 3),
        {"padding": 1, "stride": (2, 2, 1)},
        (1, 1, 4, 370, 260),
    ),
    "many taps": (SparseConv3d, (2, 64, 7), {}, (1, 2, 8, 14, 14)),
    "dilation": (SparseConv1d, (3, 4, 3), {"dilation": 40_000}, (1, 3, 80_100)),
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_taps_further_apart_than_16_bits_hold(backend, name, density):
    layer, arguments, options, shape = FAR[name]
    assert_right(layer.random(*arguments, density=density, **options), torch.randn(shape))


def test_images_side_by_side_with_taps_further_apart_than_16_bits_hold(backend):
    x = torch.randn(13, 1, 2, 260, 260)
    layer = SparseConv3d.random(1, 1, 3, density=0.5, padding=1)
    assert_right(layer, LAYOUTS["batch_last"](x))


def test_flat_indices_beyond_32_bits_hold(backend):
    rows, cols = 70_000, 65_000  # 4.55e9 entries
    layer = SparseLinear.random(cols, rows, density=1e-5)
    row = torch.repeat_interleave(torch.arange(rows), layer.weight_row_ptr.diff())
    assert int(layer.pattern.flat_index()[-1]) > 2**32 - 1
    x = torch.randn(2, cols)
    wanted = torch.zeros(2, rows).index_add_(
        1, row, x[:, layer.weight_col_idx.long()] * layer.weight_values.detach()
    )
    torch.testing.assert_close(layer(x), wanted + layer.bias, rtol=1e-4, atol=1e-5)


def test_indices_above_2_to_the_24_are_not_rounded_through_float32(backend):
    cols = 2**24 + 9
    wanted = [2**24 + 1, 2**24 + 3, 2**24 + 8]  # float32 holds none of these but the last
    pattern = SparsityPattern.from_coo(torch.zeros(3, dtype=torch.int64), torch.tensor(wanted), (1, cols))
    layer = SparseLinear(cols, 1, bias=False, pattern=pattern)
    assert layer.double().half().float().weight_col_idx.tolist() == wanted
    fresh = SparseLinear(cols, 1, bias=False)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.weight_col_idx.tolist() == wanted
    x = torch.zeros(1, cols)
    x[0, wanted] = torch.tensor([1.0, 10.0, 100.0])
    with torch.no_grad():
        fresh.weight_values.fill_(1)
    assert fresh(x).item() == 111
    mask = torch.zeros(1, cols, dtype=torch.bool)
    mask[0, wanted] = True
    assert SparsityPattern.from_mask(mask).col_idx.tolist() == wanted


def test_the_state_dict_holds_the_indices():
    layer = SparseLinear.random(9, 7, density=0.3)
    fresh = SparseLinear(9, 7)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.pattern == layer.pattern
    assert torch.equal(fresh.weight, layer.weight)


def test_a_weight_that_reaches_zero_lives_on(backend):
    layer = SparseLinear.random(9, 7, density=0.5)
    with torch.no_grad():
        layer.weight_values.zero_()
    nnz, mask, x = layer.nnz, layer.mask, torch.randn(4, 9)
    layer.load_state_dict(layer.state_dict())
    layer.load_state_dict(layer.to_dense().state_dict())
    layer(x).sum().backward()
    assert (layer.nnz, layer.weight_values.grad.count_nonzero()) == (nnz, nnz)
    assert torch.equal(layer.mask, mask)
    dense = layer.to_dense()
    assert torch.equal(SparseLinear.from_dense(dense, mask=mask).mask, mask)


def test_a_new_pattern_does_not_leave_the_optimizer_a_dead_tensor(backend):
    layer, x = SparseLinear.random(9, 7, density=0.5), torch.randn(4, 9)
    for density in (0.5, 0.25, 0.5):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer.load_state_dict(SparseLinear.random(9, 7, density=density).state_dict())
        before = layer.weight_values.detach().clone()
        layer(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(layer.weight_values, before)
        optimizer.zero_grad()


def test_momentum_of_an_old_pattern_cannot_be_applied_to_another_number_of_weights():
    layer, x = SparseLinear.random(9, 7, density=0.5), torch.randn(4, 9)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(x).sum().backward()
    optimizer.step()
    layer.load_state_dict(SparseLinear.random(9, 7, density=0.25).state_dict())
    layer(x).sum().backward()
    with pytest.raises(RuntimeError):  # loud: the optimizer's state has the old length
        optimizer.step()


def test_one_layer_in_two_places_stays_one(backend):
    shared = SparseLinear.random(6, 6, density=0.5)
    model = copy.deepcopy(nn.Sequential(shared, nn.Tanh(), shared))
    assert model[0] is model[2]
    x = torch.randn(3, 6, dtype=torch.float64)
    model.double()
    model(x).sum().backward()
    dense = model[0].to_dense()
    nn.Sequential(dense, nn.Tanh(), dense)(x).sum().backward()
    torch.testing.assert_close(model[0].weight_values.grad, dense.weight.grad[model[0].mask])


def test_millions_of_weight_gradients_need_no_stack(backend, two_threads):
    layer = SparseLinear.random(40_000, 40_000, density=2_500_000 / 1.6e9)  # 10 MB of gradients
    layer(torch.ones(2, 40_000)).sum().backward()
    assert torch.equal(layer.weight_values.grad, torch.full((layer.nnz,), 2.0))


def test_denormals_survive_loading_and_running_the_kernels(backend):
    tiny = 1e-40
    layer = SparseLinear.from_mask(torch.eye(16, dtype=torch.bool), weight=torch.eye(16), bias=False)
    out = layer(torch.full((16, 16), tiny))
    assert torch.equal(out, torch.full((16, 16), tiny))
    assert (torch.tensor([tiny]) * 1.0).item() != 0
    assert float(tiny) * 1.0 != 0


def test_no_top_level_module_has_a_common_name():
    for name in ("backend", "nn", "ops", "masks", "_native", "reference"):
        assert importlib.util.find_spec(name) is None


def test_importing_loads_neither_optional_packages_nor_prints():
    code = (
        "import sys, sparseprop; "
        "heavy = {'numba', 'matplotlib', 'timm', 'transformers', 'sklearn', 'scipy', 'typer'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "SPARSEPROP_BACKEND"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")
