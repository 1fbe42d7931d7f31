"""Options and fixtures of the benchmarks: pinned threads, the machine noted, a busy one flagged.

pytest bench/bench_linear.py --benchmark-enable --form=short --benchmark-json=out.json
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

import sparseprop
from limits import Limits, measure_limits
from measure import EFFORTS, Effort
from shapes import FORMS

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
BUSY = 0.15  # share of the cores that others may use before the numbers are doubtful


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which shapes to run, and with how many threads."""
    parser.addoption("--form", choices=FORMS, default="short", help="how many shapes, for how long")
    parser.addoption(
        "--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="threads to use"
    )
    parser.addoption("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a busy machine")


def pytest_configure(config: pytest.Config) -> None:
    """Threads are pinned before anything runs; a look at what others do on this machine."""
    if config.getoption("clock") == "cpu" and config.getoption("threads") != 1:
        raise pytest.UsageError("--clock=cpu adds up what all threads use; it needs --threads=1.")
    torch.set_num_threads(config.getoption("threads"))
    sparseprop.keep_freed_memory()  # large activations would time the system clearing pages, for either form
    others = psutil.cpu_percent(interval=0.5) / 100
    config.stash[_OTHERS] = others


_OTHERS = pytest.StashKey[float]()


def pytest_report_header(config: pytest.Config) -> str:
    """Warns on a busy machine."""
    others = config.stash[_OTHERS]
    busy = " BUSY: do not quote these numbers" if others > BUSY else ""
    return (
        f"form {config.getoption('form')}, {torch.get_num_threads()} threads, others use {others:.0%}{busy}"
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the report names beside pytest-benchmark's own facts."""
    limits = _limits(config)
    others = config.stash[_OTHERS]
    machine_info["sparseprop"] = {
        "form": config.getoption("form"),
        "threads": limits.threads,
        "clock": config.getoption("clock"),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "isa": sparseprop.active_isa(),
        "isas": list(sparseprop.available_isas()),
        "versions": {"sparseprop": sparseprop.__version__, "torch": torch.__version__},
        "others": others,
        "busy": others > BUSY,
        "load": os.getloadavg()[0],
        "fma_gflops": limits.fma,
        "fma_load_gflops": limits.fma_load,
        "memory_gbs": [list(pair) for pair in limits.memory],
        "limits_from": limits.source,
    }


@pytest.fixture(scope="session")
def form(pytestconfig: pytest.Config) -> str:
    """tiny, short or full."""
    return str(pytestconfig.getoption("form"))


@pytest.fixture(scope="session")
def effort(pytestconfig: pytest.Config) -> Effort:
    """How long to time, on which clock."""
    clock = CLOCKS[pytestconfig.getoption("clock")]
    return replace(EFFORTS[pytestconfig.getoption("form")], clock=clock)


@pytest.fixture(scope="session")
def limits(pytestconfig: pytest.Config) -> Limits:
    """What the machine can do at most with these threads."""
    return _limits(pytestconfig)


def _limits(config: pytest.Config) -> Limits:
    return measure_limits(config.getoption("threads"), probe=config.getoption("form") != "tiny")


@pytest.fixture(autouse=True)
def _threads(pytestconfig: pytest.Config) -> None:
    torch.set_num_threads(pytestconfig.getoption("threads"))
