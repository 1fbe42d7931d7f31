"""Masks from scores: unstructured, N:M and transposable N:M; their checks, measures and layer densities.

A mask is a bool tensor shaped like the weight, True where it is kept. N:M keeps N of M. Groups run along the
inputs for each output and kernel position; transposable tiles lie on the (out, in) plane. Scores are
non-negative: ``weight.abs()``, ``weight**2``, or a saliency. Counts are exact and ties always break alike.
"""

from sparseprop.masks.check import check_nm, detect_nm
from sparseprop.masks.choose import choose_n, expected_loss
from sparseprop.masks.density import layer_counts, layer_densities
from sparseprop.masks.diversity import Diversity, mask_diversity, unstructured_diversity
from sparseprop.masks.from_pattern import misfit, pattern_mask
from sparseprop.masks.metrics import SadMeter, SadReading, retained_magnitude, sad
from sparseprop.masks.nm import nm_mask
from sparseprop.masks.pattern import NMPattern
from sparseprop.masks.transposable import DualCertificate, transposable_nm_mask
from sparseprop.masks.unstructured import (
    global_unstructured_masks,
    random_mask,
    random_masks,
    unstructured_mask,
)

__all__ = [
    "Diversity",
    "DualCertificate",
    "NMPattern",
    "SadMeter",
    "SadReading",
    "check_nm",
    "choose_n",
    "detect_nm",
    "expected_loss",
    "global_unstructured_masks",
    "layer_counts",
    "layer_densities",
    "mask_diversity",
    "misfit",
    "nm_mask",
    "pattern_mask",
    "random_mask",
    "random_masks",
    "retained_magnitude",
    "sad",
    "transposable_nm_mask",
    "unstructured_diversity",
    "unstructured_mask",
]
