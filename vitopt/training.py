"""The loop: one model, with or without a teacher, on any number of processes."""

import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from vitopt import batches, data, metrics, model as models
from vitopt.data import Images, Splits
from vitopt.recipe import InputError, Recipe, Train
from vitopt.store import Store
from vitopt.teaching import Teaching

EVAL_BATCH_SIZE = 256  # at most, over all processes together
CALIBRATION_IMAGES = 1024
WATCHED_STEPS = 50  # whose mean loss is looked at together
TOO_MUCH = 3  # times the mean loss of the first of these steps
FUSED = ("adam", "adamw", "sgd")  # torch's own, which update all weights in one kernel


def make_accelerator(section: Train | None = None, folder: Path | None = None) -> Accelerator:
    """The Accelerator of a row: on the CPU where there is no GPU, in the row's precision."""
    on_cpu = not torch.cuda.is_available()
    wanted = precision(section)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()  # rows of one table may train in different precisions
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=wanted, project_dir=folder,
                              log_with=section and section.tracker)
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if on_cpu and launched and os.environ.get("OMP_NUM_THREADS") == "1":  # accelerate's default: one thread a process
        torch.set_num_threads(max(1, os.cpu_count() // data.local_processes()))
    return accelerator


def precision(section: Train | None) -> str:
    """Of matrix products in training, as accelerate calls it: what the recipe says, else the launcher, else bf16 where
    the machine multiplies it in hardware."""
    if section is None:
        return "no"
    if section.precision:
        return {"fp32": "no"}.get(section.precision, section.precision)
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return said if said != "no" else "bf16" if has_bf16() else "no"


def has_bf16(on_gpu: bool | None = None) -> bool:
    """Whether this machine's GPU or CPU multiplies bfloat16 in hardware; without a choice the GPU where it has one."""
    if torch.cuda.is_available() if on_gpu is None else on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))


def say_where() -> None:
    """Print how many processes run on what, and whether GPUs stay idle."""
    accelerator = make_accelerator()
    line = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    if torch.cuda.device_count() > data.local_processes():
        line += (f"; this machine has {torch.cuda.device_count()} GPUs: "
                 f"accelerate launch --num_processes {torch.cuda.device_count()} … takes them all")
    accelerator.print(line)


def local_gpus(accelerator: Accelerator) -> list[int]:
    """The GPUs of this machine that the run uses, as torch counts them."""
    return list(range(data.local_processes())) if accelerator.device.type == "cuda" else []


def calibration(splits: Splits, accelerator: Accelerator) -> batches.Plain:
    """This process's batches of up to 1,024 training images without augmentation, for what pruning asks of data."""
    return eval_batches(splits.calibration, splits, accelerator, CALIBRATION_IMAGES)


def eval_batches(part: Images, splits: Splits, accelerator: Accelerator, limit: int | None = None) -> batches.Plain:
    """This process's share of a part, or of its first images, without augmentation."""
    size = max(1, min(EVAL_BATCH_SIZE, len(part)) // accelerator.num_processes)
    return batches.Plain(part, splits.workers, accelerator, size, limit)


def evaluate(model: nn.Module, part: Images, splits: Splits, accelerator: Accelerator,
             limit: int | None = None) -> tuple[float, int]:
    """Accuracy in percent over all processes and the number of images; see `metrics.accuracy`."""
    model.to(accelerator.device)
    return metrics.accuracy(model, eval_batches(part, splits, accelerator, limit), accelerator)


def train(model: nn.Module, recipe: Recipe, splits: Splits, accelerator: Accelerator,
          teachers: Sequence[nn.Module] = (), kept: dict[str, torch.Tensor] | None = None, beside: Path | None = None,
          ) -> tuple[nn.Module, list[dict]]:
    """Train as the recipe's `train` section says, and listen to the teachers as `distill` says.

    After each epoch the model, or the moving average of its weights, meets the validation images; the best epoch is
    kept, of equals the last.

    Args:
        model: trained on all processes.
        teachers: models of vitopt, see `teaching`.
        kept: which channels of the first teacher the model has kept, by axis.
        beside: the folder of this row; beside it are stored logits and, where the loss leaves all bounds, the model of
            the best epoch so far.

    Returns:
        The trained model, unwrapped, and one dictionary an epoch: `epoch`, `loss`, `validation_accuracy` (percent),
        `lr`, `seconds`, `images_per_second`.

    Raises:
        InputError: fewer images than a batch, or a loss that is no number or grows beyond bounds.
    """
    section = recipe.train
    if len(splits.train) < section.batch_size:
        raise InputError(f"train.batch_size: {section.batch_size} is more than the {len(splits.train)} training "
                         "images: take a smaller one")
    set_seed(recipe.seed)
    model.to(accelerator.device)
    loader = batches.Augmented(splits, section, models.num_classes(model), recipe.seed, accelerator)
    accelerator.print(f"  {loader.describe()}; {accelerator.mixed_precision.replace('no', 'fp32')}")
    average = ModelEmaV3(model, decay=section.ema_decay, use_warmup=True) if section.ema_decay else None
    teaching = _teaching(recipe, list(teachers), model, kept, splits, accelerator, beside)
    network = teaching.network if teaching else model
    slow_fused = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    fused = _unfused([model, *teachers]) if slow_fused else {}
    network, optimizer = accelerator.prepare(network, _optimizer(model, network, section))
    if section.compile:
        network = torch.compile(network)
    validation = eval_batches(splits.validation, splits, accelerator)
    steps = section.epochs * len(loader)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=section.epochs, warmup_epochs=section.warmup_ratio * section.epochs,
        warmup_lr=section.lr / 100, min_lr=section.lr / 100, step_on_epochs=False, updates_per_epoch=len(loader))
    label_loss = SoftTargetCrossEntropy() if loader.mix else LabelSmoothingCrossEntropy(section.label_smoothing)
    plain_loss = LabelSmoothingCrossEntropy(section.label_smoothing)
    if section.tracker:
        accelerator.init_trackers("vitopt")
    best, best_accuracy, history = None, -1.0, []
    watch = _Watch(section, accelerator)
    bar = tqdm(total=steps, unit="step", leave=False, disable=not (accelerator.is_main_process and sys.stderr.isatty()))
    step = 0
    try:
        for epoch in range(1, section.epochs + 1):
            network.train()
            if teaching and teaching.store:
                teaching.store.open(epoch)
            start, total_loss = time.perf_counter(), torch.zeros((), device=accelerator.device)
            for batch in loader.epoch(epoch):
                scheduler.step_update(step)
                # dropout too depends on nothing that came before
                torch.manual_seed(batches.seed_of(recipe.seed, epoch, step, accelerator.process_index))
                compare = plain_loss if batch.targets.dim() == 1 else label_loss
                loss = _step(network, batch, compare, teaching, section.accumulate, accelerator)
                if section.clip_grad:
                    accelerator.clip_grad_norm_(network.parameters(), section.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if average:
                    average.update(model, step)
                total_loss += loss
                watch.see(loss, epoch)
                bar.update()
            if teaching and teaching.store:
                teaching.store.close()
            mean_loss = accelerator.reduce(total_loss, "mean").item() / len(loader)
            watch.check(mean_loss, epoch)
            seconds = time.perf_counter() - start
            chosen = average.module if average else model
            with accelerator.autocast():
                accuracy, _ = metrics.accuracy(chosen, validation, accelerator)
            if accuracy >= best_accuracy:
                best_accuracy = accuracy
                best = {name: tensor.detach().cpu().clone() for name, tensor in chosen.state_dict().items()}
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
    except Diverged as error:
        if best is None or beside is None:
            raise
        model.load_state_dict(best)
        folder = beside.with_name(f"{beside.name}.last_good")
        if accelerator.is_main_process:
            models.save(model, folder)
        raise InputError(f"{error}; the model of epoch {len(history)} or before is kept in {folder}") from error
    finally:
        bar.close()
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # takes autocast off the model
        for attention, was in fused.items():
            attention.fused_attn = was
        if teaching:
            teaching.close()
        accelerator.free_memory()
    model.load_state_dict(best)
    return model, history


class Diverged(InputError):
    """The loss is no number any more, or has grown beyond bounds."""


class _Watch:
    """Looks at the loss every so many steps, on all processes alike."""

    def __init__(self, section: Train, accelerator: Accelerator):
        self.section, self.accelerator = section, accelerator
        self.losses, self.first = [], None

    def see(self, loss: torch.Tensor, epoch: int) -> None:
        self.losses.append(loss)
        if len(self.losses) == WATCHED_STEPS:
            self.check(self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item(), epoch)
            self.losses = []

    def check(self, loss: float, epoch: int) -> None:
        if self.first is None:
            self.first = loss
        if not loss <= TOO_MUCH * self.first:  # nan is neither more nor less
            what = f"became {loss}" if not math.isfinite(loss) else f"grew from {self.first:.3g} to {loss:.3g}"
            raise Diverged(f"train.lr: {self.section.lr}: the loss {what} in epoch {epoch}: take a smaller one, or set "
                           "train.clip_grad: 1.0")


def _step(network: nn.Module, batch: batches.Batch, label_loss: nn.Module, teaching: Teaching | None, parts: int,
          accelerator: Accelerator) -> torch.Tensor:
    """Add the gradients of a batch, computed in so many parts; its loss."""
    total = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(batch.chunk(parts)):
        with accelerator.no_sync(network) if number < parts - 1 else nullcontext():
            heard = teaching.hear(part, accelerator) if teaching else None
            outputs = network(part.images)
            with accelerator.autocast():
                if teaching:
                    loss = teaching.loss(outputs, part, label_loss, heard)
                else:
                    loss = label_loss(outputs, part.targets)
            accelerator.backward(loss / parts)
        total += loss.detach() / parts
    if teaching and teaching.store:
        teaching.store.end_step()
    return total


def _teaching(recipe: Recipe, teachers: list[nn.Module], model: nn.Module, kept, splits: Splits,
              accelerator: Accelerator, beside: Path | None) -> Teaching | None:
    if not teachers:
        return None
    store = None
    if recipe.distill.store and beside is not None:
        store = Store(beside.parent / ".teacher_logits", recipe, splits.train, teachers, accelerator)
    return Teaching(recipe.distill, teachers, model, accelerator.device, kept, store)


def _unfused(networks: Iterable[nn.Module]) -> dict[nn.Module, bool]:
    """Switch fused attention off, and tell what it was.

    On a CPU in bfloat16 torch's fused attention goes back four to eight times as slowly as the products one by one.
    """
    fused = {module: module.fused_attn for network in networks for module in network.modules()
             if hasattr(module, "fused_attn")}
    for attention in fused:
        attention.fused_attn = False
    return fused


def _optimizer(model: nn.Module, network: nn.Module, section: Train) -> torch.optim.Optimizer:
    """The recipe's optimizer of the model's weights, and of those that only training has."""
    options = {"fused": True} if section.optimizer in FUSED else {}
    optimizer = create_optimizer_v2(model, section.optimizer, lr=section.lr, weight_decay=section.weight_decay,
                                    layer_decay=section.layer_decay, **options)
    own = {id(parameter) for parameter in model.parameters()}
    if more := [parameter for parameter in network.parameters() if id(parameter) not in own]:
        optimizer.add_param_group({"params": more, "weight_decay": 0.0})
    return optimizer


def for_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The same training for another number of epochs."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": epochs, "tracker": None})})


def chosen_epoch(history: list[dict]) -> dict:
    """Which epoch's weights `train` kept, and their validation accuracy in percent."""
    best = max(history, key=lambda row: (row["validation_accuracy"], row["epoch"]))
    return {"best_epoch": best["epoch"], "validation_accuracy": best["validation_accuracy"]}
