"""Layers and tables for the tests of masked-dense layers."""

from torch import nn

from sparseprop.nn import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear

# every masked class: (masked class, dense layer, shape of an input)
KINDS = [
    (MaskedLinear, nn.Linear(16, 8), (4, 16)),
    (MaskedConv1d, nn.Conv1d(8, 8, 3, padding=1), (2, 8, 9)),
    (MaskedConv2d, nn.Conv2d(8, 16, 3, stride=2, groups=2, bias=False), (2, 8, 7, 7)),
    (MaskedConv3d, nn.Conv3d(8, 8, 2, padding_mode="circular", padding=1), (1, 8, 3, 3, 3)),
]

# what MaskRule refuses: (arguments, message)
WRONG_RULES = [
    ({"pattern": "half"}, r"pattern got 'half', wanted 'N:M'"),
    ({"pattern": "2:4", "every": -1}, r"every=-1, wanted a number of at least 0"),
    ({"pattern": "2:4", "decay": -0.1}, r"decay=-0.1, wanted a number of at least 0"),
    ({"pattern": "2:4", "decay": float("nan")}, r"decay=nan, wanted a number"),
    ({"pattern": "2:4", "decay": True}, r"decay=True, wanted a number"),
    ({"pattern": "2:4", "decay": float("inf")}, r"decay=inf, wanted a number"),
    ({"pattern": "2:4", "every": float("inf")}, r"every=inf, wanted a number"),
    ({"pattern": "2:4T", "every": 1.5}, r"every=1.5, wanted a whole number"),
    ({"pattern": "2:4T", "method": "foo"}, r"method='foo', wanted one of exact, greedy"),
]


def layer_of(rule="2:4", inputs=16, outputs=8, **options) -> MaskedLinear:
    return MaskedLinear.from_dense(nn.Linear(inputs, outputs, **options), pattern=rule)


def step(layer, optimizer, x):
    optimizer.zero_grad()
    layer(x).square().mean().backward()
    optimizer.step()
