import urllib.error
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vitopt import data
from vitopt.recipe import Augment, Data, InputError

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


@pytest.mark.parametrize("workers, memory", [(0, 0), (1, 0), (0, 10 ** 9)])
def test_an_image_that_does_not_decode_is_named_also_from_a_worker(folder, monkeypatch, workers, memory):
    broken = folder / "test" / "dog" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(InputError) as error:  # whether images are decoded once or as they are asked for
        monkeypatch.setattr(data, "MEMORY_BYTES", memory)
        splits = data.load(Data(name="folder", root=str(folder)), COLOUR)
        list(DataLoader(splits.test, batch_size=4, num_workers=workers))
    assert error.value.problems[0].splitlines()[-1].endswith("mend or remove it")
    assert f"{broken}: this image does not decode" in error.value.problems[0]


def remove_class(folder):
    for image in (folder / "test" / "emu").iterdir():
        image.unlink()
    (folder / "test" / "emu").rmdir()


def empty_class(folder):
    for image in (folder / "train" / "emu").iterdir():
        image.unlink()


def remove_test(folder):
    (folder / "test").rename(folder / "tset")


@pytest.mark.parametrize("harm, expected", [
    (remove_class, "the same classes; only one of them has emu"),
    (empty_class, "emu"),
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
