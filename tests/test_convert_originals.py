"""What `convert` asks of the original rather than of its copy: the filter, shared memory, storage, modes."""

import copy

import pytest
import torch
from torch import nn

import sparseprop
from sparseprop.errors import SparsePropError
from sparseprop.masks import check_nm
from sparseprop.nn import SparseLinear

BATCHES = [torch.randn(32, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def test_the_filter_sees_the_users_own_modules():
    model = mlp()
    seen = []
    report = sparseprop.convert(
        model, "2:4", BATCHES, filter_fn=lambda module, name: seen.append(module) or module is not model[2]
    )
    assert report.converted == ("0",)
    assert seen == [model[0], model[2]]


def test_layers_that_share_memory_under_two_parameters_stay_dense():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 8))
    model[2].weight.data = model[0].weight.data
    before = model[0].weight.detach().clone()
    report = sparseprop.convert(model, "2:4", BATCHES)
    assert report.converted == ("3",)
    assert "weights shared with" in report["0"].reason
    assert torch.equal(model[0].weight, before)


def test_packed_layers_stay_packed():
    packed = SparseLinear.from_dense(
        sparseprop.convert(nn.Linear(16, 8), "2:4", reconstruct=False).model, pattern="2:4"
    )
    model = nn.Sequential(packed)
    sparseprop.convert(model, "1:4", BATCHES)
    assert str(model[0].nm) == "1:4"
    assert check_nm(model[0].to_dense().weight != 0, 1, 4)


class Adapted(nn.Module):
    """Adds an adapter to its weight in evaluation, and takes it off again in training."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.layer, self.adapter, self.in_place = (
            nn.Linear(16, 16),
            nn.Parameter(torch.ones(16, 16)),
            in_place,
        )
        self.calls = []

    def train(self, mode: bool = True) -> "Adapted":
        if self.in_place and mode is not self.training:
            self.layer.weight.data.add_(self.adapter.data, alpha=-1 if mode else 1)
            torch.autograd.graph.increment_version(self.layer.weight)
        self.calls.append(mode)
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_modes_that_write_into_weights_are_refused_and_undone():
    model = Adapted(in_place=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparsePropError, match=r"eval\(\) writes into its weights.*call model.eval\(\) first"):
        sparseprop.convert(model, "2:4", BATCHES)
    assert model.training
    torch.testing.assert_close(model.state_dict(), before)
    sparseprop.convert(model.eval(), "2:4", BATCHES)
    assert check_nm(model.layer.weight != 0, 2, 4)


def test_modes_are_restored_by_the_modules_own_method():
    model = Adapted(in_place=False)
    sparseprop.convert(model, "2:4", BATCHES)
    assert model.training
    assert model.calls == [False, True]


def test_encoders_with_padding_are_converted():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    batch = {
        "src": torch.randn(4, 6, 16),
        "src_key_padding_mask": torch.arange(6) >= torch.tensor([[6], [4], [5], [3]]),
    }
    report = sparseprop.convert(model, "2:4", [batch])
    assert "layers.0.linear1" in report.converted
    assert torch.backends.mha.get_fastpath_enabled()
