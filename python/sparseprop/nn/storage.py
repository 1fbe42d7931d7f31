"""How a sparse layer holds its pattern: two buffers, of plain indices or of a packed N:M pattern."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping

from torch import Tensor, nn

from sparseprop.errors import SparsePropError
from sparseprop.packed import PackedNM
from sparseprop.pattern import SparsityPattern

__all__ = [
    "PATTERN_KEYS",
    "Pattern",
    "buffers_of",
    "check_shape",
    "fingerprint",
    "pattern_in",
    "plain",
    "store",
    "warn_if_overwritten",
]

Pattern = SparsityPattern | PackedNM
_PLAIN_KEYS, _PACKED_KEYS = ("weight_row_ptr", "weight_col_idx"), ("weight_nm", "weight_nm_bits")
PATTERN_KEYS = (*_PLAIN_KEYS, *_PACKED_KEYS)


def buffers_of(pattern: Pattern) -> dict[str, Tensor]:
    """The two tensors of a pattern by the names of their buffers."""
    if isinstance(pattern, PackedNM):
        return dict(zip(_PACKED_KEYS, (pattern.nm, pattern.bits), strict=True))
    return dict(zip(_PLAIN_KEYS, (pattern.row_ptr, pattern.col_idx), strict=True))


def plain(pattern: Pattern) -> SparsityPattern:
    """The pattern with plain indices."""
    return pattern.unpack() if isinstance(pattern, PackedNM) else pattern


def check_shape(pattern: Pattern, weight_shape: tuple[int, ...]) -> None:
    """Refuse a pattern of another weight."""
    cols = math.prod(weight_shape[1:])
    if isinstance(pattern, PackedNM):
        if pattern.weight_shape != weight_shape:
            raise SparsePropError(
                f"pattern must be of a weight of shape {weight_shape}, got {pattern.weight_shape}."
            )
    elif (pattern.rows, pattern.cols) != (weight_shape[0], cols):
        raise SparsePropError(
            f"pattern must be {weight_shape[0]} x {cols} for a weight of shape {weight_shape}, got "
            f"{pattern.rows} x {pattern.cols}."
        )


def store(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Make these the pattern's buffers of the module, and drop those of the other kind."""
    for key in PATTERN_KEYS:
        module._buffers.pop(key, None)
    for key, tensor in buffers.items():
        module.register_buffer(key, tensor)


def fingerprint(buffers: Mapping[str, Tensor | None]) -> int | None:
    """A number that hardly another pattern in a module's buffers has; None if they are not on the CPU."""
    code = 0
    for key in PATTERN_KEYS:
        tensor = buffers.get(key)
        if tensor is not None:
            if type(tensor) is not Tensor or not tensor.is_cpu:
                return None
            code = zlib.crc32(tensor.detach().contiguous().numpy().data, code)
    return code


def warn_if_overwritten(layer: str, before: int | None, now: int | None) -> None:
    """Averages of integers are rounded: a pattern's become another one, which may pass as valid."""
    if before is not None and now is not None and before != now:
        warnings.warn(
            f"the pattern of a {layer} was overwritten in place. If an average of models did that "
            "(AveragedModel with use_buffers=True), the pattern is wrong now: average only floating-point "
            "tensors. If you did, use load_state_dict, which checks patterns.",
            stacklevel=4,
        )


def pattern_in(entries: Mapping[str, Tensor], weight_shape: tuple[int, ...]) -> Pattern | None:
    """The pattern among a layer's state-dict entries, not validated; None if there is none.

    Raises SparsePropError if a part of it is missing.
    """
    for keys in (_PLAIN_KEYS, _PACKED_KEYS):
        found = [key for key in keys if entries.get(key) is not None]
        if len(found) == 1:
            missing = next(key for key in keys if key not in found)
            raise SparsePropError(
                f"{found[0]} is there, {missing} is missing; a pattern needs both of {keys}."
            )
        if found and keys is _PLAIN_KEYS:
            return SparsityPattern(
                weight_shape[0], math.prod(weight_shape[1:]), *(entries[key] for key in keys)
            )
        if found:
            return PackedNM(tuple(weight_shape), *(entries[key] for key in keys))
    return None
