"""Optimizers on sparse layers: groups with and without decay, torch's own implementations, memory."""

import pytest
import torch
from torch import nn

import sparseprop
from model_cases import MODELS, prune_by_magnitude
from sparseprop.nn import SparseConv2d, SparseLinear
from sparseprop.optim import param_groups, parameter_memory


def swapped_pair() -> tuple[nn.Module, nn.Module]:
    dense = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 20),
        nn.LayerNorm(20),
    )
    for layer in (dense[0], dense[4]):
        layer.weight.data.mul_(torch.rand_like(layer.weight) < 0.1)
    return dense, sparseprop.swap_modules(dense, min_sparsity=0.5, inplace=False)


def names_by_decay(model: nn.Module, groups: list[dict]) -> dict[float, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_weight_values_decay_and_biases_and_norms_do_not():
    _, sparse = swapped_pair()
    found = names_by_decay(sparse, param_groups(sparse, weight_decay=0.05))
    assert found[0.05] == {"0.weight_values", "4.weight_values"}
    assert found[0.0] == {"0.bias", "1.weight", "1.bias", "4.bias", "5.weight", "5.bias"}


@pytest.mark.parametrize("name", ["mobilenet_v2", "vit_tiny"])
def test_groups_are_those_that_timm_makes_for_the_dense_model(name):
    from timm.optim import param_groups_weight_decay

    dense = MODELS[name].make()
    prune_by_magnitude(dense, 0.9)
    listed = getattr(dense, "no_weight_decay", tuple)()
    theirs = names_by_decay(dense, param_groups_weight_decay(dense, 0.1, no_weight_decay_list=listed))
    assert names_by_decay(dense, param_groups(dense, weight_decay=0.1)) == theirs
    sparse = sparseprop.swap_modules(dense, min_sparsity=0.85)
    ours = names_by_decay(sparse, param_groups(sparse, weight_decay=0.1))
    assert {n.replace("weight_values", "weight") for n in ours[0.1]} == theirs[0.1]
    assert ours[0.0] == theirs[0.0]
    # the reason for this helper: on the swapped model timm's recipe forgets every sparse weight
    lost = names_by_decay(sparse, param_groups_weight_decay(sparse, 0.1, no_weight_decay_list=listed))
    assert all(n in lost[0.0] for n in ours[0.1] if n.endswith("weight_values"))


def test_names_of_the_dense_model_keep_their_meaning():
    dense, sparse = swapped_pair()
    excluded = {"no_decay": ["4.weight", "0.w*"]}
    assert names_by_decay(dense, param_groups(dense, weight_decay=0.1, **excluded)).keys() == {0.0}
    assert names_by_decay(sparse, param_groups(sparse, weight_decay=0.1, **excluded)).keys() == {0.0}
    sparse.no_weight_decay = lambda: {"4.weight"}
    assert names_by_decay(sparse, param_groups(sparse, weight_decay=0.1))[0.1] == {"0.weight_values"}


def test_frozen_and_named_parameters_are_left_out():
    _, sparse = swapped_pair()
    sparse[0].weight_values.requires_grad_(False)
    found = names_by_decay(sparse, param_groups(sparse, weight_decay=0.05, no_decay=["*.weight_values"]))
    assert set(found) == {0.0}
    assert "4.weight_values" in found[0.0]
    assert "0.weight_values" not in found[0.0]


def test_only_what_is_named_bias_is_a_bias():
    model = nn.Module()
    model.bias, model.relative_bias = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    model.inner = nn.Module()
    model.inner.bias = nn.Parameter(torch.ones(2, 2))
    found = names_by_decay(model, param_groups(model, weight_decay=0.1))
    assert found == {0.0: {"bias", "inner.bias"}, 0.1: {"relative_bias"}}


def test_a_parametrized_weight_decays():
    layer = SparseLinear.random(8, 8, density=0.5)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight_values", nn.Identity())
    (plain, decayed) = param_groups(layer, weight_decay=0.1)
    assert [p.shape for p in plain["params"]] == [(8,)]
    assert [p.shape for p in decayed["params"]] == [(32,)]


@pytest.mark.parametrize("bad", [-0.1, float("inf"), float("nan")])
def test_a_bad_decay_is_refused(bad):
    with pytest.raises(sparseprop.SparsePropError, match="weight_decay must be a number of 0 or more"):
        param_groups(nn.Linear(2, 2), weight_decay=bad)


OPTIMIZERS = {
    "sgd": lambda groups, **kind: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, **kind),
    "adamw": lambda groups, **kind: torch.optim.AdamW(groups, lr=0.01, **kind),
    "adam amsgrad": lambda groups, **kind: torch.optim.Adam(groups, lr=0.01, amsgrad=True, **kind),
}


@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_optimizers_train_the_values_as_they_train_a_masked_weight(name, kind):
    dense, sparse = swapped_pair()
    flags = {"foreach": kind == "foreach", "fused": kind == "fused"}
    masks = {layer: layer.weight != 0 for layer in (dense[0], dense[4])}
    optimizers = [
        OPTIMIZERS[name](param_groups(model, weight_decay=0.1), **flags) for model in (dense, sparse)
    ]
    x, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    for _ in range(5):
        for model, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            if model is dense:
                for layer, mask in masks.items():
                    layer.weight.grad.mul_(mask)
            optimizer.step()
    for mine, theirs in ((sparse[0], dense[0]), (sparse[4], dense[4])):
        assert mine.weight_values.shape == mine.weight_values.grad.shape == (mine.nnz,)
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-4, atol=1e-5)
    state = optimizers[1].state[sparse[0].weight_values]
    assert all(t.shape in ((), (sparse[0].nnz,)) for t in state.values() if torch.is_tensor(t))


def test_memory_follows_the_non_zeros():
    model = nn.Sequential(
        SparseConv2d.random(64, 64, 3, density=0.05, bias=False), SparseLinear.random(512, 512, density=0.05)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    before = parameter_memory(model, optimizer)
    assert before.optimizer_state == before.dense_optimizer_state == before.kernels == 0
    model[1](torch.ones(4, 512)).sum().backward()
    model[0](torch.ones(1, 64, 8, 8)).sum().backward()
    optimizer.step()
    memory = parameter_memory(model, optimizer)
    nnz, dense = model[0].nnz + model[1].nnz, 64 * 64 * 9 + 512 * 512
    assert memory.parameters == memory.gradients == 4 * (nnz + 512)
    assert memory.dense_parameters == memory.dense_gradients == 4 * (dense + 512)
    scalars = 4 * 3  # a step count for each parameter
    assert memory.optimizer_state == 2 * memory.parameters + scalars
    assert memory.dense_optimizer_state == 2 * memory.dense_parameters + scalars
    assert memory.patterns >= 4 * nnz
    assert memory.ratio < 0.06 < memory.ratio_with_indices


def test_memory_counts_frozen_and_tied_parameters_once_and_without_gradients():
    layer = SparseLinear.random(16, 16, density=0.25, bias=False)
    layer.weight_values.requires_grad_(False)
    memory = parameter_memory(nn.Sequential(layer, layer))
    assert (memory.parameters, memory.gradients) == (4 * 64, 0)
    assert (memory.dense_parameters, memory.dense_gradients) == (4 * 256, 0)


def test_one_pattern_may_be_given_as_it_is():
    model = nn.Sequential(SparseLinear.random(8, 8, density=0.5), nn.Linear(8, 8))
    for patterns in ("1.weight", ["1.weight"]):
        groups = names_by_decay(model, param_groups(model, weight_decay=0.1, no_decay=patterns))
        assert groups[0.1] == {"0.weight_values"}
