"""The models a job can start from: the built-in small ResNet, named timm and torchvision models."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from sparseprop.errors import SparsePropError
from sparseprop.train._torchvision import import_timm, import_torchvision_models

__all__ = ["ModelSpec", "SmallResNet", "build_model", "parse_arch"]

_SMALL = re.compile(r"small(?::(\d+))?")
_PREFIXES = ("torchvision", "timm")


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build a model again: architecture, classes, input channels and side."""

    arch: str
    num_classes: int
    channels: int
    image_size: int


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for small grey or colour images: a strided stem and three stages.

    Takes ``(N, channels, H, W)`` float32, gives ``(N, num_classes)`` logits; the stages are ``width``,
    ``2 * width`` and ``4 * width`` channels wide and any image of 8x8 or more fits.

    >>> import torch
    >>> from sparseprop.train import SmallResNet
    >>> SmallResNet(num_classes=10, channels=1, width=8)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, channels: int = 1, *, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 5, stride=2, padding=2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            _Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)
        )
        self.pool = nn.AdaptiveAvgPool2d(2)  # keeps in which quarter a stroke is: digits need it
        self.head = nn.Linear(16 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(F.relu(self.bn(self.stem(x))))
        return cast(Tensor, self.head(self.pool(y).flatten(1)))


def parse_arch(arch: str) -> tuple[str, str]:
    """Split an architecture into its library and its name: ``"small:8"``, ``"timm:vit_tiny_patch16_224"``,
    ``"torchvision:resnet50"`` or a bare name, which torchvision is asked for first.

    Raises `SparsePropError` for a name nobody knows, with the closest names that exist.

    >>> parse_arch("small:8")
    ('small', '8')
    """
    if match := _SMALL.fullmatch(arch):
        return "small", match[1] or "64"
    library, _, name = arch.partition(":")
    if name and library not in _PREFIXES:
        raise SparsePropError(
            f"unknown model library {library!r} in {arch!r}; expected torchvision:NAME, timm:NAME or small"
        )
    known: set[str] = {"small"}
    missing: list[str] = []
    for candidate in [library] if name else list(_PREFIXES):
        try:
            names = _known_names(candidate)
        except SparsePropError as error:
            missing.append(str(error))
            continue
        if (name or arch) in names:
            return candidate, name or arch
        known |= names
    if missing and len(known) == 1:
        raise SparsePropError(missing[0])
    close = difflib.get_close_matches(name or arch, sorted(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "see torchvision.models or timm.list_models()"
    raise SparsePropError(
        f"unknown model {arch!r}; expected small, a timm or torchvision name, or a checkpoint file; {hint}"
    )


def build_model(spec: ModelSpec) -> nn.Module:
    """A freshly initialised model of ``spec``; its weights follow torch's global seed. Nothing is downloaded.

    >>> build_model(ModelSpec("small:8", num_classes=3, channels=1, image_size=28)).head.out_features
    3
    """
    library, name = parse_arch(spec.arch)
    if library == "small":
        return SmallResNet(spec.num_classes, spec.channels, width=int(name))
    make: Callable[..., Any]
    if library == "torchvision":
        if spec.channels != 3:
            raise SparsePropError(f"{spec.arch} expects 3 channels, got {spec.channels}; pass 3")
        make = import_torchvision_models().get_model
        return cast(nn.Module, make(name, weights=None, num_classes=spec.num_classes))
    make = import_timm().create_model
    return cast(nn.Module, make(name, pretrained=False, num_classes=spec.num_classes, in_chans=spec.channels))


def default_image_size(arch: str) -> int:
    """The side of the images a model expects when the user does not say."""
    library, name = parse_arch(arch)
    if library == "small":
        return 28
    if library == "timm":
        config = import_timm().get_pretrained_cfg(name)
        return int(config.input_size[-1]) if config is not None else 224
    return 224


def _known_names(library: str) -> set[str]:
    if library == "torchvision":
        models = import_torchvision_models()
        inside = (models.detection, models.segmentation, models.video, models.optical_flow)
        others = {name for module in inside for name in models.list_models(module=module)}
        return (
            set(models.list_models())
            - others
            - {n for n in models.list_models() if n.startswith("quantized")}
        )
    return set(import_timm().list_models())
