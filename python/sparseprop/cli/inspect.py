"""``sparseprop inspect``: what a checkpoint holds, layer by layer."""

import json
from dataclasses import asdict, dataclass

import torch
import typer
from torch import Tensor

from sparseprop.cli.console import guarded, show_table
from sparseprop.cli.options import AsJson, Checkpoint
from sparseprop.masks import detect_nm
from sparseprop.nn.storage import pattern_in, plain
from sparseprop.train.start import mask_of, read_checkpoint

__all__ = ["inspect"]


@dataclass(frozen=True)
class _Layer:
    name: str
    shape: tuple[int, ...]
    form: str
    nnz: int
    density: float
    pattern: str
    bytes: int


@guarded
def inspect(
    checkpoint: Checkpoint,
    as_json: AsJson = False,
) -> None:
    """List the weights of a checkpoint: shape, non-zeros, density, N:M pattern, memory.

    A checkpoint does not say how many groups a convolution has; whether its pattern is transposable is
    said for one.
    """
    tensors, note = read_checkpoint(checkpoint)
    layers = [layer for name in tensors if (layer := _layer(name, tensors)) is not None]
    total = sum(map(_bytes, tensors.values()))
    if as_json:
        typer.echo(
            json.dumps({"layers": [asdict(layer) for layer in layers], "bytes": total, **note}, indent=2)
        )
        return
    show_table(
        {
            "weight": False,
            "shape": False,
            "form": False,
            "nnz": True,
            "density": True,
            "N:M": False,
            "kB": True,
        },
        [
            [
                layer.name,
                "x".join(map(str, layer.shape)),
                layer.form,
                f"{layer.nnz:,}",
                f"{100 * layer.density:.2f} %",
                layer.pattern or "-",
                f"{layer.bytes / 1e3:,.1f}",
            ]
            for layer in layers
        ],
    )
    nnz, numel = sum(layer.nnz for layer in layers), sum(torch.Size(layer.shape).numel() for layer in layers)
    share = f"{100 * nnz / numel:.2f} % of {numel:,} weights are not zero; " if numel else ""
    typer.echo(f"{share}{len(tensors)} tensors, {total / 1e6:.2f} MB")


def _layer(name: str, tensors: dict[str, Tensor]) -> _Layer | None:
    layer, _, leaf = name.rpartition(".")
    if leaf == "weight_values":
        return _sparse_layer(name.removesuffix("_values"), tensors)
    tensor = tensors[name]
    if leaf not in ("weight", "weight_orig") or tensor.ndim < 2:
        return None
    mask = mask_of(tensors, name)
    form = "dense" if mask is None else "masked"  # spectral norm has a weight_orig without a mask
    kept = (tensor if mask is None else mask) != 0
    return _described(layer or name, tuple(tensor.shape), form, kept, _bytes(tensor))


def _sparse_layer(weight: str, tensors: dict[str, Tensor]) -> _Layer:
    """``weight`` is what the dense weight would be called."""
    stem = weight.removesuffix("weight")
    parts = {key.removeprefix(stem): tensors[key] for key in tensors if key.startswith(f"{weight}_")}
    shape = tuple(parts["weight_shape"].tolist())
    pattern = pattern_in(parts, shape)
    assert pattern is not None  # the checkpoint was checked when it was read
    size = sum(map(_bytes, parts.values()))
    return _described(stem[:-1] or weight, shape, "sparse", plain(pattern).to_mask().view(shape), size)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _described(name: str, shape: tuple[int, ...], form: str, mask: Tensor, size: int) -> _Layer:
    nnz = int(mask.count_nonzero())
    return _Layer(name, shape, form, nnz, nnz / max(1, mask.numel()), _pattern(mask), size)


def _pattern(mask: Tensor) -> str:
    is_layer = mask.ndim <= 5 and 0 < mask.count_nonzero() < mask.numel()  # of Linear or Conv
    found = detect_nm(mask) if is_layer else None
    return str(found) if found is not None else ""
