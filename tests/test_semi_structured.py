"""2:4 layers for CUDA: everything up to torch's compression runs here, with a dense matrix in its place."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import sparseprop
from semi_structured_cases import CHOICES, REFUSED_SWAPS, Recorder
from sparseprop import semi_structured_backend
from sparseprop.errors import SparsePropError
from sparseprop.masks import NMPattern, check_nm, nm_mask, retained_magnitude, transposable_nm_mask
from sparseprop.nn import SparseLinear
from sparseprop.semi_structured import SemiStructuredLinear, best_mask
from sparseprop.semi_structured_backend import Backend, shape_misfit, torch_backend
from sparseprop.swap import NothingSwappedWarning, SwapPlan

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """Stands for torch's compression: notes what it is given and hands it back."""
    recorder = Recorder()
    monkeypatch.setattr(
        semi_structured_backend, "torch_backend", lambda: Backend("recorder", 16, 16, recorder)
    )
    return recorder


def half(inputs=64, outputs=32, **options) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("pattern", ["2:4", "2:4T"])
def test_outputs_and_gradients_are_those_of_the_masked_dense_layer(recorder, pattern):
    dense = half()
    layer = SemiStructuredLinear.from_dense(dense, pattern=pattern)
    dense.weight.data.mul_(layer.mask)
    assert torch.equal(layer.weight, dense.weight)
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [net(one) for net, one in zip((layer, dense), xs, strict=True)]
    grad = torch.randn_like(outs[0])
    for out in outs:
        out.backward(grad)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad * layer.mask)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize(("pattern", "sides"), [("2:4", [(32, 64)]), ("2:4T", [(32, 64), (64, 32)])])
def test_what_torch_is_given_is_contiguous_and_2_4_along_its_rows(recorder, pattern, sides):
    layer = SemiStructuredLinear.from_dense(half(), pattern=pattern)
    assert recorder.seen == []  # compressed at first use: the model may be moved before
    layer(torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert [tuple(matrix.shape) for matrix in recorder.seen] == sides
    for matrix in recorder.seen:
        assert matrix.is_contiguous()
        assert matrix.dtype == torch.bfloat16
        assert check_nm(matrix != 0, 2, 4)


def test_compression_follows_updates_of_the_weight_and_only_what_is_needed(recorder):
    layer = SemiStructuredLinear.from_dense(half(), pattern="2:4T")
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()  # x wants no gradient: the transpose is not needed
        optimizer.step()
    assert len(recorder.seen) == 3
    assert not layer.weight[~layer.mask].any()
    with torch.no_grad():
        layer(x)
        layer(x)
        assert len(recorder.seen) == 4
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.load_state_dict(SemiStructuredLinear.from_dense(half(), pattern="2:4T").state_dict())
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert len(recorder.seen) == 5
    layer.weight.requires_grad_(False)  # a frozen layer that hands gradients on
    for _ in range(2):
        layer(x.clone().requires_grad_()).sum().backward()
    assert len(recorder.seen) == 6  # the transpose too, once


@pytest.mark.parametrize("training", [True, False])
def test_updates_that_bypass_autograd_are_followed(recorder, training):
    layer = SemiStructuredLinear.from_dense(half(), pattern="2:4T").train(training)
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    for grad_mode in (True, False, True):
        before = x.grad
        x.grad = None
        layer(x).sum().backward()
        assert before is None or torch.equal(x.grad, 2 * before)
        layer.weight.data.mul_(2)  # leaves the weight's version as it is
        with torch.set_grad_enabled(grad_mode):
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_pruning_ranks_by_magnitude_and_keeps_the_most():
    weight = -torch.rand(32, 32) - 0.1  # torch's own kernel ranks by signed value
    plain, both = best_mask(weight, NMPattern(2, 4)), best_mask(weight, NMPattern(2, 4, transposable=True))
    assert torch.equal(plain, nm_mask(weight.abs(), 2, 4))
    assert torch.equal(both, transposable_nm_mask(weight.abs(), 2, 4))
    already = weight * both
    already[0] = 0
    kept = best_mask(already, NMPattern(2, 4, transposable=True))
    assert retained_magnitude(already.abs(), kept) == 1.0


def test_an_empty_batch_and_autocast(recorder):
    layer = SemiStructuredLinear.from_dense(half())
    assert layer(torch.zeros(0, 64, dtype=torch.bfloat16)).shape == (0, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 64)).dtype == torch.bfloat16
    with pytest.raises(
        SparsePropError, match=r"has torch.bfloat16 weights and got torch.float32 inputs; convert"
    ):
        layer(torch.ones(2, 64))
    with pytest.raises(SparsePropError, match=r"expects \(\.\.\., 64\) inputs, got \(2, 63\)"):
        layer(torch.ones(2, 63, dtype=torch.bfloat16))


def test_layers_that_cannot_be_2_4_are_refused():
    fine = Backend("test", 16, 16, lambda matrix: matrix)
    for layer, options, message in (
        (nn.Linear(64, 32), {}, r"wants float16 or bfloat16 weights, got torch.float32; use .bfloat16"),
        (half(60), {}, r"32x60 weight: test wants multiples of 16x16; leave this layer dense"),
        (nn.Conv2d(8, 8, 3).half(), {}, "wants a Linear layer, got Conv2d"),
        (half(), {"pattern": "4:8"}, r"CUDA devices multiply by 2:4 only, got 4:8; use '2:4' or '2:4T'"),
        (half(), {"mask": torch.ones(32, 64).bool()}, r"mask must be 2:4 and of shape \(32, 64\)"),
    ):
        with pytest.raises(SparsePropError, match=message):
            SemiStructuredLinear.from_dense(layer, backend=fine, **options)


@pytest.mark.parametrize(
    ("shape", "sizes", "transposable", "message"),
    [
        ((48, 64), (16, 16), False, None),
        ((48, 64), (32, 64), False, "48x64 weight: test wants multiples of 32x64"),
        ((32, 64), (32, 64), False, None),
        ((32, 64), (32, 64), True, "32x64 weight: test wants multiples of 64x64"),
        ((64, 192), (32, 64), True, None),
    ],
)
def test_shapes_follow_the_library_that_multiplies(shape, sizes, transposable, message):
    backend = Backend("test", *sizes, lambda matrix: matrix)
    assert shape_misfit(shape, backend, transposable=transposable) == message


@pytest.mark.parametrize(("layer", "options", "choice", "reason"), CHOICES, ids=[case[3] for case in CHOICES])
def test_a_plan_for_cuda_says_what_becomes_2_4_and_why_not(recorder, layer, options, choice, reason):
    plan = sparseprop.plan(nn.Sequential(layer), device="cuda", **options)
    assert plan[0].choice == choice
    assert reason in plan[0].reason
    assert SwapPlan.from_json(plan.to_json()) == plan
    json.loads(plan.to_json())


def test_a_whole_network_is_swapped_planned_copied_and_made_dense_again(recorder):
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10)).bfloat16()
    before = copy.deepcopy(model)
    swapped = sparseprop.swap_modules(model, device="cuda", pattern="2:4T", inplace=False)
    assert [type(part).__name__ for part in swapped] == [
        "Conv2d",
        "Flatten",
        "SemiStructuredLinear",
        "Linear",
    ]
    assert torch.equal(model[2].weight, before[2].weight)
    x = torch.randn(4, 16, 2, 2, dtype=torch.bfloat16)
    dense = sparseprop.to_dense(swapped, inplace=False)
    torch.testing.assert_close(swapped(x), dense(x))
    assert list(sparseprop.dense_state_dict(swapped)) == list(model.state_dict())
    plan = sparseprop.plan(model, device="cuda", pattern="2:4T")
    again = sparseprop.swap_modules(model, plan=plan, device="cuda", pattern="2:4T")
    assert again is model
    assert torch.equal(again[2].weight, swapped[2].weight)
    file = io.BytesIO()
    torch.save(again, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), again(x))
    with pytest.raises(SparsePropError, match="it is swapped already"):
        sparseprop.swap_modules(again, plan=plan, device="cuda")


def test_pruned_and_frozen_layers_keep_what_they_had(recorder):
    layer = half(bias=False)
    nn.utils.prune.l1_unstructured(layer, "weight", 0.9)
    layer.weight_orig.requires_grad_(False)
    swapped = sparseprop.swap_modules(nn.Sequential(layer).eval(), device="cuda")[0]
    assert not swapped.weight.requires_grad
    assert not swapped.training
    assert swapped.bias is None
    assert not swapped.weight[layer.weight_mask == 0].any()


@pytest.mark.parametrize(
    ("model", "options", "message"), REFUSED_SWAPS, ids=[case[2][:50] for case in REFUSED_SWAPS]
)
def test_swaps_that_cannot_be_are_refused_by_name(recorder, model, options, message):
    with pytest.raises(SparsePropError, match=message):
        sparseprop.swap_modules(copy.deepcopy(model), **options)


def test_nothing_to_swap_is_said(recorder):
    with pytest.warns(NothingSwappedWarning, match="2:4 on CUDA wants float16 or bfloat16"):
        sparseprop.swap_modules(nn.Sequential(nn.Linear(64, 64)), device="cuda")


def test_on_the_cpu_a_pattern_is_checked_or_found():
    def model(n, m, transposable=False):
        layer = nn.Linear(16, 16)
        make = transposable_nm_mask if transposable else nm_mask
        layer.weight.data.mul_(make(layer.weight.data.abs(), n, m))
        return nn.Sequential(layer)

    for net, pattern in (
        (model(2, 4), "2:4"),
        (model(2, 4, True), "2:4T"),
        (model(1, 8), "auto"),
        (nn.Sequential(nn.Linear(16, 16)), "auto"),
    ):
        kept = net[0].weight.detach().clone()
        swapped = sparseprop.swap_modules(net, min_sparsity=0.0, pattern=pattern)
        assert isinstance(swapped[0], SparseLinear)
        assert torch.equal(swapped[0].weight, kept)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
def test_without_a_gpu_the_forward_pass_says_where_to_go():
    backend = torch_backend()
    assert backend.name in ("cusparselt", "cutlass")
    layer = SemiStructuredLinear.from_dense(half(64, 64))
    with pytest.raises(
        SparsePropError, match=r"a 2:4 layer got a weight on cpu, wanted a CUDA device; move the"
    ):
        layer(torch.ones(64, 64, dtype=torch.bfloat16))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("pattern", ["2:4", "2:4T"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_it_equals_the_masked_dense_layer(pattern, dtype):
    dense = nn.Linear(256, 512, dtype=dtype).cuda()
    layer = SemiStructuredLinear.from_dense(dense, pattern=pattern)
    dense.weight.data.mul_(layer.mask)
    x = torch.randn(96, 256, dtype=dtype, device="cuda")
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [net(one) for net, one in zip((layer, dense), xs, strict=True)]
    for out in outs:
        out.square().mean().backward()
    torch.testing.assert_close(*outs, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad * layer.mask, rtol=2e-2, atol=1e-3)


def test_pruned_layers_give_their_parameter_and_not_what_the_last_forward_made_of_it(recorder):
    first, second = (prune.l1_unstructured(half(), "weight", 0.5) for _ in range(2))
    second.load_state_dict(first.state_dict())
    kept = first.weight_orig * first.weight_mask
    assert not torch.equal(second.weight, kept)
    layer = SemiStructuredLinear.from_dense(second)
    assert torch.equal(layer.weight, kept * layer.mask)


def test_a_mask_of_another_pattern_is_refused_when_it_is_loaded(recorder):
    rowwise, both = (SemiStructuredLinear.from_dense(half(), pattern=pattern) for pattern in ("2:4", "2:4T"))
    before = both.mask.clone()
    with pytest.raises(RuntimeError, match="mask must be a bool tensor of the pattern 2:4T"):
        both.load_state_dict(rowwise.state_dict())
    assert torch.equal(both.mask, before)
    rowwise.load_state_dict(both.state_dict())
    assert torch.equal(rowwise.mask, before)


def test_a_layer_made_directly_keeps_nothing_until_it_loads(recorder):
    layer, other = SemiStructuredLinear(64, 32, dtype=torch.bfloat16), SemiStructuredLinear.from_dense(half())
    assert layer.density == 0
    layer.load_state_dict(other.state_dict())
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    assert torch.equal(layer(x), other(x))
