"""What `plan` decides, and the data it decides into. Measured times come from a made-up timer."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseprop
from sparseprop.errors import SparsePropError
from sparseprop.swap import LayerPlan, SwapPlan
from sparseprop.swap.cost import estimate, keep_dense_rule
from sparseprop.swap.decide import survey
from sparseprop.swap.kinds import Facts
from sparseprop.swap.machines import INTEL, ZEN4, ZEN5
from sparseprop.swap.planner import plan
from swap_cases import (
    SKIPPED,
    WRAPPED,
    sparsify,
)

ENTRY = LayerPlan("fc", "Linear", (10, 20), 0.9, "sparse", 1.0, 0.25, "measured")
PLAN = SwapPlan((ENTRY, LayerPlan("", "Conv2d", (8, 4, 3, 3), None, "dense", None, None, "x")))


def test_a_plan_is_a_frozen_sequence():
    assert len(PLAN) == 2
    assert list(PLAN) == [PLAN[0], PLAN[1]]
    assert PLAN["fc"] is PLAN[0] is ENTRY
    assert PLAN[:1] == SwapPlan((ENTRY,))
    assert PLAN.sparse_names == ("fc",)
    assert ENTRY.speedup == 4.0
    assert PLAN[1].speedup is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        ENTRY.choice = "dense"
    with pytest.raises(SparsePropError, match="The plan has no layer 'head'; it has 'fc', ''"):
        PLAN["head"]


def test_a_plan_prints_as_an_aligned_table():
    lines = str(PLAN).splitlines()
    assert lines[0].split() == [
        "layer",
        "kind",
        "shape",
        "sparsity",
        "choice",
        "dense",
        "ms",
        "sparse",
        "ms",
        "reason",
    ]
    assert lines[1].split() == ["fc", "Linear", "10x20", "90.0", "%", "sparse", "1.000", "0.250", "measured"]
    assert lines[2].split() == ["(model)", "Conv2d", "8x4x3x3", "-", "dense", "-", "-", "x"]
    assert (
        len({line.index(word) for line, word in zip(lines, ("reason", "measured", "x"), strict=False)}) == 2
    )
    assert lines[0].index("reason") == lines[1].index("measured") == lines[2].rindex("x")
    assert lines[-1] == "1 of 2 layers become sparse"


def test_json_keeps_everything():
    assert SwapPlan.from_json(PLAN.to_json()) == PLAN
    assert SwapPlan.from_json(SwapPlan().to_json()) == SwapPlan()


def _json(**changes):
    data = json.loads(PLAN.to_json())
    data["layers"][0].update(changes)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the JSON of a SwapPlan"),
        ("[]", "is written as"),
        ('{"format": 99, "layers": []}', "is written as"),
        ('{"format": 1, "layers": [3]}', "needs the fields .* got int"),
        ('{"format": 1, "layout": "nhwc", "layers": []}', "layout .* got 'nhwc'"),
        (_json(extra=1), "needs the fields"),
        (_json(choice="csr"), "LayerPlan 'fc': choice must be \"sparse\" or \"dense\", got 'csr'"),
        (_json(shape="10"), "LayerPlan 'fc': shape must be a tuple of ints"),
        (_json(shape=[1.5]), "LayerPlan 'fc': shape must be a tuple of ints"),
        (_json(sparsity=90), "LayerPlan 'fc': sparsity must be a number from 0 to 1"),
        (_json(dense_ms=-1), "LayerPlan 'fc': dense_ms must be milliseconds"),
        (_json(sparse_ms=float("nan")), "LayerPlan 'fc': sparse_ms must be milliseconds"),
        (_json(reason=None), "LayerPlan 'fc': reason must be a string"),
        (_json(name=""), "The plan names layer '' twice"),
    ],
)
def test_json_that_is_no_plan_is_refused(text, message):
    with pytest.raises(SparsePropError, match=message):
        SwapPlan.from_json(text)


def test_plans_hold_layer_plans_only():
    with pytest.raises(SparsePropError, match="holds LayerPlan entries, got str"):
        SwapPlan(("fc",))


@pytest.mark.parametrize(("make", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_layers_that_must_stay_dense_say_why(make, reason):
    layer = next(candidate for candidate in survey(make(), None) if candidate.name == "layer")
    assert reason in (layer.reason or "")
    assert plan(make(), min_sparsity=0.0)["layer"].choice == "dense"


@pytest.mark.parametrize(("make", "message"), WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("call", [sparseprop.plan, sparseprop.swap_modules, sparseprop.to_dense])
def test_wrappers_are_refused_with_advice(call, make, message):
    with pytest.raises(SparsePropError, match=message):
        call(make())


@pytest.mark.parametrize("value", [-0.1, 1.1, 90, float("nan"), "0.9", True])
def test_min_sparsity_outside_its_range_is_refused(value):
    with pytest.raises(SparsePropError, match="min_sparsity must be a number from 0 to 1"):
        plan(nn.Linear(4, 4), min_sparsity=value)


@pytest.mark.parametrize(("threshold", "choice"), [(0.0, "sparse"), (0.75, "sparse"), (0.76, "dense")])
def test_min_sparsity_decides_alone(threshold, choice):
    layer = sparsify(nn.Linear(8, 8), 0.75)
    entry = plan(layer, "no input at all", min_sparsity=threshold)[0]
    assert (entry.name, entry.choice, entry.sparsity) == ("", choice, 0.75)
    assert f"min_sparsity {threshold:g}" in entry.reason


def test_filter_fn_sees_module_and_name():
    seen = []

    def only_first(module, name):
        seen.append((type(module), name))
        return name == "0"

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    first, second = plan(model, min_sparsity=0.0, filter_fn=only_first)
    assert seen == [(nn.Linear, "0"), (nn.Linear, "2")]
    assert first.choice == "sparse"
    assert (second.choice, second.reason) == ("dense", "filter_fn said no")


def test_sparsity_of_a_pruned_layer_comes_from_its_mask():
    layer = nn.Linear(10, 10)
    layer.weight.data[:, 0] = 0.0  # zeros inside the pattern count as weights
    mask = torch.ones(10, 10)
    mask[:, 5:] = 0
    prune.custom_from_mask(layer, "weight", mask)
    assert plan(layer, min_sparsity=0.5)[0].sparsity == 0.5


def test_a_weight_without_zeros_stays_dense():
    entry = plan(nn.Linear(128, 128))[0]
    assert (entry.choice, entry.reason) == ("dense", "dense weight, no zeros")


def test_without_example_the_cost_model_decides(monkeypatch):
    monkeypatch.setattr("sparseprop.swap.cost.this_machine", lambda: INTEL)
    model = nn.Sequential(
        sparsify(nn.Linear(256, 256), 0.9),
        sparsify(nn.Linear(256, 256), 0.2),
        sparsify(nn.Linear(16, 16), 0.9),
        sparsify(nn.Conv2d(64, 64, 3), 0.9),
        sparsify(nn.Conv2d(512, 512, 3, groups=512), 0.9),
    )
    choices = [(entry.choice, entry.reason.split(":")[0]) for entry in plan(model)]
    assert choices == [
        ("sparse", "estimated"),
        ("dense", "estimated"),
        ("dense", "fewer than 4096 weights at few positions"),
        ("sparse", "estimated"),
        ("dense", "depthwise"),
    ]
    assert plan(model)[0].dense_ms > plan(model)[0].sparse_ms > 0


def test_few_weights_gain_on_large_planes():
    layer, x = sparsify(nn.Conv2d(24, 144, 1), 0.8), torch.ones(16, 24, 56, 56)
    assert plan(layer, x, measure=False)[0].choice == "sparse"
    assert plan(layer, x[:1, :, :8, :8], measure=False)[0].choice == "dense"


@pytest.mark.parametrize(
    ("machine", "layer", "wins_from"),
    [
        (INTEL, Facts("Linear", 1024, 1024), (0.4, 0.6)),
        (INTEL, Facts("Linear", 64, 256), (0.3, 0.9)),
        (INTEL, Facts("Conv2d", 256, 256 * 9, 1, (3, 3), (1, 1)), (0.4, 0.65)),
        (INTEL, Facts("Conv2d", 256, 1024, 1, (1, 1), (1, 1)), (0.35, 0.55)),
        (ZEN4, Facts("Linear", 1024, 1024), (None, 0.2)),
        (ZEN4, Facts("Linear", 64, 256), (None, 0.2)),
        (ZEN4, Facts("Conv2d", 256, 256 * 9, 1, (3, 3), (1, 1)), (0.1, 0.4)),
        (ZEN4, Facts("Conv2d", 256, 1024, 1, (1, 1), (1, 1)), (None, 0.3)),
        (ZEN5, Facts("Linear", 1024, 1024), (None, 0.1)),
        (ZEN5, Facts("Linear", 64, 256), (None, 0.1)),
        (ZEN5, Facts("Conv2d", 256, 256 * 9, 1, (3, 3), (1, 1)), (0.15, 0.4)),
        (ZEN5, Facts("Conv2d", 256, 1024, 1, (1, 1), (1, 1)), (0.3, 0.5)),
    ],
)
def test_estimates_cross_over_where_expected_and_never_turn_back(machine, layer, wins_from):
    weights = layer.rows * layer.cols
    assert keep_dense_rule(layer) is None
    times = [estimate(layer, nnz, None, machine).sparse_ms for nnz in range(0, weights + 1, weights // 64)]
    assert times == sorted(times)
    for sparsity, wins in zip(wins_from, (False, True), strict=True):
        if sparsity is not None:
            found = estimate(layer, round((1 - sparsity) * weights), None, machine)
            assert (found.sparse_ms < found.dense_ms) is wins


def test_estimates_are_those_of_the_machine_at_hand(monkeypatch):
    layer = Facts("Linear", 1024, 1024)
    for family, machine in ((0, INTEL), (23, ZEN4), (25, ZEN4), (26, ZEN5), (27, ZEN5)):
        monkeypatch.setattr("sparseprop.backend.amd_family", lambda family=family: family)
        assert estimate(layer, 1000) == estimate(layer, 1000, None, machine)
