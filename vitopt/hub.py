"""Data sets in the form of the Hugging Face Hub: from there, or from a local folder that its library reads."""

import os
from importlib.util import find_spec

import numpy as np
from PIL import Image
from timm.data import create_dataset

from vitopt.errors import InputError
from vitopt.recipe import Data

TEST, VALIDATION = ("test", "val", "validation", "valid"), ("validation", "val", "valid")  # the first that is there


class Rows:
    """One split, as torchvision's data sets are: items (image, class index), `targets` and `classes`."""

    def __init__(self, reader, targets: np.ndarray, classes: list[str]):
        self.reader, self.targets, self.classes = reader, targets, classes

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, _ = self.reader[index]  # timm's data set of this reader gives the next image where one does not decode
        with file, Image.open(file) as image:
            image.load()
            return image, int(self.targets[index])

    def path(self, index: int) -> str:
        """Where an image is, for messages."""
        return f"{self.reader.split} row {index}"

    def __repr__(self):
        return f"Rows({self.reader.dataset._fingerprint})"  # of the files behind it, in their library's words


def load(section: Data) -> dict[str, Rows]:
    """The splits train and test, and validation where there is one.

    Raises:
        InputError: they cannot be had, or are no images with classes.
    """
    there = _loaded(section)
    named = section.splits.model_dump(exclude_none=True) if section.splits else {}
    if missing := sorted(set(named.values()) - there.keys()):
        raise InputError(f"data.splits: {_path(section)} has no split {', '.join(missing)}, only {', '.join(there)}: "
                         "give one of these")
    columns = _columns(section, next(iter(there.values())).features)
    names_of_classes, found = classes(section), {}
    for part, names in (("train", ("train",)), ("test", TEST), ("validation", VALIDATION)):
        taken = [rows.reader.split for rows in found.values()]
        free = [name for name in names if name in there and name not in taken]
        for name in [named[part]] if part in named else free:
            rows = _rows(section, name, *columns, names_of_classes)
            if part in named or rows.targets.min() >= 0:  # ImageNet's test has no labels: its validation is meant
                found[part] = rows
                break
    for part in ("train", "test"):
        if part not in found:
            raise InputError(f"data.splits: {_path(section)} has no split for {part}, only {', '.join(there)}: name "
                             f"one, such as {{{part}: {next(iter(there))}}}")
    for part, rows in found.items():
        if wrong := sorted(set(rows.targets.tolist()) - set(range(len(rows.classes)))):
            raise InputError(f"data.num_classes: {len(rows.classes)}: {_path(section)} has images of class {wrong[0]} "
                             f"in {rows.reader.split}: classes are counted from 0, give the right number")
    return found


def classes(section: Data) -> list[str]:
    """Names of the classes; where the data set has none numbers, up to data.num_classes.

    Raises:
        InputError: the data set cannot be had, or nothing tells its classes.
    """
    features = _asked(section, lambda datasets: datasets.load_dataset_builder(
        _path(section), cache_dir=_cache(section)).info.features)
    if features is None:  # written in the files alone
        features = next(iter(_loaded(section).values())).features
    names = getattr(features[_columns(section, features)[1]], "names", None)
    if not names and not section.num_classes:
        raise InputError(f"data.num_classes: is missing, and {_path(section)} does not tell: give it")
    if names and section.num_classes not in (None, len(names)):
        raise InputError(f"data.num_classes: {section.num_classes}: {_path(section)} has {len(names)}: leave it out")
    return list(names) if names else [str(number) for number in range(section.num_classes)]


def _path(section: Data) -> str:
    """A name on the Hub, or the path of a folder."""
    return section.name.removeprefix("hfds/") if section.name != "hfds" else section.root


def _cache(section: Data) -> str | None:
    return section.root if section.name != "hfds" else None


def _loaded(section: Data) -> dict:
    """The splits that there are, by name."""
    return _asked(section, lambda datasets: datasets.load_dataset(_path(section), cache_dir=_cache(section)))


def _asked(section: Data, question):
    """What the library of the Hub answers."""
    if find_spec("datasets") is None:
        raise InputError(f"data.name: {section.name}: needs a package that is not installed: pip install datasets")
    if section.name == "hfds" and not os.path.isdir(section.root):
        raise InputError(f"data.root: {section.root}: there is no such folder: give one that datasets.load_dataset "
                         "reads, or data.name: hfds/<name> for the Hugging Face Hub")
    import datasets
    try:
        return question(datasets)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"data.name: {section.name}: {_path(section)} cannot be loaded "
                         f"({' '.join(str(error).split())[:300]}): check the name, the files and the "
                         "network") from error


def _columns(section: Data, features) -> tuple[str, str]:
    """The columns of images and of classes: those called so, else the only ones of their kind."""
    import datasets
    found = []
    for name, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
        alike = [column for column, feature in features.items() if isinstance(feature, kind)]
        if name not in features and len(alike) != 1:
            raise InputError(f"data.name: {section.name}: {_path(section)} has no column {name}, only "
                             f"{', '.join(features)}: rename one")
        found.append(name if name in features else alike[0])
    return tuple(found)


def _rows(section: Data, split: str, image: str, label: str, names: list[str]) -> Rows:
    reader = _asked(section, lambda datasets: create_dataset(
        f"hfds/{_path(section)}", _cache(section), split=split, input_key=image, target_key=label).reader)
    targets = np.asarray(reader.dataset[label][:])
    if targets.dtype.kind not in "iu" or not len(targets):
        raise InputError(f"data.name: {section.name}: {_path(section)}: column {label} of {split} holds no class "
                         "numbers: cast it to datasets.ClassLabel")
    return Rows(reader, targets, names)
