"""Networks with what `fuse` looks for, pairs of them as they were and fused, and their comparison."""

import torch
from torch import nn

import sparseprop
from sparseprop import fuse


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


X = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Base(nn.Module):
    """A residual block of convolutions, a batch norm and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.bn, self.relu = nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.c1(x)) + x)


def pair(kind, *, swap=False) -> tuple[nn.Module, nn.Module]:
    """A model, half of its weights pruned and swapped if asked for; and a fused copy."""
    torch.manual_seed(0)
    model = kind().double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.weight.data *= torch.rand_like(module.weight) > 0.5
    if swap:
        model = sparseprop.swap_modules(model, min_sparsity=0.3)
    return model, fuse(model, inplace=False)


def results(model: nn.Module, *args: torch.Tensor) -> list[torch.Tensor | None]:
    """Output and, if there are any, the gradients of input and parameters."""
    x = X.clone().requires_grad_()
    out = model(x, *args)
    if not out.requires_grad:
        return [out]
    wanted = [x, *model.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)]


def assert_alike(plain: nn.Module, fused: nn.Module, *args: torch.Tensor) -> None:
    """Same results and buffers, in training, in evaluation and without gradients."""
    for training, recorded in ((True, True), (False, True), (False, False)):
        plain.train(training)
        fused.train(training)
        with torch.set_grad_enabled(recorded):
            for one, other in zip(results(fused, *args), results(plain, *args), strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(list(fused.buffers()), list(plain.buffers()))
