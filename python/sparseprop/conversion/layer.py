"""One layer: choose its mask, apply it, fit what is left."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseprop.conversion.choice import PatternRule, score_of
from sparseprop.conversion.moments import Moments
from sparseprop.conversion.report import LayerReport
from sparseprop.conversion.solve import masked_least_squares
from sparseprop.errors import SparsePropError
from sparseprop.masks import pattern_mask, retained_magnitude
from sparseprop.masks._layout import Tail
from sparseprop.swap.decide import Candidate

__all__ = ["LayerConverter", "Reconstruction", "grouped_weight"]


@dataclass(frozen=True)
class Reconstruction:
    """How the least-squares fit is done.

    Attributes:
        ridge: pull towards the original weights, as a part of the mean square of the inputs.
        iterations: the most steps of conjugate gradients.
        positions: output positions taken per image of a convolution.

    >>> Reconstruction().iterations
    30
    """

    ridge: float = 0.01
    iterations: int = 30
    positions: int = 64

    def __post_init__(self) -> None:
        for name, value, least in (
            ("ridge", self.ridge, 1e-12),
            ("iterations", self.iterations, 1),
            ("positions", self.positions, 1),
        ):
            if not value >= least:
                raise SparsePropError(f"Reconstruction got {name}={value}, wanted at least {least:g}.")


@dataclass(frozen=True)
class LayerConverter:
    """The choices that all layers of a conversion share."""

    rule: PatternRule
    score: str
    fit: Reconstruction | None
    tail: Tail

    def pattern_of(self, candidate: Candidate) -> object:
        """The layer's `NMPattern`, or why it has none."""
        if candidate.reason is not None or candidate.sparsity is None:
            return candidate.reason or "sparsity unknown"
        return self.rule.choose(candidate.shape, groups_of(candidate.module), candidate.sparsity)

    def convert(self, candidate: Candidate, moments: Moments | None) -> tuple[LayerReport, Tensor | None]:
        """Give a layer its pattern, in place. Without moments it is masked only, and by magnitude only."""
        pattern = self.pattern_of(candidate)
        reason = pattern if isinstance(pattern, str) else ""
        if not reason and moments is None and self.score != "magnitude":
            reason = f"not reached by the calibration batches, which the score {self.score} needs"
        if reason:
            return _skipped(candidate, reason), None
        layer, groups = candidate.module, groups_of(candidate.module)
        weight = layer.get_parameter("weight")
        scores = score_of(weight.detach(), None if moments is None else moments.mean_square, self.score)
        mask = pattern_mask(scores, str(pattern), groups=groups, tail=self.tail)
        retained = retained_magnitude(weight.detach().abs(), mask)
        before = 1.0 - (candidate.sparsity or 0.0)
        errors, note = self._apply(layer, mask, moments)
        density = float(mask.float().mean())
        c = candidate
        report = LayerReport(c.name, c.kind, c.shape, str(pattern), before, density, retained, *errors, note)
        return report, mask

    def _apply(
        self, layer: nn.Module, mask: Tensor, moments: Moments | None
    ) -> tuple[tuple[float | None, float | None], str]:
        weight = layer.get_parameter("weight")
        bias = layer.bias if isinstance(layer.bias, nn.Parameter) else None
        found, note = None, ""
        errors: tuple[float | None, float | None] = (None, None)
        if moments is not None:
            problem = moments.fit(grouped_weight(layer), bias=bias is not None)
            keep = mask.reshape(problem.weight.shape)
            masked = torch.where(keep, problem.weight, 0.0)
            errors = (problem.error(masked), None)
            if self.fit is not None:
                hessian, target = problem.normal_equations(self.fit.ridge)
                found = masked_least_squares(hessian, target, keep, masked, iterations=self.fit.iterations)
                step = problem.bias_step(found)
                errors = (errors[0], problem.error(found, step))
        elif self.fit is not None:
            note = "not reached by the calibration batches: masked only"
        with torch.no_grad():
            weight.mul_(mask)
            if found is not None:
                weight.copy_(found.reshape(weight.shape))
                if bias is not None:
                    bias.add_(step.reshape(-1))
        return errors, note


def grouped_weight(layer: nn.Module) -> Tensor:
    """The weight as (groups, outputs of a group, everything else), detached."""
    groups = groups_of(layer)
    weight = layer.get_parameter("weight").detach()
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution, 1 for Linear."""
    return int(getattr(layer, "groups", 1))


def _skipped(candidate: Candidate, reason: str) -> LayerReport:
    density = None if candidate.sparsity is None else 1.0 - candidate.sparsity
    c = candidate
    return LayerReport(c.name, c.kind, c.shape, None, density, None, None, None, None, reason)
