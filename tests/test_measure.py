"""Planning with an example input: what is captured and timed, what stays. Times are made up."""

import pytest
import torch
from torch import nn

import sparseprop
from sparseprop.errors import SparsePropError
from sparseprop.swap.measure import InputSpec, capture
from sparseprop.swap.plan import SwapPlan
from sparseprop.swap.planner import Planner, plan
from swap_cases import FakeTimer, TwoLayers, small_cnn, sparsify


def test_measured_layers_follow_the_timer():
    slow, fast = FakeTimer(dense=1.0, sparse=0.98), FakeTimer(dense=1.0, sparse=0.5)
    model = sparsify(nn.Linear(8, 8), 0.5)
    example = torch.ones(3, 8)
    entry = Planner(timer=slow).plan(model, example)[0]
    assert entry.choice == "dense"
    assert entry.reason == "measured: sparse is not clearly faster (1.02x dense speed)"
    entry = Planner(timer=fast).plan(model, example)[0]
    assert (entry.choice, entry.dense_ms, entry.sparse_ms) == ("sparse", 1000.0, 500.0)
    assert entry.reason == "measured: 2.00x dense speed"


def two_convolutions():
    """On images, of which the second may become sparse."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), sparsify(nn.Conv2d(4, 4, 3), 0.5), nn.Flatten(), nn.Linear(4, 2))


LAST = {"dense channels_last": 1.0, "sparse channels_last": 3.0}  # seconds


@pytest.mark.parametrize(
    ("dense", "sparse", "layout", "choice"),
    [
        (2.0, 0.1, "channels_last", "dense"),  # 2.1 together against 2.0
        (1.5, 0.4, "contiguous", "sparse"),  # 1.9: the second is faster than dense anywhere
        (0.9, 0.8, "contiguous", "sparse"),
        (1.2, 1.3, "channels_last", "dense"),
    ],
)
def test_layers_choose_in_the_layout_that_costs_least_together(dense, sparse, layout, choice):
    timer = FakeTimer(dense=dense, sparse=sparse, **LAST)
    found = Planner(timer=timer).plan(two_convolutions(), torch.ones(2, 3, 5, 5)[..., :5, :5])
    assert timer.calls == [["dense", "dense channels_last"], ["sparse", "dense", *reversed(LAST)]]
    assert (found.layout, found["1"].choice, found["0"].choice) == (layout, choice, "dense")
    times = (LAST["dense channels_last"], 3.0) if layout == "channels_last" else (dense, sparse)
    assert (found["1"].dense_ms, found["1"].sparse_ms) == tuple(1e3 * t for t in times)
    assert ("channels_last" in found["1"].reason) == (layout == "channels_last")
    assert str(found).endswith(f"images cost least {layout}")
    assert SwapPlan.from_json(found.to_json()) == found
    assert found[:1].layout == layout


def test_depthwise_convolutions_have_no_say_in_the_layout():
    timer = FakeTimer(dense=1.0, sparse=0.5)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), sparsify(nn.Conv2d(3, 4, 3), 0.5))
    assert Planner(timer=timer).plan(model, torch.ones(2, 3, 5, 5)).layout == "contiguous"
    assert len(timer.calls) == 1


def test_without_images_there_is_no_layout_to_choose():
    timer = FakeTimer(dense=1.0, sparse=0.5)
    found = Planner(timer=timer).plan(nn.Sequential(sparsify(nn.Linear(20, 20), 0.5)), torch.ones(2, 20))
    assert found.layout is None
    assert timer.calls == [["sparse", "dense"]]
    assert sparseprop.plan(two_convolutions()).layout is None


def test_equal_layers_are_measured_once_and_others_again():
    timer = FakeTimer(dense=1.0, sparse=0.5)
    model = nn.Sequential(
        *(sparsify(nn.Linear(20, 20), 0.5) for _ in range(3)),
        sparsify(nn.Linear(20, 20), 0.9),
        sparsify(nn.Linear(20, 20, bias=False), 0.9),
    )
    result = Planner(timer=timer).plan(model, torch.ones(2, 20, requires_grad=True))
    assert len(timer.calls) == 3
    assert all(entry.choice == "sparse" for entry in result)


def test_layers_the_example_misses_are_estimated():
    timer = FakeTimer(dense=1.0, sparse=0.5)
    model = TwoLayers()
    result = Planner(timer=timer).plan(model, torch.ones(2, 128))
    assert result["used"].reason.startswith("measured")
    assert result["unused"].reason.startswith("not reached by example_input, estimated: ")
    assert result["unused"].dense_ms is not None


def test_shapes_of_the_example_serve_the_estimate_when_nothing_is_measured():
    model = sparsify(nn.Linear(128, 128), 0.9)
    small, large = (plan(model, torch.ones(rows, 128), measure=False)[0] for rows in (8, 8000))
    assert small.reason.startswith("estimated")
    assert small.sparse_ms < large.sparse_ms


@pytest.mark.parametrize(
    "example",
    [torch.ones(2, 128), (torch.ones(2, 128),), [torch.ones(2, 128)], {"x": torch.ones(2, 128)}],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_examples_may_be_tensor_tuple_or_dict(example):
    result = Planner(timer=FakeTimer(dense=1.0, sparse=0.5)).plan(TwoLayers(), example)
    assert result["used"].choice == "sparse"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (3.0, "example_input must be a tensor, a tuple .* got float"),
        (torch.ones(2, 5), "fails on example_input in layer 'used': RuntimeError: mat1 and mat2"),
        ((1, 2, 3), "fails on example_input in the model itself: TypeError"),
        ({"wrong": 1}, "fails on example_input in the model itself: TypeError"),
    ],
)
def test_examples_that_do_not_fit_are_refused_with_the_models_words(example, message):
    with pytest.raises(SparsePropError, match=message):
        plan(TwoLayers(), example)


def test_planning_leaves_the_model_as_it_was():
    model = small_cnn().train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    Planner(timer=FakeTimer(dense=1.0, sparse=0.5)).plan(model, torch.randn(2, 3, 8, 8))
    torch.manual_seed(5)
    example = torch.randn(2, 3, 8, 8)
    torch.set_rng_state(random_state)
    Planner(timer=FakeTimer(dense=1.0, sparse=0.5)).plan(model, example)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == flags
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failing_example_leaves_no_hooks_and_no_changes():
    model = small_cnn().train()
    before = model[1].running_mean.clone()
    with pytest.raises(SparsePropError, match="in layer '4'"):
        plan(model, torch.randn(2, 3, 9, 9))
    assert torch.equal(model[1].running_mean, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_measured_is_what_will_run(enabled):
    timer = FakeTimer(dense=1.0, sparse=0.5)
    model = nn.Sequential(sparsify(nn.Linear(8, 8), 0.5))
    with torch.set_grad_enabled(enabled):
        spec = capture(model, torch.ones(4, 8).T.contiguous().T, [model[0]])[id(model[0])]
        Planner(timer=timer).plan(model, torch.ones(4, 8))
    assert spec.grad_enabled == enabled
    assert (spec.shape, spec.strides) == ((4, 8), (1, 4))


def test_planning_and_swapping_work_in_inference_mode():
    model = TwoLayers()
    with torch.inference_mode():
        plan(model, torch.ones(2, 128))
        sparseprop.swap_modules(model, min_sparsity=0.5)
    model(torch.ones(2, 128)).sum().backward()
    assert model.used.weight_values.grad is not None


def test_inputs_are_rebuilt_with_their_strides():
    for strides in [(8, 1), (1, 4), (0, 1), (16, 2)]:
        x = InputSpec((4, 8), strides, torch.float64, True, True).make()
        assert (tuple(x.shape), x.stride(), x.dtype, x.requires_grad) == (
            (4, 8),
            strides,
            torch.float64,
            True,
        )


def test_measuring_for_real_works_on_every_kind():
    model = nn.ModuleDict(
        {
            "Linear": sparsify(nn.Linear(8, 8), 0.5),
            "Conv1d": sparsify(nn.Conv1d(2, 4, 3), 0.5),
            "Conv2d": sparsify(nn.Conv2d(2, 4, 3), 0.5),
            "Conv3d": sparsify(nn.Conv3d(2, 4, 3), 0.5),
        }
    )
    shapes = {"Linear": (3, 8), "Conv1d": (1, 2, 6), "Conv2d": (1, 2, 6, 6), "Conv3d": (1, 2, 4, 4, 4)}
    for kind, layer in model.items():
        entry = plan(layer, torch.ones(shapes[kind]))[0]
        assert entry.dense_ms > 0
        assert entry.sparse_ms > 0
        assert entry.reason.startswith("measured")  # or "measured in channels_last", as time decides
