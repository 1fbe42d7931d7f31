"""Row-wise N:M masks: the n best of every m consecutive inputs."""

import torch
from torch import Tensor

from sparseprop import _native
from sparseprop.errors import SparsePropError
from sparseprop.masks._layout import (
    NativeArgs,
    Tail,
    as_planes,
    check_scores,
    check_tail,
    check_tile,
    empty_mask,
)
from sparseprop.masks.pattern import check_pattern

__all__ = ["nm_mask"]


def nm_mask(scores: Tensor, n: int, m: int, *, tail: Tail = "pad") -> Tensor:
    """Keep the ``n`` highest scores of every ``m`` consecutive inputs, for each output and kernel position.

    ``scores``: a Linear (out, in) or Conv (out, in/groups, *kernel) weight's scores, finite and >= 0, such as
    ``weight.abs()``; any float dtype and memory format. Returns a bool mask of the same shape and format.
    Ties go to the lowest input. ``tail`` says what happens to an incomplete last group: ``"pad"`` keeps
    min(n, its length), ``"dense"`` keeps all of it, ``"error"`` refuses it.
    Raises SparsePropError for NaN, inf, negative or integer scores, a bad pattern, or an incomplete group
    under ``"error"``. Grouping along inputs as in Zhou et al., "Learning N:M Fine-grained Structured Sparse
    Neural Networks From Scratch" (SR-STE), ICLR 2021.

    >>> import torch
    >>> nm_mask(torch.tensor([[3.0, 1.0, 4.0, 1.0], [5.0, 9.0, 2.0, 6.0]]), 2, 4).int()
    tensor([[1, 0, 1, 0],
            [0, 1, 0, 1]], dtype=torch.int32)
    """
    check_pattern(n, m)
    check_tail(tail)
    check_tile(m)
    scores = check_scores(scores)
    if tail == "error" and scores.shape[1] % m:
        raise SparsePropError(
            f"nm_mask got {scores.shape[1]} inputs, wanted a multiple of m={m}; use tail='pad' or 'dense'."
        )
    if scores.device.type != "cpu":
        return _sorted_nm_mask(scores, n, m, tail)
    mask, out = empty_mask(scores)
    planes = as_planes(scores)
    args = NativeArgs.of(planes, out)
    _native.nm_mask(
        args.dtype,
        args.shape,
        n,
        m,
        tail == "dense",
        args.scores,
        args.scores_strides,
        args.mask,
        args.mask_strides,
    )
    return mask


def _sorted_nm_mask(scores: Tensor, n: int, m: int, tail: Tail) -> Tensor:
    """The same in plain torch, for other devices."""
    inputs = scores.shape[1]
    rows = scores.movedim(1, -1)
    padded = torch.nn.functional.pad(rows, (0, -inputs % m), value=-1.0)
    order = padded.reshape(*padded.shape[:-1], -1, m).sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    mask = keep.flatten(-2)[..., :inputs]
    if tail == "dense":
        mask[..., inputs - inputs % m :] = True
    return torch.empty_like(scores, dtype=torch.bool).copy_(mask.movedim(-1, 1))
