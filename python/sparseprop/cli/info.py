"""``sparseprop info``: what the kernels run on, for bug reports."""

import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
import typer

import sparseprop
from sparseprop import backend
from sparseprop.cli.console import guarded
from sparseprop.cli.options import AsJson

__all__ = ["info"]

_PACKAGES = ("torch", "numpy", "safetensors", "numba", "timm", "torchvision", "transformers")
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")


@guarded
def info(as_json: AsJson = False) -> None:
    """Show instruction sets, threads, OpenMP runtimes and versions."""
    facts: dict[str, Any] = {
        "sparseprop": sparseprop.__version__,
        "backend": backend.name,
        "isa": sparseprop.active_isa(),
        "isas available": list(sparseprop.available_isas()),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
        "openmp runtimes": _openmp_runtimes(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = [f"{key} {text}" for key, text in value.items()]
        typer.echo(f"{name:<16} {', '.join(value) if isinstance(value, list) else value}")
    if len(facts["openmp runtimes"]) > 1:
        typer.echo("more than one OpenMP runtime: their idle threads may slow each other down", err=True)


def _openmp_runtimes() -> list[str]:
    """The OpenMP libraries mapped into this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(path for path in paths if _OPENMP.search(path))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
