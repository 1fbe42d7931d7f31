"""Whoever reaches past a masked layer's forward: torch's fast path, keywords, data, state dicts, decay."""

import copy

import pytest
import torch
from torch import nn

import sparseprop
from sparseprop.masks import nm_mask
from sparseprop.nn import MaskedConv2d, MaskedLinear, MaskRule, SparseConv2d, SparseLinear


def test_encoder_layers_in_evaluation_use_the_masked_weights():
    model = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 32)
    sparseprop.mask_modules(model, "1:4").eval()
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (MaskedLinear.from_dense(nn.Linear(8, 4), pattern="2:4"), torch.randn(3, 8)),
        (MaskedConv2d.from_dense(nn.Conv2d(8, 4, 3), pattern="2:4"), torch.randn(1, 8, 5, 5)),
        (SparseLinear.random(8, 4, density=0.5), torch.randn(3, 8)),
        (SparseConv2d.random(8, 4, 3, density=0.5), torch.randn(1, 8, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_inputs_may_be_given_by_torchs_name(layer, x):
    assert torch.equal(layer(input=x), layer(x))


def test_data_written_after_an_update_that_showed_is_followed():
    layer, x = MaskedLinear.from_dense(nn.Linear(8, 4), pattern="2:4"), torch.randn(3, 8)
    layer(x)
    with torch.no_grad():
        layer.weight.add_(0.01)
    layer(x)
    new = torch.randn(4, 8)
    layer.weight.data.copy_(new)
    layer(x)
    assert torch.equal(layer.mask, nm_mask(new.abs(), 2, 4))


def test_data_written_into_a_copy_is_followed():
    layer = copy.deepcopy(MaskedLinear.from_dense(nn.Linear(8, 4), pattern="2:4"))
    new = torch.randn(4, 8)
    layer.weight.data.copy_(new)
    layer(torch.randn(3, 8))
    assert torch.equal(layer.mask, nm_mask(new.abs(), 2, 4))


def test_a_static_layer_zeroes_what_it_prunes_when_it_loads():
    layer = MaskedLinear.from_dense(nn.Linear(8, 4), pattern=MaskRule("2:4", every=0))
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    state["weight"] = torch.ones(4, 8)
    layer.load_state_dict(state)
    assert torch.equal(layer.weight != 0, layer.mask)


def test_a_static_layer_without_values_loads_by_assignment_and_takes_a_dense_checkpoint():
    rule = MaskRule("2:4", every=0)
    layer = MaskedLinear.from_dense(nn.Linear(8, 4), pattern=rule)
    empty = MaskedLinear(8, 4, rule=rule, device="meta")
    with pytest.warns(UserWarning, match="no-op"):
        empty.load_state_dict(layer.state_dict())
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty.weight, layer.weight)
    dense = nn.Linear(8, 4)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.mask, nm_mask(dense.weight.detach().abs(), 2, 4))
    assert torch.equal(layer.weight, dense.weight * layer.mask)


def test_decoupled_decay_of_float64_is_float64():
    rule = MaskRule("2:4", decay=1e-4, decoupled=True)
    model = sparseprop.mask_modules(nn.Sequential(nn.Linear(8, 8).double()), rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    sparseprop.decouple_decay(optimizer, model)
    before, pruned = model[0].weight.detach().clone(), ~model[0].mask
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(1000):
        optimizer.step()
    lost = 1 - (model[0].weight.detach() / before)[pruned]
    torch.testing.assert_close(lost, torch.full_like(lost, 1e-5), rtol=1e-4, atol=0)
