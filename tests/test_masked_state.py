"""What travels with a masked-dense layer: state dicts, dense checkpoints, copies, pickles."""

import copy
import io

import pytest
import torch
from torch import nn

from masked_cases import layer_of, step
from sparseprop.masks import nm_mask
from sparseprop.nn import MaskRule


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


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mask": torch.rand(8, 16)}, "mask must be a bool tensor, got torch.float32"),
        ({"mask_age": torch.tensor([1, 2])}, "mask_age must be a number of 0 or more"),
        ({"mask_age": torch.tensor(-5)}, "mask_age must be a number of 0 or more"),
    ],
)
def test_broken_masks_and_ages_are_refused(entry, message):
    layer = layer_of("2:4")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(layer.state_dict() | entry)
    torch.testing.assert_close(layer.state_dict(), before)
