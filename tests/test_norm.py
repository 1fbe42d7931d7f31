"""Native batch norm, alone and with what follows it: results, gradients, layouts."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import sparseprop
from checks import running
from sparseprop.backend import available_isas
from sparseprop.nn.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from sparseprop.ops.norm import batch_norm
from sparseprop.ops.stage import NormSpec

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "strided": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}
SHAPES = [
    (2, 1, 1, 1), (2, 3, 1, 1), (3, 7, 2, 1), (2, 16, 3, 5), (5, 17, 4, 4), (40, 9, 1, 3), (1, 33, 7, 9),
    (3, 65, 8, 8), (2, 3, 40, 40), (300, 2, 4, 5),
]  # fmt: skip


def tensors(shape, layout, dtype=torch.float64):
    make = torch.Generator().manual_seed(3)
    x, grad, residual = (
        LAYOUTS[layout](torch.randn(shape, generator=make, dtype=torch.float64) + offset).to(dtype)
        for offset in (3.0, 0.0, 0.0)
    )
    channels = [torch.randn(shape[1], generator=make, dtype=torch.float64).to(dtype) for _ in range(3)]
    running = (channels[2].clone(), torch.rand(shape[1], generator=make, dtype=torch.float64).to(dtype) + 0.5)
    return x, grad, residual, channels[0], channels[1], running


def ours_and_torchs(case, spec, *, with_residual):
    """Output, running statistics and gradients of both, by name."""
    x, grad, residual, weight, bias, running = case
    found = []
    for native in (True, False):
        leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in (x, weight, bias, residual)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        kept = tuple(t.clone() for t in running)
        mine, w, b, r = leaves
        if native:
            out = batch_norm(mine, kept, w, b, spec, r if with_residual else None)
        else:
            out = functional.batch_norm(mine, *kept, w, b, spec.training, spec.momentum, spec.eps)
            out = out + r if with_residual else out
            if spec.cap:
                out = (
                    functional.relu(out) if spec.cap == torch.inf else functional.hardtanh(out, 0.0, spec.cap)
                )
        wanted = leaves if with_residual else leaves[:3]
        grads = torch.autograd.grad(out, wanted, grad)
        found.append((out.detach(), *kept, *grads))
    return found


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_gradients_and_statistics_are_torchs(isa, shape, layout):
    case = tensors(shape, layout)
    with running(isa):
        for cap in (0.0, torch.inf, 1.5):
            for training in (False, True):
                for with_residual in (False, True):
                    spec = NormSpec(training, 0.3, 1e-3, cap)
                    ours, theirs = ours_and_torchs(case, spec, with_residual=with_residual)
                    for one, other in zip(ours, theirs, strict=True):
                        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("side", [56, 57])  # planes in whole cache lines, and not
def test_outputs_larger_than_the_caches_are_torchs(isa, side):
    case = tensors((23, 60, side, side), "contiguous")
    assert case[0].nbytes > 32 << 20
    with running(isa):
        ours, theirs = ours_and_torchs(case, NormSpec(True, cap=torch.inf), with_residual=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_last"])
def test_float32_is_as_exact_as_torchs(isa, layout):
    wide = tensors((4, 20, 13, 13), layout)
    narrow = tensors((4, 20, 13, 13), layout, torch.float32)
    spec = NormSpec(True)
    with running(isa):
        ours, theirs = ours_and_torchs(narrow, spec, with_residual=False)
    exact = ours_and_torchs(wide, spec, with_residual=False)[1]
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        size = truth.abs().max()
        assert (one - truth).abs().max() <= 2 * (other - truth).abs().max() + 1e-6 * size


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_last"])
def test_the_layout_is_handed_on_both_ways(layout):
    x, grad, *_ = tensors((4, 5, 3, 3), layout, torch.float32)
    out = batch_norm(x.requires_grad_(), (None, None), None, None, NormSpec(True))
    (grad_x,) = torch.autograd.grad(out, x, grad.contiguous())
    assert out.stride() == grad_x.stride() == x.stride()


def test_results_do_not_depend_on_the_number_of_threads(two_threads):
    for layout in ("contiguous", "channels_last"):
        case = tensors((4, 24, 28, 28), layout, torch.float32)
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ours_and_torchs(case, NormSpec(True, cap=torch.inf), with_residual=True)[0])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training):
    x, _, residual, weight, bias, kept = tensors((3, 2, 2, 2), "contiguous")
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    spec = NormSpec(training, 0.0, cap=torch.inf)
    call = lambda x, w, b, r: batch_norm(x, kept, w, b, spec, r)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_nan_and_infinity_behave_as_in_torch():
    x, grad, residual, weight, bias, kept = tensors((2, 3, 4, 4), "contiguous", torch.float32)
    x[0, 0, 0, 0], x[1, 1, 2, 2] = float("nan"), float("inf")
    case = (x, grad, residual, weight, bias, kept)
    ours, theirs = ours_and_torchs(case, NormSpec(False, cap=torch.inf), with_residual=False)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_only_wanted_gradients_are_made():
    x, grad, _, weight, bias, kept = tensors((2, 3, 4, 4), "contiguous")
    weight.requires_grad_()
    batch_norm(x, kept, weight, bias, NormSpec(True, cap=torch.inf)).backward(grad)
    assert weight.grad is not None
    assert x.grad is bias.grad is None


MODULES = [
    (BatchNorm1d, nn.BatchNorm1d, (6, 5)),
    (BatchNorm1d, nn.BatchNorm1d, (6, 5, 9)),
    (BatchNorm2d, nn.BatchNorm2d, (3, 5, 4, 4)),
    (BatchNorm3d, nn.BatchNorm3d, (3, 5, 2, 3, 4)),
]
OPTIONS = [
    {}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5}
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("native", "usual", "shape"), MODULES)
def test_modules_behave_as_torchs_in_training_and_evaluation(native, usual, shape, options):
    ours, theirs = native(5, **options).double(), usual(5, **options).double()
    for training in (True, True, False, True):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    for one, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


def test_inputs_that_torch_refuses_are_refused():
    for x, message in (
        (torch.ones(1, 3, 1, 1), "more than 1 value"),
        (torch.ones(2, 3), "expected 4D input"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchNorm2d(3)(x)
    with pytest.raises(RuntimeError, match=r"running_mean should contain 4"):
        BatchNorm2d(3)(torch.ones(2, 4, 2, 2))


def test_bfloat16_under_autocast_and_no_grad():
    layer, x = BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu"):
        assert layer(x.bfloat16()).dtype is torch.bfloat16
    with torch.no_grad():
        assert layer(x).grad_fn is None
    with torch.inference_mode():
        torch.testing.assert_close(layer.eval()(x), nn.BatchNorm2d.forward(layer, x))


def test_moved_statistics_count_as_written():
    running = torch.zeros(3), torch.ones(3)
    spec = NormSpec(training=True)
    batch_norm(torch.randn(4, 3, 2, 2), running, None, None, spec)
    assert all(tensor._version > 0 for tensor in running)
    before = [tensor._version for tensor in running]
    batch_norm(torch.randn(4, 3, 2, 2), running, None, None, NormSpec(training=True, momentum=0.0))
    batch_norm(torch.randn(4, 3, 2, 2), running, None, None, NormSpec(training=False))
    assert [tensor._version for tensor in running] == before


def test_statistics_made_in_inference_mode_keep_no_count_and_move_as_in_torch():
    x, spec = torch.randn(4, 3, 2, 2), NormSpec(training=True)
    with torch.inference_mode():
        kept = [(torch.zeros(3), torch.ones(3)) for _ in range(2)]
    batch_norm(x, kept[0], None, None, spec)
    functional.batch_norm(x, *kept[1], None, None, True)
    for ours, torchs in zip(*kept, strict=True):
        assert ours.is_inference()
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 0, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_is_not_finite_reaches_all_of_its_channel(value, place, memory_format):
    x = torch.randn(4, 2, 5, 5)
    x[place] = value
    norm = nn.BatchNorm2d(2)
    fused = sparseprop.fuse(norm, inplace=False)
    x = x.contiguous(memory_format=memory_format)
    assert torch.equal(fused(x).isnan(), norm(x).isnan())
    assert torch.equal(fused.running_var.isnan(), norm.running_var.isnan())
    assert torch.equal(fused.running_mean.isfinite(), norm.running_mean.isfinite())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_outlier_costs_the_others_no_digits(layout):
    x = LAYOUTS[layout](torch.randn(8, 3, 40, 40, generator=torch.Generator().manual_seed(1)))
    x[0, :, 0, 0] = 1000.0
    out = batch_norm(x, (None, None), None, None, NormSpec(training=True))[1:]
    wanted = functional.batch_norm(x.double(), None, None, training=True)[1:]
    assert float((out - wanted).abs().max()) < 2e-5


def test_tensors_in_layouts_of_other_libraries_are_left_to_torch():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no mkldnn")
    norm, x = BatchNorm2d(3).eval(), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(norm(x.to_mkldnn()).to_dense(), norm(x), rtol=1e-4, atol=1e-5)
