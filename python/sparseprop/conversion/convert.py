"""`convert`: a trained network to N:M without training it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

from sparseprop.conversion.batchnorm import reestimate_batch_norm
from sparseprop.conversion.calibration import Calibration, Forward, evaluating
from sparseprop.conversion.choice import SCORES, PatternRule
from sparseprop.conversion.job import Job, Progress
from sparseprop.conversion.layer import LayerConverter, Reconstruction
from sparseprop.conversion.report import ConversionReport, LayerReport
from sparseprop.errors import SparsePropError
from sparseprop.masks import NMPattern
from sparseprop.masks._layout import Tail
from sparseprop.nn import MaskedLayer, SparseLayer
from sparseprop.swap.decide import Candidate, FilterFn, check_model, shared_memory, survey
from sparseprop.swap.kinds import SPARSE_CLASS, is_pruned
from sparseprop.swap.replace import replace_layers, to_dense

__all__ = ["convert"]


def convert(
    model: nn.Module,
    pattern: str | NMPattern,
    calibration: Iterable[Any] | None = None,
    *,
    score: str = "magnitude",
    reconstruct: bool | Reconstruction = True,
    sequential: bool = True,
    bn_batches: int | None = None,
    filter_fn: FilterFn | None = None,
    forward_fn: Forward | None = None,
    tail: Tail = "pad",
    inplace: bool = True,
    progress: Progress | None = None,
) -> ConversionReport:
    """Give the Linear and Conv layers of a trained network an N:M pattern, and mend it without training.

    Each layer is masked, then its remaining weights and its bias are fitted to the outputs that the original
    layer had on the calibration inputs: layer-wise least squares, the problem of AdaPrune (Hubara et al.,
    arXiv 2102.08124), solved by conjugate gradients. Batch-norm statistics can be measured anew at last.

    Args:
        model: any eager module, with dense, pruned or sparse layers; sparse ones stay sparse. Training flags
            and random state of dropout do not matter: everything runs in eval mode.
        pattern: ``"2:4"``, ``"4:8"`` or any N:M, ``"4:8T"`` for masks whose transpose is N:M too, or
            ``"auto:8"`` (``"auto:8T"``) for N of 8 by each layer's own sparsity (`masks.choose_n`).
        calibration: batches to go through several times (a list, a DataLoader): a tensor, a tuple that starts
            with the input, or a dict of arguments each. A few hundred samples do. Without it only masks by
            magnitude can be had, with ``reconstruct=False``.
        score: ``"magnitude"`` keeps the largest |w|; ``"wx2"`` the largest w² E[x²], what the weight adds to
            the output.
        reconstruct: False masks only; a `Reconstruction` sets ridge, iterations and sampling.
        sequential: fit each layer on what the layers before it, converted already, hand it, to the outputs of
            the original network: better, and one layer's moments in memory at a time: two (K, K) matrices in
            float64 for K inputs per output while it reads, about nine while it solves. False fits all layers
            on the original network's inputs in one pass over the data, with all their matrices in memory.
        bn_batches: the most batches for batch norm, 0 leaves it alone. None takes all, but none after a
            sequential fit: that keeps the means right, explains a part of each output's variance, and does
            worse when the rest is scaled up to the full variance again (bench/convert_demo.py).
        filter_fn: ``filter_fn(module, name) -> bool``; layers for which it is false are left alone.
        forward_fn: ``forward_fn(model, batch)`` for batches of another form.
        tail: what happens to an incomplete last group, as in `masks.nm_mask`.
        inplace: change `model` (default), or leave it alone and a changed copy in the report's ``model``.
        progress: called with a `ConvertProgress` before each layer and after the last.

    Returns:
        A `ConversionReport`; its ``masks`` go into ``from_dense(layer, mask=...)``, its ``model`` is the
        converted network (a new object if `model` itself is a sparse layer).

    Raises:
        SparsePropError: no layer can have the pattern, bad options or batches, or the model fails on a batch.
            `model` is unchanged then. Also if ``model.eval()`` writes into weights, as merging adapters does:
            call it yourself first.

    >>> import sparseprop
    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> batches = [torch.randn(64, 32) for _ in range(4)]
    >>> report = sparseprop.convert(model, "2:4", batches)
    >>> report.converted, report["2"].error < report["2"].error_masked
    (('0', '2'), True)
    """
    check_model(model, "convert")
    fit = _reconstruction(reconstruct)
    converter = LayerConverter(PatternRule.parse(pattern), score, fit, tail)
    _check(score, fit, calibration, bn_batches)
    data = None if calibration is None else Calibration.of(calibration, forward_fn)
    work = to_dense(model, inplace=False)
    job = Job(model, work, _candidates(model, work, filter_fn), converter, data, sequential, progress)
    with evaluating(model, work):
        layers, masks = job.run()
    if not masks:
        raise SparsePropError(_nothing(converter, layers))
    used = 0
    if data is not None and not (bn_batches is None and fit is not None and sequential):
        used = reestimate_batch_norm(work, data.batches, limit=bn_batches, forward_fn=data.forward)
    patterns = {layer.name: layer.pattern for layer in layers if layer.pattern is not None}
    result = _bring_home(model, work, masks, patterns, inplace=inplace)
    return ConversionReport(converter.rule.text, score, layers, used, masks, result)


def _candidates(model: nn.Module, work: nn.Module, filter_fn: FilterFn | None) -> list[Candidate]:
    """The layers of the copy; the filter and what shares memory are asked of the original."""
    own, shared = dict(model.named_modules()), shared_memory(model)

    def chosen(module: nn.Module, name: str) -> bool:
        return filter_fn is None or filter_fn(own.get(name, module), name)

    found = []
    for candidate in survey(work, chosen):
        other = shared.get(id(own.get(candidate.name)))
        if candidate.reason is None and other is not None:
            candidate = replace(candidate, sparsity=None, reason=f"weights shared with {other!r}")
        found.append(candidate)
    return found


def _reconstruction(value: bool | Reconstruction) -> Reconstruction | None:
    if isinstance(value, Reconstruction):
        return value
    return Reconstruction() if value else None


def _check(score: str, fit: Reconstruction | None, calibration: object, bn_batches: int | None) -> None:
    if score not in SCORES:
        raise SparsePropError(f"score got {score!r}, wanted one of {', '.join(SCORES)}.")
    if bn_batches is not None and bn_batches < 0:
        raise SparsePropError(f"bn_batches got {bn_batches}, wanted 0 or more, or None for all.")
    if calibration is not None:
        return
    if fit is not None:
        raise SparsePropError(
            "reconstruct=True needs calibration batches and got none; pass calibration=loader, or "
            "reconstruct=False to mask only."
        )
    if score != "magnitude":
        raise SparsePropError(
            f"score={score!r} needs calibration batches and got none; pass calibration=loader, or "
            "score='magnitude'."
        )


def _nothing(converter: LayerConverter, layers: tuple[LayerReport, ...]) -> str:
    reasons = "; ".join(f"{layer.name or 'the model'}: {layer.reason}" for layer in layers[:3])
    return (
        f"convert found no layer to give the pattern {converter.rule.text}: "
        f"{reasons or 'the model has no Linear or Conv layer'}."
    )


def _bring_home(
    model: nn.Module, work: nn.Module, masks: dict[str, Tensor], patterns: dict[str, str], *, inplace: bool
) -> nn.Module:
    """The converted weights in `model`, or in a copy of it; nothing fails from here on."""
    modules, done = dict(model.named_modules()), dict(work.named_modules())
    sparse = {name: modules[name] for name in masks if isinstance(modules[name], SparseLayer)}

    def remake(_: nn.Module, name: str) -> nn.Module:
        layer, packed = done[name], getattr(modules[name], "nm", None) is not None
        crowded = masks[name].shape[1] % NMPattern.parse(patterns[name]).m > 0
        pattern = patterns[name].removesuffix("T") if packed and not crowded else None
        return SPARSE_CLASS[type(layer)].from_dense(layer, mask=masks[name], pattern=pattern)

    result = replace_layers(model, sparse, remake, inplace=inplace)
    for name, module in result.named_modules():
        if name in masks and name not in sparse:
            _copy_parameters(done[name], module)
            if isinstance(module, MaskedLayer):
                if module.rule is not None:
                    module.rule = replace(module.rule, pattern=patterns[name])
                module.set_mask(masks[name])
        elif isinstance(module, _BatchNorm):
            module.load_state_dict(done[name].state_dict())
    return result


def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    if is_pruned(target):
        prune.remove(target, "weight")  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for key, parameter in source.named_parameters():
            target.get_parameter(key).copy_(parameter)
