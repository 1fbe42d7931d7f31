"""Layer densities: the budget is met exactly, whatever the rule."""

import math

import pytest

from sparseprop import SparsePropError
from sparseprop.masks import layer_counts, layer_densities


def resnet18_for_32_pixels():
    shapes = {"conv1": (64, 3, 3, 3)}
    width = 64
    for stage, out in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            shapes[f"layer{stage}.{block}.conv1"] = (out, width, 3, 3)
            shapes[f"layer{stage}.{block}.conv2"] = (out, out, 3, 3)
            if block == 0 and width != out:
                shapes[f"layer{stage}.{block}.down"] = (out, width, 1, 1)
            width = out
    return shapes | {"fc": (10, 512)}


SHAPES = resnet18_for_32_pixels()
NUMEL = {name: math.prod(shape) for name, shape in SHAPES.items()}
TOTAL = sum(NUMEL.values())


@pytest.mark.parametrize(("density", "dense"), [(0.5, 14), (0.2, 9), (0.1, 4), (0.05, 3), (0.02, 2)])
def test_erk_on_resnet18_makes_as_many_layers_dense_as_measured(density, dense):
    densities = layer_densities(SHAPES, density)
    assert sum(d == 1.0 for d in densities.values()) == dense


@pytest.mark.parametrize("rule", ["uniform", "er", "erk"])
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("density", [0.001, 0.05, 0.3, 0.9, 1.0])
def test_densities_are_valid_and_counts_meet_the_total_exactly(rule, power, density):
    densities = layer_densities(SHAPES, density, rule=rule, power=power)
    assert all(0 < d <= 1 for d in densities.values())
    assert math.fsum(densities[k] * NUMEL[k] for k in SHAPES) == pytest.approx(density * TOTAL, rel=1e-12)
    counts = layer_counts(SHAPES, densities)
    assert sum(counts.values()) == round(density * TOTAL)
    assert all(abs(counts[k] - densities[k] * NUMEL[k]) < 1 for k in SHAPES)
    assert all(0 <= counts[k] <= NUMEL[k] for k in SHAPES)


def test_densities_grow_with_the_budget_and_ignore_the_order_of_layers():
    low, high = layer_densities(SHAPES, 0.1), layer_densities(SHAPES, 0.2)
    assert all(low[name] <= high[name] for name in SHAPES)
    backwards = layer_densities(dict(reversed(SHAPES.items())), 0.1)
    assert backwards == pytest.approx(low)
    assert list(low) == list(SHAPES)


def test_the_rules_weigh_layers_as_defined():
    shapes = {"a": (64, 32, 3, 3), "b": (256, 256, 1, 1)}
    er = layer_densities(shapes, 0.01, rule="er")
    assert er["a"] / er["b"] == pytest.approx((96 / 2048) / (512 / 65536))
    erk = layer_densities(shapes, 0.01)
    assert erk["a"] / erk["b"] == pytest.approx((102 / 18432) / (514 / 65536))
    assert layer_densities(shapes, 0.3, rule="uniform") == pytest.approx({"a": 0.3, "b": 0.3})
    assert layer_densities(shapes, 0.3, power=0.0) == pytest.approx({"a": 0.3, "b": 0.3})


def test_fixed_densities_are_kept_and_the_rest_makes_up_for_them():
    fixed = {"conv1": 1.0, "fc": 0.2}
    densities = layer_densities(SHAPES, 0.1, fixed=fixed)
    assert {k: densities[k] for k in fixed} == fixed
    assert sum(layer_counts(SHAPES, densities).values()) == round(0.1 * TOTAL)
    assert layer_densities({"a": (2, 2)}, 0.5, fixed={"a": 0.5}) == {"a": 0.5}
    assert layer_densities({"a": (2, 2), "b": (2, 2)}, 0.5, fixed={"a": 1.0})["b"] == 0.0


@pytest.mark.parametrize(
    ("shapes", "density", "options", "message"),
    [
        ({"a": (4, 4)}, 1.2, {}, "density got 1.2, wanted 0..1"),
        (
            {"a": (4, 4), "b": (2, 2)},
            0.5,
            {"fixed": {"a": 1.0}},
            "leave -6 weights for 4 places in the other layers",
        ),
        ({"a": (4, 4), "b": (2, 2)}, 0.9, {"fixed": {"a": 0.1}}, "leave 16 weights for 4 places"),
        ({"a": (4, 4)}, 0.5, {"fixed": {"z": 1.0}}, "fixed got unknown layer 'z', wanted one of a"),
        ({"a": (4, 4)}, 0.5, {"rule": "magic"}, "rule got 'magic', wanted one of uniform, er, erk"),
        ({"a": (4,)}, 0.5, {}, r"shapes\['a'\] got \(4,\), wanted a Linear or Conv weight's shape"),
    ],
)
def test_infeasible_requests_are_refused(shapes, density, options, message):
    with pytest.raises(SparsePropError, match=message):
        layer_densities(shapes, density, **options)


def test_counts_need_a_density_per_layer():
    with pytest.raises(SparsePropError, match="densities got none for layer 'a', wanted one for every layer"):
        layer_counts({"a": (4, 4)}, {})
