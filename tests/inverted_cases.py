"""Inverted residual blocks in evaluation, and what may change in them between two calls."""

import torch
from torch import nn

from sparseprop.nn import SparseConv2d

CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 by 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "5x5 by 2": {"kernel_size": 5, "padding": 2, "stride": 2},
    "3x2 by 1, 3": {"kernel_size": (3, 2), "padding": (1, 1), "stride": (1, 3)},
    "unpadded": {"kernel_size": 2},
}


def stage(layer, activation):
    return [layer, nn.BatchNorm2d(layer.out_channels), *([activation] if activation else [])]


def block(convolution, *, expand=True, last=None, bias=False, dtype=torch.float64):
    """6 channels to 9 over 20 (or over 6), sparse where it is not depthwise, with statistics of its own."""
    torch.manual_seed(3)
    inner = 20 if expand else 6
    first = stage(SparseConv2d.random(6, inner, 1, density=0.4, bias=bias), nn.ReLU6()) if expand else []
    middle = stage(nn.Conv2d(inner, inner, groups=inner, bias=False, **convolution), nn.ReLU())
    end = stage(SparseConv2d.random(inner, 9, 1, density=0.3, bias=bias), last)
    model = nn.Sequential(*first, *middle, *end)
    for norm in model:
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.weight, norm.bias):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.to(dtype).eval()


def images(shape, dtype=torch.float64):
    count, height, width = shape
    return torch.randn(count, 6, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


def check(model, fused, x, **tolerance):
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), **tolerance)


def zero_values(model):
    model[0].weight_values.data.zero_()


def other_memory(model):
    model[6].weight_values.data = model[6].weight_values.data * 2


def other_parameter(model):
    model[3].weight = nn.Parameter(model[3].weight.detach() * 2)


def other_statistics(model):
    model[4].running_mean = model[4].running_mean + 1


def other_eps(model):
    model[1].eps = 0.5


def other_pattern(model):
    state = SparseConv2d.random(20, 9, 1, density=0.5, bias=False, dtype=torch.float64).state_dict()
    model[6].load_state_dict(state)


def other_stride(model):
    model[3].stride = (2, 2)


CHANGES = {
    **{f.__name__: f for f in (
        zero_values, other_memory, other_parameter, other_statistics, other_eps, other_pattern, other_stride
    )},
    "moved": lambda model: model.float().double(),
    "norm in training": lambda model: model[7].train(),
    "norm without bias": lambda model: model[4].register_parameter("bias", None),
}  # fmt: skip
