"""Conversion of whole networks to N:M."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import sparseprop
from convert_cases import REFUSED, batches, small_net
from sparseprop.conversion import ConversionReport, Reconstruction, reestimate_batch_norm
from sparseprop.errors import SparsePropError
from sparseprop.masks import check_nm, nm_mask, pattern_mask
from sparseprop.nn import MaskRule, SparseConv2d


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "2:4T", "4:8T"])
@pytest.mark.parametrize("sequential", [True, False])
def test_every_layer_gets_the_pattern_and_a_smaller_error(pattern, sequential):
    model = small_net().eval()
    reestimate_batch_norm(model, batches())  # as in a trained network
    x = torch.cat(batches())
    wanted = model(x).detach()
    masked = sparseprop.convert(model, pattern, batches(), reconstruct=False, inplace=False).model
    report = sparseprop.convert(model, pattern, batches(), sequential=sequential, inplace=False)
    assert report.converted == ("3", "5", "8")
    n, m = (int(part) for part in pattern.removesuffix("T").split(":"))
    for layer in report:
        if not layer.converted:
            assert layer.reason.endswith(f"fewer than {m}")
            continue
        module = report.model[int(layer.name)]
        groups = getattr(module, "groups", 1)
        for mask in (report.masks[layer.name], module.weight != 0):
            assert check_nm(mask, n, m, transposable=pattern.endswith("T"), groups=groups)
        assert layer.error < layer.error_masked
        assert layer.density == pytest.approx(n / m)
        assert 0.3 < layer.retained < 0.95
    error, error_masked = (F.mse_loss(net.eval()(x), wanted).item() for net in (report.model, masked))
    assert error < error_masked


def test_sequential_is_better_than_parallel_on_a_deep_network():
    torch.manual_seed(5)
    layers = [part for _ in range(5) for part in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers)
    data, x = [torch.randn(256, 64) for _ in range(4)], torch.randn(500, 64)
    errors = {}
    for sequential in (True, False):
        report = sparseprop.convert(model, "2:8", data, sequential=sequential, inplace=False)
        errors[sequential] = F.mse_loss(report.model(x), model(x)).item()
    assert errors[True] < errors[False]


def test_scoring_by_inputs_keeps_what_matters_to_the_output():
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(512, 8) * torch.tensor([9.0, 0.001] * 4)
    by = {
        score: sparseprop.convert(layer, "2:4", [x], score=score, reconstruct=False, inplace=False)
        for score in ("magnitude", "wx2")
    }
    assert by["wx2"].masks[""][:, ::2].all()
    assert by["wx2"][0].error_masked < by["magnitude"][0].error_masked
    assert by["wx2"][0].retained < by["magnitude"][0].retained
    wanted = pattern_mask(layer.weight.detach().square() * x.square().mean(0), "2:4")
    assert torch.equal(by["wx2"].masks[""], wanted)


def test_n_follows_each_layers_sparsity():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    for layer, sparsity in zip(model, (0.95, 0.7, 0.0), strict=True):
        prune.l1_unstructured(layer, "weight", sparsity)
    report = sparseprop.convert(model, "auto:8", [torch.randn(99, 64)])
    assert [layer.pattern for layer in report] == ["2:8", "5:8", None]
    assert report[2].reason == "0.0 % zeros: too dense for N of 8"
    assert report.pattern == "auto:8"
    assert not any(prune.is_pruned(model[index]) for index in (0, 1))


def test_what_has_the_pattern_already_stays_as_it_is():
    layer = nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight.mul_(nm_mask(layer.weight.abs(), 2, 4))
    before = copy.deepcopy(layer)
    report = sparseprop.convert(layer, "2:4", [torch.randn(64, 16)])
    torch.testing.assert_close(layer.weight, before.weight)
    torch.testing.assert_close(layer.bias, before.bias)
    assert report[0].error == pytest.approx(0, abs=1e-9)
    assert report[0].retained == 1.0


def test_a_copy_leaves_the_model_alone_and_an_error_too():
    model = small_net()
    model[5].train(False)
    before = copy.deepcopy(model)

    def same():
        states = zip(model.state_dict().items(), before.state_dict().items(), strict=True)
        flags = [part.training for part in model.modules()] == [part.training for part in before.modules()]
        return flags and all(k == other and torch.equal(v, w) for (k, v), (other, w) in states)

    sparseprop.convert(model, "2:4", batches(), inplace=False)
    assert same()
    with pytest.raises(SparsePropError, match="fails on a calibration batch"):
        sparseprop.convert(model, "2:4", [*batches(), torch.ones(1, 1)])
    assert same()
    report = sparseprop.convert(model, "2:4", batches())
    assert report.model is model
    assert not same()
    assert [part.training for part in model.modules()] == [part.training for part in before.modules()]


def test_sparse_layers_stay_sparse_and_pruned_ones_are_finished():
    model = small_net()
    prune.l1_unstructured(model[5], "weight", 0.8)
    prune.l1_unstructured(model[8], "weight", 0.8)
    with torch.no_grad():
        model[3].weight.mul_(model[3].weight.abs() > model[3].weight.abs().median())
    swapped = sparseprop.swap_modules(
        model, min_sparsity=0.4, filter_fn=lambda layer, name: name == "3", inplace=False
    )
    report = sparseprop.convert(swapped, "2:4", batches())
    assert isinstance(swapped[3], SparseConv2d)
    assert torch.equal(swapped[3].mask, report.masks["3"])
    assert not prune.is_pruned(swapped)
    other = sparseprop.convert(model, "2:4", batches())
    for name in ("3", "5", "8"):
        ours, theirs = (net.get_submodule(name).weight for net in (swapped, model))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)  # 30 steps amplify rounding
        assert report[name].error == pytest.approx(other[name].error, rel=0.02)


def test_masked_layers_get_the_mask_too_and_keep_the_pattern_in_training():
    model = sparseprop.mask_modules(nn.Sequential(nn.Linear(16, 16)), MaskRule("4:8", decay=0.1))
    dense = sparseprop.to_dense(model, inplace=False)
    data = [torch.randn(64, 16)]
    report = sparseprop.convert(model, "1:4", data)
    other = sparseprop.convert(dense, "1:4", data)
    assert torch.equal(model[0].mask, report.masks["0"])
    torch.testing.assert_close(model[0].to_dense().weight, other.model[0].weight)
    assert model[0].rule == MaskRule("1:4", decay=0.1)
    model(data[0])
    with torch.no_grad():
        model[0].weight.add_(torch.randn(16, 16))
    model(data[0])
    assert not torch.equal(model[0].mask, report.masks["0"])
    assert check_nm(model[0].mask, 1, 4, exact_count=True)
    assert model[0].freeze().density == 0.25


def test_groups_are_fitted_apart():
    both = nn.Conv2d(8, 8, 3, groups=2)
    x = torch.cat(batches()).repeat(1, 3, 1, 1)[:, :8] * torch.rand(8, 1, 1)
    parts = [nn.Conv2d(4, 4, 3) for _ in range(2)]
    for index, part in enumerate(parts):
        part.weight.data.copy_(both.weight.data[4 * index : 4 * index + 4])
        part.bias.data.copy_(both.bias.data[4 * index : 4 * index + 4])
        sparseprop.convert(part, "2:4", [x[:, 4 * index : 4 * index + 4]])
    sparseprop.convert(both, "2:4", [x])
    torch.testing.assert_close(both.weight, torch.cat([part.weight for part in parts]), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(both.bias, torch.cat([part.bias for part in parts]), rtol=1e-3, atol=1e-5)


def test_batches_may_be_pairs_dicts_or_anything_with_a_forward_function():
    x, model = torch.randn(32, 8), nn.Sequential(nn.Linear(8, 8))

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = copy.deepcopy(model[0])

        def forward(self, *, pixels):
            return self.fc(input=pixels)

    named = Named()
    results = [
        sparseprop.convert(model, "2:4", data, inplace=False, forward_fn=forward).model[0].weight
        for data, forward in (
            ([x], None),
            ([(x, torch.zeros(32))], None),
            ([{"a": x}], lambda net, batch: net(batch["a"])),
        )
    ]
    sparseprop.convert(named, "2:4", [{"pixels": x}])
    for weight in (*results[1:], named.fc.weight):
        torch.testing.assert_close(weight, results[0])


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(case[0])[:40] for case in REFUSED])
def test_refusals_say_why(changes, message):
    options = {"pattern": "2:4", "calibration": batches(1), **changes}
    with pytest.raises(SparsePropError, match=message):
        sparseprop.convert(small_net(), **options)


def test_reconstruction_refuses_numbers_without_sense():
    with pytest.raises(SparsePropError, match="ridge=0, wanted at least 1e-12"):
        Reconstruction(ridge=0)
    with pytest.raises(SparsePropError, match="positions=0, wanted at least 1"):
        Reconstruction(positions=0)


def test_a_report_prints_and_round_trips():
    seen = []
    report = sparseprop.convert(small_net(), "2:4", batches(), bn_batches=9, progress=seen.append)
    assert [(p.layer, p.done, p.total) for p in seen] == [("3", 0, 3), ("5", 1, 3), ("8", 2, 3), ("", 3, 3)]
    assert ConversionReport.from_json(report.to_json()) == report
    lines = str(report).splitlines()
    assert lines[0].split() == [
        *("layer", "kind", "shape", "pattern", "was", "density"),
        *("retained", "error", "masked", "error", "fitted", "note"),
    ]
    assert "3 inputs per group, fewer than 4" in lines[1]
    assert lines[-1] == "3 of 4 layers converted to 2:4 by magnitude; batch norm measured on 4 batches"
    for text in ("{", "[]", json.dumps({"format": 2}), report.to_json().replace('"retained"', '"kept"')):
        with pytest.raises(SparsePropError, match="not the JSON of a ConversionReport"):
            ConversionReport.from_json(text)
    with pytest.raises(SparsePropError, match="has no layer 'x'"):
        report["x"]


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"reconstruct": False}, 4),
        ({"sequential": False}, 4),
        ({}, 0),
        ({"bn_batches": 2}, 2),
        ({"reconstruct": False, "bn_batches": 0}, 0),
    ],
)
def test_batch_norm_is_measured_anew_where_that_helps_or_is_asked_for(options, used):
    model = small_net()
    report = sparseprop.convert(model, "2:4", batches(), **options)
    assert report.bn_batches == used
    assert torch.equal(model[1].running_mean, torch.zeros(16)) == (used == 0)
