"""Transposable masks: optimal by brute force, linear programs and certificates; the others never far off."""

import numpy as np
import pytest
import torch

from mask_cases import FAMILIES, all_masks, best_by_brute_force, kept, stack, tiles, unstack
from sparseprop.masks import check_nm, transposable_nm_mask
from sparseprop.masks._tsenor import fill_tiles, round_tiles

SMALL = [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)]


LARGER = [(2, 6), (4, 6), (2, 8), (4, 8), (6, 8), (4, 16), (8, 16)]


def solve(scores, n, **options):
    """(tiles, m, m) scores to their masks."""
    m = scores.shape[1]
    return unstack(transposable_nm_mask(stack(scores), n, m, **options), m)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "m"), SMALL)
@pytest.mark.parametrize("method", ["exact", "enumerate"])
def test_small_tiles_equal_brute_force(family, n, m, method):
    scores = tiles(family, 100, m)
    mask = solve(scores, n, method=method)
    assert check_nm(stack(mask), n, m, transposable=True, exact_count=True)
    torch.testing.assert_close(kept(scores, mask), best_by_brute_force(scores, n), rtol=1e-13, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4)])
def test_small_tiles_with_at_most_n_equal_brute_force(family, n, m):
    scores = tiles(family, 60, m)
    mask = solve(scores, n, exact_count=False)
    assert check_nm(stack(mask), n, m, transposable=True)
    best = best_by_brute_force(scores, n, at_most=True)
    torch.testing.assert_close(kept(scores, mask), best, rtol=1e-13, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "m"), LARGER)
@pytest.mark.parametrize("exact_count", [True, False])
def test_larger_tiles_equal_linear_programs(family, n, m, exact_count):
    scores = tiles(family, 12 if m < 16 else 6, m, seed=m)
    mask = solve(scores, n, exact_count=exact_count)
    oracle = solve(scores, n, exact_count=exact_count, method="linprog")
    assert check_nm(stack(mask), n, m, transposable=True, exact_count=exact_count)
    assert check_nm(stack(oracle), n, m, transposable=True, exact_count=exact_count)
    torch.testing.assert_close(kept(scores, mask), kept(scores, oracle), rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), (4, 8), (8, 16), (16, 32), (8, 32), (3, 7), (5, 19), (32, 64), (8, 8)]
)
def test_dual_certificates_prove_optimality(family, n, m):
    scores = stack(tiles(family, 6, m, seed=2))
    mask, certificate = transposable_nm_mask(scores, n, m, return_duals=True)
    assert check_nm(mask, n, m, transposable=True, exact_count=True)
    assert certificate.violation(scores, mask) <= 1e-12
    assert certificate.bound(scores, n) == pytest.approx(float((scores * mask).sum()), rel=1e-12)


def test_a_certificate_refutes_a_worse_mask():
    scores = stack(tiles("gaussian", 4, 8))
    _, certificate = transposable_nm_mask(scores, 4, 8, return_duals=True)
    worse = transposable_nm_mask(scores, 4, 8, method="greedy")
    assert certificate.violation(scores, worse) > 1e-3


def test_certificates_of_convolutions_follow_groups_and_positions():
    scores = torch.rand(16, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    mask, certificate = transposable_nm_mask(scores, 2, 4, groups=2, return_duals=True)
    assert certificate.row.shape == (2, 2, 2, 6, 4)
    assert certificate.violation(scores, mask) <= 1e-12


def test_published_vectors():
    v1 = torch.tensor([[4, 3, 2, 1], [0, 0, 0.5, 0.5], [1, 2, 3, 4], [10, 2, 1, 5]])
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]).bool()
    for method in ("exact", "greedy", "greedy_fill", "enumerate", "tsenor", "linprog"):
        assert torch.equal(transposable_nm_mask(v1, 2, 4, method=method), expected)
    assert float((v1 * expected).sum()) == 29.5

    v2 = torch.tensor([[10.0, 0, 0], [0, 10, 10], [0, 10, 10]])
    assert float((v2 * transposable_nm_mask(v2, 2, 3)).sum()) == 40
    assert float((v2 * transposable_nm_mask(v2, 2, 3, exact_count=False)).sum()) == 50
    greedy = transposable_nm_mask(v2, 2, 3, method="greedy")
    assert float((v2 * greedy).sum()) == 50
    assert int(greedy.sum()) == 5
    assert float((v2 * transposable_nm_mask(v2, 2, 3, method="greedy_fill")).sum()) == 40

    v3 = torch.tensor([[1.001, 1.0], [1.0, 0.0]])
    assert float((v3 * transposable_nm_mask(v3, 1, 2)).sum()) == 2.0
    assert float((v3 * transposable_nm_mask(v3, 1, 2, method="greedy")).sum()) == pytest.approx(1.001)

    v4 = torch.arange(1.0, 17.0).view(4, 4)
    totals = (all_masks(2, 4) * v4).sum((1, 2))
    assert len(totals) == 90
    assert (totals == 68).all()


def test_the_published_8x8_vector():
    scores = torch.from_numpy(np.random.default_rng(123).integers(0, 100, (8, 8))).double()
    assert scores[0].tolist() == [1, 68, 59, 5, 90, 22, 25, 18]

    def total(n, **options):
        mask = transposable_nm_mask(scores, n, 8, **options)
        return int((scores * mask).sum()), int(mask.sum())

    assert total(4) == (2061, 32)
    assert total(2) == (1200, 16)
    assert total(4, method="greedy") == (2012, 32)
    assert total(4, method="greedy_fill") == (2012, 32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (2, 8), (8, 16), (8, 32)])
def test_greedy_is_maximal_and_within_its_guarantees(family, n, m):
    scores = tiles(family, 40, m, seed=5)
    best = solve(scores, n, exact_count=False)
    greedy = solve(scores, n, method="greedy")
    assert check_nm(stack(greedy), n, m, transposable=True)
    open_rows, open_cols = greedy.sum(2) < n, greedy.sum(1) < n
    assert not (open_rows.unsqueeze(2) & open_cols.unsqueeze(1) & ~greedy).any()
    slack = 1e-12 * m * m
    assert (kept(scores, greedy) >= kept(scores, best) / 2 - slack).all()
    assert (kept(scores, ~greedy) <= 2 * kept(scores, ~best) + slack).all()
    assert (kept(scores, best & ~greedy) <= 2 * kept(scores, greedy & ~best) + slack).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 8), (2, 8), (8, 16), (20, 32), (3, 7)])
def test_filled_tiles_are_perfect_and_the_torch_twin_agrees(family, n, m):
    scores = tiles(family, 20, m, seed=6)
    filled = solve(scores, n, method="greedy_fill")
    assert check_nm(stack(filled), n, m, transposable=True, exact_count=True)
    assert (kept(scores, filled) <= kept(scores, solve(scores, n)) + 1e-12 * m * m).all()
    rounded = round_tiles(scores, n)
    assert torch.equal(rounded, solve(scores, n, method="greedy"))
    assert torch.equal(fill_tiles(rounded, scores, n), filled)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16)])
def test_tsenor_is_perfect_and_close_to_the_optimum(family, n, m):
    scores = tiles(family, 12, m, seed=7, dtype=torch.float32)
    mask = solve(scores, n, method="tsenor")
    assert check_nm(stack(mask), n, m, transposable=True, exact_count=True)
    if family == "gaussian":
        assert float(kept(scores, mask).sum() / kept(scores, solve(scores, n)).sum()) > 0.998


@pytest.mark.parametrize("shape", [(16, 16), (19, 21)])
def test_masks_are_idempotent_scale_permutation_and_transposition_invariant(shape):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.1
    mask = transposable_nm_mask(scores, 4, 8)
    assert torch.equal(transposable_nm_mask(scores * mask, 4, 8), mask)
    assert torch.equal(transposable_nm_mask(scores * 4, 4, 8), mask)
    assert torch.equal(transposable_nm_mask(scores.T, 4, 8), mask.T)
    order = torch.cat([torch.randperm(8), 8 + torch.randperm(8), torch.arange(16, shape[1])])
    assert torch.equal(transposable_nm_mask(scores[:, order], 4, 8), mask[:, order])


@pytest.mark.parametrize("method", ["exact", "greedy", "greedy_fill", "enumerate"])
@pytest.mark.parametrize("family", ["gaussian", "tied", "zero"])
def test_a_tile_is_solved_alone_as_in_a_batch_and_on_any_number_of_threads(method, family):
    scores = tiles(family, 2000, 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = solve(scores, 2, method=method)
        torch.set_num_threads(2)
        assert torch.equal(solve(scores, 2, method=method), one)
    finally:
        torch.set_num_threads(before)
    for k in (0, 7, 1999):
        assert torch.equal(solve(scores[k : k + 1], 2, method=method)[0], one[k])


@pytest.mark.parametrize("power", [-1060, -600, 600, 1000])
def test_scores_of_any_magnitude_give_the_same_mask_and_certificate(power):
    scores = (tiles("gaussian", 8, 8) * 2**20).round()
    scaled = stack(scores * 2.0 ** (power - 40) if power < 0 else scores * 2.0**power)
    mask, certificate = transposable_nm_mask(scaled, 4, 8, return_duals=True)
    if power != -1060:  # there the scores themselves lose bits
        assert torch.equal(unstack(mask, 8), solve(scores, 4))
    assert certificate.violation(scaled, mask) <= 1e-12 * float(scaled.max())


def test_complementary_scores_give_complementary_masses():
    scores = (tiles("gaussian", 20, 8) * 1000).round()
    flipped = scores.amax() - scores
    pruned = kept(scores, ~solve(scores, 6))
    kept_of_flipped = 16 * scores.amax() - kept(flipped, solve(flipped, 2))
    torch.testing.assert_close(pruned, kept_of_flipped)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 2e37), (torch.float64, 1e307)])
def test_tsenor_of_scores_near_the_largest_number_is_that_of_small_ones(dtype, size):
    scores = tiles("gaussian", 20, 8).to(dtype)
    scores /= scores.max()
    assert torch.equal(solve(scores * size, 4, method="tsenor"), solve(scores, 4, method="tsenor"))
