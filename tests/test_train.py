"""A job from configuration to result: schedules, masks, phases, files, and what is refused at once."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseprop
from job_cases import REFUSED_OPTIONS, image_folder, small_job
from sparseprop import SwapPlan
from sparseprop.checkpoint import load_checkpoint
from sparseprop.data import load_data
from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLayer
from sparseprop.swap.machines import INTEL
from sparseprop.train import FinetuneConfig, ModelSpec, Progress, build_model, finetune, report, swapping
from sparseprop.train.loop import make_optimizer, rate_at
from sparseprop.train.phases import phases_of
from sparseprop.train.prune import CubicSchedule, magnitude_masks, prunable_layers


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_TIMING_S", 0.05)
    monkeypatch.setattr(report, "_measured", lambda plan, *_: plan)


@pytest.mark.parametrize(("options", "message"), REFUSED_OPTIONS)
def test_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsePropError) as error:
        FinetuneConfig(**options)
    assert message in str(error.value)


def test_config_survives_json_and_refuses_other_json() -> None:
    config = FinetuneConfig(sparsity=0.95, threads=2)
    assert FinetuneConfig.from_json(config.to_json()) == config
    for text in ("{", "[]", '{"colour": 1}', "3"):
        with pytest.raises(SparsePropError, match="is not the configuration of a run"):
            FinetuneConfig.from_json(text)


def test_sparsity_schedule_is_cubic_and_monotone() -> None:
    schedule = CubicSchedule(initial=0.2, final=0.9, ramp=60, every=3)
    course = [schedule.at(step) for step in range(80)]
    assert course[0] == pytest.approx(0.2)
    assert course[30] == pytest.approx(0.9 - 0.7 * 0.5**3)
    assert course[60:] == [0.9] * 20
    assert course == sorted(course)
    changes = [step for step in range(1, 80) if course[step] != course[step - 1]]
    assert changes == [step for step in range(80) if schedule.is_event(step)]


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [rate_at(step, 200, 0.1) for step in range(200)]
    assert max(rates) == rates[9] == 0.1
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_have_exact_counts_and_stay_monotone(scope: str) -> None:
    weights = {"a": torch.randn(13, 7), "b": torch.randn(31, 5)}
    masks = magnitude_masks(weights, 0.0, scope=scope)
    for sparsity in (0.3, 0.77, 0.9):
        tighter = magnitude_masks(weights, sparsity, scope=scope, masks=masks)
        assert all((masks[name] | ~tighter[name]).all() for name in weights)
        kept = sum(int(mask.sum()) for mask in tighter.values())
        exact = [round(round(1 - sparsity, 12) * n) for n in ((246,) if scope == "global" else (91, 155))]
        assert kept == sum(exact)
        masks = tighter


def test_kept_weight_of_zero_outranks_pruned_ones() -> None:
    mask = torch.tensor([False, True, True, False])
    kept = magnitude_masks({"w": torch.tensor([0.0, 0.0, 5.0, 0.0])}, 0.5, scope="layer", masks={"w": mask})
    assert kept["w"].tolist() == mask.tolist()


def test_first_layer_classifier_and_depthwise_stay() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4, 10)
    )
    assert list(prunable_layers(model, num_classes=10)) == ["2"]
    with pytest.raises(SparsePropError, match="the model has nothing to prune or swap: 1 plain Linear"):
        prunable_layers(nn.Sequential(nn.Linear(4, 10)), num_classes=10)


def test_phases_give_dense_and_sparse_the_same_training() -> None:
    plain = phases_of(FinetuneConfig(source="none", prune_epochs=3, finetune_epochs=4), needs_pruning=True)
    assert [(p.name, p.parent, p.epochs) for p in plain] == [
        ("prune", "start", 3),
        ("dense", "start", 7),
        ("sparse", "prune", 4),
    ]
    pruned = phases_of(FinetuneConfig(source="none", finetune_epochs=4), needs_pruning=False)
    assert [(p.name, p.parent, p.epochs) for p in pruned] == [("dense", "start", 4), ("sparse", "start", 4)]


def test_weight_decay_reaches_sparse_values_but_no_bias_or_norm() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[0].weight.data[:, :6] = 0
    model = sparseprop.swap_modules(model, min_sparsity=0.5)
    decayed, kept = make_optimizer(FinetuneConfig(), model).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(16,)]
    assert len(kept["params"]) == 3
    decayed, kept = make_optimizer(FinetuneConfig(), nn.MultiheadAttention(8, 2)).param_groups
    assert [p.dim() for p in (*decayed["params"], *kept["params"])] == [2, 2, 1, 1]


def test_job_writes_a_whole_run_folder(tmp_path: Path) -> None:
    news: list[Progress] = []
    result = finetune(small_job(tmp_path / "run", plots=True), progress=news.append)
    found = {path.name for path in result.folder.iterdir()}
    assert found >= {"config.json", "metrics.jsonl", "model.safetensors", "plan.json", "result.json"}
    for name in ("training", "step_time", "layers"):
        assert (result.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((result.folder / "result.json").read_text())
    assert written["accuracy"]["sparse"] == result.accuracy_sparse
    assert written["step_ms"]["sparse"] > 0
    assert written["step_ms"]["dense"] == min(
        written["step_ms"]["dense_nchw"], written["step_ms"]["dense_channels_last"]
    )
    assert written["parameter_bytes"]["sparse"] < written["parameter_bytes"]["dense"]
    assert written["sparsity"]["of_swapped_layers"] == pytest.approx(0.9, abs=0.002)
    assert [layer["name"] for layer in written["layers"]] == [layer.name for layer in result.plan]
    assert {item.phase for item in news} == {"prune", "dense", "sparse", "report"}
    assert not [path for path in result.folder.rglob("*") if path.suffix == ".tmp"]


def test_saved_model_is_sparse_and_gives_the_reported_accuracy(tmp_path: Path) -> None:
    result = finetune(small_job(tmp_path / "run"))
    state = load_checkpoint(tmp_path / "run" / "model.safetensors").state_dict
    model = sparseprop.swap_like(build_model(ModelSpec("small:8", 10, 1, 8)), state)
    model.load_state_dict(state)
    sparse = [module for module in model.modules() if isinstance(module, SparseLayer)]
    assert len(sparse) == len(result.plan.sparse_names) == 8
    test = load_data("digits", image_size=8, channels=1).test
    model.eval()
    with torch.no_grad():
        right = model(test.fetch(torch.arange(len(test.labels)))).argmax(1) == test.labels
    assert right.float().mean().item() == pytest.approx(result.accuracy_sparse)


@pytest.mark.parametrize("fuse", [True, False])
def test_sparse_model_is_fused_if_wanted_and_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuse: bool
) -> None:
    fused, original = [], sparseprop.fuse
    monkeypatch.setattr(sparseprop, "fuse", lambda model: fused.append(original(model)) or fused[-1])
    result = finetune(small_job(tmp_path / "run", fuse=fuse))
    assert bool(fused) == fuse
    monkeypatch.undo()
    other = finetune(small_job(tmp_path / "other", fuse=not fuse))
    assert result.accuracy_sparse == pytest.approx(other.accuracy_sparse, abs=0.02)


def test_a_plan_for_channels_last_images_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = swapping.planned

    def planned(*args: Any) -> SwapPlan:
        return dataclasses.replace(plan(*args), layout="channels_last")

    swapped, original = [], sparseprop.fuse
    monkeypatch.setattr(sparseprop, "fuse", lambda model: swapped.append(original(model)) or swapped[-1])
    with monkeypatch.context() as patch:
        patch.setattr(swapping, "planned", planned)
        result = finetune(small_job(tmp_path / "run"))
    dense = [module for module in swapped[0].modules() if isinstance(module, nn.Conv2d)]
    assert dense
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in dense)
    other = finetune(small_job(tmp_path / "other"))
    assert result.accuracy_sparse == pytest.approx(other.accuracy_sparse, abs=0.02)


def test_layers_too_dense_for_a_swap_keep_their_zeros(tmp_path: Path) -> None:
    job = small_job(tmp_path / "run", scope="global", sparsity=0.6, min_sparsity=0.6)
    result = finetune(job)
    dense = [layer.name for layer in result.plan if layer.choice == "dense" and layer.sparsity]
    assert dense
    state = load_checkpoint(tmp_path / "run" / "model.safetensors").state_dict
    for name in dense:
        zeros = (state[f"{name}.weight"] == 0).float().mean().item()
        assert zeros == pytest.approx(result.plan[name].sparsity)


def test_a_run_folder_is_a_model_and_pruned_once(tmp_path: Path) -> None:
    first = finetune(small_job(tmp_path / "a"))
    news: list[Progress] = []
    second = finetune(small_job(tmp_path / "b", model=str(tmp_path / "a")), progress=news.append)
    assert {item.phase for item in news} == {"dense", "sparse", "report"}
    assert second.plan.sparse_names == first.plan.sparse_names
    assert second.accuracy_sparse > first.accuracy_sparse - 0.05


def test_pretraining_on_other_data_and_another_number_of_classes(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "pets", count=5, classes=("cat", "cow", "dog"))
    job = small_job(tmp_path / "run", source="digits", data=str(data), pretrain_epochs=1)
    news: list[Progress] = []
    result = finetune(job, progress=news.append)
    assert list(dict.fromkeys(item.phase for item in news))[:4] == ["pretrain", "prune", "dense", "sparse"]
    state = load_checkpoint(result.folder / "model.safetensors").state_dict
    assert state["head.weight"].shape[0] == 3


@pytest.mark.parametrize("masked", [False, True])
def test_state_dict_of_torch_is_a_model(tmp_path: Path, masked: bool) -> None:
    model = build_model(ModelSpec("small:8", 10, 1, 8))
    if masked:
        for layer in prunable_layers(model, num_classes=10).values():
            prune.l1_unstructured(layer, "weight", 0.9)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    job = small_job(tmp_path / "run", model=str(tmp_path / "model.pt"), arch="small:8")
    news: list[Progress] = []
    finetune(job, progress=news.append)
    assert ("prune" in {item.phase for item in news}) is not masked


def test_named_timm_model_runs(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    data = image_folder(tmp_path / "pets", count=5)
    changes = {"model": "timm:test_resnet", "image_size": 32, "optimizer": "adamw"}
    job = small_job(tmp_path / "run", data=str(data), **changes)
    assert finetune(job).plan.sparse_names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "smal"}, "unknown model 'smal'; expected small, a timm or torchvision name"),
        ({"model": "torchvision:resnet5"}, "did you mean resnet50"),
        ({"model": "keras:resnet50"}, "unknown model library 'keras'"),
        ({"model": "nowhere.safetensors"}, "there is no checkpoint nowhere.safetensors"),
        ({"data": "no/such/folder"}, "the data folder no/such/folder is missing"),
        ({"sparsity": 0.1, "min_sparsity": None}, "no layer of the model would become sparse"),
    ],
)
def test_job_that_cannot_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("sparseprop.swap.cost.this_machine", lambda: INTEL)  # dense wins at 10 % there
    with pytest.raises(SparsePropError) as error:
        finetune(small_job(tmp_path / "run", **changes))
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    torch.save(build_model(ModelSpec("small:8", 10, 1, 8)).state_dict(), tmp_path / "model.pt")
    for arch, message in (
        ("small:16", "stem.weight is (8, 1, 5, 5), expected (16, 1, 5, 5)"),
        ("timm:test_resnet", "names differ, such as"),
        (None, "does not say which architecture it holds"),
    ):
        with pytest.raises(SparsePropError) as error:
            finetune(small_job(tmp_path / "run", model=str(tmp_path / "model.pt"), arch=arch))
        assert message in str(error.value)


def test_diverged_loss_is_an_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(SparsePropError, match=r"the loss became (nan|inf).*lower the learning rate"):
        finetune(small_job(tmp_path / "run", lr=1e30))


def test_library_leaves_threads_and_global_generator_alone(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(7)
    expected = torch.Generator().manual_seed(7)
    seen = set()
    finetune(small_job(tmp_path / "run"), progress=lambda _: seen.add(torch.get_num_threads()))
    assert seen == {1}
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
