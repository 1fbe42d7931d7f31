"""``sparseprop inspect``: every form a weight takes in a checkpoint, and files that hold none."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseprop
from cli_cases import call
from sparseprop.checkpoint import save_checkpoint
from sparseprop.masks import nm_mask
from sparseprop.nn import SparseLinear


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def inspected(name: str) -> dict:
    status, text, err = call(f"inspect {name} --json")
    assert (status, err) == (0, "")
    return {layer["name"]: layer for layer in json.loads(text)["layers"]}


def test_inspect_describes_every_form_of_weight() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 64), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[0].weight.mul_(nm_mask(model[0].weight.abs(), 2, 4))
        model[1].weight[:, 4:] = 0
    sparseprop.swap_modules(model, min_sparsity=0.7)
    save_checkpoint(model, "model.safetensors")
    layers = inspected("model.safetensors")
    assert [(layer["form"], layer["shape"]) for layer in layers.values()] == [
        ("dense", [16, 32]),
        ("sparse", [64, 16]),
        ("dense", [2, 4, 3, 3]),
    ]
    assert [layer["nnz"] for layer in layers.values()] == [256, 256, 72]
    assert layers["0"]["pattern"].startswith("2:4")
    assert layers["0"]["bytes"] == 16 * 32 * 4
    _, table, _ = call("inspect model.safetensors")
    assert "2:4" in table
    assert "25.00 %" in table


@pytest.mark.parametrize("bare", [False, True])
def test_inspect_reads_the_masks_of_masked_and_pruned_layers(bare: bool) -> None:
    masked = sparseprop.mask_modules(nn.Linear(16, 16), "2:4")
    pruned = prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.75)
    for layer, density, pattern in ((masked, 0.5, "2:4"), (pruned, 0.25, "")):
        save_checkpoint(layer if bare else nn.Sequential(layer), "model.safetensors")
        (found,) = inspected("model.safetensors").values()
        assert (found["form"], found["density"], found["pattern"]) == ("masked", density, pattern)


def test_inspect_reads_a_sparse_layer_that_is_the_whole_model() -> None:
    save_checkpoint(SparseLinear.random(16, 8, density=0.5), "model.safetensors")
    layer = inspected("model.safetensors")["weight"]
    assert (layer["form"], layer["shape"], layer["nnz"]) == ("sparse", [8, 16], 64)


def test_inspect_calls_spectral_norm_dense() -> None:
    save_checkpoint(nn.utils.spectral_norm(nn.Linear(8, 8)), "model.safetensors")
    assert inspected("model.safetensors")["weight_orig"]["form"] == "dense"


@pytest.mark.parametrize("name", ["heads.[mask]", ":smile:", "heads.[/x]", "block." * 20 + "attention"])
def test_inspect_prints_names_and_numbers_whole(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    monkeypatch.setenv("COLUMNS", "40")
    save_checkpoint({f"{name}.weight": torch.ones(1234, 1000)}, "model.safetensors")
    status, table, _ = call("inspect model.safetensors")
    assert status == 0
    assert table.splitlines()[1].split() == [
        name,
        "1234x1000",
        "dense",
        "1,234,000",
        "100.00",
        "%",
        "-",
        "4,936.0",
    ]


def test_weights_of_no_layer_are_listed_without_a_pattern() -> None:
    weight = torch.rand(4, 4, 2, 2, 2, 2)
    weight[0] = 0
    save_checkpoint({"a.weight": weight}, "model.safetensors")
    assert inspected("model.safetensors")["a"]["density"] == 0.75
