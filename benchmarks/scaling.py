"""What more processes give: measured here, and the arithmetic of where their communication starts to cost.

    python benchmarks/scaling.py recipes/cifar10/baseline.yaml data.root=PATH data.limit=2000 train.epochs=3 \
        train.batch_size=128

Measured: `vitopt.training.train` under accelerate launch, every process with one CPU thread, or one GPU where there are
some; the batch is over all processes. Images/s is the best epoch's. The recipe's `distill` and `prune` are left out.

Arithmetic: a step of a data-parallel training computes for 6 · MACs · images / rate seconds (2 operations a MAC, once
forward and twice back) and exchanges 2 · (N − 1) / N · 4 bytes a parameter in a ring, which overlaps with the way back,
two thirds of the step. Communication starts to cost where it takes longer than that.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from vitopt import data, devices, metrics, model as models, recipe as recipes, training
from vitopt.errors import errors_as_lines
from vitopt.recipe import Model

CONFIG = Path(__file__).parent.parent / "accelerate_config.yaml"


def images_per_second(path, words):
    recipe = next(iter(recipes.read([path], words)[0].values())).model_copy(update={"distill": None, "prune": None})
    accelerator = devices.make_accelerator(recipe.train)
    torch.set_num_threads(1)
    model = models.build(recipe.model, data.num_classes(recipe.data))
    splits = data.load(recipe.data, model.architecture["input"], recipe.train.augment)
    _, history = training.train(model, recipe, splits, accelerator)
    if accelerator.is_main_process:
        print(json.dumps(max(row["images_per_second"] for row in history)))


def measured(path, words, processes):
    command = ["accelerate", "launch", "--config_file", CONFIG, "--num_processes", processes, __file__, path, *words,
               "--worker"]
    done = subprocess.run([str(word) for word in command], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return float(done.stdout.splitlines()[-1])


def arithmetic(name, images, tflops, bandwidths):
    """A line for each number of GPUs: seconds of computing and of communication."""
    model = models.build(Model(name=name), 1000, device="meta")
    macs, params = metrics.macs_of_shapes(model), metrics.count_params(model)
    computing = 6 * macs * images / (tflops * 1e12)
    for count, gigabytes in bandwidths.items():
        exchange = 2 * (count - 1) / count * 4 * params / (gigabytes * 1e9)
        step = computing / 3 + max(2 / 3 * computing, exchange)
        print(f"| {name} | {count} | {gigabytes:g} | {1000 * computing:.0f} | {1000 * exchange:.1f} | "
              f"{computing / step:.0%} | {exchange / (2 / 3 * computing) * images:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe that begins with a model")
    parser.add_argument("words", nargs="*", metavar="section.key=value")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=128, help="a step and GPU, for the arithmetic")
    parser.add_argument("--tflops", type=float, default=400.0, help="what a GPU reaches in training, assumed")
    parser.add_argument("--bandwidth", type=float, nargs=3, default=[300.0, 40.0, 40.0], metavar="GB/S",
                        help="of the ring per GPU among 8 (inside a machine), 64 and 512 GPUs, assumed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with errors_as_lines():
        if args.worker:
            return images_per_second(args.recipe, args.words)
        speeds = {count: [] for count in args.processes}
        for _ in range(args.rounds):
            for count in args.processes:
                speeds[count].append(measured(args.recipe, args.words, count))
        print("| processes | images/s | efficiency |\n|---:|---:|---:|")
        for count, own in speeds.items():
            first = args.processes[0]
            shares = [speed / alone * first / count for speed, alone in zip(own, speeds[first])]
            print(f"| {count} | {', '.join(f'{speed:.0f}' for speed in own)} | "
                  f"{', '.join(f'{share:.0%}' for share in shares)} |")
        print(f"\n{args.images} images a GPU and step, {args.tflops:g} TFLOP/s a GPU:\n\n"
              "| model | GPUs | GB/s of the ring | computing (ms) | exchange (ms) | efficiency | "
              "images a GPU below which it costs |\n|---|---:|---:|---:|---:|---:|---:|")
        for name in ("vit_base_patch16_224", "vit_large_patch16_224"):
            arithmetic(name, args.images, args.tflops, dict(zip((8, 64, 512), args.bandwidth)))


if __name__ == "__main__":
    main()
