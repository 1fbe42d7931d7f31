"""State dicts and files of models with sparse layers: leave, come back, and never write half a file."""

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
_FORMAT = 1


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
        metadata: free text to keep beside the tensors, by any name but "sparseprop".

    Raises:
        SparsePropError: the file cannot be written (no room, no folder, no permission), the metadata is no
            text, or the state dict holds something else than dense tensors with values, by name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(nn.Linear(2, 2), f"{folder}/model.safetensors", metadata={"epoch": "3"})
    ...     load_checkpoint(f"{folder}/model.safetensors").metadata
    {'epoch': '3'}
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    _check_metadata(metadata or {})
    tensors: dict[str, torch.Tensor] = {}
    first_name: dict[object, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        check_tensor(name, tensor)
        signs = (tensor.is_conj(), tensor.is_neg())
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, signs)
        if tensor.numel() and view in first_name:
            shared[name] = first_name[view]
            continue
        first_name[view] = name
        tensors[name] = _own_memory(tensor)
    header = json.dumps({"format": _FORMAT, "shared": shared, "order": list(state)})
    with atomic_write(path) as temporary:
        temporary.write_bytes(_serialized(tensors, {**(metadata or {}), _HEADER: header}))


def _serialized(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    try:
        return safetensors.torch.save(tensors, metadata=metadata)
    except KeyError as error:  # a type that the format does not know
        odd = next((name for name, tensor in tensors.items() if tensor.dtype == error.args[0]), None)
        if odd is None:
            raise
        raise SparsePropError(
            f"A checkpoint cannot hold type {error.args[0]}, got it for {odd!r}; convert it."
        ) from error


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
        if header.get("format", _FORMAT) != _FORMAT:
            raise SparsePropError(
                f"Checkpoint {os.fspath(path)!r} has format {header['format']}, this version reads "
                f"{_FORMAT}; use the version of sparseprop that wrote it."
            )
        stored |= {alias: stored[name] for alias, name in header.get("shared", {}).items()}
        stored |= _tied(stored, metadata)
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


def _tied(stored: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Names that `safetensors.torch.save_model` left out, of tensors that it kept under another name."""
    return {alias: stored[name] for alias, name in metadata.items() if alias not in stored and name in stored}


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


def check_tensor(name: object, tensor: object) -> None:
    """Raise `SparsePropError` unless this entry of a state dict is one that a file can hold."""
    if not isinstance(name, str):
        raise SparsePropError(f"A checkpoint holds tensors by name, got {name!r} for a name; use text.")
    if name == "__metadata__" or not _is_text(name):
        raise SparsePropError(f"A checkpoint cannot hold a tensor named {name!r}; rename it.")
    if not isinstance(tensor, torch.Tensor):
        raise SparsePropError(f"A checkpoint holds tensors, got a {type(tensor).__name__} for {name!r}.")
    if tensor.layout is not torch.strided:
        odd, advice = f"layout {tensor.layout}", "use its .to_dense()"
    elif tensor.is_meta:
        odd, advice = "one without values (device meta)", "give it values first"
    elif tensor.is_quantized:
        odd, advice = f"quantized ones ({tensor.dtype})", "use its .dequantize()"
    else:
        return
    raise SparsePropError(f"A checkpoint holds dense tensors, got {odd} for {name!r}; {advice}.")


def _check_metadata(metadata: Mapping[str, str]) -> None:
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str) and _is_text(key + value)):
            raise SparsePropError(f"metadata must be text by name, got {value!r} for {key!r}; use str().")
        if key == _HEADER:
            raise SparsePropError(f"metadata cannot be named {key!r}: the file keeps its own notes there.")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


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
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))  # whom it is hidden from
        _flush(temporary)
        temporary.replace(target)
        _flush(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise SparsePropError(f"{os.fspath(path)!r} cannot be written: {_why(error)}") from error
    finally:
        with suppress(OSError):  # whatever kept it from being written is told above
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
    """safetensors refuses views and odd strides, and does not see that a tensor is a conjugate."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
