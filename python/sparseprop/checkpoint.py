"""State dicts and files of models with sparse layers: leave, come back, and never write half a file."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from sparseprop.errors import SparsePropError
from sparseprop.swap.state import check_patterns, dense_state_dict, swap_like

__all__ = [
    "Checkpoint",
    "atomic_write",
    "dense_state_dict",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
    "swap_like",
]

_HEADER = "sparseprop"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: the state dict, and the free text that was saved beside it."""

    state_dict: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def save_checkpoint(
    model: nn.Module | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model's state dict as a safetensors file: the whole file or, on any error, none of it.

    Tensors that share memory (tied weights) are stored once and restored under all their names.

    Args:
        model: a model, swapped or not, or a state dict.
        path: the file; what was there before is replaced in one step.
        metadata: free text to keep beside the tensors.

    Raises:
        SparsePropError: the file cannot be written (no room, no folder, no permission), or the state dict
            holds something that is no tensor.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(nn.Linear(2, 2), f"{folder}/model.safetensors", metadata={"epoch": "3"})
    ...     load_checkpoint(f"{folder}/model.safetensors").metadata
    {'epoch': '3'}
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors: dict[str, torch.Tensor] = {}
    first_name: dict[object, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise SparsePropError(f"A checkpoint holds tensors, got a {type(tensor).__name__} for {name!r}.")
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first_name:
            shared[name] = first_name[view]
            continue
        first_name[view] = name
        tensors[name] = _own_memory(tensor)
    header = json.dumps({"format": 1, "shared": shared, "order": list(state)})
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata={**(metadata or {}), _HEADER: header}))


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a safetensors file, ours or any other, and check the patterns of all sparse layers in it.

    Raises:
        SparsePropError: the file is missing, truncated, corrupt or no safetensors file, or the indices of a
            sparse layer are incomplete, negative, unsorted or do not fit its values.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        header = json.loads(metadata.pop(_HEADER, "{}"))
        stored |= {alias: stored[name] for alias, name in header.get("shared", {}).items()}
        state = {name: stored[name] for name in header.get("order", stored)}
    except FileNotFoundError:
        raise SparsePropError(f"There is no checkpoint {os.fspath(path)!r}; check the path.") from None
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SparsePropError(
            f"Checkpoint {os.fspath(path)!r} cannot be read: {error}. It must be a complete "
            "safetensors file; take an earlier one."
        ) from error
    check_patterns(state)
    return Checkpoint(state, metadata)


def load_model(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint file, sparse layers included, into `model`, dense or swapped; returns the model.

    Raises:
        SparsePropError: as `load_checkpoint` and `swap_like`, or keys or shapes that do not match; in the
            last case what does match has been loaded.

    >>> import sparseprop, tempfile
    >>> trained = sparseprop.swap_modules(nn.Sequential(nn.Linear(8, 8)), min_sparsity=0.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(trained, f"{folder}/model.safetensors")
    ...     model = load_model(nn.Sequential(nn.Linear(8, 8)), f"{folder}/model.safetensors")
    >>> type(model[0]).__name__
    'SparseLinear'
    """
    state = load_checkpoint(path).state_dict
    model = swap_like(model, state)
    try:
        model.load_state_dict(state)
    except SparsePropError:
        raise
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise SparsePropError(f"Checkpoint {os.fspath(path)!r} does not fit the model: {why}") from error
    return model


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; on success it takes the place of `path` in one step.

    The data is on the disk before the rename, so a crash leaves the old file or the new one, never a mixture.

    Raises:
        SparsePropError: the system refuses (no room, no folder, no permission); `path` is then as before.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(f"{folder}/result.json") as temporary:
    ...         _ = temporary.write_text("{}")
    ...     Path(folder, "result.json").read_text()
    '{}'
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(target)
        _flush(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise SparsePropError(f"{os.fspath(path)!r} cannot be written: {_why(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in str(error):
        return "the disk has no room for it. Free some space or choose another folder."
    return f"{error}. Check that the folder exists and may be written to."


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """safetensors refuses views and odd strides."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    tensor = tensor.detach()
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
