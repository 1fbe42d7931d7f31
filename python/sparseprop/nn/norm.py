"""Batch norm that runs in any layout of a network and takes a ReLU along, with an addition before it or a max
pooling behind it.

They are torch's modules in all but `forward`: a module becomes one, or torch's again, by its class alone. So
parameters, buffers, names, hooks and `isinstance` stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparseprop.nn.base import SparseLayer
from sparseprop.nn.hooks import hooked, hooks_everywhere
from sparseprop.nn.pool import MaxPool2d
from sparseprop.ops.finish import Finish
from sparseprop.ops.norm import batch_norm
from sparseprop.ops.stage import NormSpec, Stage

__all__ = [
    "NATIVE_NORMS",
    "RELU_CAPS",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "NativeNorm",
    "Statistics",
    "norm_behind",
]

_AFFINE = ("weight", "bias")


class Statistics(nn.modules.batchnorm._BatchNorm):
    """What a batch norm does to its next input, as our kernels want to know it."""

    def stage(self, cap: float) -> Stage:
        """What it does to the next input, with the activation of `cap` behind it."""
        training = self.training or (self.running_mean is None and self.running_var is None)
        track = self.training and self.track_running_stats
        spec = NormSpec(training, self._momentum() if track else 0.0, self.eps, cap)
        running = (self.running_mean, self.running_var) if track or not training else (None, None)
        return Stage(running, self.weight, self.bias, spec)

    def count(self) -> None:
        """Note one more batch, if it keeps statistics."""
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

    def _momentum(self) -> float:
        """The share that the next batch has in the running statistics."""
        if self.momentum is None and self.num_batches_tracked is not None:
            return 1.0 / float(self.num_batches_tracked + 1)
        return 0.0 if self.momentum is None else self.momentum


class NativeNorm(Statistics):
    """Base of the three."""

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        cap: float = 0.0,
        pool: nn.Module | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """`pool(activation(batch_norm(input) + residual))`, with `cap` as in `NormSpec`.

        The sum is of the type that torch gives it, `in_place` that of the norm.
        """
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        stage = self.stage(cap)
        self.count()
        pool_spec = pool.spec() if isinstance(pool, MaxPool2d) and not hooked(pool) else None
        spec = replace(stage.spec, pool=pool_spec)
        out = batch_norm(input, stage.running, self.weight, self.bias, spec, residual, in_place=in_place)
        return out if pool is None or pool_spec is not None else cast(Tensor, pool(out))

    def known(self, cap: float, residual: Tensor | None = None) -> Finish | None:
        """What this norm does to its input, if that is known before it has seen any of it."""
        buffers, parameters = self._buffers, self._parameters  # attribute look-up of modules is slow
        mean, variance = buffers.get("running_mean"), buffers.get("running_var")
        if self.training or mean is None or variance is None:
            return None
        weight, bias = (parameters[name] if name in parameters else getattr(self, name) for name in _AFFINE)
        return Finish(mean, variance, weight, bias, self.eps, cap, residual)


def norm_behind(
    norm: nn.Module,
    layer: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    cap: float = 0.0,
    pool: nn.Module | None = None,
    in_place: bool = False,
) -> Tensor:
    """`norm(layer(x), residual, cap, pool, in_place)`: layer and norm as one step in evaluation without
    gradients, if no hook would miss it.
    """
    if isinstance(norm, NativeNorm) and isinstance(layer, SparseLayer) and _may_skip_calls(norm, layer):
        finish = norm.known(cap, residual)
        out = None if finish is None else layer.finished(x, finish)
        if out is not None:
            return out if pool is None else cast(Tensor, pool(out))
    then: dict[str, Any] = {"cap": cap, "pool": pool, "in_place": in_place}
    then = {name: given for name, given in then.items() if given}  # all that norms of torch's know
    if residual is not None:
        then["residual"] = residual
    return cast(Tensor, norm(layer(x), **then))


def _may_skip_calls(norm: NativeNorm, layer: SparseLayer) -> bool:
    return not (
        norm.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or hooked(norm)
        or hooked(layer)
        or hooks_everywhere()
    )


class BatchNorm1d(NativeNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, faster on the CPU."""


class BatchNorm2d(NativeNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, faster on the CPU.

    >>> BatchNorm2d(3)(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """


class BatchNorm3d(NativeNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, faster on the CPU."""


NATIVE_NORMS: dict[type[nn.Module], Any] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
# the activations that a batch norm can take along, and where they stop: `NormSpec.cap`
RELU_CAPS: dict[type[nn.Module], float] = {nn.ReLU: torch.inf, nn.ReLU6: 6.0}
