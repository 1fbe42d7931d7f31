"""Native max pooling: torch's values, gradients and refusals, with and without vectors to spare."""

import copy

import pytest
import torch
from torch import nn

from checks import LAYOUTS, running
from sparseprop import fuse, unfuse
from sparseprop.backend import available_isas
from sparseprop.nn.pool import MaxPool2d

# options, and the sizes of an input
CASES = [
    ((2,), {}, (2, 3, 8, 8)),
    ((3, 2, 1), {}, (2, 3, 35, 37)),
    ((3, 2, 1), {}, (1, 1, 1, 1)),
    ((3, 2), {}, (2, 2, 112, 70)),
    ((5, 1, 2), {}, (1, 2, 6, 19)),
    (((2, 3), (1, 3), (1, 0)), {}, (2, 1, 5, 33)),
    ((1,), {}, (1, 2, 4, 5)),
    ((4, 4, 2), {}, (1, 2, 3, 3)),
    ((3, 2, 1), {"dilation": 2}, (1, 2, 9, 9)),
    ((3, 2, 1), {"ceil_mode": True}, (1, 2, 8, 8)),
    ((2,), {"return_indices": True}, (1, 2, 8, 8)),
]


def pair(arguments, options):
    return MaxPool2d(*arguments, **options), nn.MaxPool2d(*arguments, **options)


def run(pool, x):
    x = x.detach().requires_grad_()
    out = pool(x)
    out = out[0] if isinstance(out, tuple) else out
    torch.autograd.backward(out, torch.arange(out.numel(), dtype=out.dtype).view_as(out))
    return out, x.grad


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("arguments", "options", "shape"), CASES)
def test_values_and_gradients_are_torchs(isa, dtype, arguments, options, shape):
    x = torch.randint(-9, 9, shape).to(dtype)  # with ties: the first of the equal ones gets the gradient
    ours, torchs = pair(arguments, options)
    with running(isa):
        found = run(ours, x)
        with torch.no_grad():
            alone = ours(x)
    assert all(map(torch.equal, found, run(torchs, x)))
    assert torch.equal(alone[0] if isinstance(alone, tuple) else alone, found[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same(layout):
    x = LAYOUTS[layout](torch.randn(2, 3, 9, 11))
    ours, torchs = pair((3, 2, 1), {})
    assert all(map(torch.equal, run(ours, x), run(torchs, x)))


def test_nan_and_infinity_win_and_lose_as_in_torch():
    x = torch.randn(1, 2, 12, 40)
    x[0, 0, ::3, ::5] = torch.nan
    x[0, 1] = -torch.inf
    ours, torchs = pair((3, 2, 1), {})
    for one, other in zip(run(ours, x), run(torchs, x), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=0, atol=0)


def test_second_derivatives():
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(MaxPool2d(3, 2, 1), x)


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 2, 8, 8)])
def test_unbatched_and_empty_inputs(shape):
    ours, torchs = pair((2,), {})
    assert torch.equal(ours(torch.ones(shape)), torchs(torch.ones(shape)))


@pytest.mark.parametrize(
    ("arguments", "shape"), [((3,), (1, 1, 2, 2)), ((2, 1, 2), (1, 1, 4, 4)), ((2,), (8,)), ((2, 1), (2, 2))]
)
def test_what_torch_refuses_is_refused_with_its_words(arguments, shape):
    ours, torchs = pair(arguments, {})
    with pytest.raises(RuntimeError) as wanted:
        torchs(torch.ones(shape))
    with pytest.raises(RuntimeError) as found:
        ours(torch.ones(shape))
    assert str(found.value) == str(wanted.value)


def test_fuse_makes_pooling_native_and_unfuse_undoes_it():
    model = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.MaxPool1d(2))
    assert [type(m) for m in fuse(model)] == [MaxPool2d, nn.MaxPool1d]
    assert isinstance(model[0], nn.MaxPool2d)
    x = torch.randn(1, 2, 8, 8)
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model[0](x))
    assert [type(m) for m in unfuse(copy.deepcopy(model))] == [nn.MaxPool2d, nn.MaxPool1d]
