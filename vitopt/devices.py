"""The devices and processes of a run, by accelerate and, where it was launched so, DeepSpeed.

Under DeepSpeed the optimizer's state (ZeRO 1), the gradients (2) and the weights (3) of the student are sharded over
the processes. Weights stay in 32 bits there too, and products go through autocast; so a row is the same row.
"""

import os
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object
from torch import nn

from vitopt import data
from vitopt.errors import InputError
from vitopt.recipe import Train


def make_accelerator(section: Train | None = None, folder: Path | None = None) -> Accelerator:
    """The Accelerator of a row: on the CPU where there is no GPU, in the row's precision.

    Raises:
        InputError: a precision that DeepSpeed cannot have here.
    """
    on_cpu = not torch.cuda.is_available()
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    wanted = precision(section)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()  # rows of one table may train in different precisions
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed, where it is installed, says that it looks
    # told cpu=True, accelerate would silently leave DeepSpeed out
    handlers = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and with_deepspeed else None
    accelerator = Accelerator(cpu=on_cpu and not with_deepspeed, mixed_precision=wanted, project_dir=folder,
                              log_with=section and section.tracker, kwargs_handlers=handlers)
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if on_cpu and launched and os.environ.get("OMP_NUM_THREADS") == "1":  # accelerate's default: one thread a process
        torch.set_num_threads(max(1, os.cpu_count() // data.local_processes()))
    if section and sharded(accelerator):
        _configure(accelerator, section)
    return accelerator


def sharded(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def _configure(accelerator: Accelerator, section: Train) -> None:
    """Tell DeepSpeed what the recipe says; its configuration file has the stage of ZeRO alone."""
    if accelerator.mixed_precision == "fp16":
        raise InputError("train.precision: fp16: with DeepSpeed take bf16 or fp32")
    if section.compile:
        raise InputError("train.compile: true: is untried with DeepSpeed: set it false")
    config = accelerator.deepspeed_plugin.deepspeed_config
    config |= {
        "train_batch_size": section.batch_size // section.accumulate,
        "train_micro_batch_size_per_gpu": section.batch_size // accelerator.num_processes // section.accumulate,
        "gradient_accumulation_steps": 1,  # the loop tells when a batch is whole
        "gradient_clipping": section.clip_grad or 0.0,
        "bf16": {"enabled": False},  # would make the weights themselves 16 bits
        "torch_autocast": {"enabled": accelerator.mixed_precision == "bf16", "dtype": "bfloat16"},
    }


def autocast(accelerator: Accelerator):
    """The row's precision for what is not the student: with DeepSpeed accelerate's own does nothing."""
    if not sharded(accelerator):
        return accelerator.autocast()
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=accelerator.mixed_precision == "bf16")


def whole_weights(model: nn.Module, accelerator: Accelerator):
    """In the `with` block every process has the model's weights in full."""
    if not sharded(accelerator) or accelerator.deepspeed_plugin.zero_stage < 3:
        return nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def optimizer_state(optimizer, accelerator: Accelerator) -> dict:
    """What a prepared optimizer holds beside the weights; with DeepSpeed this process's shard of it."""
    if not sharded(accelerator):
        return optimizer.state_dict()
    return {"shards": [dict(state) for state in optimizer.optimizer.optimizer.state.values()]}


def load_optimizer_state(optimizer, content: dict, accelerator: Accelerator) -> None:
    """Give a prepared optimizer what `optimizer_state` gave."""
    if not sharded(accelerator):
        return optimizer.load_state_dict(content)
    zero = optimizer.optimizer
    owners = getattr(zero, "fp32_partitioned_groups_flat", None) or [  # ZeRO 3 shows torch's optimizer no weights
        shard for group in zero.optimizer.param_groups for shard in group["params"]]
    for owner, state in zip(owners, content["shards"]):
        zero.optimizer.state[owner] = {
            name: value.to(owner.device) if isinstance(value, torch.Tensor) and value.dim() else value
            for name, value in state.items()}


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
    """Print how many processes run on what, and whether GPUs stay idle.

    Raises:
        InputError: fewer processes than the launcher was asked for.
    """
    accelerator = make_accelerator()
    asked = _asked()
    if asked > accelerator.num_processes:
        raise InputError(f"accelerate launch was asked for {asked} processes and started {accelerator.num_processes}: "
                         "give it --config_file accelerate_config.yaml, and leave out --cpu and MULTI_CPU, with which "
                         "it silently starts a single one")
    line = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    if torch.cuda.device_count() > data.local_processes():
        line += (f"; this machine has {torch.cuda.device_count()} GPUs: "
                 f"accelerate launch --num_processes {torch.cuda.device_count()} … takes them all")
    accelerator.print(line)


def _asked() -> int:
    """How many processes the launcher above this one was asked for, 0 where there is none: accelerate does not tell."""
    try:
        words = psutil.Process().parent().cmdline()
        if "launch" not in words:
            return 0
        from accelerate.commands.launch import launch_command_parser  # of no use to any other process
        known, _ = launch_command_parser().parse_known_args(words[words.index("launch") + 1:])
        if known.num_processes is None and known.config_file:
            return int(yaml.safe_load(Path(known.config_file).read_text(encoding="utf-8")).get("num_processes") or 0)
        return known.num_processes or 0
    except (psutil.Error, OSError, AttributeError, ValueError, yaml.YAMLError, SystemExit):
        return 0


def local_gpus(accelerator: Accelerator) -> list[int]:
    """The GPUs of this machine that the run uses, as torch counts them."""
    return list(range(data.local_processes())) if accelerator.device.type == "cuda" else []


def of_machines(reading: dict | None, accelerator: Accelerator) -> list[dict]:
    """The readings of energy of all machines, one each. Call it on all processes."""
    return gather_object([dict(reading)] if reading is not None and accelerator.is_local_main_process else [])
