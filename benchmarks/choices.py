"""What each choice of a recipe's training is worth: the recipe beside itself with one choice changed, at equal epochs.

    python benchmarks/choices.py recipes/cifar10/baseline.yaml data.root=PATH data.limit=7500 data.validation=0.3333 \\
        train.epochs=40 train.batch_size=128 model.embed_dim=256 model.depth=4 --runs runs/choices

Each is trained once a seed and judged on the images that validation holds out; the test images stay unseen. The curves
go to `--plot`. A choice whose history lies in `--runs` already is not trained again.
"""

import argparse
import statistics
from pathlib import Path

import pandas as pd
from accelerate.utils import set_seed
from matplotlib import pyplot

from vitopt import data, devices, model as models, recipe as recipes, training
from vitopt.errors import InputError, errors_as_lines
from vitopt.report import interval

LIGHT = ["train.augment.auto_augment=null", "train.augment.random_erasing=0", "train.augment.mixup=0",
         "train.augment.cutmix=0", "train.augment.mixup_off_epochs=0", "train.augment.repeats=1"]
CHOICES = {
    "the recipe": [],
    # crop and flip alone, as plain scripts train
    "light": [*LIGHT, "train.label_smoothing=0", "train.ema_decay=null", "model.drop_path_rate=0"],
    "light, with EMA and smoothing": LIGHT,
    "no mixing": ["train.augment.mixup=0", "train.augment.cutmix=0", "train.augment.mixup_off_epochs=0"],
    "no RandAugment": ["train.augment.auto_augment=null"],
    "no erasing": ["train.augment.random_erasing=0"],
    "mixing off in the last tenth": ["train.augment.mixup_off_epochs=TENTH"],
    "three views of an image": ["train.augment.repeats=3"],
    "no stochastic depth": ["model.drop_path_rate=0"],
    "no EMA": ["train.ema_decay=null"],
    "half the learning rate": ["train.lr=5.0e-4"],
    "twice the learning rate": ["train.lr=2.0e-3"],
    "no qkv bias": ["model.qkv_bias=false"],
    "qkv bias": ["model.qkv_bias=true"],
}


def curve(path, words, choice, seed):
    """The history of one training; see `training.train`."""
    recipe = only(path, words)
    tenth = str(round(recipe.train.epochs / 10))
    recipe = only(path, words + [word.replace("TENTH", tenth) for word in CHOICES[choice]])
    recipe = recipe.model_copy(update={"seed": seed})
    accelerator = devices.make_accelerator(recipe.train)
    set_seed(seed)
    model = models.build(recipe.model, data.num_classes(recipe.data))
    splits = data.load(recipe.data, model.architecture["input"], recipe.train.augment)
    _, history = training.train(model, recipe, splits, accelerator)
    return pd.DataFrame(history)


def only(path, words):
    found, problems = recipes.read([path], words)
    if problems:
        raise InputError(*problems)
    return next(iter(found.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe that begins with a model")
    parser.add_argument("words", nargs="*", metavar="section.key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--runs", type=Path, default=Path("runs/choices"))
    parser.add_argument("--plot", type=Path, default=Path("runs/choices/curves.png"))
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    found = {}
    with errors_as_lines():
        for seed in args.seeds:
            for choice in args.only:
                file = args.runs / f"{choice.replace(' ', '_')}_{seed}.csv"
                if not file.exists():
                    print(f"seed {seed}, {choice}:", flush=True)
                    curve(args.recipe, args.words, choice, seed).to_csv(file, index=False)
                found.setdefault(choice, []).append(pd.read_csv(file))
    print(f"\n{args.recipe} {' '.join(args.words)}, seeds {args.seeds}\n")
    print("| | validation at the end (%) | best epoch's (%) |\n|---|---:|---:|")
    for choice, histories in found.items():
        last, best = ([of(history["validation_accuracy"]) for history in histories]
                      for of in (lambda values: values.iloc[-1], max))
        print(f"| {choice} | {_mean(last)} | {_mean(best)} |")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for choice, histories in found.items():
        mean = pd.concat(histories).groupby("epoch")["validation_accuracy"].mean()
        heavy = choice in ("the recipe", "light")
        axes.plot(mean.index, mean, label=f"{choice} ({mean.iloc[-1]:.1f})", linewidth=2.5 if heavy else 1)
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(args.plot, dpi=120)


def _mean(values):
    half = f" ± {interval(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{half}"


if __name__ == "__main__":
    main()
