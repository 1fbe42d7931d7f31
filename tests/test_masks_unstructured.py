"""Unstructured masks: exact counts by score and at random, and minima per neuron."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_cases import scores_of
from sparseprop import SparsePropError
from sparseprop.masks import (
    global_unstructured_masks,
    layer_counts,
    random_mask,
    random_masks,
    unstructured_mask,
)


def test_unstructured_masks_have_the_exact_count_and_keep_the_heaviest():
    scores = scores_of((13, 7), levels=4)
    for density in (0.0, 0.1, 0.5, 1.0):
        mask = unstructured_mask(scores, density)
        assert int(mask.sum()) == round(density * 91)
        order = torch.sort(scores.flatten(), descending=True, stable=True).indices
        assert torch.equal(mask.flatten().nonzero().squeeze(1), order[: int(mask.sum())].sort().values)
    with pytest.raises(SparsePropError, match=r"density got 1\.5, wanted 0\.\.1"):
        unstructured_mask(scores, 1.5)


def test_counts_round_halves_to_even():
    assert int(unstructured_mask(torch.ones(5), 0.5).sum()) == 2
    assert int(unstructured_mask(torch.ones(3), 0.5).sum()) == 2


@pytest.mark.parametrize(
    ("numel", "sparsity", "kept"), [(15, 0.9, 2), (35, 0.9, 4), (15, 0.7, 4), (100, 0.425, 58), (10, 0.45, 6)]
)
def test_halves_are_halves_though_their_density_is_a_difference_in_binary(numel, sparsity, kept):
    assert int(unstructured_mask(torch.ones(numel), 1 - sparsity).sum()) == kept
    assert int(global_unstructured_masks({"a": torch.ones(numel)}, 1 - sparsity)["a"].sum()) == kept
    assert int(random_mask((numel, 1), 1 - sparsity).sum()) == kept
    assert layer_counts({"a": (numel,)}, {"a": 1 - sparsity}) == {"a": kept}


def test_global_masks_have_the_exact_total_and_rank_across_layers():
    scores = {"a": scores_of((7, 9)), "b": 2 * scores_of((5, 5), 1), "c": scores_of((3, 3)).double() / 9}
    masks = global_unstructured_masks(scores, 0.3)
    assert sum(int(m.sum()) for m in masks.values()) == round(0.3 * 97)
    lowest_kept = min(float(scores[k][m].min()) for k, m in masks.items() if m.any())
    assert all(float(scores[k][~m].max()) <= lowest_kept for k, m in masks.items())
    assert not masks["c"].any()
    secured = global_unstructured_masks(scores, 0.3, min_keep_per_layer=4)
    assert int(secured["c"].sum()) == 4
    assert sum(int(m.sum()) for m in secured.values()) == round(0.3 * 97)
    assert global_unstructured_masks({}, 0.5) == {}


def test_global_masks_refuse_minima_beyond_the_total():
    with pytest.raises(SparsePropError, match="needs 10 weights of 4; lower it or raise the density"):
        global_unstructured_masks({"a": torch.ones(20), "b": torch.ones(20)}, 0.1, min_keep_per_layer=5)
    with pytest.raises(SparsePropError, match=r"scores\['a'\] got NaN or inf"):
        global_unstructured_masks({"a": torch.tensor([float("nan")])}, 0.1)
    with pytest.raises(SparsePropError, match="min_keep_per_layer got -1, wanted >= 0"):
        global_unstructured_masks({"a": torch.ones(2)}, 0.1, min_keep_per_layer=-1)


def test_random_masks_are_exact_repeatable_and_keep_every_neuron_alive():
    def draw(**options):
        return random_mask((32, 16, 3, 3), 0.02, generator=torch.Generator().manual_seed(3), **options)

    assert int(draw().sum()) == round(0.02 * 32 * 16 * 9)
    assert torch.equal(draw(), draw())
    alive = draw(min_per_row=1, min_per_col=2)
    assert int(alive.sum()) == int(draw().sum())
    assert (alive.flatten(1).sum(1) >= 1).all()
    assert (alive.movedim(1, 0).flatten(1).sum(1) >= 2).all()
    with pytest.raises(
        SparsePropError, match=r"random_mask got density 0.1 of 16 \(2 kept\), wanted at least 4"
    ):
        random_mask((4, 4), 0.1, min_per_row=1)
    with pytest.raises(SparsePropError, match="min_per_row got 5, wanted at most 4"):
        random_mask((4, 4), 0.5, min_per_row=5)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_minima_that_fit_are_met_with_the_exact_count_whatever_the_draws(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    rows, cols, numel = shape[0], shape[1], math.prod(shape)
    per_row, per_col = (data.draw(st.integers(0, numel // lines)) for lines in (rows, cols))
    count = data.draw(st.integers(max(per_row * rows, per_col * cols), numel))

    def draw():
        generator = torch.Generator().manual_seed(count)
        return random_mask(
            shape, count / numel, generator=generator, min_per_row=per_row, min_per_col=per_col
        )

    mask = draw()
    assert int(mask.sum()) == count
    assert (mask.flatten(1).sum(1) >= per_row).all()
    assert (mask.transpose(0, 1).flatten(1).sum(1) >= per_col).all()
    assert torch.equal(mask, draw())


def test_a_permutation_is_drawn_where_nothing_else_fits_and_every_one_can_be():
    generator = torch.Generator().manual_seed(0)
    found = set()
    for _ in range(300):
        mask = random_mask((4, 4), 1 / 4, generator=generator, min_per_row=1, min_per_col=1)
        assert (mask.sum(0) == 1).all()
        found.add(tuple(mask.int().argmax(1).tolist()))
    assert len(found) == 24


def test_minima_that_are_met_already_change_nothing():
    plain, secured = (
        random_mask((8, 8), 0.5, generator=torch.Generator().manual_seed(0), min_per_row=least)
        for least in (0, 1)
    )
    assert torch.equal(plain, secured)


def test_random_masks_follow_given_counts():
    masks = random_masks({"a": (4, 4), "b": (3, 3)}, {"a": 0, "b": 9})
    assert (int(masks["a"].sum()), int(masks["b"].sum())) == (0, 9)
    with pytest.raises(SparsePropError, match=r"counts\['a'\] got 17, wanted 0..16; see layer_counts"):
        random_masks({"a": (4, 4)}, {"a": 17})
    with pytest.raises(SparsePropError, match=r"counts\['a'\] got None"):
        random_masks({"a": (4, 4)}, {})
