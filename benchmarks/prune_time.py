"""Seconds to prune a ViT: vitopt beside torch-pruning's example for timm models.

    python benchmarks/prune_time.py

Both halve a model with random weights by magnitude, on the CPU, in turns, each time from a fresh copy. `vitopt.prune`
is timed as a user calls it, with the MACs and parameters of before and after that it returns. torch-pruning's is the
mended example of beside_torch_pruning.py: with its MACs and parameters of before and after, and without. It also cuts
the embedding width, as the example does.
"""

import argparse
import copy
import statistics
import time
import warnings

import timm
import torch
from beside_torch_pruning import prune_as_example

import vitopt


def seconds(prune, model):
    model = copy.deepcopy(model)
    start = time.perf_counter()
    prune(model)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=["vit_base_patch16_224", "vit_large_patch16_224"])
    parser.add_argument("--repetitions", nargs="+", type=int, default=[3, 1], help="of each name")
    parser.add_argument("--axes", nargs="+", default=["heads", "hidden"])
    parser.add_argument("--ratio", type=float, default=0.5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"ratio {args.ratio} of {' and '.join(args.axes)}\n")
    print("| model | repetitions | vitopt (s) | torch-pruning (s) | without counts (s) | vitopt / torch-pruning |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, repetitions in zip(args.names, args.repetitions):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        images = torch.randn(1, *model.default_cfg["input_size"])

        def ours(model):
            vitopt.prune(model, ratio=args.ratio, axes=args.axes, importance="l2")

        def theirs(model, counting=True):
            prune_as_example(model, images, args.ratio, mended=True, counting=counting)

        ways = {"ours": ours, "theirs": theirs, "bare": lambda model: theirs(model, counting=False)}
        times = {way: [] for way in ways}
        for _ in range(repetitions):
            for way, prune in ways.items():
                times[way].append(seconds(prune, model))
        median = {way: statistics.median(values) for way, values in times.items()}
        print(f"| {name} | {repetitions} | {median['ours']:.1f} | {median['theirs']:.1f} | {median['bare']:.1f} | "
              f"{median['ours'] / median['theirs']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
