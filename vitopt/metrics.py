"""What a row is worth: accuracy, counts, and speed, memory and energy in a process of their own.

`python -m vitopt.metrics FOLDER --device DEVICE` measures a saved model and prints one line of JSON.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitopt import energy, layouts, model as models
from vitopt.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore scripts a loss that is not used here
    from fvcore.nn import FlopCountAnalysis

BATCH_SIZE = {"cpu": 64, "cuda": 256}  # of throughput, memory and energy: equal for all rows of a table
SAMPLES = 4  # of latency and throughput, half of them before the energy and half after
WARMUP_SECONDS = 0.3
LATENCY_WINDOW, LATENCY_SECONDS = 50, 1.0  # calls; each sample has at least a window and lasts so long
THROUGHPUT_WINDOWS, THROUGHPUT_SECONDS = 3, 0.3
ENERGY_SECONDS = 5.0


@torch.inference_mode()
def accuracy(model: nn.Module, batches, accelerator) -> tuple[float, int]:
    """Share of images whose largest logit is their class, over all processes.

    Args:
        model: takes (batch, channels, height, width), gives (batch, classes).
        batches: this process's images and class indices, each image on one process alone.

    Returns:
        Percent, and the number of images.
    """
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=accelerator.device)
    for images, targets in batches:
        counts += torch.stack([(model(images).argmax(dim=-1) == targets).sum(), counts.new_tensor(len(targets))])
    hits, images = accelerator.reduce(counts, "sum").tolist()
    return 100 * hits / images, images


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates of one image in linear layers, convolutions and matrix products, by fvcore.

    The two products of attention are counted, fused or not. Norms, biases and softmax are not.
    """
    with torch.no_grad():
        return int(_analysis(model).total())


def macs_of_shapes(model: nn.Module) -> int:
    """`count_macs` by torch's own counter, which runs on the meta device, without computing anything."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(models.example_input(model))
    return counter.get_total_flops() // 2


def _analysis(model: nn.Module) -> FlopCountAnalysis:
    analysis = FlopCountAnalysis(model.eval(), models.example_input(model))
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    for operator in ("layer_norm", "group_norm", "batch_norm", "adaptive_avg_pool2d", "upsample_bilinear2d"):
        analysis.set_op_handle(f"aten::{operator}", lambda inputs, outputs: 0)  # None would keep fvcore's own count
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def by_part(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters and MACs of attention, MLPs, head, patch embedding (or stem) and the rest, by name of the part.

    The MACs of one image, as `count_macs` counts them; their sum is its number.
    """
    analysis = _analysis(model)
    totals = analysis.by_module()
    parts = {part: {"params": 0, "macs": 0} for part in ("patch embedding", "attention", "MLP", "head", "other")}

    def descend(name: str, module: nn.Module, part: str) -> None:
        part = _part(name, module, part)
        children = [(f"{name}.{path}".strip("."), child) for path, child in module.named_children()]
        parts[part]["params"] += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        parts[part]["macs"] += int(totals.get(name, 0) - sum(totals.get(path, 0) for path, _ in children))
        for path, child in children:
            descend(path, child, part)

    with torch.no_grad():
        descend("", model, "other")
    return parts


def _part(name: str, module: nn.Module, outer: str) -> str:
    """Which part a module belongs to, by timm's names; what is inside a part belongs to it."""
    if outer != "other":
        return outer
    kind, last, first = type(module).__name__, name.rpartition(".")[2], name.partition(".")[0]
    if layouts.find(module) or "Attention" in kind and "Block" not in kind or "Attn" in kind:
        return "attention"
    if last in ("mlp", "ffn") or "Mlp" in kind or "FFN" in kind or "FeedForward" in kind:
        return "MLP"
    if first in ("patch_embed", "stem", "embeds"):
        return "patch embedding"
    return "head" if name in ("head", "head_dist", "attn_pool", "classifier", "fc") else "other"


def _attention_macs(inputs, outputs) -> int:
    """q kᵀ and the product with v, from (…, tokens, head_dim) shapes; fvcore skips the fused operator."""
    query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
    *batch, tokens, head_dim = query
    count = tokens * key[-2] * (head_dim + value[-1])
    for size in batch:
        count *= size
    return count


@torch.inference_mode()
def quick_latency_ms(model: nn.Module, batch_size: int) -> float:
    """Median milliseconds of a batch, over half a second: enough to steer by, not to publish."""
    batch = models.example_input(model.eval(), batch_size)
    _run_for(WARMUP_SECONDS / 2, model, batch)
    seconds = []
    while len(seconds) < 5 or sum(seconds) < 0.5:
        start = time.perf_counter()
        model(batch)
        _synchronize(batch)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def describe(name: str, model: nn.Module) -> str:
    """A model's counts and inner widths, as text."""
    lines = [f"{name}: {model.architecture['name']}, {count_params(model):,} parameters, {count_macs(model):,} MACs"]
    for module, width in model.architecture["widths"].items():
        lines.append(f"  {module or 'all'}: " + ", ".join(f"{field} {size}" for field, size in width.items()))
    return "\n".join(lines)


def measure_apart(folder: Path, device: torch.device) -> dict:
    """`measure` in a fresh process, so that nothing that ran before is in its memory or its way.

    Raises:
        InputError: that process failed; its last line says why.
    """
    alone = {key: value for key, value in os.environ.items()
             if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    alone.setdefault("GOMP_SPINCOUNT", "1000")  # threads that spin for long turn a little noise into a lot
    process = subprocess.run([sys.executable, "-m", "vitopt.metrics", str(folder), "--device", str(device)],
                             env=alone, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise InputError(f"{folder}: measuring on {device} failed: {last}")
    return json.loads(process.stdout.splitlines()[-1])


def measure(folder: Path, device: torch.device) -> dict:
    """Measure a saved model's size, speed, memory and energy in float32, eager. Call it in a fresh process.

    Returns:
        `params`, `macs` (of one image), `model_size_mb`: MB (10^6 bytes) of model.safetensors.
        `latency_ms` and `latency_p95_ms`: median and 95th percentile over single-image calls on one CPU thread, in the
        quietest window of many calls, for what disturbs a machine only ever makes it slower.
        `images_per_second`: the best of several windows at `batch_size`.
        `peak_memory_mb`: MB for weights and inference at `batch_size`: on a GPU the most that torch's
        allocator held, on a CPU how much the process grew from before the model was loaded.
        `power_w` and `energy_j_per_1k_images`: the machine's, idle draw included, during inference at `batch_size`.
        How each was measured: `device`, `device_name`, `threads`, `precision`, `batch_size`, `power_source`, ….
    """
    on_gpu = device.type == "cuda"
    threads = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    batch_size = BATCH_SIZE.get(device.type, BATCH_SIZE["cuda"])
    _touch_kernels()
    before = psutil.Process().memory_info().rss
    model = models.load(folder).to(device)
    single, batch = models.example_input(model), models.example_input(model, batch_size)
    gc.collect()
    peak_bytes = _peak_memory(model, batch, before)
    torch.set_num_threads(threads)
    tracker = energy.open_tracker([device.index or 0] if on_gpu else [])
    samples = [_sample_speed(model, single, batch, threads) for _ in range(SAMPLES // 2)]
    with energy.window(tracker, "inference") as reading:
        images, seconds = _run_for(ENERGY_SECONDS, model, batch)
    samples += [_sample_speed(model, single, batch, threads) for _ in range(SAMPLES // 2)]
    latencies = min((latencies for latencies, _ in samples), key=statistics.median)
    return {
        "params": count_params(model),
        "macs": count_macs(model),
        "model_size_mb": (folder / "model.safetensors").stat().st_size / 1e6,
        "latency_ms": 1e3 * statistics.median(latencies),
        "latency_p95_ms": 1e3 * statistics.quantiles(latencies, n=20)[-1],
        "images_per_second": max(images_per_second for _, images_per_second in samples),
        "peak_memory_mb": peak_bytes / 1e6,
        "power_w": reading["power_w"],
        "energy_j_per_1k_images":
            None if reading["power_w"] is None else reading["power_w"] * seconds / images * 1000,
        "power_source": reading["power_source"],
        "memory_source": "torch's CUDA allocator" if on_gpu else "growth of the process",
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": threads, "latency_threads": 1, "precision": "float32", "batch_size": batch_size,
        "inference": reading | {"images": images},
    }


def cpu_name() -> str:
    """The processor's own name, and how many of its cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


@torch.inference_mode()
def _run_for(seconds: float, model: nn.Module, batch: torch.Tensor) -> tuple[int, float]:
    """Run whole batches for at least so long; images and seconds."""
    calls = 0
    _synchronize(batch)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        model(batch)
        _synchronize(batch)
        calls += 1
    return calls * len(batch), time.perf_counter() - start


def _sample_speed(model: nn.Module, single: torch.Tensor, batch: torch.Tensor, threads: int):
    """Seconds of the calls in the quietest latency window, and the best images per second."""
    torch.set_num_threads(1)  # a second thread gains little on one image, and waits whenever the machine does
    latencies = _quietest(_latencies(model, single))
    torch.set_num_threads(threads)
    return latencies, _throughput(model, batch)


@torch.inference_mode()
def _latencies(model: nn.Module, single: torch.Tensor) -> list[float]:
    """Seconds of each of many single-image calls."""
    _run_for(WARMUP_SECONDS, model, single)
    latencies = []
    while len(latencies) < LATENCY_WINDOW or sum(latencies) < LATENCY_SECONDS:
        start = time.perf_counter()
        model(single)
        _synchronize(single)
        latencies.append(time.perf_counter() - start)
    return latencies


def _quietest(latencies: list[float]) -> list[float]:
    """The LATENCY_WINDOW calls in a row with the least median."""
    starts = range(0, len(latencies) - LATENCY_WINDOW + 1, LATENCY_WINDOW // 2)
    return min((latencies[start:start + LATENCY_WINDOW] for start in starts), key=statistics.median)


def _throughput(model: nn.Module, batch: torch.Tensor) -> float:
    """Images per second in the best of several windows."""
    _run_for(WARMUP_SECONDS, model, batch)
    windows = [_run_for(THROUGHPUT_SECONDS, model, batch) for _ in range(THROUGHPUT_WINDOWS)]
    return max(images / seconds for images, seconds in windows)


@torch.inference_mode()
def _touch_kernels() -> None:
    """What torch loads and allocates once, at its first convolution and matrix product, is no model's memory."""
    tokens = nn.Conv2d(3, 64, 4, 4)(torch.zeros(8, 3, 32, 32)).flatten(2).transpose(1, 2)
    nn.TransformerEncoderLayer(64, 4, 64, batch_first=True).eval()(tokens)


@torch.inference_mode()
def _peak_memory(model: nn.Module, batch: torch.Tensor, before: int) -> int:
    """Bytes, for weights and inference, see `measure`."""
    if batch.is_cuda:
        torch.cuda.reset_peak_memory_stats(batch.device)
        _run_for(0.1, model, batch)
        return torch.cuda.max_memory_allocated(batch.device)
    try:
        # Linux: the high-water mark begins again, without what loading the file took for a moment
        Path("/proc/self/clear_refs").write_text("5")
        _run_for(0.1, model, batch)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) * 1024
    except OSError:
        _run_for(0.1, model, batch)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak - before


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vitopt.metrics")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    print(json.dumps(measure(args.folder, args.device)))


if __name__ == "__main__":
    main()
