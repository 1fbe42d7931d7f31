"""Tables for the tests of 2:4 layers and of swaps to a device and a pattern."""

import torch
from torch import Tensor, nn


class Recorder:
    """Takes the place of torch's compression."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, matrix: Tensor) -> Tensor:
        self.seen.append(matrix)
        return matrix


class Subclass(nn.Linear):
    """Might do anything in its forward."""


def _half(layer: nn.Module) -> nn.Module:
    return layer.bfloat16()


# what plan(device="cuda") decides: (layer, options, choice, part of the reason)
CHOICES = [
    (_half(nn.Linear(64, 32)), {}, "sparse", "2:4 on CUDA keeps"),
    (_half(nn.Linear(64, 32)), {"pattern": "2:4T"}, "sparse", "2:4T on CUDA keeps"),
    (nn.Linear(64, 32).half(), {}, "sparse", "2:4 on CUDA"),
    (
        nn.Linear(64, 32),
        {},
        "dense",
        "weight is float32; 2:4 on CUDA wants float16 or bfloat16, use",
    ),
    (_half(nn.Linear(64, 30)), {}, "dense", "30x64 weight: recorder wants multiples of 16x16"),
    (_half(nn.Conv2d(16, 16, 3)), {}, "dense", "Conv2d: torch's semi-structured tensors serve Linear only"),
    (_half(nn.Conv1d(16, 16, 3)), {}, "dense", "Conv1d: torch's semi-structured tensors serve Linear only"),
    (_half(Subclass(64, 32)), {}, "dense", "Subclass is a subclass of Linear"),
    (_half(nn.Linear(64, 32)), {"min_sparsity": 0.5}, "dense", "sparsity is below min_sparsity 0.5"),
    (_half(nn.Linear(64, 32)), {"filter_fn": lambda layer, name: False}, "dense", "filter_fn said no"),
    (nn.Linear(64, 32, device="meta", dtype=torch.half), {}, "dense", "on device meta; holds no values yet"),
]

_DENSE = nn.Sequential(nn.Linear(16, 16))

# what swap_modules refuses: (model, options, message)
REFUSED_SWAPS = [
    (
        _DENSE,
        {"device": "cuda", "pattern": "4:8"},
        r"device='cuda' got pattern '4:8', wanted '2:4', or '2",
    ),
    (_DENSE, {"device": "mps"}, r"device got 'mps', wanted 'cpu' or 'cuda'"),
    (
        _DENSE,
        {"min_sparsity": 0.0, "pattern": "2:4"},
        r"Layer '0' cannot become sparse: .* is not 2:4",
    ),
    (
        _DENSE,
        {"min_sparsity": 0.0, "pattern": "2:4T"},
        r"Layer '0' cannot become sparse: .* is not 2:4T",
    ),
    (_DENSE, {"min_sparsity": 0.0, "pattern": "two"}, r"Layer '0' cannot become sparse: pattern got 'two'"),
]
