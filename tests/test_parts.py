"""Queries, keys and values that are parts of one tensor: its gradient is written at once, or not at all."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparseprop
from sparseprop.ops.attention import attention
from sparseprop.ops.parts import in_one

BATCH, LENGTH, HEADS, WIDTH = 2, 5, 4, 16


def timm_style(whole: Tensor) -> tuple[Tensor, ...]:
    return whole.reshape(BATCH, LENGTH, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)


def chunks(whole: Tensor) -> tuple[Tensor, ...]:
    heads = [part.view(BATCH, LENGTH, HEADS, WIDTH).transpose(1, 2) for part in whole.chunk(3, -1)]
    return tuple(heads)


def heads_first(whole: Tensor) -> tuple[Tensor, ...]:
    return whole.view(BATCH, LENGTH, 3 * HEADS, WIDTH).transpose(1, 2).split(HEADS, 1)


def leaf(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, LENGTH, 3 * HEADS * WIDTH, generator=generator).requires_grad_()


def gradient(function, split, **options) -> Tensor:
    x = leaf()
    out = function(*split(x * 1.5), **options)
    return torch.autograd.grad((out * out.detach().cos()).sum(), x)[0]


@pytest.mark.parametrize("split", [timm_style, chunks, heads_first])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_the_whole_gets_the_gradients_of_its_parts(split, options):
    assert in_one(*split(leaf() * 1)) != (None, None)
    torch.testing.assert_close(
        gradient(attention, split, **options),
        gradient(functional.scaled_dot_product_attention, split, **options),
    )


def test_gradients_of_gradients():
    def twice(function) -> Tensor:
        x = leaf()
        out = function(*timm_style(x * 1.5))
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with sdpa_kernel(SDPBackend.MATH):  # torch's other one cannot be differentiated twice
        wanted = twice(functional.scaled_dot_product_attention)
    torch.testing.assert_close(twice(attention), wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_nothing_is_collected_on_the_way():
    query, key, value = timm_style(leaf() * 1)
    node = attention(query, key, value).grad_fn
    assert [before.name() for before, _ in node.next_functions if before] == ["MulBackward0"]


def test_torchs_multihead_attention_projects_to_one_tensor():
    module = sparseprop.fuse(nn.MultiheadAttention(64, 4, batch_first=True))
    x = torch.randn(2, 9, 64)
    node = module(x, x, x, need_weights=False)[0].grad_fn
    while node.name() != "_AttentionBackward":
        node = next(before for before, _ in node.next_functions if "Accumulate" not in before.name())
    assert sum(before is not None for before, _ in node.next_functions) == 1


class Reversed(torch.autograd.Function):
    """A view with a gradient of its own."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -grad


def hooked_part(whole: Tensor) -> tuple[Tensor, ...]:
    query, key, value = timm_style(whole)
    query.register_hook(lambda grad: 3 * grad)
    return query, key, value


def kept_part(whole: Tensor) -> tuple[Tensor, ...]:
    parts = timm_style(whole)
    parts[1].retain_grad()
    return parts


OTHERWISE = {
    "a gradient of its own": lambda whole: timm_style(Reversed.apply(whole)),
    "a gradient of its own, one part": lambda whole: (Reversed.apply((q := timm_style(whole))[0]), *q[1:]),
    "a hook": hooked_part,
    "a kept gradient": kept_part,
    "one part twice": lambda whole: (timm_style(whole)[0], timm_style(whole)[1], timm_style(whole)[1]),
    "another order": lambda whole: tuple(reversed(timm_style(whole))),
    "half of it": lambda whole: timm_style(torch.cat([whole, whole], 1)[:, :LENGTH]),
    "one normalized": lambda whole: (functional.normalize((q := timm_style(whole))[0], dim=3), *q[1:]),
}


@pytest.mark.parametrize("split", OTHERWISE.values(), ids=OTHERWISE.keys())
def test_what_lies_between_counts(split):
    assert in_one(*split(leaf() * 1)) == (None, None)
    torch.testing.assert_close(
        gradient(attention, split), gradient(functional.scaled_dot_product_attention, split)
    )


def test_a_leaf_has_its_parts_collected_by_autograd():
    x = leaf()
    assert in_one(*timm_style(x)) == (None, None)
    attention(*timm_style(x)).sum().backward()
    again = leaf()
    functional.scaled_dot_product_attention(*timm_style(again)).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
