"""The loop: one model, with or without a teacher, on any number of processes."""

import copy
import math
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from vitopt import batches, checkpoints, devices, metrics, model as models
from vitopt.checkpoints import Checkpoints
from vitopt.data import Images, Splits
from vitopt.errors import InputError, Stopped, one_line
from vitopt.recipe import Recipe, Train
from vitopt.store import Store
from vitopt.teaching import Teaching

EVAL_BATCH_SIZE = 256  # at most, over all processes together
CALIBRATION_IMAGES = 1024
WATCHED_STEPS = 50  # whose mean loss is looked at together
TOO_MUCH = 3  # times the mean loss of the first of these steps
FUSED = ("adam", "adamw", "sgd")  # torch's own, which update all weights in one kernel


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
          teachers: Sequence[nn.Module] = (), kept: dict[str, torch.Tensor] | None = None,
          saved: Checkpoints | None = None) -> tuple[nn.Module, list[dict]]:
    """Train as the recipe's `train` section says, and listen to the teachers as `distill` says.

    After each epoch the model, or the moving average of its weights, meets the validation images; the best epoch is
    kept, of equals the last.

    Args:
        model: trained on all processes.
        teachers: models of vitopt, see `teaching`.
        kept: which channels of the first teacher the model has kept, by axis.
        saved: where the state of the training is kept, and found where one was stopped.

    Returns:
        The trained model, unwrapped, and one dictionary an epoch: `epoch`, `loss`, `validation_accuracy` (percent),
        `lr`, `seconds`, `images_per_second`.

    Raises:
        InputError: fewer images than a batch, or a loss that is no number or grows beyond bounds.
        Stopped: a signal came; the state is kept.
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
    whole = copy.deepcopy(model) if devices.sharded(accelerator) else model  # what is evaluated and given back
    teaching = _teaching(recipe, list(teachers), model, kept, splits, accelerator, saved)
    plain = teaching.network if teaching else model
    state = _State(model, whole, plain, average, teaching and teaching.store, accelerator)
    found = saved and saved.load()
    if found:
        with _refusing_strangers(saved):
            state.take_up(*found)
    slow_fused = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    fused = _unfused([model, *teachers]) if slow_fused else {}
    network, optimizer = accelerator.prepare(plain, _optimizer(model, plain, section))
    state.optimizer = optimizer
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
    if found:
        with _refusing_strangers(saved):
            state.take_up_optimizer(*found)
        accelerator.print(f"  going on after step {state.step:,} of {steps:,}")
    bar = tqdm(total=steps, initial=state.step, unit="step", leave=False,
               disable=not (accelerator.is_main_process and sys.stderr.isatty()))
    try:
        with checkpoints.listening() if saved else nullcontext([]) as asked:
            pauses = checkpoints.Pauses(section, accelerator, asked)
            while state.step < steps:
                epoch, first = divmod(state.step, len(loader))
                epoch += 1
                network.train()
                state.begin_epoch(epoch, first)
                for batch in loader.epoch(epoch, first):
                    scheduler.step_update(state.step)
                    # dropout too depends on nothing that came before
                    torch.manual_seed(batches.seed_of(recipe.seed, epoch, state.step, accelerator.process_index))
                    compare = plain_loss if batch.targets.dim() == 1 else label_loss
                    loss = _step(network, batch, compare, teaching, section.accumulate, accelerator)
                    if section.clip_grad:
                        accelerator.clip_grad_norm_(network.parameters(), section.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                    state.end_step(loss, section)
                    bar.update()
                    if saved and state.step % len(loader):
                        _pause(state, saved, *pauses.look())
                seconds = state.end_epoch(section)
                chosen = average.module if average else state.as_whole()
                with devices.autocast(accelerator):
                    accuracy, _ = metrics.accuracy(chosen, validation, accelerator)
                state.choose(chosen, accuracy)
                state.history.append({
                    "epoch": epoch, "loss": state.mean_loss, "validation_accuracy": accuracy,
                    "lr": optimizer.param_groups[0]["lr"], "seconds": seconds,
                    "images_per_second": len(loader) * section.batch_size / seconds,
                })
                if section.tracker:
                    numbers = {key: value for key, value in state.history[-1].items() if key != "epoch"}
                    accelerator.log(numbers, step=epoch)
                if accelerator.is_main_process:
                    tqdm.write(f"  epoch {epoch}/{section.epochs}  loss {state.mean_loss:.4f}  validation "
                               f"{accuracy:.2f} %  {state.history[-1]['images_per_second']:.0f} images/s")
                if saved:
                    due, stop = pauses.look()
                    by_epoch = section.checkpoint_epochs and epoch % section.checkpoint_epochs == 0
                    _pause(state, saved, due or by_epoch or state.step == steps, stop)
    except Diverged as error:
        if saved:
            saved.remove()  # the same recipe would come to the same end
        if state.best is None or saved is None:
            raise
        if accelerator.is_main_process:
            whole.load_state_dict(state.best)
            models.save(whole, saved.last_good)
        raise InputError(f"{error}; the model of epoch {len(state.history)} or before is kept in {saved.last_good}"
                         ) from error
    except RuntimeError as error:
        if section.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise InputError(f"train.compile: true: {str(error).strip().splitlines()[0]}: mend the compiler, or set it "
                             "false") from error
        raise
    finally:
        bar.close()
        for tracker in accelerator.trackers:
            tracker.finish()
        if devices.sharded(accelerator):
            network.destroy()
        else:
            accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # takes autocast off the model
        for attention, was in fused.items():
            attention.fused_attn = was
        if teaching:
            teaching.close()
        accelerator.free_memory()
    whole.load_state_dict(state.best)
    return whole, state.history


@contextmanager
def _refusing_strangers(saved: Checkpoints):
    """A checkpoint with right checksums that no run has written ends in one line too."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{saved.found}: is no state of this training ({one_line(error, 300)}): remove the folder"
                         ) from error


def _pause(state: "_State", saved: Checkpoints, due: bool, stop: bool) -> None:
    if due:
        state.keep(saved)
    if stop:
        raise Stopped(f"stopped after step {state.step:,}, whose state is kept in {saved.folder}: "
                      "give the same command again to go on")


class Diverged(InputError):
    """The loss is no number any more, or has grown beyond bounds."""


@dataclass
class _State:
    """A training under way: all that a checkpoint must hold, and nothing that a batch or a step can be told by its
    number."""
    model: nn.Module
    whole: nn.Module  # the same, but where the weights of the model are sharded a copy of it
    network: nn.Module  # the model, with what only training has; as it was before it was wrapped
    average: ModelEmaV3 | None
    store: Store | None
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer | None = None  # once it is prepared
    step: int = 0  # done so far, over all epochs
    losses: list[torch.Tensor] = field(default_factory=list)  # of this epoch's steps, on this process
    heard: dict[str, torch.Tensor] = field(default_factory=dict)  # of the store, from before the training was taken up
    before: float = 0.0  # seconds of this epoch until it was taken up again
    first_loss: float | None = None
    history: list[dict] = field(default_factory=list)
    best: dict[str, torch.Tensor] | None = None
    best_accuracy: float = -1.0

    def begin_epoch(self, epoch: int, first_step: int) -> None:
        if self.store:
            self.store.open(epoch, first_step, self.heard)
        self.start, self.heard = time.perf_counter(), {}

    def end_step(self, loss: torch.Tensor, section: Train) -> None:
        self.step += 1
        self.losses.append(loss)
        if self.average:
            with devices.whole_weights(self.model, self.accelerator):
                self.average.update(self.model, self.step)
        if len(self.losses) % WATCHED_STEPS == 0:
            self._watch(self.losses[-WATCHED_STEPS:], section)

    def end_epoch(self, section: Train) -> float:
        """The seconds that it took."""
        if self.store:
            self.store.close()
        self.mean_loss = self._watch(self.losses, section)
        seconds = self.before + time.perf_counter() - self.start
        self.losses, self.before = [], 0.0
        return seconds

    def _watch(self, losses: list[torch.Tensor], section: Train) -> float:
        """The mean of these losses over all processes, if training may go on."""
        loss = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if self.first_loss is None:
            self.first_loss = loss
        if not loss <= TOO_MUCH * self.first_loss:  # nan is neither more nor less
            what = f"became {loss}" if not math.isfinite(loss) else f"grew from {self.first_loss:.3g} to {loss:.3g}"
            raise Diverged(f"train.lr: {section.lr}: the loss {what} in epoch {len(self.history) + 1}: take a smaller "
                           "one, or set train.clip_grad: 1.0")
        return loss

    def as_whole(self) -> nn.Module:
        """The model as it is now."""
        if self.whole is not self.model:
            with devices.whole_weights(self.model, self.accelerator):
                self.whole.load_state_dict(self.model.state_dict())
        return self.whole

    def choose(self, model: nn.Module, accuracy: float) -> None:
        """Keep these weights if they are as good as the best so far."""
        if accuracy >= self.best_accuracy:
            self.best_accuracy = accuracy
            self.best = _copied(model)

    def keep(self, saved: Checkpoints) -> None:
        """Write a checkpoint."""
        tensors, facts = {}, {name: getattr(self, name) for name in REMEMBERED}
        facts |= {"processes": self.accelerator.num_processes, "has_best": self.best is not None}
        facts["seconds"] = self.before + time.perf_counter() - self.start if self.losses else 0.0
        scaler = self.accelerator.scaler
        state = devices.optimizer_state(self.optimizer, self.accelerator)
        if devices.sharded(self.accelerator):
            state = {"shards": [self._from_all(shard) for shard in state["shards"]]}
        with devices.whole_weights(self.network, self.accelerator):
            facts |= {name: checkpoints.apart(content, name, tensors) for name, content in {
                "network": self.network.state_dict(),
                "optimizer": state,
                "average": self.average.module.state_dict() if self.average else {},
                "scaler": scaler.state_dict() if scaler else {},
                "losses": self._from_all({"losses": torch.stack(self.losses)} if self.losses else {}),
                "heard": self._from_all(self.store.so_far() if self.store and self.losses else {}),
            }.items()}
            saved.write(self.whole, self.best or self.model.state_dict(), tensors, facts)

    def take_up(self, tensors: dict[str, torch.Tensor], facts: dict) -> None:
        """Go on where a checkpoint was written; before the model is wrapped."""
        for name in REMEMBERED:
            setattr(self, name, facts[name])
        if facts["has_best"]:  # the model was made with these weights
            self.best = _copied(self.model)
        content = {name: checkpoints.together(facts[name], tensors)
                   for name in ("network", "average", "losses", "heard")}
        self.network.load_state_dict(content["network"])
        if self.average:
            self.average.module.load_state_dict(content["average"])
        rank, device = self.accelerator.process_index, self.accelerator.device
        alike = facts["processes"] == self.accelerator.num_processes
        if "losses" in content["losses"]:
            losses = content["losses"]["losses"]
            self.losses = list((losses[rank] if alike else losses.mean(0)).to(device))
        if alike:  # otherwise the teachers' outputs of this epoch are not stored
            self.heard = {name: parts[rank].to(device) for name, parts in content["heard"].items()}
        self.before = facts["seconds"]

    def take_up_optimizer(self, tensors: dict[str, torch.Tensor], facts: dict) -> None:
        """The rest, once it is prepared.

        Raises:
            InputError: its shards are those of other processes.
        """
        content, scaler = (checkpoints.together(facts[name], tensors) for name in ("optimizer", "scaler"))
        if devices.sharded(self.accelerator) or "shards" in content:
            if "shards" not in content or facts["processes"] != self.accelerator.num_processes:
                raise InputError(f"a checkpoint of {facts['processes']} process(es) "
                                 f"{'with' if 'shards' in content else 'without'} DeepSpeed: go on with as many and "
                                 "the same configuration, or remove its folder to begin anew")
            rank = self.accelerator.process_index
            content = {"shards": [{name: parts[rank] for name, parts in shard.items()}
                                  for shard in content["shards"]]}
        devices.load_optimizer_state(self.optimizer, content, self.accelerator)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(scaler)

    def _from_all(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of all processes, (processes, …) each."""
        return {name: self.accelerator.gather(tensor.to(self.accelerator.device)[None].contiguous())
                for name, tensor in own.items()}


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model as they are now, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


REMEMBERED = ("step", "first_loss", "history", "best_accuracy")


def _step(network: nn.Module, batch: batches.Batch, label_loss: nn.Module, teaching: Teaching | None, parts: int,
          accelerator: Accelerator) -> torch.Tensor:
    """Add the gradients of a batch, computed in so many parts; its loss."""
    total = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(batch.chunk(parts)):
        last = number == parts - 1
        if devices.sharded(accelerator):
            accelerator.gradient_state._set_sync_gradients(last)  # no_sync is not for sharded gradients
        with nullcontext() if last or devices.sharded(accelerator) else accelerator.no_sync(network):
            heard = teaching.hear(part, accelerator) if teaching else None
            outputs = network(part.images)
            with devices.autocast(accelerator):
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
              accelerator: Accelerator, saved: Checkpoints | None) -> Teaching | None:
    if not teachers:
        return None
    store = None
    if recipe.distill.store and saved:
        store = Store(saved.logits, recipe, splits.train, teachers, accelerator)
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
