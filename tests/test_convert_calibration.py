"""What conversion makes of calibration batches: extreme, wrong or few ones, and of the ways they take."""

import copy

import pytest
import torch
from torch import nn

import sparseprop
from convert_cases import batches, small_net
from sparseprop.conversion import Reconstruction
from sparseprop.errors import SparsePropError


@pytest.mark.parametrize("copies", [1, 256])
@pytest.mark.parametrize("sequential", [True, False])
def test_inputs_that_never_vary_leave_the_outputs_to_the_bias(copies, sequential):
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
        x = torch.randn(1, 64)
        wanted = model(x).detach()
        report = sparseprop.convert(model, "2:4", [x.repeat(copies, 1)], sequential=sequential)
        assert all(layer.error <= layer.error_masked for layer in report)
        if sequential:
            torch.testing.assert_close(model(x).detach(), wanted, rtol=1e-4, atol=1e-5)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_inputs_far_from_zero_are_fitted_as_well_as_in_double_precision(mean):
    x, layer = torch.randn(512, 64) + mean, nn.Linear(64, 16)
    twin = copy.deepcopy(layer).double()
    report, exact = (sparseprop.convert(net, "2:4", [x.to(net.weight.dtype)]) for net in (layer, twin))
    torch.testing.assert_close(layer.weight, twin.weight.float(), rtol=1e-3, atol=1e-4)
    assert report[0].error == pytest.approx(exact[0].error, rel=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_the_size_of_inputs_does_not_matter(size):
    x, layer = torch.randn(64, 16), nn.Linear(16, 8, bias=False)
    reports = [sparseprop.convert(layer, "2:4", [x * by], inplace=False) for by in (1.0, size)]
    assert reports[1][0].error == pytest.approx(reports[0][0].error, rel=1e-4)
    torch.testing.assert_close(reports[1].model.weight, reports[0].model.weight, rtol=1e-3, atol=1e-5)


def test_a_ridge_below_rounding_does_not_blow_up_weights():
    x, layer = torch.randn(512, 8) @ torch.randn(8, 128) + 3, nn.Linear(128, 16)  # of rank 8
    wanted, largest = layer(x).detach(), layer.weight.abs().max()
    sparseprop.convert(layer, "2:4", [x], reconstruct=Reconstruction(ridge=1e-12))
    torch.testing.assert_close(layer(x).detach(), wanted, rtol=1e-3, atol=1e-3)
    assert layer.weight.abs().max() < 5 * largest


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "options", [{}, {"sequential": False}, {"reconstruct": False}, {"score": "wx2"}], ids=str
)
def test_what_is_not_finite_is_refused_by_layer_and_batch(wrong, options):
    model, data = small_net(), batches()
    before = copy.deepcopy(model.state_dict())
    data[2][3, 1, 4, 4] = wrong
    with pytest.raises(
        SparsePropError,
        match=r"layer '3' got NaN, inf or numbers too large .* in calibration batch 2, wanted",
    ):
        sparseprop.convert(model, "2:4", data, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_too_large_to_fit_are_masked_and_said_so():
    layer = nn.Linear(16, 8).double()
    layer.weight.data.mul_(1e200)
    report = sparseprop.convert(layer, "2:4", [torch.randn(64, 16, dtype=torch.float64)])
    assert report[0].reason == "numbers too large to fit: masked only"
    assert (report[0].error_masked, report[0].error) == (None, None)
    assert torch.equal(layer.weight != 0, report.masks[""])


class Residual(nn.Module):
    """Adds to its input twice, by its own tensor or by new ones; one layer or two."""

    def __init__(self, *, in_place, layers):
        super().__init__()
        self.layers, self.in_place = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers)), in_place

    def forward(self, x):
        x = x.clone()
        for layer in (self.layers[0], self.layers[-1]):
            if self.in_place:
                x += layer(x)
            else:
                x = x + layer(x)
        return x


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_models_may_write_into_what_their_layers_have_read(sequential, layers):
    torch.manual_seed(0)
    x, ours = torch.randn(128, 16), Residual(in_place=True, layers=layers)
    twin = Residual(in_place=False, layers=layers)
    twin.load_state_dict(ours.state_dict())
    for model in (ours, twin):
        sparseprop.convert(model, "2:4", [x], sequential=sequential)
    for ours_now, twins in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours_now, twins)


def test_a_network_that_chooses_its_way_by_its_data_is_fitted_all_the_same():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            x = self.first(x)
            return self.second(x[x[:, 0] > 0])

    report = sparseprop.convert(Routed(), "1:4", [torch.randn(64, 16) for _ in range(4)])
    assert report["second"].error < report["second"].error_masked


def test_layers_no_batch_reaches_are_masked_and_said_so():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(self.used(x))

    report = sparseprop.convert(Branch(), "2:4", [torch.randn(32, 8)])
    assert report["unused"].reason == "not reached by the calibration batches: masked only"
    assert report["unused"].converted
    assert report["used"].error < report["used"].error_masked
    report = sparseprop.convert(Branch(), "2:4", [torch.randn(32, 8)], score="wx2")
    assert report["unused"].reason.endswith("which the score wx2 needs")
    assert not report["unused"].converted


class ByWidth(nn.Module):
    """Reads batches of four samples with one layer, others with another, twice."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.small(x) if len(x) == 4 else self.large(self.large(x))


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("score", ["magnitude", "wx2"])
def test_layers_that_only_later_batches_reach_are_fitted_too(sequential, score):
    data = [torch.randn(size, 8) for size in (4, 32, 4, 32)]
    report = sparseprop.convert(ByWidth(), "2:4", data, sequential=sequential, score=score)
    for layer in report:
        assert layer.reason == ""
        assert layer.error < layer.error_masked


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 8), (8,)),
        (nn.Conv2d(8, 8, 3), (8, 5, 5)),
        (nn.Conv2d(8, 8, 3, groups=2, padding=1, padding_mode="circular"), (8, 20, 20)),
    ],
    ids=["linear", "conv", "circular"],
)
@pytest.mark.parametrize("sequential", [True, False])
def test_batches_without_samples_teach_nothing(layer, shape, sequential):
    full, none = torch.randn(16, *shape), torch.zeros(0, *shape)
    reports = [
        sparseprop.convert(layer, "2:4", data, sequential=sequential, inplace=False)
        for data in ([full, none], [full], [none])
    ]
    assert torch.equal(reports[0].model.weight, reports[1].model.weight)
    assert reports[2][0].reason == "not reached by the calibration batches: masked only"
