"""Files of a run that are either whole or absent, and tensors with a note and a checksum beside them."""

import errno
import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprop.checkpoint import atomic_write, check_tensor, load_checkpoint, save_checkpoint
from sparseprop.errors import SparsePropError

__all__ = [
    "append_line",
    "load_tensors",
    "make_folder",
    "read_text",
    "remove_partials",
    "save_tensors",
    "write_text",
]

_NOTE, _CHECKSUM = "job", "crc32"


def write_text(path: Path, content: str) -> None:
    """Replace ``path`` by ``content``: after a kill at any moment it is the old file or the new one.

    Raises `SparsePropError` when there is no room or no permission; nothing half-written stays behind.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(content)


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
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why = "the disk has no room for it. Free some space" if full else f"{error}. Check its permissions"
        raise SparsePropError(f"{str(path)!r} cannot be written: {why}, then resume the run.") from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Raises `SparsePropError` when the system refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparsePropError(
            f"the folder {path} cannot be made: {error.strerror}; choose another."
        ) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors and a note (anything JSON can hold) as one safetensors file, whole or not at all."""
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    meta = json.dumps({**note, _CHECKSUM: _checksum(tensors)})
    save_checkpoint(tensors, path, metadata={_NOTE: meta})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the note of a safetensors file; the note is empty if `save_tensors` did not write it.

    Raises `SparsePropError` for a file that is missing, truncated or changed since it was written.
    """
    checkpoint = load_checkpoint(path)
    note = _own_note(checkpoint.metadata.get(_NOTE, ""))
    if note is None:
        return checkpoint.state_dict, {}
    if note.get(_CHECKSUM) != _checksum(checkpoint.state_dict):
        raise SparsePropError(
            f"the checkpoint {path} is corrupted: its checksum does not fit what it holds; expected the file "
            "as it was written; restore it from a copy"
        )
    return checkpoint.state_dict, note


def _own_note(text: str) -> dict[str, Any] | None:
    """The note if `save_tensors` wrote it: others may name theirs alike, but keep no checksum in it."""
    try:
        note = json.loads(text)
    except (ValueError, RecursionError):
        return {} if text.startswith("{") and f'"{_CHECKSUM}": ' in text else None  # ours, but damaged
    return note if isinstance(note, dict) and _CHECKSUM in note else None


def read_text(path: Path) -> str:
    """What `write_text` wrote. Raises `SparsePropError` for a file that cannot be read or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SparsePropError(
            f"the file {path} cannot be read: {error}; restore it from a copy or start a new run"
        ) from error


def remove_partials(folder: Path) -> None:
    """Clear what a killed process was still writing."""
    for partial in folder.rglob(".*.tmp"):
        partial.unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        plain = tensors[name].detach().resolve_conj().resolve_neg().contiguous()
        value = zlib.crc32(plain.reshape(-1).view(torch.uint8).numpy().data, value)
    return value
