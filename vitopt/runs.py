"""Run folders: which rows a set of recipes makes, in which order, and what is kept of each.

A run folder holds model.safetensors and model.json, recipe.yaml (as resolved, with `provenance`), metrics.json,
history.csv and energy.csv. It is written beside its place and renamed, so that a kill leaves the former state or the
new one. A row of several seeds has a run folder for each, <row>/seed_<seed>.
"""

import fcntl
import importlib.metadata
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator
from timm.optim import list_optimizers

from vitopt import checkpoints, data, energy, files, model as models, pruning, teaching
from vitopt.checkpoints import Checkpoints
from vitopt.errors import InputError, one_line
from vitopt.recipe import Model, Recipe, batch_problems, read, read_yaml

LONGEST_CUTS = 2 ** 25  # bytes of a pruned.json; a ViT-7B in ten steps fills half of it
# keys of a recipe that say how a row is made and not which row it is
WITHOUT_EFFECT = {"data.workers", "train.checkpoint_minutes", "train.checkpoint_epochs", "train.tracker"}
LIBRARIES = ("vitopt", "torch", "torchvision", "timm", "torch-pruning", "accelerate", "codecarbon", "fvcore")


@dataclass(frozen=True)
class Row:
    """A recipe for one seed and where its run folder is; `start` and `teachers` are the folders of the runs it needs,
    and `model` sections of the teachers that are no runs. `seeds` are all that its file lists, none where it gives a
    single one."""
    path: Path
    recipe: Recipe
    folder: Path
    start: Path | None
    teachers: list[Path | Model]
    seeds: list[int]

    @property
    def needs(self) -> dict[str, Path]:
        """The run folders that this row needs, by key."""
        start = {"start": self.start} if self.start else {}
        return start | {_numbered("distill.teacher", number): teacher for number, teacher in enumerate(self.teachers)
                        if isinstance(teacher, Path)}

    @property
    def home(self) -> Path:
        """The folder of the row with all its seeds; the run folder itself where there is a single one."""
        return self.folder.parent if self.seeds else self.folder

    @property
    def name(self) -> str:
        return self.folder.relative_to(self.home.parent).as_posix()


def plan(words: list[str]) -> list[Row]:
    """Read and check recipes in full, and put them in the order that their `start` and `teacher` need.

    Args:
        words: recipe files, `section.key=value` for all of them that have the section, and `output=DIR`, under which
            run folders go to DIR/<folder of the recipe>/<row>; `runs` without it.

    Raises:
        InputError: with every problem of every recipe. Nothing has been written.
    """
    paths = [word for word in words if "=" not in word]
    outputs = [word.removeprefix("output=") for word in words if word.startswith("output=")]
    output = Path(outputs[-1] if outputs else "runs")
    recipes, problems = read(paths, [word for word in words if "=" in word and not word.startswith("output=")])
    if not paths:
        problems.append("no recipe is given: name YAML files, such as recipes/digits/*.yaml")
    rows, unread = {}, {_folder(output, path) for path in map(Path, paths) if path not in recipes}
    seeds = {_folder(output, path): recipe.seed if isinstance(recipe.seed, list) else []
             for path, recipe in recipes.items()}
    homes = {}
    for path, recipe in recipes.items():
        home = _folder(output, path)
        if homes.setdefault(home, path) != path:
            problems.append(f"{path}: {homes[home]} writes the same run folder {home}: rename one of them")
            continue
        rows |= {row.folder: row for row in _rows(path, recipe, home, seeds)}
    try:
        needs = {row.folder: [other for other in row.needs.values() if other in rows] for row in rows.values()}
        rows = {folder: rows[folder] for folder in TopologicalSorter(needs).static_order()}
    except CycleError as error:
        names = " → ".join(rows[folder].name for folder in error.args[1])
        problems.append(f"start and teacher go in a circle: {names}: begin one of these rows with a model")
    else:
        shapes = {}
        for row in rows.values():
            problems += [f"{row.path}: {problem}" for problem in _check(row, shapes, unread, seeds)]
    if problems:
        raise InputError(*dict.fromkeys(problems))  # what is wrong with every seed of a row is said once
    return list(rows.values())


def _folder(output: Path, path: Path) -> Path:
    return output / path.resolve().parent.name / path.stem


def _numbered(key: str, number: int) -> str:
    return f"{key}.{number}" if number else key


def _rows(path: Path, recipe: Recipe, home: Path, given: dict[Path, list[int]]) -> list[Row]:
    """The rows of one recipe, one a seed."""
    rows = []
    for seed in given[home] or [recipe.seed]:
        start = _forerunner(home, recipe.start, seed, given) if recipe.start else None
        teachers = [_forerunner(home, teacher.run, seed, given) if teacher.run else teacher.model
                    for teacher in (recipe.distill.teacher if recipe.distill else [])]
        folder = home / f"seed_{seed}" if given[home] else home
        rows.append(Row(path, recipe.model_copy(update={"seed": seed}), folder, start, teachers, given[home]))
    return rows


def _forerunner(home: Path, name: str, seed: int, given: dict[Path, list[int]]) -> Path:
    """The run folder that `start` or `teacher` names: a path, or a row's name beside this one; of several seeds that
    of the same seed, whether it is there or not."""
    folder = Path(name) if os.sep in name else home.parent / name
    return folder / f"seed_{seed}" if _seeds(folder, given) else folder


def _seeds(home: Path, given: dict[Path, list[int]]) -> list[int]:
    """The seeds of a row, in the recipes given or finished; none where it is of a single one or not there."""
    single = not given[home] if home in given else is_finished(home)
    return [] if single else sorted({*given.get(home, []), *_finished_seeds(home)})


def _finished_seeds(home: Path) -> list[int]:
    names = [re.fullmatch(r"\.?seed_(\d+)(\.replaced)?", path.name) for path in sorted(home.glob("*seed_*"))]
    return sorted({int(name[1]) for name in names if name and is_finished(home / f"seed_{name[1]}")})


def _check(row: Row, shapes: dict[Path, torch.nn.Module | None], unread: set[Path],
           given: dict[Path, list[int]]) -> list[str]:
    """What is wrong with a row once the rows before it are known.

    Args:
        shapes: models without weights of the rows so far; this row's is added, None where it cannot be built.
        unread: folders of recipes that were given and are wrong, so that nothing more can be said of them.
        given: the seeds listed by each recipe that was given, by folder.
    """
    recipe, problems = row.recipe, []
    num_classes = None
    try:
        num_classes = data.num_classes(recipe.data)
    except InputError as error:
        problems += error.problems
    shape = None
    if recipe.model:
        problems += (wrong := models.check(recipe.model))
        if not wrong:
            shape = models.build(recipe.model, num_classes or 2, device="meta")
    formers = {}
    for key, folder in row.needs.items():
        if folder in unread or folder.parent in unread:
            continue
        try:
            formers[key] = shapes[folder] if folder in shapes else _finished_model(row, key, folder, given)
        except InputError as error:
            problems += error.problems
    for number, teacher in enumerate(row.teachers):
        key = _numbered("distill.teacher", number)
        if isinstance(teacher, Model):
            problems += (wrong := [problem.replace("model", key, 1) for problem in models.check(teacher)])
            try:
                formers[key] = None if wrong else _teacher(teacher, key, "cpu" if teacher.checkpoint else "meta")
            except InputError as error:
                problems += error.problems
    shape = formers.get("start", shape)
    for key, former in formers.items():
        needs_classes = key == "start" or recipe.distill.logits
        if needs_classes and former is not None and num_classes and models.num_classes(former) != num_classes:
            name = row.needs.get(key, former.architecture["name"])
            problems.append(f"{key}: {name} has {models.num_classes(former)} classes and data {recipe.data.name} has "
                            f"{num_classes}: take one that knows the same")
    if shape is not None and (teacher := formers.get("distill.teacher")) is not None:
        try:
            teaching.check(recipe.distill, shape, teacher)
        except InputError as error:
            problems += error.problems
    if recipe.prune and shape is not None:
        try:
            pruning.find_axes(shape, recipe.prune, models.example_input(shape))
        except InputError as error:
            problems += error.problems
        except NotImplementedError:
            pass  # a model that cannot run without weights; it is seen when its turn comes
    if recipe.train:
        problems += batch_problems(recipe.train, int(os.environ.get("WORLD_SIZE", 1)))
        if recipe.train.tracker and recipe.train.tracker not in map(str, get_available_trackers()):
            problems.append(f"train.tracker: {recipe.train.tracker} is not installed or unknown to accelerate; "
                            f"installed: {', '.join(map(str, get_available_trackers())) or 'none'}")
        if recipe.train.optimizer not in list_optimizers():
            problems.append(f"train.optimizer: {recipe.train.optimizer}: timm has no such optimizer: "
                            "take one of timm.optim.list_optimizers(), such as adamw")
        if recipe.train.augment.auto_augment:
            problems += data.check_policy(recipe.train.augment)
    shapes[row.folder] = shape
    return problems


def _finished_model(row: Row, key: str, folder: Path, given: dict[Path, list[int]]) -> torch.nn.Module:
    if not is_finished(folder):
        if seeds := _seeds(folder.parent, given):
            raise InputError(f"{key}: {folder.parent.name} has no {folder.name}, only seed {_listed(seeds)}: make that "
                             f"seed too, or write the path of one, such as {folder.parent / f'seed_{seeds[0]}'}")
        recipe = row.path.parent / f"{folder.name}.yaml"
        first = f"run {recipe} first, or give it too" if recipe.exists() else "check the name"
        raise InputError(f"{key}: {folder.name}: there is no finished run in {folder}: {first}")
    return models.load(folder)


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished run, after mending a replacement that a kill cut in two."""
    replaced = _beside(folder, "replaced")
    if replaced.exists() and not folder.exists():
        with suppress(FileNotFoundError):  # another process was faster
            replaced.rename(folder)
    return (folder / "metrics.json").is_file()


def differences(row: Row, file: Path) -> list[str]:
    """How the recipe that a finished run or a checkpoint was made by differs from what it says now; empty where that
    can be kept.

    Args:
        file: the recipe.yaml that was written then.
    """
    try:
        then = read_yaml(file)
        provenance = then.pop("provenance").copy()
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        return [f"recipe.yaml: {one_line(error, 300)} where it should hold the recipe and its provenance"]
    with suppress(ValidationError):  # an older vitopt did not know every default
        then = _content(Recipe.model_validate(then))
    was, now = _flat(then), _flat(_content(row.recipe))
    lines = [one_line(f"{key}: {was.get(key, 'absent')} then, {now.get(key, 'absent')} in the recipe")
             for key in sorted((was.keys() | now.keys()) - WITHOUT_EFFECT) if was.get(key) != now.get(key)]
    for key, digest in _forerunners(row).items():
        if provenance.get(key) != digest:
            lines.append(f"{key.removesuffix('_sha256')}: its weights are no longer those that this run was made with")
    return lines


def refuse_changed(rows: list[Row]) -> None:
    """Raise InputError, with the differences, where a run that is finished or under way is not what its recipe says."""
    problems = []
    for row in rows:
        finished = is_finished(row.folder)
        if is_finished(row.home) if row.seeds else _finished_seeds(row.home):
            was, now = ("of a single seed", "lists seeds") if row.seeds else ("of several seeds", "names a single one")
            problems.append(f"{row.path}: seed: {row.home} is finished {was} and the recipe {now}: "
                            "give --force to replace what is there, or output=DIR to keep both")
            continue
        file = row.folder / "recipe.yaml" if finished else checkpoints.recipe_of(row.folder)
        if file and (lines := differences(row, file)):
            what = f"its run in {row.folder} is finished" if finished else f"its run under way in {file.parent.parent}"
            problems.append(f"{row.path}: {what} and differs ({'; '.join(lines)}): "
                            "give --force to make it anew, or output=DIR to keep both")
    if problems:
        raise InputError(*dict.fromkeys(problems))


def open_checkpoints(row: Row, accelerator: Accelerator) -> tuple[Checkpoints, torch.nn.Module | None]:
    """The checkpoints of a row, and its model where it was under way already. Call it on all processes."""
    recipe = yaml.safe_dump(_resolved(row, accelerator.num_processes), sort_keys=False)
    saved = Checkpoints(row.folder, accelerator, recipe, row.home)
    file = checkpoints.recipe_of(row.folder)
    if file and differences(row, file):  # of another recipe, and --force was given
        accelerator.wait_for_everyone()
        saved.remove()
    accelerator.wait_for_everyone()
    return saved, saved.open()


def unfinished(folder: Path) -> Path:
    """Where a run is written until it is whole."""
    return _beside(folder, "unfinished")


@contextmanager
def writing(row: Row, accelerator: Accelerator):
    """Let the block write into `unfinished(row.folder)`, and put that in the place of `row.folder` if it ends well.

    Raises:
        InputError: another run writes this row.
    """
    folder = row.folder
    partial, replaced = unfinished(folder), _beside(folder, "replaced")
    with _locked(folder, accelerator):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            yield
        except BaseException:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if accelerator.is_main_process:
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
            for old in (replaced, checkpoints.folder_of(folder), folder.with_name(f"{folder.name}.last_good")):
                shutil.rmtree(old, ignore_errors=True)
            if row.seeds:
                _remove_single(row.home)


@contextmanager
def _locked(folder: Path, accelerator: Accelerator):
    """Keep other runs away from a row, on every machine that sees the same disk."""
    file, problem, stream = _beside(folder, "lock"), [None], None
    if accelerator.is_main_process:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stream = _lock(file)
        except OSError as error:
            problem = [f"{folder}: cannot be written ({error.strerror or error}): mend this, or give output=DIR"]
        else:
            problem = [None if stream else f"{folder}: another run is making this row: wait for it, or give output=DIR"]
    problem, = broadcast_object_list(problem)
    if problem:
        raise InputError(problem)
    try:
        yield
    finally:
        if stream:
            file.unlink(missing_ok=True)
            stream.close()  # and the lock goes, as it does with a process that is killed


def _lock(file: Path):
    """The open file, locked, or None where another process has it."""
    while True:
        stream = file.open("w")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(stream.fileno()).st_ino == file.stat().st_ino:
                return stream
        except BlockingIOError:
            stream.close()
            return None
        except FileNotFoundError:
            pass
        stream.close()  # whoever had it has removed it meanwhile


def _remove_single(home: Path) -> None:
    """Remove the run of a single seed from a folder where runs of several seeds take its place."""
    if not (home / "metrics.json").is_file():
        return
    (home / "metrics.json").unlink()  # first: without it there is no finished run here
    for path in sorted(home.iterdir()):
        if not re.match(r"\.?seed_\d+", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _beside(folder: Path, state: str) -> Path:
    return folder.parent / f".{folder.name}.{state}"


def write(folder: Path, row: Row, numbers: dict, history: list[dict], cuts: list[dict], used: list[dict],
          num_processes: int) -> None:
    """Write everything of a run but its model, which `models.save` has written.

    Args:
        numbers: of metrics.json, with what `metrics.measure` gives.
        history: a dictionary an epoch, see `training.train`.
        cuts: what each call of `pruning.prune` returned.
        used: by training, a reading of each machine; see `devices.of_machines`.
    """
    inference = numbers.pop("inference")
    if cuts:
        (folder / "pruned.json").write_text(json.dumps(cuts) + "\n", encoding="utf-8")
        numbers["pruned"] = [{key: value for key, value in cut.items() if key != "axes"} for cut in cuts]
    trained = energy.total(used) if used else energy.NOTHING
    numbers |= {"train_seconds": trained["seconds"], "train_energy_kwh": trained["energy_kwh"],
                "train_power_source": trained["power_source"], "num_processes": num_processes}
    resolved = _resolved(row, num_processes, device=numbers["device"], device_name=numbers["device_name"])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
    columns = ["epoch", "loss", "validation_accuracy", "lr", "seconds", "images_per_second"]
    pd.DataFrame(history, columns=columns).to_csv(folder / "history.csv", index=False)
    pd.DataFrame([*({"phase": "train", **reading} for reading in used or [energy.NOTHING]),
                  {"phase": "inference", **inference}]).to_csv(folder / "energy.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _resolved(row: Row, num_processes: int, **where: str) -> dict:
    """The recipe of a row with every default, and by what it was made."""
    provenance = {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"), **where, "num_processes": num_processes,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        **({"seeds": row.seeds} if row.seeds else {}),
        **_forerunners(row),
    }
    return {**_content(row.recipe), "provenance": provenance}


def teachers(row: Row) -> list[torch.nn.Module]:
    """The teachers of a row, with their weights.

    Raises:
        InputError: one cannot be had.
    """
    return [models.load(teacher) if isinstance(teacher, Path)
            else _teacher(teacher, _numbered("distill.teacher", number), "cpu")
            for number, teacher in enumerate(row.teachers)]


def _teacher(section: Model, key: str, device: str) -> torch.nn.Module:
    """A timm model with the classes that its weights know."""
    try:
        return models.build(section, None, device)
    except InputError as error:
        raise InputError(*(problem.replace("model", key, 1) for problem in error.problems)) from error


def kept_of_teacher(row: Row, cuts: list[dict]) -> dict[str, torch.Tensor]:
    """Which channels of its first teacher a row's model has kept, by axis; empty where it does not descend from it.

    Args:
        cuts: what each call of `pruning.prune` returned for this row.

    Returns:
        By axis of which something went, indices (groups, channels).
    """
    kept, folder, passed = {}, row.start, set()
    teacher = row.teachers[0] if row.teachers else None
    try:
        while folder not in passed:
            kept = _composed(reversed(cuts), kept)
            if folder is None or folder == teacher:
                return kept if folder is not None else {}
            passed.add(folder)
            cuts = _cuts(folder / "pruned.json")
            recipe = read_yaml(folder / "recipe.yaml")
            start, seed = recipe.get("start"), recipe.get("seed", 0)
            home = folder.parent if recipe.get("provenance", {}).get("seeds") else folder
            folder = _forerunner(home, start, seed, {}) if start else None
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        pass  # an older run, or none of ours
    return {}


class _Kept(BaseModel):
    """An axis of pruned.json: the kept ones of `before` channels, by group."""

    before: int
    kept: list[list[Annotated[int, Field(ge=0, lt=2 ** 31)]]] | None = None

    @model_validator(mode="after")
    def _are_there(self):
        groups = self.kept
        if groups is not None and (not groups or not groups[0] or len({len(group) for group in groups}) > 1
                                   or max(map(max, groups)) >= self.before):
            raise ValueError("these are no channels of it")
        return self


class _Cut(BaseModel):
    axes: dict[str, _Kept]


def _cuts(path: Path) -> list[dict]:
    """The cuts of a run, as `write` wrote them; none where it had none.

    Raises:
        OSError: they cannot be read. ValueError: these are none.
    """
    if not path.exists():
        return []
    content = files.read_json(path, LONGEST_CUTS)
    return [cut.model_dump() for cut in TypeAdapter(list[_Cut]).validate_python(content, strict=True)]


def _composed(cuts, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Indices into what was there before these cuts, the latest first, of indices into what they left.

    Raises:
        ValueError: what one cut left is not what the next one found.
    """
    for cut in cuts:
        for name, axis in cut["axes"].items():
            if axis.get("kept"):
                before, later = torch.tensor(axis["kept"]), kept.get(name)
                if later is not None and (len(later) != len(before) or later.max() >= before.shape[1]):
                    raise ValueError(f"{name}: {tuple(later.shape)} of {tuple(before.shape)}")
                kept[name] = before if later is None else before.gather(1, later)
    return kept


def _content(recipe: Recipe) -> dict:
    """A recipe with every default written out and what is absent left out."""
    return recipe.model_dump(mode="json", exclude={"provenance"}, exclude_none=True)


def _forerunners(row: Row) -> dict[str, str]:
    """Which weights a row's start and teacher have now."""
    weights = {f"{key.removeprefix('distill.')}_sha256": folder / "model.safetensors"
               for key, folder in row.needs.items()}
    weights |= {f"{_numbered('teacher', number)}_sha256": Path(teacher.checkpoint)
                for number, teacher in enumerate(row.teachers) if isinstance(teacher, Model) and teacher.checkpoint}
    return {key: files.sha256(file) if file.exists() else "absent" for key, file in weights.items()}


def _flat(content: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
