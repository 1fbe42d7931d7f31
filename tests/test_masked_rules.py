"""When the mask of a masked-dense layer changes, and when it must not."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from masked_cases import WRONG_RULES, layer_of, step
from sparseprop.errors import SparsePropError
from sparseprop.masks import check_nm, nm_mask, pattern_mask
from sparseprop.nn import MaskRule


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


@pytest.mark.parametrize(("options", "message"), WRONG_RULES)
def test_rules_without_sense_are_refused(options, message):
    with pytest.raises(SparsePropError, match=message):
        MaskRule(**options)
