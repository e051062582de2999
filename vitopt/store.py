"""What teachers have said, kept on disk for other students."""

import hashlib
import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save as to_bytes
from torch import nn

from vitopt import batches, data, files, model as models
from vitopt.recipe import Recipe

STORED_CLASSES = 100  # of more classes, the most probable are kept and the others share what is left (TinyViT)


class Store:
    """The teachers' logits of whole epochs, in files beside the runs: a student that sees the same views reads them.

    Which views those are is decided by the data, the augmentation, the batch size and the seed (see `batches`); these
    and the teachers' weights are in the name of the folder. A file is written beside its place and renamed; one that
    is cut short or changed does not have the checksum that it tells, and is made again.
    """

    def __init__(self, folder: Path, recipe: Recipe, part: data.Images, teachers: list[nn.Module],
                 accelerator: Accelerator):
        augment = recipe.train.augment.model_dump()
        self.mixed_until = recipe.train.epochs - augment.pop("mixup_off_epochs")
        said = [recipe.seed, recipe.train.batch_size, augment, part.size, data.fingerprint(part),
                [[section.weight, _digest(teacher)] for section, teacher in zip(recipe.distill.teacher, teachers)]]
        self.folder = folder / hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        self.steps, self.batch_size = len(part) // recipe.train.batch_size, recipe.train.batch_size
        self.classes = models.num_classes(teachers[0])
        self.accelerator = accelerator

    def open(self, epoch: int, first_step: int = 0, heard: dict[str, torch.Tensor] | None = None) -> None:
        """Get ready for the steps of an epoch, counted from 1, from a step on, counted from 0.

        Args:
            heard: what `so_far` gave before that step; without it the epoch is not written.
        """
        mixed = "_mixed" if epoch <= self.mixed_until else ""
        self.path = self.folder / f"epoch_{epoch:04d}{mixed}.safetensors"
        self.stored, self.parts, self.step = self._load(), [], first_step
        self.heard = [dict(zip(heard, step)) for step in zip(*heard.values())] if heard else []

    def so_far(self) -> dict[str, torch.Tensor]:
        """What the teachers have said in this epoch, (steps, rows of this process, …); nothing where it is read."""
        return {name: torch.stack([step[name] for step in self.heard]) for name in (self.heard or [{}])[0]}

    def read(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The logits of these rows of the step, or None where the teachers must be asked."""
        return None if self.stored is None else _spread(
            {name: tensor[self.step][rows] for name, tensor in self.stored.items()})

    def add(self, logits: torch.Tensor) -> torch.Tensor:
        """Keep the logits of the next rows of the step; gives them as they will be read."""
        self.parts.append(_condensed(logits))
        return _spread(self.parts[-1])

    def end_step(self) -> None:
        self.step += 1
        if self.parts:
            self.heard.append({name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]})
            self.parts = []

    def close(self) -> None:
        """Write the epoch, if it was heard as a whole."""
        if self.stored is not None or len(self.heard) < self.steps:
            return
        processes = self.accelerator.num_processes
        whole = {}
        for name in self.heard[0]:
            own = torch.stack([values[name] for values in self.heard])
            parts = self.accelerator.gather(own[None].contiguous())
            whole[name] = torch.empty(self.steps, self.batch_size, *own.shape[2:], dtype=own.dtype)
            for process in range(processes):
                whole[name][:, batches.rows(self.batch_size, process, processes)] = parts[process].cpu()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = to_bytes(whole, {"sha256": _checksum(whole)})
            partial = self.path.with_suffix(f".{os.getpid()}")
            try:
                partial.write_bytes(content)
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def _load(self) -> dict[str, torch.Tensor] | None:
        if not self.path.is_file():
            return None
        try:
            with files.open_tensors(self.path) as (file, found):
                whole = found == self._layout()
                tensors = {name: file.get_tensor(name) for name in found} if whole else {}
                whole = whole and (file.metadata() or {}).get("sha256") == _checksum(tensors)
        except (OSError, ValueError):
            whole = False
        if whole and "classes" in tensors:  # what indexes and sizes what is made of it
            classes, count = tensors["classes"], tensors["count"]
            whole = bool(((0 <= classes) & (classes < self.classes)).all() and (count == self.classes).all())
        if not whole:
            self.accelerator.print(f"  {self.path} is damaged: the teachers are asked again")
            return None
        return tensors

    def _layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What the file of an epoch holds, by name: dtype and shape."""
        rows = (self.steps, self.batch_size)
        if self.classes <= STORED_CLASSES:
            return {"logits": ("F16", (*rows, self.classes))}
        return {"logits": ("F16", (*rows, STORED_CLASSES)), "classes": ("I32", (*rows, STORED_CLASSES)),
                "others": ("F16", (*rows, 1)), "count": ("I32", rows)}


def _condensed(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits (rows, classes) in 16 bits; of many classes the most probable ones, and what is left for each other."""
    if logits.shape[-1] <= STORED_CLASSES:
        return {"logits": logits.half()}
    values, classes = logits.float().log_softmax(-1).topk(STORED_CLASSES)
    left = (1 - values.exp().sum(-1, keepdim=True)).clamp_min(1e-12) / (logits.shape[-1] - STORED_CLASSES)
    return {"logits": values.half(), "classes": classes.int(), "others": left.log().half(),
            "count": torch.full((len(logits),), logits.shape[-1], dtype=torch.int32, device=logits.device)}


def _spread(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits (rows, classes) of what `_condensed` kept, in 32 bits."""
    if "classes" not in values:
        return values["logits"].float()
    logits = values["others"].float().repeat(1, int(values["count"][0]))
    return logits.scatter(1, values["classes"].long(), values["logits"].float())


def _digest(model: nn.Module) -> str:
    return _checksum(model.state_dict())


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
