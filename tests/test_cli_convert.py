"""``sparseprop mask`` and ``convert``: files, tables, pictures, and one sentence with status 2 for errors."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import sparseprop
from cli_cases import call
from job_cases import image_folder
from sparseprop.checkpoint import load_checkpoint, save_checkpoint
from sparseprop.conversion import ConversionReport
from sparseprop.masks import check_nm, nm_mask
from sparseprop.train.checkpoint import load_tensors, save_tensors
from sparseprop.train.models import ModelSpec, build_model

SPEC = ModelSpec("small:8", num_classes=10, channels=1, image_size=8)


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    note = {"spec": dataclasses.asdict(SPEC)}
    save_tensors(tmp_path / "model.safetensors", build_model(SPEC).state_dict(), note)
    save_checkpoint(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3)), tmp_path / "plain.safetensors")
    masked = sparseprop.mask_modules(nn.Sequential(nn.Linear(16, 16)), "2:4")
    save_checkpoint(masked, tmp_path / "masked.safetensors")
    sparse = sparseprop.swap_modules(nn.Sequential(nn.Linear(16, 16)), min_sparsity=0.0)
    save_checkpoint(sparse, tmp_path / "sparse.safetensors")


def test_mask_needs_no_architecture_and_keeps_the_rest():
    status, out, _ = call("mask plain.safetensors --pattern 2:4 --out masked.safetensors --plot masked.png")
    assert status == 0
    assert "2 of 2 layers converted to 2:4 by magnitude" in out
    assert "written to masked.safetensors and masked.png" in out
    before, after = (load_checkpoint(f"{name}.safetensors").state_dict for name in ("plain", "masked"))
    assert list(before) == list(after)
    for name, tensor in before.items():
        keep = nm_mask(tensor.abs(), 2, 4) if name.endswith("weight") else True
        assert torch.equal(after[name], tensor * keep)
    assert Path("masked.png").read_bytes()[:4] == b"\x89PNG"


def test_mask_skips_by_name_and_says_why_others_stay():
    command = "mask model.safetensors --pattern 4:8T --out masked.safetensors --skip head --json"
    status, out, _ = call(command)
    assert status == 0
    report = ConversionReport.from_json(out)
    assert report["stem.weight"].reason == "1 inputs per group, fewer than 8"
    assert report["head.weight"].reason == "skipped"
    tensors, note = load_tensors(Path("masked.safetensors"))
    assert note["spec"] == dataclasses.asdict(SPEC)  # still says how to build the model
    assert check_nm(tensors["stages.0.conv1.weight"] != 0, 4, 8, transposable=True)


def test_mask_says_that_transposable_convolutions_are_taken_for_one_group():
    save_checkpoint(nn.Sequential(nn.Conv2d(16, 12, 3, groups=2)), "grouped.safetensors")
    _, out, _ = call("mask grouped.safetensors --pattern 2:4T --out m.safetensors")
    assert "hold where these have one group, which a checkpoint does not say" in out
    _, out, err = call("mask grouped.safetensors --pattern 2:4T --out m.safetensors --json")
    assert ConversionReport.from_json(out).converted
    assert "one group" in err
    for command in ("mask grouped.safetensors --pattern 2:4", "mask plain.safetensors --pattern 2:4T"):
        _, out, err = call(f"{command} --out m.safetensors")
        assert "one group" not in out + err


def test_mask_leaves_weights_of_8_bits_and_says_so():
    small = torch.rand(8, 8).to(torch.float8_e4m3fn)
    save_checkpoint({"a.weight": small, "b.weight": torch.rand(8, 8)}, "eight.safetensors")
    status, out, _ = call("mask eight.safetensors --pattern 2:4 --out m.safetensors --json")
    assert status == 0
    report = ConversionReport.from_json(out)
    assert report["a.weight"].reason == "torch.float8_e4m3fn, wanted 16 bits or more"
    assert report.converted == ("b.weight",)


def test_convert_writes_a_checkpoint_that_fits_the_architecture():
    command = (
        "convert model.safetensors --pattern 2:4 --out converted.safetensors --data digits --batches 4 "
        "--bn-batches 4 --plot converted.png"
    )
    status, out, err = call(command)
    assert status == 0
    assert "held-out accuracy" in out
    assert "error fitted" in out
    assert "1 of 9  stages.0.conv1" in err
    tensors, note = load_tensors(Path("converted.safetensors"))
    model = build_model(ModelSpec(**note["spec"]))
    model.load_state_dict(tensors)
    assert check_nm(model.stages[1].conv2.weight != 0, 2, 4)
    assert not torch.equal(model.bn.running_mean, torch.zeros(8))
    assert Path("converted.png").stat().st_size > 10_000


@pytest.mark.parametrize("noted", [True, False])
def test_convert_keeps_the_classifier_when_the_images_are_of_other_classes(noted: bool):
    image_folder(Path("pets"), count=5)
    seven = dataclasses.replace(SPEC, num_classes=7)
    before = build_model(seven).state_dict()
    save_tensors(Path("seven.safetensors"), before, {"spec": dataclasses.asdict(seven)} if noted else {})
    command = "convert seven.safetensors --arch small:8 --image-size 8 --pattern 2:4 --out c.safetensors"
    status, out, _ = call(f"{command} --data pets --batches 2 --no-reconstruct")
    assert status == 0
    assert "held-out accuracy: not measured: seven.safetensors has 7 classes, pets 2" in out
    after, note = load_tensors(Path("c.safetensors"))
    assert note["spec"]["num_classes"] == 7
    kept = after["head.weight"] != 0
    assert torch.equal(after["head.weight"], before["head.weight"] * kept)
    assert torch.equal(after["head.bias"], before["head.bias"])


def test_convert_finds_the_channels_whatever_the_order_of_names():
    save_file(build_model(SPEC).state_dict(), "foreign.safetensors")  # sorts them: the stem comes last
    command = "convert foreign.safetensors --arch small:8 --image-size 8 --pattern 2:4 --out c.safetensors"
    status, _, err = call(f"{command} --data digits --batches 2")
    assert status == 0, err
    assert load_tensors(Path("c.safetensors"))[1]["spec"]["channels"] == 1


@pytest.mark.parametrize("form", ["masked", "pruned", "sparse"])
def test_convert_takes_layers_in_every_form(form: str):
    model = build_model(SPEC)
    if form == "masked":
        model = sparseprop.mask_modules(model, "2:4")
    else:
        layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        for layer in layers[1:]:
            prune.l1_unstructured(layer, "weight", 0.5)
        model = model if form == "pruned" else sparseprop.swap_modules(model, min_sparsity=0.4)
    save_checkpoint(model, "formed.safetensors")
    command = "convert formed.safetensors --arch small:8 --image-size 8 --pattern 1:4 --out c.safetensors"
    status, _, err = call(f"{command} --data digits --batches 2")
    assert status == 0, err
    tensors, _ = load_tensors(Path("c.safetensors"))
    assert tensors["head.weight"].shape == (10, 128)
    assert check_nm(tensors["stages.1.conv2.weight"] != 0, 1, 4)


def test_json_stands_alone_on_standard_output():
    command = (
        "convert model.safetensors --pattern auto:8 --out c.safetensors --data digits --batches 2 --json"
    )
    status, out, err = call(command)
    assert status == 2  # nothing is sparse enough for auto:8
    assert "too dense for N of 8" in err
    assert not Path("c.safetensors").exists()
    status, out, err = call(command.replace("auto:8", "2:8"))
    assert status == 0
    assert json.loads(out)["pattern"] == "2:8"
    assert "held-out accuracy" in err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("mask missing.safetensors --pattern 2:4 --out m.safetensors", "there is no checkpoint missing"),
        ("mask plain.safetensors --pattern half --out m.safetensors", "pattern got 'half', wanted 'N:M'"),
        ("mask plain.safetensors --pattern 2:4 --out m.pt", "the output m.pt got another ending; expected"),
        ("mask plain.safetensors --pattern 2:4 --out no/m.safetensors", "the folder no is missing"),
        ("mask plain.safetensors --pattern 2:4 --out m.safetensors --skip (", "is no regular expression"),
        (
            "mask plain.safetensors --pattern 2:32 --out m.safetensors",
            "no weight of plain.safetensors can be",
        ),
        (
            "mask sparse.safetensors --pattern 2:4 --out m.safetensors",
            "holds sparse or pruned layers; expected",
        ),
        (
            "mask masked.safetensors --pattern 1:4 --out m.safetensors",
            "holds sparse or pruned layers; expected",
        ),
        ("convert plain.safetensors --pattern 2:4 --out m.safetensors --data digits", "pass it with --arch"),
        (
            "convert model.safetensors --pattern 2:4 --out m.safetensors --data here",
            "the data folder here is",
        ),
        (
            "convert model.safetensors --pattern 2:4 --out m.safetensors --data digits --batches 0",
            "batches must be 1 or more; got 0",
        ),
        (
            "convert model.safetensors --pattern 2:4 --out m.safetensors --data digits --image-size 0",
            "image size must be 1 or more; got 0",
        ),
        (
            "convert model.safetensors --pattern 2:4 --out m.safetensors --data digits --score size",
            "score got 'size', wanted one of magnitude, wx2",
        ),
    ],
)
def test_errors_are_one_sentence_and_status_2(command: str, message: str):
    status, out, err = call(command)
    assert (status, out) == (2, "")
    assert err.startswith("sparseprop: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1
