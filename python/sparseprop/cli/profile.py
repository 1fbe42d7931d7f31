"""``sparseprop profile``: where the time of a training step goes."""

from pathlib import Path
from typing import Annotated

import torch
import typer

import sparseprop
from sparseprop.cli.console import guarded
from sparseprop.cli.plan import example_model

__all__ = ["profile"]


@guarded
def profile(
    model: Annotated[str, typer.Argument(help="A timm or torchvision name, small, or a checkpoint file.")],
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a checkpoint that does not name it.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Prune by magnitude to this first.")] = None,
    min_sparsity: Annotated[float | None, typer.Option(help="Swap every layer at least this sparse.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 16,
    image_size: Annotated[int | None, typer.Option(help="Side of the images.")] = None,
    steps: Annotated[int, typer.Option(help="How many steps are watched.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads to use; by default torch's choice.")] = None,
    top: Annotated[int | None, typer.Option(help="Print the layers that cost most only.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the profile into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where a training step's time goes: layer by layer, dense and sparse side by side."""
    if threads is not None:
        torch.set_num_threads(threads)
    built, example = example_model(model, arch, sparsity, batch_size, image_size)
    chosen = sparseprop.plan(built, example, min_sparsity=min_sparsity)
    found = sparseprop.profile(built, torch.randn(example.shape), plan=chosen, steps=steps)
    if png is not None:
        found.save_png(png)
    typer.echo(found.to_json() if as_json else found.table(top=top))
