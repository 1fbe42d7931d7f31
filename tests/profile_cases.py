"""A small network and a training step for the tests of the profiler."""

import torch
from torch import nn

from sparseprop.profiling.trace import Training


class Block(nn.Module):
    """A residual block with its own code between the layers, and an activation that works in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    for name in ("1.conv", "3"):
        layer = model.get_submodule(name)
        layer.weight.data.mul_(torch.rand_like(layer.weight) < 0.2)
    return model


def training(model: nn.Module, x: torch.Tensor) -> Training:
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    return Training(model, lambda: model(x), lambda y: y.square().mean(), optimizer)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)
