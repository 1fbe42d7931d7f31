"""Arguments and options that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sparseprop.errors import SparsePropError
from sparseprop.train.config import MOST_THREADS

__all__ = [
    "Arch",
    "AsJson",
    "Checkpoint",
    "ImageSize",
    "MinSparsity",
    "Model",
    "Out",
    "Pattern",
    "Plot",
    "Sparsity",
    "check_at_least",
    "check_file",
    "check_threads",
]

Model = Annotated[str, typer.Argument(help="A timm or torchvision name, small, or a checkpoint file.")]
Checkpoint = Annotated[str, typer.Argument(help="A .safetensors or .pt file, or the folder of a run.")]
Arch = Annotated[str | None, typer.Option(help="Architecture of a checkpoint that does not name it.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images.")]
Sparsity = Annotated[float | None, typer.Option(help="Prune by magnitude to this first.")]
MinSparsity = Annotated[float | None, typer.Option(help="Swap every layer at least this sparse.")]
Pattern = Annotated[str, typer.Option(help="2:4, 4:8T (transposable), auto:8 (by sparsity) and so on.")]
Out = Annotated[Path, typer.Option(help="The .safetensors file to write.")]
Plot = Annotated[Path | None, typer.Option(help="A PNG to draw.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_BESIDE = 16  # bytes that the name of the temporary file beside an output is longer


def check_at_least(least: int, **counts: int | None) -> None:
    """Refuse numbers that are too small by the name of their option."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise SparsePropError(f"{name.replace('_', ' ')} must be {least} or more; got {count}")


def check_file(path: Path) -> None:
    """Refuse early, before minutes of work, a file that could not be written at the end."""
    if not path.parent.is_dir():
        raise SparsePropError(f"the folder {path.parent} is missing; make it first")
    length, most = len(os.fsencode(path.name)), os.pathconf(path.parent, "PC_NAME_MAX") - _BESIDE
    if length > most:
        raise SparsePropError(
            f"the output {path} has a name of {length} bytes; expected at most {most}; choose a shorter one"
        )
    if path.is_dir():
        raise SparsePropError(f"the output {path} is a folder; expected the name of a file in it")


def check_threads(threads: int | None) -> None:
    """Refuse numbers of threads that no machine has."""
    check_at_least(1, threads=threads)
    if threads is not None and threads > MOST_THREADS:
        raise SparsePropError(f"threads must be {MOST_THREADS} or fewer; got {threads}")
