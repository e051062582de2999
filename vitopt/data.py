"""Images: data sets, splits and transforms.

The test set is what the data set calls so (digits: a fifth, stratified) and is used once, at the end. Validation
images are taken from the training images, stratified, and are the same for every row whatever its seed, so that no
row is chosen by images on which its ancestor was trained.

An image that does not decode is left out of every part alike and counted; more than one in a hundred are an error.
"""

import hashlib
import json
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
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms

from vitopt import augmentation, hub, streams
from vitopt.corruption import LeftOut, Undecodable, tolerated
from vitopt.errors import InputError, outlive_signals
from vitopt.recipe import Augment, Data
from vitopt.streams import Stream

NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "mnist": 10, "kmnist": 10, "fashion_mnist": 10}
SPLIT_SEED = 0
MEMORY_BYTES = 2 << 30  # so many bytes of decoded images are kept in memory; more stream through workers


@dataclass(frozen=True)
class Splits:
    """Each item is (float tensor of (C, H, W), class index). Only `train` is augmented."""
    train: "Images | Stream"
    calibration: "Images | Stream"  # the training images as they are, in random order, to rank channels on
    validation: "Images | Stream"
    test: "Images | Stream"
    classes: list[str]
    workers: int  # processes that decode images beside each training process


class Images(torch.utils.data.Dataset):
    """The images of `source` at `indices`, in the mode and through the transform given.

    An item is asked for by its position, or by (position, seed): the seed alone then decides what chance does to it.
    A list of positions gives a batch: images, class indices, and the images that do not decode, path: reason. These are
    missing from the batch; one that was asked for with a seed is replaced by the next in order that decodes.
    `pixels` holds all of them decoded, uint8 of (N, C, H, W) before any augmentation, where they fit in memory. `name`
    is what the part is called in messages.
    """

    def __init__(self, source, indices, name: str, mode: str, transform: Callable, size: dict):
        self.source, self.indices, self.name, self.mode = source, indices, name, mode
        self.transform, self.size = transform, size
        self.targets = torch.as_tensor(_targets(source)[indices])
        self.pixels = None

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        if isinstance(key, list):
            return self._batch(key)
        position, seed = key if isinstance(key, tuple) else (key, None)
        index = self.indices[position]
        try:
            image, target = self.source[index]
            image = image.convert(self.mode)
        except Exception as error:  # Pillow has no error of its own: OSError, SyntaxError, ValueError, struct.error, …
            path, reason = self.path(position), " ".join(str(error).split()) or type(error).__name__
            raise Undecodable(f"{path}: this image does not decode ({reason}): mend or remove it", path,
                              reason) from error
        if seed is not None:
            augmentation.seed_chance(seed)
        return self.transform(image), int(target)

    def _batch(self, keys):
        items, lost = [], {}
        for key in keys:
            position, seed = key if isinstance(key, tuple) else (key, None)
            candidates = 1 if seed is None else tolerated(self) + 1
            for candidate in range(position, position + candidates):
                try:
                    items.append(self[candidate % len(self), seed])
                    break
                except Undecodable as error:
                    lost[error.path] = error.reason
        images, targets = default_collate(items) if items else (torch.empty(0), torch.empty(0))
        return images, targets, lost

    def path(self, position: int) -> str:
        """Where an image is, for messages."""
        index, samples = self.indices[position], getattr(self.source, "samples", None)
        if samples is not None:
            return samples[index][0]
        return self.source.path(index) if isinstance(self.source, hub.Rows) else f"image {index}"


def num_classes(section: Data) -> int:
    """Number of classes, without reading an image.

    Raises:
        InputError: an image folder is not there or its two parts do not have the same classes, or nothing tells them.
    """
    if section.name == "wds":
        return len(streams.classes(section))
    return NUM_CLASSES.get(section.name) or len(hub.classes(section) if _on_hub(section) else _class_folders(section))


def load(section: Data, size: dict, augment: Augment = Augment()) -> Splits:
    """Load the three splits.

    Args:
        section: which images.
        size: `architecture["input"]` of the model that will see them.
        augment: what is done to the training images.

    Raises:
        InputError: the images are not there, too few to split, or too many of them do not decode.
    """
    mode = {1: "L", 3: "RGB"}.get(size["channels"])
    if mode is None:
        raise InputError(f"model.in_chans: {size['channels']}: images have 1 channel or 3: take one of these")
    plain, augmenting, workers = _plain(size), _augmenting(size, augment), _workers(section)
    if section.name == "wds":
        shards, classes = streams.find(section, SPLIT_SEED), streams.classes(section)

        def stream(part: str, name: str, transform: Callable) -> Stream:
            return Stream(name, shards[part], mode, transform, size, len(classes), workers)
        return Splits(stream("train", "training", augmenting), stream("train", "training", plain),
                      stream("validation", "validation", plain), stream("test", "test", plain), classes, workers)
    parts = _divided(section)
    splits = Splits(
        train=Images(*parts["train"], "training", mode, augmenting, size),
        calibration=Images(*parts["train"], "training", mode, plain, size),
        validation=Images(*parts["validation"], "validation", mode, plain, size),
        test=Images(*parts["test"], "test", mode, plain, size),
        classes=[str(name) for name in parts["train"][0].classes],
        workers=workers,
    )
    if _fit_in_memory(splits, augment):
        for part in (splits.calibration, splits.validation, splits.test):
            _keep_decoded(part, workers)
        for name in ("pixels", "indices", "targets"):
            setattr(splits.train, name, getattr(splits.calibration, name))
    return splits


def _divided(section: Data) -> dict[str, tuple]:
    """The source of train, validation and test, and which of its images are meant."""
    if section.name == "digits":
        digits = _digits()
        train, test = _stratified(section, _targets(digits), 0.2, range(len(digits)))
        parts = {"train": (digits, train), "test": (digits, test)}
    else:
        found = hub.load(section) if _on_hub(section) else {
            split: _torchvision(section, split) for split in ("train", "test")}
        parts = {part: (source, range(len(source))) for part, source in found.items()}
    if section.limit:
        parts = {part: (source, _limited(section, _targets(source), indices))
                 for part, (source, indices) in parts.items()}
    if "validation" not in parts:
        source, indices = parts["train"]
        train, validation = _stratified(section, _targets(source), section.validation, indices)
        parts |= {"train": (source, train), "validation": (source, validation)}
    return parts


def _plain(size: dict, **options) -> Callable:
    """timm's transform for evaluation."""
    return create_transform(
        (size["channels"], size["height"], size["width"]), interpolation=size["interpolation"],
        mean=size["mean"], std=size["std"], crop_pct=size["crop_pct"], **options)


def _fit_in_memory(splits: Splits, augment: Augment) -> bool:
    """Whether to decode all images once: they fit, and their augmentation can start from what is kept of them."""
    height, width = splits.train.size["height"], splits.train.size["width"]
    images = len(splits.train) + len(splits.validation) + len(splits.test)
    size = images * splits.train.size["channels"] * height * width
    if size > MEMORY_BYTES // local_processes() or not augmentation.can(augment):
        return False
    if augment.crop == "resized":  # its boxes want the images in full
        stored = getattr(splits.train.source, "data", None)
        return stored is not None and stored.shape[1] <= height and stored.shape[2] <= width
    return True


def _keep_decoded(part: Images, workers: int) -> None:
    """Keep all images of a part, as evaluation sees them, before they become numbers around zero."""
    key = hashlib.sha256(json.dumps([fingerprint(part), part.mode, part.size]).encode()).hexdigest()
    if key not in _DECODED:
        transform = _plain(part.size, use_prefetcher=True)
        whole = Images(part.source, part.indices, part.name, part.mode, transform, part.size)
        positions = list(range(len(whole)))
        chunks = [positions[first:first + 256] for first in range(0, len(positions), 256)]
        loader = DataLoader(whole, None, sampler=chunks, num_workers=workers if len(whole) > 5000 else 0,
                            worker_init_fn=outlive_signals)
        left_out, decoded = LeftOut(whole), []
        for images, _, lost in loader:
            left_out.add(lost)
            decoded.append(images)
        while len(_DECODED) >= 3:  # the parts of one set of rows
            del _DECODED[next(iter(_DECODED))]
        _DECODED[key] = torch.cat(decoded), left_out.found
    part.pixels, lost = _DECODED[key]
    if lost:
        left_out = LeftOut(part)
        left_out.add(lost)
        left_out.say()
        kept = [position for position in range(len(part)) if part.path(position) not in lost]
        part.indices, part.targets = [part.indices[position] for position in kept], part.targets[kept]


_DECODED = {}


def fingerprint(part: Images | Stream) -> str:
    """A digest of which images a part holds, without decoding them: of files the path, size and time."""
    if isinstance(part, Stream):
        return part.fingerprint()
    digest = hashlib.sha256(np.asarray(part.indices, dtype=np.int64).tobytes())
    digest.update(part.targets.numpy().tobytes())
    samples = getattr(part.source, "samples", None)
    if samples is None:  # held in memory by the source
        held = getattr(part.source, "data", None)
        digest.update(np.asarray(held).tobytes() if held is not None else repr(part.source).encode())
    else:
        for index in part.indices:
            state = os.stat(samples[index][0])
            digest.update(f"{samples[index][0]} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def local_processes() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _workers(section: Data) -> int:
    """The recipe's number, else this process's share of the cores; digits are decoded already and need none."""
    if section.workers is not None or section.name == "digits":
        return section.workers or 0
    return min(16, os.cpu_count() // local_processes())


def _augmenting(size: dict, augment: Augment) -> Callable:
    """timm's training transform, with a shift instead of timm's resized crop where the recipe says so."""
    hw = (size["height"], size["width"])
    first, second, last = create_transform(
        (size["channels"], *hw), is_training=True, separate=True, interpolation=size["interpolation"],
        mean=size["mean"], std=size["std"], scale=(augment.scale, 1.0), hflip=augment.hflip, color_jitter=None,
        auto_augment=augment.auto_augment, re_prob=augment.random_erasing)
    if augment.crop != "resized":
        *steps, _ = _plain(size, use_prefetcher=True).transforms  # what evaluation does, but for the last: to numbers
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
    source.data = images
    return source


class _Pairs(list):
    """A list of (image, target) that can carry `targets`, `classes` and `data` as torchvision's data sets do."""


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


def _on_hub(section: Data) -> bool:
    return section.name.startswith("hfds")


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
    with Image.open(path) as image:
        image.load()
        return image


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
