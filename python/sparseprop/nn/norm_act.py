"""timm's batch norm with an activation of its own (`BatchNormAct2d`), by our kernels."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from sparseprop.nn.hooks import hooked
from sparseprop.nn.mixin import Mixin
from sparseprop.nn.norm import RELU_CAPS, Statistics
from sparseprop.ops.norm import batch_norm

__all__ = ["NativeNormAct", "has_own_activation", "obstacle", "own_cap"]

# `NormSpec.cap` of the activations that our kernels have
_CAPS: dict[type[nn.Module], float] = {**RELU_CAPS, nn.Identity: 0.0}


def has_own_activation(norm: nn.Module) -> bool:
    """Whether it is timm's module, not a class derived from it or a forward put in its place."""
    kind = type(norm)
    ours = kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")
    return ours and "forward" not in vars(norm)


def obstacle(norm: nn.Module) -> str:
    """Why its activation cannot be computed with it, "" if it can."""
    act, drop = norm.get_submodule("act"), norm.get_submodule("drop")
    if hooked(act) or hooked(drop):
        return "hooks between it and its activation"
    if type(drop) is not nn.Identity:
        return "dropout between it and its activation"
    return "" if type(act) in _CAPS else f"no kernel for its {type(act).__name__}"


def own_cap(norm: nn.Module) -> float | None:
    """`NormSpec.cap` of its activation, None if it cannot be computed with it."""
    return None if obstacle(norm) else _CAPS[type(norm.get_submodule("act"))]


class NativeNormAct(Mixin, Statistics):
    """Mixed into `BatchNormAct2d`; reads its activation at every call."""

    def forward(self, x: Tensor) -> Tensor:
        """Batch norm and activation of `x`, (N, C, H, W)."""
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        cap = own_cap(self)
        stage = self.stage(cap or 0.0)
        self.count()
        out = batch_norm(x, stage.running, self.weight, self.bias, stage.spec)
        if cap is not None:
            return out
        return cast(Tensor, self.get_submodule("act")(self.get_submodule("drop")(out)))
