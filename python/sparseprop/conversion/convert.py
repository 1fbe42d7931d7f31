"""`convert`: a trained network to N:M without training it."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

from sparseprop.conversion.batchnorm import reestimate_batch_norm
from sparseprop.conversion.calibration import Calibration, Forward, evaluating, inputs_of, reached
from sparseprop.conversion.choice import SCORES, PatternRule
from sparseprop.conversion.layer import LayerConverter, Reconstruction, grouped_weight
from sparseprop.conversion.moments import Moments
from sparseprop.conversion.report import ConversionReport, LayerReport
from sparseprop.conversion.samples import Sampler
from sparseprop.errors import SparsePropError
from sparseprop.masks import NMPattern
from sparseprop.masks._layout import Tail
from sparseprop.nn import MaskedLayer, SparseLayer
from sparseprop.swap.decide import Candidate, FilterFn, check_model, survey
from sparseprop.swap.kinds import SPARSE_CLASS, is_pruned
from sparseprop.swap.replace import replace_layers, to_dense

__all__ = ["ConvertProgress", "convert"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertProgress:
    """What a progress callback is told: ``done`` of ``total`` layers, now at ``layer``.

    >>> ConvertProgress("conv1", 0, 12).layer
    'conv1'
    """

    layer: str
    done: int
    total: int


Progress = Callable[[ConvertProgress], None]


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
    arXiv 2102.08124), solved by conjugate gradients. At last batch-norm statistics are measured anew.

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
            the original network: better, and one layer's moments in memory at a time, two (K, K) matrices in
            float64 for K inputs per output. False fits all layers on the original network's inputs in one
            pass over the data, with all their matrices in memory.
        bn_batches: the most batches for batch norm; all by default, 0 leaves it alone.
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
            `model` is unchanged then.

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
    job = _Job(model, work, survey(work, filter_fn), converter, data, sequential, progress)
    with evaluating(model, work):
        layers, masks = job.run()
    if not masks:
        raise SparsePropError(_nothing(converter, layers))
    used = 0
    if data is not None and bn_batches != 0:
        used = reestimate_batch_norm(work, data.batches, limit=bn_batches, forward_fn=data.forward)
    result = _bring_home(model, work, masks, inplace=inplace)
    return ConversionReport(converter.rule.text, score, layers, used, masks, result)


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


@dataclass(frozen=True)
class _Job:
    """The network as it was, and the copy of it that is converted."""

    model: nn.Module
    work: nn.Module
    candidates: list[Candidate]
    converter: LayerConverter
    data: Calibration | None
    sequential: bool
    progress: Progress | None

    def run(self) -> tuple[tuple[LayerReport, ...], dict[str, Tensor]]:
        """Convert all layers of the copy that can be; their reports in the model's order, and their masks."""
        by_name = {c.name: c for c in self.candidates}
        able = {
            c.name: c.module for c in self.candidates if isinstance(self.converter.pattern_of(c), NMPattern)
        }
        for layer in able.values():
            if is_pruned(layer):
                prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
        calls = {} if self.data is None else reached(self.work, able, self.data)
        ready = {} if self.sequential else self._moments(calls, drifting=False)
        order = [*calls, *(name for name in able if name not in calls)]
        reports, masks = {}, dict[str, Tensor]()
        for done, name in enumerate(order):
            self._tell(name, done, len(order))
            moments = ready.pop(name, None)
            if self.sequential and name in calls:
                moments = self._moments({name: calls[name]}, drifting=bool(masks))[name]
            reports[name], mask = self.converter.convert(by_name[name], moments)
            if mask is not None:
                masks[name] = mask
        self._tell("", len(order), len(order))
        for name in by_name.keys() - reports.keys():
            reports[name], _ = self.converter.convert(by_name[name], None)
        return tuple(reports[c.name] for c in self.candidates), masks

    def _moments(self, calls: dict[str, int], *, drifting: bool) -> dict[str, Moments]:
        """Moments of what the named layers read; with the drift from the original network if asked for."""
        if self.data is None or not calls:
            return {}
        modules = dict(self.work.named_modules())
        positions = (self.converter.fit or Reconstruction()).positions
        samplers = {name: Sampler.of(modules[name], positions) for name in calls}
        weights = {name: grouped_weight(modules[name]) for name in calls} if drifting else {}
        moments = {name: Moments() for name in calls}
        for index, batch in enumerate(self.data):
            found = inputs_of(self.work, calls, self.data, batch)
            originals = inputs_of(self.model, calls, self.data, batch) if drifting else []
            for call, (name, x) in enumerate(found):
                seed = index * 1009 + call
                rows, original = samplers[name].rows(x, seed), None
                # a network that chooses its way by its data may hand a layer other samples than before
                if call < len(originals) and (name, x.shape) == (
                    originals[call][0],
                    originals[call][1].shape,
                ):
                    original = samplers[name].rows(originals[call][1], seed)
                moments[name].add(rows, original, weights.get(name))
        return {name: found for name, found in moments.items() if found.count}

    def _tell(self, layer: str, done: int, total: int) -> None:
        logger.debug("converting %s (%d of %d)", layer, done, total)
        if self.progress is not None:
            self.progress(ConvertProgress(layer, done, total))


def _bring_home(model: nn.Module, work: nn.Module, masks: dict[str, Tensor], *, inplace: bool) -> nn.Module:
    """The converted weights in `model`, or in a copy of it; nothing fails from here on."""
    modules, done = dict(model.named_modules()), dict(work.named_modules())
    sparse = {name: modules[name] for name in masks if isinstance(modules[name], SparseLayer)}

    def remake(_: nn.Module, name: str) -> nn.Module:
        layer = done[name]
        return SPARSE_CLASS[type(layer)].from_dense(layer, mask=masks[name])

    result = replace_layers(model, sparse, remake, inplace=inplace)
    for name, module in result.named_modules():
        if name in masks and name not in sparse:
            _copy_parameters(done[name], module)
            if isinstance(module, MaskedLayer):
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
