"""Values and weight gradients between the order of rows and that of columns, in all ways it is done."""

import pytest
import torch

from checks import assert_right
from sparseprop.nn import SparseLinear


# in 16 x 16 tiles, that blocks of 24 to 192 outputs are cut into
@pytest.mark.parametrize("sizes", [(1, 1), (16, 16), (15, 33), (130, 49), (33, 250)])
@pytest.mark.parametrize("density", [0.4, 0.75, 1.0])
@pytest.mark.parametrize("batch", [40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_patterns_of_every_size_are_right(backend, sizes, density, batch, dtype):
    layer = SparseLinear.random(*sizes, density=density, dtype=dtype)
    assert_right(layer, *(torch.randn(batch, size, dtype=dtype) for size in sizes))


@pytest.mark.parametrize("kept", [256, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_whose_values_lie_2_to_the_n_bytes_apart_are_right(backend, kept, dtype):
    mask = torch.rand(64, 1024).argsort().argsort() < kept  # equally many a row: 256 begin in four sets of L1
    layer = SparseLinear.from_mask(mask, dtype=dtype)
    assert_right(layer, torch.randn(33, 1024, dtype=dtype), torch.randn(33, 64, dtype=dtype))
