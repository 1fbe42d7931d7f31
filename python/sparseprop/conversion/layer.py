"""One layer: choose its mask, apply it, fit what is left."""

import math
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

_NOT_REACHED = "not reached by the calibration batches: masked only"
_TOO_LARGE = "numbers too large to fit: masked only"


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
        solution = self._solve(layer, mask, moments)
        _apply(layer, mask, solution)
        density, errors = float(mask.float().mean()), (solution.error_masked, solution.error)
        c, note = candidate, solution.note
        report = LayerReport(c.name, c.kind, c.shape, str(pattern), before, density, retained, *errors, note)
        return report, mask

    def _solve(self, layer: nn.Module, mask: Tensor, moments: Moments | None) -> "_Solution":
        if moments is None:
            return _Solution(note="" if self.fit is None else _NOT_REACHED)
        problem = moments.fit(grouped_weight(layer), bias=layer.bias is not None)
        keep = mask.reshape(problem.weight.shape)
        masked = torch.where(keep, problem.weight, 0.0)
        error_masked = problem.error(masked)
        if not math.isfinite(error_masked):
            return _Solution(note=_TOO_LARGE)
        if self.fit is None:
            return _Solution(error_masked)
        hessian, target = problem.normal_equations(self.fit.ridge)
        found = masked_least_squares(hessian, target, keep, masked, iterations=self.fit.iterations)
        step = problem.bias_step(found)
        error, dtype = problem.error(found, step), layer.get_parameter("weight").dtype
        if not (math.isfinite(error) and all(bool(x.to(dtype).isfinite().all()) for x in (found, step))):
            return _Solution(error_masked, note=_TOO_LARGE)
        return _Solution(error_masked, error, found, step)


@dataclass(frozen=True, eq=False)
class _Solution:
    """The output's errors, weights and a step of the bias where these were fitted, and what to note."""

    error_masked: float | None = None
    error: float | None = None
    weight: Tensor | None = None
    step: Tensor | None = None
    note: str = ""


def _apply(layer: nn.Module, mask: Tensor, solution: _Solution) -> None:
    weight = layer.get_parameter("weight")
    with torch.no_grad():
        weight.mul_(mask)
        if solution.weight is not None and solution.step is not None:
            weight.copy_(solution.weight.reshape(weight.shape))
            if isinstance(layer.bias, nn.Parameter):
                layer.bias.add_(solution.step.reshape(-1))


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
