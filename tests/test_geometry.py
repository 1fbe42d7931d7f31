import pytest
import torch
from torch import nn

from cases import CONVS, WRONG_CONVS
from sparseprop import SparsePropError
from sparseprop.geometry import Geometry

TORCH = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.mark.parametrize("name", CONVS)
def test_sizes_are_those_of_torch(name):
    dims, in_channels, out_channels, kernel, size, options = CONVS[name]
    geometry = Geometry.conv(dims, in_channels, out_channels, kernel, **options)
    dense = TORCH[dims](in_channels, out_channels, kernel, **options)
    out = dense(torch.zeros(1, in_channels, *size))
    assert geometry.output_size(size) == out.shape[2:]
    assert geometry.weight_shape == dense.weight.shape
    assert geometry.cols == dense.weight[0].numel()
    assert geometry.functional_padding() == list(dense._reversed_padding_repeated_twice)


@pytest.mark.parametrize("name", CONVS)
def test_numbers_round_trip(name):
    dims, in_channels, out_channels, kernel, _, options = CONVS[name]
    geometry = Geometry.conv(dims, in_channels, out_channels, kernel, **options | {"padding_mode": "zeros"})
    assert Geometry.from_ints(geometry.to_ints()) == geometry


def test_linear_is_a_convolution_without_dimensions():
    geometry = Geometry.linear(5, 4)
    assert (geometry.dims, geometry.weight_shape, geometry.output_size(())) == (0, (4, 5), ())
    assert Geometry.from_ints(geometry.to_ints()) == geometry


@pytest.mark.parametrize("name", WRONG_CONVS)
def test_wrong_options_are_refused(name):
    arguments, options, message = WRONG_CONVS[name]
    with pytest.raises(SparsePropError) as error:
        Geometry.conv(*arguments, **options)
    assert message in str(error.value)


def test_an_input_smaller_than_the_kernel_is_refused_where_torch_refuses_it():
    geometry = Geometry.conv(2, 3, 4, 3, dilation=2, padding=(1, 0))
    assert geometry.output_size((3, 5)) == (1, 1)
    with pytest.raises(SparsePropError, match=r"padded size 4 of \(2, 5\), kernel 3 with dilation 2 spans 5"):
        geometry.output_size((2, 5))
