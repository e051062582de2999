"""The loop: one model, with or without a teacher, on any number of processes."""

import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from vitopt import distillation, metrics, model as models
from vitopt.data import Splits
from vitopt.recipe import InputError, Recipe

EVAL_BATCH_SIZE = 256  # at most, over all processes together
CALIBRATION_IMAGES = 1024


def make_accelerator(tracker: str | None = None, folder: Path | None = None) -> Accelerator:
    """The Accelerator of a row: on the CPU where there is no GPU, batch sizes meant over all processes together."""
    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=on_cpu, log_with=tracker, project_dir=folder,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if on_cpu and launched and os.environ.get("OMP_NUM_THREADS") == "1":  # accelerate's default: one thread a process
        torch.set_num_threads(max(1, os.cpu_count() // _local_processes()))
    return accelerator


def say_where() -> None:
    """Print how many processes run on what, and whether GPUs stay idle."""
    accelerator = make_accelerator()
    line = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    if torch.cuda.device_count() > _local_processes():
        line += (f"; this machine has {torch.cuda.device_count()} GPUs: "
                 f"accelerate launch --num_processes {torch.cuda.device_count()} … takes them all")
    accelerator.print(line)


def _local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def local_gpus(accelerator: Accelerator) -> list[int]:
    """The GPUs of this machine that the run uses, as torch counts them."""
    return list(range(_local_processes())) if accelerator.device.type == "cuda" else []


def calibration(splits: Splits, accelerator: Accelerator):
    """This process's batches of up to 1,024 training images without augmentation, for what pruning asks of data."""
    images = Subset(splits.calibration, range(min(CALIBRATION_IMAGES, len(splits.calibration))))
    return eval_loader(images, splits.workers, accelerator)


def evaluate(model: nn.Module, dataset: Dataset, splits: Splits, accelerator: Accelerator) -> tuple[float, int]:
    """Accuracy in percent over all processes and the number of images; see `metrics.accuracy`."""
    model.to(accelerator.device)
    return metrics.accuracy(model, eval_loader(dataset, splits.workers, accelerator), accelerator)


def make_loader(dataset: Dataset, batch_size: int, workers: int, train: bool = False) -> DataLoader:
    return DataLoader(dataset, batch_size, shuffle=train, drop_last=train, num_workers=workers,
                      persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())


def eval_loader(dataset: Dataset, workers: int, accelerator: Accelerator):
    """A prepared loader for `metrics.accuracy`."""
    batch_size = max(1, min(EVAL_BATCH_SIZE, len(dataset)) // accelerator.num_processes) * accelerator.num_processes
    return accelerator.prepare(make_loader(dataset, batch_size, workers))


def train(model: nn.Module, recipe: Recipe, splits: Splits, accelerator: Accelerator,
          teacher: nn.Module | None = None) -> tuple[nn.Module, list[dict]]:
    """Train as the recipe's `train` section says, and listen to the teacher as `distill` says.

    The loss is (1 − weight) · cross-entropy with the labels + weight · KL with the teacher. After each epoch the
    model, or the moving average of its weights, meets the validation images; the best epoch is kept, of equals the
    last.

    Args:
        model: trained on all processes.
        teacher: frozen; sees the same augmented images as the model.

    Returns:
        The trained model, unwrapped, and one dictionary an epoch: `epoch`, `loss`, `validation_accuracy` (percent),
        `lr`, `seconds`, `images_per_second`.

    Raises:
        InputError: fewer images than a batch, or a loss that is no number.
    """
    section = recipe.train
    if len(splits.train) < section.batch_size:
        raise InputError(f"train.batch_size: {section.batch_size} is more than the {len(splits.train)} training "
                         "images: take a smaller one")
    set_seed(recipe.seed)  # the same order of images on all processes
    num_classes = models.num_classes(model)
    model.to(accelerator.device)
    average = ModelEmaV3(model, decay=section.ema_decay, use_warmup=True) if section.ema_decay else None
    optimizer = create_optimizer_v2(model, section.optimizer, lr=section.lr, weight_decay=section.weight_decay)
    network, optimizer, loader = accelerator.prepare(
        model, optimizer, make_loader(splits.train, section.batch_size, splits.workers, train=True))
    validation = eval_loader(splits.validation, splits.workers, accelerator)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=section.epochs, warmup_epochs=section.warmup_ratio * section.epochs,
        warmup_lr=section.lr / 100, min_lr=section.lr / 100, step_on_epochs=False, updates_per_epoch=len(loader))
    mix, label_loss = _mixing(recipe, num_classes)
    if teacher is not None:
        teacher.to(accelerator.device).eval().requires_grad_(False)
    if section.tracker:
        accelerator.init_trackers("vitopt")
    kept = average.module if average else accelerator.unwrap_model(network)
    best, best_accuracy, history = None, -1.0, []
    set_seed(recipe.seed, device_specific=True)  # augmentation and dropout differ between processes

    steps = section.epochs * len(loader)
    bar = tqdm(total=steps, unit="step", leave=False, disable=not (accelerator.is_main_process and sys.stderr.isatty()))
    step = 0
    for epoch in range(1, section.epochs + 1):
        network.train()
        start, total_loss = time.perf_counter(), torch.zeros((), device=accelerator.device)
        for images, targets in loader:
            scheduler.step_update(step)
            if mix:
                images, targets = mix(images, targets)
            logits = network(images)
            with accelerator.autocast():
                loss = label_loss(logits, targets)
                if teacher is not None:
                    with torch.no_grad():
                        teacher_logits = teacher(images)
                    distill = recipe.distill
                    loss = (1 - distill.weight) * loss + distill.weight * distillation.kl_divergence(
                        logits, teacher_logits, distill.temperature)
            accelerator.backward(loss)
            if section.clip_grad:
                accelerator.clip_grad_norm_(network.parameters(), section.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if average:
                average.update(accelerator.unwrap_model(network), step)
            total_loss += loss.detach()
            bar.update()
        mean_loss = accelerator.reduce(total_loss, "mean").item() / len(loader)
        seconds = time.perf_counter() - start
        if not torch.isfinite(torch.tensor(mean_loss)):
            raise InputError(f"train.lr: {section.lr}: the loss became {mean_loss} in epoch {epoch}: "
                             "take a smaller one, or set train.clip_grad: 1.0")
        accuracy, _ = metrics.accuracy(average.module if average else network, validation, accelerator)
        if accuracy >= best_accuracy:
            best_accuracy = accuracy
            best = {name: tensor.detach().cpu().clone() for name, tensor in kept.state_dict().items()}
        history.append({
            "epoch": epoch, "loss": mean_loss, "validation_accuracy": accuracy,
            "lr": optimizer.param_groups[0]["lr"], "seconds": seconds,
            "images_per_second": len(loader) * section.batch_size / seconds,
        })
        if section.tracker:
            accelerator.log({key: value for key, value in history[-1].items() if key != "epoch"}, step=epoch)
        if accelerator.is_main_process:
            tqdm.write(f"  epoch {epoch}/{section.epochs}  loss {mean_loss:.4f}  validation {accuracy:.2f} %  "
                       f"{history[-1]['images_per_second']:.0f} images/s")
    bar.close()
    for tracker in accelerator.trackers:
        tracker.finish()
    model = accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    model.load_state_dict(best)
    accelerator.free_memory()
    return model, history


def for_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The same training for another number of epochs."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": epochs, "tracker": None})})


def chosen_epoch(history: list[dict]) -> dict:
    """Which epoch's weights `train` kept, and their validation accuracy in percent."""
    best = max(history, key=lambda row: (row["validation_accuracy"], row["epoch"]))
    return {"best_epoch": best["epoch"], "validation_accuracy": best["validation_accuracy"]}


def _mixing(recipe: Recipe, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """timm's mixup and CutMix where the recipe asks for them, and the loss that fits the targets."""
    augment, smoothing = recipe.train.augment, recipe.train.label_smoothing
    if augment.mixup or augment.cutmix:
        mix = Mixup(augment.mixup, augment.cutmix, label_smoothing=smoothing, num_classes=num_classes)
        return mix, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(smoothing)
