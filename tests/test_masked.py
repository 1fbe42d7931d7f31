"""Masked-dense layers: gradients, when masks change, and the way to the sparse kernels."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparseprop
from masked_cases import KINDS, WRONG_RULES
from sparseprop.errors import SparsePropError
from sparseprop.masks import check_nm, nm_mask, pattern_mask
from sparseprop.nn import MaskedLinear, MaskRule, SparseLayer
from sparseprop.nn.straight_through import straight_through
from sparseprop.swap.masking import decay_pruned

IDS = [case[0].__name__ for case in KINDS]


def layer_of(rule="2:4", inputs=16, outputs=8, **options) -> MaskedLinear:
    return MaskedLinear.from_dense(nn.Linear(inputs, outputs, **options), pattern=rule)


def step(layer, optimizer, x):
    optimizer.zero_grad()
    layer(x).square().mean().backward()
    optimizer.step()


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


@pytest.mark.parametrize(("pattern", "every", "changes"), [("2:4", None, 9), ("2:4T", 3, 3), ("2:4T", 40, 0)])
def test_the_mask_follows_the_weight_after_every_so_many_updates(pattern, every, changes):
    layer = layer_of(MaskRule(pattern, every=every))
    made = []
    refresh = layer.refresh
    object.__setattr__(layer, "refresh", lambda: (made.append(layer.weight.detach().clone()), refresh()))
    layer(torch.randn(1, 16))
    for _ in range(9):
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight))
        layer(torch.randn(1, 16))
        layer(torch.randn(1, 16))  # another call is no other update
    assert len(made) == changes
    if made:
        assert torch.equal(layer.mask, pattern_mask(made[-1].abs(), pattern))
    assert check_nm(layer.mask, 2, 4, transposable=pattern.endswith("T"), exact_count=True)


def test_transposable_masks_are_exact_and_forty_updates_old_by_default():
    layer = layer_of("4:8T", 32, 32)
    assert (layer.rule.every, layer.rule.method) == (40, "exact")


def test_eval_mode_never_changes_the_mask():
    layer = layer_of("2:4")
    before = layer.mask.clone()
    layer.eval()
    for _ in range(3):
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight))
        layer(torch.randn(2, 16))
    assert torch.equal(layer.mask, before)
    layer.refresh()  # unless asked to
    assert torch.equal(layer.mask, nm_mask(layer.weight.detach().abs(), 2, 4))


def test_recomputed_activations_and_accumulated_gradients_see_one_mask():
    x, grads = torch.randn(8, 16), []
    for recompute in (False, True):
        torch.manual_seed(1)
        layer = layer_of(MaskRule("2:4", decay=0.0))
        with torch.no_grad():
            layer.weight.mul_(torch.rand_like(layer.weight))
        for part in x.split(4):
            out = checkpoint(layer, part, use_reentrant=False) if recompute else layer(part)
            out.square().sum().backward()
        assert layer.mask_age == 0
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)


def test_a_static_mask_keeps_pruned_weights_at_zero_and_equals_sparse_training():
    torch.manual_seed(2)
    layer = layer_of(MaskRule("2:4", every=0))
    assert not layer.weight[~layer.mask].any()
    sparse, mask, x = layer.freeze(), layer.mask.clone(), torch.randn(32, 16)
    ours, theirs = (torch.optim.Adam(part.parameters(), 0.01) for part in (layer, sparse))
    for _ in range(5):
        step(layer, ours, x)
        step(sparse, theirs, x)
    assert torch.equal(layer.mask, mask)
    assert not layer.weight[~mask].any()
    torch.testing.assert_close(layer.weight, sparse.weight, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize(("options", "message"), WRONG_RULES)
def test_rules_without_sense_are_refused(options, message):
    with pytest.raises(SparsePropError, match=message):
        MaskRule(**options)


def test_training_goes_on_the_same_from_a_state_dict():
    x = torch.randn(32, 16)

    def trained(layer, count):
        optimizer = torch.optim.SGD(layer.parameters(), 0.5)
        for _ in range(count):
            step(layer, optimizer, x)
        return layer

    rule = MaskRule("2:4T", every=4)
    whole = trained(layer_of(rule), 0)
    file = io.BytesIO()
    first = trained(copy.deepcopy(whole), 6)
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = layer_of(rule)
    assert (
        str(resumed.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    )
    assert resumed.mask_age == first.mask_age + 1 == 2  # the last step counts
    resumed, whole = trained(resumed, 5), trained(whole, 11)
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.mask, whole.mask)


def test_a_dense_checkpoint_brings_its_own_mask():
    layer, dense = layer_of("2:4"), nn.Linear(16, 8)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.mask, nm_mask(dense.weight.detach().abs(), 2, 4))
    assert torch.equal(layer.weight, dense.weight)


def test_copies_and_pickles_keep_mask_and_age():
    layer = layer_of(MaskRule("2:4T", every=5))
    with torch.no_grad():
        layer.weight.add_(1)
    layer(torch.ones(1, 16))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        twin(torch.ones(1, 16))
        assert (twin.mask_age, twin.rule) == (1, layer.rule)
        assert torch.equal(twin.mask, layer.mask)


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


def test_static_layers_do_not_decay():
    layer = layer_of(MaskRule("2:4", every=0, decay=0.5))
    before = layer.weight.detach().clone()
    decay_pruned(layer, 1.0)
    assert torch.equal(layer.weight, before)


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
