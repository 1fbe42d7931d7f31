"""State dicts and checkpoint files: round trips, and everything a bad file may hold."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from checkpoint_cases import BAD_PATTERNS, sparse_state
from sparseprop.checkpoint import (
    atomic_write,
    load_checkpoint,
    load_model,
    save_checkpoint,
    swap_like,
)
from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseConv2d
from swap_cases import assert_same_state, small_cnn, small_sparse_cnn


@pytest.mark.parametrize(("spoil", "message"), BAD_PATTERNS.values(), ids=BAD_PATTERNS)
def test_bad_patterns_are_refused_by_name_before_a_kernel_sees_them(tmp_path, spoil, message):
    state = sparse_state()
    spoil(state)
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(SparsePropError, match=message):
        swap_like(model, state)
    assert type(model[0]) is nn.Linear
    save_checkpoint(state, tmp_path / "bad.safetensors")
    with pytest.raises(SparsePropError, match=message):
        load_checkpoint(tmp_path / "bad.safetensors")


def test_a_file_gives_back_what_was_saved(tmp_path):
    model = small_sparse_cnn()
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, metadata={"epoch": "3"})
    checkpoint = load_checkpoint(path)
    assert_same_state(checkpoint.state_dict, model.state_dict())
    assert checkpoint.metadata == {"epoch": "3"}
    assert list(tmp_path.iterdir()) == [path]
    loaded = load_model(small_cnn(), path)
    assert type(loaded[0]) is SparseConv2d
    assert_same_state(loaded.state_dict(), model.state_dict())


def test_dense_and_foreign_files_load_too(tmp_path):
    path = tmp_path / "model.safetensors"
    model = small_cnn()
    safetensors.torch.save_file(model.state_dict(), path)
    assert_same_state(
        dict(sorted(load_checkpoint(path).state_dict.items())), dict(sorted(model.state_dict().items()))
    )
    assert_same_state(load_model(small_cnn(), path).state_dict(), model.state_dict())


def test_tied_strided_and_sliced_tensors_survive_a_file(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "one": shared,
        "two": shared,
        "part": shared[2:4],
        "transposed": torch.arange(6).view(2, 3).T,
        "empty": torch.empty(0, 3),
        "also empty": torch.empty(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "complex": (waves := torch.randn(3, dtype=torch.complex64)),
        "conjugate": waves.conj(),
    }
    path = tmp_path / "model.safetensors"
    save_checkpoint(state, path)
    assert_same_state(load_checkpoint(path).state_dict, state)
    assert path.stat().st_size < 2000


def _truncate(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def _header(path: Path, text: str) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"sparseprop": text})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "There is no checkpoint .*model.safetensors'; check the path"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"\x80\x02}q\x00." * 99), "cannot be read"),
        (lambda path: _truncate(path, 0.05), "cannot be read"),
        (lambda path: _truncate(path, 0.9), "cannot be read: .* It must be a complete safetensors file"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
        (lambda path: _header(path, "{"), "cannot be read"),
        (lambda path: _header(path, "[]"), "cannot be read"),
        (lambda path: _header(path, json.dumps({"shared": {"b": "c"}})), "cannot be read"),
        (lambda path: _header(path, json.dumps({"order": ["c"]})), "cannot be read"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, damage, message):
    path = tmp_path / "model.safetensors"
    save_checkpoint(small_sparse_cnn(), path)
    damage(path)
    with pytest.raises(SparsePropError, match=message):
        load_model(small_cnn(), path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(nn.Sequential(nn.Linear(8, 8)), path)
    with pytest.raises(SparsePropError, match=r"does not fit the model: .*size mismatch"):
        load_model(nn.Sequential(nn.Linear(8, 9)), path)
    with pytest.raises(SparsePropError, match=r"does not fit the model: .*Unexpected key"):
        load_model(nn.Sequential(nn.ReLU()), path)


FULL_DISK = """
import resource, sys, torch
from sparseprop.checkpoint import load_checkpoint, save_checkpoint
from sparseprop import SparsePropError

path = sys.argv[1]
save_checkpoint({"old": torch.ones(3)}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    save_checkpoint({"new": torch.ones(5000)}, path)
except SparsePropError as error:
    print(list(load_checkpoint(path).state_dict), error)
"""


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path):
    path = (
        tmp_path / "model.safetensors"
    )  # in a process of its own: the limit would hit the test's own log too
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("['old'] "), done.stderr
    assert "cannot be written: the disk has no room for it. Free some space" in done.stdout
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_readable_by_others_and_links_are_followed(tmp_path):
    target, link = tmp_path / "run-1.safetensors", tmp_path / "latest.safetensors"
    target.touch()
    link.symlink_to(target)
    save_checkpoint({"a": torch.ones(1)}, link)
    assert link.is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask


FILE = "model.safetensors"
ONE = torch.ones(1)
WHAT_CANNOT_BE_SAVED = {
    "no tensor": ({"a": 3}, FILE, None, "A checkpoint holds tensors, got a int for 'a'"),
    "no name": ({1: ONE}, FILE, None, "holds tensors by name, got 1 for a name; use text"),
    "sparse": (
        {"a": ONE.to_sparse()},
        FILE,
        None,
        "got layout torch.sparse_coo for 'a'; use its .to_dense",
    ),
    "no values": ({"a": ONE.to("meta")}, FILE, None, r"got one without values \(device meta\) for 'a'"),
    "no folder": ({"a": ONE}, f"no/folder/{FILE}", None, "cannot be written: .*No such file"),
    "metadata no text": ({"a": ONE}, FILE, {"epoch": 3}, "metadata must be text by name, got 3 for 'epoch'"),
    "metadata no name": ({"a": ONE}, FILE, {3: "3"}, "metadata must be text by name, got '3' for 3"),
    "metadata ours": ({"a": ONE}, FILE, {"sparseprop": "0"}, "metadata cannot be named 'sparseprop'"),
}


@pytest.mark.parametrize(
    ("state", "name", "metadata", "message"), WHAT_CANNOT_BE_SAVED.values(), ids=WHAT_CANNOT_BE_SAVED
)
def test_what_cannot_be_saved_is_refused(tmp_path, state, name, metadata, message):
    with pytest.raises(SparsePropError, match=message):
        save_checkpoint(state, tmp_path / name, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "metadata", "message"),
    [
        (
            {"a": torch.zeros(2, dtype=torch.complex128)},
            {},
            "cannot hold type torch.complex128, got it for 'a'",
        ),
        ({"a\ud800": torch.zeros(2)}, {}, "cannot hold a tensor named 'a.*rename it"),
        ({"__metadata__": torch.zeros(2)}, {}, "cannot hold a tensor named '__metadata__'"),
        ({"a": torch.zeros(2)}, {"note": "\ud800"}, "metadata must be text"),
    ],
    ids=["type", "name", "reserved name", "text"],
)
def test_what_the_format_has_no_form_for_is_refused(tmp_path, state, metadata, message):
    with pytest.raises(SparsePropError, match=message):
        save_checkpoint(state, tmp_path / "a.safetensors", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_later_format_are_refused(tmp_path):
    header = json.dumps({"format": 99, "shared": {}, "order": []})
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {"sparseprop": header})
    with pytest.raises(SparsePropError, match="has format 99, this version reads 1"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_tied_weights_saved_by_safetensors_itself_load(tmp_path):
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model, path = tied(), tmp_path / "a.safetensors"
    safetensors.torch.save_model(model, str(path))
    loaded = load_model(tied(), path)
    assert_same_state(loaded.state_dict(), model.state_dict())


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(nn.Linear(2, 2), path)
    path.chmod(0o600)
    save_checkpoint(nn.Linear(2, 2), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
