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
    "PASSING",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "NativeNorm",
    "PassingReLU",
    "PassingReLU6",
    "Statistics",
    "norm_behind",
]

_DONE = "_sparseprop_relu_done"
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
    """Base of the three; `cap` tells the activation that follows and is applied at once: see `NormSpec`."""

    cap = 0.0

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        cap: float | None = None,
        pool: nn.Module | None = None,
    ) -> Tensor:
        """`pool(activation(batch_norm(input) + residual))`; `cap` as in `NormSpec`, else the module's own."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        # A ReLU that cannot be marked as done is left to the module behind: two of them are as good as one,
        # but the second may work in place, on what the first has kept for its backward pass. Hooks are to see
        # the norm's own output.
        can_mark = type(input) is Tensor and not torch.compiler.is_compiling()
        own = self.cap if can_mark and not hooked(self) and not hooks_everywhere() else 0.0
        stage = self.stage(own if cap is None else cap)
        self.count()
        pool_spec = pool.spec() if isinstance(pool, MaxPool2d) and not hooked(pool) else None
        spec = replace(stage.spec, pool=pool_spec)
        out = batch_norm(input, stage.running, self.weight, self.bias, spec, residual)
        if cap is None and own:
            setattr(out, _DONE, True)
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
    cap: float | None = None,
    pool: nn.Module | None = None,
) -> Tensor:
    """`norm(layer(x), residual, cap, pool)`: layer and norm as one step in evaluation without gradients, if
    no hook would miss it.
    """
    if isinstance(norm, NativeNorm) and isinstance(layer, SparseLayer) and _may_skip_calls(norm, layer):
        finish = norm.known(norm.cap if cap is None else cap, residual)
        out = None if finish is None else layer.finished(x, finish)
        if out is not None:
            if cap is None and norm.cap:
                setattr(out, _DONE, True)
            return out if pool is None else cast(Tensor, pool(out))
    then = {"residual": residual, "cap": cap, "pool": pool}
    return cast(Tensor, norm(layer(x), **{name: given for name, given in then.items() if given is not None}))


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


class _Passing(nn.Module):
    """Lets through what a batch norm has put through this activation already.

    It matters for nothing but time: a second ReLU changes neither values nor gradients.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The activation of `input`."""
        if not torch.compiler.is_compiling() and hasattr(input, _DONE):
            delattr(input, _DONE)
            return input
        return cast(Tensor, super().forward(input))


class PassingReLU(_Passing, nn.ReLU):
    """`torch.nn.ReLU` behind a batch norm."""


class PassingReLU6(_Passing, nn.ReLU6):
    """`torch.nn.ReLU6` behind a batch norm."""


NATIVE_NORMS: dict[type[nn.Module], Any] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
# the activations that a batch norm can take along: what they become, and where they stop
PASSING: dict[type[nn.Module], tuple[Any, float]] = {
    nn.ReLU: (PassingReLU, torch.inf),
    nn.ReLU6: (PassingReLU6, 6.0),
}
