import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from cases import CONVS
from sparseprop import SparsePropError, SparsityPattern, ops
from sparseprop.geometry import Geometry

GEOMETRIES = {
    "linear": (Geometry.linear(7, 5), ()),
    **{
        name: (Geometry.conv(dims, in_channels, out_channels, kernel, **options), size)
        for name, (dims, in_channels, out_channels, kernel, size, options) in CONVS.items()
        if name in ("rectangular", "depthwise", "1-D", "3-D", "circular")
    },
}


def operands(geometry, size, density=0.4, batch=2, dtype=torch.float64):
    pattern = SparsityPattern.random(geometry.out_channels, geometry.cols, density=density)
    x = torch.randn(batch, geometry.in_channels, *size, dtype=dtype, requires_grad=True)
    values = torch.randn(pattern.nnz, dtype=dtype, requires_grad=True)
    bias = torch.randn(geometry.out_channels, dtype=dtype, requires_grad=True)
    return pattern, (x, values, bias)


def function_of(geometry, pattern):
    def apply(x, values, bias=None):
        indices = (pattern.row_ptr, pattern.col_idx)
        if geometry.dims:
            return ops.sparse_conv(x, values, *indices, geometry, bias)
        return ops.sparse_linear(x, values, *indices, geometry.in_channels, bias)

    return apply


@pytest.mark.parametrize("name", GEOMETRIES)
def test_signs_that_are_not_resolved_yet_count(backend, name):
    geometry, size = GEOMETRIES[name]
    pattern, (x, values, bias) = operands(geometry, size)
    function = function_of(geometry, pattern)
    negative = [torch._neg_view(each.detach()).requires_grad_() for each in (x, values, bias)]
    plain = [each.detach().neg().requires_grad_() for each in (x, values, bias)]
    results = [torch.autograd.grad(function(*each).square().sum(), each) for each in (negative, plain)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_first_and_second_derivatives(backend, name):
    geometry, size = GEOMETRIES[name]
    if name == "depthwise":  # finite differences of a smaller one
        size = (3, 3)
    pattern, inputs = operands(geometry, size, batch=1)
    function = function_of(geometry, pattern)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_derivatives_in_full_and_with_odd_layouts(backend):
    geometry = Geometry.conv(2, 2, 4, (2, 1), stride=(1, 2), padding=(1, 0), groups=2)
    pattern, (x, values, bias) = operands(geometry, (3, 4), density=0.7)
    for order in ((1, 2, 3, 0), (0, 2, 3, 1)):
        back = [order.index(dim) for dim in range(4)]
        placed = x.detach().permute(order).contiguous().permute(back).requires_grad_()
        assert gradcheck(function_of(geometry, pattern), (placed, values, bias))
        assert gradgradcheck(function_of(geometry, pattern), (placed, values, bias))


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a or b or c])
def test_second_derivatives_for_every_choice_of_what_needs_a_gradient(backend, needs):
    geometry, size = GEOMETRIES["linear"]
    pattern, inputs = operands(geometry, size)
    for tensor, need in zip(inputs, needs, strict=True):
        tensor.requires_grad_(bool(need))
    assert gradcheck(function_of(geometry, pattern), inputs)
    assert gradgradcheck(function_of(geometry, pattern), inputs)


def test_a_gradient_penalty_trains(backend):
    geometry, size = GEOMETRIES["rectangular"]
    pattern, (x, values, bias) = operands(geometry, size, dtype=torch.float32)
    out = function_of(geometry, pattern)(x, values, bias)
    (grad_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    grad_x.square().sum().backward()
    dense = torch.zeros(geometry.numel).index_put((pattern.flat_index(),), values.detach())
    weight = dense.view(geometry.weight_shape).requires_grad_()
    left = [side[0] for side in geometry.padding]
    out = torch.nn.functional.conv2d(x, weight, bias, geometry.stride, left, geometry.dilation)
    (grad_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    grads = torch.autograd.grad(grad_x.square().sum(), (weight, bias))
    wanted = grads[0].flatten()[pattern.flat_index()]
    torch.testing.assert_close(values.grad, wanted, rtol=1e-4, atol=1e-3 * wanted.abs().max().item())
    torch.testing.assert_close(bias.grad, grads[1], rtol=1e-4, atol=1e-3 * grads[1].abs().max().item())


@pytest.mark.parametrize("name", ["linear", "rectangular", "1-D", "3-D"])
@pytest.mark.parametrize("layout", ["plain", "batch_last", "channels_last"])
def test_registered_operators_obey_their_contract(name, layout):
    from checks import LAYOUTS

    geometry, size = GEOMETRIES[name]
    pattern, (x, values, bias) = operands(geometry, size, dtype=torch.float32)
    x = LAYOUTS[layout](x.detach()).requires_grad_()
    indices = (pattern.row_ptr, pattern.col_idx, geometry.to_ints())
    opcheck(ops.traced.contract, (x, values, bias, *indices))
    opcheck(ops.traced.contract, (x.detach(), values, None, *indices))
    grad = ops.traced.contract(x, values, None, *indices).detach().requires_grad_()
    for needs in ((True, True), (True, False), (False, True)):
        opcheck(ops.traced.contract_backward, (grad, x, values, *indices, *needs))


@pytest.mark.parametrize("name", ["linear", "rectangular"])
def test_registered_operators_differentiate_twice(backend, name):
    geometry, size = GEOMETRIES[name]
    pattern, inputs = operands(geometry, size)
    indices = (pattern.row_ptr, pattern.col_idx, geometry.to_ints())

    def function(x, values, bias):
        return ops.traced.contract(x, values, bias, *indices)

    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_meta_tensors_give_shapes_without_computing():
    geometry, size = GEOMETRIES["rectangular"]
    pattern, (x, values, bias) = operands(geometry, size)
    out = function_of(geometry, pattern)(x, values, bias)
    meta = [tensor.detach().to("meta") for tensor in (x, values, bias)]
    indices = SparsityPattern(
        pattern.rows, pattern.cols, pattern.row_ptr.to("meta"), pattern.col_idx.to("meta")
    )
    shape_only = function_of(geometry, indices)(*meta)
    assert (shape_only.shape, shape_only.stride(), shape_only.is_meta) == (out.shape, out.stride(), True)


def test_nothing_is_recorded_when_nothing_needs_a_gradient():
    geometry, size = GEOMETRIES["linear"]
    pattern, (x, values, bias) = operands(geometry, size)
    function = function_of(geometry, pattern)
    with torch.no_grad():
        assert function(x, values, bias).grad_fn is None
    assert function(x.detach(), values.detach(), bias.detach()).grad_fn is None
    frozen = function(x.detach(), values.detach(), bias)
    assert frozen.grad_fn.saved_tensors == (None, None)  # a bias gradient needs neither input nor values
    assert function(x, values.detach(), None).grad_fn.saved_tensors[0] is None


def test_inference_mode_works_and_its_tensors_too(backend):
    geometry, size = GEOMETRIES["linear"]
    pattern, (x, values, bias) = operands(geometry, size)
    wanted = function_of(geometry, pattern)(x, values, bias)
    with torch.inference_mode():
        assert torch.equal(function_of(geometry, pattern)(x, values, bias), wanted)
        copy = SparsityPattern(pattern.rows, pattern.cols, pattern.row_ptr.clone(), pattern.col_idx.clone())
        assert torch.equal(function_of(geometry, copy)(x, values, bias), wanted)


def test_forward_mode_is_refused_not_ignored():
    geometry, size = GEOMETRIES["linear"]
    pattern, (x, values, bias) = operands(geometry, size)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp"):
            function_of(geometry, pattern)(dual, values.detach(), bias.detach())


def test_what_outlives_a_transform_of_functorch_is_read(backend):
    geometry = Geometry.linear(7, 5)
    pattern, (x, values, bias) = operands(geometry, ())
    apply = function_of(geometry, pattern)
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(x.detach())
    assert torch.equal(apply(left[0], values, bias), apply(x, values, bias))


def test_lazily_negated_tensors_are_read_with_their_sign(backend):
    geometry, size = GEOMETRIES["linear"]
    pattern, (x, values, bias) = operands(geometry, size)
    function = function_of(geometry, pattern)
    negated = torch.complex(torch.zeros_like(x), x).detach().conj().imag
    assert negated.is_neg()
    assert torch.equal(function(negated, values, bias), function(-x, values, bias))


def test_operators_are_kept_while_the_pattern_stays_the_same():
    geometry, _ = GEOMETRIES["linear"]
    pattern, _ = operands(geometry, ())
    first = ops.operator_for(geometry, pattern.row_ptr, pattern.col_idx)
    assert ops.operator_for(geometry, pattern.row_ptr, pattern.col_idx) is first
    assert ops.operator_for(Geometry.linear(7, 5), pattern.row_ptr, pattern.col_idx) is first
    pattern.col_idx.copy_(pattern.col_idx.clone())
    assert ops.operator_for(geometry, pattern.row_ptr, pattern.col_idx) is not first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, v, b: (x, v[:-1], b), "one entry per column index, got shapes (13,) and (14,)"),
        (lambda x, v, b: (x, v, b[:-1]), "bias must have shape (5,) and dtype torch.float64, got (4,)"),
        (
            lambda x, v, b: (x, v, b.float()),
            "bias must have shape (5,) and dtype torch.float64, got (5,) and torch.f",
        ),
        (lambda x, v, b: (x.long(), v, b), "same dtype, got torch.int64 and torch.float64"),
        (lambda x, v, b: (x, v.half(), b), "float32 or float64, got weight values of torch.float16"),
        (lambda x, v, b: (x.bfloat16(), v.bfloat16(), b), "got weight values of torch.bfloat16"),
        (lambda x, v, b: (x.long(), v.long(), b), "float32 or float64, got weight values of torch.int64"),
    ],
)
def test_wrong_operands_are_refused(change, message):
    geometry, size = GEOMETRIES["linear"]
    pattern, inputs = operands(geometry, size)
    with pytest.raises(SparsePropError) as error:
        function_of(geometry, pattern)(*change(*(tensor.detach() for tensor in inputs)))
    assert message in str(error.value)


def test_broken_indices_never_reach_a_kernel():
    geometry, _ = GEOMETRIES["linear"]
    row_ptr, col_idx = torch.tensor([0, 1, 1, 1, 1, 1]), torch.tensor([7], dtype=torch.int32)
    with pytest.raises(SparsePropError, match="col_idx is out of range"):
        ops.sparse_linear(torch.zeros(2, 7), torch.zeros(1), row_ptr, col_idx, geometry.in_channels)
