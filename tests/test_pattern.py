import resource
import sys

import pytest
import torch

from cases import SIZES, WRONG_PATTERNS
from sparseprop import SparsePropError, SparsityPattern


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_mask_round_trip_keeps_the_order_of_boolean_indexing(size, density):
    mask = torch.rand(size, 17) < density
    pattern = SparsityPattern.from_mask(mask)
    pattern.validate()
    assert torch.equal(pattern.to_mask(), mask)
    dense = torch.randn(size, 17)
    assert torch.equal(dense.flatten()[pattern.flat_index()], dense[mask])


def test_mask_of_a_convolution_is_flattened_per_row():
    mask = torch.rand(3, 2, 3, 3) < 0.5
    assert SparsityPattern.from_mask(mask) == SparsityPattern.from_mask(mask.reshape(3, -1))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_shapes_have_empty_patterns(shape):
    pattern = SparsityPattern.from_mask(torch.zeros(shape, dtype=torch.bool))
    pattern.validate()
    assert (pattern.rows, pattern.cols, pattern.nnz) == (*shape, 0)
    assert pattern.to_mask().shape == shape


def test_transposed_masks_are_read_in_logical_order():
    mask = torch.rand(6, 9) < 0.5
    assert SparsityPattern.from_mask(mask.t().contiguous().t()) == SparsityPattern.from_mask(mask)


def test_coo_in_any_order_and_csr_of_any_integer_dtype_agree():
    pattern = SparsityPattern.random(7, 11, density=0.4)
    shuffled = torch.randperm(pattern.nnz)
    rows = torch.repeat_interleave(torch.arange(7), pattern.row_ptr.diff())
    coo = SparsityPattern.from_coo(rows[shuffled], pattern.col_idx.long()[shuffled], (7, 11))
    csr = SparsityPattern.from_csr(pattern.row_ptr.int(), pattern.col_idx.long(), 11)
    assert coo == pattern == csr
    assert csr != SparsityPattern.from_csr(pattern.row_ptr, pattern.col_idx, 12)


def test_index_buffers_own_their_storage():
    mask = torch.rand(6, 9) < 0.5
    for pattern in (SparsityPattern.from_mask(mask), SparsityPattern.random(5, 6, nnz=7)):
        for index in (pattern.row_ptr, pattern.col_idx):
            assert index.storage_offset() == 0
            assert index.untyped_storage().nbytes() == index.numel() * index.itemsize


@pytest.mark.parametrize(("rows", "density", "nnz"), [(5, 0.5, 2), (7, 0.5, 4), (6, 0.25, 2), (10, 0.25, 2)])
def test_random_rounds_half_to_even(rows, density, nnz):
    assert SparsityPattern.random(rows, 1, density=density).nnz == nnz


@pytest.mark.parametrize("nnz", [0, 1, 50, 51, 99, 100])
def test_random_is_exact_valid_and_repeatable(nnz):
    first, second = (
        SparsityPattern.random(10, 10, nnz=nnz, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    first.validate()
    assert first.nnz == nnz
    assert first == second


def test_random_is_uniform():
    counts = sum(SparsityPattern.random(4, 5, density=0.3).to_mask().double() for _ in range(2000)) / 2000
    assert (counts - 0.3).abs().max() < 0.05


def test_random_of_a_hundred_billion_entries_needs_memory_for_its_non_zeros_only():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pattern = SparsityPattern.random(100_000, 1_000_000, density=1e-5)
    pattern.validate()
    assert pattern.nnz == 1_000_000
    assert pattern.flat_index().max() > 2**31
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 2**10, f"{grown} KiB"  # 1/10 of the non-zeros that must fit a GiB
    assert sys.getsizeof(pattern) < 1000


@pytest.mark.parametrize("name", WRONG_PATTERNS)
def test_wrong_indices_are_refused_by_what_is_wrong(name):
    row_ptr, col_idx, message = WRONG_PATTERNS[name]
    with pytest.raises(SparsePropError) as error:
        SparsityPattern(2, 4, row_ptr, col_idx).validate()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SparsityPattern.from_mask(torch.rand(3, 3)),
            "mask must be a bool tensor, got torch.float32",
        ),
        (lambda: SparsityPattern.from_mask(torch.tensor(True)), "at least one dimension"),
        (lambda: SparsityPattern.random(3, 3), "exactly one of density and nnz"),
        (lambda: SparsityPattern.random(3, 3, density=1.5), "density must lie between 0 and 1, got 1.5"),
        (
            lambda: SparsityPattern.random(3, 3, density=float("nan")),
            "density must lie between 0 and 1, got nan",
        ),
        (lambda: SparsityPattern.random(3, 3, nnz=10), "between 0 and rows * cols = 9, got 10"),
        (lambda: SparsityPattern.random(1, 2**31, nnz=1), "a row may have at most 2147483647 columns"),
        (
            lambda: SparsityPattern.from_coo(torch.tensor([0, 0]), torch.tensor([1, 1]), (2, 2)),
            "coordinates must be unique",
        ),
        (
            lambda: SparsityPattern.from_coo(torch.tensor([2]), torch.tensor([1]), (2, 2)),
            "row_idx is out of range",
        ),
        (
            lambda: SparsityPattern.from_coo(torch.tensor([0.5]), torch.tensor([1]), (2, 2)),
            "row_idx must be a 1-D",
        ),
        (
            lambda: SparsityPattern.from_coo(torch.tensor([0]), torch.tensor([1, 0]), (2, 2)),
            "equally long, got 1 and 2",
        ),
        (
            lambda: SparsityPattern.from_csr(torch.tensor([], dtype=torch.int64), torch.tensor([0]), 3),
            "row_ptr must hold one entry more than there are rows",
        ),
        (
            lambda: SparsityPattern.from_csr(torch.tensor([0, 1]), torch.tensor([2**33]), 2**30),
            "col_idx is out of range",
        ),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(SparsePropError) as error:
        make()
    assert message in str(error.value)
