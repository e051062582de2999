"""Images: data sets, splits and transforms.

The test set is what the data set calls so (digits: a fifth, stratified) and is used once, at the end. Validation
images are taken from the training images, stratified, and are the same for every row whatever its seed, so that no
row is chosen by images on which its ancestor was trained.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_dataset, create_transform
from torchvision import transforms

from vitopt.recipe import Augment, Data, InputError

NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "mnist": 10, "kmnist": 10, "fashion_mnist": 10}
SPLIT_SEED = 0


@dataclass(frozen=True)
class Splits:
    """Each item is (float tensor of (C, H, W), class index). Only `train` is augmented."""
    train: torch.utils.data.Dataset
    calibration: torch.utils.data.Dataset  # the training images as they are, in random order, to rank channels on
    validation: torch.utils.data.Dataset
    test: torch.utils.data.Dataset
    classes: list[str]
    workers: int  # processes that decode images beside each training process


class Images(torch.utils.data.Dataset):
    """The images of `source` at `indices`, in the mode and through the transform given."""

    def __init__(self, source, indices, mode: str, transform: Callable):
        self.source, self.indices, self.mode, self.transform = source, indices, mode, transform

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        image, target = self.source[self.indices[index]]
        return self.transform(image.convert(self.mode)), int(target)


def num_classes(section: Data) -> int:
    """Number of classes, without reading an image.

    Raises:
        InputError: an image folder is not there or its two parts do not have the same classes.
    """
    return NUM_CLASSES.get(section.name) or len(_class_folders(section))


def load(section: Data, size: dict, augment: Augment = Augment()) -> Splits:
    """Load the three splits.

    Args:
        section: which images.
        size: `architecture["input"]` of the model that will see them.
        augment: what is done to the training images.

    Raises:
        InputError: the images are not there, or too few to split.
    """
    if section.name == "digits":
        train = test = _digits()
        train_indices, test_indices = _stratified(section, _targets(train), 0.2, range(len(train)))
    else:
        train, test = (_torchvision(section, split) for split in ("train", "test"))
        train_indices, test_indices = range(len(train)), range(len(test))
    train_targets = _targets(train)
    if section.limit:
        train_indices = _limited(section, train_targets, train_indices)
        test_indices = _limited(section, _targets(test), test_indices)
    train_indices, validation_indices = _stratified(section, train_targets, section.validation, train_indices)
    mode = {1: "L", 3: "RGB"}.get(size["channels"])
    if mode is None:
        raise InputError(f"model.in_chans: {size['channels']}: images have 1 channel or 3: take one of these")
    plain = create_transform(
        (size["channels"], size["height"], size["width"]), interpolation=size["interpolation"],
        mean=size["mean"], std=size["std"], crop_pct=size["crop_pct"])
    return Splits(
        train=Images(train, train_indices, mode, _augmenting(size, augment)),
        calibration=Images(train, train_indices, mode, plain),
        validation=Images(train, validation_indices, mode, plain),
        test=Images(test, test_indices, mode, plain),
        classes=[str(name) for name in train.classes],
        workers=_workers(section),
    )


def _workers(section: Data) -> int:
    """The recipe's number, else this process's share of the cores; digits are decoded already and need none."""
    if section.workers is not None or section.name == "digits":
        return section.workers or 0
    return min(16, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _augmenting(size: dict, augment: Augment) -> Callable:
    """timm's training transform, with a shift instead of timm's resized crop where the recipe says so."""
    hw = (size["height"], size["width"])
    first, second, last = create_transform(
        (size["channels"], *hw), is_training=True, separate=True, interpolation=size["interpolation"],
        mean=size["mean"], std=size["std"], scale=(augment.scale, 1.0), hflip=augment.hflip, color_jitter=None,
        auto_augment=augment.auto_augment, re_prob=augment.random_erasing)
    if augment.crop != "resized":
        resize = transforms.Resize(max(hw), transforms.InterpolationMode(size["interpolation"]))
        steps = [resize, transforms.CenterCrop(hw)]  # the aspect ratio stays, as it does in the test
        if augment.crop == "pad":
            steps.append(transforms.RandomCrop(hw, padding=augment.padding))
        first = transforms.Compose([*steps, transforms.RandomHorizontalFlip(augment.hflip)])
    return transforms.Compose([first, second, last])


def _digits():
    """scikit-learn's 1,797 handwritten digits: 8 by 8 grey images, here stretched from 0…16 to 0…255."""
    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)
    source = _Pairs((Image.fromarray(image), int(target)) for image, target in zip(images, bunch.target))
    source.targets, source.classes = bunch.target.tolist(), [str(name) for name in bunch.target_names]
    return source


class _Pairs(list):
    """A list of (image, target) that can carry `targets` and `classes` as torchvision's data sets do."""


def _torchvision(section: Data, split: str):
    """One part of an image folder, or of a data set that torchvision downloads."""
    if _is_folder(section):
        _class_folders(section)
        try:
            return create_dataset("torch/folder", _part(section, split), search_split=False, loader=_decode)
        except FileNotFoundError as error:  # torchvision: a class without images
            raise InputError(f"data.root: {section.root}: {error}") from error
    root = section.root or "data"
    try:
        return create_dataset(f"torch/{section.name}", root, split=split, download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"data.root: {root}: {section.name} is not there and cannot be downloaded ({error}): connect to the "
            "network, or give data.root=PATH of an image folder with train/<class>/*.jpg and test/<class>/*.jpg"
        ) from error


def _is_folder(section: Data) -> bool:
    return section.name == "folder" or section.root is not None and (Path(section.root) / "train").is_dir()


def _part(section: Data, split: str) -> Path:
    """The folder of a split; ImageNet and others call the images kept for the end `val`."""
    root = Path(section.root or ".")
    names = ("train",) if split == "train" else ("test", "val", "validation")
    return next((root / name for name in names if (root / name).is_dir()), root / names[0])


def _class_folders(section: Data) -> list[str]:
    """Names of the classes of an image folder, the same for both of its parts."""
    if not section.root:
        raise InputError("data.root: is missing: give the path of an image folder with train and test")
    found = {}
    for split in ("train", "test"):
        part = _part(section, split)
        if not part.is_dir():
            raise InputError(f"data.root: {section.root}: has no folder {part.name}: "
                             "give an image folder with train/<class>/*.jpg and test/<class>/*.jpg")
        found[split] = sorted(entry.name for entry in part.iterdir() if entry.is_dir())
    if differing := sorted(set(found["train"]) ^ set(found["test"])):
        raise InputError(f"data.root: {section.root}: train and test must hold the same classes; "
                         f"only one of them has {', '.join(differing[:5])}")
    if len(found["train"]) < 2:
        raise InputError(f"data.root: {section.root}: fewer than two classes: give one folder a class")
    expected = NUM_CLASSES.get(section.name)
    if expected and len(found["train"]) != expected:
        raise InputError(f"data.root: {section.root}: holds {len(found['train'])} classes and {section.name} has "
                         f"{expected}: write data.name: folder for images of your own")
    return found["train"]


def _decode(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise InputError(f"{path}: this image does not decode ({error}): mend or remove it") from error


def _targets(source) -> np.ndarray:
    return np.asarray(source.targets)


def _limited(section: Data, targets: np.ndarray, indices) -> list[int]:
    """At most `limit` of these indices, stratified."""
    if section.limit >= len(indices):
        return list(indices)
    return _stratified(section, targets, len(indices) - section.limit, indices)[0]


def _stratified(section: Data, targets: np.ndarray, apart: float | int, indices) -> tuple[list[int], list[int]]:
    """Split indices in two, the second of the share or number `apart`, each class in proportion."""
    indices = list(indices)
    try:
        return train_test_split(indices, test_size=apart, stratify=targets[indices], random_state=SPLIT_SEED)
    except ValueError as error:
        raise InputError(f"data: {section.name}: {len(indices)} images cannot be split by class ({error}): "
                         "take a larger data.limit or more images a class") from error


def check_policy(augment: Augment) -> list[str]:
    """What is wrong with an augmentation policy of timm."""
    try:
        create_transform(8, is_training=True, auto_augment=augment.auto_augment)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        return [f"train.augment.auto_augment: {augment.auto_augment}: timm does not know this policy "
                f"({type(error).__name__} {error}): such as rand-m9-mstd0.5-inc1, original, v0 or augmix-m5-w4-d2"]
    return []
