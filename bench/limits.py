"""What this machine can do at most: FMA rate and memory bandwidth, measured per number of threads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).parent / "lab" / "limits.cpp"


@dataclass(frozen=True)
class Limits:
    """Best rates seen. `fma` and `fma_load` (one L1 load with each) in GF/s.

    `memory` holds (working set in bytes, GB/s) by rising size: a set that fits a cache moves faster.
    """

    threads: int
    fma: float
    fma_load: float
    memory: tuple[tuple[int, float], ...]
    source: str

    def bandwidth(self, working_set: float) -> float:
        """GB/s for a working set of so many bytes."""
        for size, rate in self.memory:
            if working_set <= size:
                return rate
        return self.memory[-1][1]

    def seconds(self, flop: float, moved: float) -> float:
        """The least time for so many operations and bytes, each byte moved once."""
        return max(1e-9 * flop / self.fma, 1e-9 * moved / self.bandwidth(moved))

    def gflops(self, flop: float, moved: float) -> float:
        """The highest rate possible for so many operations and bytes."""
        return 1e-9 * flop / self.seconds(flop, moved)


@cache
def measure_limits(threads: int, *, probe: bool = True) -> Limits:
    """Measure once per process: with a compiled probe, or with torch where there is no C++ compiler."""
    if not probe:
        return _from_torch(threads, budget_s=0.005)
    compiler = next(
        (name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if _is_there(name)), None
    )
    if compiler is not None:
        try:
            alone, together = _probe(compiler, [1, threads])
        except (OSError, subprocess.SubprocessError, ValueError):
            return _from_torch(threads)
        # what one thread can move, several can: a low number only says that the machine was busy
        memory = tuple(
            (int(many["bytes"]), max(many["read"], many["copy"], one["read"], one["copy"]))
            for one, many in zip(alone["memory"], together["memory"], strict=True)
        )
        fma = max(together["fma"], together["fma_load"])
        return Limits(threads, fma, together["fma_load"], memory, f"probe compiled with {compiler}")
    return _from_torch(threads)


def _is_there(name: str | None) -> bool:
    return name is not None and shutil.which(name) is not None


def _probe(compiler: str, counts: list[int]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        build = [compiler, "-O3", "-march=native", "-std=c++17", "-pthread", "-o", str(program), str(_SOURCE)]
        subprocess.run(build, check=True, capture_output=True, timeout=120)
        return [
            json.loads(
                subprocess.run([program, str(count)], check=True, capture_output=True, timeout=120).stdout
            )
            for count in counts
        ]


def _from_torch(threads: int, budget_s: float = 0.3) -> Limits:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        side = 1024
        a, b = torch.randn(side, side), torch.randn(side, side)
        fma = 1e-9 * 2 * side**3 / _fastest(lambda: torch.mm(a, b, out=a.new_empty(side, side)), budget_s)
        memory = []
        for size in (2**18, 2**20, 2**22, 2**24, 2**26):
            source, target = torch.ones(size // 8), torch.empty(size // 8)
            memory.append((size, 1e-9 * size / _fastest(partial(target.copy_, source), budget_s)))
    finally:
        torch.set_num_threads(before)
    return Limits(threads, fma, fma, tuple(memory), "torch's matrix product and copies")


def _fastest(action: Callable[[], object], budget_s: float) -> float:
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < budget_s:
        before = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - before)
    return best
