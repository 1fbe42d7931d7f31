"""``sparseprop convert``: a trained checkpoint to N:M, fitted to what its layers computed before."""

import dataclasses
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import sparseprop
from sparseprop.cli.console import guarded
from sparseprop.cli.conversion import check_out, show_report
from sparseprop.cli.options import Arch, AsJson, Checkpoint, ImageSize, Out, Pattern, Plot, check_at_least
from sparseprop.conversion import ConvertProgress
from sparseprop.data import ImageData, batch_order, in_order, load_data
from sparseprop.errors import SparsePropError
from sparseprop.train.checkpoint import save_tensors
from sparseprop.train.models import ModelSpec, default_image_size
from sparseprop.train.start import load_model, own_channels, read_checkpoint, with_own_classes

__all__ = ["convert"]


@guarded
def convert(
    checkpoint: Checkpoint,
    pattern: Pattern,
    out: Out,
    data: Annotated[str, typer.Option(help="digits, mnist5k, or a folder with a subfolder per class.")],
    arch: Arch = None,
    image_size: ImageSize = None,
    score: Annotated[str, typer.Option(help="magnitude, or wx2: by the inputs too.")] = "magnitude",
    reconstruct: Annotated[bool, typer.Option(help="Fit what is left by least squares.")] = True,
    sequential: Annotated[bool, typer.Option(help="Fit each layer after those before it.")] = True,
    batches: Annotated[int, typer.Option(help="Calibration batches.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Images in each.")] = 64,
    bn_batches: Annotated[
        int | None, typer.Option(help="Batches for batch norm; by default none after a sequential fit.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the images.")] = 0,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Give a trained network an N:M pattern and mend it without training, from a few batches of images.

    The images need no labels that the network knows; where they have them, accuracies are measured.
    """
    check_at_least(1, batches=batches, batch_size=batch_size, image_size=image_size)
    check_out(out, plot)
    tensors, note = read_checkpoint(checkpoint)
    spec, images = _setting(tensors, note, checkpoint, data, arch, image_size)
    model, _ = load_model(spec, tensors, where=checkpoint)
    order = batch_order(len(images.train.labels), batch_size, seed=seed, epoch=0)[:batches]
    before = _accuracy(model, images, spec)
    report = sparseprop.convert(
        model,
        pattern,
        [images.train.fetch(indices) for indices in order],
        score=score,
        reconstruct=reconstruct,
        sequential=sequential,
        bn_batches=bn_batches,
        progress=_tell,
    )
    save_tensors(out, model.state_dict(), {**note, "spec": dataclasses.asdict(spec)})
    show_report(report, out, plot, as_json=as_json)
    after = _accuracy(model, images, spec)
    if before is None or after is None:
        outcome = f"not measured: {checkpoint} has {spec.num_classes} classes, {data} {len(images.classes)}"
    else:
        outcome = f"{before:.2f} % before, {after:.2f} % after"
    typer.echo(f"held-out accuracy: {outcome}", err=as_json)


def _setting(
    tensors: dict[str, Tensor],
    note: dict[str, Any],
    checkpoint: str,
    data: str,
    arch: str | None,
    image_size: int | None,
) -> tuple[ModelSpec, ImageData]:
    known = note.get("spec", {})
    name = arch or str(known.get("arch") or "")
    if not name:
        raise SparsePropError(f"{checkpoint} does not say which architecture it holds; pass it with --arch")
    channels = int(str(known.get("channels") or own_channels(name, tensors)))
    size = image_size or int(str(known.get("image_size") or default_image_size(name)))
    split = int(note.get("seed", note.get("config", {}).get("seed", 0)))  # what was held out stays so
    images = load_data(data, image_size=size, channels=channels, seed=split)
    classes = int(str(known.get("num_classes") or len(images.classes)))
    return with_own_classes(ModelSpec(name, classes, channels, size), tensors), images


def _tell(news: ConvertProgress) -> None:
    if news.layer:
        typer.echo(f"{news.done + 1:>4} of {news.total}  {news.layer}", err=True)


def _accuracy(model: nn.Module, images: ImageData, spec: ModelSpec) -> float | None:
    """None if the labels are not those of the model; calibration needs none."""
    if len(images.classes) != spec.num_classes:
        return None
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in in_order(images.test, 256))
    return 100 * right / len(images.test.labels)
