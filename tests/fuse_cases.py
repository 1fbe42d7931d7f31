"""A network with what `fuse` looks for: batch norms, ReLUs in place and shared, residual additions."""

import torch
from torch import nn


class Block(nn.Module):
    """One ReLU module after two batch norms and after an addition, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + x)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), Block()).double()
