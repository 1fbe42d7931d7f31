"""Batch norm, ReLU and max pooling as one step: results, gradients, what is kept, where it is recognised."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from checks import LAYOUTS, running
from sparseprop import _native, fuse, plan_fusion, unfuse
from sparseprop.backend import available_isas
from sparseprop.ops.norm import batch_norm
from sparseprop.ops.stage import NormSpec
from sparseprop.ops.windows import WindowSpec

POOLS = [WindowSpec((3, 3), (2, 2), (1, 1)), WindowSpec((2, 2), (2, 2)), WindowSpec((3, 2), (1, 3), (0, 1))]
SHAPES = [(2, 3, 4, 4), (3, 17, 9, 7), (2, 5, 35, 37), (1, 2, 3, 70)]


def case(shape, dtype=torch.float64):
    make = torch.Generator().manual_seed(4)
    x = torch.randn(shape, generator=make, dtype=torch.float64).add(2.0).to(dtype)
    weight, bias, mean = torch.randn(3, shape[1], generator=make, dtype=torch.float64).to(dtype)
    return x, weight, bias, (mean, torch.rand(shape[1], generator=make, dtype=torch.float64).to(dtype) + 0.5)


def plain(x, kept, weight, bias, spec):
    y = functional.batch_norm(x, *kept, weight, bias, spec.training, spec.momentum, spec.eps)
    if spec.cap:
        y = functional.relu(y) if spec.cap == torch.inf else functional.hardtanh(y, 0.0, spec.cap)
    return functional.max_pool2d(y, spec.pool.kernel, spec.pool.stride, spec.pool.padding)


def everything(call, x, weight, bias, kept, spec):
    """Output, running statistics, gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    kept = tuple(t.clone() for t in kept)
    out = call(leaves[0], kept, *leaves[1:], spec)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), *kept, *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_values_gradients_and_statistics_are_torchs(isa, shape, pool):
    x, weight, bias, kept = case(shape)
    with running(isa):
        for training in (True, False):
            for cap in (0.0, torch.inf, 1.5):
                spec = NormSpec(training, 0.3, 1e-3, cap, pool)
                found = everything(batch_norm, x, weight, bias, kept, spec)
                with torch.no_grad():
                    alone = batch_norm(x, tuple(t.clone() for t in kept), weight, bias, spec)
                assert torch.equal(alone, found[0])
                for one, other in zip(found, everything(plain, x, weight, bias, kept, spec), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same(layout):
    x, weight, bias, kept = case((3, 5, 9, 8), torch.float32)
    spec = NormSpec(True, cap=torch.inf, pool=POOLS[0])
    laid_out = LAYOUTS[layout](x)
    wanted = everything(plain, laid_out, weight, bias, kept, spec)
    found = everything(batch_norm, laid_out, weight, bias, kept, spec)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_residual_is_added_before_the_pooling():
    x, weight, bias, kept = case((2, 3, 8, 8))
    found = batch_norm(x, kept, weight, bias, NormSpec(False, pool=POOLS[1]), residual=x)
    norm = functional.batch_norm(x, *kept, weight, bias)
    torch.testing.assert_close(found, functional.max_pool2d(norm + x, 2))


def test_nan_goes_where_torch_sends_it():
    x, weight, bias, kept = case((2, 3, 20, 40), torch.float32)
    x[0, 0, ::3, ::5], x[1, 1, 2, 2] = torch.nan, torch.inf
    spec = NormSpec(False, cap=torch.inf, pool=POOLS[0])
    found, wanted = (everything(call, x, weight, bias, kept, spec) for call in (batch_norm, plain))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_the_number_of_threads(two_threads):
    x, weight, bias, kept = case((4, 9, 56, 56), torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        spec = NormSpec(True, cap=torch.inf, pool=POOLS[0])
        found.append(everything(batch_norm, x, weight, bias, kept, spec))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training):
    x, weight, bias, kept = case((2, 2, 4, 5))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    spec = NormSpec(training, 0.0, cap=torch.inf, pool=POOLS[0])
    call = lambda x, w, b: batch_norm(x, kept, w, b, spec)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_nothing_of_full_size_but_the_input_is_kept():
    x, weight, bias, kept = case((2, 3, 16, 16), torch.float32)
    sizes = []
    pack = lambda tensor: sizes.append(tensor.numel()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch_norm(x.requires_grad_(), kept, weight, bias, NormSpec(True, cap=torch.inf, pool=POOLS[1]))
    assert sorted(sizes)[-2:] == [x.numel() // 4, x.numel()]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, (8, 8), (5, 4), (2, 2), (2, 2), (0, 0)), "do not fit"),
        ((6, (8, 8), (4, 4), (2, 2), (2, 2), (2, 0)), "do not fit"),
        ((6, (8, 8), (1, 1), (0, 2), (1, 1), (0, 0)), "do not fit"),
        ((6, (40, 40), (1, 1), (16, 16), (1, 1), (0, 0)), "255"),
    ],
)
def test_windows_that_would_leave_the_planes_never_reach_a_kernel(sizes, message):
    with pytest.raises(ValueError, match=message):
        _native.Windows(*sizes)


class Stem(nn.Module):
    """The beginning of a ResNet."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.relu(self.bn(x * 1)))


SEQUENCE = lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))  # noqa: E731


@pytest.mark.parametrize("make", [Stem, SEQUENCE])
def test_norm_relu_and_pooling_are_found_and_run_as_one(make):
    model, x = make(), torch.randn(2, 3, 12, 12)
    (fusion,) = plan_fusion(model)
    assert (fusion.relu, fusion.pool) in (("relu", "pool"), ("1", "2"))
    fused = fuse(model, inplace=False)
    twin = pickle.loads(pickle.dumps(fused))
    for mode in (True, False):
        wanted = model.train(mode)(x)
        for form in (fused, twin):
            out = form.train(mode)(x.clone().requires_grad_())
            torch.testing.assert_close(out, wanted)
            assert out.grad_fn.name() == "_BatchNormBackward"
    assert type(unfuse(fused)) is type(model)


@pytest.mark.parametrize("options", [{"ceil_mode": True}, {"dilation": 2}])
def test_poolings_that_only_torch_has_follow_on_their_own(options):
    model, x = Stem(**options), torch.randn(2, 3, 13, 12)
    torch.testing.assert_close(fuse(model, inplace=False)(x), model(x))


def test_what_happens_to_the_pooling_later_counts():
    model, x, seen = fuse(Stem()), torch.randn(2, 3, 8, 8), []
    wanted = model(x)
    handle = model.pool.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), wanted)
    assert seen == [1]
    handle.remove()
    model.pool.kernel_size, model.pool.padding = 2, 0
    assert torch.equal(model(x), functional.max_pool2d(model.relu(model.bn(x)), 2, 2))
    model.relu = nn.SiLU()
    assert torch.equal(model(x), functional.max_pool2d(functional.silu(model.bn(x)), 2, 2))
    model.pool = nn.Identity()
    assert model(x).shape == x.shape


def test_a_hook_that_is_there_prevents_it():
    model = Stem()
    model.pool.register_forward_hook(lambda *_: None)
    assert [(f.relu, f.pool) for f in plan_fusion(model)] == [("relu", None)]


def test_a_compiled_stem_is_right():
    model, x = fuse(Stem()), torch.randn(2, 3, 8, 8)
    wanted = copy.deepcopy(model)(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
