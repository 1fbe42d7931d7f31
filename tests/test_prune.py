"""Masks by magnitude in a training job: counts at halves, and ranks in half precision."""

import pytest
import torch

from sparseprop.train.prune import magnitude_masks


@pytest.mark.parametrize(("numel", "sparsity", "kept"), [(15, 0.9, 2), (35, 0.9, 4), (15, 0.7, 4)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_at_halves_round_to_even(numel, sparsity, kept, scope):
    assert int(magnitude_masks({"a": torch.rand(numel)}, sparsity, scope=scope)["a"].sum()) == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_that_go_on_from_others_rank_kept_weights_as_they_are(dtype):
    weight = torch.linspace(1, 2, 4097, dtype=torch.float64)[:-1].to(dtype).unique() * 2.0**-7
    ranks = torch.arange(len(weight))
    before = torch.ones(len(weight), dtype=torch.bool)
    for sparsity in (0.5, 0.995, 0.9975):
        kept = magnitude_masks({"a": weight}, sparsity, scope="layer", masks={"a": before})["a"]
        assert torch.equal(kept, ranks >= len(weight) - int(kept.sum()))
