"""What `swap_modules` and `to_dense` refuse, skip or warn about."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sparseprop
from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLinear
from sparseprop.swap import NothingSwappedWarning, SwapPlan
from swap_cases import SKIPPED, overlapping, plan_entry, sparsify, tied


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (plan_entry(name="head"), "names layer 'head', which the model lacks"),
        (plan_entry(name="head", choice="dense"), "names layer 'head', which the model lacks"),
        (
            plan_entry(shape=(8, 9)),
            r"layer '0' with shape \(8, 9\), it has shape \(8, 8\); plan",
        ),
        (plan_entry(kind="Conv2d"), "layer '0' as a Conv2d, it is a Linear; plan this model anew"),
        (plan_entry(name="1", kind="ReLU"), "layer '1' as a ReLU, it is a ReLU"),
        (plan_entry(name="2"), "makes layer '2' sparse, but it cannot be: has hooks"),
        (plan_entry(name="3"), "layer '3' as a Linear, it is a SparseLinear; it is swapped already"),
    ],
)
def test_a_plan_for_another_model_is_refused_and_nothing_changes(entry, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].register_forward_hook(lambda *_: None)
    model = sparseprop.swap_modules(model, min_sparsity=0.0, filter_fn=lambda module, name: name == "3")
    types = [type(layer) for layer in model]
    with pytest.raises(SparsePropError, match=message):
        sparseprop.swap_modules(model, plan=SwapPlan((plan_entry(name="4"), entry)))
    assert [type(layer) for layer in model] == types


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "plan.json"}, "expects plan to be a SwapPlan, got str"),
        (
            {"plan": SwapPlan(), "min_sparsity": 0.5},
            "exactly; drop min_sparsity and filter_fn",
        ),
        ({"plan": SwapPlan(), "filter_fn": lambda *_: True}, "obeys a given plan exactly"),
        ({"min_sparsity": 2}, "min_sparsity must be a number from 0 to 1"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(SparsePropError, match=message):
        sparseprop.swap_modules(nn.Linear(4, 4), **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), r"no zeros \(2 of 2 layers\)"),
        (nn.ReLU(), "the model has no Linear or Conv layer"),
        (nn.Sequential(SparseLinear.random(8, 8, density=0.5)), "1 layers are sparse already"),
    ],
)
def test_nothing_swapped_warns_with_reasons(model, message):
    with pytest.warns(NothingSwappedWarning, match=message):
        assert sparseprop.swap_modules(model) is model


def test_swapping_something_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparseprop.swap_modules(sparsify(nn.Linear(8, 8), 0.5), min_sparsity=0.5)


@pytest.mark.parametrize(("make", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_skipped_layers_really_stay(make, reason):
    model = make()
    layer = model["layer"]
    with pytest.warns(NothingSwappedWarning):
        sparseprop.swap_modules(model, min_sparsity=0.0, filter_fn=lambda module, name: name == "layer")
    assert model["layer"] is layer


@pytest.mark.parametrize("make", [tied, overlapping])
def test_ties_survive(make):
    model = make()
    other = next(name for name in model if name != "layer")
    with pytest.warns(NothingSwappedWarning):
        sparseprop.swap_modules(model, min_sparsity=0.0)
    with torch.no_grad():
        model["layer"].weight.fill_(3.0)
    assert bool((model[other].weight == 3.0).any())


def test_sparse_layers_that_share_a_parameter_are_not_untied():
    one = SparseLinear.random(8, 8, density=0.5)
    two = copy.deepcopy(one)
    two.weight_values = one.weight_values
    with pytest.raises(SparsePropError, match=r"Sparse layer '0' shares memory with '1.weight_values'"):
        sparseprop.to_dense(nn.Sequential(one, two))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_wrappers_are_refused_with_advice():
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    with pytest.raises(SparsePropError, match="DistributedDataParallel; swap the model first, then wrap it"):
        sparseprop.swap_modules(wrapped)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(SparsePropError, match=r"FSDP.*; swap the model first, then call fully_shard"):
        sparseprop.swap_modules(sharded)
