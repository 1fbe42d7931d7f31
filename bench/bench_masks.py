"""Time of mask producers, and how far each is from the optimum (extra_info: gap, in kept mass).

Run: pytest bench/bench_masks.py --benchmark-enable --benchmark-group-by=group --benchmark-columns=min,mean
A 4096 x 4096 weight holds 16 times the tiles of the 1024 x 1024 one timed here.
"""

import pytest
import torch

from sparseprop.masks import nm_mask, retained_magnitude, transposable_nm_mask, unstructured_mask

SIDE = 1024
PATTERNS = [(2, 4), (4, 8), (2, 8), (8, 16), (16, 32)]
METHODS = ["exact", "greedy", "greedy_fill"]


@pytest.fixture(scope="module")
def scores():
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).abs()


def note(benchmark, scores, mask, best):
    benchmark.extra_info.update(
        kept=retained_magnitude(scores, mask),
        gap=1.0 - float((scores * mask).sum() / (scores * best).sum()),
        threads=torch.get_num_threads(),
    )


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_transposable(benchmark, scores, n, m, method):
    benchmark.group = f"transposable {n}:{m}, {SIDE} x {SIDE}"
    mask = benchmark(transposable_nm_mask, scores, n, m, method=method)
    note(benchmark, scores, mask, transposable_nm_mask(scores, n, m))


@pytest.mark.parametrize(("n", "m"), PATTERNS[:2])
def test_at_most_n(benchmark, scores, n, m):
    benchmark.group = f"transposable {n}:{m}, {SIDE} x {SIDE}"
    mask = benchmark.pedantic(
        transposable_nm_mask, (scores, n, m), {"exact_count": False}, rounds=3, warmup_rounds=1
    )
    note(benchmark, scores, mask, transposable_nm_mask(scores, n, m))


@pytest.mark.parametrize(("method", "n", "m"), [("enumerate", 2, 4), ("tsenor", 2, 4), ("tsenor", 4, 8)])
def test_in_torch(benchmark, scores, method, n, m):
    part = scores[:256, :256]
    benchmark.group = f"in torch {n}:{m}, 256 x 256"
    mask = benchmark.pedantic(
        transposable_nm_mask, (part, n, m), {"method": method}, rounds=3, warmup_rounds=1
    )
    note(benchmark, part, mask, transposable_nm_mask(part, n, m))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_row_wise(benchmark, scores, n, m):
    benchmark.group = f"row-wise, {SIDE} x {SIDE}"
    mask = benchmark(nm_mask, scores, n, m)
    note(benchmark, scores, mask, mask)


def test_unstructured(benchmark, scores):
    benchmark.group = f"unstructured, {SIDE} x {SIDE}"
    mask = benchmark(unstructured_mask, scores, 0.1)
    note(benchmark, scores, mask, mask)
