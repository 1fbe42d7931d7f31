"""The step profiler: what it covers, what is left as it was, how a profile travels. No real times."""

import itertools

import pytest
import torch
from torch import nn

import sparseprop
from profile_cases import images, network
from sparseprop import SparsePropError, StepProfile
from sparseprop.nn import SparseLinear
from sparseprop.profiling import LayerTimes, Parts, StepTimes


def swap_plan(model: nn.Module) -> sparseprop.SwapPlan:
    return sparseprop.plan(model, min_sparsity=0.5)


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
