"""Images in batches, on the device of the model.

Small sets live there decoded and are augmented there, a batch at a time; large ones stream through workers. Either way
a training batch is a function of seed, epoch and step alone: it does not depend on how many processes share it, nor on
what came before it, so it can be made again. An image that does not decode is left out of evaluation; in training the
next one that does takes its place, with the same seed. A stream's batches depend on the number of processes and workers
too, among which its order is divided.
"""

import hashlib
from dataclasses import dataclass
from typing import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import Mixup
from torch import distributed
from torch.utils.data import DataLoader

from vitopt import augmentation, streams
from vitopt.corruption import LeftOut
from vitopt.data import Images, Splits
from vitopt.errors import outlive_signals
from vitopt.recipe import Train
from vitopt.streams import Stream


def seed_of(*parts) -> int:
    """A number of 63 bits that these parts decide, each of its own."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _settle(left_out: LeftOut) -> None:
    """Exchange between all processes, each of which must come here, what was left out, and say it."""
    if distributed.is_available() and distributed.is_initialized():
        everywhere = [None] * distributed.get_world_size()
        distributed.all_gather_object(everywhere, left_out.found)
        for found in everywhere:
            left_out.found |= found
    left_out.add({})
    left_out.say()


def _loader(reading: streams.Reading, device: torch.device) -> DataLoader:
    return DataLoader(reading, None, num_workers=min(reading.part.workers, len(reading.spans)),
                      pin_memory=device.type == "cuda", worker_init_fn=outlive_signals)


class Plain:
    """This process's share of a part, without augmentation, in order: (images, class indices) a batch."""

    def __init__(self, part: Images | Stream, workers: int, accelerator: Accelerator, batch_size: int,
                 limit: int | None = None):
        self.part, self.device, self.limit, self.left_out = part, accelerator.device, limit, LeftOut(part)
        if isinstance(part, Stream):
            reading = streams.in_order(part, accelerator.process_index, accelerator.num_processes, batch_size, limit)
            self.loader = _loader(reading, self.device)
            return
        count = min(len(part), limit or len(part))
        positions = list(range(accelerator.process_index, count, accelerator.num_processes))
        self.chunks = [positions[first:first + batch_size] for first in range(0, len(positions), batch_size)]
        self.loader = None if part.pixels is not None else DataLoader(
            part, None, sampler=self.chunks, num_workers=workers, pin_memory=self.device.type == "cuda",
            worker_init_fn=outlive_signals)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.loader is not None:
            for images, targets, lost in self.loader:
                self.left_out.add(lost)
                if len(images):
                    yield images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
            if self.limit is None:  # who asks for the first images only may stop earlier on one process than on another
                _settle(self.left_out)
            return
        size = self.part.size
        for chunk in self.chunks:
            pixels = self.part.pixels[chunk].to(self.device, non_blocking=True)
            images = augmentation.normalise(pixels, size["mean"], size["std"], (size["height"], size["width"]))
            yield images, self.part.targets[chunk].to(self.device)


@dataclass
class Batch:
    """This process's rows of a batch.

    `images` float32 (rows, channels, height, width), `labels` class indices (rows,), `targets` class indices or, where
    images are mixed, probabilities (rows, classes); `rows` are their places in the batch over all processes.
    """
    images: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor

    def chunk(self, parts: int) -> list["Batch"]:
        """So many equal parts, in order."""
        return [Batch(*fields) for fields in zip(*(field.chunk(parts) for field in (
            self.images, self.labels, self.targets, self.rows)))]


class Augmented:
    """The training images in random order, augmented: what is left over after the last whole batch waits an epoch."""

    def __init__(self, splits: Splits, section: Train, num_classes: int, seed: int, accelerator: Accelerator):
        self.part, self.section, self.seed, self.device = splits.train, section, seed, accelerator.device
        self.process = accelerator.process_index
        self.rows = rows(section.batch_size, self.process, accelerator.num_processes)
        augment = section.augment
        self.mix = Mixup(augment.mixup, augment.cutmix, label_smoothing=section.label_smoothing,
                         num_classes=num_classes) if augment.mixup or augment.cutmix else None
        if self.part.pixels is not None:
            self.pixels, self.targets = self.part.pixels.to(self.device), self.part.targets.to(self.device)
            return
        self.left_out = LeftOut(self.part)
        if isinstance(self.part, Images):
            self.keys = []  # batches of the epoch under way; the loader, and its workers, outlive an epoch
            self.loader = DataLoader(self.part, None, sampler=self.keys, num_workers=splits.workers,
                                     persistent_workers=splits.workers > 0, pin_memory=self.device.type == "cuda",
                                     worker_init_fn=outlive_signals)

    def __len__(self):
        return len(self.part) // self.section.batch_size

    def describe(self) -> str:
        """Where the images are."""
        if isinstance(self.part, Stream):
            return (f"{len(self.part):,} images in {len(self.part.shards):,} shards, decoded as they are read by "
                    f"{self.part.workers} workers")
        if self.part.pixels is None:
            return f"{len(self.part):,} images, decoded as they are asked for by {self.loader.num_workers} workers"
        return f"{len(self.part):,} images, decoded in memory ({self.pixels.nbytes / 1e6:.1f} MB on {self.device.type})"

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 1, from a step on, counted from 0."""
        steps = range(first_step, len(self))
        if isinstance(self.part, Stream):
            views = self._from_disk(self._read(number, first_step))
        elif self.part.pixels is None:
            self._ask(number, steps)
            views = self._from_disk(self.loader)
        else:
            views = self._resident(number, steps)
        mix = self.mix if number <= self.section.epochs - self.section.augment.mixup_off_epochs else None
        for (images, labels), step in zip(views, steps):
            targets = labels
            if mix:
                np.random.seed(seed_of(self.seed, number, step) % 2 ** 32)  # timm draws from there
                images, targets = mix(images, labels)
            yield Batch(images, labels, targets, self.rows)

    def _order(self, number: int) -> torch.Tensor:
        repeats = self.section.augment.repeats
        order = torch.randperm(len(self.part), generator=torch.Generator().manual_seed(seed_of(self.seed, number)))
        return order.repeat_interleave(repeats)[:len(self.part)]

    def _own(self, number, steps):
        order, size = self._order(number), self.section.batch_size
        return [order[step * size:(step + 1) * size][self.rows] for step in steps]

    def _resident(self, number, steps):
        size, augment = self.part.size, self.section.augment
        height, width = size["height"], size["width"]
        for step, positions in zip(steps, self._own(number, steps)):
            generator = torch.Generator().manual_seed(seed_of(self.seed, number, step))
            draws = augmentation.draw(augment, self.section.batch_size, *self.pixels.shape[-2:], generator)
            draws = {name: drawn[self.rows] for name, drawn in draws.items()}
            positions = positions.to(self.device)
            yield augmentation.apply(self.pixels[positions], draws, augment, size["mean"], size["std"],
                                     (height, width)), self.targets[positions]

    def _ask(self, number, steps):
        """Write down which images the workers shall make batches of."""
        self.keys.clear()
        for step, positions in zip(steps, self._own(number, steps)):
            generator = torch.Generator().manual_seed(seed_of(self.seed, number, step))
            seeds = torch.randint(2 ** 62, (self.section.batch_size,), generator=generator)[self.rows]
            self.keys.append(list(zip(positions.tolist(), seeds.tolist())))

    def _read(self, number, first_step):
        seed = seed_of(self.seed, number)
        reading = streams.shuffled(self.part, self.process, len(self), len(self.rows), first_step, seed)
        return _loader(reading, self.device)

    def _from_disk(self, loader):
        for images, labels, lost in loader:
            self.left_out.add(lost)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        _settle(self.left_out)


def rows(batch_size: int, process: int, processes: int) -> torch.Tensor:
    """Which rows of a batch a process has.

    Mixing pairs the first row with the last, and so on: both rows of a pair are on one process, in mirrored places, so
    that images mix as they would in one process.
    """
    share = batch_size // processes
    if share % 2:
        return torch.arange(process * share, (process + 1) * share)
    front = torch.arange(process * share // 2, (process + 1) * share // 2)
    return torch.cat([front, batch_size - 1 - front.flip(0)])
