"""The contractions in plain serial loops (Numba), accumulating in float64: slow, short, the truth for tests.

Chosen with `SPARSEPROP_BACKEND=reference`; the interface is that of `_native.Contraction`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from sparseprop.packed import PackedNM

__all__ = ["Contraction"]

_FLOATS: tuple[type[Any], ...] = (np.float32, np.float64, np.uint16)  # bfloat16 travels as its upper 16 bits
_Array = npt.NDArray[Any]


@numba.njit(cache=True)
def _forward(x, values, bias, row_ptr, taps, geometry, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    groups, stride, padding = geometry
    row_span, channel_span = out.shape[1] // groups, x.shape[1] // groups
    for n in range(out.shape[0]):
        for row in range(out.shape[1]):
            out[n, row] = bias[row]
            first_channel = row // row_span * channel_span
            for k in range(row_ptr[row], row_ptr[row + 1]):
                channel = first_channel + taps[k, 0]
                for od in range(out.shape[2]):
                    d = od * stride[0] + taps[k, 1] - padding[0]
                    if d < 0 or d >= x.shape[2]:
                        continue
                    for oh in range(out.shape[3]):
                        h = oh * stride[1] + taps[k, 2] - padding[1]
                        if h < 0 or h >= x.shape[3]:
                            continue
                        for ow in range(out.shape[4]):
                            w = ow * stride[2] + taps[k, 3] - padding[2]
                            if 0 <= w < x.shape[4]:
                                out[n, row, od, oh, ow] += values[k] * x[n, channel, d, h, w]


@numba.njit(cache=True)
def _backward(x, values, grad, row_ptr, taps, geometry, grad_x, grad_values):  # type: ignore[no-untyped-def]  # pragma: no cover
    groups, stride, padding = geometry
    row_span, channel_span = grad.shape[1] // groups, x.shape[1] // groups
    for n in range(grad.shape[0]):
        for row in range(grad.shape[1]):
            first_channel = row // row_span * channel_span
            for k in range(row_ptr[row], row_ptr[row + 1]):
                channel = first_channel + taps[k, 0]
                for od in range(grad.shape[2]):
                    d = od * stride[0] + taps[k, 1] - padding[0]
                    if d < 0 or d >= x.shape[2]:
                        continue
                    for oh in range(grad.shape[3]):
                        h = oh * stride[1] + taps[k, 2] - padding[1]
                        if h < 0 or h >= x.shape[3]:
                            continue
                        for ow in range(grad.shape[4]):
                            w = ow * stride[2] + taps[k, 3] - padding[2]
                            if 0 <= w < x.shape[4]:
                                g = grad[n, row, od, oh, ow]
                                grad_x[n, channel, d, h, w] += values[k] * g
                                grad_values[k] += x[n, channel, d, h, w] * g


class Contraction:
    """The twin of `_native.Contraction`; arguments are documented there."""

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        groups: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        row_ptr: npt.NDArray[np.int64],
        col_idx: npt.NDArray[np.int32],
    ) -> None:
        self._out_channels, self._in_channels = out_channels, in_channels
        self._groups, self._stride = groups, tuple(stride)
        self._row_ptr = row_ptr.copy()
        position = np.unravel_index(col_idx, (in_channels // groups, *kernel)) if len(col_idx) else [[]] * 4
        taps = np.stack([np.asarray(part, dtype=np.int64) for part in position], axis=1)
        self._taps = np.ascontiguousarray(taps * np.array([1, *dilation]))

    @classmethod
    def from_nm(
        cls,
        out_channels: int,
        in_channels: int,
        groups: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        kept: int,
        of: int,
        bits: npt.NDArray[np.uint8],
    ) -> Contraction:
        shape = (out_channels, in_channels // groups, *kernel)
        plain = PackedNM(shape, torch.tensor([kept, of]), torch.from_numpy(bits)).unpack()
        layer = (out_channels, in_channels, groups, kernel, stride, dilation)
        return cls(*layer, plain.row_ptr.numpy(), plain.col_idx.numpy())

    @property
    def nnz(self) -> int:
        return len(self._taps)

    @property
    def storage_bytes(self) -> int:
        return int(self._row_ptr.nbytes + self._taps.nbytes)

    def forward(
        self,
        dtype: int,
        batch: int,
        in_size: Sequence[int],
        padding: Sequence[int],
        out_size: Sequence[int],
        x: int,
        x_strides: Sequence[int],
        values: int,
        bias: int,
        out: int,
        out_strides: Sequence[int],
    ) -> None:
        kind, wide = _FLOATS[dtype], np.float64 if dtype == 1 else np.float32
        source = _load(_strided(x, kind, (batch, self._in_channels, *in_size), x_strides))
        weights = _load(_strided(values, wide, (self.nnz,), (1,)))
        offset = (
            _load(_strided(bias, wide, (self._out_channels,), (1,))) if bias else np.zeros(self._out_channels)
        )
        result = np.empty((batch, self._out_channels, *out_size))
        geometry = (self._groups, self._stride, tuple(padding))
        _forward(source, weights, offset, self._row_ptr, self._taps, geometry, result)
        _store(_strided(out, kind, result.shape, out_strides), result)

    def backward(
        self,
        dtype: int,
        batch: int,
        in_size: Sequence[int],
        padding: Sequence[int],
        out_size: Sequence[int],
        x: int,
        x_strides: Sequence[int],
        values: int,
        grad_out: int,
        grad_out_strides: Sequence[int],
        grad_in: int,
        grad_in_strides: Sequence[int],
        grad_values: int,
        grad_bias: int,
        added: int = 0,
        added_strides: Sequence[int] = (),
    ) -> None:
        kind, wide = _FLOATS[dtype], np.float64 if dtype == 1 else np.float32
        in_shape, out_shape = (batch, self._in_channels, *in_size), (batch, self._out_channels, *out_size)
        grad = _load(_strided(grad_out, kind, out_shape, grad_out_strides))
        source = _load(_strided(x, kind, in_shape, x_strides)) if grad_values else np.zeros(in_shape)
        weights = _load(_strided(values, wide, (self.nnz,), (1,))) if grad_in else np.zeros(self.nnz)
        d_source, d_weights = np.zeros(in_shape), np.zeros(self.nnz)
        geometry = (self._groups, self._stride, tuple(padding))
        _backward(source, weights, grad, self._row_ptr, self._taps, geometry, d_source, d_weights)
        if added:
            d_source += _load(_strided(added, kind, in_shape, added_strides))
        if grad_in:
            _store(_strided(grad_in, kind, in_shape, grad_in_strides), d_source)
        if grad_values:
            _store(_strided(grad_values, wide, (self.nnz,), (1,)), d_weights)
        if grad_bias:
            _store(_strided(grad_bias, wide, (self._out_channels,), (1,)), grad.sum(axis=(0, 2, 3, 4)))


def _strided(address: int, kind: type[Any], shape: Sequence[int], strides: Sequence[int]) -> _Array:
    """The memory at `address` as an array; strides count elements."""
    size = np.dtype(kind).itemsize
    if 0 in shape:
        return np.empty(shape, kind)
    extent = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    buffer = (ctypes.c_char * (extent * size)).from_address(address)
    return np.ndarray(shape, kind, memoryview(buffer), strides=[stride * size for stride in strides])


def _load(memory: _Array) -> npt.NDArray[np.float64]:
    if memory.dtype == np.uint16:
        memory = (memory.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(memory, dtype=np.float64)


def _store(memory: _Array, result: npt.NDArray[np.float64]) -> None:
    if memory.dtype != np.uint16:
        memory[...] = result
        return
    bits = result.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    memory[...] = np.where(np.isnan(result), 0x7FC0, rounded)
