"""N:M patterns in their own storage: fixed counts, no row pointers, a few bits for each weight kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparseprop.errors import SparsePropError
from sparseprop.pattern import SparsityPattern

__all__ = ["PACKED_SIZES", "PackedNM"]

PACKED_SIZES = (4, 8, 16, 32)  # M whose places fill whole bits


@dataclass(frozen=True, eq=False)
class PackedNM:
    """Exactly N of every M consecutive input channels, at each kernel position, for M of 4, 8, 16 or 32.

    `nm` is int64, (N, M). `bits` is uint8 of shape (out, bytes): log2(M) bits, lowest first, for the place of
    each kept channel in its group, in the order (group, kernel position, place). That is a sixteenth (2:4) to
    a sixth (of 32) of the 32-bit column indices of a `SparsityPattern`.

    >>> mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0]]).bool()
    >>> packed = PackedNM.from_mask(mask, 2, 4)
    >>> packed.bits.tolist(), packed.nnz, packed.unpack().col_idx.tolist()
    ([[156]], 4, [0, 3, 5, 6])
    """

    weight_shape: tuple[int, ...]
    nm: Tensor
    bits: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, n: int, m: int) -> PackedNM:
        """The pattern of a weight's bool mask (out, in / groups, *kernel), which must be exactly N:M."""
        if m not in PACKED_SIZES or mask.dim() < 2 or mask.shape[1] % m:
            raise SparsePropError(
                f"packed N:M patterns need M of {PACKED_SIZES} that divides the input channels, got {n}:{m} "
                f"for a weight of shape {tuple(mask.shape)}; store it as a SparsityPattern."
            )
        groups = _groups(mask, m)
        if not bool((groups.sum(-1) == n).all()):
            raise SparsePropError(f"the mask does not keep exactly {n} of every {m} input channels.")
        places = groups.nonzero()[:, -1].view(mask.shape[0], -1).numpy().astype(np.uint8)
        digits = places[..., None] >> np.arange(_width(m), dtype=np.uint8) & 1
        bits = np.packbits(digits.reshape(len(places), -1), axis=1, bitorder="little")
        return cls(tuple(mask.shape), torch.tensor([n, m]), torch.from_numpy(bits))

    @classmethod
    def detect(cls, mask: Tensor) -> PackedNM | None:
        """The pattern if the mask keeps equally many, though not all, of every M channels; smallest M first.

        >>> PackedNM.detect(torch.eye(4).bool()).nm.tolist()
        [1, 4]
        """
        for m in PACKED_SIZES:
            if mask.dim() < 2 or not mask.numel() or mask.shape[1] % m:
                continue
            counts = _groups(mask, m).sum(-1)
            n = int(counts.flatten()[0])
            if 0 < n < m and bool((counts == n).all()):
                return cls.from_mask(mask, n, m)
        return None

    @property
    def name(self) -> str:
        """As patterns are written: "2:4"."""
        return ":".join(map(str, self.nm.tolist()))

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.weight_shape[0]

    @property
    def nnz(self) -> int:
        """Number of weights kept."""
        n, m = (int(number) for number in self.nm)
        return math.prod(self.weight_shape) // m * n

    def row_nnz(self) -> Tensor:
        """Weights kept in each row, int64, shape (out,)."""
        return torch.full((self.rows,), self.nnz // max(1, self.rows))

    def unpack(self) -> SparsityPattern:
        """The same pattern with plain indices."""
        n, m = self.nm.tolist()
        taps = math.prod(self.weight_shape[2:])
        places = self._places().reshape(self.rows, -1, taps, n)  # row, group, tap, one of N
        group = np.arange(places.shape[1])[:, None, None]
        columns = (group * m + places) * taps + np.arange(taps)[:, None]
        columns = columns.reshape(self.rows, -1)
        if taps > 1:  # a flat weight has the taps of a channel side by side
            columns.sort(axis=1)
        row_ptr = torch.arange(self.rows + 1) * columns.shape[1]
        cols = math.prod(self.weight_shape[1:])
        col_idx = torch.from_numpy(columns.reshape(-1).astype(np.int32))
        device = self.bits.device
        return SparsityPattern(self.rows, cols, row_ptr.to(device), col_idx.to(device))

    def validate(self) -> None:
        """Raise SparsePropError, naming what is wrong, unless the bits are fit for a kernel."""
        nm, bits = self.nm, self.bits
        if nm.dtype is not torch.int64 or nm.shape != (2,):
            raise SparsePropError(
                f"nm must be the int64 pair (N, M), got {nm.dtype} of shape {tuple(nm.shape)}."
            )
        n, m = nm.tolist()
        if not math.prod(self.weight_shape):
            raise SparsePropError(f"a packed pattern needs a weight, got one of shape {self.weight_shape}.")
        if m not in PACKED_SIZES or not 0 < n <= m or self.weight_shape[1] % m:
            raise SparsePropError(
                f"N:M must have M of {PACKED_SIZES} that divides {self.weight_shape[1]} input channels, and "
                f"N of 1 to M, got {n}:{m}."
            )
        wanted = (self.rows, -(-self._entries() * _width(m) // 8))
        if bits.dtype is not torch.uint8 or bits.shape != wanted:
            raise SparsePropError(
                f"bits must be uint8 of shape {wanted}, got {bits.dtype} of shape {tuple(bits.shape)}."
            )
        places = self._places().reshape(-1, n)
        if not bool((places[:, 1:] > places[:, :-1]).all()):
            raise SparsePropError(
                "bits must name increasing places inside each group, got repeated or unsorted ones."
            )

    def _entries(self) -> int:
        return self.nnz // max(1, self.rows)

    def _places(self) -> npt.NDArray[np.uint8]:
        width = _width(int(self.nm[1]))
        digits = np.unpackbits(
            self.bits.cpu().numpy(), axis=1, count=self._entries() * width, bitorder="little"
        ).reshape(self.rows, -1, width)
        places: npt.NDArray[np.uint8] = (digits << np.arange(width, dtype=np.uint8)).sum(-1, dtype=np.uint8)
        return places

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedNM):
            return NotImplemented
        same = self.weight_shape == other.weight_shape
        return same and torch.equal(self.nm, other.nm) and torch.equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]  # tensors inside: equal by content, so not hashable


def _groups(mask: Tensor, m: int) -> Tensor:
    """The mask as (row, group, tap, place)."""
    rows, channels = mask.shape[:2]
    return mask.reshape(rows, channels // m, m, -1).transpose(2, 3)


def _width(m: int) -> int:
    return m.bit_length() - 1
