"""Networks, inputs and tables for the tests of conversion."""

import torch
from torch import nn

# what convert refuses: (arguments, message)
REFUSED = [
    ({"pattern": "2-4"}, r"pattern got '2-4', wanted 'N:M' such as '2:4'.*Or 'auto:8' for N of 8"),
    ({"pattern": "5:4"}, r"pattern got n=5, m=4, wanted 1 <= n <= m"),
    ({"score": "size"}, r"score got 'size', wanted one of magnitude, wx2"),
    ({"bn_batches": -1}, r"bn_batches got -1, wanted 0 or more"),
    ({"calibration": None}, r"reconstruct=True needs calibration batches and got none; pass calibration"),
    ({"calibration": None, "reconstruct": False, "score": "wx2"}, r"score='wx2' needs calibration batches"),
    ({"calibration": torch.ones(4, 3, 8, 8)}, r"calibration got a Tensor, wanted an iterable of batches"),
    ({"calibration": iter([torch.ones(4, 3, 8, 8)])}, r"an iterator that can be gone through once"),
    ({"calibration": []}, r"calibration got no batches, wanted at least one"),
    ({"calibration": [3]}, r"a calibration batch got int, wanted a tensor, a tuple that starts with the"),
    ({"calibration": [torch.ones(4, 5)]}, r"the model fails on a calibration batch: RuntimeError"),
    ({"filter_fn": lambda layer, name: False}, r"no layer to give the pattern 2:4: 0: filter_fn said no"),
    (
        {"filter_fn": lambda layer, name: name == "0"},
        r"no layer to give the pattern 2:4: 0: 3 inputs per group, fewer than 4; 3: filter_fn said no",
    ),
]


def small_net() -> nn.Sequential:
    """For inputs (N, 3, 8, 8): convolutions plain, grouped, strided and dilated, batch norm, a Linear."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=2, dilation=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 12),
    )


def batches(count: int = 4, size: int = 16) -> list[torch.Tensor]:
    """Inputs for `small_net`, correlated between channels and neighbours."""
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]
    mix = torch.tensor([[1.0, 0.8, 0.3], [0.0, 0.5, 0.4], [0.0, 0.0, 0.6]])
    return [nn.functional.avg_pool2d(torch.einsum("nchw,cd->ndhw", x, mix), 3, 1, 1) for x in noise]


def correlated_rows(samples: int, inputs: int, *, seed: int = 0) -> torch.Tensor:
    """Float64 rows after a ReLU, correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    rows = torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ mix
    return (rows + 0.3).relu()
