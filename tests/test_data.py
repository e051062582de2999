import urllib.error
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vitopt import data
from vitopt.errors import InputError
from vitopt.recipe import Augment, Data

GREY = {"channels": 1, "height": 16, "width": 16, "mean": [0.5], "std": [0.5], "interpolation": "bicubic",
        "crop_pct": 1.0}
COLOUR = GREY | {"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture
def folder(tmp_path):
    """An image folder of three classes, 20 and 6 images each, of different sizes; class c is of brightness 80 · c."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for c, name in enumerate(("cat", "dog", "emu")):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((12 + index, 15, 3), 80 * c) + generator.integers(0, 10, (12 + index, 15, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / name / f"{index}.jpg")
    return tmp_path


def test_digits_are_split_by_class_into_three_parts_that_share_no_image():
    splits = data.load(Data(name="digits"), GREY)
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [1293, 144, 360]
    assert sorted(index for part in parts for index in part.indices) == list(range(1797))
    for part in parts:
        counts = Counter(part.source.targets[index] for index in part.indices)
        assert max(counts.values()) - min(counts.values()) <= 0.15 * len(part) / 10


def test_the_split_is_the_same_each_time_and_whatever_the_limit_leaves_stays_out_of_the_test():
    first, second = (data.load(Data(name="digits"), GREY) for _ in range(2))
    assert first.validation.indices == second.validation.indices and first.train.indices == second.train.indices
    limited = data.load(Data(name="digits", limit=100), GREY)
    assert len(limited.train) + len(limited.validation) == 100 and len(limited.test) == 100
    assert set(limited.test.indices) <= set(first.test.indices)


def test_an_image_folder_is_read_in_the_models_mode_size_and_range(folder):
    for size in (GREY, COLOUR):
        splits = data.load(Data(name="folder", root=str(folder)), size, Augment(crop="pad", padding=2, hflip=0.5))
        assert splits.classes == ["cat", "dog", "emu"] and data.num_classes(Data(name="folder", root=str(folder))) == 3
        for part in (splits.train, splits.validation, splits.test):
            image, target = part[0]
            assert image.shape == (size["channels"], 16, 16) and -1 <= image.min() and image.max() <= 1
        for image, target in splits.test:
            assert abs((image.mean().item() + 1) / 2 * 255 - 80 * target) < 12


def test_a_folder_in_the_place_of_a_known_data_set_is_read_instead_of_a_download(folder):
    with pytest.raises(InputError, match="holds 3 classes and cifar10 has 10: write data.name: folder"):
        data.load(Data(name="cifar10", root=str(folder)), COLOUR)


@pytest.fixture
def large_folder(tmp_path):
    """An image folder of two classes; training, validation and test have 120 images each, all of them different."""
    for split, count in (("train", 120), ("test", 60)):
        for c, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(np.full((4, 4), 2 * index + c, np.uint8)).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def truncated(path):
    path.write_bytes(path.read_bytes()[:40])


def wrong_checksum(path):
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAt"))


def no_image(path):
    path.write_bytes(b"<html>404</html>")


def empty(path):
    path.write_bytes(b"")


def far_too_large(path):
    path.write_bytes(path.read_bytes()[:16] + 2 * (10 ** 6).to_bytes(4, "big") + path.read_bytes()[24:])


def load_halved(folder):
    """The splits of `large_folder`, and the files of each."""
    splits = data.load(Data(name="folder", root=str(folder), validation=0.5, workers=0), GREY)
    return splits, {name: [getattr(splits, name).path(position) for position in range(len(getattr(splits, name)))]
                    for name in ("train", "validation", "test")}


@pytest.mark.parametrize("harm", [truncated, wrong_checksum, no_image, empty, far_too_large])
@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_corrupt_image_among_a_hundred_is_left_out_of_its_part_and_said(large_folder, capsys, harm, part):
    _, files = load_halved(large_folder)
    assert capsys.readouterr().out == ""
    broken = files[part][7]
    harm(Path(broken))
    splits, left = load_halved(large_folder)
    for name in files:
        assert left[name] == [file for file in files[name] if file != broken]
        assert len(getattr(splits, name).pixels) == len(getattr(splits, name).targets) == len(left[name])
    called = {"train": "training"}.get(part, part)
    said = capsys.readouterr().out
    assert said.startswith(f"  left out: 1 of the 120 {called} images do not decode: {broken} (")
    assert said.count("\n") == 1
    for name in files:  # each image has kept its own class and pixels
        for position, file in enumerate(left[name]):
            assert getattr(splits, name).targets[position] == (Path(file).parent.name == "dog")
            assert (getattr(splits, name).pixels[position] == np.asarray(Image.open(file))[0, 0]).all()


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_more_than_one_corrupt_image_in_a_hundred_are_an_error_with_their_count_and_paths(large_folder, part):
    _, files = load_halved(large_folder)
    broken = sorted(files[part][:5])
    for file in broken:
        empty(Path(file))
    with pytest.raises(InputError) as error:
        load_halved(large_folder)
    called = {"train": "training"}.get(part, part)
    problem, = error.value.problems
    assert problem.startswith(f"data: 5 of the 120 {called} images do not decode: {', '.join(broken[:3])}, … (")
    assert problem.endswith(", which is more than 1 %: mend or remove them")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_single_corrupt_image_that_is_asked_for_is_named_also_from_a_worker(folder, monkeypatch, workers):
    monkeypatch.setattr(data, "MEMORY_BYTES", 0)
    broken = folder / "test" / "dog" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    splits = data.load(Data(name="folder", root=str(folder)), COLOUR)
    with pytest.raises(InputError) as error:
        list(DataLoader(splits.test, batch_size=4, num_workers=workers))
    assert f"{broken}: this image does not decode" in error.value.problems[0]
    assert error.value.problems[0].splitlines()[-1].endswith("mend or remove it")


def empty_class(folder, part="train"):
    for image in (folder / part / "emu").iterdir():
        image.unlink()


def empty_class_of_the_test(folder):
    empty_class(folder, "test")


def remove_class(folder):
    empty_class(folder, "test")
    (folder / "test" / "emu").rmdir()


def remove_test(folder):
    (folder / "test").rename(folder / "tset")


@pytest.mark.parametrize("harm, expected", [
    (remove_class, "the same classes; only one of them has emu"),
    (empty_class, "Found no valid file for the classes emu"),
    (empty_class_of_the_test, "Found no valid file for the classes emu"),
    (remove_test, "has no folder test"),
])
def test_a_folder_that_is_not_whole_is_an_error_that_says_where(folder, harm, expected):
    harm(folder)
    with pytest.raises(InputError, match=expected) as error:
        data.load(Data(name="folder", root=str(folder)), COLOUR)
    assert str(folder) in str(error.value)


def test_too_few_images_to_split_by_class_is_an_error(folder):
    with pytest.raises(InputError, match="cannot be split by class"):
        data.load(Data(name="folder", root=str(folder), limit=2), COLOUR)


def test_no_network_is_an_error_that_shows_the_other_way(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(data, "create_dataset", unreachable)
    with pytest.raises(InputError, match="cifar10 is not there and cannot be downloaded .* data.root=PATH"):
        data.load(Data(name="cifar10", root=str(tmp_path / "none")), COLOUR)


def test_augmentation_changes_training_images_and_no_others():
    augment = Augment(crop="resized", scale=0.3, hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    splits = data.load(Data(name="digits"), GREY, augment)
    assert any(not torch.equal(splits.train[0][0], splits.train[0][0]) for _ in range(5))
    assert all(torch.equal(splits.validation[i][0], splits.validation[i][0]) for i in range(20))
    assert all(torch.equal(splits.test[i][0], splits.test[i][0]) for i in range(20))
    plain = data.load(Data(name="digits"), GREY)
    assert all(torch.equal(plain.train[i][0], splits.calibration[i][0]) for i in range(20))


def test_training_images_without_augmentation_are_the_calibration_images_whatever_their_shape(folder):
    splits = data.load(Data(name="folder", root=str(folder)), COLOUR)
    assert {image.size for image, _ in splits.train.source} != {(15, 15)}
    for index in range(len(splits.train)):
        assert torch.equal(splits.train[index][0], splits.calibration[index][0])


def test_every_image_survives_the_strongest_policy():
    augment = Augment(auto_augment="rand-m10-n5-inc1")
    splits = data.load(Data(name="digits"), COLOUR, augment)
    for index in range(300):
        assert splits.train[index][0].isfinite().all()


@pytest.mark.parametrize("policy, known", [
    ("rand-m9-mstd0.5-inc1", True), ("original", True), ("augmix-m5-w4-d2", True),
    ("trivial", False), ("rand-q9", False),
])
def test_an_unknown_policy_is_found_before_training(policy, known):
    assert bool(data.check_policy(Augment(auto_augment=policy))) is not known
