"""Public networks compute the same fused: outputs, all gradients, running statistics, evaluation."""

import pytest
import torch
from torch import nn

from sparseprop import fuse, plan_fusion, unfuse
from sparseprop.train._torchvision import import_timm, import_torchvision_models

# what is found in each: additions, poolings, chains
NETWORKS = [
    ("torchvision", "mobilenet_v2", (0, 0, 17)),
    ("torchvision", "mobilenet_v3_small", (0, 0, 11)),
    ("torchvision", "mnasnet0_5", (0, 0, 17)),
    ("torchvision", "shufflenet_v2_x0_5", (0, 0, 19)),
    ("torchvision", "regnet_x_400mf", (0, 0, 0)),
    ("torchvision", "densenet121", (0, 1, 0)),
    ("torchvision", "resnet18", (8, 1, 0)),
    ("torchvision", "resnext50_32x4d", (16, 1, 0)),
    ("timm", "resnet26", (8, 1, 0)),
    ("timm", "ghostnet_050", (0, 0, 41)),
    ("timm", "dla34", (12, 0, 0)),
    ("timm", "repvgg_a0", (0, 0, 0)),
    ("timm", "regnetx_002", (0, 0, 0)),
    ("timm", "densenet121", (0, 0, 0)),
    ("timm", "mobilenetv3_small_050", (0, 0, 0)),
]


def network(library, name):
    torch.manual_seed(0)
    if library == "timm":
        model = import_timm().create_model(name, num_classes=5)
    else:
        model = getattr(import_torchvision_models(), name)(num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_rate"):  # of a dropout in timm's own code
            module.drop_rate = 0.0
    return model.double()


def everything(model, x):
    x = x.clone().requires_grad_()
    out = model.train()(x)
    out.square().mean().backward()
    with torch.no_grad():
        evaluated = model.eval()(x)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.detach(), evaluated, x.grad, *grads, *model.buffers()]


@pytest.mark.parametrize(("library", "name", "counts"), NETWORKS)
def test_fused_networks_compute_the_same(library, name, counts):
    model = network(library, name)
    plan = plan_fusion(model)
    chains = {fusion.conv for fusion in plan} - {None}
    assert (sum(f.adds for f in plan), sum(f.pool is not None for f in plan), len(chains)) == counts
    fused, x = fuse(model, inplace=False), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for one, other in zip(everything(fused, x), everything(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert [type(module) for module in unfuse(fused).modules()] == [type(m) for m in model.modules()]
