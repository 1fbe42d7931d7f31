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
from sparseprop.train.start import read_checkpoint

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
    """List the weights of a checkpoint: shape, non-zeros, density, N:M pattern, memory."""
    tensors, note = read_checkpoint(checkpoint)
    layers = [layer for name in tensors if (layer := _layer(name, tensors)) is not None]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
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
    prefix, _, leaf = name.rpartition(".")
    if leaf == "weight_values":
        parts = {key: tensors[key] for key in tensors if key.startswith(f"{prefix}.weight_")}
        shape = tuple(parts[f"{prefix}.weight_shape"].tolist())
        pattern = pattern_in({key.removeprefix(f"{prefix}."): part for key, part in parts.items()}, shape)
        assert pattern is not None  # the checkpoint was checked when it was read
        mask = plain(pattern).to_mask()
        size = sum(part.numel() * part.element_size() for part in parts.values())
        return _described(prefix, shape, "sparse", mask.view(shape), size)
    tensor = tensors[name]
    if leaf not in ("weight", "weight_orig") or tensor.ndim < 2:
        return None
    mask = tensors.get(f"{prefix}.weight_mask", tensor) != 0
    form = "dense" if leaf == "weight" else "masked"
    return _described(prefix or name, tuple(tensor.shape), form, mask, tensor.numel() * tensor.element_size())


def _described(name: str, shape: tuple[int, ...], form: str, mask: Tensor, size: int) -> _Layer:
    nnz = int(mask.count_nonzero())
    return _Layer(name, shape, form, nnz, nnz / max(1, mask.numel()), _pattern(mask), size)


def _pattern(mask: Tensor) -> str:
    found = detect_nm(mask) if 0 < mask.count_nonzero() < mask.numel() else None
    return str(found) if found is not None else ""
