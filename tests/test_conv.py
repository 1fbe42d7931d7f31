"""Sparse convolutions beside torch's: options, layouts, strides, densities, and what is refused."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from cases import CONVS, SIZES, WRONG_CONV_INPUTS, WRONG_CONVS
from checks import LAYOUTS, NEEDS, assert_right, in_order, run, running
from sparseprop import SparsePropError
from sparseprop.backend import available_isas
from sparseprop.nn import SparseConv1d, SparseConv2d, SparseConv3d

SPARSE = {1: SparseConv1d, 2: SparseConv2d, 3: SparseConv3d}
DENSE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def make(name, density=0.3, batch=3, **more):
    """A random layer of the case table, an input and a gradient for it."""
    dims, in_channels, out_channels, kernel, size, options = CONVS[name]
    layer = SPARSE[dims].random(in_channels, out_channels, kernel, density=density, **options, **more)
    x = torch.randn(batch, in_channels, *size, dtype=more.get("dtype"))
    with torch.no_grad():
        return layer, x, torch.randn_like(layer.to_dense()(x))


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("layout", ["plain", "channels_last", "batch_last"])
def test_every_option_is_right(backend, name, layout):
    layer, x, grad = make(name)
    assert_right(layer, LAYOUTS[layout](x), LAYOUTS[layout](grad))


@pytest.mark.parametrize("name", CONVS)
def test_every_option_is_right_in_float64(backend, name):
    assert_right(*make(name, dtype=torch.float64, bias=False))


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("name", ["3x3 stride 2", "1-D", "3-D"])
def test_any_strides_of_input_and_gradient(backend, x_layout, grad_layout, name):
    layer, x, grad = make(name)
    assert_right(layer, LAYOUTS[x_layout](x), LAYOUTS[grad_layout](grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(9, 6), (6, 17)])
@pytest.mark.parametrize("stride", [1, 2])
def test_small_planes_over_several_tiles_are_right(backend, layout, size, stride):
    layer = SparseConv2d.random(160, 160, 3, density=0.9, padding=1, stride=stride)
    place, inputs = LAYOUTS[layout], [stride * length for length in size]
    assert_right(layer, place(torch.randn(3, 160, *inputs)), place(torch.randn(3, 160, *size)))


@pytest.mark.parametrize("size", SIZES)
def test_every_width_batch_and_channel_count_is_right(backend, size):
    for layout in ("plain", "batch_last"):
        place = LAYOUTS[layout]
        layer = SparseConv2d.random(4, 5, 3, density=0.3, padding=1)
        assert_right(layer, place(torch.randn(2, 4, 2, size)), place(torch.randn(2, 5, 2, size)))
        assert_right(layer, place(torch.randn(size, 4, 3, 2)), place(torch.randn(size, 5, 3, 2)))
        layer = SparseConv2d.random(size, 7, 1, density=0.3)
        assert_right(layer, place(torch.randn(3, size, 3, 3)), place(torch.randn(3, 7, 3, 3)))
        layer = SparseConv2d.random(7, size, 1, density=0.3)
        assert_right(layer, place(torch.randn(3, 7, 3, 3)), place(torch.randn(3, size, 3, 3)))


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("name", ["3x3", "pointwise", "depthwise", "3-D"])
def test_every_density_is_right(backend, density, name):
    assert_right(*make(name, density))


@pytest.mark.parametrize("where", ["rows", "columns", "all but one", "one full row"])
def test_lopsided_patterns_are_right(backend, where):
    mask = torch.rand(8, 6, 3, 3) < 0.4
    if where == "rows":
        mask[[0, 3, 7]] = False
    elif where == "columns":
        mask[:, [0, 1, 5]] = False
    else:
        mask[:] = False
        mask[5, slice(None) if where == "one full row" else 3, 1, 1] = True
    layer = SparseConv2d.from_mask(mask, padding=1)
    assert_right(layer, torch.randn(2, 6, 5, 6), torch.randn(2, 8, 5, 6))


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("name", ["3x3", "reflect"])
def test_partial_gradients(backend, needs, name):
    assert_right(*make(name), needs)


@pytest.mark.parametrize("name", ["3x3", "1-D", "3-D"])
def test_unbatched_inputs_and_empty_batches(backend, name):
    layer, x, grad = make(name)
    assert_right(layer, x[0], grad[0])
    assert_right(layer, x[:0], grad[:0])
    assert_right(layer, x, None)


@pytest.mark.parametrize("name", ["3x3 stride 2", "1-D", "3-D"])
def test_the_layout_of_the_input_is_handed_on_and_back(backend, name):
    layer, x, _ = make(name)
    for layout in ("plain", "channels_last", "batch_last"):
        placed = LAYOUTS[layout](x).requires_grad_()
        out = layer(placed)
        assert out.stride() == LAYOUTS[layout](out.detach()).stride(), layout
        (grad_x,) = torch.autograd.grad(out.sum(), placed)
        assert grad_x.stride() == placed.stride(), layout
    assert layer(in_order(x, range(x.dim()))[:, :, 1:]).is_contiguous()


@pytest.mark.parametrize("name", CONVS)
def test_from_dense_and_back_keep_weights_and_options(name):
    dims, in_channels, out_channels, kernel, _, options = CONVS[name]
    dense = DENSE[dims](in_channels, out_channels, kernel, **options).eval()
    prune.random_unstructured(dense, "weight", 0.6)
    dense.bias.requires_grad_(False)
    back = SPARSE[dims].from_dense(dense).to_dense()
    prune.remove(dense, "weight")
    assert type(back) is type(dense)
    assert repr(back) == repr(dense)
    assert back.training is False
    assert torch.equal(back.weight, dense.weight)
    assert back.weight.requires_grad
    assert torch.equal(back.bias, dense.bias)
    assert not back.bias.requires_grad


def test_a_pruning_mask_that_scales_counts():
    dense = nn.Conv2d(3, 4, 3)
    prune.custom_from_mask(dense, "weight", torch.rand_like(dense.weight).mul(3).floor() / 2)
    assert torch.equal(SparseConv2d.from_dense(dense).weight, dense.weight)


@pytest.mark.parametrize("name", WRONG_CONVS)
def test_wrong_options_are_refused(name):
    (dims, *arguments), options, message = WRONG_CONVS[name]
    with pytest.raises(SparsePropError) as error:
        SPARSE[dims].random(*arguments, density=0.5, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("name", WRONG_CONV_INPUTS)
def test_wrong_inputs_are_refused(name):
    x, message = WRONG_CONV_INPUTS[name]
    with pytest.raises(SparsePropError) as error:
        SparseConv2d.random(3, 4, 3, density=0.5)(x)
    assert message in str(error.value)


def test_masks_of_other_dimensions_are_refused():
    with pytest.raises(SparsePropError, match=r"mask must have 4 dimensions .* got shape \(3, 3\)"):
        SparseConv2d.from_mask(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(SparsePropError, match=r"expected a plain torch.nn.Conv2d, got Conv1d"):
        SparseConv2d.from_dense(nn.Conv1d(2, 2, 1))


def test_nm_patterns_are_checked_along_the_input_channels_at_each_kernel_position():
    mask = torch.zeros(2, 8, 3, 3, dtype=torch.bool)
    mask[:, ::2] = True
    dense = nn.Conv2d(8, 2, 3)
    assert SparseConv2d.from_dense(dense, mask=mask, pattern="2:4").nnz == 72
    mask[1, 1, 2, 2] = True
    with pytest.raises(SparsePropError, match="not 2:4: 1 groups of 4"):
        SparseConv2d.from_dense(dense, mask=mask, pattern="2:4")


def test_repr_shows_what_differs_from_the_defaults():
    layer = SparseConv2d.random(4, 6, 3, density=0.5, padding="same", groups=2)
    assert repr(layer) == (
        "SparseConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding='same', groups=2, bias=True, "
        "nnz=54, density=0.5)"
    )


def test_results_are_bitwise_repeatable_and_two_threads_are_right(backend, two_threads):
    layer = SparseConv2d.random(32, 48, 3, density=0.2, padding=1)
    for layout in ("plain", "batch_last"):
        x, grad = LAYOUTS[layout](torch.randn(17, 32, 9, 9)), LAYOUTS[layout](torch.randn(17, 48, 9, 9))
        assert_right(layer, x, grad)
        first, second = run(layer, x, grad), run(layer, x, grad)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def poisoned_memory():
    """New tensors hold NaN, so that no element can be right by chance."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("isa", available_isas())
def test_strided_layers_write_every_input_gradient(poisoned_memory, isa, kernel, stride):
    assert torch.utils.deterministic.fill_uninitialized_memory
    for padding, height, width in itertools.product(range(kernel), (1, 2, 3, 5, 8), (1, 2, 3, 4, 7, 8, 67)):
        if min(height, width) + 2 * padding < kernel:
            continue
        torch.manual_seed(0)
        options = {"stride": stride, "padding": padding, "bias": False, "dtype": torch.float64}
        layer = SparseConv2d.random(4, 6, kernel, density=0.4, **options)
        x = torch.randn(3, 4, height, width, dtype=torch.float64, requires_grad=True)
        grad = torch.randn_like(layer(x))
        with running(isa):
            found = torch.autograd.grad(layer(x), x, grad)[0]
        wanted = torch.autograd.grad(layer.to_dense()(x), x, grad)[0]
        assert torch.allclose(found, wanted), (padding, height, width)
