"""How fast vitopt trains, beside what one would use instead: the same model, batch size, loss and images, one machine.

    python benchmarks/training.py [--data FOLDER] [--timm CHECKOUT] [--model tiny] [--augment full]

Four ways, each without a teacher and with the ViT of baseline.yaml as one (random weights, logits by KL), in turns:

- vitopt: `vitopt.training.train` with a recipe of recipes/cifar10. Small images are decoded once, before it begins,
  and augmented a batch at a time. Once more with the teacher's logits read from disk (`distill.store: true`); the run
  that writes them is not counted.
- timm: train.py of a checkout of its repository, with the timm that lies there, as a process of its own; the teacher
  by its --kd-model-name, where it has that. It offers no crop with padding: `--train-crop-mode rkrr --scale 0.64 1
  --ratio 1 1`, which enlarges half of the images by up to 40 / 32 and shifts them, is nearest, and costs least.
- bare: thirty lines around accelerate, with timm's and torchvision's transforms, image by image, in a DataLoader.
- fp32 eager: bare without mixed precision, as simple scripts do it.

All four: the recipe's AdamW (fused in vitopt alone), label smoothing, clipped gradients and moving average of the
weights, schedules by each way's own default, all cores for products of matrices, in bf16 where the machine multiplies
it in hardware (--precision), on the GPU where there is one (CUDA_VISIBLE_DEVICES= hides it). light is the crop and a
flip; full is the recipe's augmentation, with RandAugment, random erasing, mixup and CutMix. Loaders take --workers
processes more, which share the cores with the training. timm's own switches, such as TIMM_FUSED_ATTN=0, reach all ways.

Steady steps alone are counted. vitopt trains on epochs of --images, the first is dropped, and its history says how long
the others took: start and end of each are in it, validation is not. The others go once through a folder so long that
the same number of steps before is dropped, and that their loaders still have all of their work ahead at the last step
that counts: bare by the clock, synchronised, timm by its log of every step. Files are read once before.

images/s is the median of the rounds. Share of peak: 6 FLOPs per MAC of the student, and 2 per MAC of a teacher that is
asked, each second, of what the best of several large products of matrices reaches in that precision in this run, with
as many threads. Beside vitopt: a way's images/s by those of vitopt without a teacher in the same round. Cost of a
teacher: seconds of its step by those of the same way without, in the same round. Both: median (least to most).
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file
from timm.data import Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from vitopt import data, devices, metrics, model as models, training
from vitopt.checkpoints import Checkpoints
from vitopt.recipe import Model, Recipe

RECIPES = Path(__file__).parent.parent / "recipes" / "cifar10"
LIGHT = {"crop": "pad", "padding": 4, "hflip": 0.5}
LOGITS = {"loss": "kl", "temperature": 4.0, "weight": 0.7}


def random_images(folder, size, classes=10, count=100):
    """Smooth noise as JPEG, about as many bytes as a photograph."""
    generator = torch.Generator().manual_seed(0)
    for part, name, number in itertools.product(("train", "test"), range(classes), range(count)):
        (folder / part / str(name)).mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(noise.numpy()).resize((size, size)).save(folder / part / str(name) / f"{number}.jpg")
    return folder


def link(source, target, count):
    """A folder of so many images, all classes in turn; where there are not so many, some come again."""
    for part, wanted in (("train", count), ("test", 200)):
        classes = sorted(path for path in (source / part).iterdir() if path.is_dir())
        images = {path.name: itertools.cycle(sorted(path.iterdir())) for path in classes}
        for name in images:
            (target / part / name).mkdir(parents=True)
        for number, name in zip(range(wanted), itertools.cycle(images)):
            image = next(images[name]).resolve()
            image.read_bytes()
            (target / part / name / f"{number:07d}{image.suffix}").symlink_to(image)
    return target


def with_vitopt(work, taught, precision):
    section = work.train | {"epochs": 1 + work.epochs, "precision": precision}
    taught = {"distill": {"teacher": "teacher", "logits": LOGITS, "store": taught == "stored"}} if taught else {}
    limit, held_out = work.steps * work.batch + 2 * work.classes, 2 * work.classes - 0.5  # is rounded up
    images = {"name": "folder", "root": str(work.folder), "limit": limit, "validation": held_out / limit}
    recipe = Recipe.model_validate({"model": work.model, "data": images, "train": section, **taught})
    with contextlib.redirect_stdout(io.StringIO()):
        accelerator = devices.make_accelerator(recipe.train)
        model = models.build(recipe.model, work.classes)
        splits = data.load(recipe.data, model.architecture["input"], recipe.train.augment)
        teachers = [work.teacher] if taught else []
        _, history = training.train(model, recipe, splits, accelerator, teachers,
                                    saved=Checkpoints(work.folder / "row", accelerator))
    return statistics.harmonic_mean(row["images_per_second"] for row in history[1:])  # each of as many images


def with_accelerate(work, taught, precision):
    AcceleratorState._reset_state()  # the way before may have had another precision
    accelerator = Accelerator(cpu=work.device == "cpu", mixed_precision=precision.replace("fp32", "no"))
    model = timm.create_model(**{"model_name": work.model["name"], "num_classes": work.classes} | work.kwargs)
    augment, size = work.train["augment"], work.kwargs["img_size"]
    _, policy, last = create_transform(size, is_training=True, separate=True, color_jitter=None,
                                       auto_augment=augment.get("auto_augment"), mean=model.pretrained_cfg["mean"],
                                       std=model.pretrained_cfg["std"], re_prob=augment.get("random_erasing", 0.0))
    transform = transforms.Compose([
        transforms.Resize((size, size)), transforms.RandomCrop(size, padding=augment["padding"]),
        transforms.RandomHorizontalFlip(augment["hflip"]), policy, last])
    loader = DataLoader(datasets.ImageFolder(work.folder / "train", transform), work.batch, shuffle=True,
                        drop_last=True, num_workers=work.workers, pin_memory=work.device == "cuda")
    mix = Mixup(augment["mixup"], augment["cutmix"], num_classes=work.classes) if "mixup" in augment else None
    label_loss = SoftTargetCrossEntropy() if mix else LabelSmoothingCrossEntropy(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.train["lr"], weight_decay=0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    average = ModelEmaV3(accelerator.unwrap_model(model), decay=work.train["ema_decay"], use_warmup=True)
    teacher = work.teacher.to(accelerator.device).eval() if taught else None
    model.train()
    for step, (images, targets) in enumerate(loader, 1):
        if mix:
            images, targets = mix(images, targets)
        with accelerator.autocast():
            outputs = model(images)
            loss = label_loss(outputs, targets)
            if teacher:
                with torch.no_grad():
                    told = teacher(images)
                t, weight = LOGITS["temperature"], LOGITS["weight"]
                divergence = F.kl_div(F.log_softmax(outputs / t, 1), F.log_softmax(told.float() / t, 1),
                                      log_target=True, reduction="batchmean") * t * t
                loss = (1 - weight) * loss + weight * divergence
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), work.train["clip_grad"])
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
        if step == work.steps:
            start = now(work.device)
        if step == work.steps * (1 + work.epochs):
            return (step - work.steps) * work.batch / (now(work.device) - start)


def with_timm(work, taught, precision):
    train, augment = work.train, work.train["augment"]
    kwargs = {key: value for key, value in work.kwargs.items() if key != "drop_path_rate"}
    options = {
        "data-dir": work.folder, "val-split": "", "output": work.folder / "timm", "device": work.device,
        "model": work.model["name"], "num-classes": work.classes, "img-size": kwargs["img_size"],
        "drop-path": work.kwargs.get("drop_path_rate", 0.0), "batch-size": work.batch, "workers": work.workers,
        "epochs": 1, "warmup-epochs": 0, "log-interval": 1, "opt": "adamw", "lr": train["lr"], "weight-decay": 0.05,
        "clip-grad": train["clip_grad"], "model-ema-decay": train["ema_decay"], "train-crop-mode": "rkrr",
        "train-interpolation": "bilinear", "hflip": augment["hflip"], "color-jitter": 0.0, "smoothing": 0.1,
        "mixup": augment.get("mixup", 0.0), "cutmix": augment.get("cutmix", 0.0), "remode": "const",
        "reprob": augment.get("random_erasing", 0.0), "amp-dtype": "bfloat16"}
    options |= {"aa": augment["auto_augment"]} if "auto_augment" in augment else {}
    if taught:
        options |= {"kd-model-name": f"local-dir:{work.folder / 'teacher'}", "kd-temperature": LOGITS["temperature"],
                    "distill-loss-weight": LOGITS["weight"], "task-loss-weight": 1 - LOGITS["weight"]}
    command = [sys.executable, str(work.timm / "train.py"), "--model-ema", "--model-ema-warmup",
               *["--amp"] * (precision == "bf16"), *["--pin-mem"] * (work.device == "cuda"),
               *[f"--{key}={value}" for key, value in options.items()], "--scale", "0.64", "1", "--ratio", "1", "1",
               "--model-kwargs", *[f"{key}={value}" for key, value in kwargs.items()]]
    done = subprocess.run(command, cwd=work.folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    speeds = re.findall(r"Train: .*? Time: [\d.]+s, +([\d.]+)/s", done.stdout + done.stderr)
    counted = speeds[work.steps:work.steps * (1 + work.epochs)]
    if done.returncode or len(counted) < work.steps * work.epochs:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{done.stderr[-2000:]}")
    return statistics.harmonic_mean(map(float, counted))  # each is of one batch


def save_teacher(work, section, folder):
    folder.mkdir()  # as timm loads a model from one
    save_file(work.teacher.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architecture": section["name"], "num_classes": work.classes,
        "model_args": {key: value for key, value in section.items() if key != "name"},
        "pretrained_cfg": work.teacher.pretrained_cfg | {"num_classes": work.classes}}))


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def peak(device, precision):
    """FLOPs a second of the best of several large products of matrices."""
    best = 0.0
    for size in (4096, 8192) if device == "cuda" else (2048, 4096):
        a, b = torch.randn(2, size, size, device=device).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        for _ in range(3):
            start = now(device)
            a @ b
            best = max(best, 2 * size ** 3 / (now(device) - start))
    return best


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of train/<class>/*.jpg and test/<class>/*.jpg, else noise")
    parser.add_argument("--timm", type=Path, help="checkout of timm's repository, else it is left out")
    parser.add_argument("--model", choices=["baseline", "tiny"], default="baseline")
    parser.add_argument("--augment", choices=["light", "full"], default="light")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if devices.has_bf16() else "fp32")
    parser.add_argument("--batch-size", type=int, help="without it 128, on a GPU 512")
    parser.add_argument("--images", type=int, help="an epoch; without it 5 batches, on a GPU 40")
    parser.add_argument("--epochs", type=int, default=2, help="that count, after one that does not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="of each loader; without it all cores, at most 16")
    return parser.parse_args()


def prepare(args, folder):
    """What all ways share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores)
    baseline, tiny = (yaml.safe_load((RECIPES / name).read_text()) for name in ("baseline.yaml", "tiny_kd.yaml"))
    recipe, taught_by = {"baseline": baseline, "tiny": tiny}[args.model], baseline["model"]
    batch = args.batch_size or {"cpu": 128, "cuda": 512}[args.device]
    steps = max(1, (args.images or batch * {"cpu": 5, "cuda": 40}[args.device]) // batch)
    workers = min(16, cores) if args.workers is None else args.workers
    source = args.data or random_images(folder / "noise", recipe["model"]["img_size"])
    link(source, folder / "images", batch * (steps * (1 + args.epochs) + 2 * workers + 2))
    classes = len(list((folder / "images" / "train").iterdir()))
    train = recipe["train"] | {"batch_size": batch} | ({"augment": LIGHT} if args.augment == "light" else {})
    kwargs = {key: value for key, value in recipe["model"].items() if key != "name"}
    torch.manual_seed(0)
    work = SimpleNamespace(
        device=args.device, batch=batch, steps=steps, epochs=args.epochs, workers=workers, train=train, timm=args.timm,
        model=recipe["model"], kwargs=kwargs, classes=classes, folder=folder / "images",
        teacher=models.build(Model(**taught_by), classes))
    save_teacher(work, taught_by, work.folder / "teacher")
    student = metrics.count_macs(models.build(Model(**work.model), classes))
    return work, student, metrics.count_macs(work.teacher)


def ways(args):
    """By (way, teacher, precision) how to measure it."""
    found = {("vitopt", taught, args.precision): with_vitopt for taught in ("", "live", "stored")}
    if args.timm is None:
        print("timm's train.py is left out: name a checkout by --timm\n")
    else:
        distils = "--kd-model-name" in (args.timm / "train.py").read_text()
        if not distils:
            print("this train.py of timm has no --kd-model-name: it is measured without a teacher\n")
        found |= {("timm", taught, args.precision): with_timm for taught in ("", "live")[:1 + distils]}
    found |= {("bare", taught, args.precision): with_accelerate for taught in ("", "live")}
    return found | {("fp32 eager", taught, "fp32"): with_accelerate for taught in ("", "live")}


def main():
    args = arguments()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"  # as vitopt does
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        work, student, teacher = prepare(args, Path(folder))
        name = torch.cuda.get_device_name() if args.device == "cuda" else metrics.cpu_name()
        print(f"{args.model} ({student / 1e6:.0f} M MACs; teacher {teacher / 1e6:.0f} M), batch {work.batch}, "
              f"{args.augment} augmentation, {work.epochs} × {work.steps} steps a round after {work.steps}, "
              f"{args.rounds} rounds, {work.workers} workers, {torch.get_num_threads()} threads, {name}, "
              f"torch {torch.__version__}\n")
        measures, speeds, best = ways(args), {}, {}
        with_vitopt(work, "stored", args.precision)  # writes the store
        for number in range(args.rounds):
            for precision in sorted({args.precision, "fp32"}):
                best[precision] = max(best.get(precision, 0.0), peak(args.device, precision))
            for key in measures if number % 2 == 0 else reversed(measures):
                speeds.setdefault(key, []).append(measures[key](work, *key[1:]))
                print(f"round {number + 1}: {' '.join(key)}: {speeds[key][-1]:.1f}", file=sys.stderr, flush=True)
    print("\n| way | teacher | precision | images/s | share of peak | beside vitopt | cost of the teacher |\n"
          "|---|---|---|---:|---:|---:|---:|")
    for (way, taught, precision), own in speeds.items():
        share = statistics.median(own) * (6 * student + 2 * teacher * (taught == "live")) / best[precision]
        beside = [a / b for a, b in zip(own, speeds["vitopt", "", args.precision])]
        cost = spread([b / a for a, b in zip(own, speeds[way, "", precision])]) if taught else ""
        print(f"| {way} | {taught} | {precision} | {statistics.median(own):.1f} | {share:.0%} | {spread(beside)} | "
              f"{cost} |")
    print("\nPeak: " + ", ".join(f"{value / 1e12:.3g} TFLOPS in {precision}" for precision, value in best.items()))


if __name__ == "__main__":
    main()
