"""WebDataset shards: images that are read in order, where they outgrow a disk.

timm's reader says which shards there are and how a sample is decoded. The order is vitopt's own: all images of a part
stand in one line, shard after shard, and each worker of each process reads a span of it. Spans do not overlap, whatever
the number of shards; one that begins within a shard is reached by reading over what stands before it. timm 1.0.31 deals
whole shards instead, repeats them until all workers have as many images, over several processes evaluates some images
twice and others never, and goes on with a warning where a shard is missing or cut short.
"""

import hashlib
import logging
import os
import random
import re
import tarfile
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, groupby
from typing import Callable, Iterator, Sequence
from urllib.parse import urlparse

import torch
from timm.data import create_dataset
from timm.data.readers import reader_wds
from torch.utils.data import default_collate

from vitopt import augmentation, corruption
from vitopt.errors import InputError
from vitopt.recipe import Data

TEST, VALIDATION = ("test", "val", "validation"), ("validation", "val")  # names of splits, the first that is there
IMAGE_KEYS = "jpg;jpeg;png;webp"
BUFFER = reader_wds.SAMPLE_SHUFFLE_SIZE, reader_wds.SAMPLE_INITIAL_SIZE  # samples mixed, and read before the first


@dataclass(frozen=True)
class Shard:
    path: str  # or URL
    length: int  # samples
    label: str  # its key in a sample's json; empty where a sample has it in .cls


@dataclass(frozen=True)
class Stream:
    """The images of some shards, in the mode and through the transform given; `name` is what messages call them."""
    name: str
    shards: list[Shard]
    mode: str
    transform: Callable
    size: dict
    num_classes: int
    workers: int
    pixels = None  # never in memory

    def __len__(self):
        return sum(shard.length for shard in self.shards)

    def fingerprint(self) -> str:
        """A digest of the images and of who reads them, which decides what a training batch holds."""
        readers = [os.environ.get("WORLD_SIZE", "1"), self.workers, *BUFFER]
        states = [os.stat(shard.path) for shard in self.shards if _is_local(shard.path)]
        said = [self.shards, readers, [(state.st_size, state.st_mtime_ns) for state in states]]
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def samples(self, order: Sequence[int], start: int, stop: int) -> Iterator[dict]:
        """The samples from position `start` to `stop`, undecoded, of the line that these shards make in that order.

        Raises:
            InputError: a shard that cannot be read or does not hold as many samples as it should.
        """
        before = 0
        for index in order:
            shard = self.shards[index]
            first, last = max(start - before, 0), min(stop - before, shard.length)
            if first < last:
                yield from _read(shard, first, last)
            before += shard.length

    def decode(self, sample: dict):
        """The image, in this part's mode, and its class index; raises what Pillow and timm raise."""
        found = reader_wds._decode(sample, IMAGE_KEYS, self.mode, alt_label=self.shards[0].label)
        if found is None:
            raise ValueError("its label is negative")
        return found["jpg"], found["target"]


def _read(shard: Shard, first: int, last: int) -> Iterator[dict]:
    from webdataset import tarfile_to_samples
    count = 0
    try:
        for sample in tarfile_to_samples()([{"url": shard.path}]):  # raises, where timm asks it to warn and go on
            if first <= count < last:
                yield sample
            count += 1
            if count == last < shard.length:
                return
    except Exception as error:  # of tarfile, of gzip, of the connection
        raise InputError(f"{shard.path}: this shard cannot be read ({_reason(error)}): mend it, or leave it out of "
                         "_info.json and data.splits") from error
    if count != shard.length:
        raise InputError(f"{shard.path}: this shard holds {count:,} samples and _info.json says {shard.length:,}: "
                         "write the shard or _info.json again")


class Reading(torch.utils.data.IterableDataset):
    """What one process reads, in batches: images, class indices, and the images that do not decode, name: reason.

    Each worker has a span (start, stop, skip) of the line of images, of which it passes the first `skip` over. With a
    seed the shards stand in another order, a buffer mixes the images of a span, and the seed and an image's place
    decide what chance does to it; the next image that decodes then takes the place of one that does not.
    """

    def __init__(self, part: Stream, spans: list[tuple[int, int, int]], batch_size: int, seed: int | None = None):
        self.part, self.spans, self.batch_size, self.seed = part, spans, batch_size, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        start, stop, skip = self.spans[worker.id if worker else 0]
        items, lost, due = [], {}, []  # due: places that have no image yet
        places = range(start + skip, stop)
        for place, sample in enumerate(self._samples(start, stop), start) if places else ():
            if place < places.start:
                continue
            if place < stop:
                due.append(place)
            try:
                image, target = self.part.decode(sample)
            except Exception as error:
                lost[f"{sample['__url__']}: {sample['__key__']}"] = _reason(error)
                if self.seed is None:
                    due = []
                if len(lost) > corruption.tolerated(self.part):  # an error anyhow: let it be soon
                    break
            else:
                if not 0 <= target < self.part.num_classes:
                    raise InputError(f"{sample['__url__']}: {sample['__key__']}: is of class {target} and there are "
                                     f"{self.part.num_classes}, counted from 0: set data.num_classes")
                for due_place in due:
                    if self.seed is not None:
                        augmentation.seed_chance(self.seed + due_place)
                    items.append((self.part.transform(image), target))
                    if len(items) == self.batch_size:
                        yield *default_collate(items), lost
                        items, lost = [], {}
                due = []
            if place >= stop - 1 and not due:
                break
        if items or lost:
            images, targets = default_collate(items) if items else (torch.empty(0), torch.empty(0))
            yield images, targets, lost

    def _samples(self, start, stop):
        order = list(range(len(self.part.shards)))
        if self.seed is None:
            return self.part.samples(order, start, stop)
        from webdataset import shuffle
        random.Random(self.seed).shuffle(order)
        size, initial = BUFFER
        own = shuffle(size, initial=initial, rng=random.Random(f"{self.seed} {start}"))(
            self.part.samples(order, start, stop))
        beyond = (self.part.samples(order, *span) for span in ((stop, len(self.part)), (0, start)))
        return chain(own, *beyond)


def in_order(part: Stream, process: int, processes: int, batch_size: int, limit: int | None = None) -> Reading:
    """This process's share of a part, or of its first images."""
    total = min(len(part), limit or len(part))
    workers = max(1, min(part.workers, -(-total // (processes * batch_size))))
    first, lanes = process * workers, processes * workers
    cuts = [lane * total // lanes for lane in range(first, first + workers + 1)]
    return Reading(part, [(start, stop, 0) for start, stop in zip(cuts, cuts[1:])], batch_size)


def shuffled(part: Stream, process: int, steps: int, rows: int, first_step: int, seed: int) -> Reading:
    """This process's batches of an epoch from a step on, `rows` images each; workers make them in turns."""
    workers = max(1, min(part.workers, steps))
    spans, start = {}, process * steps * rows
    for lane in range(workers):
        stop = start + rows * len(range(lane, steps, workers))
        spans[(lane - first_step) % workers] = (start, stop, rows * len(range(lane, first_step, workers)))
        start = stop
    return Reading(part, [spans[worker] for worker in range(workers)], rows, seed)


def classes(section: Data) -> list[str]:
    """Names of the classes: `classes` of _info.json, else numbers up to data.num_classes or its `num_classes`.

    Raises:
        InputError: nothing tells how many there are.
    """
    info = _reader(section, _named(section, "train") or "train").info
    names = info.get("classes")
    count = section.num_classes or info.get("num_classes") or (len(names) if isinstance(names, list) else 0)
    if not count:
        raise InputError(f"data.num_classes: is missing, and no _info.json of {section.root} tells: give it")
    if names and len(names) != count:
        raise InputError(f"data.num_classes: {count}: _info.json of {section.root} names {len(names)} classes: mend "
                         "one of them")
    return [str(name) for name in names or range(count)]


def find(section: Data, seed: int) -> dict[str, list[Shard]]:
    """The shards of train, validation and test.

    Where no split is kept for validation whole shards of train are, the same for the same seed.

    Raises:
        InputError: a split or a shard is not there, or it is not known how much a shard holds.
    """
    train = _named(section, "train") or "train"
    there = _reader(section, train).info.get("splits", {})
    test = _named(section, "test") or next((name for name in TEST if name in there), None)
    if test is None:
        raise InputError(f"data.splits.test: is missing, and no _info.json of {section.root} has a split called "
                         f"{', '.join(TEST)}: give it")
    validation = _named(section, "validation") or next(
        (name for name in VALIDATION if name in there and name != test), None)
    names = {"train": train, "validation": validation, "test": test}
    found = {part: _shards(section, name, part) for part, name in names.items() if name}
    if not validation:
        shards = found["train"]
        if len(shards) < 2:
            raise InputError(f"data.splits.train: {train}: is a single shard, of which none can be held out for "
                             "validation: write it as several, or give data.splits.validation")
        count = min(max(1, round(section.validation * len(shards))), len(shards) - 1)
        held_out = set(random.Random(seed).sample(range(len(shards)), count))
        found["validation"] = [shards[index] for index in sorted(held_out)]
        found["train"] = [shard for index, shard in enumerate(shards) if index not in held_out]
    return found


def _named(section: Data, part: str) -> str | None:
    return section.splits and getattr(section.splits, part)


def _reader(section: Data, split: str):
    if find_spec("webdataset") is None:
        raise InputError("data.name: wds: needs a package that is not installed: pip install webdataset")
    if _is_local(section.root) and not os.path.isdir(section.root):
        raise InputError(f"data.root: {section.root}: there is no such folder: give that of the shards, or its URL")
    logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)  # no _info.json is no reason to warn
    try:
        return create_dataset("wds/", section.root, split=split, input_img_mode=None, input_key=IMAGE_KEYS).reader
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"data.root: {section.root}: has no _info.json that tells the shards of {split} "
                         f"({_reason(error)}): write one as timm does, or give the shards in data.splits, such as "
                         f"{{train: 'train-{{0000..0015}}.tar', test: 'test-{{0000..0003}}.tar'}}") from error


def _shards(section: Data, split: str, part: str) -> list[Shard]:
    reader = _reader(section, split)
    lengths = {}
    for told in reader.info.get("splits", {}).values():
        lengths |= zip(told.get("filenames", ()), told.get("shard_lengths", ()))
    shards = []
    for name in reader.split_info.filenames:
        path = os.path.join(section.root, name)
        if _is_local(path):
            if not os.path.isfile(path):
                raise InputError(f"{path}: this shard is missing: bring it, or leave it out of _info.json or "
                                 "data.splits")
        elif name not in lengths:
            raise InputError(f"{path}: _info.json does not tell how many samples this shard holds: write it there, "
                             "under splits, with name, filenames, shard_lengths and num_samples; shards on a local "
                             "disk are counted")
        length = lengths[name] if name in lengths else _count(path)
        shards.append(Shard(path, length, reader.split_info.alt_label))
    total, told = sum(shard.length for shard in shards), reader.split_info.num_samples
    if not total or told not in (0, total):
        raise InputError(f"data.splits.{part}: {split}: has {told:,} samples as it says and {total:,} in its shards: "
                         "give the right number")
    return shards


def _is_local(path: str) -> bool:
    return not urlparse(path).scheme


def _count(path: str) -> int:
    """Samples in a shard, from the names of its files; as webdataset groups them."""
    from webdataset.tariterators import base_plus_ext
    try:
        with tarfile.open(path) as file:
            names = [member.name for member in file if member.isreg() and not re.match("__[^/]*__($|/)", member.name)]
            file.fileobj.seek(file.offset)
            if not file.fileobj.read(1):  # tarfile is content where the rest is cut off between two files
                raise tarfile.ReadError("it has no end")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{path}: this shard cannot be read ({_reason(error)}): mend it, or leave it out of "
                         "data.splits") from error
    keys = (base_plus_ext(name)[0] for name in names)
    return sum(1 for _ in groupby(key for key in keys if key is not None))


def _reason(error: Exception) -> str:
    said = str(getattr(error, "strerror", None) or (error.args[0] if error.args else ""))
    if ended := re.search(r"exit \d+", said):  # webdataset shows all of the command that reads a URL
        said = ended[0]
    return " ".join(said.partition(" @ <")[0].split()) or type(error).__name__  # webdataset adds its objects
