"""What one batch norm does, with its tensors and its activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sparseprop.ops.windows import WindowSpec

__all__ = ["NormSpec", "Stage", "statistics", "update_running"]


@dataclass(frozen=True)
class NormSpec:
    """What a batch norm does.

    Attributes:
        training: normalize by the statistics of the batch, else by the running ones.
        momentum: share of the batch in the running statistics; 0 leaves them alone.
        eps: added to the variance.
        cap: of the activation applied to the result: 0 none, infinity ReLU, 6 ReLU6.
        pool: a 2-D max pooling after that, or None.
    """

    training: bool
    momentum: float = 0.1
    eps: float = 1e-5
    cap: float = 0.0
    pool: WindowSpec | None = None


@dataclass(frozen=True)
class Stage:
    """A batch norm with its tensors, and what follows it.

    Attributes:
        running: mean and variance, (channels,), each or both None, as `batch_norm` takes them.
        weight, bias: (channels,), or None.
        spec: its options.
    """

    running: tuple[Tensor | None, Tensor | None]
    weight: Tensor | None
    bias: Tensor | None
    spec: NormSpec

    def tensors(self) -> list[Tensor]:
        """All there are."""
        return [tensor for tensor in (*self.running, self.weight, self.bias) if tensor is not None]

    def fits(self, channels: int, count: int) -> bool:
        """Whether the kernels can do it to `count` values a channel, and torch would not refuse it."""
        return (
            all(tensor.shape == (channels,) and tensor.is_contiguous() for tensor in self.tensors())
            and (self.running[0] is None) == (self.running[1] is None)
            and (count > 1 if self.spec.training else self.running[0] is not None)
        )


def statistics(stage: Stage, like: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and inverse deviation if they are known, else room for those of the batch and its variance."""
    if stage.spec.training:
        mean, inv_std, variance = like.new_empty(3, channels).unbind()
        return mean, inv_std, variance
    mean, variance = (cast(Tensor, tensor).detach() for tensor in stage.running)
    return mean, (variance + stage.spec.eps).rsqrt(), None


def update_running(
    running: tuple[Tensor | None, Tensor | None], mean: Tensor, variance: Tensor, momentum: float
) -> None:
    """Move running statistics, if there are any, towards those of a batch, (channels,) each."""
    if momentum:
        with torch.no_grad():
            for kept, new in zip(running, (mean, variance), strict=True):
                if kept is not None:
                    kept.mul_(1 - momentum).add_(new, alpha=momentum)
