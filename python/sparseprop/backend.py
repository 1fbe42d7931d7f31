"""Which implementation of the contractions runs: the native kernels, or the reference loops on request."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch  # noqa: F401  # before the native module, which then shares torch's OpenMP runtime

from sparseprop.errors import SparsePropError

__all__ = ["active_isa", "amd_family", "available_isas", "name", "use"]

_MODULES = {"native": "sparseprop._native", "reference": "sparseprop.reference"}

name: str  # what runs: "native" or "reference"
Contraction: type[Any]  # its class; both have the interface of _native.pyi, the reference without `finish`


def available_isas() -> tuple[str, ...]:
    """Instruction sets that the kernels can use on this CPU, simplest first.

    >>> "scalar" in available_isas() or name == "reference"
    True
    """
    return (
        ("reference",) if name == "reference" else tuple(import_module(_MODULES["native"]).available_isas())
    )


def active_isa() -> str:
    """The instruction set that runs; the environment variable SPARSEPROP_MAX_ISA caps it."""
    return "reference" if name == "reference" else str(import_module(_MODULES["native"]).active_isa())


def amd_family() -> int:
    """Family of an AMD CPU (25: Zen 3 and 4, 26: Zen 5), 0 of others; torch's own kernels differ there."""
    return int(import_module(_MODULES["native"]).amd_family()) if name == "native" else 0


@contextmanager
def use(chosen: str) -> Iterator[None]:
    """Run with another backend inside a `with` block; for tests and for doubting a result."""
    before = name
    _select(chosen)
    try:
        yield
    finally:
        _select(before)


def _select(chosen: str) -> None:
    global name, Contraction
    if chosen not in _MODULES:
        raise SparsePropError(f"SPARSEPROP_BACKEND must be one of {sorted(_MODULES)}, got {chosen!r}.")
    try:
        module = import_module(_MODULES[chosen])
    except ImportError as error:
        error.add_note(_ADVICE[chosen])
        raise
    name, Contraction = chosen, module.Contraction


_ADVICE = {
    "native": "sparseprop's compiled kernels are missing or do not load. Build them with `pip install .` in "
    "the source tree (or `make dev` to work on it). SPARSEPROP_BACKEND=reference runs slow loops.",
    "reference": "The reference backend needs Numba: `pip install 'sparseprop[reference]'`.",
}

_select(os.environ.get("SPARSEPROP_BACKEND") or "native")
