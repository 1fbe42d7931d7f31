"""How a layer's time is split among forward, both gradients and layout. No real times."""

import pytest
import torch
from torch import nn

import sparseprop
from profile_cases import images
from sparseprop.nn import SparseConv2d, SparseLinear
from sparseprop.profiling.split import shares_of
from sparseprop.profiling.trace import CallSpec
from sparseprop.swap.measure import InputSpec
from sparseprop.timing import Comparison


def fake_timer(ms: dict[str, float]):
    def timer(steps):
        for step in steps.values():
            step()  # each must run
        return Comparison({name: (1e-3 * ms[name],) for name in steps})

    return timer


def call_of(x: torch.Tensor, out: torch.Tensor, *, needs: bool) -> CallSpec:
    like = InputSpec(tuple(x.shape), x.stride(), x.dtype, needs, True)
    return CallSpec(like, InputSpec(tuple(out.shape), out.stride(), out.dtype, False, True))


MS = {
    "forward": 4.0, "grad input": 3.0, "grad weight": 5.0, "both": 8.0,
    "thin forward": 1.0, "thin backward": 2.0
}  # fmt: skip


@pytest.mark.parametrize("frozen", [(), ("weight_values",), ("weight_values", "bias")])
@pytest.mark.parametrize("needs", [True, False])
def test_shares_of_a_layers_time(frozen, needs):
    layer, x = SparseConv2d.random(4, 8, 3, density=0.5), torch.randn(2, 4, 6, 6)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    flags = [p.requires_grad for p in layer.parameters()]
    call = call_of(x, layer(x), needs=needs)
    if not needs and len(frozen) == 2:
        call = CallSpec(call.input, None)
    found = shares_of(layer, call, fake_timer(MS))
    assert [p.requires_grad for p in layer.parameters()] == flags
    assert found.forward_layout == 0.25
    if call.grad is None:
        return
    assert found.backward_layout + found.grad_input + found.grad_weight == pytest.approx(1.0)
    assert (found.grad_input > 0) == needs
    assert (found.grad_weight > 0) == (len(frozen) < 2)
    if needs and not frozen:
        assert (found.backward_layout, found.grad_input, found.grad_weight) == (0.25, 0.1875, 0.5625)


def test_shares_survive_noise():
    layer, x = SparseLinear.random(4, 4, density=0.5), torch.randn(2, 4)
    noisy = dict.fromkeys(MS, 1.0) | {"thin forward": 9.0, "thin backward": 9.0}
    found = shares_of(layer, call_of(x, layer(x), needs=True), fake_timer(noisy))
    assert (found.forward_layout, found.backward_layout, found.grad_input) == (1.0, 1.0, 0.0)


def test_first_layers_and_frozen_weights_never_ask_the_kernels_for_their_gradients(monkeypatch):
    asked = []
    backward = sparseprop.ops.Operator.backward

    def noting(self, call, grad, x, values, needs):
        asked.append((needs, x is None, values is None))
        return backward(self, call, grad, x, values, needs)

    monkeypatch.setattr(sparseprop.ops.Operator, "backward", noting)
    model = nn.Sequential(
        SparseConv2d.random(3, 8, 3, density=0.5), nn.ReLU(), SparseConv2d.random(8, 8, 3, density=0.5)
    )
    model(images()).sum().backward()
    assert asked == [((True, True, True), False, False), ((False, True, True), False, True)]
    asked.clear()
    model[2].requires_grad_(False)
    model(images()).sum().backward()  # a frozen layer hands the gradient on and keeps no input
    assert asked == [((True, False, False), True, False), ((False, True, True), False, True)]
    asked.clear()
    model[0].requires_grad_(False)
    assert not model(images()).requires_grad  # a frozen model runs forward only
