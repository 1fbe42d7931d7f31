import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from cases import SIZES, WRONG_LINEAR_INPUTS
from checks import LAYOUTS, NEEDS, assert_right, run
from sparseprop import SparsePropError, SparsityPattern
from sparseprop.nn import SparseLinear


def random_layer(in_features=33, out_features=17, density=0.3, **options):
    return SparseLinear.random(in_features, out_features, density=density, **options)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_right_as_input_output_and_batch(backend, size):
    assert_right(random_layer(size, 31), torch.randn(5, size), torch.randn(5, 31))
    assert_right(random_layer(31, size), torch.randn(5, 31), torch.randn(5, size))
    for layout in ("plain", "batch_last"):
        x, grad = (LAYOUTS[layout](torch.randn(size, width)) for width in (33, 17))
        assert_right(random_layer(), x, grad)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.02, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_density_is_right(backend, density, dtype):
    layer = random_layer(64, 48, density, dtype=dtype)
    assert_right(layer, torch.randn(9, 64, dtype=dtype), torch.randn(9, 48, dtype=dtype))


@pytest.mark.parametrize("empty", ["rows", "columns", "all but one", "one full row"])
@pytest.mark.parametrize("batch", [6, 40])
def test_lopsided_patterns_are_right(backend, empty, batch):
    mask = torch.rand(20, 40) < 0.5
    if empty == "rows":
        mask[[0, 3, 19]] = False
    elif empty == "columns":
        mask[:, [0, 1, 39]] = False
    else:
        mask[:] = False
        mask[7, slice(None) if empty == "one full row" else 11] = True
    assert_right(SparseLinear.from_mask(mask), torch.randn(batch, 40), torch.randn(batch, 20))


@pytest.mark.parametrize("batch", [1, 3, 8, 20, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_reaches_only_where_weights_are(backend, batch, dtype):
    mask = torch.rand(21, 37) < 0.6
    layer = SparseLinear.from_mask(mask, dtype=dtype)
    x, grad = torch.randn(batch, 37, dtype=dtype), torch.randn(batch, 21, dtype=dtype)
    x[0, 5], grad[0, 7] = torch.inf, torch.nan
    result = run(layer, x, grad)
    assert torch.equal(result["out"][0].isfinite(), ~mask[:, 5])
    assert torch.equal(result["grad_x"][0].isfinite(), ~mask[7])
    row, column = mask.nonzero().unbind(1)
    assert torch.equal(result["grad_weight"].isfinite(), (row != 7) & (column != 5))
    for name in ("out", "grad_x"):
        assert result[name][1:].isfinite().all()


@pytest.mark.parametrize("shape", [(33,), (1, 33), (4, 33), (2, 3, 33), (2, 1, 3, 33), (0, 33), (2, 0, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_dimensions(backend, shape, bias):
    assert_right(random_layer(bias=bias), torch.randn(shape), torch.randn(*shape[:-1], 17))


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(6,), (2, 3)])
def test_any_strides_of_input_and_gradient(backend, x_layout, grad_layout, leading):
    x, grad = LAYOUTS[x_layout](torch.randn(*leading, 33)), LAYOUTS[grad_layout](torch.randn(*leading, 17))
    assert_right(random_layer(), x, grad)


@pytest.mark.parametrize("needs", NEEDS)
def test_partial_gradients(backend, needs):
    assert_right(random_layer(), torch.randn(6, 33), torch.randn(6, 17), needs)


def test_the_broadcast_gradient_of_a_sum_is_right(backend):
    assert_right(random_layer(), torch.randn(6, 33), None)


def test_feature_major_input_gives_feature_major_output_and_gradient(backend):
    layer, x = random_layer(), torch.randn(33, 6).t().requires_grad_()
    out = layer(x)
    assert out.stride() == (1, 6)
    (grad_x,) = torch.autograd.grad(out.sum(), x)
    assert grad_x.stride() == x.stride()
    assert layer(x.contiguous()).is_contiguous()
    folded = torch.randn(33, 6).view(33, 2, 3).permute(1, 2, 0)
    assert layer(folded).stride() == (3, 1, 6)


@pytest.mark.parametrize("sizes", [(0, 4), (5, 0)])
def test_layers_without_inputs_or_outputs(backend, sizes):
    layer = random_layer(*sizes, density=1.0)
    x = torch.randn(3, sizes[0], requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == (3, sizes[1])
    assert x.grad.shape == x.shape
    assert sizes[1] == 0 or torch.equal(out, layer.bias.expand(3, -1))


def test_values_of_any_strides_are_read_right(backend):
    layer, x = random_layer(), torch.randn(4, 33)
    wanted = layer(x)
    spread = torch.randn(2 * layer.nnz + 1)
    spread[1::2] = layer.weight_values.detach()
    out = torch.func.functional_call(layer, {"weight_values": spread[1::2]}, (x,))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", WRONG_LINEAR_INPUTS)
def test_wrong_inputs_are_refused(name):
    x, message = WRONG_LINEAR_INPUTS[name]
    with pytest.raises(SparsePropError) as error:
        SparseLinear.random(5, 4, density=0.5)(x)
    assert message in str(error.value)


def test_from_dense_takes_the_non_zeros_and_keeps_the_settings():
    dense = nn.Linear(20, 10).double().eval().requires_grad_(False)
    dense.weight[torch.rand(10, 20) < 0.7] = 0
    layer = SparseLinear.from_dense(dense)
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer.mask, dense.weight != 0)
    assert not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.weight_values.data_ptr() != dense.weight.data_ptr()
    back = layer.to_dense()
    assert type(back) is nn.Linear
    assert not back.training
    assert back.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(back.state_dict()[key], entry) for key, entry in dense.state_dict().items())
    assert [p.requires_grad for p in back.parameters()] == [False, False]


def test_from_dense_obeys_a_mask_before_a_pruning_mask_before_the_zeros():
    dense = nn.Linear(8, 4)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, ::2] = True
    with torch.no_grad():
        dense.weight[0, 0] = 0
    assert SparseLinear.from_dense(dense).nnz == 31
    assert torch.equal(
        SparseLinear.from_dense(dense, mask=mask).mask, mask
    )  # the zero inside stays trainable
    prune.l1_unstructured(dense, "weight", 0.5)
    pruned = SparseLinear.from_dense(dense)
    assert torch.equal(pruned.mask, dense.weight_mask.bool())
    assert torch.equal(pruned.weight, dense.weight)
    assert torch.equal(SparseLinear.from_dense(dense, mask=mask).weight[mask], dense.weight_orig[mask])


def _hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


def _parametrized():
    return nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))


LINEAR = nn.Linear(4, 4)
EYE = torch.eye(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseLinear.from_dense(nn.Conv1d(2, 2, 1)), "expected a plain torch.nn.Linear, got Conv1d"),
        (lambda: SparseLinear.from_dense(nn.Bilinear(2, 2, 1)), "got Bilinear"),
        (
            lambda: SparseLinear.from_dense(nn.MultiheadAttention(4, 1).out_proj),
            "got NonDynamicallyQuantizable",
        ),
        (lambda: SparseLinear.from_dense(_hooked()), "has hooks"),
        (lambda: SparseLinear.from_dense(_parametrized()), "is parametrized"),
        (lambda: SparseLinear.from_dense(nn.Linear(4, 4).half()), "float32 or float64, got torch.float16"),
        (lambda: SparseLinear.from_dense(nn.Linear(4, 4, device="meta")), "on the CPU, got meta"),
        (
            lambda: SparseLinear.from_dense(LINEAR, mask=EYE.float() * float("nan")),
            "must be a bool tensor, got torch.f",
        ),
        (
            lambda: SparseLinear.from_dense(LINEAR, mask=EYE[:3]),
            "must have the weight's shape (4, 4), got (3, 4)",
        ),
        (lambda: SparseLinear.from_dense(LINEAR, pattern="2:4"), "the weight is not 2:4: 4 groups of 4"),
        (lambda: SparseLinear.from_dense(LINEAR, pattern="4:2"), "'N:M' with 0 < N <= M"),
        (lambda: SparseLinear.from_dense(LINEAR, pattern="two"), "'N:M' with 0 < N <= M"),
        (lambda: SparseLinear.from_mask(EYE, weight=torch.ones(4, 3)), "weight must have the shape of mask"),
        (lambda: SparseLinear.from_mask(EYE, bias=torch.ones(3)), "bias must have shape (4,), got (3,)"),
        (lambda: SparseLinear.from_mask(EYE[0]), "mask must have 2 dimensions"),
        (lambda: SparseLinear.random(4, 4, density=-0.1), "density must lie between 0 and 1"),
        (
            lambda: SparseLinear.random(4, 4, density=0.5, dtype=torch.float16),
            "float32 or torch.float64, got",
        ),
        (lambda: SparseLinear(-1, 4), "in_features must be an integer of at least 0, got -1"),
        (lambda: SparseLinear(4, 4, pattern=SparsityPattern.random(4, 5, nnz=1)), "pattern must be 4 x 4"),
    ],
)
def test_wrong_construction_is_refused(make, message):
    with pytest.raises(SparsePropError) as error:
        make()
    assert message in str(error.value)


def test_nm_patterns_are_checked_along_the_inputs():
    mask = torch.tensor([True, False, False, True] * 2).expand(3, 8)
    dense = nn.Linear(8, 3)
    assert SparseLinear.from_dense(dense, mask=mask, pattern="2:4").nnz == 12
    with pytest.raises(SparsePropError, match="not 1:4: 6 groups"):
        SparseLinear.from_dense(dense, mask=mask, pattern="1:4")
    ragged = torch.tensor([True, False, False, True, True, True]).expand(3, 6)
    assert SparseLinear.from_dense(nn.Linear(6, 3), mask=ragged, pattern="2:4").nnz == 12


def test_from_mask_takes_weight_and_bias_as_given():
    mask, weight, bias = torch.rand(5, 9) < 0.4, torch.randn(5, 9), torch.randn(5)
    layer = SparseLinear.from_mask(mask, weight=weight, bias=bias)
    assert torch.equal(layer.weight, weight * mask)
    assert torch.equal(layer.bias, bias)
    assert SparseLinear.from_mask(mask, bias=False).bias is None


def test_random_initialisation_scales_with_each_rows_non_zeros():
    mask = torch.zeros(2, 10_000, dtype=torch.bool)
    mask[0, :16] = mask[1] = True
    layer = SparseLinear.from_mask(mask)
    narrow, wide = layer.weight_values[:16].abs().max(), layer.weight_values[16:].abs().max()
    assert 0.1 < narrow <= 0.25
    assert 0.0095 < wide <= 0.01
    assert layer.bias[1].abs() <= 0.01
    assert SparseLinear.from_mask(torch.zeros(3, 4, dtype=torch.bool)).bias.tolist() == [0, 0, 0]


def test_random_is_repeatable_with_a_generator():
    one, two = (random_layer(generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert one.pattern == two.pattern
    assert torch.equal(one.weight_values, two.weight_values)
    assert torch.equal(one.bias, two.bias)


def test_attributes_and_repr_describe_the_layer():
    layer = random_layer(20, 10, 0.25, bias=False)
    assert (layer.in_features, layer.out_features, layer.nnz, layer.density) == (20, 10, 50, 0.25)
    assert repr(layer) == "SparseLinear(in_features=20, out_features=10, bias=False, nnz=50, density=0.25)"
    assert not isinstance(layer, nn.Linear)
    assert dict(layer.named_parameters()).keys() == {"weight_values"}


def test_the_dense_view_is_differentiable_and_read_only():
    layer = random_layer()
    grad = torch.randn(17, 33)
    layer.weight.backward(grad)
    assert torch.equal(layer.weight_values.grad, grad[layer.mask])
    for value in (torch.zeros(17, 33), nn.Parameter(torch.zeros(17, 33))):
        with pytest.raises(SparsePropError, match="read-only view; write to `weight_values`"):
            layer.weight = value


def test_results_are_bitwise_repeatable_and_two_threads_are_right(backend, two_threads):
    layer, x, grad = random_layer(256, 192, 0.2), torch.randn(65, 256), torch.randn(65, 192)
    assert_right(layer, x, grad)
    first, second = run(layer, x, grad), run(layer, x, grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_layer_of_a_hundred_billion_entries_trains(backend):
    layer = SparseLinear.random(1_000_000, 100_000, density=1e-6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(8, 1_000_000)
    loss = layer(x).square().mean()
    loss.backward()
    optimizer.step()
    assert layer.nnz == 100_000
    assert layer(x).square().mean() < loss
