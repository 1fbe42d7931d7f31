"""``sparseprop mask`` and odd weights: tied under several names, without elements, not finite."""

import json
from pathlib import Path

import pytest
import torch

from cli_cases import call
from sparseprop.checkpoint import load_checkpoint, save_checkpoint
from sparseprop.conversion import ConversionReport
from sparseprop.masks import check_nm

MASK = "mask t.safetensors --pattern 2:4 --out m.safetensors"


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def tied() -> dict[str, torch.Tensor]:
    table = torch.randn(8, 16)
    return {"wte.weight": table, "fc.weight": torch.randn(8, 16), "lm_head.weight": table}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize(("skip", "other"), [("wte", "lm_head"), ("lm_head", "wte")])
def test_skipping_one_name_of_a_tied_weight_skips_them_all(ending: str, skip: str, other: str) -> None:
    state = tied()
    (torch.save if ending == "pt" else save_checkpoint)(state, f"t.{ending}")
    status, out, _ = call(f"mask t.{ending} --pattern 2:4 --out m.safetensors --skip {skip} --json")
    assert status == 0
    report = ConversionReport.from_json(out)
    assert [layer.name for layer in report] == list(state)
    assert report.converted == ("fc.weight",)
    assert report[f"{skip}.weight"].reason == "skipped"
    assert report[f"{other}.weight"].reason == f"shared with {skip}.weight"
    after = load_checkpoint("m.safetensors").state_dict
    assert torch.equal(after["wte.weight"], state["wte.weight"])
    assert after["wte.weight"] is after["lm_head.weight"]


def test_a_tied_weight_is_masked_once_and_stays_tied() -> None:
    save_checkpoint(tied() | {"table": (table := torch.randn(8, 8)), "a.weight": table}, "t.safetensors")
    assert call(MASK)[0] == 0
    after = load_checkpoint("m.safetensors").state_dict
    for one, other in (("wte.weight", "lm_head.weight"), ("table", "a.weight")):
        assert after[one] is after[other]
        assert check_nm(after[one] != 0, 2, 4)


def test_a_weight_without_elements_is_left_alone() -> None:
    state = {"a.weight": torch.empty(0, 8), "b.weight": torch.empty(0, 8), "c.weight": torch.randn(8, 8)}
    save_checkpoint(state, "t.safetensors")
    status, out, _ = call(f"{MASK} --json")
    assert status == 0
    json.loads(out, parse_constant=pytest.fail)  # NaN is no JSON
    report = ConversionReport.from_json(out)
    assert [layer.reason for layer in report] == ["no elements", "no elements", ""]
    assert "nan" not in call(MASK)[1]


def test_a_weight_that_is_not_finite_is_named() -> None:
    save_checkpoint(
        {"a.weight": torch.randn(8, 8), "b.weight": torch.full((8, 8), torch.nan)}, "t.safetensors"
    )
    status, _, err = call(MASK)
    assert status == 2
    assert err.startswith("sparseprop: b.weight: scores got NaN or inf")
    assert not Path("m.safetensors").exists()


def test_an_output_whose_name_leaves_no_room_for_a_temporary_file_is_refused() -> None:
    save_checkpoint(tied(), "t.safetensors")
    for length in (240, 255, 300):
        name = "x" * (length - 12) + ".safetensors"
        status, out, err = call(f"mask t.safetensors --pattern 2:4 --out {name}")
        assert (status, out) == (2, "")
        assert f"has a name of {length} bytes; expected at most 239; choose a shorter one" in err
