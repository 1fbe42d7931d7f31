"""The reference loops, against the definition written out in dense float64 torch."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from sparseprop import reference

KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def five(x):
    return [*x.stride()]


def contraction(mask, groups=1, stride=(1, 1, 1), dilation=(1, 1, 1)):
    flat = mask.reshape(len(mask), -1).numpy()
    row_ptr = np.concatenate([[0], np.cumsum(flat.sum(1))]).astype(np.int64)
    col_idx = np.nonzero(flat)[1].astype(np.int32)
    return reference.Contraction(
        len(mask), mask.shape[1] * groups, groups, mask.shape[2:], stride, dilation, row_ptr, col_idx
    )


def short_numbers(shape, dtype):
    """Random multiples of 1/64: their products sum up exactly in float64, in any order."""
    return ((64 * torch.randn(shape)).round() / 64).to(dtype)


@pytest.mark.parametrize("dtype", KINDS)
def test_all_contractions_are_the_dense_ones_at_the_mask(dtype):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    stride, dilation, padding, groups = (2, 1, 1), (1, 2, 1), (1, 0, 2), 2
    mask = torch.rand(4, 3, 2, 2, 3) < 0.5
    twin = contraction(mask, groups, stride, dilation)
    assert twin.nnz == mask.sum()
    x, bias = short_numbers((2, 6, 5, 4, 6), dtype), short_numbers((4,), wide)
    weight = torch.where(mask, short_numbers(mask.shape, wide), 0)
    values = weight[mask]
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    out = functional.conv3d(*exact, stride, padding, dilation, groups)
    grad = short_numbers(out.shape, dtype)
    exact_grads = torch.autograd.grad(out, exact, grad.double())

    ours = torch.empty(out.shape, dtype=dtype)
    shared = (KINDS[dtype], 2, x.shape[2:], padding, out.shape[2:], x.data_ptr(), five(x), values.data_ptr())
    twin.forward(*shared, bias.data_ptr(), ours.data_ptr(), five(ours))
    grads = torch.empty_like(x), torch.empty_like(values), torch.empty_like(bias)
    addresses = [tensor.data_ptr() for tensor in grads]
    twin.backward(
        *shared, grad.data_ptr(), five(grad), addresses[0], five(grads[0]), addresses[1], addresses[2]
    )
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(ours.double(), out.detach(), **close)
    torch.testing.assert_close(grads[0].double(), exact_grads[0], **close)
    close = {"rtol": 2 * torch.finfo(wide).eps, "atol": 4 * torch.finfo(wide).eps}
    torch.testing.assert_close(grads[1].double(), exact_grads[1][mask], **close)
    torch.testing.assert_close(grads[2].double(), exact_grads[2], **close)


def test_bfloat16_rounds_to_nearest_even_like_torch():
    exact = torch.randn(1000).double() * torch.logspace(-30, 30, 1000).double()
    exact[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    stored = torch.empty(1000, dtype=torch.bfloat16)
    reference._store(stored.view(torch.uint16).numpy(), exact.numpy())
    assert torch.equal(stored[1:], exact.float().bfloat16()[1:])
    assert stored[0].isnan()


def test_what_is_not_wanted_is_not_touched():
    mask = torch.ones(2, 3, 1, 1, 1, dtype=torch.bool)
    values, grad = torch.randn(6), torch.randn(4, 2)
    grad_x = torch.empty(4, 3)
    strides, ones = (3, 1, 0, 0, 0), (1, 1, 1)
    contraction(mask).backward(
        0, 4, ones, (0, 0, 0), ones, 0, strides, values.data_ptr(), grad.data_ptr(), (2, 1, 0, 0, 0),
        grad_x.data_ptr(), strides, 0, 0,
    )  # fmt: skip
    torch.testing.assert_close(grad_x, grad @ values.view(2, 3))
