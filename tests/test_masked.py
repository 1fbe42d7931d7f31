"""Masked-dense layers: what they compute, their gradients, and the decay of pruned weights."""

import copy

import pytest
import torch
from torch import nn

import sparseprop
from masked_cases import KINDS, layer_of, step
from sparseprop.errors import SparsePropError
from sparseprop.masks import nm_mask, pattern_mask
from sparseprop.nn import MaskedLinear, MaskRule, SparseLayer
from sparseprop.nn.straight_through import straight_through
from sparseprop.swap.masking import decay_pruned

IDS = [case[0].__name__ for case in KINDS]


@pytest.mark.parametrize(("kind", "dense", "shape"), KINDS, ids=IDS)
@pytest.mark.parametrize("pattern", ["2:4", "2:4T"])
def test_a_masked_layer_computes_as_the_dense_one_with_masked_weights(kind, dense, shape, pattern):
    layer = kind.from_dense(dense, pattern=pattern)
    groups = getattr(dense, "groups", 1)
    assert torch.equal(layer.mask, pattern_mask(dense.weight.detach().abs(), pattern, groups=groups))
    assert torch.equal(layer.weight, dense.weight)
    assert layer.density == 0.5
    pruned = copy.deepcopy(dense)
    pruned.weight.data.mul_(layer.mask)
    x = torch.randn(shape)
    assert torch.equal(layer(x), pruned(x))
    back = layer.to_dense()
    assert type(back) is type(dense)
    assert torch.equal(back.weight, pruned.weight)
    assert isinstance(layer, type(dense))  # code that looks for torch's layers finds it


@pytest.mark.parametrize(("kind", "dense", "shape"), KINDS, ids=IDS)
def test_freezing_gives_the_sparse_layer_with_the_mask_zeros_included(kind, dense, shape):
    layer = kind.from_dense(dense, pattern="2:4").eval()
    layer.weight.data[layer.mask.nonzero(as_tuple=True)[0][0]] = 0.0
    sparse = layer.freeze()
    assert isinstance(sparse, SparseLayer)
    assert torch.equal(sparse.mask, layer.mask)
    assert not sparse.training
    x = torch.randn(shape)
    torch.testing.assert_close(sparse(x), layer(x), rtol=1e-4, atol=1e-5)


def test_the_gradient_is_straight_through_plus_decay_of_what_is_pruned():
    weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    mask, target = nm_mask(weight.detach().abs(), 2, 4), torch.randn(3, 8, dtype=torch.float64)

    def loss(effective):
        return (effective - target).pow(3).sum()

    loss(straight_through(weight, mask, 0.25)).backward()
    masked = (weight * mask).detach()
    numeric = torch.empty_like(masked)
    for place in range(masked.numel()):  # central differences in the weight that the loss sees
        nudge = torch.zeros(masked.numel(), dtype=torch.float64)
        nudge[place] = 1e-5
        nudge = nudge.view_as(masked)
        numeric.view(-1)[place] = (loss(masked + nudge) - loss(masked - nudge)) / 2e-5
    torch.testing.assert_close(weight.grad, numeric + 0.25 * weight.detach() * ~mask, rtol=1e-7, atol=1e-8)


def test_without_decay_it_is_the_plain_straight_through_estimator():
    weight, mask = torch.randn(4, 8, requires_grad=True), torch.rand(4, 8) < 0.5
    out = straight_through(weight, mask, 0.0)
    assert torch.equal(out, weight * mask)
    grad = torch.randn(4, 8)
    out.backward(grad)
    assert torch.equal(weight.grad, grad)


def test_pruned_weights_without_gradient_shrink_geometrically():
    layer = layer_of(MaskRule("2:4", decay=0.1), bias=False)
    optimizer, before, mask = (
        torch.optim.SGD([layer.weight], 0.5),
        layer.weight.detach().clone(),
        layer.mask.clone(),
    )
    for _ in range(6):
        optimizer.zero_grad()
        (layer(torch.zeros(3, 16)).sum() * 0).backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * torch.where(mask, 1.0, 0.95**6))
    assert torch.equal(layer.mask, mask)


def test_decoupled_decay_is_that_of_plain_sgd_and_stays_out_of_adams_moments():
    x = torch.randn(32, 16)
    results = []
    for decoupled in (False, True):
        torch.manual_seed(0)
        layer = layer_of(MaskRule("2:4", decay=0.05, decoupled=decoupled))
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        if decoupled:
            sparseprop.decouple_decay(optimizer, layer)
        for _ in range(3):
            step(layer, optimizer, x)
        results.append(layer.weight.detach().clone())
    # a step moves pruned weights before they shrink, not together with it: equal to first order
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)

    layer = layer_of(MaskRule("2:4", decay=0.5, decoupled=True), bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    handle, before = sparseprop.decouple_decay(optimizer, layer), layer.weight.detach().clone()
    (layer(torch.zeros(2, 16)).sum() * 0).backward()
    optimizer.step()
    assert not optimizer.state[layer.weight]["exp_avg"].any()
    torch.testing.assert_close(layer.weight.detach(), before * torch.where(layer.mask, 1.0, 0.95))
    handle.remove()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * torch.where(layer.mask, 1.0, 0.95))
    with pytest.raises(SparsePropError, match="no weight of a decoupled masked layer in the optimizer"):
        sparseprop.decouple_decay(optimizer, layer_of("2:4"))


def test_a_pruned_layer_starts_from_its_masked_weights():
    layer = nn.Linear(16, 8)
    nn.utils.prune.l1_unstructured(layer, "weight", 0.8)
    masked = MaskedLinear.from_dense(layer, pattern="2:4")
    assert torch.equal(masked.weight, layer.weight)
    assert masked.weight.requires_grad
    assert torch.equal(masked.mask, nm_mask(layer.weight.detach().abs(), 2, 4))


def test_any_mask_may_be_kept():
    mask = torch.rand(8, 16) < 0.3
    layer = MaskedLinear.from_dense(nn.Linear(16, 8), mask=mask)
    assert layer.static
    assert torch.equal(layer.mask, mask)
    with pytest.raises(SparsePropError, match="has a mask but no pattern to make another from; use set_mask"):
        layer.refresh()
    with pytest.raises(SparsePropError, match="got neither mask nor pattern"):
        MaskedLinear.from_dense(nn.Linear(16, 8))
    with pytest.raises(SparsePropError, match="cannot be 2:4: 3 inputs per group, fewer than 4"):
        MaskedLinear.from_dense(nn.Linear(3, 8), pattern="2:4")
    with pytest.raises(SparsePropError, match=r"mask must have the weight's shape \(8, 16\)"):
        layer.set_mask(mask.T)


def test_static_layers_do_not_decay():
    layer = layer_of(MaskRule("2:4", every=0, decay=0.5))
    before = layer.weight.detach().clone()
    decay_pruned(layer, 1.0)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_decay_nothing(fused):
    model = layer_of(MaskRule("2:4", decay=0.5, decoupled=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    sparseprop.decouple_decay(optimizer, model)
    scaler, before = torch.amp.GradScaler("cpu"), model.weight.detach().clone()
    scaler.scale(model(torch.full((1, 16), 3e38)).sum() * 3e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before)
