"""Attention by our kernels: torch's results and gradients, on heads of any length, mask and layout."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from checks import running
from sparseprop import _native
from sparseprop.backend import available_isas
from sparseprop.ops.attention import attention

# batch, heads, queries, keys, width, width of values
SIZES = [
    (1, 1, 1, 1, 16, 16),
    (2, 3, 7, 5, 32, 32),
    (2, 2, 17, 33, 48, 16),
    (1, 3, 128, 128, 64, 64),
    (1, 2, 197, 197, 64, 64),
    (1, 2, 50, 600, 80, 96),
    (1, 1, 600, 50, 16, 112),
]


def bool_mask(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True  # no query without a key
    return mask


MASKS = {
    "none": lambda b, h, n, m: None,
    "bool": lambda b, h, n, m: bool_mask((b, h, n, m)),
    "bias": lambda b, h, n, m: torch.randn(b, h, n, m),
    "padding": lambda b, h, n, m: bool_mask((b, 1, 1, m)),
    "shared": lambda b, h, n, m: torch.randn(n, m),
    "expanded": lambda b, h, n, m: bool_mask((b, 1, 1, m)).expand(b, 1, n, m),
    "strided": lambda b, h, n, m: torch.randn(m, n).t(),
}


def tensors(size: tuple[int, ...]) -> tuple[Tensor, ...]:
    b, h, n, m, width, value_width = size
    shapes = ((b, h, n, width), (b, h, m, width), (b, h, m, value_width), (b, h, n, value_width))
    return tuple(torch.randn(shape) for shape in shapes)


def run(function, q, k, v, grad, **options) -> tuple[Tensor, ...]:
    """Output and gradients; in the dtype of `grad`."""
    inputs = [x.detach().to(grad.dtype).requires_grad_() for x in (q, k, v)]
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype is not torch.bool:
        options["attn_mask"] = mask.to(grad.dtype)
    out = function(*inputs, **options)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


def plain_torch(*args, **options) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(*args, **options)


def assert_right(q, k, v, grad, **options) -> None:
    """No further from float64 than torch's own float32, but for a few roundings of the largest element."""
    found = run(attention, q, k, v, grad, **options)
    torchs = run(plain_torch, q, k, v, grad, **options)
    truth = run(plain_torch, q, k, v, grad.double(), **options)
    for ours, dense, true in zip(found, torchs, truth, strict=True):
        slack = 8 * torch.finfo(torch.float32).eps * float(true.abs().max())
        assert float((ours - true).abs().max()) <= 2 * float((dense - true).abs().max()) + slack


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_against_float64(isa, size, mask, used):
    with running(isa):
        assert_right(*tensors(size), attn_mask=MASKS[mask](*size[:4]))
    assert used


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_causal_and_scale(isa, size, scale, used):
    with running(isa):
        assert_right(*tensors(size), is_causal=True, scale=scale)
    assert used


def from_one_layer(x: Tensor) -> Tensor:
    """As a layer for queries, keys and values at once leaves them."""
    b, h, n, width = x.shape
    whole = torch.empty(b, n, 3, h, width)
    part = whole.permute(2, 0, 3, 1, 4)[1]
    return part.copy_(x)


LAYOUTS = {
    "from one layer": from_one_layer,
    "width not last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:, :1].expand_as(x),
    "negated": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, used):
    q, k, v, grad = map(LAYOUTS[layout], tensors((2, 3, 19, 35, 32, 48)))
    assert_right(q, k, v, grad)
    assert used


def test_heads_lie_side_by_side_in_the_result():
    q, k, v, _ = tensors((2, 3, 5, 7, 16, 32))
    assert attention(q, k, v).transpose(1, 2).is_contiguous()


def test_a_query_without_keys_gives_zero_as_in_torch():
    q, k, v, grad = tensors((1, 2, 9, 20, 16, 16))
    mask = torch.rand(9, 20) < 0.5
    mask[4] = False
    found, torchs = (run(f, q, k, v, grad, attn_mask=mask) for f in (attention, plain_torch))
    assert not found[0][:, :, 4].any()
    for one, other in zip(found, torchs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_where_torch_has_it(bad):
    q, k, v, _ = tensors((1, 2, 9, 20, 16, 16))
    q[0, 0, 3, 5] = bad
    v[0, 1, 2, 1] = bad
    torch.testing.assert_close(attention(q, k, v), plain_torch(q, k, v), equal_nan=True)


def test_large_scores_do_not_overflow():
    q, k, v, grad = tensors((1, 1, 20, 30, 16, 16))
    assert_right(q * 300, k * 300, v, grad)


def test_second_derivatives():
    q, k, v, grad = tensors((1, 2, 5, 6, 16, 16))

    def twice(function, dtype, **options):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        first = torch.autograd.grad(function(*inputs, **options), inputs, grad.to(dtype), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), inputs)

    for options in ({}, {"is_causal": True}, {"attn_mask": bool_mask((5, 6))}):
        found = twice(attention, torch.float32, **options)
        truth = twice(plain_torch, torch.float64, **options)
        for one, other in zip(found, truth, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_gradients_that_nobody_needs():
    q, k, v, grad = tensors((1, 2, 9, 20, 16, 16))
    k.requires_grad_()
    attention(q, k, v).backward(grad)
    truth = run(plain_torch, q, k, v, grad)
    torch.testing.assert_close(k.grad, truth[2])
    assert q.grad is None
    assert v.grad is None


def test_results_do_not_depend_on_threads_or_time(two_threads):
    q, k, v, grad = tensors((2, 4, 64, 64, 32, 32))
    both = [run(attention, q, k, v, grad) for _ in range(2)]
    torch.set_num_threads(1)
    both.append(run(attention, q, k, v, grad))
    assert all(all(map(torch.equal, both[0], other)) for other in both[1:])


LEFT_TO_TORCH = {
    "float64": lambda q, k, v: ((q.double(), k.double(), v.double()), {}),
    "bfloat16": lambda q, k, v: ((q.bfloat16(), k.bfloat16(), v.bfloat16()), {}),
    "width": lambda q, k, v: ((q[..., :20], k[..., :20], v), {}),
    "three dimensions": lambda q, k, v: ((q[0], k[0], v[0]), {}),
    "grouped queries": lambda q, k, v: ((q, k[:, :2], v[:, :2]), {"enable_gqa": True}),
    "dropout": lambda q, k, v: ((q, k, v), {"dropout_p": 0.5}),
    "long": lambda q, k, v: ((q, k.repeat(1, 1, 100, 1), v.repeat(1, 1, 100, 1)), {}),
    "mask and causal": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(9, 20), "is_causal": True}),
    "learnt bias": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(9, 20, requires_grad=True)}),
    "no queries": lambda q, k, v: ((q[:, :, :0], k, v), {}),
}


@pytest.mark.parametrize("case", LEFT_TO_TORCH)
def test_the_rest_is_left_to_torch(case, used):
    arguments, options = LEFT_TO_TORCH[case](*tensors((1, 4, 9, 20, 32, 32))[:3])
    results = []
    for function in (attention, functional.scaled_dot_product_attention):
        torch.manual_seed(1)
        results.append(function(*arguments, **options))
    assert torch.equal(*results)
    assert not used


def test_autocast_is_left_to_torch(used):
    q, k, v, _ = tensors((1, 4, 9, 20, 32, 32))
    with torch.autocast("cpu"):
        assert attention(q, k, v).dtype is torch.bfloat16
    assert not used


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_are_left_to_torch(used):
    q, k, v, _ = tensors((2, 4, 9, 20, 32, 32))
    mapped = torch.func.vmap(attention)(q[:, None], k[:, None], v[:, None])
    torch.testing.assert_close(mapped[:, 0], attention(q, k, v))
    assert len(used) == 1


WRONG = {
    "mask of another size": {"attn_mask": torch.zeros(9, 19)},
    "mask of a wrong type": {"attn_mask": torch.zeros(9, 20, dtype=torch.int32)},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_get_torchs_message(case):
    q, k, v, _ = tensors((1, 4, 9, 20, 32, 32))
    messages = []
    for function in (attention, functional.scaled_dot_product_attention):
        with pytest.raises(RuntimeError) as caught:
            function(q, k, v, **WRONG[case])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("wrong", [{"width": 20}, {"keys": 0}, {"batch": -1}])
def test_the_extension_refuses_sizes_it_cannot_take(wrong):
    sizes = {"batch": 1, "heads": 1, "queries": 1, "keys": 1, "width": 16, "value_width": 16}
    with pytest.raises(ValueError, match="at least one element, and widths that are multiples of 16"):
        _native.AttentionSizes(**(sizes | wrong), scale=1.0, causal=False)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_second_derivatives_with_a_query_that_sees_no_key(kind):
    q, k, v = (tensor.requires_grad_() for tensor in tensors((1, 2, 8, 8, 16, 16))[:3])
    mask = torch.rand(8, 8) < 0.5
    mask[:, 0], mask[3] = True, False
    if kind == "float":
        mask = torch.zeros(8, 8).masked_fill(~mask, -torch.inf)
    grad = torch.randn(1, 2, 8, 16)
    plain, again = (
        torch.autograd.grad(attention(q, k, v, attn_mask=mask), (q, k, v), grad, create_graph=create)
        for create in (False, True)
    )
    for first, second in zip(plain, again, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_gradients_of_rows_that_are_far_out_as_a_whole(bias):
    q, k, v = (tensor.requires_grad_() for tensor in tensors((1, 1, 4, 6, 16, 16))[:3])
    mask = torch.zeros(4, 6)
    mask[1] = bias
    # what the bias leaves of the row's scores in float32
    scores = (q @ k.transpose(2, 3) * 0.25 + mask).detach()
    out = attention(q, k, v, attn_mask=mask, scale=0.25)
    (found,) = torch.autograd.grad(out[:, :, 1].sum(), v)
    torch.testing.assert_close(found, scores.softmax(3)[:, :, 1, :, None].expand_as(v), rtol=1e-4, atol=1e-5)
