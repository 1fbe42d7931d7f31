"""Splits, the order of batches and random changes to their images, as pure functions of a seed."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseprop.data.sets import Split

__all__ = ["augment", "batch_order", "in_order", "mix_seed", "stratified"]


def mix_seed(*parts: int | str) -> int:
    """One 63-bit seed from several parts; different parts give unrelated seeds.

    >>> mix_seed(0, "order", 1) == mix_seed(0, "order", 1) != mix_seed(0, "order", 2)
    True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stratified(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(mix_seed(seed, "split"))
    train, test = [], []
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        count = max(1, round(len(members) * held_out))
        test.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def batch_order(count: int, batch_size: int, *, seed: int, epoch: int) -> Tensor:
    """The batches of an epoch as indices ``(batches, batch size)``, a pure function of ``(seed, epoch)``.

    The last, incomplete batch is left out: batch norm would see too few images in it.

    >>> batch_order(10, 4, seed=0, epoch=0).shape
    torch.Size([2, 4])
    """
    size = min(batch_size, count)
    generator = torch.Generator().manual_seed(mix_seed(seed, "order", epoch))
    return torch.randperm(count, generator=generator)[: count // size * size].reshape(-1, size)


def in_order(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images and labels of a split, batch by batch, for evaluation."""
    for indices in torch.split(torch.arange(len(split.labels)), batch_size):
        yield split.fetch(indices), split.labels[indices]


def augment(images: Tensor, *, seed: int, mirror: bool) -> Tensor:
    """Turn, scale and shift every image a little, a pure function of ``seed``; same shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    count = len(images)
    turn, size, dx, dy, flip = torch.rand(5, count, generator=generator) * 2 - 1
    angle, scale = turn * 0.2, 1 + size * 0.12
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 0, 2] = angle.cos() * scale, -angle.sin() * scale, dx * 0.12
    theta[:, 1, 0], theta[:, 1, 1], theta[:, 1, 2] = angle.sin() * scale, angle.cos() * scale, dy * 0.12
    if mirror:
        theta[:, :, 0] *= torch.where(flip < 0, -1.0, 1.0)[:, None]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
