"""Whole networks masked, trained, frozen to sparse layers and made dense again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseprop
from masked_cases import layer_of, step
from sparseprop.errors import SparsePropError
from sparseprop.masks import nm_mask


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 5))


def test_a_whole_network_is_masked_trained_frozen_and_made_dense_again(caplog):
    caplog.set_level("INFO", "sparseprop")
    model = network()
    masked = sparseprop.mask_modules(model, "2:4")
    assert masked is model
    assert [type(part).__name__ for part in model] == [
        "Conv2d",
        "ReLU",
        "MaskedConv2d",
        "Flatten",
        "MaskedLinear",
    ]
    assert "mask_modules leaves 0: 3 inputs per group, fewer than 4" in caplog.text
    reasons = {layer.name: layer.reason for layer in sparseprop.plan(model)}
    assert reasons["2"] == "MaskedConv2d is a subclass of Conv2d"
    x = torch.randn(6, 3, 6, 6)
    step(model, torch.optim.SGD(model.parameters(), 0.1), x)
    model.eval()
    wanted = model(x)
    state = sparseprop.dense_state_dict(model)
    fresh = network()
    fresh.load_state_dict(state)
    frozen = sparseprop.freeze_modules(model, inplace=False)
    dense = sparseprop.to_dense(model, inplace=False)
    assert [type(part).__name__ for part in frozen][2::2] == ["SparseConv2d", "SparseLinear"]
    for other in (fresh.eval(), frozen, dense):
        torch.testing.assert_close(other(x), wanted, rtol=1e-4, atol=1e-5)
    assert list(dense.state_dict()) == list(state)
    root = sparseprop.mask_modules(nn.Linear(8, 8), "2:4T")
    assert sparseprop.freeze_modules(root).nnz == 32


def test_masking_refuses_a_network_without_a_fitting_layer():
    with pytest.raises(
        SparsePropError, match=r"no layer to give the pattern 4:8T: the model: 4 outputs per group"
    ):
        sparseprop.mask_modules(nn.Linear(8, 4), "4:8T")
    with pytest.raises(SparsePropError, match="the model has no dense Linear or Conv layer"):
        sparseprop.mask_modules(nn.ReLU(), "2:4")
    model = sparseprop.mask_modules(nn.Sequential(nn.Linear(8, 8)), "2:4").to(torch.bfloat16)
    with pytest.raises(SparsePropError, match=r"Layer '0' cannot become sparse: .* got torch.bfloat16"):
        sparseprop.freeze_modules(model)


def test_sr_ste_learns_what_the_dense_layer_learns():
    torch.manual_seed(0)
    teacher, x = nn.Linear(16, 4), torch.randn(512, 16)
    teacher.weight.data.mul_(nm_mask(teacher.weight.data.abs(), 2, 4))
    layer = layer_of("2:4", outputs=4)
    optimizer = torch.optim.SGD(layer.parameters(), 0.2, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        F.mse_loss(layer(x), teacher(x).detach()).backward()
        optimizer.step()
    assert F.mse_loss(layer(x), teacher(x)).item() < 1e-4
    assert torch.equal(layer.mask, teacher.weight != 0)
