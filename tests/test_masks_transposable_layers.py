"""Transposable masks of whole layers: kinds, strides, ragged edges, and what is refused."""

import pytest
import torch

from mask_cases import LAYOUTS, WEIGHTS, WRONG_PATTERNS, WRONG_SCORES, kept, lay_out, tiles
from sparseprop import SparsePropError
from sparseprop.masks import check_nm, nm_mask, transposable_nm_mask
from sparseprop.masks._layout import regions, to_tiles


@pytest.mark.parametrize(("shape", "groups"), WEIGHTS)
@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("method", ["exact", "greedy", "greedy_fill", "tsenor"])
def test_the_mask_and_its_transpose_are_nm_for_every_layer_kind(shape, groups, m, method):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.01
    mask = transposable_nm_mask(scores, m // 2, m, groups=groups, method=method)
    assert check_nm(mask, m // 2, m, transposable=True, groups=groups, exact_count=method != "greedy")
    for part in mask.chunk(groups):
        assert check_nm(part, m // 2, m)
        assert check_nm(part.transpose(0, 1), m // 2, m)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), [((16, 12), 1), ((16, 9, 3, 2), 2)])
def test_strides_and_dtype_do_not_matter(layout, dtype, shape, groups):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    if layout == "expanded":
        scores = scores[:1].expand(shape)
    moved = scores if layout == "expanded" else lay_out(scores, layout)
    for method in ("exact", "greedy_fill", "enumerate"):
        mask = transposable_nm_mask(moved, 2, 4, groups=groups, method=method)
        plain = transposable_nm_mask(scores.double().contiguous(), 2, 4, groups=groups, method=method)
        assert torch.equal(mask, plain)


@pytest.mark.parametrize("exact_count", [True, False])
@pytest.mark.parametrize("family", ["gaussian", "tied", "sparse"])
def test_incomplete_tiles_keep_the_most_that_at_most_n_allows(family, exact_count):
    scores = tiles(family, 1, 11, seed=8)[0, :, :10]
    mask = transposable_nm_mask(scores, 3, 4, exact_count=exact_count)
    oracle = transposable_nm_mask(scores, 3, 4, exact_count=exact_count, method="linprog")
    for region in regions(scores[None, :, :, None], 4):
        a, b, s = (to_tiles(region.of(x[None, :, :, None]), region.tile) for x in (mask, oracle, scores))
        torch.testing.assert_close(kept(s, a), kept(s, b), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"exact_count": False}, {"method": "greedy"}])
@pytest.mark.parametrize("family", ["gaussian", "sparse", "zero"])
def test_no_further_entry_fits_into_incomplete_tiles(family, options):
    scores = tiles(family, 1, 11, seed=9)[0, :, :10]
    planes = transposable_nm_mask(scores, 3, 4, **options)[None, :, :, None]
    for region in regions(planes, 4):
        tile = to_tiles(region.of(planes), region.tile)
        open_rows, open_cols = tile.sum(2) < 3, tile.sum(1) < 3
        assert not (open_rows.unsqueeze(2) & open_cols.unsqueeze(1) & ~tile).any()


def test_tail_policies():
    scores = torch.rand(10, 9, generator=torch.Generator().manual_seed(3))
    for method in ("exact", "greedy", "tsenor", "linprog"):
        dense = transposable_nm_mask(scores, 2, 4, tail="dense", method=method)
        assert dense[8:].all()
        assert dense[:, 8:].all()
        assert check_nm(dense, 2, 4, transposable=True, tail="dense")
        padded = transposable_nm_mask(scores, 2, 4, method=method)
        assert torch.equal(dense[:8, :8], padded[:8, :8])
    with pytest.raises(
        SparsePropError, match="got 10 outputs and 9 inputs per group, wanted multiples of m=4"
    ):
        transposable_nm_mask(scores, 2, 4, tail="error")
    assert transposable_nm_mask(scores[:8, :8], 2, 4, tail="error").sum() == 32


@pytest.mark.parametrize(("scores", "message"), WRONG_SCORES)
def test_wrong_scores_are_refused(scores, message):
    with pytest.raises(SparsePropError, match=message):
        transposable_nm_mask(scores, 2, 4)


@pytest.mark.parametrize(("n", "m", "message"), WRONG_PATTERNS)
def test_wrong_patterns_are_refused(n, m, message):
    with pytest.raises(SparsePropError, match=message):
        transposable_nm_mask(torch.ones(8, 8), n, m)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            (3, 8),
            {},
            r"3 outputs and 8 inputs per group \(groups=1\), wanted at least m=4 of both; leave this layer",
        ),
        ((8, 1, 3, 3), {"groups": 8}, r"1 outputs and 1 inputs per group \(groups=8\), wanted at least m=4"),
        ((8, 8), {"groups": 3}, "groups got 3 for 8 outputs, wanted a divisor"),
        ((8, 8), {"method": "magic"}, "method got 'magic', wanted one of exact, greedy, greedy_fill"),
        ((8, 8), {"tail": "crop"}, "tail got 'crop', wanted one of pad, dense, error"),
        (
            (8, 8),
            {"method": "greedy", "exact_count": False},
            "exact_count=False got method 'greedy', wanted 'exact'",
        ),
        ((8, 8), {"method": "greedy", "return_duals": True}, "return_duals got method='greedy', .*wanted"),
        (
            (8, 8),
            {"exact_count": False, "return_duals": True},
            "return_duals got .*exact_count=False.*wanted",
        ),
        ((9, 8), {"return_duals": True}, "planes of 9 x 8, wanted .* multiples of m=4; crop the scores"),
    ],
)
def test_options_that_do_not_go_together_are_refused(shape, options, message):
    with pytest.raises(SparsePropError, match=message):
        transposable_nm_mask(torch.ones(shape), 2, 4, **options)


def test_enumeration_is_for_tiny_tiles():
    with pytest.raises(
        SparsePropError, match="method 'enumerate' got m=8, wanted m <= 4; use method='exact'"
    ):
        transposable_nm_mask(torch.ones(8, 8), 2, 8, method="enumerate")


@pytest.mark.parametrize("method", ["exact", "greedy", "enumerate", "tsenor"])
def test_scores_with_a_pending_sign_are_read_as_they_are(method):
    scores = torch.complex(torch.zeros(4, 8), -torch.rand(4, 8)).conj().imag
    assert scores.is_neg()
    assert (scores >= 0).all()
    assert torch.equal(nm_mask(scores, 2, 4), nm_mask(scores.resolve_neg(), 2, 4))
    found, wanted = (transposable_nm_mask(s, 2, 4, method=method) for s in (scores, scores.resolve_neg()))
    assert torch.equal(found, wanted)


def test_enumeration_of_huge_scores_is_exact():
    scores = torch.rand(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.7e308
    found, wanted = (transposable_nm_mask(scores, 2, 4, method=method) for method in ("enumerate", "exact"))
    assert torch.equal(found, wanted)


def test_masks_without_rows_and_scores_without_values():
    assert check_nm(torch.zeros(0, 8, dtype=torch.bool), 2, 4)
    with pytest.raises(SparsePropError, match="meta device, wanted one with values"):
        nm_mask(torch.ones(4, 8, device="meta"), 2, 4)
