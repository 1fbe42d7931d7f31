"""Scaled dot-product attention, a head at a time in the cache."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from sparseprop.ops.eligible import PLAIN_TYPES, kernels_may_read
from sparseprop.ops.kept import keep, kept
from sparseprop.ops.parts import Parts, in_one

__all__ = ["attention"]

_LANES = 16  # widths of heads that the kernels take are multiples of this
_LENGTH = 1024  # more, and torch's kernel, which never holds a whole row of scores, is as fast


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` of (batch, heads, length, width) tensors.

    Our kernels take float32 on the CPU, in heads whose widths are multiples of 16 and whose lengths are at
    most 1024, without dropout, under any mask that needs no gradient; all else goes to torch's function.

    >>> q = k = torch.zeros(1, 2, 3, 16)
    >>> attention(q, k, torch.arange(96.0).view(1, 2, 3, 16))[0, :, 0, 0]
    tensor([16., 64.])
    """
    plain = not dropout_p and not enable_gqa and not (is_causal and attn_mask is not None)
    if not plain or not _native(query, key, value) or not _fits(attn_mask, query, key):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        whole, parts = in_one(query, key, value)
        inputs = (query, key, value) if whole is None else (whole,)
        return cast(Tensor, _Attention.apply(parts, attn_mask, is_causal, scale, *inputs))  # type: ignore[no-untyped-call]
    return _forward(query, key, value, attn_mask, is_causal, scale)[0]


def _native(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not (query.dim() == key.dim() == value.dim() == 4) or query.dtype is not torch.float32:
        return False
    lead, widths = query.shape[:2], (query.shape[3], value.shape[3])
    return (
        kernels_may_read(query, key, value)
        and not torch.is_autocast_enabled("cpu")
        and key.shape[:2] == value.shape[:2] == lead
        and key.shape[3] == query.shape[3]
        and key.shape[2] == value.shape[2]
        and max(query.shape[2], key.shape[2]) <= _LENGTH
        and all(width % _LANES == 0 for width in widths)
        and min(query.numel(), key.numel(), value.numel()) > 0
        and lead.numel() >= torch.get_num_threads()  # each works on heads of its own
    )


def _fits(mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    if mask is None:
        return True
    shape = (*query.shape[:3], key.shape[2])
    from_the_last = zip(reversed(mask.shape), reversed(shape), strict=False)
    return (
        type(mask) in PLAIN_TYPES
        and mask.is_cpu
        and mask.dtype in (torch.bool, torch.float32)
        and not mask.requires_grad
        and not mask.is_neg()
        and 0 < mask.dim() <= 4
        and all(size in (1, whole) for size, whole in from_the_last)
    )


def _rows(tensor: Tensor) -> Tensor:
    """With adjacent elements in each row, and without a pending sign."""
    return tensor.resolve_neg() if tensor.stride(3) == 1 else tensor.resolve_neg().contiguous()


def _heads(tensor: Tensor) -> tuple[int, int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _mask(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[int, bool, int, int, int, int]:
    if mask is None:
        return 0, False, 0, 0, 0, 0
    batch, head, row, column = mask.expand(*query.shape[:3], key.shape[2]).stride()
    return mask.data_ptr(), mask.dtype is torch.bool, batch, head, row, column


def _sizes(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Any:
    from sparseprop import _native as native

    batch, heads, queries, width = query.shape
    return native.AttentionSizes(batch, heads, queries, key.shape[2], width, value.shape[3], scale, causal)


def _empty(like: Tensor, width: int) -> Tensor:
    """For a result: heads side by side in each row, as the layer behind them wants it."""
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The result, and what normalizes its softmax."""
    from sparseprop import _native as native

    query, key, value = _rows(query), _rows(key), _rows(value)
    out = _empty(query, value.shape[3])
    stats = query.new_empty((*query.shape[:2], 2, query.shape[2]))
    native.attention(
        _sizes(query, key, value, causal, scale),
        _heads(query), _heads(key), _heads(value), _mask(mask, query, key), _heads(out), stats.data_ptr(),
    )  # fmt: skip
    return out, stats


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, parts: Parts | None, mask: Any, causal: bool, scale: float, *inputs: Tensor
    ) -> Tensor:
        query, key, value = inputs if parts is None else parts.of(inputs[0])
        out, stats = _forward(query, key, value, mask, causal, scale)
        keep(ctx, mask, stats, *inputs)
        ctx.parts, ctx.causal, ctx.scale = parts, causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, stats, *inputs = kept(ctx, grad)
        if torch.is_grad_enabled():
            return (*(None,) * 4, *_differentiable(grad, ctx, mask, inputs))
        from sparseprop import _native as native

        parts: Parts | None = ctx.parts
        if parts is None:
            query, key, value = map(_rows, inputs)
            results = grads = [_empty(tensor, tensor.shape[3]) for tensor in (query, key, value)]
        else:
            query, key, value = parts.of(inputs[0])
            results = [torch.empty_like(inputs[0])]
            grads = parts.of(results[0])
        grad = _rows(grad)
        native.attention_backward(
            _sizes(query, key, value, ctx.causal, ctx.scale),
            _heads(query), _heads(key), _heads(value), _mask(mask, query, key), stats.data_ptr(),
            _heads(grad), *map(_heads, grads),
        )  # fmt: skip
        return (*(None,) * 4, *results)


def _differentiable(grad: Tensor, ctx: Any, mask: Tensor | None, inputs: list[Tensor]) -> list[Tensor | None]:
    """The gradients by torch's functions, to be differentiated once more."""
    needs = ctx.needs_input_grad[4:]
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
    with torch.enable_grad():
        query, key, value = inputs if ctx.parts is None else ctx.parts.of(inputs[0])
        scores = query @ key.transpose(2, 3) * ctx.scale
        if ctx.causal:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
        hidden = scores.isneginf().all(3, keepdim=True)  # queries that see no key: zeros, not NaN
        again = scores.masked_fill(hidden, 0.0).softmax(3).masked_fill(hidden, 0.0) @ value
        found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]
