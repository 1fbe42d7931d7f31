"""Batch norm, activation, depthwise convolution, batch norm, activation as one chain: results, gradients."""

import pytest
import torch
from torch.nn import functional

from checks import running
from sparseprop import _native
from sparseprop.backend import available_isas
from sparseprop.ops.chain import chain, kernels_may_chain
from sparseprop.ops.stage import NormSpec, Stage
from sparseprop.ops.windows import WindowSpec

WINDOWS = [
    WindowSpec((3, 3), (1, 1), (1, 1)),
    WindowSpec((3, 3), (2, 2), (1, 1)),
    WindowSpec((5, 5), (1, 1), (2, 2)),
    WindowSpec((5, 5), (2, 2), (2, 2)),
    WindowSpec((3, 2), (1, 3), (1, 1)),
    WindowSpec((2, 2), (2, 2)),
]
SHAPES = [(2, 3, 5, 5), (3, 20, 9, 13), (2, 5, 20, 35), (1, 2, 3, 70)]


class Case:
    """Tensors of a chain, and what torch makes of them."""

    def __init__(
        self, shape, windows, dtype=torch.float64, *, training=(True, True), first=True, caps=(6.0, 1.5)
    ):
        make = torch.Generator().manual_seed(5)
        draw = lambda *size: torch.randn(size, generator=make, dtype=torch.float64).to(dtype)  # noqa: E731
        self.x, self.weight = draw(*shape), draw(shape[1], 1, *windows.kernel)
        self.params = [draw(shape[1]) for _ in range(4)]
        self.kept = [draw(shape[1]).abs() + 0.5 for _ in range(4)]
        self.specs = [NormSpec(mode, 0.3, 1e-3, cap) for mode, cap in zip(training, caps, strict=True)]
        self.windows, self.first = windows, first

    def stages(self, params, kept):
        first, second = (
            Stage(tuple(kept[i : i + 2]), *params[i : i + 2], spec)
            for i, spec in zip((0, 2), self.specs, strict=True)
        )
        return first if self.first else None, second

    def call(self, how, x, weight, params, kept):
        first, second = self.stages(params, kept)
        if how is chain:
            assert kernels_may_chain(x, first, weight, self.windows, second)
        return how(x, first, weight, self.windows, second)

    def everything(self, how, layout=lambda x: x):
        """Output, running statistics, gradients."""
        leaves = [t.clone().requires_grad_() for t in (self.x, self.weight, *self.params)]
        kept = [t.clone() for t in self.kept]
        out = self.call(how, layout(leaves[0]), leaves[1], leaves[2:], kept)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        wanted = leaves if self.first else [*leaves[:2], *leaves[4:]]
        return out.detach(), *kept, *torch.autograd.grad(out, wanted, grad)


def torchs(x, first, weight, windows, second):
    def norm(x, stage):
        spec = stage.spec
        y = functional.batch_norm(
            x, *stage.running, stage.weight, stage.bias, spec.training, spec.momentum, spec.eps
        )
        if not spec.cap:
            return y
        return functional.relu(y) if spec.cap == torch.inf else functional.hardtanh(y, 0.0, spec.cap)

    y = x if first is None else norm(x, first)
    return norm(functional.conv2d(y, weight, None, windows.stride, windows.padding, 1, x.shape[1]), second)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_values_gradients_and_statistics_are_torchs(isa, shape, windows):
    for training in ((True, True), (False, False), (True, False), (False, True)):
        for first in (True, False):
            for caps in ((6.0, 1.5), (torch.inf, 0.0)):
                case = Case(shape, windows, training=training, first=first, caps=caps)
                with running(isa):
                    found = case.everything(chain)
                for one, other in zip(found, case.everything(torchs), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("windows", WINDOWS[:3], ids=str)
def test_float32_is_as_exact_as_torchs(isa, windows):
    narrow, wide = (Case((4, 20, 13, 29), windows, dtype) for dtype in (torch.float32, torch.float64))
    with running(isa):
        ours = narrow.everything(chain)
    for one, other, truth in zip(ours, narrow.everything(torchs), wide.everything(torchs), strict=True):
        size = truth.abs().max()
        assert (one - truth).abs().max() <= 2 * (other - truth).abs().max() + 2e-6 * size


def test_without_gradients_the_result_is_the_same():
    case = Case((2, 3, 9, 9), WINDOWS[0])
    with torch.no_grad():
        alone = case.call(chain, case.x, case.weight, case.params, [t.clone() for t in case.kept])
    assert torch.equal(alone, case.everything(chain)[0])


def test_only_wanted_gradients_are_made():
    case = Case((2, 3, 9, 9), WINDOWS[1])
    wanted = dict(zip(("x", "weight", 0, 1, 2, 3), case.everything(chain)[5:], strict=True))
    for key, grad in wanted.items():
        leaves = {"x": case.x, "weight": case.weight, **dict(enumerate(case.params))}
        leaves[key] = leaves[key].clone().requires_grad_()
        kept = [t.clone() for t in case.kept]
        out = case.call(chain, leaves["x"], leaves["weight"], [leaves[i] for i in range(4)], kept)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        torch.testing.assert_close(leaves[key].grad, grad)


def test_results_do_not_depend_on_the_number_of_threads(two_threads):
    case, found = Case((4, 9, 56, 56), WINDOWS[1], torch.float32), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(case.everything(chain))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_second_derivatives(training, first):
    case = Case((2, 2, 4, 5), WINDOWS[1], training=(training, training), first=first)
    case.specs = [NormSpec(training, 0.0, 1e-3, cap) for cap in (6.0, 0.0)]
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weight, *case.params[0 if first else 2 :])]
    given = lambda params: params if first else [*case.params[:2], *params]  # noqa: E731
    call = lambda x, w, *params: case.call(chain, x, w, given(params), case.kept)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_a_nan_spoils_its_channel_alone_and_evaluation_only_its_neighbours():
    case = Case((2, 3, 20, 20), WINDOWS[0], torch.float32, training=(False, False))
    case.x[0, 1, 4, 4] = torch.nan
    out = case.call(chain, case.x, case.weight, case.params, case.kept)
    assert out.isnan().nonzero().tolist() == [[0, 1, h, w] for h in (3, 4, 5) for w in (3, 4, 5)]
    case.specs = [NormSpec(True, cap=6.0)] * 2
    out = case.call(chain, case.x, case.weight, case.params, case.kept)
    assert out.isnan().any((0, 2, 3)).tolist() == [False, True, False]


def test_nothing_of_full_size_but_the_input_is_kept():
    case, sizes = Case((2, 3, 16, 16), WINDOWS[1], torch.float32), []
    pack = lambda tensor: sizes.append(tensor.numel()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.call(chain, case.x.requires_grad_(), case.weight, case.params, case.kept)
    assert sorted(sizes)[-2:] == [case.weight.numel(), case.x.numel()]


UNFIT = {
    "layout": lambda c: c.x.contiguous(memory_format=torch.channels_last),
    "bfloat16": lambda c: c.x.bfloat16(),
    "channels": lambda c: c.x[:, :2].contiguous(),
    "too small": lambda c: c.x[..., :1, :1].contiguous(),
    "empty": lambda c: c.x[:0],
    "unbatched": lambda c: c.x[0],
}


@pytest.mark.parametrize("how", UNFIT)
def test_what_does_not_fit_is_left_to_torch(how):
    case = Case((2, 3, 9, 9), WindowSpec((5, 5), (1, 1), (1, 1)))
    first, second = case.stages(case.params, case.kept)
    assert not kernels_may_chain(UNFIT[how](case), first, case.weight, case.windows, second)


def test_autocast_and_single_values_are_left_to_torch():
    case = Case((1, 3, 2, 2), WINDOWS[5])  # one value a channel behind the convolution
    first, second = case.stages(case.params, case.kept)
    assert not kernels_may_chain(case.x, first, case.weight, case.windows, second)
    case = Case((2, 3, 4, 4), WINDOWS[0])
    first, second = case.stages(case.params, case.kept)
    with torch.autocast("cpu"):
        assert not kernels_may_chain(case.x, first, case.weight, case.windows, second)


def test_planes_that_are_no_whole_images_are_refused():
    windows = _native.Windows(7, (4, 4), (4, 4), (3, 3), (1, 1), (1, 1))
    stage = _native.Stage(True, 1e-5, 0.0, 0.1, 0, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="all channels"):
        _native.chain_forward(False, windows, 3, 0, None, 0, stage, 0)


@pytest.mark.parametrize(
    ("size", "stride"), [((2, 3, 12, 200), (1, 100)), ((1, 2, 34, 35), (16, 16)), ((1, 1, 4, 224), (1, 224))]
)
@pytest.mark.parametrize("isa", available_isas())
def test_windows_far_apart(isa, size, stride):
    case = Case(size, WindowSpec((1, min(stride[1], 100)), stride))
    with running(isa):
        found = case.everything(chain)
    for one, other in zip(found, case.everything(torchs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
