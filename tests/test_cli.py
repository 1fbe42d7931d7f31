"""The commands: what they print, and that what is wrong is one sentence on stderr and exit status 2."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseprop
from cli_cases import call
from job_cases import image_folder
from sparseprop.checkpoint import save_checkpoint
from sparseprop.swap.machines import INTEL
from sparseprop.train import Progress, loop, report

SMALL = (
    "finetune --model small:8 --source none --image-size 8 --min-sparsity 0.5 --prune-epochs 1 --epochs 1 "
    "--checkpoint-every 4 --threads 1 --no-plots"
)


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "_TIMING_S", 0.05)
    monkeypatch.setattr(report, "_measured", lambda plan, *_: plan)
    monkeypatch.chdir(tmp_path)


def truncated_checkpoint(folder: Path) -> None:
    save_checkpoint(nn.Linear(64, 64), folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def truncated_pickle(folder: Path) -> None:
    torch.save(nn.Linear(64, 64).state_dict(), folder / "model.pt")
    whole = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(whole[: len(whole) // 2])


def pickled_object(folder: Path) -> None:
    torch.save(Progress("x", 1, 2), folder / "model.pt")


def nothing(_: Path) -> None:
    pass


def flat_checkpoint(folder: Path) -> None:
    torch.save(nn.Linear(4, 2).state_dict(), folder / "flat.pt")


def empty_data(folder: Path) -> None:
    (folder / "pets").mkdir()


def used_folder(folder: Path) -> None:
    image_folder(folder / "run")


@pytest.mark.parametrize(
    ("prepare", "command", "message"),
    [
        (nothing, "finetune --model resnet5", "unknown model 'resnet5'; expected small, a timm or"),
        (nothing, "plan resnet5", "did you mean resnet50"),
        (nothing, "finetune --data no/such", "the data folder no/such is missing"),
        (empty_data, "finetune --data pets", "the data folder pets has 0 subfolders; expected one subfolder"),
        (nothing, "finetune --sparsity 1.2", "sparsity must be between 0 and 1, such as 0.9; got 1.2"),
        (nothing, "plan small --sparsity 7", "sparsity must be between 0 and 1, such as 0.9; got 7.0"),
        (nothing, "plan small --batch-size 0", "batch size must be 1 or more; got 0"),
        (nothing, "plan small --image-size 0", "image size must be 1 or more; got 0"),
        (nothing, "plan small --image-size -3", "image size must be 1 or more; got -3"),
        (nothing, "profile small --image-size 0", "image size must be 1 or more; got 0"),
        (nothing, "profile small --threads 0", "threads must be 1 or more; got 0"),
        (nothing, "profile small --threads -2", "threads must be 1 or more; got -2"),
        (nothing, "profile small --threads 99999999999", "threads must be 1024 or fewer; got 99999999999"),
        (nothing, "finetune --threads 99999999999", "threads must be 1024 or fewer; got 99999999999"),
        (nothing, "plan small --batch-size 100000000000", "100000000000 images of 1x28x28 do not fit in"),
        (nothing, f"plan small --batch-size {10**20}", "do not fit in memory; choose a smaller batch size"),
        (nothing, "finetune --batch-size 100000000000", "100000000000 images of 1x28x28 do not fit in"),
        (nothing, f"finetune --out {'x' * 300}", "got a name that is too long; choose a shorter one"),
        (nothing, f"inspect {'x' * 300}.pt", "got a name that is too long; choose a shorter one"),
        (nothing, f"profile small --png {'x' * 246}.png", "has a name of 250 bytes; expected at most 239"),
        (nothing, "profile small --steps 0", "steps must be 1 or more; got 0"),
        (nothing, "profile small --top -1", "top must be 0 or more; got -1"),
        (nothing, "profile small --png no/shot.png", "the folder no is missing; make it first"),
        (empty_data, "profile small --png pets", "the output pets is a folder; expected the name of a file"),
        (nothing, "finetune --sparsity 0.1 --source none", "no layer of the model would become sparse"),
        (nothing, "finetune --model no.safetensors", "there is no checkpoint no.safetensors"),
        (truncated_checkpoint, "finetune --model model.safetensors", "cannot be read"),
        (truncated_checkpoint, "inspect model.safetensors", "It must be a complete safetensors file"),
        (truncated_pickle, "inspect model.pt", "is corrupted, truncated, or no state dict"),
        (pickled_object, "inspect model.pt", "is corrupted, truncated, or no state dict"),
        (truncated_pickle, "plan model.pt --arch small", "is corrupted, truncated, or no state dict"),
        (flat_checkpoint, "plan flat.pt", "does not say which architecture it holds; pass it with --arch"),
        (flat_checkpoint, "plan flat.pt --arch small", "does not fit the architecture small"),
        (nothing, "inspect nowhere.pt", "there is no checkpoint nowhere.pt"),
        (nothing, "finetune --resume nowhere", "nowhere holds no run to resume: it has no config.json"),
        (nothing, "finetune --resume x --lr 1", "got --lr too; drop that"),
        (used_folder, "finetune --out run", "the run folder run exists and is not empty"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Path], None],
    command: str,
    message: str,
) -> None:
    monkeypatch.setattr("sparseprop.swap.cost.this_machine", lambda: INTEL)  # dense wins at 10 % there
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(command)
    assert status == 2
    assert out == ""
    assert err.startswith("sparseprop: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["finetune --speed 9", "plan", "dance"])
def test_wrong_usage_is_status_2(command: str) -> None:
    assert call(command)[0] == 2


def test_finetune_runs_logs_lines_and_sums_up() -> None:
    status, out, err = call(f"{SMALL} --out run")
    assert status == 0
    assert "held-out accuracy" in out
    assert "everything is in run" in out
    phases = ["prune", "dense", "dense", "sparse", "report", "report"]
    assert [line.split()[2] for line in err.splitlines()] == phases
    assert json.loads(Path("run/result.json").read_text())["accuracy"]["sparse"] > 0.2
    status, _, err = call("finetune --resume run")
    assert status == 2
    assert "the run run is finished" in err


def test_run_folder_is_named_after_the_time_by_default() -> None:
    assert call(SMALL)[0] == 0
    assert [path.name[:9] for path in Path("runs").iterdir()] == ["finetune-"]


def test_interrupt_is_status_130_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def interrupted(*args: object) -> float:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return train_step(*args)

    train_step = loop._train_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_step", interrupted)
        status, _, err = call(f"{SMALL} --out run")
    assert status == 130
    assert "stopped; go on with: sparseprop finetune --resume run" in err
    assert call("finetune --resume run")[0] == 0


@pytest.mark.parametrize("write", [1, 2, 3, 5])
def test_full_disk_is_one_sentence_and_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """The n-th file does not fit: half of it is written, then the system says there is no room."""
    count, write_bytes = 0, Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        nonlocal count
        count += 1
        if count < write:
            return write_bytes(path, data)
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        patch.setattr(Path, "write_text", lambda path, text: full(path, text.encode()))
        status, _, err = call(f"{SMALL} --out run")
    assert status == 2
    assert "the disk has no room for it. Free some space" in err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.tmp"))
    if write <= 2:  # not even the beginning could be kept
        assert not list(tmp_path.iterdir())
    else:
        assert call("finetune --resume run")[0] == 0


def test_metrics_on_a_full_disk_keep_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path_open = Path.open

    def full(path: Path, mode: str = "r", **rest: object) -> object:
        file = path_open(path, mode, **rest)
        if mode == "ab" and path.stat().st_size > 300:
            file.write(b'{"kind": ')
            file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        status, _, err = call(f"{SMALL} --out run")
    assert status == 2
    assert "metrics.jsonl' cannot be written: the disk has no room for it" in err
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_plan_prints_a_table_or_json() -> None:
    status, table, _ = call("plan small:32 --sparsity 0.9 --min-sparsity 0.5 --no-measure")
    assert status == 0
    assert "8 of 10 layers become sparse" in table
    _, text, _ = call("plan small:32 --sparsity 0.9 --min-sparsity 0.5 --no-measure --json")
    assert len(sparseprop.SwapPlan.from_json(text).sparse_names) == 8


def test_info_names_isa_threads_and_versions() -> None:
    status, text, _ = call("info --json")
    facts = json.loads(text)
    assert status == 0
    assert facts["isa"] == sparseprop.active_isa()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert any("torch" in path for path in facts["openmp runtimes"])
    _, lines, _ = call("info")
    assert "isas available" in lines


def test_help_of_every_command() -> None:
    for command in ("--help", "finetune --help", "plan --help", "inspect --help", "info --help"):
        assert call(command)[0] == 0
