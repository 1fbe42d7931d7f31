"""Numbers of a report, from its rows: geometric means, worst shapes, crossovers, the planner's choices."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from rows import Results, Row

# what the project aims for: speed over dense torch, by group and sparsity
AIMS: Mapping[str, Mapping[float, float]] = {
    "Linear": {0.5: 1.6, 0.8: 4.5, 0.9: 8.0, 0.95: 14.0, 0.98: 25.0, 0.995: 60.0},
    "Conv": {0.5: 1.3, 0.8: 3.0, 0.9: 5.0, 0.95: 8.0, 0.98: 12.0},
}


@dataclass(frozen=True)
class Mean:
    """Speed-ups of one group at one sparsity: geometric means, the slowest shape, how many shapes."""

    value: float
    best: float  # of the fastest runs
    worst: Row
    count: int


def geometric_mean(numbers: Iterable[float]) -> float:
    """Geometric mean of at least one positive number.

    >>> geometric_mean([1.0, 4.0])
    2.0
    """
    return math.exp(statistics.fmean(math.log(number) for number in numbers))


def speedups(rows: Iterable[Row]) -> dict[str, dict[float, Mean]]:
    """Means by group and sparsity of layers with a speed-up; groups and sparsities in order."""
    found: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        if row.speedup is not None:
            found.setdefault(row.group, {}).setdefault(row.sparsity, []).append(row)
    return {
        group: {
            sparsity: Mean(
                geometric_mean(row.speedup or math.nan for row in those),
                geometric_mean(row.speedup_best or row.speedup or math.nan for row in those),
                min(those, key=lambda row: row.speedup or math.nan),
                len(those),
            )
            for sparsity, those in sorted(by_sparsity.items())
        }
        for group, by_sparsity in sorted(
            found.items(), key=lambda item: (item[0] not in AIMS, -len(item[0]), item[0])
        )
    }


def at_limit(results: Results) -> dict[str, dict[float, float]]:
    """What the means of `speedups` would be if every layer cost what it cannot do without.

    That is the least time for its operations and bytes (each byte moved once, at the speed of the nearest
    cache that holds them), and the call of an autograd function that computes nothing.
    """
    calls = [row.ms["idle"] for row in results.of("overhead") if "backward" in row.variant]
    call_ms = min(calls, default=0.0)
    found: dict[str, dict[float, list[float]]] = {}
    for row in results.of("layer"):
        if row.dense_ms is not None and row.limit_ms is not None:
            fastest = row.dense_ms / (row.limit_ms + call_ms)
            found.setdefault(row.group, {}).setdefault(row.sparsity, []).append(fastest)
    return {group: {s: geometric_mean(those) for s, those in by.items()} for group, by in found.items()}


def crossovers(rows: Iterable[Row]) -> dict[str, tuple[float | None, bool]]:
    """For each shape the sparsity at which sparse and dense are equally fast, between measured ones.

    (s, True) is interpolated; (s, False): faster already at s, the lowest measured; (None, False): never.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.speedup is not None:
            found.setdefault(row.shape, []).append((row.sparsity, row.speedup))
    return {shape: _crossing(sorted(points)) for shape, points in found.items()}


def _crossing(points: list[tuple[float, float]]) -> tuple[float | None, bool]:
    if points[0][1] >= 1:
        return points[0][0], False
    for (s0, low), (s1, high) in pairwise(points):
        if high >= 1:  # the log of the speed is nearly linear in the sparsity over so short a way
            return s0 + (s1 - s0) * math.log(1 / low) / math.log(high / low), True
    return None, False


@dataclass(frozen=True)
class Choices:
    """How often the unmeasured plan chose right, and by how much its worst wrong choice is slower."""

    right: int
    of: int
    worst: Row | None
    cost: float


def choices(rows: Iterable[Row]) -> Choices:
    """Check the choices of the cost model against the times measured."""
    right, total, worst, cost = 0, 0, None, 1.0
    for row in rows:
        if row.plan is None or row.speedup is None:
            continue
        total += 1
        loss = 1 / row.speedup if row.plan == "sparse" else row.speedup
        right += loss <= 1
        if loss > cost:
            worst, cost = row, loss
    return Choices(right, total, worst, cost)


def slower_than_dense(results: Results) -> list[Row]:
    """Layers that the plan makes sparse although dense is faster, and any at 90 % and more; worst first."""
    rows = [row for row in results.of("layer") if row.speedup is not None and row.speedup < 1]
    lost = [row for row in rows if row.plan == "sparse" or row.sparsity >= 0.9]
    return sorted(lost, key=lambda row: row.speedup or 0.0)
