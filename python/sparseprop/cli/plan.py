"""``sparseprop plan``: what a swap of a model would do."""

from typing import Annotated

import typer
from torch import Tensor, nn

import sparseprop
from sparseprop.cli.console import guarded
from sparseprop.cli.options import Arch, AsJson, ImageSize, MinSparsity, Model, Sparsity, check_at_least
from sparseprop.errors import SparsePropError
from sparseprop.train.models import ModelSpec, default_image_size, parse_arch
from sparseprop.train.prune import magnitude_masks, prunable_layers
from sparseprop.train.start import is_file_name, load_model, read_checkpoint, with_own_classes
from sparseprop.train.swapping import example_batch, with_masks

__all__ = ["example_model", "plan"]


@guarded
def plan(
    model: Model,
    arch: Arch = None,
    sparsity: Sparsity = None,
    min_sparsity: MinSparsity = None,
    measure: Annotated[bool, typer.Option(help="Time the layers; else a cost model estimates.")] = True,
    batch_size: Annotated[int, typer.Option(help="Images in the example.")] = 16,
    image_size: ImageSize = None,
    as_json: AsJson = False,
) -> None:
    """Say which layers of a model would become sparse, and why."""
    built, example = example_model(model, arch, sparsity, batch_size, image_size)
    found = sparseprop.plan(built, example, min_sparsity=min_sparsity, measure=measure)
    typer.echo(found.to_json() if as_json else str(found))


def example_model(
    model: str, arch: str | None, sparsity: float | None, batch_size: int, image_size: int | None
) -> tuple[nn.Module, Tensor]:
    """The masked dense model that the options of a command name, and a batch of zeros for it."""
    if sparsity is not None and not 0 < sparsity < 1:
        raise SparsePropError(f"sparsity must be between 0 and 1, such as 0.9; got {sparsity}")
    check_at_least(1, batch_size=batch_size, image_size=image_size)
    tensors, note = read_checkpoint(model) if is_file_name(model) else (None, {})
    known = note.get("spec", {})
    name = arch or known.get("arch") or ("" if is_file_name(model) else model)
    if not name:
        raise SparsePropError(f"{model} does not say which architecture it holds; pass it with --arch")
    spec = ModelSpec(
        arch=name,
        num_classes=known.get("num_classes", 10 if parse_arch(name)[0] == "small" else 1000),
        channels=known.get("channels", 1 if parse_arch(name)[0] == "small" else 3),
        image_size=image_size or known.get("image_size") or default_image_size(name),
    )
    if tensors is not None:
        spec = with_own_classes(spec, tensors)
    built, masks = load_model(spec, tensors, where=model)
    if sparsity is not None:
        layers = prunable_layers(built, num_classes=spec.num_classes)
        weights = {layer: module.get_parameter("weight") for layer, module in layers.items()}
        masks |= magnitude_masks(weights, sparsity, scope="layer")
    with_masks(built, masks)
    return built, example_batch(batch_size, spec)
