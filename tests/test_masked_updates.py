"""When masked layers count an update of their weight, whoever writes it and however."""

import copy

import pytest
import torch
from torch import nn

from sparseprop.nn import MaskedConv2d, MaskedLinear, MaskRule
from sparseprop.nn.watch import WeightWatch


class DataSGD(torch.optim.Optimizer):
    """Writes to ``p.data``, as older optimizers do: the parameter's version stays as it is."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"])


def trained(layer, make_optimizer, x, *, steps=9, parts=1):
    """The layer and its masks, one for each step; each step takes its batch in parts."""
    optimizer, masks = make_optimizer(layer.parameters(), 0.5), []
    for _ in range(steps):
        optimizer.zero_grad()
        for part in x.chunk(parts):
            layer(part).square().mean().backward()
        masks.append(layer.mask.clone())
        optimizer.step()
    return layer, masks


@pytest.mark.parametrize(("pattern", "every"), [("2:4", 1), ("2:4", 4), ("2:4T", 3)])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_masks_follow_optimizers_that_write_to_data_as_they_follow_others(pattern, every, parts, kind):
    if kind == "linear":
        layer, x = nn.Linear(16, 8), torch.randn(12, 16)
        layer = MaskedLinear.from_dense(layer, pattern=MaskRule(pattern, every=every))
    else:
        layer, x = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last), torch.randn(6, 8, 4, 4)
        layer = MaskedConv2d.from_dense(layer, pattern=MaskRule(pattern, every=every))
    results = [
        trained(copy.deepcopy(layer), optimizer, x, parts=parts) for optimizer in (torch.optim.SGD, DataSGD)
    ]
    assert all(torch.equal(*masks) for masks in zip(*(masks for _, masks in results), strict=True))
    assert any(not torch.equal(mask, results[0][1][0]) for mask in results[0][1])
    (usual, _), (by_data, _) = results
    assert usual.mask_age == by_data.mask_age
    assert usual.state_dict()["mask_age"] == by_data.state_dict()["mask_age"] == usual.mask_age + 1


def test_changes_that_leave_all_sums_alone_are_noticed_too():
    watch, weight = WeightWatch(), torch.randn(4, 6)
    watch.remember(weight)
    assert not watch.changed(weight)
    rows, columns = torch.randn(4, 1), torch.randn(1, 6)
    weight.data += (rows - rows.mean()) * (columns - columns.mean())  # as behind a softmax, of centred inputs
    assert watch.changed(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_that_is_moved_trains_on(dtype):
    layer = MaskedLinear.from_dense(nn.Linear(16, 8), pattern=MaskRule("2:4", every=3))
    for _ in range(3):
        layer(torch.randn(2, 16))
    layer.to(dtype)(torch.randn(2, 16, dtype=dtype)).sum().backward()
    assert layer.mask_age <= 1
