"""Make the rows of a table, one a recipe, in the order in which they need one another.

    accelerate launch --config_file accelerate_config.yaml recipes/run.py recipes/digits/*.yaml
"""

import argparse
import copy
import os
from contextlib import nullcontext

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # OpenMP threads that wait soon sleep: a busy machine stays usable

from accelerate.utils import set_seed  # noqa: E402

from vitopt import data, devices, energy, metrics, model as models, pruning, report, runs, training  # noqa: E402
from vitopt.errors import errors_as_lines  # noqa: E402
from vitopt.recipe import Augment  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RECIPE.yaml | section.key=value | output=DIR")
    parser.add_argument("--dry-run", action="store_true", help="show what the rows would be; no data, no training")
    parser.add_argument("--force", action="store_true", help="make finished rows again")
    args = parser.parse_args()
    rows = runs.plan(args.words)
    if args.dry_run:
        return dry_run(rows)
    if not args.force:
        runs.refuse_changed(rows)
    devices.say_where()
    for row in rows:
        make(row, args.force)
    if devices.make_accelerator().is_main_process:
        for folder in dict.fromkeys(row.home.parent for row in rows):
            print(report.write(folder))


def make(row, force):
    """One row: a model, pruned, trained, measured, saved. What its recipe does not name does not happen."""
    recipe, unfinished = row.recipe, runs.unfinished(row.folder)
    accelerator = devices.make_accelerator(recipe.train, unfinished)
    if runs.is_finished(row.folder) and not force:
        accelerator.print(f"{row.name}: finished, kept in {row.folder}")
        return
    accelerator.print(f"{row.name}:")
    set_seed(recipe.seed)
    model = models.load(row.start) if row.start else models.build(recipe.model, data.num_classes(recipe.data))
    with accelerator.local_main_process_first():  # one process a machine downloads
        augment = recipe.train.augment if recipe.train else Augment()
        splits = data.load(recipe.data, model.architecture["input"], augment)
    model.architecture["classes"] = splits.classes
    tracker = energy.open_tracker(devices.local_gpus(accelerator)) if accelerator.is_local_main_process else None

    with runs.writing(row, accelerator):
        numbers, history, cuts = {}, [], pruning.steps(model.to(accelerator.device), recipe.prune)
        saved, under_way = runs.open_checkpoints(row, accelerator)
        model, done, teachers = under_way or model, saved.cuts, runs.teachers(row)
        with energy.window(tracker, row.name, saved.used) if recipe.train else nullcontext() as saved.reading:
            for cut in cuts[len(done):]:
                if done:
                    between = training.for_epochs(recipe, cut.step_epochs)
                    model, _ = training.train(model, between, splits, accelerator, teachers,
                                              runs.kept_of_teacher(row, done), saved)
                set_seed(recipe.seed)
                done.append(pruning.prune(model.to(accelerator.device), cut, training.calibration(splits, accelerator)))
            if recipe.train:
                model, history = training.train(model, recipe, splits, accelerator, teachers,
                                                runs.kept_of_teacher(row, done), saved)
                numbers = training.chosen_epoch(history)
        used = devices.of_machines(saved.reading, accelerator)
        numbers["accuracy"], numbers["test_images"] = training.evaluate(model, splits.test, splits, accelerator)
        if accelerator.is_main_process:
            print(f"  test accuracy {numbers['accuracy']:.2f} %, measuring")
            models.save(model, unfinished)
            numbers |= metrics.measure_apart(unfinished, accelerator.device)
            runs.write(unfinished, row, numbers, history, done, used, accelerator.num_processes)
    accelerator.wait_for_everyone()


def dry_run(rows):
    """Show what the rows would be, without data or training."""
    accelerator, dry = devices.make_accelerator(), {}
    for row in rows:
        if row.home in dry:  # another seed of a row that was shown
            dry[row.folder] = dry[row.home]
            continue
        if row.start:
            model = models.load(row.start) if runs.is_finished(row.start) else copy.deepcopy(dry[row.start])
        else:
            model = models.build(row.recipe.model, data.num_classes(row.recipe.data))
        for cut in pruning.steps(model, row.recipe.prune):  # what needs data is left out: magnitudes rank the channels
            pruning.prune(model, cut.model_copy(update={"importance": "l2", "repair": False}))
        dry[row.folder] = dry[row.home] = model
        accelerator.print(metrics.describe(row.home.name, model))
    accelerator.print("How a pruned row's channels spread over its blocks is a guess: the run ranks them on data.")


if __name__ == "__main__":
    with errors_as_lines():
        main()
