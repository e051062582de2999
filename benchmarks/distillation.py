"""What each way of listening to a teacher is worth: one student, one budget, several seeds.

    python benchmarks/distillation.py runs/digits/baseline data.limit=200 train.epochs=60 student.patch_size=8
    python benchmarks/distillation.py runs/digits/baseline data.limit=200 train.epochs=10 --cut 0.4

The student is a small ViT that begins anew, or with `--cut` the teacher cut to a share of its MACs; every way trains it
on the images of the teacher's recipe, and only the loss differs. Each
cell is the mean test accuracy of the epochs that validation chose, with the 95 % interval of Student's t over the
seeds, and beside it the mean of the differences to no teacher, seed by seed. Weights and temperatures are those of
`WAYS`, written down before any run and tuned for none, but for features and attention maps: theirs were taken among 1,
3, 10, 30 and 100 by the validation images of the digits, a cut student and ten other seeds.
"""

import argparse
import copy
import statistics
from pathlib import Path

import torch
import yaml
from accelerate.utils import set_seed

from vitopt import data, devices, model as models, pruning, training
from vitopt.errors import errors_as_lines
from vitopt.recipe import Data, Model, Prune, Recipe
from vitopt.report import interval

WAYS = {
    "no teacher": None,
    "kl": {"logits": {"loss": "kl", "temperature": 4.0, "weight": 0.7}},
    "hard": {"logits": {"loss": "hard", "weight": 0.5}},
    "dkd": {"logits": {"loss": "dkd", "temperature": 4.0, "weight": 0.5}},
    "dist": {"logits": {"loss": "dist", "temperature": 4.0, "weight": 0.5}},
    "standardized": {"logits": {"loss": "standardized", "temperature": 2.0, "weight": 0.7}},
    "features": {"logits": None, "features": {"weight": 10.0}},
    "attention": {"logits": None, "attention": {"weight": 10.0}},
    "relations": {"logits": None, "relations": {"weight": 10.0}},
    "kl + features": {"logits": {"loss": "kl", "temperature": 4.0, "weight": 0.7}, "features": {"weight": 10.0}},
    "kl, distillation token": {"logits": {"loss": "kl", "temperature": 4.0, "weight": 0.5}},
}

STUDENT = {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0, "weight_init": "jax"}
TRAIN = {"epochs": 10, "batch_size": 128, "lr": 1e-3, "warmup_ratio": 0.1, "clip_grad": 1.0,
         "augment": {"crop": "pad", "hflip": 0.0}}


def cut_copy(teacher, section, share):
    """The teacher's run cut to a share of its MACs, and which of its channels are left, by axis."""
    model, accelerator = models.load(teacher), devices.make_accelerator()
    splits = data.load(section, model.architecture["input"])
    set_seed(0)
    done = pruning.prune(model, Prune(target={"macs": share}), training.calibration(splits, accelerator))
    before = training.evaluate(model, splits.validation, splits, accelerator)[0]
    print(f"student: {done['macs']['after'] / done['macs']['before']:.2f} of the MACs, {before:.2f} % before training")
    return model, {name: torch.tensor(axis["kept"]) for name, axis in done["axes"].items() if axis.get("kept")}


def accuracy(way, teacher, section, student, train, seed, cut):
    name = "deit_tiny_distilled_patch16_224" if "token" in way else "vit_tiny_patch16_224"
    recipe = Recipe.model_validate({
        "model": {"name": name} | student, "data": section.model_dump(), "seed": seed,
        **({"distill": {"teacher": "teacher"} | WAYS[way]} if WAYS[way] else {}),
        "train": train})
    accelerator = devices.make_accelerator(recipe.train)
    set_seed(seed)
    if cut:
        model, kept = copy.deepcopy(cut)
    else:
        model, kept = models.build(Model(name=name, **student), data.num_classes(recipe.data)), None
    splits = data.load(recipe.data, model.architecture["input"], recipe.train.augment)
    teachers = [models.load(teacher)] if WAYS[way] else []
    model, _ = training.train(model, recipe, splits, accelerator, teachers, kept)
    return training.evaluate(model, splits.test, splits, accelerator)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="a finished run")
    parser.add_argument("words", nargs="*", metavar="data.key=value | student.key=value | train.key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--cut", type=float, help="share of the teacher's MACs that the student keeps, such as 0.4")
    args = parser.parse_args()
    with errors_as_lines():
        size = models.load(args.teacher).architecture["input"]
        student = STUDENT | {"img_size": size["height"], "patch_size": size["height"] // 8,
                             "in_chans": size["channels"]}
        section = yaml.safe_load((args.teacher / "recipe.yaml").read_text())["data"]
        train = dict(TRAIN)
        for word in args.words:
            key, _, value = word.partition("=")
            part, _, key = key.partition(".")
            {"data": section, "student": student, "train": train}[part][key] = yaml.safe_load(value)
        section = Data.model_validate(section)
        cut = cut_copy(args.teacher, section, args.cut) if args.cut else None
        ways = [way for way in args.only if not (cut and "token" in way)]  # the teacher's own tokens stay
        found = {}
        for seed in args.seeds:
            for way in ways:
                found.setdefault(way, []).append(accuracy(way, args.teacher, section, student, train, seed, cut))
                print(f"seed {seed}, {way}: {found[way][-1]:.2f} %", flush=True)
    print(f"\nstudent {f'cut to {args.cut}' if cut else student}, data {section}, train {train}, seeds {args.seeds}\n")
    print("| | accuracy (%) | more than without a teacher |\n|---|---:|---:|")
    plain = found.get("no teacher")
    for way, values in found.items():
        gains = [value - other for value, other in zip(values, plain)] if plain and way != "no teacher" else []
        gain = f"{statistics.mean(gains):+.2f} ± {interval(gains):.2f}" if gains else ""
        print(f"| {way} | {statistics.mean(values):.2f} ± {interval(values):.2f} | {gain} |")


if __name__ == "__main__":
    main()
