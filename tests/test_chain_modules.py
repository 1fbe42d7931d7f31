"""Where `fuse` finds chains around depthwise convolutions, and what may happen to the modules later."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparseprop import fuse, plan_fusion, unfuse
from sparseprop.nn import SparseConv2d


def triple(inputs, outputs, kernel, groups=1, relu=nn.ReLU6):
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs), relu(inplace=True)


def nested():
    """As MobileNetV2 writes its blocks."""
    return nn.Sequential(
        nn.Sequential(*triple(4, 8, 1)),
        nn.Sequential(*triple(8, 8, 3, groups=8)),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.BatchNorm2d(4),
    )


def flat():
    """As MNASNet writes them."""
    return nn.Sequential(
        *triple(4, 8, 1, relu=nn.ReLU), *triple(8, 8, 3, groups=8, relu=nn.ReLU), nn.Conv2d(8, 4, 1)
    )


def leading():
    """A depthwise convolution first, no activation after it."""
    return nn.Sequential(*triple(4, 4, 3, groups=4)[:2], nn.Conv2d(4, 4, 1))


class Residual(nn.Module):
    """Code of its own, with functions for activations, and its input needed again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, _ = triple(4, 4, 1)
        self.conv2, self.bn2, _ = triple(4, 4, 3, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu6(self.bn1(self.conv1(x)))
        return x + torch.relu(self.bn2(self.conv2(y)))


MODELS = {
    "nested": (nested, {"0.1": "1.0", "1.1": "1.0"}),
    "flat": (flat, {"1": "3", "4": "3"}),
    "leading": (leading, {"1": "0"}),
    "own code": (Residual, {"bn1": "conv2", "bn2": "conv2"}),
}


def make_sparse(model):
    """Of every pointwise convolution a sparse one."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1):
                setattr(module, name, SparseConv2d.from_dense(child, mask=child.weight.abs() > 0.1))


def steps(model, x, count=3):
    """Outputs and gradients of some steps in training, the state after them, an evaluation."""
    optimizer, found = torch.optim.SGD(model.parameters(), 0.1, 0.9), []
    for _ in range(count):
        optimizer.zero_grad()
        out = model.train()(x)
        out.square().mean().backward()
        optimizer.step()
        found += [out.detach(), *(p.grad.clone() for p in model.parameters())]
    with torch.no_grad():
        return [*found, *(t.clone() for t in model.state_dict().values()), model.eval()(x), model.train()(x)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sparse", [False, True])
def test_chains_are_found_and_train_like_their_origin(name, sparse):
    torch.manual_seed(0)
    make, convs = MODELS[name]
    model = make().double()
    if sparse:
        make_sparse(model)
    assert {f.name: f.conv for f in plan_fusion(model) if f.conv} == convs
    fused, x = fuse(model, inplace=False), torch.randn(3, 4, 9, 9, dtype=torch.float64)
    assert is_chained(fused, x)
    twin = pickle.loads(pickle.dumps(fused))
    model(x)  # as often as the other
    wanted = steps(copy.deepcopy(model), x)
    for form in (fused, twin, copy.deepcopy(fused)):
        for one, other in zip(steps(form, x), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert [type(m) for m in unfuse(fused).modules()] == [type(m) for m in model.modules()]


def nodes_of(out):
    """The nodes of its autograd graph."""
    nodes, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return nodes


def graph_of(out):
    """Their names."""
    return {node.name() for node in nodes_of(out)}


def has_chain_of_two_norms(model, x):
    """The one from the second container alone begins with the convolution."""
    nodes = nodes_of(model(x.clone().requires_grad_()))
    return any(node.name() == "_ChainBackward" and node.specs[0] is not None for node in nodes)


def is_chained(model, x):
    return "_ChainBackward" in graph_of(model(x.clone().requires_grad_()))


def test_a_hook_on_a_container_later_is_called_and_cuts_the_chain_there():
    model, x, seen = nested(), torch.randn(2, 4, 6, 6), []
    fused = fuse(model, inplace=False)
    wanted = copy.deepcopy(model)(x)
    for part in (fused[0], fused[1]):
        part.register_forward_hook(lambda module, *_: seen.append(module))
    torch.testing.assert_close(fused(x), wanted)
    assert seen == [fused[0], fused[1]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model[1][0].register_forward_hook(lambda *_: None),
        lambda model: model[0][1].register_forward_hook(lambda *_: None),
        lambda model: model[1].append(nn.Identity()),
        lambda model: setattr(model[1][0], "padding_mode", "reflect"),
        lambda model: model[0].__setitem__(1, nn.BatchNorm2d(8)),
        lambda model: model[1].__setitem__(2, nn.SiLU()),
    ],
    ids=[
        "hook on the convolution",
        "on a norm",
        "one more module",
        "options",
        "another norm",
        "another activation",
    ],
)
def test_what_happens_to_the_parts_later_counts(spoil):
    model, x = nested(), torch.randn(2, 4, 6, 6)
    fused = fuse(model, inplace=False)
    assert is_chained(fused, x)
    model(x)
    spoil(fused)
    spoil(model)
    assert not has_chain_of_two_norms(fused, x)
    model(x)
    torch.testing.assert_close(fused.eval()(x), model.eval()(x))


def test_hooks_that_are_there_prevent_it():
    model = flat()
    model[3].register_forward_hook(lambda *_: None)
    assert not is_chained(fuse(model), torch.randn(2, 4, 6, 6))
    model = flat()
    model[2].register_forward_hook(lambda *_: None)  # what comes after that ReLU is a chain still
    assert [f.conv for f in plan_fusion(model)] == [None, "3"]
    model = nested()
    model[0].register_forward_hook(lambda *_: None)
    assert [f.conv for f in plan_fusion(model)] == [None, "1.0", None]


def test_other_layouts_go_layer_by_layer_with_the_same_result():
    model, x = fuse(nested()), torch.randn(2, 4, 6, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    assert not is_chained(model, last)
    out = model(last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


UNCHAINED = [
    nn.Conv2d(4, 4, 3, groups=4),  # with a bias
    nn.Conv2d(4, 4, 3, groups=2, bias=False),
    nn.Conv2d(4, 8, 3, groups=4, bias=False),
    nn.Conv2d(4, 4, 3, groups=4, bias=False, dilation=2),
    nn.Conv2d(4, 4, 3, groups=4, bias=False, padding="same"),
    nn.Conv2d(4, 4, 3, groups=4, bias=False, padding=1, padding_mode="circular"),
]


@pytest.mark.parametrize("conv", UNCHAINED, ids=str)
def test_other_convolutions_are_left_alone(conv):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())
    assert not any(fusion.conv for fusion in plan_fusion(model))
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(fuse(copy.deepcopy(model))(x), model(x), rtol=1e-4, atol=1e-5)


def test_statistics_count_batches_once_and_average_them():
    model, x = nested(), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    for norm in (model[0][1], model[1][1]):
        norm.momentum = None
    model.double()
    fused = fuse(model, inplace=False)
    for _ in range(3):
        torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused.state_dict(), model.state_dict())
    assert int(fused[1][1].num_batches_tracked) == 3


def test_wrong_inputs_are_refused_in_torchs_words():
    model, fused = nested(), fuse(nested())
    for x in (torch.ones(2, 3, 5, 5), torch.ones(2, 4)):
        with pytest.raises((RuntimeError, ValueError)) as wanted:
            model(x)
        with pytest.raises(type(wanted.value)) as found:
            fused(x)
        assert str(found.value) == str(wanted.value)


def test_a_compiled_chain_is_right():
    model, x = fuse(nested()), torch.randn(2, 4, 6, 6)
    wanted = copy.deepcopy(model)(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)
