"""What conversion does to one layer: the least-squares fit against direct solutions, moments, samples."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convert_cases import correlated_rows
from sparseprop.conversion.moments import Moments
from sparseprop.conversion.samples import Sampler
from sparseprop.conversion.solve import masked_least_squares, objective
from sparseprop.masks import nm_mask


def problem(rows=5, inputs=24, samples=200, *, bias=False, ridge=0.01):
    """(fit, H, C, mask): one layer's normal equations and a 2:4 mask."""
    weight = torch.randn(1, rows, inputs, dtype=torch.float64)
    moments = Moments()
    moments.add(correlated_rows(samples, inputs)[None])
    fit = moments.fit(weight, bias=bias)
    return fit, *fit.normal_equations(ridge), nm_mask(weight[0].abs(), 2, 4)[None]


def solve_rows(hessian, target, mask):
    """Each row on its own support, directly."""
    found = torch.zeros_like(target)
    for row in range(target.shape[1]):
        keep = mask[0, row]
        found[0, row, keep] = torch.linalg.solve(hessian[0][keep][:, keep], target[0, row, keep])
    return found


def test_conjugate_gradients_equal_a_direct_solution_of_each_row():
    fit, hessian, target, mask = problem()
    found = masked_least_squares(hessian, target, mask, fit.weight, iterations=60)
    torch.testing.assert_close(found, solve_rows(hessian, target, mask), rtol=1e-6, atol=1e-8)


def test_thirty_steps_are_enough_for_a_layer():
    fit, hessian, target, mask = problem(16, 128, 1000)
    found = masked_least_squares(hessian, target, mask, fit.weight)
    best, start = solve_rows(hessian, target, mask), torch.where(mask, fit.weight, 0.0)
    gap, room = (
        (objective(hessian, target, x) - objective(hessian, target, best)).sum() for x in (found, start)
    )
    assert 0 <= gap < 1e-5 * room


def test_the_objective_of_no_row_ever_rises():
    fit, hessian, target, mask = problem(8, 64)
    values = [
        objective(hessian, target, masked_least_squares(hessian, target, mask, fit.weight, iterations=count))
        for count in range(1, 30)
    ]
    values.insert(0, objective(hessian, target, torch.where(mask, fit.weight, 0.0)))
    for before, after in pairwise(values):
        assert (after <= before + 1e-12 * before.abs()).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 1000), st.floats(0, 1))
def test_the_support_stays_inside_the_mask(rows, inputs, seed, density):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, inputs, generator=generator, dtype=torch.float64)
    hessian = (x.T @ x / 30 + 0.01 * torch.eye(inputs))[None]
    target = torch.randn(1, rows, inputs, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, rows, inputs, generator=generator) < density
    found = masked_least_squares(hessian, target, mask, target)
    assert found.isfinite().all()
    assert not found[~mask].any()


@pytest.mark.parametrize("bias", [False, True])
def test_a_full_mask_returns_the_weight(bias):
    fit, hessian, target, mask = problem(bias=bias)
    found = masked_least_squares(hessian, target, torch.ones_like(mask), fit.weight)
    torch.testing.assert_close(found, fit.weight)
    torch.testing.assert_close(fit.bias_step(found), torch.zeros(1, 5, dtype=torch.float64))


def test_a_heavy_ridge_returns_the_masked_weight():
    fit, hessian, target, mask = problem(ridge=1e9)
    found = masked_least_squares(hessian, target, mask, torch.zeros_like(target))
    torch.testing.assert_close(found, torch.where(mask, fit.weight, 0.0))


def test_a_bias_is_one_more_constant_input_outside_the_mask():
    fit, hessian, target, mask = problem(bias=True, ridge=1e-9)
    found = masked_least_squares(hessian, target, mask, fit.weight, iterations=100)
    x = correlated_rows(200, 24)
    outputs = x @ fit.weight[0].T
    for row in range(5):
        columns = torch.cat([x[:, mask[0, row]], torch.ones(200, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(columns, outputs[:, row]).solution
        torch.testing.assert_close(found[0, row, mask[0, row]], best[:-1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fit.bias_step(found)[0, row], best[-1], rtol=1e-5, atol=1e-6)


def test_an_empty_row_leaves_the_mean_to_the_bias():
    fit, hessian, target, mask = problem(bias=True)
    mask[0, 2] = False
    found = masked_least_squares(hessian, target, mask, fit.weight)
    assert not found[0, 2].any()
    torch.testing.assert_close(fit.bias_step(found)[0, 2], fit.weight[0, 2] @ fit.mean[0])


@pytest.mark.parametrize("x", [torch.zeros(1, 9, 8), torch.ones(1, 9, 8)], ids=["dead", "constant"])
@pytest.mark.parametrize("bias", [False, True])
def test_dead_and_constant_inputs_are_no_trouble(x, bias):
    moments, weight = Moments(), torch.randn(1, 3, 8)
    moments.add(x)
    fit = moments.fit(weight, bias=bias)
    mask = nm_mask(weight[0].abs(), 1, 4)[None]
    found = masked_least_squares(*fit.normal_equations(0.01), mask, fit.weight)
    assert found.isfinite().all()
    assert fit.error(found, fit.bias_step(found)) <= fit.error(torch.where(mask, fit.weight, 0.0)) + 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_errors_are_those_of_the_outputs_also_when_earlier_layers_have_changed(bias):
    now, then = correlated_rows(300, 12), correlated_rows(300, 12) + 0.1 * correlated_rows(300, 12, seed=1)
    weight = torch.randn(1, 4, 12, dtype=torch.float64)
    moments = Moments()
    for part in (slice(100), slice(100, 300)):
        moments.add(now[None, part], then[None, part], weight)
    fit = moments.fit(weight, bias=bias)
    mask = nm_mask(weight[0].abs(), 2, 4)[None]
    found = masked_least_squares(*fit.normal_equations(1e-9), mask, fit.weight, iterations=100)
    step = fit.bias_step(found)
    wanted = then @ weight[0].T
    error = (wanted - now @ found[0].T - step).square().sum() / wanted.square().sum()
    assert fit.error(found, step) == pytest.approx(float(error), rel=1e-9)
    columns = torch.cat([now, torch.ones(300, 1, dtype=torch.float64)], 1) if bias else now
    for row in range(4):
        keep = torch.cat([mask[0, row], torch.ones(int(bias), dtype=torch.bool)])
        best = torch.linalg.lstsq(columns[:, keep], wanted[:, row]).solution
        torch.testing.assert_close(
            found[0, row, mask[0, row]], best[: mask[0, row].sum()], rtol=1e-5, atol=1e-7
        )


def test_float32_rows_and_drifts_far_from_zero_make_the_problem_of_float64_ones():
    now, weight = correlated_rows(300, 12), torch.randn(1, 4, 12, dtype=torch.float64)
    now, drift = 1e4 + now, 1e3 + 0.1 * correlated_rows(300, 12, seed=1)
    problems = []
    for dtype in (torch.float32, torch.float64):
        moments, rows = Moments(), now.float().to(dtype)
        moments.add(rows[None], (rows + drift.float().to(dtype))[None], weight)
        problems.append(moments.fit(weight, bias=True))
    for ours, theirs in zip(*(fit.normal_equations(0.01) for fit in problems), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(problems[0].drift_energy, problems[1].drift_energy, rtol=0.02, atol=0)


def test_inputs_that_do_not_vary_keep_their_weights():
    rows, weight = torch.randn(1, 100, 8), torch.randn(1, 3, 8)
    rows[..., 5] = 1e6 + torch.rand(100) / 10  # what rounding leaves of a constant
    moments = Moments()
    moments.add(rows)
    fit, mask = moments.fit(weight, bias=True), torch.rand(1, 3, 8) < 0.5
    found = masked_least_squares(*fit.normal_equations(0.01), mask, fit.weight)
    torch.testing.assert_close(found[..., 5], (weight * mask)[..., 5].double())
    assert not moments.covariance[0, 5].any()


def test_moments_do_not_depend_on_how_the_data_is_cut():
    rows = torch.randn(2, 500, 6, dtype=torch.float64)
    whole, parts = Moments(), Moments()
    whole.add(rows)
    for part in rows.split(37, dim=1):
        parts.add(part)
    torch.testing.assert_close(parts.second, whole.second)
    torch.testing.assert_close(whole.second, rows.mT @ rows / 500)
    torch.testing.assert_close(whole.mean_square, rows.square().mean(1))


CONVS = [
    (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2)), (2, 4, 9, 8)),
    (nn.Conv2d(4, 8, 3, groups=2, padding="same"), (2, 4, 6, 6)),
    (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3), (4, 5, 5)),
    (nn.Conv3d(4, 4, 2, groups=2), (1, 4, 3, 4, 3)),
    (nn.Linear(4, 6), (2, 3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVS, ids=[str(layer)[:40] for layer, _ in CONVS])
def test_rows_times_the_flat_weight_are_the_outputs(layer, shape):
    x = torch.randn(shape)
    groups = getattr(layer, "groups", 1)
    rows = Sampler.of(layer, positions=10_000).rows(x, seed=0)
    weights = layer.weight.detach().chunk(groups)
    products = torch.cat([r @ w.flatten(1).T for r, w in zip(rows, weights, strict=True)], 1)
    layer.bias.data.zero_()
    out = layer(x).detach()
    channels = out if isinstance(layer, nn.Linear) else out.movedim(1 - layer.weight.dim(), -1)
    torch.testing.assert_close(products, channels.reshape(products.shape), rtol=1e-4, atol=1e-5)


def test_sampled_positions_are_repeatable_distinct_and_spread_over_the_image():
    sampler, image = Sampler.of(nn.Conv2d(1, 4, 1), positions=64), torch.arange(1024.0).view(1, 1, 32, 32)
    first, again, other = (sampler.rows(image, seed=seed).flatten() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) == 64
    assert len((first % 32).unique()) > 20  # columns: no period of the grid's own
    assert torch.histc(first, 4, 0, 1024).tolist() == [16] * 4
