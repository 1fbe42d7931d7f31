"""``sparseprop profile``: where the time of a training step goes."""

from pathlib import Path
from typing import Annotated

import torch
import typer

import sparseprop
from sparseprop.cli.console import guarded
from sparseprop.cli.options import (
    Arch,
    AsJson,
    ImageSize,
    MinSparsity,
    Model,
    Sparsity,
    check_at_least,
    check_file,
    check_threads,
)
from sparseprop.cli.plan import example_model

__all__ = ["profile"]


@guarded
def profile(
    model: Model,
    arch: Arch = None,
    sparsity: Sparsity = None,
    min_sparsity: MinSparsity = None,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 16,
    image_size: ImageSize = None,
    steps: Annotated[int, typer.Option(help="How many steps are watched.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads to use; by default torch's choice.")] = None,
    top: Annotated[int | None, typer.Option(help="Print the layers that cost most only.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the profile into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say where a training step's time goes: layer by layer, dense and sparse side by side."""
    check_at_least(1, steps=steps)
    check_threads(threads)
    check_at_least(0, top=top)
    if png is not None:
        check_file(png)
    if threads is not None:
        torch.set_num_threads(threads)
    built, example = example_model(model, arch, sparsity, batch_size, image_size)
    chosen = sparseprop.plan(built, example, min_sparsity=min_sparsity)
    found = sparseprop.profile(built, torch.randn(example.shape), plan=chosen, steps=steps)
    if png is not None:
        found.save_png(png)
    typer.echo(found.to_json() if as_json else found.table(top=top))
