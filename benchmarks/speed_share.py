"""What share of the MACs that pruning removes becomes speed.

    python benchmarks/speed_share.py [--device cuda] [--name NAME] [--image-size 224] [--batches 1 64]

The dense model beside three pruned to the same MACs: widths aligned as vitopt does by default, not aligned, and with
head dims made odd, the worst for a kernel. All are timed in turns, and t_pruned / t_dense is the median over the rounds
of the two times of one round, so that a disturbance meets both alike.

share = (1 - t_pruned / t_dense) / (1 - MACs_pruned / MACs_dense): 1 when time falls as MACs do.

In float32 and, where the device multiplies it in hardware, in bfloat16 under autocast. All cores, unless
OMP_NUM_THREADS says otherwise.
"""

import argparse
import copy
import os
import statistics
import time
import warnings

import torch

import vitopt
from vitopt import devices, metrics, model as models


def pruned(dense, target, align):
    model = copy.deepcopy(dense)
    options = {} if align is None else {"align": align}
    return model, vitopt.prune(model, target={"macs": target}, importance="l2", **options)


def with_odd_heads(dense, target):
    """Head dims cut by the share that makes them odd everywhere, and hidden features to the MACs of the others."""
    head_dim = next(width["head_dim"] for width in dense.architecture["widths"].values() if "head_dim" in width)
    model = copy.deepcopy(dense)
    wanted = round(head_dim * target) // 2 * 2 + 1
    vitopt.prune(model, ratio={"head_dim": 1 - wanted / head_dim}, importance="l2", align=1, ranking="local")
    share = target * metrics.count_macs(dense) / metrics.count_macs(model)
    vitopt.prune(model, target={"macs": share}, axes=["hidden"], importance="l2", align=1, ranking="local")
    return model


def inner_widths(model):
    """What head dims and hidden features occur."""
    found = {}
    for width in model.architecture["widths"].values():
        for field, size in width.items():
            if field in ("head_dim", "v_head_dim", "hidden_features"):
                found.setdefault(field, set()).add(size)
    return ", ".join(f"{field} {min(sizes)}" + (f"–{max(sizes)}" if len(sizes) > 1 else "")
                     for field, sizes in found.items())


@torch.inference_mode()
def interleaved(variants, batch, precision, least, limit):
    """Median milliseconds of a batch and median time relative to the dense model's of the same round, by variant."""
    times = {name: [] for name in variants}
    begin = time.perf_counter()
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16"):
        for model in variants.values():
            for _ in range(2):
                model(batch)
        while min(map(len, times.values())) < least or time.perf_counter() - begin < limit:
            for name, model in variants.items():
                synchronize(batch)
                start = time.perf_counter()
                model(batch)
                synchronize(batch)
                times[name].append(1000 * (time.perf_counter() - start))
            if time.perf_counter() - begin > 10 * limit and len(times[name]) >= 3:
                break
    relative = {name: statistics.median(own / dense for own, dense in zip(values, times["dense"]))
                for name, values in times.items()}
    return {name: statistics.median(values) for name, values in times.items()}, relative, len(times[name])


def synchronize(batch):
    if batch.is_cuda:
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="vit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--macs", type=float, default=0.6, help="share of the MACs that is left")
    parser.add_argument("--least", type=int, default=15, help="timings of each model")
    parser.add_argument("--seconds", type=float, default=10, help="that the timings of a row of models last at least")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    torch.manual_seed(0)
    dense = vitopt.create_model(args.name, img_size=args.image_size, num_classes=10).eval()
    variants = {"dense": dense, "aligned (default)": pruned(dense, args.macs, None)[0],
                "align: 1": pruned(dense, args.macs, 1)[0], "odd head_dim": with_odd_heads(dense, args.macs)}
    macs = {name: metrics.count_macs(model) for name, model in variants.items()}
    on_gpu = args.device.startswith("cuda")
    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.name}, {args.image_size} pixels, target macs {args.macs}, {device}, torch {torch.__version__}\n")
    print("| precision | batch | model | MACs (M) | MACs left | ms (median) | rounds | speedup | share |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    variants = {name: model.eval().to(args.device) for name, model in variants.items()}
    for precision in ["fp32"] + ["bf16"] * devices.has_bf16(on_gpu):
        for size in args.batches:
            batch = models.example_input(dense, size)
            times, relative, count = interleaved(variants, batch, precision, args.least, args.seconds)
            for name, milliseconds in times.items():
                left = macs[name] / macs["dense"]
                share = "" if name == "dense" else f"{(1 - relative[name]) / (1 - left):.2f}"
                print(f"| {precision} | {size} | {name} | {macs[name] / 1e6:.1f} | {left:.3f} | {milliseconds:.2f} | "
                      f"{count} | {1 / relative[name]:.2f} | {share} |", flush=True)
    print()
    for name, model in variants.items():
        print(f"- {name}: {inner_widths(model)}")


if __name__ == "__main__":
    main()
