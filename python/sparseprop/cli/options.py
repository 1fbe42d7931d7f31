"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from sparseprop.errors import SparsePropError

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


def check_at_least(least: int, **counts: int | None) -> None:
    """Refuse numbers that are too small by the name of their option."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise SparsePropError(f"{name.replace('_', ' ')} must be {least} or more; got {count}")


def check_file(path: Path) -> None:
    """Refuse early, before minutes of work, a file that could not be written at the end."""
    if not path.parent.is_dir():
        raise SparsePropError(f"the folder {path.parent} is missing; make it first")
    if path.is_dir():
        raise SparsePropError(f"the output {path} is a folder; expected the name of a file in it")
