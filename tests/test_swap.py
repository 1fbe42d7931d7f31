"""What `swap_modules` and `to_dense` do to a model."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseprop
from sparseprop.nn import SparseConv1d, SparseConv2d, SparseConv3d, SparseLinear
from sparseprop.swap import SwapPlan
from sparseprop.swap.planner import Planner
from sparseprop.swap.replace import NothingSwappedWarning
from swap_cases import FakeTimer, TwoLayers, plan_entry, small_cnn, sparsify

KINDS = {
    "Linear": (lambda **k: nn.Linear(6, 9, **k), SparseLinear),
    "Conv1d": (lambda **k: nn.Conv1d(4, 6, 3, stride=2, padding=1, **k), SparseConv1d),
    "Conv2d": (lambda **k: nn.Conv2d(4, 6, (3, 1), dilation=2, groups=2, padding="same", **k), SparseConv2d),
    "Conv3d": (lambda **k: nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular", **k), SparseConv3d),
}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("make", "sparse_class"), KINDS.values(), ids=KINDS)
def test_there_and_back_changes_nothing(make, sparse_class, dtype, bias):
    model = nn.Sequential(sparsify(make(dtype=dtype, bias=bias), 0.7)).eval()
    model[0].weight.requires_grad_(False)
    original = copy.deepcopy(model)
    assert sparseprop.swap_modules(model, min_sparsity=0.5) is model
    sparse = model[0]
    assert type(sparse) is sparse_class
    assert (sparse.weight_values.dtype, sparse.training) == (dtype, False)
    assert not sparse.weight_values.requires_grad
    assert (sparse.bias is not None) == bias
    assert bias is False or sparse.bias.requires_grad
    assert sparseprop.to_dense(model) is model
    assert type(model[0]) is type(original[0])
    assert repr(model) == repr(original)
    assert same_state(model, original)
    assert not model[0].weight.requires_grad
    assert not model[0].training


def test_only_planned_layers_change_and_names_stay():
    model = small_cnn()
    names = [name for name, _ in model.named_modules()]
    batch_norm = model[1]
    sparseprop.swap_modules(model, min_sparsity=0.5, filter_fn=lambda module, name: name != "4")
    assert [name for name, _ in model.named_modules()] == names
    assert type(model[0]) is SparseConv2d
    assert type(model[4]) is nn.Linear
    assert model[1] is batch_norm


def test_not_in_place_leaves_the_model_alone_and_shares_nothing():
    model = small_cnn()
    original = copy.deepcopy(model)
    swapped = sparseprop.swap_modules(model, min_sparsity=0.5, inplace=False)
    assert same_state(model, original)
    assert type(model[0]) is nn.Conv2d
    assert type(swapped[0]) is SparseConv2d
    dense = sparseprop.to_dense(swapped, inplace=False)
    assert type(swapped[0]) is SparseConv2d
    assert same_state(dense, original)
    memory = {tensor.data_ptr() for tensor in model.state_dict().values()}
    for other in (swapped, dense):
        assert memory.isdisjoint(
            tensor.data_ptr() for tensor in other.state_dict().values() if tensor.numel()
        )
    memory = {tensor.data_ptr() for tensor in swapped.state_dict().values()}
    assert memory.isdisjoint(tensor.data_ptr() for tensor in dense.state_dict().values())


def test_a_root_layer_is_returned_anew():
    root = sparsify(nn.Linear(8, 8), 0.5)
    swapped = sparseprop.swap_modules(root, min_sparsity=0.5)
    assert type(root) is nn.Linear
    assert type(swapped) is SparseLinear
    dense = sparseprop.to_dense(swapped)
    assert type(dense) is nn.Linear
    assert same_state(dense, root)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_module_under_several_names_is_swapped_once_everywhere(inplace):
    layer = sparsify(nn.Linear(8, 8), 0.5)
    model = nn.ModuleDict({"one": layer, "deep": nn.Sequential(nn.ReLU(), layer), "two": layer})
    swapped = sparseprop.swap_modules(model, min_sparsity=0.5, inplace=inplace)
    assert type(swapped["one"]) is SparseLinear
    assert swapped["one"] is swapped["two"] is swapped["deep"][1]
    dense = sparseprop.to_dense(swapped, inplace=inplace)
    assert type(dense["one"]) is nn.Linear
    assert dense["one"] is dense["two"] is dense["deep"][1]


@pytest.mark.parametrize("inplace", [True, False])
def test_pruned_layers_lose_their_reparametrisation(inplace):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[0].weight.data[:, 0] = 0.0
    for layer in model:
        mask = torch.ones(10, 10)
        mask[:, 5:] = 0
        prune.custom_from_mask(layer, "weight", mask)
    with torch.no_grad():
        model[0].weight_orig.add_(1.0)  # as an optimizer does, before the next forward masks it again
    wanted = model[0].weight_orig.detach() * model[0].weight_mask
    plan = sparseprop.plan(model, min_sparsity=0.5, filter_fn=lambda module, name: name == "0")
    swapped = sparseprop.swap_modules(model, plan=plan, inplace=inplace)
    assert type(swapped[0]) is SparseLinear
    assert swapped[0].nnz == 50
    assert torch.equal(swapped[0].weight, wanted)
    assert prune.is_pruned(swapped[1])
    assert not prune.is_pruned(swapped[0])
    dense = sparseprop.to_dense(swapped)
    assert sorted(dense[0].state_dict()) == ["bias", "weight"]
    assert torch.equal(dense[0].weight, wanted)


def test_the_model_trains_after_the_swap_and_zeros_stay():
    torch.manual_seed(0)
    model = small_cnn().train()
    zeros = [model[0].weight == 0, model[4].weight == 0]
    sparseprop.swap_modules(model, min_sparsity=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = model[0].weight_values.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    sparseprop.to_dense(model)
    assert not torch.equal(model[0].weight[~zeros[0]], before)
    assert all(bool((model[at].weight[zero] == 0).all()) for at, zero in zip((0, 4), zeros, strict=True))


def test_example_input_decides_by_measurement():
    plan = Planner(timer=FakeTimer(dense=1.0, sparse=0.5)).plan(TwoLayers(), torch.ones(2, 128))
    model = sparseprop.swap_modules(TwoLayers(), plan=plan)
    assert type(model.used) is SparseLinear
    with warnings.catch_warnings():  # on this machine, at this size, dense may well win everywhere
        warnings.simplefilter("ignore", NothingSwappedWarning)
        real = sparseprop.swap_modules(TwoLayers(), torch.ones(2, 128))
    assert type(real.used) in (nn.Linear, SparseLinear)


def test_a_plan_is_obeyed_exactly():
    model = nn.Sequential(sparsify(nn.Linear(8, 8), 0.99), nn.Linear(8, 8), sparsify(nn.Linear(8, 8), 0.99))
    plan = SwapPlan((plan_entry(name="0", choice="dense"), plan_entry(name="1")))  # against all reason
    sparseprop.swap_modules(model, plan=SwapPlan.from_json(plan.to_json()))
    assert [type(layer) for layer in model] == [nn.Linear, SparseLinear, nn.Linear]


def test_to_dense_keeps_hooks_and_users_attributes():
    model = nn.Sequential(sparsify(nn.Linear(8, 8), 0.5))
    model[0].note = "keep me"
    sparseprop.swap_modules(model, min_sparsity=0.5)
    assert model[0].note == "keep me"
    seen = []
    handle = model[0].register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    sparseprop.to_dense(model)
    model(torch.ones(1, 8))
    handle.remove()
    model(torch.ones(1, 8))
    assert seen == [nn.Linear]
    assert model[0].note == "keep me"


def test_to_dense_of_a_dense_model_does_nothing():
    model = small_cnn()
    layers = list(model)
    assert list(sparseprop.to_dense(model)) == layers


def test_random_state_is_left_alone():
    model = small_cnn()
    before = torch.get_rng_state()
    sparseprop.to_dense(sparseprop.swap_modules(model, min_sparsity=0.5))
    assert torch.equal(torch.get_rng_state(), before)
