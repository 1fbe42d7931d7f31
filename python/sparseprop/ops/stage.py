"""What one batch norm does, with its tensors and its activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprop.ops.windows import WindowSpec

__all__ = ["NormSpec", "Stage", "addresses", "running_arguments"]


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
            and not any(tensor is not None and tensor.is_inference() for tensor in self.running)
            and (count > 1 if self.spec.training else self.running[0] is not None)
        )


def addresses(known: Tensor) -> tuple[int, int]:
    """Of mean and inverse deviation, (2, channels)."""
    first = known.data_ptr()
    return first, first + known.shape[1] * known.element_size()


def running_arguments(stage: Stage) -> tuple[int, int, float]:
    """Addresses of the running statistics as the kernels take them, and the share of a batch in them.

    Those that a batch is to move count as written from now on. 0 for those that nobody needs.
    """
    (mean, variance), spec = stage.running, stage.spec
    if mean is None or variance is None or (spec.training and not spec.momentum):
        return 0, 0, 0.0
    if spec.training:
        torch.autograd.graph.increment_version((mean, variance))
    return mean.data_ptr(), variance.data_ptr(), spec.momentum
