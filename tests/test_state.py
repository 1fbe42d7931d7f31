"""State dicts: to the dense form, and from a sparse one into a fresh model."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseprop
from sparseprop.checkpoint import dense_state_dict, swap_like
from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLinear
from swap_cases import assert_same_state, small_cnn, small_sparse_cnn, sparsify


def test_dense_state_dict_is_that_of_the_dense_model():
    model = small_cnn()
    wanted = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    metadata = dict(model.state_dict()._metadata)
    sparseprop.swap_modules(model, min_sparsity=0.5)
    got = dense_state_dict(model)
    assert_same_state(got, wanted)
    assert dict(got._metadata) == metadata
    assert not any(tensor.requires_grad for tensor in got.values())
    small_cnn().load_state_dict(got)


def test_dense_state_dict_knows_every_name_and_the_root():
    layer = sparsify(nn.Linear(8, 8, bias=False), 0.5)
    model = nn.ModuleDict({"one": layer, "two": layer})
    wanted = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert_same_state(dense_state_dict(sparseprop.swap_modules(model, min_sparsity=0.5)), wanted)
    assert_same_state(dense_state_dict(model["one"]), {"weight": wanted["one.weight"]})
    assert_same_state(dense_state_dict(layer), layer.state_dict())


def test_swap_like_rebuilds_the_layers_of_a_sparse_state_dict():
    trained = small_sparse_cnn()
    trained[0].weight_values.data[0] = 0.0  # a zero inside the pattern stays a weight
    fresh = swap_like(small_cnn(), trained.state_dict())
    assert [type(layer) for layer in fresh] == [type(layer) for layer in trained]
    assert torch.equal(fresh[0].weight_values, trained[0].weight_values)
    fresh.load_state_dict(trained.state_dict())
    assert_same_state(fresh.state_dict(), trained.state_dict())


def test_swap_like_adopts_the_pattern_where_the_model_is_sparse_already():
    trained = small_sparse_cnn()
    other = sparseprop.swap_modules(small_cnn(), min_sparsity=0.5)
    swap_like(other, trained.state_dict())
    assert torch.equal(other[0].mask, trained[0].mask)


def test_swap_like_takes_a_root_layer_unset_weights_and_copies():
    trained = SparseLinear.random(8, 4, density=0.5)
    fresh = nn.Linear(8, 4)
    fresh.weight.data.fill_(float("nan"))
    copied = swap_like(fresh, trained.state_dict(), inplace=False)
    assert type(fresh) is nn.Linear
    assert torch.equal(copied.weight, trained.weight)
    assert torch.equal(copied.bias, trained.bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(), "has a sparse layer '0', which the model lacks"),
        (
            lambda: nn.Sequential(nn.ReLU()),
            "Layer '0' is sparse in the state dict, but a ReLU in the model: no Linear",
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 9)),
            r"Layer '0' has weight shape \(8, 8\) in the state dict, \(9, 8\)",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(8)), "a LazyLinear in the model: lazy layer"),
        (lambda: nn.Sequential(prune.identity(nn.Linear(8, 8), "bias")), "its bias is pruned"),
        (list, r"swap_like expects a torch.nn.Module, got list"),
    ],
)
def test_swap_like_refuses_models_that_do_not_fit(make, message):
    state = nn.Sequential(SparseLinear.random(8, 8, density=0.5)).state_dict()
    with pytest.raises(SparsePropError, match=message):
        swap_like(make(), state)
