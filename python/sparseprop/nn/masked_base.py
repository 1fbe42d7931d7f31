"""Masked-dense layers: N:M training that needs the dense weight, until the mask freezes.

SR-STE is Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021;
transposable masks renewed every 40 steps are Hubara et al., arXiv 2102.08124.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sparseprop.errors import SparsePropError
from sparseprop.masks.from_pattern import misfit, pattern_mask
from sparseprop.masks.pattern import NMPattern
from sparseprop.nn.base import SparseLayer
from sparseprop.nn.convert import dense_source, finished_mask
from sparseprop.nn.mask_rule import MaskRule
from sparseprop.nn.straight_through import masked, straight_through
from sparseprop.nn.watch import WeightWatch

__all__ = ["MaskedLayer", "no_fast_path"]


def no_fast_path(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing: torch's encoder layers read ``weight`` past `forward` unless there is one."""


class MaskedLayer(nn.Module):
    """Base of `MaskedLinear` and `MaskedConv1d/2d/3d`; not for direct use.

    ``weight`` is a dense Parameter; the forward pass uses ``weight * mask``. In training mode the mask is
    made anew from |weight| after every ``rule.every`` updates of the weight: counted by updates, not by
    calls, so accumulated gradients and recomputed activations see one mask. Eval mode never changes it.
    """

    mask: Tensor
    weight: Tensor
    bias: Any  # a Parameter or None; torch declares it differently in Linear and Conv
    rule: MaskRule | None
    mask_age: int
    _sparse_type: ClassVar[type[SparseLayer]]
    _dense_type: ClassVar[type[nn.Module]]

    def _start(self, rule: MaskRule | None) -> None:
        self.rule = rule
        self.mask_age = 0  # weight updates since the mask was made
        self._watch = WeightWatch()
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))
        self.register_forward_pre_hook(no_fast_path)

    @classmethod
    def from_dense(
        cls, module: nn.Module, *, mask: Tensor | None = None, pattern: str | MaskRule | None = None
    ) -> Self:
        """The masked twin of a plain torch layer, with copies of its weights.

        ``pattern``: a `MaskRule`, or ``"2:4"`` for a rule of defaults. ``mask``: the mask to begin with, else
        the pattern's best for |weight|. Without ``pattern`` the ``mask`` given stays, of any structure.
        Refuses what `SparseLinear.from_dense` refuses, and layers too small for the pattern.

        >>> from sparseprop.nn import MaskedLinear
        >>> layer = MaskedLinear.from_dense(nn.Linear(8, 4), pattern="2:4")
        >>> layer.nnz, layer.density
        (16, 0.5)
        """
        weight, pruned = dense_source(module, cls._dense_type)
        weight = weight if pruned is None else weight * pruned
        rule = MaskRule(pattern) if isinstance(pattern, str) else pattern
        if rule is None and mask is None:
            raise SparsePropError(
                f"{cls.__name__}.from_dense got neither mask nor pattern, wanted one of them."
            )
        options = cls._sparse_type._options_of(module)
        bias = module.bias
        layer = cls(**options, bias=bias is not None, rule=rule, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None and isinstance(bias, Tensor):
                layer.bias.copy_(bias)
                layer.bias.requires_grad_(bias.requires_grad)
        original = getattr(module, "weight_orig", module.weight)
        assert isinstance(original, Tensor)
        layer.weight.requires_grad_(original.requires_grad)
        layer.set_mask(layer._best_mask() if mask is None else finished_mask(weight, mask))
        return layer.train(module.training)

    @property
    def static(self) -> bool:
        """Whether the mask stays as it is."""
        return self.rule is None or not self.rule.every

    def set_mask(self, mask: Tensor) -> None:
        """Use this bool mask of the weight's shape from now on; a static layer zeroes what it prunes."""
        self.mask.copy_(finished_mask(self.weight.detach().cpu(), mask.cpu()))
        self.mask_age = 0
        if self.static:
            with torch.no_grad():
                self.weight.mul_(self.mask)
        self._watch.remember(self.weight)

    def refresh(self) -> None:
        """Make the mask anew from |weight|, in any mode. Refuses a layer without a pattern."""
        self.set_mask(self._best_mask())

    def _best_mask(self) -> Tensor:
        if self.rule is None:
            raise SparsePropError(
                f"{type(self).__name__} has a mask but no pattern to make another from; use set_mask."
            )
        groups, pattern = int(getattr(self, "groups", 1)), NMPattern.parse(self.rule.pattern)
        reason = misfit(self.weight.shape, pattern, groups=groups)
        if reason is not None:
            raise SparsePropError(f"{type(self).__name__} cannot be {pattern}: {reason}; leave it dense.")
        scores = self.weight.detach().abs()
        return pattern_mask(scores, pattern, groups=groups, method=self.rule.method)

    def masked_weight(self) -> Tensor:
        """``weight * mask`` for this forward pass, after bringing the mask up to date in training mode."""
        if self.static or self.rule is None:
            return masked(self.weight, self.mask)
        if self.training:
            self._count_update()
        return straight_through(self.weight, self.mask, 0.0 if self.rule.decoupled else self.rule.decay)

    def _count_update(self) -> None:
        self.mask_age += self._pending()
        if self.rule is not None and self.mask_age >= (self.rule.every or 0):
            self.refresh()
        else:
            self._watch.remember(self.weight)

    def _pending(self) -> int:
        """1 if the weight was updated since the last forward pass."""
        return int(self._watch.changed(self.weight))

    @property
    def nnz(self) -> int:
        """Number of weights inside the mask."""
        return int(self.mask.sum())

    @property
    def density(self) -> float:
        """Part of the weights inside the mask."""
        return self.nnz / max(1, self.mask.numel())

    def to_dense(self) -> nn.Module:
        """The plain torch layer with ``weight * mask``."""
        options, bias = self._sparse_type._options_of(self), self.bias
        dense = self._dense_type(**options, bias=bias is not None, device="meta")
        weight = (self.weight * self.mask).detach()
        dense.weight = nn.Parameter(weight, self.weight.requires_grad)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return dense.train(self.training)

    def freeze(self) -> SparseLayer:
        """The sparse layer with this mask: the mask no longer changes, and a step costs what it keeps."""
        pattern = None if self.rule is None else NMPattern.parse(self.rule.pattern)
        crowded = pattern is None or self.mask.shape[1] % pattern.m
        text = None if crowded or pattern is None else f"{pattern.n}:{pattern.m}"
        return self._sparse_type.from_dense(self.to_dense(), mask=self.mask.clone(), pattern=text)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "mask_age"] = torch.tensor(self.mask_age + self._pending())

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = dict(state_dict)
        age = own.pop(prefix + "mask_age", None)
        wrong = self._misfit(own.get(prefix + "mask"), age)
        if wrong is not None:
            (kwargs["error_msgs"] if "error_msgs" in kwargs else args[-1]).append(f"{prefix}{wrong}")
            return
        dense = prefix + "mask" not in own and self.rule is not None
        own.setdefault(prefix + "mask", self.mask)  # a dense checkpoint: the mask follows from the weight
        super()._load_from_state_dict(own, prefix, *args, **kwargs)
        self.mask_age = 0 if age is None else int(age)
        if self.static and not dense:
            with torch.no_grad():
                self.weight.mul_(self.mask)
        self._watch.remember(self.weight)
        if dense:
            self.refresh()

    @staticmethod
    def _misfit(mask: Any, age: Any) -> str | None:
        """What is wrong with these entries of a state dict, if they are there."""
        if age is not None and not (isinstance(age, Tensor) and age.numel() == 1 and int(age) >= 0):
            return f"mask_age must be a number of 0 or more, got {age}."
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype is torch.bool):
            return f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}."
        return None

    def __getstate__(self) -> dict[str, Any]:
        age = self.mask_age + self._pending()
        return self.__dict__ | {"_watch": WeightWatch(), "mask_age": age}  # versions mean nothing to a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._watch.remember(self.weight)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        rule = "static mask" if self.rule is None else f"{self.rule.pattern}, every={self.rule.every}"
        return f"{super().extra_repr()}, {rule}, density={self.density:.4g}"
