"""Build the candidates for one layer, time them in turn, check them against dense torch, and make rows."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import sparseprop
from limits import Limits
from patterns import make_mask
from rows import Row
from shapes import Shape, sparsities
from sparseprop.timing import Comparison, Step, compare, module_step

ALLOWED_ERROR = 1e-4  # of the largest value; float32 sums of thousands of terms come to about 1e-6
SPARSE_TYPE = {nn.Linear: sparseprop.nn.SparseLinear, nn.Conv2d: sparseprop.nn.SparseConv2d}


@dataclass(frozen=True)
class Effort:
    """How long to time: seconds for one set of candidates, how many rounds, and on which clock."""

    budget_s: float
    min_rounds: int
    max_rounds: int = 100
    clock: Callable[[], float] = time.perf_counter

    def compare(self, steps: Mapping[str, Step]) -> Comparison:
        """Time these candidates in turn."""
        return compare(
            steps,
            budget_s=self.budget_s,
            min_rounds=self.min_rounds,
            max_rounds=self.max_rounds,
            clock=self.clock,
        )


EFFORTS = {"tiny": Effort(1e-3, 1, 1), "short": Effort(0.7, 5), "full": Effort(3.0, 9)}


@dataclass(frozen=True)
class Measured:
    """One shape at several sparsities: its layers, the common input, and the common times."""

    shape: Shape
    x: Tensor
    layers: Mapping[float, nn.Module]
    steps: Mapping[str, Step]
    times: Comparison


def sparse_layer(shape: Shape, sparsity: float, pattern: str = "random") -> nn.Module:
    """The sparse layer of a shape; the same weights at every call."""
    torch.manual_seed(0)
    dense = shape.layer()
    mask = make_mask(dense.weight.shape, sparsity, pattern)
    return SPARSE_TYPE[type(dense)].from_dense(dense, mask=mask)


def dense_steps(shape: Shape, x: Tensor) -> dict[str, Step]:
    """A training step of the dense layer in each layout that torch has for it."""
    torch.manual_seed(0)
    dense = shape.layer()
    steps = {"dense": module_step(dense, x)}
    if isinstance(dense, nn.Conv2d):
        there = copy.deepcopy(dense).to(memory_format=torch.channels_last)
        their_x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        steps["dense channels_last"] = module_step(there, their_x)
    return steps


def batch_last(x: Tensor) -> Tensor:
    """The same input with the batch innermost in memory, as the kernels compute."""
    order = (*range(1, x.dim()), 0)
    back = (x.dim() - 1, *range(x.dim() - 1))
    return x.detach().permute(order).contiguous().permute(back).requires_grad_()


@lru_cache(maxsize=1)
def measured(shape: Shape, family: str, form: str, effort: Effort) -> Measured:
    """Dense and sparse at every sparsity, timed in turn: each sparse time has a dense one beside it.

    The last one is kept: the rows of one shape follow each other.
    """
    torch.manual_seed(0)
    x = shape.input()
    layers = {sparsity: sparse_layer(shape, sparsity) for sparsity in sparsities(family, form)}
    steps = dense_steps(shape, x)
    for sparsity, layer in layers.items():
        steps[f"sparse {sparsity}"] = module_step(layer, x)
    if form != "short":
        x_last = batch_last(x)
        for sparsity, layer in layers.items():
            steps[f"sparse batch_last {sparsity}"] = module_step(layer, x_last)
    return Measured(shape, x, layers, steps, effort.compare(steps))


def layer_row(found: Measured, sparsity: float, limits: Limits) -> Row:
    """The row of one sparsity: forward, input gradient, weight and bias gradient through the module."""
    layer, times = found.layers[sparsity], found.times
    ours = f"sparse {sparsity}"
    dense = times.fastest(*(name for name in times.seconds if name.startswith("dense")))
    names = {
        name: name.removesuffix(f" {sparsity}")
        for name in times.seconds
        if name.startswith("dense") or name.endswith(f" {sparsity}")
    }
    base = Row("layer", found.shape.group, str(found.shape), sparsity, load=os.getloadavg()[0])
    row = with_rate(base, found.shape, layer, 1e-3 * times.median_ms(ours), limits)
    return replace(
        row,
        **timed(times, names, ours, dense),
        error=largest_error(layer, found.x),
        plan=sparseprop.plan(layer.to_dense(), found.x, measure=False).layers[0].choice,
    )


def with_rate(row: Row, shape: Shape, layer: Any, seconds: float, limits: Limits) -> Row:
    """`row` with the rate of forward and fused backward, and the limit for that."""
    read, written = shape.moved()
    flop = 3 * 2.0 * layer.nnz * shape.columns
    moved = 4.0 * ((read + written) + (read + written + read) + 3 * layer.nnz)
    return replace(
        row,
        nnz=layer.nnz,
        gflops=1e-9 * flop / seconds,
        limit_gflops=limits.gflops(flop, moved),
        intensity=flop / moved,
    )


def timed(times: Comparison, names: Mapping[str, str], ours: str, base: str | None) -> dict[str, Any]:
    """The fields of a row that hold times, and the speed of `ours` over `base` round by round."""
    fields: dict[str, Any] = {
        "ms": {short: times.median_ms(name) for name, short in names.items()},
        "spread": {short: spread(times.seconds[name]) for name, short in names.items()},
    }
    if base is not None:
        low, middle, high = quartiles(
            [theirs / mine for mine, theirs in zip(times.seconds[ours], times.seconds[base], strict=True)]
        )
        best = min(times.seconds[base]) / min(times.seconds[ours])
        fields |= {"speedup": middle, "speedup_range": (low, high), "speedup_best": best}
    return fields


def quartiles(numbers: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile of at least one number."""
    if len(numbers) == 1:
        return (numbers[0],) * 3
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def spread(seconds: tuple[float, ...]) -> float:
    """Half the distance of the quartiles over the median."""
    low, middle, high = quartiles(list(seconds))
    return 0.5 * (high - low) / middle


def largest_error(layer: Any, x: Tensor) -> float:
    """Largest difference of output and gradients from dense torch, relative to each one's largest value.

    Raises AssertionError where that is more than rounding: what is timed must be right.
    """
    results = []
    for module in (layer, layer.to_dense()):
        out = module(x)
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        weight = module.weight if module is not layer else layer.weight_values
        grads = torch.autograd.grad(out, (x, weight, module.bias), grad_out)
        results.append([out.detach(), *grads])
    ours, dense = results
    dense[2] = dense[2].reshape(-1)[layer.pattern.flat_index()]
    error = max(
        float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
        for mine, theirs in zip(ours, dense, strict=True)
        if theirs.numel()
    )
    assert error < ALLOWED_ERROR, f"{layer} differs from dense torch by {error:.1e}"
    return error


def compare_settings(settings: Mapping[str, Any], step: Step, effort: Effort) -> Comparison:
    """Time one step under several settings in turn; each is a function that switches to it, untimed.

    A run that is not timed follows each switch: a changed number of threads starts new ones.
    """
    names, clock = list(settings), effort.clock
    start = clock()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(effort.max_rounds):
        if done >= effort.min_rounds and clock() - start > effort.budget_s:
            break
        for name in names[done % len(names) :] + names[: done % len(names)]:
            settings[name]()
            step()
            before = clock()
            step()
            seconds[name].append(clock() - before)
    return Comparison({name: tuple(times) for name, times in seconds.items()})


def record(benchmark: Any, row: Row, step: Step) -> None:
    """Hand a row and one more timing of `step` to pytest-benchmark, grouped by shape."""
    benchmark.group = f"{row.family}: {row.shape}"
    benchmark.extra_info.update(row.as_dict())
    benchmark.pedantic(step, rounds=3)
