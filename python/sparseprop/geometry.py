"""The shape arithmetic of Linear and Conv layers, resolved once: no strings, no defaults left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from sparseprop.errors import SparsePropError

__all__ = ["Geometry"]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
Size = int | Sequence[int]


@dataclass(frozen=True)
class Geometry:
    """A layer's sizes and options; tuples have one entry per spatial dimension (none for Linear).

    >>> geometry = Geometry.conv(2, 8, 16, 3, padding="same")
    >>> geometry.output_size((10, 12)), geometry.weight_shape
    ((10, 12), (16, 8, 3, 3))
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()  # (left, right)
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def linear(cls, in_features: int, out_features: int) -> Geometry:
        """A Linear layer: a convolution without spatial dimensions."""
        _at_least("in_features", in_features, 0)
        _at_least("out_features", out_features, 0)
        return cls(in_features, out_features)

    @classmethod
    def conv(
        cls,
        dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> Geometry:
        """A convolution of 1, 2 or 3 dimensions with the options of torch's modules."""
        kernel, step, spread = (
            expand(name, size, dims, 1)
            for name, size in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        )
        _at_least("in_channels", in_channels, 1)
        _at_least("out_channels", out_channels, 1)
        _at_least("groups", groups, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise SparsePropError(f"{name} must be divisible by groups, got {channels} and {groups}.")
        if padding_mode not in PADDING_MODES:
            raise SparsePropError(f"padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}.")
        sides = _resolve_padding(padding, kernel, step, spread)
        return cls(in_channels, out_channels, kernel, step, spread, sides, groups, padding_mode)

    @property
    def dims(self) -> int:
        """Number of spatial dimensions, 0 for Linear."""
        return len(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight: (out, in / groups, *kernel)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def cols(self) -> int:
        """Length of one flattened weight row."""
        return math.prod(self.weight_shape[1:])

    @property
    def numel(self) -> int:
        """Entries of the dense weight."""
        return self.out_channels * self.cols

    def without_padding(self) -> Geometry:
        """The same layer for an input that has been padded already."""
        return Geometry(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.dilation,
            ((0, 0),) * self.dims,
            self.groups,
        )

    def functional_padding(self) -> list[int]:
        """Padding as `torch.nn.functional.pad` wants it: last dimension first."""
        return list(chain.from_iterable(reversed(self.padding)))

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output; refuses an input smaller than the kernel."""
        result = []
        for size, kernel, step, spread, (left, right) in zip(
            input_size, self.kernel_size, self.stride, self.dilation, self.padding, strict=True
        ):
            room = size + left + right - spread * (kernel - 1) - 1
            if room < 0:
                raise SparsePropError(
                    f"input must be at least as large as the kernel: padded size {size + left + right} of "
                    f"{tuple(input_size)}, kernel {kernel} with dilation {spread} spans "
                    f"{spread * (kernel - 1) + 1}."
                )
            result.append(room // step + 1)
        return tuple(result)

    def to_ints(self) -> tuple[int, ...]:
        """All of it but the padding mode as plain numbers, for operator schemas; `from_ints` inverts it."""
        flat = chain(self.kernel_size, self.stride, self.dilation, chain.from_iterable(self.padding))
        return (self.in_channels, self.out_channels, self.groups, *flat)

    @classmethod
    def from_ints(cls, numbers: Sequence[int]) -> Geometry:
        """The geometry that `to_ints` wrote, with zero padding."""
        in_channels, out_channels, groups, *rest = numbers
        dims = len(rest) // 5
        kernel, stride, dilation = (tuple(rest[i * dims : (i + 1) * dims]) for i in range(3))
        sides = rest[3 * dims :]
        padding = tuple(zip(sides[::2], sides[1::2], strict=True))
        return cls(in_channels, out_channels, kernel, stride, dilation, padding, groups)


def expand(name: str, size: Size, dims: int, least: int) -> tuple[int, ...]:
    """A number or a sequence as `dims` checked integers."""
    numbers = (size,) * dims if isinstance(size, int) else tuple(size)
    if len(numbers) != dims:
        raise SparsePropError(f"{name} must be a number or {dims} numbers, got {size!r}.")
    for number in numbers:
        _at_least(name, number, least)
    return numbers


def _resolve_padding(
    padding: Size | str, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    dims = len(kernel)
    if padding == "valid":
        return ((0, 0),) * dims
    if padding == "same":
        if any(step != 1 for step in stride):
            raise SparsePropError(
                f"padding='same' needs stride 1, got stride {stride}; give numbers instead."
            )
        totals = [spread * (size - 1) for size, spread in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise SparsePropError(f"padding must be 'same', 'valid' or numbers, got {padding!r}.")
    return tuple((side, side) for side in expand("padding", padding, dims, 0))


def _at_least(name: str, number: int, least: int) -> None:
    if not isinstance(number, int) or number < least:
        raise SparsePropError(f"{name} must be an integer of at least {least}, got {number!r}.")
