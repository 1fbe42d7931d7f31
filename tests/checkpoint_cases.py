"""What a bad file may hold: patterns that no kernel may see, and what is no checkpoint at all."""

import torch
from torch import nn

from sparseprop.nn import SparseLinear


def _spoil(key: str, change):
    def spoil(state: dict) -> None:
        if change is None:
            del state[key]
        else:
            state[key] = change(state[key].clone())

    return spoil


def _set(index: int, value: int):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


# name: (what spoils the state dict of `sparse_state`, the sentence that refuses it)
BAD_PATTERNS = {
    "no row_ptr": (_spoil("0.weight_row_ptr", None), "'0' has a bad pattern: .* weight_row_ptr is missing"),
    "no col_idx": (_spoil("0.weight_col_idx", None), "'0' has a bad pattern: .* weight_col_idx is missing"),
    "no shape": (_spoil("0.weight_shape", None), "'0' is incomplete: '0.weight_shape' is missing"),
    "column too large": (
        _spoil("0.weight_col_idx", _set(-1, 8)),
        r"'0' has a bad pattern: col_idx is out of range",
    ),
    "column negative": (
        _spoil("0.weight_col_idx", _set(0, -1)),
        r"'0' has a bad pattern: col_idx is out of range",
    ),
    "unsorted": (
        _spoil("0.weight_col_idx", lambda index: index.flip(0)),
        "'0' has a bad pattern: col_idx must",
    ),
    "duplicate": (_spoil("0.weight_col_idx", _set(1, 0)), "'0' has a bad pattern: .* duplicate column"),
    "rows fall": (_spoil("0.weight_row_ptr", _set(1, 99)), "'0' has a bad pattern: row_ptr must rise"),
    "rows start late": (_spoil("0.weight_row_ptr", _set(0, 1)), "'0' has a bad pattern: row_ptr must rise"),
    "rows end early": (
        _spoil("0.weight_row_ptr", lambda p: p[:-1]),
        "'0' has a bad pattern: row_ptr must have",
    ),
    "float indices": (
        _spoil("0.weight_col_idx", torch.Tensor.float),
        "'0' has a bad pattern: col_idx must be",
    ),
    "values cut": (
        _spoil("0.weight_values", lambda v: v[:-1]),
        r"'0' has values of shape \(63,\) for a pattern of 64",
    ),
    "shape negative": (_spoil("0.weight_shape", _set(0, -8)), "'0' has a bad pattern: weight_shape is"),
    "shape no shape": (
        _spoil("0.weight_shape", torch.Tensor.float),
        "'0' has a bad pattern: weight_shape is",
    ),
}


def sparse_state() -> dict:
    """A state dict with a sparse layer of 8 x 8 full weights."""
    return dict(nn.Sequential(SparseLinear.random(8, 8, density=1.0)).state_dict())


# name: (the bytes of a .pt file, chosen for the error they lead torch's unpickler into)
NO_CHECKPOINTS = {
    "empty, EOFError": b"",
    "text, KeyError": b"hello",
    "text, IndexError": b"root:x:0:0:root:/root:/bin/bash\n",
    "struct.error": b"G",
    "RuntimeError": b"\x80\x02}q\x00.",
}

# name: (what torch.save is given, the sentence that refuses it)
ODD_STATES = {
    "numbers for names": ({1: torch.ones(2, 2)}, "holds no state dict; expected tensors by name"),
    "no tensors": ({"a": 3}, "holds no state dict; expected tensors by name"),
    "a list": ([torch.ones(2)], "holds no state dict; expected tensors by name"),
    "sparse": (
        {"a": torch.ones(2, 2).to_sparse()},
        "got layout torch.sparse_coo for 'a'; use its .to_dense",
    ),
    "without values": ({"a": torch.ones(2, device="meta")}, "without values (device meta) for 'a'"),
}
