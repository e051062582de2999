"""The state of a training under way, kept so that a run which was stopped goes on by itself.

A checkpoint is a folder: model.safetensors and model.json (the best epoch's model so far), state.safetensors and
state.json (everything else), pruned.json (the cuts so far), recipe.yaml, and `sha256` with the digests of all of
these, as sha256sum writes them. It is written beside its place and renamed.
"""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from vitopt import devices, files, model as models
from vitopt.errors import InputError, Stopped
from vitopt.recipe import Train

FILES = ("model.json", "model.safetensors", "pruned.json", "recipe.yaml", "state.json", "state.safetensors")
KEPT = 2  # the newest
LONGEST_JSON = 2 ** 26  # bytes
IMPATIENCE_SECONDS = 5  # a signal that comes again after so long is obeyed at once; a launcher repeats what it was sent
LOOK_SECONDS = 1.0  # between the moments in which processes agree on what to do


class Checkpoints:
    """The checkpoints of one row, in `.<row>.checkpoints` beside its run folder.

    Args:
        row: the run folder, which need not be there.
        accelerator: of any process; the main one writes.
        recipe: what recipe.yaml shall hold.
        home: the folder of the row with all its seeds, where that is another one; beside it lie the teachers' logits.
    """

    def __init__(self, row: Path, accelerator: Accelerator, recipe: str = "", home: Path | None = None):
        self.folder, self.accelerator, self.recipe = folder_of(row), accelerator, recipe
        self.last_good = row.with_name(f"{row.name}.last_good")
        self.logits = (home or row).parent / ".teacher_logits"
        self.cuts, self.reading, self.found = [], None, None

    def open(self) -> nn.Module | None:
        """The model of the newest checkpoint that is whole, with `cuts` as they were; None where there is none.

        Its weights are those of the best epoch; `load` gives the rest. Call it on all processes.
        """
        found = [None]
        if self.accelerator.is_main_process:
            for folder in _newest_first(self.folder):
                if (damage := _damage(folder)) is None:
                    found = [folder]
                    break
                print(f"  {folder} is damaged ({damage}): it is left out")
        self.found, = broadcast_object_list(found)
        if self.found is None:
            return None
        self.cuts = self._read("pruned.json", list)
        return models.load(self.found)

    def _read(self, name: str, kind: type):
        """A JSON file of the checkpoint that was found."""
        try:
            content = files.read_json(self.found / name, LONGEST_JSON)
            if isinstance(content, kind):
                return content
            reason = f"it is no {kind.__name__}"
        except (OSError, ValueError) as error:
            reason = str(error)
        raise InputError(f"{self.found / name}: no such checkpoint was written here ({reason}): remove the folder")

    @property
    def used(self) -> dict | None:
        """What the training had used on this machine when the checkpoint was written, see `energy.Reading`."""
        used = self._read("state.json", dict).get("used") or [] if self.found else []
        machine = int(os.environ.get("GROUP_RANK", 0))
        return used[machine] if machine < len(used) else None

    def load(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """The tensors and the facts of the training under way; None where another one comes next."""
        if self.found is None:
            return None
        facts = self._read("state.json", dict)
        if facts.get("cuts") != len(self.cuts):  # of the training before the latest cut
            return None
        with files.open_tensors(self.found / "state.safetensors") as (file, found):
            return {name: file.get_tensor(name) for name in found}, facts

    def write(self, model: nn.Module, weights: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor],
              facts: dict) -> None:
        """Keep a state. Call it on all processes.

        Args:
            model: of which these are the best weights so far.
            tensors, facts: what `load` shall give.

        Raises:
            OSError: it cannot be written, such as for want of space; the checkpoints before it are as they were.
        """
        if self.reading is not None:
            self.reading.lap()
        used = devices.of_machines(self.reading, self.accelerator)
        if self.accelerator.is_main_process:
            facts = facts | {"cuts": len(self.cuts), "used": used}
            place = self.folder / f"{len(self.cuts):03d}_{facts['step']:09d}"
            partial = self.folder / "unfinished"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir(parents=True)
                models.write(partial, weights, model.architecture)
                models.write_tensors(partial / "state.safetensors", tensors)
                (partial / "state.json").write_text(json.dumps(facts), encoding="utf-8")
                (partial / "pruned.json").write_text(json.dumps(self.cuts), encoding="utf-8")
                (partial / "recipe.yaml").write_text(self.recipe, encoding="utf-8")
                digests = [f"{files.sha256(file)}  {file.name}\n" for file in sorted(partial.iterdir())]
                (partial / "sha256").write_text("".join(digests), encoding="utf-8")
                shutil.rmtree(place, ignore_errors=True)
                partial.rename(place)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            for old in _newest_first(self.folder)[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def remove(self) -> None:
        """Begin anew, or be done."""
        self.found = None
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)


def folder_of(row: Path) -> Path:
    return row.parent / f".{row.name}.checkpoints"


def recipe_of(row: Path) -> Path | None:
    """The recipe.yaml of a row's newest checkpoint in which it is as it was written."""
    files = (folder / "recipe.yaml" for folder in _newest_first(folder_of(row)))
    return next((file for file in files if _damage(file.parent, [file.name]) is None), None)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*"), reverse=True)


def _damage(folder: Path, names=FILES) -> str | None:
    """What is wrong with these files of a checkpoint, None where they are as they were written."""
    try:
        lines = (folder / "sha256").read_text(encoding="utf-8").splitlines()
        digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in names:
            if digests.get(name) != files.sha256(folder / name):
                return f"{name} is not as it was written"
    except (OSError, UnicodeDecodeError) as error:
        return " ".join(str(error).split())
    return None


def apart(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of nested dictionaries and lists into `tensors`; what is left can be written as JSON."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, apart(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [apart(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    return value


def together(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What `apart` was given, with lists for tuples."""
    if isinstance(value, list):
        return [together(item, tensors) for item in value]
    if isinstance(value, dict):
        return tensors[value["tensor"]] if "tensor" in value else {
            key: together(item, tensors) for key, item in value["items"]}
    return value


class Pauses:
    """When to write a checkpoint and when to stop, decided alike on all processes.

    Args:
        asked: holds something once a signal has come, see `listening`.
    """

    def __init__(self, section: Train, accelerator: Accelerator, asked: list[float]):
        self.seconds, self.accelerator, self.asked = section.checkpoint_minutes * 60, accelerator, asked
        self.written = self.looked = time.monotonic()
        self.steps, self.wait = 0, 1  # since the last look, and until the next

    def look(self) -> tuple[bool, bool]:
        """After a step: whether a checkpoint is due, and whether to stop after it.

        Several processes look about once a second, so that they need not speak to each other in every step.
        """
        self.steps += 1
        if self.steps < self.wait:
            return False, False
        now, processes = time.monotonic(), self.accelerator.num_processes
        stop, due, seconds = bool(self.asked), now - self.written >= self.seconds, now - self.looked
        if processes > 1:
            own = [stop, due and self.accelerator.is_main_process, seconds / processes]
            own = torch.tensor(own, device=self.accelerator.device)
            stop, due, seconds = self.accelerator.reduce(own, "sum").tolist()
            self.wait = max(1, int(LOOK_SECONDS * self.steps / max(seconds, 1e-6)))
        self.looked, self.steps = now, 0
        if due or stop:
            self.written = now
        return bool(due or stop), bool(stop)


@contextmanager
def listening():
    """Note SIGTERM and Ctrl-C instead of dying of them, so that the step under way can be finished and saved.

    Yields:
        A list that is empty until one of them comes.
    """
    asked = []

    def note(number, frame):
        if asked and time.monotonic() - asked[0] > IMPATIENCE_SECONDS:
            raise Stopped("stopped at once: what was not saved is lost")
        asked.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread():  # others may not
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
