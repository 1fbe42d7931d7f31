"""A job that is killed anywhere and resumed ends bit for bit like one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sparseprop
import sparseprop.checkpoint as files
from job_cases import same_tensors, small_job
from sparseprop.checkpoint import load_checkpoint
from sparseprop.errors import SparsePropError
from sparseprop.train import FinetuneResult, Progress, finetune, report, resume


class Killed(BaseException):
    """Stands for a kill; nothing in the package may catch it."""


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_TIMING_S", 0.05)
    monkeypatch.setattr(report, "_measured", lambda plan, *_: plan)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """The run nobody interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_TIMING_S", 0.05)
        patch.setattr(report, "_measured", lambda plan, *_: plan)
        return finetune(small_job(tmp_path_factory.mktemp("whole") / "run"))


def kill_at(phase: str, step: int) -> Callable[[Progress], None]:
    def watch(news: Progress) -> None:
        if (news.phase, news.step) == (phase, step):
            raise Killed

    return watch


def assert_same_end(whole: FinetuneResult, folder: Path) -> None:
    ours, theirs = (load_checkpoint(path / "model.safetensors").state_dict for path in (folder, whole.folder))
    assert same_tensors(ours, theirs)
    for name in ("metrics.jsonl", "plan.json"):
        assert (folder / name).read_text() == (whole.folder / name).read_text()
    one, other = (json.loads((path / "result.json").read_text()) for path in (folder, whole.folder))
    for key in ("accuracy", "sparsity", "parameter_bytes"):
        assert one[key] == other[key]
    assert not list(folder.rglob(".*.tmp"))


# prune runs 9 steps and checkpoints after 4 and 8; the dense phase runs 18
@pytest.mark.parametrize(
    "places",
    [
        [("prune", 1)],
        [("prune", 6)],
        [("prune", 9)],
        [("dense", 3), ("dense", 17)],
        [("sparse", 1)],
        [("prune", 5), ("dense", 5), ("sparse", 7)],
        [("report", 0)],
    ],
)
def test_killed_between_steps(whole: FinetuneResult, tmp_path: Path, places: list[tuple[str, int]]) -> None:
    with pytest.raises(Killed):
        finetune(small_job(tmp_path / "run"), progress=kill_at(*places[0]))
    for place in places[1:]:
        with pytest.raises(Killed):
            resume(tmp_path / "run", progress=kill_at(*place))
    resume(tmp_path / "run")
    assert_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("write", range(3, 16, 3))
def test_killed_while_a_file_is_written(
    whole: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """The n-th file to be flushed is cut in half and stays behind, as a kill would leave it."""
    count, flush = 0, files._flush

    def killing(path: Path) -> None:
        nonlocal count
        count += path.is_file()
        if count == write:
            half = path.read_bytes()[: path.stat().st_size // 2]
            path.with_name(f".half.{os.getpid()}.tmp").write_bytes(half)
            raise Killed
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", killing)
        with pytest.raises(Killed):
            finetune(small_job(tmp_path / "run"))
    resume(tmp_path / "run")
    assert_same_end(whole, tmp_path / "run")


_KILL_IN_CHECKPOINT = """
import os, signal, sys
import sparseprop.checkpoint as files
from sparseprop.cli import main
flush, count = files._flush, 0
def killing(path):
    global count
    count += path.name.startswith(".checkpoint")
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)
files._flush = killing
sys.argv[0] = "sparseprop"
main()
"""


def test_killed_by_signal_in_the_middle_of_a_checkpoint(whole: FinetuneResult, tmp_path: Path) -> None:
    options = "--model small:8 --source none --image-size 8 --min-sparsity 0.5 --prune-epochs 1 --epochs 1"
    options += " --checkpoint-every 4 --threads 1 --no-plots --out run"
    command = [sys.executable, "-c", _KILL_IN_CHECKPOINT, "finetune", *options.split()]
    package = Path(sparseprop.__file__).parents[1]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert list((tmp_path / "run").glob(".checkpoint*.tmp"))
    resume(tmp_path / "run")
    assert_same_end(whole, tmp_path / "run")


def test_resume_needs_a_run_that_is_not_finished(whole: FinetuneResult, tmp_path: Path) -> None:
    for folder, message in (
        (tmp_path, "holds no run to resume: it has no config.json"),
        (tmp_path / "nowhere", "holds no run to resume"),
        (whole.folder, "is finished: it has a result.json; start a new run instead"),
    ):
        with pytest.raises(SparsePropError, match=message):
            resume(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "cannot be read"),
        ("flip", "checksum"),
        ("config", "is not the configuration of a run"),
        ("encoding", "is not the configuration of a run: 'utf-8' codec can't decode"),
    ],
)
def test_damaged_run_is_refused(tmp_path: Path, damage: str, message: str) -> None:
    with pytest.raises(Killed):
        finetune(small_job(tmp_path / "run"), progress=kill_at("prune", 7))
    in_config = damage in ("config", "encoding")
    path = tmp_path / "run" / ("config.json" if in_config else "checkpoint.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    elif damage == "encoding":
        content[9] = 0xE9  # an accent in Latin-1
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)
    with pytest.raises(SparsePropError, match=message):
        resume(tmp_path / "run")


def test_new_run_refuses_a_used_folder(whole: FinetuneResult, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    with pytest.raises(SparsePropError, match="exists and is not empty; choose another or resume that run"):
        finetune(small_job(tmp_path / "run"))
