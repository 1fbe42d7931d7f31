"""Inverted residual blocks in evaluation, as one call: results, and what keeps them from being one."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from checks import running
from inverted_cases import CHANGES, CONVOLUTIONS, block, check, images
from sparseprop import fuse, swap_modules
from sparseprop.backend import available_isas
from sparseprop.nn import SparseConv2d
from sparseprop.nn.base import SparseLayer

SHAPES = [(1, 5, 6), (5, 7, 7), (2, 13, 70), (33, 3, 3), (3, 40, 40)]  # images, height, width


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_at_once_gives_what_its_steps_give(at_once, isa, name, shape):
    forms = ({}, {"expand": False}, {"last": nn.ReLU(), "bias": True})
    for form in forms:
        model = block(CONVOLUTIONS[name], **form)
        with running(isa):
            check(model, fuse(model, inplace=False), images(shape), rtol=1e-12, atol=1e-12)
            model = model.float()
            check(model, fuse(model, inplace=False), images(shape, torch.float32), rtol=1e-4, atol=1e-4)
    assert at_once == [True] * 2 * len(forms)


def test_larger_layers_around_the_depthwise_one(at_once):
    model = block(CONVOLUTIONS["3x3"])
    model[0] = SparseConv2d.random(6, 20, 3, density=0.3, padding=1, dtype=torch.float64)
    model[6] = SparseConv2d.random(20, 9, 3, density=0.3, stride=2, groups=1, dtype=torch.float64)
    check(model, fuse(model, inplace=False), images((3, 9, 11)), rtol=1e-12, atol=1e-12)
    assert at_once == [True]


def test_results_do_not_depend_on_the_number_of_threads(at_once):
    fused = fuse(block(CONVOLUTIONS["3x3"]))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                found.append([fused(images(shape)) for shape in SHAPES])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))
    assert all(at_once)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_calls_counts(at_once, change):
    model = block(CONVOLUTIONS["3x3"])
    fused = fuse(model, inplace=False)
    x = images((3, 8, 8))
    check(model, fused, x)
    for each in (model, fused):
        torch.manual_seed(8)
        change(each)
    check(copy.deepcopy(model), fused, x, rtol=1e-12, atol=1e-12)
    assert at_once[0]


def test_steps_are_taken_one_by_one_where_one_call_would_miss_something(at_once):
    model = block(CONVOLUTIONS["3x3"])
    fused, x, called = fuse(model, inplace=False), images((2, 8, 8)), []
    torch.testing.assert_close(fused(x), model(x))  # gradients
    for name in range(len(fused)):
        if not isinstance(fused[name], (nn.ReLU, nn.ReLU6)):
            with fused[name].register_forward_hook(lambda *_, name=name: called.append(name)):
                check(model, fused, x)
    assert called == [0, 1, 3, 4, 6, 7]
    check(model, fused, x.to(memory_format=torch.channels_last))
    check(model, fused, images((2, 8, 8), torch.float32).double().expand(2, 6, 8, 8)[:, :, ::2])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        fused.float()(x.float())
    assert not any(at_once)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("name", [0, 1, 3, 4, 6, 7])
def test_parametrized_modules_compute_their_weights_anew(at_once, name):
    model = block(CONVOLUTIONS["3x3"])
    fused, x = fuse(model, inplace=False), images((2, 8, 8))
    check(model, fused, x)
    for each in (model, fused):
        weight = "weight_values" if isinstance(each[name], SparseLayer) else "weight"
        parametrize.register_parametrization(each[name], weight, Doubled())
    check(model, fused, x, rtol=1e-12, atol=1e-12)
    for each in (model, fused):
        next(each[name].parametrizations.parameters()).data.mul_(3)
    check(model, fused, x, rtol=1e-12, atol=1e-12)
    assert at_once == [True]


def test_an_input_of_wrong_shape_is_refused_as_the_layer_does(at_once):
    fused = fuse(block(CONVOLUTIONS["3x3"]))
    with torch.no_grad(), pytest.raises(ValueError, match=r"expected \(batch, 6, ...\) inputs"):
        fused(torch.ones(2, 5, 8, 8, dtype=torch.float64))
    with torch.no_grad(), pytest.raises(ValueError, match="dtype"):
        fused(images((2, 8, 8), torch.float32))
    with torch.no_grad():
        assert fused(images((0, 8, 8))).shape == (0, 9, 8, 8)


def test_indices_overwritten_unseen_are_refused_on_every_thread(at_once):
    fused = fuse(block(CONVOLUTIONS["3x3"]))
    with torch.no_grad():
        fused(images((1, 8, 8)))
        fused[6].weight_col_idx.numpy()[-1] = 10**6  # torch's version counter does not notice
        for count in (1, 33):
            with pytest.raises(ValueError, match="col"):
                fused(images((count, 9, 9)))


def test_copies_and_pickles_run_by_their_own_numbers(at_once):
    fused, x = fuse(block(CONVOLUTIONS["3x3"])), images((2, 8, 8))
    with torch.no_grad():
        wanted = fused(x)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            torch.testing.assert_close(other(x), wanted)
            other[6].weight_values.zero_()
            assert not torch.equal(other(x), wanted)
        assert torch.equal(fused(x), wanted)
    assert all(at_once)


def test_a_mobilenet_runs_every_block_at_once(at_once):
    models = pytest.importorskip("torchvision.models", reason="torchvision is an extra")
    torch.manual_seed(0)
    model = models.mobilenet_v2(width_mult=0.25, num_classes=7)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels > 3:
            layer.weight.data *= torch.rand_like(layer.weight) < 0.3
    swapped = swap_modules(model.eval(), min_sparsity=0.5)
    assert sum(isinstance(layer, SparseLayer) for layer in swapped.modules()) == 34
    x = torch.randn(2, 3, 64, 64)
    check(swapped, fuse(swapped, inplace=False), x, rtol=1e-4, atol=1e-4)
    assert at_once == [True] * 17
