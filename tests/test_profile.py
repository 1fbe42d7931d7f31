"""The step profiler: whose time is whose, what is left as it was, how a profile travels. No real times."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparseprop
from sparseprop import SparsePropError, StepProfile
from sparseprop.nn import SparseConv2d, SparseLinear
from sparseprop.profiling import LayerTimes, Parts, StepTimes
from sparseprop.profiling.ledger import Ledger
from sparseprop.profiling.split import shares_of
from sparseprop.profiling.trace import CallSpec, Training, traced_step
from sparseprop.swap.measure import InputSpec
from sparseprop.timing import Comparison


class Block(nn.Module):
    """A residual block with its own code between the layers, and an activation that works in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    for name in ("1.conv", "3"):
        layer = model.get_submodule(name)
        layer.weight.data.mul_(torch.rand_like(layer.weight) < 0.2)
    return model


def training(model: nn.Module, x: torch.Tensor) -> Training:
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    return Training(model, lambda: model(x), lambda y: y.square().mean(), optimizer)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def swap_plan(model: nn.Module) -> sparseprop.SwapPlan:
    return sparseprop.plan(model, min_sparsity=0.5)


def test_a_ledger_charges_the_innermost_and_loses_nothing():
    ledger = Ledger(clock=iter(range(100)).__next__)
    ledger.enter(("model", "forward"))
    for _ in range(3):
        ledger.enter(("layer", "forward"))
        ledger.leave()
    assert ledger.current == ("model", "forward")
    ledger.leave()
    assert ledger.current is None
    assert dict(ledger.seconds) == {("model", "forward"): 4, ("layer", "forward"): 3}


def test_every_module_and_every_backward_node_is_charged():
    model = network()
    seconds, calls = traced_step(training(model, images()))
    phases = {name: {phase for who, phase in seconds if who == name} for name, _ in seconds}
    assert phases[""] == {"forward"}
    assert phases["1"] == {"forward", "backward"}  # the residual addition
    assert phases["0"] == phases["1.conv"] == phases["1.bn"] == {"forward", "backward", "accumulate"}
    assert phases["1.relu"] == {"forward", "backward"}
    assert phases["(loss)"] == {"forward", "backward"}
    assert phases["(optimizer)"] == {"forward"}
    assert phases["(gradient sums)"] == {"backward"}
    assert set(calls) == {"0", "1.conv", "3"}
    assert calls["1.conv"].grad.shape == calls["1.conv"].input.shape
    assert not calls["0"].input.requires_grad  # nobody needs the gradient of the images
    assert calls["1.conv"].input.requires_grad


def test_a_watched_step_trains_as_any_other():
    x, plain = images(), network()
    watched = sparseprop.swap_modules(plain, min_sparsity=0.5, inplace=False)
    plain = sparseprop.swap_modules(plain, min_sparsity=0.5)
    training(plain, x).step()
    traced_step(training(watched, x))
    for one, other in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    hooks = (m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
    assert not any(hooks)


def test_frozen_layers_cost_forward_only():
    model = network()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    seconds, calls = traced_step(training(model, images()))
    assert {name for name, phase in seconds if phase == "backward"} == {"3", "(loss)", "(gradient sums)"}
    assert calls["1.conv"].grad is None


def test_recomputed_layers_are_charged_once_more_in_backward():
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    seconds, _ = traced_step(training(Recomputing(), torch.ones(2, 4)))
    assert ("inner", "forward") in seconds
    assert ("inner", "accumulate") in seconds


def test_profile_covers_both_forms_and_leaves_the_model_alone():
    model, x = network(), images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    found = sparseprop.profile(model, x, plan=swap_plan(model), steps=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    layers = {layer.name: layer for layer in found.layers}
    assert layers["0"].density is None
    assert layers["1.conv"].density == pytest.approx(0.2, abs=0.1)
    assert layers["1.conv"].kind == "Conv2d"
    assert layers["0"].dense.grad_input == layers["0"].sparse.grad_input == 0
    assert layers["1.conv"].dense.grad_input > 0
    assert layers["1.conv"].dense.grad_weight > 0
    assert layers["1.conv"].dense.layout == 0 < layers["1.conv"].sparse.layout
    assert layers["(optimizer)"].sparse.other > 0
    assert set(found.dense.others_ms) | {found.dense.layout} == {"contiguous", "channels_last"}
    assert found.input_shape == (2, 3, 8, 8)
    assert {"Conv2d, sparse", "Conv2d", "step"} < {row.kind for row in found.by_kind()}
    kinds = [sum(getattr(row, side).total for row in found.by_kind()) for side in ("dense", "sparse")]
    assert kinds == [
        pytest.approx(sum(getattr(row, side).total for row in found.layers)) for side in ("dense", "sparse")
    ]


def test_a_swapped_model_is_profiled_as_it_is():
    sparse = sparseprop.swap_modules(network(), min_sparsity=0.5)
    found = sparseprop.profile(sparse, {"input": images()}, steps=1, optimizer=torch.optim.AdamW)
    assert [layer.name for layer in found.layers if layer.density is not None] == ["1.conv", "3"]
    with pytest.raises(SparsePropError, match="swapped already"):
        sparseprop.profile(sparse, images(), plan=sparseprop.SwapPlan())


def test_named_outputs_and_own_losses():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = SparseLinear.random(8, 8, density=0.5)

        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"count": torch.ones(1, dtype=torch.int64), "logits": self.fc(x)}

    sparseprop.profile(Named(), torch.ones(2, 8), steps=1)
    seen = []
    sparseprop.profile(
        Named(), torch.ones(2, 8), steps=1, loss=lambda out: seen.append(out) or out["logits"].sum()
    )
    assert all(set(out) == {"count", "logits"} for out in seen)


REFUSED = [
    ("nothing to train", lambda: SparseLinear.random(4, 4, density=0.5).requires_grad_(False), {}),
    ("steps >= 1, got 0", lambda: SparseLinear.random(4, 4, density=0.5), {"steps": 0}),
    ("it is a DataParallel", lambda: nn.DataParallel(nn.Linear(4, 4)), {}),
    (
        "depends on no parameter",
        lambda: SparseLinear.random(4, 4, density=0.5),
        {"loss": lambda y: y.detach().sum()},
    ),
    ("expects a torch.nn.Module", lambda: len, {}),
]


@pytest.mark.parametrize(("message", "make", "options"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_be_profiled_is_refused(message, make, options):
    with pytest.raises(SparsePropError, match=message):
        sparseprop.profile(make(), torch.ones(2, 4), **options)


def test_an_output_without_a_number_needs_a_loss():
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = SparseLinear.random(4, 4, density=0.5)

        def forward(self, x: torch.Tensor) -> str:
            return str(self.fc(x).shape)

    with pytest.raises(SparsePropError, match=r"loss of a str; pass loss=\.\.\."):
        sparseprop.profile(Silent(), torch.ones(2, 4))


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


def small_profile() -> StepProfile:
    layers = tuple(
        LayerTimes(
            f"block.{i}", kind, density, Parts(1.0 + i, 1.0, 1.0), Parts(0.5 * i, 0.25, 0.25, 0.5, 0.1)
        )
        for i, (kind, density) in enumerate(itertools.product(("Conv2d", "BatchNorm2d"), (0.05, None)))
    )
    dense = StepTimes("channels_last", 20.0, 20.5, {"contiguous": 30.0})
    return StepProfile(
        "Net", (8, 3, 32, 32), 2, "avx512", dense, StepTimes("contiguous", 5.0, 5.5, {}), layers
    )


def test_a_profile_prints_and_survives_json():
    found = small_profile()
    assert StepProfile.from_json(found.to_json()) == found
    lines = str(found).splitlines()
    assert (
        " ".join(lines[0].split()) == "layer kind density forward grad input grad weight layout other total"
    )
    assert lines[1].split()[:4] == ["block.0", "Conv2d", "5.0", "%"]
    assert "dense: 20.00 ms a step, channels_last (contiguous 30.00 ms); 20.50 ms watched" in lines
    assert lines[-1] == "Net, input 8x3x32x32, 2 threads, avx512: 4.00x dense speed"
    assert "block.3" in found.table(top=1)
    assert "block.2" not in found.table(top=1)
    with pytest.raises(SparsePropError, match="top must be 0 or more, got -1"):
        found.table(top=-1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "layers": [{}]}', None])
def test_other_json_is_refused(text):
    with pytest.raises(SparsePropError, match="not the JSON of a StepProfile"):
        StepProfile.from_json(text)


def test_a_profile_draws_itself(tmp_path):
    path = tmp_path / "profile.png"
    small_profile().save_png(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_command_prints_a_table_and_draws(tmp_path):
    from typer.testing import CliRunner

    from sparseprop.cli import app

    png, small = (
        tmp_path / "step.png",
        ["--batch-size", "2", "--image-size", "8", "--steps", "1", "--threads", "1"],
    )
    options = ["--sparsity", "0.9", "--min-sparsity", "0.5", *small]
    shown = CliRunner().invoke(app, ["profile", "small:4", *options, "--top", "2", "--png", str(png)])
    assert shown.exit_code == 0, shown.output
    assert "x dense speed" in shown.output.splitlines()[-1]
    assert png.exists()
    printed = CliRunner().invoke(app, ["profile", "small:4", *options, "--json"])
    assert StepProfile.from_json(printed.output).input_shape == (2, 1, 8, 8)
    refused = CliRunner().invoke(app, ["profile", "small:4", "--sparsity", "2"])
    assert refused.exit_code == 2
    assert "sparsity must be between 0 and 1" in refused.stderr
