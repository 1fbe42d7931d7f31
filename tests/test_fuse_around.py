"""What is put around, or in the place of, modules that `fuse` merged counts whenever it comes."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fuse_cases import Base, X, assert_alike, pair
from sparseprop import fuse
from sparseprop.nn import SparseConv2d


def negate(module, *_):
    return -_[-1]


WHERE = {"norm": "bn", "activation": "relu", "first layer": "c1", "second layer": "c2", "later norm": "bn2"}


class TwoNorms(Base):
    def __init__(self):
        super().__init__()
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.relu(self.bn2(self.c2(F.relu(self.bn(self.c1(x))))) + x)


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "class"])
@pytest.mark.parametrize("swap", [False, True])
def test_what_is_put_around_a_merged_module_later_counts(where, how, swap):
    plain, fused = pair(TwoNorms, swap=swap)
    for model in (plain, fused):
        part = model.get_submodule(where)
        if how == "hook":
            part.register_forward_hook(negate)
        elif how == "pre-hook":
            part.register_forward_pre_hook(lambda _, args: (-args[0],))
        elif how == "forward":
            part.forward = (lambda own: lambda x: -own(x))(part.forward)
        else:
            kind = type(part)
            part.__class__ = type(
                "Other", (kind,), {"forward": lambda self, x: -super(type(self), self).forward(x)}
            )
    assert_alike(plain, fused)
    if how != "class":
        fuse(fused)  # again
        assert_alike(plain, fused)


def test_hooks_on_every_module_see_what_each_computes():
    plain, fused = pair(TwoNorms)
    for model in (plain, fused):
        model.eval().seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, seen=model.seen: seen.append((type(module).__name__, out.min()))
        )
        model(X)
        handle.remove()
    assert len(plain.seen) == len(fused.seen)
    for (_, one), (_, other) in zip(plain.seen, fused.seen, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sparse_layer_of_a_derived_class_runs_its_own_forward():
    class Adapted(SparseConv2d):
        def forward(self, x):
            return -super().forward(x)

    plain, _ = pair(TwoNorms, swap=True)
    plain.c1.__class__ = Adapted
    assert_alike(plain, fuse(plain, inplace=False))


def test_parts_of_a_fused_model_compute_what_they_did():
    def sequence():
        return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))

    class Negative(nn.Module):
        def forward(self, x):
            return -x

    plain, fused = pair(sequence)
    assert_alike(plain[:2], fused[:2])
    for model in (plain, fused):
        model.insert(2, Negative())
    assert_alike(plain, fused)
    for model in (plain, fused):
        del model[2:4]
    assert_alike(plain, fused)


class Embeds(Base):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def embed(self, x):
        return self.bn(self.c1(x))

    def forward(self, x):
        return self.relu(self.body(self.relu(self.embed(x))))


def test_other_methods_and_containers_of_a_fused_model_compute_what_they_did():
    plain, fused = pair(Embeds)
    torch.testing.assert_close(fused.embed(X), plain.embed(X))
    assert_alike(plain, fused)
    for model in (plain, fused):
        model.body.register_forward_hook(negate)
    assert_alike(plain, fused)


def test_a_models_own_way_to_be_copied_is_kept():
    class Locked(Base):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

        def __getstate__(self):
            return {key: value for key, value in vars(self).items() if key != "lock"}

        def __setstate__(self, state):
            super().__setstate__(state)
            self.lock = threading.Lock()

    _, model = pair(Locked)
    assert_alike(model, copy.deepcopy(model))


@pytest.mark.parametrize("change", ["strides", "padding mode"])
def test_inverted_blocks_notice_how_their_convolution_lies(change):
    def block():
        layers = [nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        return nn.Sequential(nn.Sequential(*layers, nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)))

    plain, fused = pair(block, swap=True)
    with torch.no_grad():
        fused.eval()(X)
        for model in (plain.eval(), fused):
            conv = model[0][3]
            if change == "strides":
                conv.weight.data = conv.weight.data.transpose(2, 3)
            else:
                conv.padding_mode = "reflect"
        torch.testing.assert_close(fused(X), plain(X))


@pytest.mark.parametrize("where", ["bn", "relu"])
def test_compiled_models_call_hooks_too(where):
    _, fused = pair(Base)
    fused.eval().get_submodule(where).register_forward_hook(negate)
    torch.testing.assert_close(torch.compile(fused, backend="aot_eager")(X), fused(X))


class Listed(Base):
    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList([nn.ReLU()])
        self.named = nn.ModuleDict({"a": nn.ReLU()})

    def forward(self, x):
        for act in self.acts:
            x = act(self.bn(x))
        return self.named["a"](self.bn(x))


@pytest.mark.parametrize("change", ["list", "dict", "append", "delete"])
def test_changes_in_lists_of_modules_count(change):
    plain, fused = pair(Listed)
    for model in (plain, fused):
        if change == "list":
            model.acts[0] = nn.Tanh()
        elif change == "dict":
            model.named["a"] = nn.GELU()
        elif change == "append":
            model.acts.append(nn.Tanh())
        else:
            del model.acts[0]
    assert_alike(plain, fused)
