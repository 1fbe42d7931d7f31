"""Files of a run that are either whole or absent: written beside their place, flushed, then renamed."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparseprop.errors import SparsePropError

__all__ = ["append_line", "load_tensors", "save_tensors", "write_atomic"]

_NOTE = "sparseprop"  # the one metadata entry: JSON
_PARTIAL = ".partial"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace ``path`` by ``content`` so that a kill at any moment leaves the old file or the new one.

    Raises `SparsePropError` when there is no room or no permission; nothing half-written stays behind.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(path.name + _PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _cannot_write(path, len(data), error) from error


def append_line(path: Path, line: str) -> None:
    """Add one line to ``path``, or nothing at all. Raises `SparsePropError` when there is no room."""
    data = (line + "\n").encode()
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)
        raise _cannot_write(path, len(data), error) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors and a JSON note as one safetensors file, atomically, with a checksum over the values."""
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    meta = json.dumps({**note, "crc32": _checksum(owned)})
    write_atomic(path, save(owned, {_NOTE: meta}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the note of a safetensors file; the note is empty if `save_tensors` did not write it.

    Raises `SparsePropError` for a file that is missing, truncated or changed since it was written.
    """
    advice = "expected a whole safetensors file; restore it from a copy or write it again"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
            note: dict[str, Any] = json.loads((file.metadata() or {}).get(_NOTE, "{}"))
    except FileNotFoundError as error:
        raise SparsePropError(f"there is no checkpoint {path}; check the path") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise SparsePropError(f"the checkpoint {path} is corrupted or truncated ({error}); {advice}") from error
    if "crc32" in note and note["crc32"] != _checksum(tensors):
        raise SparsePropError(f"the checkpoint {path} is corrupted: its checksum does not fit its values; {advice}")
    return tensors, note


def remove_partials(folder: Path) -> None:
    """Clear what a killed process was still writing."""
    for partial in folder.rglob("*" + _PARTIAL):
        partial.unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), value)
    return value


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, size: int, error: OSError) -> SparsePropError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = 0
        with suppress(OSError):
            free = shutil.disk_usage(path.parent).free
        return SparsePropError(
            f"no room to write {path}: it needs {size / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; "
            "make room, then continue with --resume"
        )
    return SparsePropError(f"cannot write {path}: {error.strerror}; choose a folder that can be written to")
