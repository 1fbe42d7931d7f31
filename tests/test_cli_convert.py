"""``sparseprop mask`` and ``convert``: files, tables, pictures, and one sentence with status 2 for errors."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sparseprop
from sparseprop.checkpoint import load_checkpoint, save_checkpoint
from sparseprop.cli import app
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
    sparse = sparseprop.swap_modules(nn.Sequential(nn.Linear(16, 16)), min_sparsity=0.0)
    save_checkpoint(sparse, tmp_path / "sparse.safetensors")


def call(command: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, command.split())
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


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


def test_convert_writes_a_checkpoint_that_fits_the_architecture():
    command = (
        "convert model.safetensors --pattern 2:4 --out converted.safetensors --data digits --batches 4 "
        "--plot converted.png"
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
        ("convert plain.safetensors --pattern 2:4 --out m.safetensors --data digits", "pass it with --arch"),
        (
            "convert model.safetensors --pattern 2:4 --out m.safetensors --data here",
            "the data folder here is",
        ),
        (
            "convert model.safetensors --pattern 2:4 --out m.safetensors --data digits --batches 0",
            "batches and batch size must be 1 or more",
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
