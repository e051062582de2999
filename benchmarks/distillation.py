"""What each way of listening to a teacher is worth: one student, one budget, several seeds.

    python benchmarks/distillation.py runs/cifar10/baseline data.limit=4000 [--seeds 0 1 2] [--only kl dist]

The student is a small ViT, trained anew by every way on the images of the teacher's recipe; only the loss differs. Each
cell is the mean test accuracy of the epochs that validation chose, with the 95 % interval of Student's t over the
seeds, and beside it the mean of the differences to no teacher, seed by seed. Weights and temperatures are those of
`WAYS`, written down before any run and tuned for none.
"""

import argparse
import statistics
from pathlib import Path

import yaml
from accelerate.utils import set_seed
from scipy.stats import t as student_t

from vitopt import data, model as models, training
from vitopt.recipe import Model, Recipe, errors_as_lines, read

WAYS = {
    "no teacher": None,
    "kl": {"logits": {"loss": "kl", "temperature": 4.0, "weight": 0.7}},
    "hard": {"logits": {"loss": "hard", "weight": 0.5}},
    "dkd": {"logits": {"loss": "dkd", "temperature": 4.0, "weight": 0.5}},
    "dist": {"logits": {"loss": "dist", "temperature": 4.0, "weight": 0.5}},
    "standardized": {"logits": {"loss": "standardized", "temperature": 2.0, "weight": 0.7}},
    "features": {"logits": None, "features": {"weight": 1.0}},
    "attention": {"logits": None, "attention": {"weight": 1.0}},
    "relations": {"logits": None, "relations": {"weight": 10.0}},
    "kl + features": {"logits": {"loss": "kl", "temperature": 4.0, "weight": 0.7}, "features": {"weight": 1.0}},
    "kl, distillation token": {"logits": {"loss": "kl", "temperature": 4.0, "weight": 0.5}},
}


def interval(values):
    """Half the width of the 95 % interval of the mean."""
    if len(values) < 2:
        return float("nan")
    return student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def accuracy(way, teacher, section, student, epochs, seed):
    name = "deit_tiny_distilled_patch16_224" if "token" in way else "vit_tiny_patch16_224"
    recipe = Recipe.model_validate({
        "model": {"name": name} | student, "data": section, "seed": seed,
        **({"distill": {"teacher": "teacher"} | WAYS[way]} if WAYS[way] else {}),
        "train": {"epochs": epochs, "batch_size": 128, "lr": 1e-3, "warmup_ratio": 0.1, "clip_grad": 1.0,
                  "augment": {"crop": "pad", "hflip": 0.5}}})
    accelerator = training.make_accelerator(recipe.train)
    set_seed(seed)
    model = models.build(Model(name=name, **student), data.num_classes(recipe.data))
    splits = data.load(recipe.data, model.architecture["input"], recipe.train.augment)
    teachers = [models.load(teacher)] if WAYS[way] else []
    model, _ = training.train(model, recipe, splits, accelerator, teachers)
    return training.evaluate(model, splits.test, splits, accelerator)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="a finished run")
    parser.add_argument("words", nargs="*", metavar="data.key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    with errors_as_lines():
        recipes, _ = read([str(args.teacher / "recipe.yaml")], args.words)
        section = next(iter(recipes.values())).data.model_dump(exclude_none=True)
        size = models.load(args.teacher).architecture["input"]
        student = {"img_size": size["height"], "patch_size": size["height"] // 8, "in_chans": size["channels"],
                   "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
        found = {}
        for seed in args.seeds:
            for way in args.only:
                found.setdefault(way, []).append(accuracy(way, args.teacher, section, student, args.epochs, seed))
                print(f"seed {seed}, {way}: {found[way][-1]:.2f} %", flush=True)
    print(f"\n{yaml.safe_dump(student, default_flow_style=True).strip()}, {args.epochs} epochs, seeds {args.seeds}\n")
    print("| | accuracy (%) | more than without a teacher |\n|---|---:|---:|")
    plain = found.get("no teacher")
    for way, values in found.items():
        gains = [value - other for value, other in zip(values, plain)] if plain and way != "no teacher" else []
        gain = f"{statistics.mean(gains):+.2f} ± {interval(gains):.2f}" if gains else ""
        print(f"| {way} | {statistics.mean(values):.2f} ± {interval(values):.2f} | {gain} |")


if __name__ == "__main__":
    main()
