"""Accuracy right after cutting, before any training: each importance, with and without repair, at equal MACs.

    python benchmarks/after_cutting.py runs/digits/baseline

Every cell is the accuracy on the run's test images of a copy that was cut to the share of MACs above it. Nothing is
chosen by these numbers. `repair` solves the layers that read what is left again, on 512 training images.
"""

import argparse
import copy
import warnings
from pathlib import Path

import pandas as pd
from accelerate.utils import set_seed

from vitopt import data, devices, model as models, pruning, recipe as recipes, training
from vitopt.recipe import Augment, Prune

IMPORTANCES = ["random", "l1", "l2", "activation", "taylor", "hessian", "gates"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run, such as runs/digits/baseline")
    parser.add_argument("--cuts", type=int, nargs="+", default=[10, 20, 30, 40, 50, 60], help="percent of the MACs")
    parser.add_argument("--importances", nargs="+", default=IMPORTANCES)
    parser.add_argument("--ranking", default="global")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # what stays is in the recipe's own report
    section = next(iter(recipes.read([str(args.run / "recipe.yaml")], [])[0].values())).data
    accelerator = devices.make_accelerator()
    model = models.load(args.run).to(accelerator.device)
    splits = data.load(section, model.architecture["input"], Augment())
    whole, images = training.evaluate(model, splits.test, splits, accelerator)
    rows = {}
    for importance in args.importances:
        for repair in (False, True):
            cells = {}
            for cut in args.cuts:
                set_seed(0)
                smaller = copy.deepcopy(model)
                pruning.prune(smaller, Prune(target={"macs": 1 - cut / 100}, importance=importance, repair=repair,
                                             ranking=args.ranking), training.calibration(splits, accelerator))
                cells[f"-{cut} %"], _ = training.evaluate(smaller, splits.test, splits, accelerator)
            rows[importance + (" + repair" if repair else "")] = cells
            print(importance, repair, cells, flush=True)
    table = pd.DataFrame(rows).T.map(lambda value: f"{value:.1f}")
    print(f"\nuncut: {whole:.2f} % on {images} test images; {args.ranking} ranking\n")
    print(table.to_string())


if __name__ == "__main__":
    main()
