"""Row-wise masks, N:M checks and detection."""

from typing import get_args

import pytest
import torch

from mask_cases import LAYOUTS, WEIGHTS, WRONG_PATTERNS, WRONG_SCORES, lay_out, scores_of
from sparseprop import SparsePropError, _native
from sparseprop.masks import NMPattern, check_nm, detect_nm, nm_mask, transposable_nm_mask, unstructured_mask
from sparseprop.masks.nm import _sorted_nm_mask
from sparseprop.masks.transposable import Method


def groups_by_loops(scores, m):
    """Every group as the definition has it: m consecutive inputs of one output and kernel position."""
    flat = scores.reshape(scores.shape[0], scores.shape[1], -1)
    for out in range(flat.shape[0]):
        for position in range(flat.shape[2]):
            for start in range(0, flat.shape[1], m):
                yield flat[out, start : start + m, position].tolist()


@pytest.mark.parametrize(("shape", "groups"), WEIGHTS)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 3), (2, 4), (1, 4), (4, 8), (3, 16)])
@pytest.mark.parametrize("levels", [None, 3])
def test_each_group_keeps_its_n_highest_with_ties_to_the_lowest_input(shape, groups, n, m, levels):
    scores = scores_of(shape, levels=levels)
    mask = nm_mask(scores, n, m)
    for values, chosen in zip(groups_by_loops(scores, m), groups_by_loops(mask, m), strict=True):
        order = sorted(range(len(values)), key=lambda j: (-values[j], j))
        assert [j for j, k in enumerate(chosen) if k] == sorted(order[:n])


@pytest.mark.parametrize("m", [32, 64, 5])
def test_long_and_odd_groups_keep_exactly_n(m):
    mask = nm_mask(scores_of((6, 3 * m), levels=4), m // 2, m)
    assert check_nm(mask, m // 2, m, exact_count=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_strides_and_dtype_do_not_matter(layout, dtype):
    scores = scores_of((12, 9, 3, 2)).to(dtype)
    if layout == "expanded":
        scores = scores[:1].expand(12, -1, -1, -1)
    mask = nm_mask(lay_out(scores, layout) if layout != "expanded" else scores, 2, 4)
    assert torch.equal(mask, nm_mask(scores.double().contiguous(), 2, 4))


def test_the_mask_takes_the_memory_format_of_the_scores():
    scores = scores_of((8, 8, 3, 3)).to(memory_format=torch.channels_last)
    assert nm_mask(scores, 2, 4).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("tail", ["pad", "dense"])
@pytest.mark.parametrize("shape", [(5, 16), (5, 11, 3), (4, 2)])
def test_the_torch_path_for_other_devices_agrees(shape, tail):
    scores = scores_of(shape, levels=3)
    assert torch.equal(_sorted_nm_mask(scores, 2, 4, tail), nm_mask(scores, 2, 4, tail=tail))


def test_tail_policies():
    scores = scores_of((3, 11))
    padded, dense = nm_mask(scores, 2, 8, tail="pad"), nm_mask(scores, 2, 8, tail="dense")
    assert (padded[:, 8:].sum(1) == 2).all()
    assert dense[:, 8:].all()
    assert torch.equal(padded[:, :8], dense[:, :8])
    assert check_nm(padded, 2, 8)
    assert not check_nm(dense, 2, 8)
    assert check_nm(dense, 2, 8, tail="dense")
    assert not check_nm(padded, 2, 8, tail="error")
    with pytest.raises(
        SparsePropError, match="got 11 inputs, wanted a multiple of m=8; use tail='pad' or 'dense'"
    ):
        nm_mask(scores, 2, 8, tail="error")
    with pytest.raises(SparsePropError, match="tail got 'crop', wanted one of pad, dense, error"):
        nm_mask(scores, 2, 8, tail="crop")


@pytest.mark.parametrize("seed", range(3))
def test_nm_masks_are_idempotent_and_scale_and_permutation_invariant(seed):
    scores = scores_of((8, 16), seed) + 0.1
    mask = nm_mask(scores, 2, 8)
    assert torch.equal(nm_mask(scores * mask, 2, 8), mask)
    assert torch.equal(nm_mask(scores * 8, 2, 8), mask)
    order = torch.cat([8 * g + torch.randperm(8) for g in range(2)])
    assert torch.equal(nm_mask(scores[:, order], 2, 8), mask[:, order])


def test_zero_scores_keep_exactly_n_and_minus_zero_is_zero():
    zeros = torch.zeros(4, 8)
    assert torch.equal(nm_mask(zeros, 3, 8), nm_mask(-zeros, 3, 8))
    assert (nm_mask(zeros, 3, 8).sum(1) == 3).all()


def test_the_number_of_threads_does_not_matter():
    scores = scores_of((256, 128), levels=5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = nm_mask(scores, 4, 8)
        torch.set_num_threads(2)
        assert torch.equal(nm_mask(scores, 4, 8), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("scores", "message"), WRONG_SCORES)
def test_wrong_scores_are_refused(scores, message):
    with pytest.raises(SparsePropError, match=message):
        nm_mask(scores, 2, 4)


@pytest.mark.parametrize(("n", "m", "message"), WRONG_PATTERNS)
def test_wrong_patterns_are_refused(n, m, message):
    with pytest.raises(SparsePropError, match=message):
        nm_mask(torch.ones(4, 8), n, m)


def test_empty_weights_give_empty_masks():
    assert nm_mask(torch.ones(0, 8), 2, 4).shape == (0, 8)
    for method in get_args(Method):
        assert transposable_nm_mask(torch.ones(4, 4, 0), 2, 4, method=method).shape == (4, 4, 0)


def test_patterns_parse_print_and_know_what_they_fit():
    assert NMPattern.parse(" 2:4 ") == NMPattern(2, 4)
    assert NMPattern.parse("4:8-T") == NMPattern.parse("4:8T") == NMPattern(4, 8, transposable=True)
    assert NMPattern.parse(NMPattern(1, 4)) is not None
    assert NMPattern(2, 4).fits((2, 8, 3, 3))
    assert not NMPattern(2, 4, transposable=True).fits((8, 8, 3, 3), groups=4)
    for text in ("2-4", "4", "", None):
        with pytest.raises(SparsePropError, match="wanted 'N:M' such as '2:4'"):
            NMPattern.parse(text)


def test_check_nm_sees_each_direction():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :2] = True
    assert check_nm(mask, 2, 8)
    assert not check_nm(mask, 2, 8, transposable=True)
    assert check_nm(mask.T, 8, 8, transposable=True)
    assert not check_nm(mask.T, 2, 8)
    assert not check_nm(torch.ones(4, 5, dtype=torch.bool), 3, 4)


def test_check_nm_keeps_conv_groups_apart():
    mask = torch.zeros(8, 4, 1, 1, dtype=torch.bool)
    mask[2:6, 0] = True  # two in each half, four in the middle
    assert check_nm(mask, 2, 4, transposable=True, groups=2)
    mask[:, 0] = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0]).bool().view(8, 1, 1)
    assert check_nm(mask, 2, 3, transposable=True, groups=2)
    assert check_nm(mask, 2, 4, transposable=True)


def test_check_nm_refuses_what_is_no_mask():
    with pytest.raises(
        SparsePropError, match=r"mask got torch\.float32, wanted a bool tensor; of a weight, pass"
    ):
        check_nm(torch.ones(4, 4), 2, 4)
    with pytest.raises(SparsePropError, match="groups got 3 for 4 outputs, wanted a divisor"):
        check_nm(torch.ones(4, 4, dtype=torch.bool), 2, 4, groups=3)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (2, 8), (1, 8), (5, 16), (7, 32)])
@pytest.mark.parametrize("shape", [(16, 64), (8, 64, 3, 3), (6, 70)])
def test_detect_nm_finds_the_pattern_that_made_the_mask(n, m, shape):
    assert detect_nm(nm_mask(scores_of(shape), n, m)) == NMPattern(n, m)


def test_detect_nm_finds_none_where_storing_as_nm_would_waste():
    assert detect_nm(unstructured_mask(scores_of((64, 64)), 0.1)) is None
    assert detect_nm(torch.ones(8, 8, dtype=torch.bool)) is None
    assert detect_nm(torch.zeros(8, 8, dtype=torch.bool)) is None
    assert detect_nm(torch.ones(8, 2, dtype=torch.bool)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 2}, r"float32 \(0\) or float64 \(1\)"),
        ({"m": 65}, "m must be from 1 to 64, got 65"),
        ({"n": 0}, "n must be from 1 to m = 4, got 0"),
        ({"shape": (1, -4, 4, 1)}, "negative size"),
        ({"scores": 0}, "must have an address"),
        ({"method": "magic"}, "method must be exact, greedy or greedy_fill, got magic"),
        ({"row_dual": 64}, "give both duals or neither"),
        ({"row_dual": 64, "col_dual": 64, "at_most": True}, "duals exist for the exact method"),
        ({"row_dual": 64, "col_dual": 64, "shape": (1, 5, 4, 1)}, "duals exist for the exact method"),
    ],
)
def test_the_native_border_refuses_what_it_could_not_survive(changes, message):
    call = {
        "method": "exact",
        "at_most": False,
        "dtype": 0,
        "shape": (1, 4, 4, 1),
        "n": 2,
        "m": 4,
        "dense_tail": False,
        "scores": 64,
        "scores_strides": (0, 4, 1, 1),
        "mask": 64,
        "mask_strides": (0, 4, 1, 1),
        "row_dual": 0,
        "col_dual": 0,
    }
    with pytest.raises(ValueError, match=message):
        _native.transposable_nm_mask(**(call | changes))
    with pytest.raises(ValueError, match="from 1 to"):
        _native.nm_mask(0, (1, 4, 4, 1), 5, 4, False, 64, (0, 4, 1, 1), 64, (0, 4, 1, 1))
