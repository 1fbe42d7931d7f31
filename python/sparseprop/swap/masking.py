"""Masked-dense layers in a whole model: put in, frozen to sparse ones, decayed beside the optimizer."""

import logging

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparseprop.errors import SparsePropError
from sparseprop.masks import NMPattern, misfit
from sparseprop.nn.mask_rule import MaskRule
from sparseprop.nn.masked import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear
from sparseprop.nn.masked_base import MaskedLayer
from sparseprop.swap.decide import Candidate, FilterFn, check_model, survey
from sparseprop.swap.replace import replace_layers

__all__ = ["decay_pruned", "decouple_decay", "freeze_modules", "mask_modules"]

logger = logging.getLogger(__name__)

_MASKED_CLASS: dict[type[nn.Module], type[MaskedLayer]] = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
}


def mask_modules(
    model: nn.Module, pattern: str | MaskRule, *, filter_fn: FilterFn | None = None, inplace: bool = True
) -> nn.Module:
    """Train `model` with N:M masks on its Linear and Conv layers; call it before you build the optimizer.

    Layers become `nn.MaskedLinear` and `nn.MaskedConv1d/2d/3d`: dense weights with a mask, which cost what
    dense ones cost. `freeze_modules` makes them sparse and fast once the masks shall stay.

    With Adam, whose steps do not grow with the gradient, a decay inside the gradient loses its meaning:
    use ``MaskRule(pattern, decoupled=True)`` and `decouple_decay`. Do so too under a gradient scaler, where
    gradients of several batches are accumulated, and where a layer runs several times in a forward pass: the
    decay would be scaled, or added every time.

    Args:
        model: any eager module.
        pattern: a `MaskRule`, or ``"2:4"``, ``"4:8T"`` for one of defaults: SR-STE with a new mask after each
            step, a transposable one after each 40 steps. ``MaskRule(pattern, every=0)`` keeps the first mask.
        filter_fn: ``filter_fn(module, name) -> bool``; layers for which it is false stay as they are.
        inplace: change `model` (default), or leave it alone and return a changed copy.

    Returns:
        The model; a new object if `model` itself is one of the layers.

    Raises:
        SparsePropError: no layer can have the pattern; the message says why. Skipped layers are logged.

    >>> import sparseprop
    >>> model = sparseprop.mask_modules(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)), "2:4")
    >>> [type(layer).__name__ for layer in sparseprop.freeze_modules(model)]
    ['SparseLinear', 'ReLU', 'SparseLinear']
    """
    check_model(model, "mask_modules")
    rule = pattern if isinstance(pattern, MaskRule) else MaskRule(pattern)
    layers, reasons = {}, []
    for candidate in survey(model, filter_fn):
        reason = _reason(candidate, NMPattern.parse(rule.pattern))
        if reason is None:
            layers[candidate.name] = candidate.module
        else:
            reasons.append(f"{candidate.name or 'the model'}: {reason}")
            logger.info("mask_modules leaves %s", reasons[-1])
    if not layers:
        why = "; ".join(reasons[:3]) or "the model has no dense Linear or Conv layer"
        raise SparsePropError(f"mask_modules found no layer to give the pattern {rule.pattern}: {why}.")
    return replace_layers(model, layers, lambda layer, name: _masked(layer, rule), inplace=inplace)


def freeze_modules(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Make the masked layers of `model` sparse, with the masks they have; build the optimizer after it.

    Returns the model; a new object if `model` itself is a masked layer. A model without masked layers is
    returned as it is. Raises SparsePropError for a layer that is not float32 or float64 on the CPU.

    >>> layer = MaskedLinear.from_dense(nn.Linear(8, 4), pattern="2:4")
    >>> freeze_modules(layer).nnz
    16
    """
    check_model(model, "freeze_modules")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}
    return replace_layers(model, layers, _frozen, inplace=inplace)


def decay_pruned(model: nn.Module, lr: float) -> None:
    """Shrink the pruned weights of dynamic masked layers by ``1 - lr * decay``, as a step of plain SGD would.

    >>> layer = MaskedLinear.from_dense(nn.Linear(8, 4), pattern=MaskRule("2:4", decay=0.5, decoupled=True))
    >>> before = layer.weight.detach().clone()
    >>> decay_pruned(layer, lr=1.0)
    >>> torch.equal(layer.weight, before * torch.where(layer.mask, 1.0, 0.5))
    True
    """
    for layer in model.modules():
        if isinstance(layer, MaskedLayer) and layer.rule is not None and not layer.static:
            _shrink(layer, layer.rule.decay * lr)


def decouple_decay(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Decay the pruned weights after each step of `optimizer`, by its own learning rates, beside its moments.

    For layers made with ``MaskRule(..., decoupled=True)``; others have the decay in their gradient already.
    Adam's steps are about ``lr`` long, so decays that matter under it are those of AdamW, not of SGD.

    Returns a handle whose ``remove()`` ends it. Raises SparsePropError if `model` has no decoupled layer
    whose weight `optimizer` holds.

    >>> model = mask_modules(nn.Sequential(nn.Linear(8, 8)), MaskRule("2:4", decay=0.01, decoupled=True))
    >>> handle = decouple_decay(torch.optim.AdamW(model.parameters()), model)
    """
    layers = {
        id(layer.weight): layer
        for layer in model.modules()
        if isinstance(layer, MaskedLayer) and layer.rule is not None and layer.rule.decoupled
    }
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not layers.keys() & held:
        raise SparsePropError(
            "decouple_decay found no weight of a decoupled masked layer in the optimizer; mask the model "
            "with MaskRule(pattern, decoupled=True) first and build the optimizer after it."
        )

    def after_step(stepped: Optimizer, *_: object) -> None:
        if getattr(stepped, "found_inf", 0.0):  # a gradient scaler's fused step, which did nothing
            return
        for group in stepped.param_groups:
            for parameter in group["params"]:
                layer = layers.get(id(parameter))
                if layer is not None and layer.rule is not None and not layer.static:
                    _shrink(layer, layer.rule.decay * float(group["lr"]))

    return optimizer.register_step_post_hook(after_step)


def _shrink(layer: MaskedLayer, by: float) -> None:
    with torch.no_grad():
        layer.weight.mul_(1.0 - by * (~layer.mask).to(layer.weight.dtype))


def _reason(candidate: Candidate, pattern: NMPattern) -> str | None:
    groups = int(getattr(candidate.module, "groups", 1))
    return candidate.reason or misfit(candidate.shape, pattern, groups=groups)


def _masked(layer: nn.Module, rule: MaskRule) -> MaskedLayer:
    return _MASKED_CLASS[type(layer)].from_dense(layer, pattern=rule)


def _frozen(layer: nn.Module, name: str) -> nn.Module:
    assert isinstance(layer, MaskedLayer)
    try:
        return layer.freeze()
    except SparsePropError as error:
        raise SparsePropError(f"Layer {name!r} cannot become sparse: {error}") from error
