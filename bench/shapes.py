"""The public list of layer shapes that every number is taken on: a short form, the full one, a tiny one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

FORMS = ("tiny", "short", "full")
SMALL_BATCH = 64


@dataclass(frozen=True)
class LinearShape:
    """A Linear layer of `out x in` and its batch."""

    out_features: int
    in_features: int
    batch: int

    @property
    def group(self) -> str:
        """What its numbers are averaged with."""
        return "Linear" if self.batch >= SMALL_BATCH else f"Linear, batch below {SMALL_BATCH}"

    @property
    def columns(self) -> int:
        """Output positions: what one non-zero is multiplied with."""
        return self.batch

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}, batch {self.batch}"

    def layer(self) -> nn.Linear:
        """The dense layer."""
        return nn.Linear(self.in_features, self.out_features)

    def input(self) -> Tensor:
        """Random input that wants a gradient."""
        return torch.randn(self.batch, self.in_features, requires_grad=True)

    def moved(self) -> tuple[int, int]:
        """Elements of the input and of the output."""
        return self.batch * self.in_features, self.batch * self.out_features


@dataclass(frozen=True)
class ConvShape:
    """A square Conv2d with the usual padding on a square input."""

    in_channels: int
    out_channels: int
    kernel: int
    size: int
    stride: int
    batch: int

    @property
    def group(self) -> str:
        """What its numbers are averaged with."""
        return "Conv" if self.batch >= 16 else "Conv, batch below 16"

    @property
    def columns(self) -> int:
        """Output positions: what one non-zero is multiplied with (less where padding is read)."""
        return self.batch * self.out_size**2

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def __str__(self) -> str:
        step = f" stride {self.stride}" if self.stride > 1 else ""
        channels = f"{self.in_channels}->{self.out_channels}"
        return f"{channels} {self.kernel}x{self.kernel}{step} @{self.size}, batch {self.batch}"

    def layer(self) -> nn.Conv2d:
        """The dense layer."""
        return nn.Conv2d(self.in_channels, self.out_channels, self.kernel, self.stride, self.kernel // 2)

    def input(self) -> Tensor:
        """Random input that wants a gradient."""
        return torch.randn(self.batch, self.in_channels, self.size, self.size, requires_grad=True)

    def moved(self) -> tuple[int, int]:
        """Elements of the input and of the output; what a strided 1x1 kernel skips is not read."""
        seen = self.out_size if self.kernel < self.stride else self.size
        return self.batch * self.in_channels * seen**2, self.columns * self.out_channels


Shape = LinearShape | ConvShape

# in, out, kernel, input size, stride
RESNET50 = (
    (3, 64, 7, 224, 2),
    (64, 64, 1, 56, 1),
    (64, 64, 3, 56, 1),
    (64, 256, 1, 56, 1),
    (256, 64, 1, 56, 1),
    (256, 128, 1, 56, 1),
    (128, 128, 3, 56, 2),
    (128, 512, 1, 28, 1),
    (256, 512, 1, 56, 2),
    (512, 128, 1, 28, 1),
    (128, 128, 3, 28, 1),
    (512, 256, 1, 28, 1),
    (256, 256, 3, 28, 2),
    (256, 1024, 1, 14, 1),
    (512, 1024, 1, 28, 2),
    (1024, 256, 1, 14, 1),
    (256, 256, 3, 14, 1),
    (1024, 512, 1, 14, 1),
    (512, 512, 3, 14, 2),
    (512, 2048, 1, 7, 1),
    (1024, 2048, 1, 14, 2),
    (2048, 512, 1, 7, 1),
    (512, 512, 3, 7, 1),
)
RESNET18 = (  # those that ResNet-50 does not have
    (64, 128, 3, 56, 2),
    (64, 128, 1, 56, 2),
    (128, 256, 3, 28, 2),
    (128, 256, 1, 28, 2),
    (256, 512, 3, 14, 2),
    (256, 512, 1, 14, 2),
)
MOBILENETV2 = (  # pointwise
    (32, 16, 1, 112, 1),
    (16, 96, 1, 112, 1),
    (96, 24, 1, 56, 1),
    (24, 144, 1, 56, 1),
    (144, 24, 1, 56, 1),
    (144, 32, 1, 28, 1),
    (32, 192, 1, 28, 1),
    (192, 32, 1, 28, 1),
    (192, 64, 1, 14, 1),
    (64, 384, 1, 14, 1),
    (384, 64, 1, 14, 1),
    (384, 96, 1, 14, 1),
    (96, 576, 1, 14, 1),
    (576, 96, 1, 14, 1),
    (576, 160, 1, 7, 1),
    (160, 960, 1, 7, 1),
    (960, 160, 1, 7, 1),
    (960, 320, 1, 7, 1),
    (320, 1280, 1, 7, 1),
)
# out, in: powers of two both ways, BERT-base, an MLP on MNIST, primes
LINEAR = (
    (256, 256),
    (256, 1024),
    (1024, 256),
    (256, 4096),
    (4096, 256),
    (1024, 1024),
    (4096, 1024),
    (1024, 4096),
    (2048, 2048),
    (4096, 4096),
    (768, 768),
    (3072, 768),
    (768, 3072),
    (300, 784),
    (1000, 2048),
    (509, 1021),
)
BATCHES = (1, 8, 15, 64, 100, 256, 509, 1024, 2048)
FLAGSHIP = LinearShape(1024, 1024, 256)

_SHORT_LINEAR = (
    FLAGSHIP,
    LinearShape(3072, 768, 1024),
    LinearShape(768, 3072, 1024),
    LinearShape(256, 256, 64),
    LinearShape(4096, 1024, 128),
    LinearShape(300, 784, 100),
    LinearShape(509, 1021, 509),
    LinearShape(256, 4096, 2048),
    LinearShape(1024, 1024, 1),
    LinearShape(1024, 1024, 8),
    LinearShape(768, 3072, 15),
)
_SHORT_CONV = (
    (3, 64, 7, 224, 2),
    (64, 64, 3, 56, 1),
    (256, 64, 1, 56, 1),
    (128, 128, 3, 56, 2),
    (256, 512, 1, 56, 2),
    (512, 128, 1, 28, 1),
    (256, 256, 3, 14, 1),
    (1024, 256, 1, 14, 1),
    (512, 512, 3, 7, 1),
    (512, 2048, 1, 7, 1),
    (32, 192, 1, 28, 1),
    (576, 160, 1, 7, 1),
)


def linear_shapes(form: str) -> tuple[LinearShape, ...]:
    """Linear shapes of a form."""
    if form == "tiny":
        return (LinearShape(16, 24, 8),)
    if form == "short":
        return _SHORT_LINEAR
    return tuple(LinearShape(rows, cols, batch) for rows, cols in LINEAR for batch in BATCHES)


def conv_shapes(form: str) -> tuple[ConvShape, ...]:
    """Convolution shapes of a form."""
    if form == "tiny":
        return (ConvShape(4, 8, 3, 7, 1, 2),)
    if form == "short":
        return tuple(ConvShape(*shape, 16) for shape in _SHORT_CONV)
    whole = tuple(ConvShape(*s, b) for s in RESNET50 + RESNET18 + MOBILENETV2 for b in (16, 64))
    return whole + tuple(ConvShape(*shape, 1) for shape in _SHORT_CONV)


def sparsities(family: str, form: str) -> tuple[float, ...]:
    """Shares of zeros to measure a family at."""
    if form == "tiny":
        return (0.5, 0.9)
    if form == "short":
        return (0.5, 0.8, 0.9, 0.95, 0.98, *((0.995,) if family == "Linear" else ()))
    return (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, *((0.995, 0.999) if family == "Linear" else ()))
