"""Counts of masks, what masks keep, how they change, and which N suits a layer."""

import math

import pytest
import torch

from mask_cases import all_masks
from sparseprop import SparsePropError
from sparseprop.masks import (
    SadMeter,
    choose_n,
    expected_loss,
    mask_diversity,
    nm_mask,
    retained_magnitude,
    sad,
    transposable_nm_mask,
    unstructured_diversity,
    unstructured_mask,
)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("2:4", 6),
        ("4:8", 70),
        ("1:2T", 2),
        ("1:4T", 24),
        ("2:4T", 90),
        ("4:4T", 1),
        ("2:8T", 187530840),
        ("6:8T", 187530840),
        ("4:8T", 116963796250),
        ("1:32T", math.factorial(32)),
    ],
)
def test_diversity_counts_masks(pattern, count):
    assert mask_diversity(pattern).count == count


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)])
def test_diversity_equals_enumeration(n, m):
    assert mask_diversity(f"{n}:{m}T").count == len(all_masks(n, m))


@pytest.mark.parametrize("m", [5, 6, 7])
def test_keeping_and_pruning_n_admit_as_many_masks(m):
    for n in range(1, m):
        assert mask_diversity(f"{n}:{m}T").count == mask_diversity(f"{m - n}:{m}T").count


@pytest.mark.parametrize(
    ("pattern", "formula", "total"),
    [
        ("4:8", "exact", 5.76e14),
        ("2:4", "exact", 2.82e12),
        ("4:8T", "hubara", 1.76e13),
        ("4:8T", "exact", 1.17e11),
        ("2:4T", "exact", 6.56e7),
        ("2:4T", "hubara", 4.3e8),
    ],
)
def test_diversity_of_64_weights_reproduces_the_published_and_the_corrected_figures(pattern, formula, total):
    assert 2 ** mask_diversity(pattern, 64, formula=formula).log2_count == pytest.approx(total, rel=5e-3)


def test_bits_per_weight():
    known = {"2:4": 0.646, "4:8": 0.766, "8:16": 0.853, "2:4T": 0.406, "4:8T": 0.575}
    for pattern, bits in known.items():
        assert mask_diversity(pattern, 4096).bits_per_weight == pytest.approx(bits, abs=6e-4)
    assert mask_diversity("2:4", transposable=True).count == 90
    assert 2 ** unstructured_diversity(64, 0.5).log2_count == pytest.approx(1.83e18, rel=5e-3)


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("2:4", {"numel": 6}, "numel got 6, wanted a positive multiple of 4 for 2:4"),
        ("2:4T", {"numel": 8}, "numel got 8, wanted a positive multiple of 16"),
        ("16:32T", {}, r"tile of 16:32 .* for an exact count; use formula='hubara'"),
        ("2:4T", {"formula": "guess"}, "formula got 'guess', wanted one of exact, hubara"),
    ],
)
def test_wrong_diversity_requests_are_refused(pattern, options, message):
    with pytest.raises(SparsePropError, match=message):
        mask_diversity(pattern, **options)


def test_retained_magnitude_of_gaussian_weights_is_as_measured():
    scores = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).abs()
    known = {(2, 4): (0.745, 0.7045), (4, 8): (0.768, 0.743), (8, 16): (None, 0.769)}
    for (n, m), (rows, tiles) in known.items():
        if rows:
            assert retained_magnitude(scores, nm_mask(scores, n, m)) == pytest.approx(rows, abs=4e-3)
        assert retained_magnitude(scores, transposable_nm_mask(scores, n, m)) == pytest.approx(
            tiles, abs=4e-3
        )
    assert retained_magnitude(scores, unstructured_mask(scores, 0.5)) == pytest.approx(0.797, abs=4e-3)


def test_retained_magnitude_at_the_edges():
    nothing = torch.zeros(4, dtype=torch.bool)
    assert retained_magnitude(torch.zeros(4), nothing) == 1.0
    assert retained_magnitude(torch.ones(4), nothing) == 0.0
    assert retained_magnitude(torch.ones(0), nothing[:0]) == 1.0
    for size in (1e308, 5e-324):  # their sum is out of range, or their square
        scores = torch.full((4,), size, dtype=torch.float64)
        assert retained_magnitude(scores, torch.tensor([True, False, False, False])) == 0.25
    with pytest.raises(SparsePropError, match=r"mask got shape \(4,\), wanted that of scores, \(5,\)"):
        retained_magnitude(torch.ones(5), nothing)
    with pytest.raises(SparsePropError, match=r"mask got torch\.float32, wanted a bool"):
        retained_magnitude(torch.ones(5), torch.ones(5))


def test_sad_is_a_metric_and_even_at_fixed_count():
    a, b, c = (unstructured_mask(torch.rand(20, 20), 0.3) for _ in range(3))
    assert sad(a, a) == 0
    assert sad(a, b) == sad(b, a) > 0
    assert sad(a, c) <= sad(a, b) + sad(b, c)
    assert sad(a, b) % 2 == 0
    assert sad(a, b) == 2 * int((b & ~a).sum())
    assert sad(a, b, normalize=True) == sad(a, b) / 400
    assert sad({"x": a, "y": b}, {"x": b, "y": b}) == sad(a, b)


def test_sad_refuses_what_cannot_be_compared():
    a = torch.ones(4, dtype=torch.bool)
    with pytest.raises(SparsePropError, match=r"mask_a got shape \(4,\), wanted that of mask_b, \(2,\)"):
        sad(a, a[:2])
    with pytest.raises(SparsePropError, match=r"mask_b got torch\.float32, wanted a bool"):
        sad(a, a.float())
    with pytest.raises(SparsePropError, match=r"got layers \['x'\] and \['y'\], wanted the same layers"):
        sad({"x": a}, {"y": a})


def test_the_meter_reads_every_kth_update_against_the_last_and_the_first():
    masks = [
        {"fc": unstructured_mask(torch.rand(13, 5), 0.4), "conv": torch.rand(3, 3) > 0.5} for _ in range(7)
    ]
    meter = SadMeter(every=3)
    readings = [meter.update(m) for m in masks]
    assert [r is not None for r in readings] == [False, False, False, True, False, False, True]
    assert readings[6].per_layer == {name: sad(masks[3][name], masks[6][name]) for name in masks[0]}
    assert readings[6].total == sad(masks[3], masks[6])
    assert readings[6].flip_rate == sad(masks[3], masks[6], normalize=True)
    assert readings[6].from_start == sad(masks[0], masks[6])
    assert meter.cumulative == readings[3].total + readings[6].total


def test_the_meter_refuses_other_layers():
    meter = SadMeter()
    meter.update(torch.ones(4, dtype=torch.bool))
    with pytest.raises(SparsePropError, match="start a new meter when layers change"):
        meter.update(torch.ones(5, dtype=torch.bool))
    with pytest.raises(SparsePropError, match=r"masks\['a'\] got torch.int64, wanted a bool"):
        meter.update({"a": torch.ones(4, dtype=torch.int64)})
    with pytest.raises(SparsePropError, match="every=0, wanted at least 1"):
        SadMeter(every=0)


@pytest.mark.parametrize(
    ("n", "m", "losses"),
    [
        (2, 4, [0.188, 0.128, 0.077, 0.036, 0.010, 0.002]),
        (4, 8, [0.137, 0.073, 0.029, 0.007, 0.001, 0]),
        (8, 16, [0.098, 0.035, 0.007, 0.001, 0, 0]),
        (2, 8, [0.510, 0.414, 0.297, 0.169, 0.055, 0.015]),
        (1, 4, [0.531, 0.456, 0.367, 0.262, 0.140, 0.073]),
    ],
)
def test_expected_loss_equals_the_table(n, m, losses):
    for sparsity, loss in zip((0.5, 0.6, 0.7, 0.8, 0.9, 0.95), losses, strict=True):
        assert expected_loss(sparsity, n, m) == pytest.approx(loss, abs=6e-4)


def test_choose_n_follows_its_rules():
    # P[at most 2 of 4 non-zero]: .688 .916 .973 .996 at sparsity .5 .7 .8 .9
    assert choose_n(0.8, 4) == 2
    assert choose_n(0.7, 4) == 3
    assert choose_n(0.7, 4, confidence=0.9) == 2
    assert choose_n(0.0, 4) == 4
    assert choose_n(1.0, 8) == 1
    assert choose_n(0.8, 8, max_loss=0.01) == 4
    assert choose_n(0.8, 8, max_loss=0.0) == 8
    with pytest.raises(SparsePropError, match="got both confidence and max_loss"):
        choose_n(0.5, 4, confidence=0.5, max_loss=0.5)
    with pytest.raises(SparsePropError, match=r"sparsity got 90, wanted 0\.\.1"):
        choose_n(90, 4)
