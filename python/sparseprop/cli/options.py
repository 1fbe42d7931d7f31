"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

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
