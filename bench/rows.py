"""One row of the benchmark: written into pytest-benchmark's `extra_info`, read back by the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparseprop import SparsePropError


@dataclass(frozen=True)
class Row:
    """Times of the candidates for one layer, taken in turn in one process, and what they mean.

    Attributes:
        family: which table it belongs to ("layer", "contraction", "threads", "isa", "overhead", ...).
        group: what it is averaged with, such as "Linear".
        shape, sparsity, pattern, variant: what was run.
        ms: median milliseconds of each candidate; spread: half the distance of its quartiles over the median.
        speedup: median over the rounds of the best dense time over the sparse time, with its quartiles.
        speedup_best: fastest dense run over fastest sparse run, least disturbed by other work.
        gflops: rate counted on non-zeros; limit_gflops: what FMA and memory allow; intensity: flop per byte.
        error: largest difference from dense torch, relative to the largest value of each result.
        plan: what `sparseprop.plan` chooses without measuring.
        load: the machine's load average when the row began.
    """

    family: str
    group: str
    shape: str
    sparsity: float
    pattern: str = "random"
    variant: str = ""
    nnz: int = 0
    ms: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    speedup: float | None = None
    speedup_range: tuple[float, float] | None = None
    speedup_best: float | None = None
    gflops: float | None = None
    limit_gflops: float | None = None
    intensity: float | None = None
    error: float | None = None
    plan: str | None = None
    load: float = 0.0

    @property
    def of_limit(self) -> float | None:
        """Share of the limit that was reached."""
        return self.gflops / self.limit_gflops if self.gflops and self.limit_gflops else None

    @property
    def dense_ms(self) -> float | None:
        """Of the faster dense layout."""
        return min((ms for name, ms in self.ms.items() if name.startswith("dense")), default=None)

    @property
    def limit_ms(self) -> float | None:
        """The least time that FMA and memory allow the sparse layer."""
        share = self.of_limit
        return self.ms["sparse"] * share if share and "sparse" in self.ms else None

    def as_dict(self) -> dict[str, Any]:
        """For `extra_info`."""
        return asdict(self)


@dataclass(frozen=True)
class Results:
    """All rows of a run, and the machine they come from."""

    rows: tuple[Row, ...]
    machine: Mapping[str, Any]

    def of(self, family: str) -> list[Row]:
        """The rows of one family, in the order they ran."""
        return [row for row in self.rows if row.family == family]


def load(path: Path) -> Results:
    """Read a file that pytest-benchmark wrote.

    Raises:
        SparsePropError: it is missing, is no JSON, or holds no row of these benchmarks.
    """
    advice = "run bench/run.py to make one"
    try:
        content = json.loads(path.read_text())
        machine, found = content["machine_info"], content["benchmarks"]
        infos = [entry["extra_info"] for entry in found if "family" in entry["extra_info"]]
        rows = tuple(Row(**info) for info in infos)
    except OSError as error:
        raise SparsePropError(f"cannot read {path}: {error.strerror}; {advice}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SparsePropError(
            f"{path} is not a result of these benchmarks ({type(error).__name__}: {error}); {advice}."
        ) from error
    if not rows:
        raise SparsePropError(f"{path} holds no rows of these benchmarks; {advice}.")
    return Results(rows, machine)
