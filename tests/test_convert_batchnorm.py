"""Batch-norm statistics measured anew."""

import copy

import pytest
import torch
from torch import nn

from sparseprop.conversion import reestimate_batch_norm
from sparseprop.errors import SparsePropError


def test_batch_norm_becomes_the_plain_average_over_all_batches():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(0.9))
    data = [torch.randn(16, 3) + shift for shift in range(4)]
    assert reestimate_batch_norm(model, data) == 4
    torch.testing.assert_close(model[0].running_mean, torch.cat(data).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([x.var(0) for x in data]).mean(0))
    assert model[0].momentum == 0.3
    assert model.training
    assert reestimate_batch_norm(model, data, limit=2) == 2
    torch.testing.assert_close(model[0].running_mean, torch.cat(data[:2]).mean(0))
    before = copy.deepcopy(model[0].state_dict())
    with pytest.raises(SparsePropError, match="fails on a calibration batch"):
        reestimate_batch_norm(model, [*data, torch.ones(2, 5)])
    assert all(torch.equal(value, before[key]) for key, value in model[0].state_dict().items())
    assert reestimate_batch_norm(nn.Linear(2, 2), data) == 0


class Exits(nn.Module):
    """Two norms, the second in an exit that only training takes."""

    def __init__(self):
        super().__init__()
        self.norm, self.exit = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.norm(x)
        return self.exit(x) if self.training else x


def test_norms_that_no_batch_reaches_keep_their_statistics():
    model = Exits()
    for _ in range(3):
        model(torch.randn(8, 3) + 7)
    before = copy.deepcopy(model.exit.state_dict())
    x = torch.randn(16, 3)
    assert reestimate_batch_norm(model, [x]) == 1
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))
    assert all(torch.equal(value, before[key]) for key, value in model.exit.state_dict().items())


def test_batches_without_samples_do_not_count():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(16, 3) + 5
    reestimate_batch_norm(model, [x[:0], x, x[:0], x + 2])
    torch.testing.assert_close(model[0].running_mean, x.mean(0) + 1)
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_norm_and_batch(wrong):
    model, data = Exits(), [torch.randn(8, 3) for _ in range(3)]
    data[1][4, 2] = wrong
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        SparsePropError, match=r"batch norm 'norm' got NaN, inf .* in calibration batch 1, wanted"
    ):
        reestimate_batch_norm(model, data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(SparsePropError, match="limit got -1, wanted 0 or more batches, or None for all"):
        reestimate_batch_norm(model, data, limit=-1)
