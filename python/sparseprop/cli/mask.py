"""``sparseprop mask``: the weights of a checkpoint to N:M, by magnitude alone."""

import dataclasses
import re
from typing import Annotated

import torch
import typer
from torch import Tensor

from sparseprop.cli.console import guarded
from sparseprop.cli.conversion import check_out, show_report
from sparseprop.cli.options import AsJson, Checkpoint, Out, Pattern, Plot
from sparseprop.conversion import ConversionReport, LayerReport
from sparseprop.conversion.choice import PatternRule
from sparseprop.errors import SparsePropError
from sparseprop.masks import pattern_mask, retained_magnitude
from sparseprop.train.checkpoint import save_tensors
from sparseprop.train.start import mask_of, read_checkpoint

__all__ = ["mask"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GROUPS = (
    "transposable patterns of convolutions hold where these have one group, which a checkpoint does not say; "
    "for others use `sparseprop convert`, which knows the architecture"
)


@guarded
def mask(
    checkpoint: Checkpoint,
    pattern: Pattern,
    out: Out,
    skip: Annotated[str, typer.Option(help="Leave weights whose name matches this expression.")] = "",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Keep the largest weights of each group of a checkpoint; needs neither its architecture nor data.

    Takes every tensor called weight that has two to five dimensions, embeddings included: skip those. A
    checkpoint does not say how many groups a convolution has; transposable tiles are laid for one.
    """
    rule, unwanted = PatternRule.parse(pattern), _expression(skip)
    check_out(out, plot)
    tensors, note = read_checkpoint(checkpoint)
    if any(_is_masked(name, tensors) for name in tensors):
        raise SparsePropError(
            f"{checkpoint} holds sparse or pruned layers; expected dense weights; use `sparseprop convert`"
        )
    masked, layers = _masked_all(tensors, rule, unwanted)
    report = ConversionReport(rule.text, "magnitude", tuple(layers))
    if not report.converted:
        why = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers[:3]) or "it has no such tensor"
        raise SparsePropError(f"no weight of {checkpoint} can be {rule.text} ({why}); choose another pattern")
    save_tensors(out, masked, note)
    show_report(report, out, plot, as_json=as_json)
    if any(layer.kind != "Linear" and (layer.pattern or "").endswith("T") for layer in layers):
        typer.echo(_GROUPS, err=as_json)


def _is_masked(name: str, tensors: dict[str, Tensor]) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf in ("weight_values", "weight_mask") or mask_of(tensors, name) is not None


def _expression(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise SparsePropError(f"--skip {text!r} is no regular expression: {error}") from None


def _masked_all(
    tensors: dict[str, Tensor], rule: PatternRule, unwanted: re.Pattern[str] | None
) -> tuple[dict[str, Tensor], list[LayerReport]]:
    """All tensors with the weights among them masked, and what became of each weight."""
    masked, layers = dict(tensors), {}
    for group in _tied(tensors):
        weights = [name for name in group if _is_weight(name, tensors[name])]
        if not weights:
            continue
        skipped = [name for name in group if unwanted is not None and unwanted.search(name)]
        reason = f"shared with {skipped[0]}" if skipped else ""
        layer, tensor = _masked(weights[0], tensors[weights[0]], rule, reason)
        masked |= dict.fromkeys(group, tensor)  # the same object under each name: it stays shared
        for name in weights:
            why = "skipped" if name in skipped else layer.reason
            layers[name] = dataclasses.replace(layer, name=name, reason=why)
    return masked, [layers[name] for name in tensors if name in layers]


def _tied(tensors: dict[str, Tensor]) -> list[list[str]]:
    """The names, those of one and the same tensor together."""
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault(view if tensor.numel() else name, []).append(name)
    return list(groups.values())


def _is_weight(name: str, tensor: Tensor) -> bool:
    return name.rpartition(".")[2] == "weight" and 2 <= tensor.dim() <= 5 and tensor.is_floating_point()


def _masked(name: str, weight: Tensor, rule: PatternRule, reason: str) -> tuple[LayerReport, Tensor]:
    before = float((weight != 0).sum()) / max(1, weight.numel())
    kind, shape = ("Linear" if weight.dim() == 2 else f"Conv{weight.dim() - 2}d"), tuple(weight.shape)
    if weight.dtype not in _DTYPES:
        reason = reason or f"{weight.dtype}, wanted 16 bits or more"
    if not weight.numel():
        reason = reason or "no elements"
    pattern = reason or rule.choose(shape, 1, 1.0 - before)
    if isinstance(pattern, str):
        return LayerReport(name, kind, shape, None, before, None, None, None, None, pattern), weight
    try:
        keep = pattern_mask(weight.abs(), pattern)
    except SparsePropError as error:
        raise SparsePropError(f"{name}: {error}") from None
    retained, density = retained_magnitude(weight.abs(), keep), float(keep.float().mean())
    report = LayerReport(name, kind, shape, str(pattern), before, density, retained, None, None, "")
    return report, weight * keep
