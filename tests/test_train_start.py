"""What a job or a command starts with: files in every state, and how many classes a checkpoint has."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseprop
from checkpoint_cases import BAD_PATTERNS, NO_CHECKPOINTS, ODD_STATES, sparse_state
from job_cases import SMALL, same_tensors
from sparseprop.checkpoint import save_checkpoint
from sparseprop.errors import SparsePropError
from sparseprop.train import (
    FinetuneConfig,
    ModelSpec,
    Progress,
    SmallResNet,
    build_model,
    finetune,
    models,
    report,
)
from sparseprop.train.phases import phases_of
from sparseprop.train.prune import prunable_layers
from sparseprop.train.start import load_model, read_checkpoint, with_own_classes
from sparseprop.train.trial import check_output

SPEC = ModelSpec("small:8", 7, 1, 8)


@pytest.mark.parametrize(("spoil", "message"), BAD_PATTERNS.values(), ids=BAD_PATTERNS)
def test_bad_patterns_in_torchs_files_are_refused_by_name(
    tmp_path: Path, spoil: Callable[[dict], None], message: str
) -> None:
    state = sparse_state()
    spoil(state)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(SparsePropError, match=message):
        read_checkpoint(str(tmp_path / "bad.pt"))


@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.pt").write_bytes(content)
    with pytest.raises(SparsePropError, match=r"odd\.pt is corrupted, truncated, or no state dict") as error:
        read_checkpoint(str(tmp_path / "odd.pt"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("state", "message"), ODD_STATES.values(), ids=ODD_STATES)
def test_odd_state_dicts_are_refused(tmp_path: Path, state: object, message: str) -> None:
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(SparsePropError, match=re.escape(message)):
        read_checkpoint(str(tmp_path / "odd.pt"))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_the_prefix_of_data_parallelism_is_dropped(tmp_path: Path, ending: str) -> None:
    save = torch.save if ending == "pt" else save_checkpoint
    for wrapped, names in (
        (nn.DataParallel(nn.Linear(4, 4)), ["weight", "bias"]),
        (nn.ModuleDict({"module": nn.Linear(4, 4), "head": nn.PReLU()}), None),  # just called like that
    ):
        save(wrapped.state_dict(), tmp_path / f"model.{ending}")
        tensors, _ = read_checkpoint(str(tmp_path / f"model.{ending}"))
        assert list(tensors) == (names or list(wrapped.state_dict()))


class Outputs(NamedTuple):
    logits: torch.Tensor
    aux: torch.Tensor


class TwoHeads(SmallResNet):
    """Gives a second output while it trains, as googlenet does."""

    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return Outputs(y, y) if self.training else y


class Maps(SmallResNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[..., None]


class Refuses(SmallResNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise ValueError("Expected more than 1 value per channel")
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TwoHeads, "the model small:8 gives a Outputs while it trains; expected a tensor of (2, 10)"),
        (Maps, "gives (2, 10, 1) while it trains"),
        (Refuses, "cannot train on images of (2, 1, 8, 8): Expected more than 1 value per channel"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[SmallResNet], message: str
) -> None:
    monkeypatch.setattr(models, "SmallResNet", kind)
    with pytest.raises(SparsePropError, match=re.escape(message)):
        finetune(FinetuneConfig(**SMALL, out=str(tmp_path / "run")))
    assert not list(tmp_path.iterdir())


def test_the_trial_of_the_output_changes_nothing() -> None:
    model = build_model(SPEC).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_output(model, SPEC, 2)
    assert same_tensors(before, dict(model.state_dict()))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


def as_is(model: nn.Module) -> nn.Module:
    return model


def pruned(model: nn.Module) -> nn.Module:
    for layer in prunable_layers(model, num_classes=0).values():
        prune.l1_unstructured(layer, "weight", 0.9)
    return model


def sparse(model: nn.Module) -> nn.Module:
    return sparseprop.swap_modules(pruned(model), min_sparsity=0.5)


def masked(model: nn.Module) -> nn.Module:
    return sparseprop.mask_modules(model, "2:4")


@pytest.mark.parametrize("form", [as_is, pruned, sparse, masked])
@pytest.mark.parametrize("guess", [7, 10, 1000])
def test_a_checkpoint_tells_its_classes_in_every_form(
    form: Callable[[nn.Module], nn.Module], guess: int
) -> None:
    model = form(build_model(SPEC))
    assert with_own_classes(dataclasses.replace(SPEC, num_classes=guess), model.state_dict()) == SPEC
    dense, masks = load_model(SPEC, dict(model.state_dict()), where="here")
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(dense.eval()(x), model.eval()(x))
    assert bool(masks["head"].all()) is (form is as_is)


def test_only_the_built_in_model_pretrains_by_default() -> None:
    def phases(**options: Any) -> list[str]:
        return [phase.name for phase in phases_of(FinetuneConfig(**options), needs_pruning=True)]

    assert phases() == ["pretrain", "prune", "dense", "sparse"]
    for options in ({"model": "p90.safetensors"}, {"model": "resnet18"}, {"data": "pets"}, {"source": None}):
        assert phases(**options) == ["prune", "dense", "sparse"]
    assert phases(model="p90.safetensors", source="mnist5k")[0] == "pretrain"


def test_a_pruned_checkpoint_keeps_its_sparsity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_TIMING_S", 0.05)
    monkeypatch.setattr(report, "_measured", lambda plan, *_: plan)
    save_checkpoint(
        pruned(build_model(dataclasses.replace(SPEC, num_classes=10))), tmp_path / "p.safetensors"
    )
    options = {key: value for key, value in SMALL.items() if key != "source"}
    options |= {"model": str(tmp_path / "p.safetensors"), "arch": "small:8", "out": str(tmp_path / "run")}
    news: list[Progress] = []
    finetune(FinetuneConfig(**options), progress=news.append)
    assert list(dict.fromkeys(item.phase for item in news)) == ["dense", "sparse", "report"]
