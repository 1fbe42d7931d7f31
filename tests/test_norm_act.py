"""timm's batch norm with an activation of its own, fused: whatever the activation, as timm computes it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from checks import running
from sparseprop import fuse, plan_fusion, unfuse
from sparseprop.backend import available_isas
from sparseprop.nn.norm_act import NativeNormAct
from sparseprop.train._torchvision import import_timm


def norm_act(**options):
    return import_timm().layers.BatchNormAct2d(6, **options)


# options, and what the plan says: the activation taken along, why not
CASES = {
    "relu": ({}, "act", ""),
    "relu6": ({"act_layer": nn.ReLU6}, "act", ""),
    "none": ({"apply_act": False}, None, ""),
    "silu": ({"act_layer": nn.SiLU}, None, "no kernel for its SiLU"),
    "dropped": ({"drop_layer": nn.Dropout}, None, "dropout between it and its activation"),
    "cumulative": ({"momentum": None}, "act", ""),
    "untracked": ({"track_running_stats": False}, "act", ""),
    "not affine": ({"affine": False}, "act", ""),
}


def everything(norm, x):
    """Two batches in training, one in evaluation: results, gradients, buffers."""
    found = []
    for training in (True, True, False):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        out = norm.train(training)(leaf)
        out.sin().sum().backward()
        found += [out.detach(), leaf.grad]
    return [*found, *(p.grad for p in norm.parameters()), *norm.buffers()]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_computes_what_timms_does(isa, case, memory_format):
    options, relu, reason = CASES[case]
    norm = norm_act(**options)
    x = torch.randn(4, 6, 9, 7).to(memory_format=memory_format)
    fused = fuse(norm, inplace=False)
    (plan,) = plan_fusion(norm)
    assert (plan.native, plan.relu, plan.reason) == (True, relu, reason)
    assert isinstance(fused, NativeNormAct)
    with running(isa):
        for one, other in zip(everything(fused, x), everything(norm, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert type(unfuse(fused)) is type(norm)


def test_hooks_on_its_activation_are_called():
    norm, fused, seen = norm_act(), fuse(norm_act()), []
    for module in (norm, fused):
        module.act.register_forward_hook(lambda *_: seen.append(1))
    assert [plan.reason for plan in plan_fusion(norm)] == ["hooks between it and its activation"]
    fused(torch.randn(2, 6, 3, 3))
    assert seen


def test_copies_and_pickles_are_fused():
    fused, x = fuse(norm_act()).eval(), torch.randn(2, 6, 3, 3)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(again) is type(fused)
        assert torch.equal(again(x), fused(x))


def test_wrong_inputs_get_torchs_message():
    with pytest.raises(ValueError, match="expected 4D input"):
        fuse(norm_act())(torch.randn(2, 6))


def test_a_class_derived_from_it_is_left_alone():
    derived = type("Derived", (type(norm_act()),), {})(6)
    (plan,) = plan_fusion(derived)
    assert not plan.native
    assert plan.reason == "Derived is not torch's own batch norm"
