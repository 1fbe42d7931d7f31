"""Gradients that nobody else holds are overwritten; held ones never, however they are held."""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode

from sparseprop.nn import SparseConv2d
from sparseprop.nn.shared import shared
from sparseprop.ops.chain import chain
from sparseprop.ops.norm import batch_norm
from sparseprop.ops.stage import NormSpec, Stage
from sparseprop.ops.windows import WindowSpec

SHAPE = (3, 4, 8, 8)


class Behind(Function):
    """Makes the gradient for what is in front of it, and notes where."""

    @staticmethod
    def forward(ctx, x, note):
        ctx.note = note
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        made = grad * 2
        ctx.note.append(made.data_ptr())
        return made, None


def norm(x, residual=None, cap=torch.inf):
    spec = NormSpec(training=True, cap=cap)
    return batch_norm(x, (None, None), torch.ones(4), torch.zeros(4), spec, residual)


def depthwise(x):
    stage = Stage((None, None), torch.ones(4), torch.zeros(4), NormSpec(training=True, cap=6.0))
    windows = WindowSpec((3, 3), (1, 1), (1, 1))
    return chain(x, stage, torch.full((4, 1, 3, 3), 0.3), windows, stage)


def sparse(x):
    torch.manual_seed(3)
    layer = SparseConv2d.random(4, 4, 3, density=0.5, padding=1)
    layer(x)
    out, others = shared(layer, x)
    return others, out


# what gets the gradient first, and what else comes of it
OPS = {
    "norm": lambda x: (norm(x),),
    "sum": lambda x: (norm(x * 0.5, x),),
    "chain": lambda x: (depthwise(x),),
    "shared": sparse,
}


def start():
    torch.manual_seed(0)
    return torch.randn(SHAPE, requires_grad=True)


def expected(op, weight):
    x = start()
    first, *others = op(x)
    loss = (first.clone() * 2 * weight).sum() + sum((other**2).sum() for other in others)
    return torch.autograd.grad(loss, x)[0]


def run(op, weight, hold):
    """The gradient of `x`, that which the op got, where that was made; `hold` gets hold of it in some way."""
    x, note, held = start(), [], []
    first, *others = op(x)
    first = hold(first, held)
    loss = (Behind.apply(first, note) * weight).sum() + sum((other**2).sum() for other in others)
    found = torch.autograd.grad(loss, [x, *(t for t in held if t.requires_grad)])
    return found[0], [*found[1:], *(t for t in held if not t.requires_grad)], note


def nobody(first, held):
    return first


def hook(first, held):
    first.register_hook(lambda grad: held.append(grad))
    return first


def hook_with_view(first, held):
    first.register_hook(lambda grad: held.append(grad[0]))
    return first


def hook_with_array(first, held):
    def keep(grad):
        held.append(torch.from_numpy(grad.detach().numpy()))

    first.register_hook(keep)
    return first


def captured(first, held):
    held.append(first)
    return first


HOLDERS = {f.__name__: f for f in (hook, hook_with_view, hook_with_array, captured)}


@pytest.mark.parametrize("kind", OPS)
def test_a_gradient_that_nobody_holds_is_overwritten(kind):
    weight = torch.randn(SHAPE)
    found, _, note = run(OPS[kind], weight, nobody)
    torch.testing.assert_close(found, expected(OPS[kind], weight))
    if kind != "sum":  # whose two terms autograd adds up
        assert found.data_ptr() == note[0]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", OPS)
def test_a_gradient_that_is_held_stays_as_it_is(kind, holder):
    weight = torch.randn(SHAPE)
    found, held, note = run(OPS[kind], weight, HOLDERS[holder])
    assert len(held) == 1
    torch.testing.assert_close(found, expected(OPS[kind], weight))
    assert torch.equal(held[0], (weight * 2)[0] if holder == "hook_with_view" else weight * 2)
    assert found.data_ptr() != note[0]


def test_two_readers_of_one_gradient_both_see_it():
    """An addition hands the same gradient to both of its terms."""
    x, y = start(), start()
    weight = torch.randn(SHAPE)
    both = norm(x) + depthwise(y)
    found = torch.autograd.grad((both * 2 * weight).sum(), [x, y])
    torch.testing.assert_close(found[0], expected(OPS["norm"], weight))
    torch.testing.assert_close(found[1], expected(OPS["chain"], weight))


def test_a_gradient_given_by_the_caller_stays_as_it_is():
    for op in (norm, depthwise):
        given = torch.randn(SHAPE)
        before = given.clone()
        op(start()).backward(given)
        assert torch.equal(given, before)


def test_a_sum_without_activation_hands_on_an_unspoilt_gradient():
    x, residual = start(), start()
    weight = torch.randn(SHAPE)
    out = Behind.apply(norm(x, residual, cap=0.0), [])
    grads = torch.autograd.grad((out * weight).sum(), [x, residual])
    assert torch.equal(grads[1], weight * 2)


def test_going_backward_twice_gives_the_same():
    for op in OPS.values():
        x = start()
        first, *others = op(x)
        loss = (first**2).sum() + sum((other**2).sum() for other in others)
        once = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
        assert torch.equal(torch.autograd.grad(loss, x)[0], once)


class Keeping(TorchDispatchMode):
    """Sees every tensor there is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_nothing_is_overwritten_under_a_mode():
    note = []
    x = start()
    loss = (Behind.apply(norm(x), note) * torch.randn(SHAPE)).sum()
    with Keeping():
        found = torch.autograd.grad(loss, x)[0]
    assert found.data_ptr() != note[0]


def test_a_retained_gradient_is_right():
    for op in (norm, depthwise):
        first, weight = op(start()), torch.randn(SHAPE)
        first.retain_grad()
        (Behind.apply(first, []) * weight).sum().backward()
        assert torch.equal(first.grad, weight * 2)


def test_a_gradient_in_memory_of_numpy_stays():
    owned = torch.ones(SHAPE).numpy()

    class FromNumpy(Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.from_numpy(owned)

    for op in (norm, depthwise):
        FromNumpy.apply(op(start())).sum().backward()
        assert (owned == 1).all()


def test_module_hooks_see_gradients_that_stay():
    seen = []
    module = nn.Sequential(nn.Identity())
    module.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    weight = torch.randn(SHAPE)
    (Behind.apply(module(norm(start())), []) * weight).sum().backward()
    assert torch.equal(seen[0], weight * 2)
