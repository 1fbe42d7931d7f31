"""The files of a run and of others: whose note it is, and runs whose files were edited or damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from job_cases import small_job
from sparseprop.errors import SparsePropError
from sparseprop.train import Progress, finetune, resume
from sparseprop.train.checkpoint import load_tensors, save_tensors


class Killed(BaseException):
    """Stands for a kill; nothing in the package may catch it."""


def stop(news: Progress) -> None:
    if (news.phase, news.step) == ("prune", 7):
        raise Killed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run stopped in the middle of its first phase, with a checkpoint."""
    with pytest.raises(Killed):
        finetune(small_job(tmp_path / "run"), progress=stop)
    return tmp_path / "run"


def edit(run: Path, **changes: Any) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("text", ["12345", '"abc"', "nightly", "[1]", '{"user": "me"}', "null", "[" * 9999])
def test_the_note_of_somebody_else_is_ignored(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"job": text})
    tensors, note = load_tensors(path)
    assert list(tensors) == ["a"]
    assert note == {}


def test_our_own_note_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {"step": 3})
    assert load_tensors(path)[1]["step"] == 3
    path.write_bytes(path.read_bytes().replace(b'step\\": 3', b'step\\": x'))
    with pytest.raises(SparsePropError, match="its checksum does not fit"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer", "adamw"), ("model", "small:16"), ("data", "mnist5k"), ("batch_size", 64), ("seed", 1)],
)
def test_a_run_whose_configuration_was_edited_does_not_go_on(run: Path, name: str, value: Any) -> None:
    before = json.loads((run / "config.json").read_text())[name]
    edit(run, **{name: value})
    message = rf"^{name} in .*config.json was changed since the run began \({before} then, {value} now\); put"
    with pytest.raises(SparsePropError, match=message):
        resume(run)
    edit(run, **{name: before})
    with pytest.raises(Killed):
        resume(run, progress=stop)


def test_what_changes_no_result_may_be_edited(run: Path) -> None:
    edit(run, threads=2, checkpoint_every=3, plots=True)
    with pytest.raises(Killed):
        resume(run.rename(run.with_name("moved")), progress=stop)


def test_runs_from_before_the_configuration_was_noted_go_on(run: Path) -> None:
    path = run / "phases" / "start.safetensors"
    tensors, note = load_tensors(path)
    save_tensors(path, tensors, {"spec": note["spec"]})
    edit(run, label_smoothing=0.1)
    with pytest.raises(Killed):
        resume(run, progress=stop)


@pytest.mark.parametrize("damage", ["latin-1", "folder"])
def test_unreadable_metrics_are_one_sentence(run: Path, damage: str) -> None:
    path = run / "metrics.jsonl"
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(b"\xe9" + path.read_bytes())
    with pytest.raises(SparsePropError, match=r"metrics\.jsonl cannot be read: .*; restore it from a copy"):
        resume(run)


def test_a_truncated_checkpoint_may_be_deleted(run: Path) -> None:
    path = run / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SparsePropError, match=r"or delete it, and the phase prune starts anew$"):
        resume(run)
    path.unlink()
    steps: list[int] = []

    def watch(news: Progress) -> None:
        steps.append(news.step)
        stop(news)

    with pytest.raises(Killed):
        resume(run, progress=watch)
    assert steps[0] == 1
