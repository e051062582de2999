"""Energy and power: the only door to codecarbon."""

import logging
import os
import time
from contextlib import contextmanager

os.environ.setdefault("CODECARBON_LOG_LEVEL", "error")  # read when codecarbon is imported
from codecarbon import OfflineEmissionsTracker  # noqa: E402

MEASURING_MODES = {"intel_rapl", "windows_emi", "intel_power_gadget"}  # otherwise codecarbon guesses from the load
JOULES_PER_KWH = 3.6e6
NOTHING = {"seconds": 0.0, "energy_kwh": 0.0, "cpu_kwh": 0.0, "gpu_kwh": 0.0, "ram_kwh": 0.0, "power_w": None,
           "power_source": "nothing ran"}


def open_tracker(gpus: list[int]):
    """Begin to follow the power of the whole machine and of these GPUs, as torch counts them; None where it fails."""
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    tracker = OfflineEmissionsTracker(
        country_iso_code="USA",  # sets the carbon of a kWh, which is not reported; offline asks nothing of a network
        output_methods=[], measure_power_secs=1, log_level="critical", tracking_mode="machine",
        allow_multiple_runs=True, gpu_ids=_nvml_indices(gpus))
    try:
        with _task(tracker, "first"):
            pass  # codecarbon's first window reads low: thrown away
    except AttributeError:  # its constructor swallows its own errors and leaves a husk
        return None
    return tracker


def _nvml_indices(gpus: list[int]) -> list[int] | None:
    """NVML counts all GPUs of the machine, torch the visible ones."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(name.strip().isdigit() for name in visible):
        return [int(visible[gpu]) for gpu in gpus] or None
    return gpus or None


@contextmanager
def window(tracker, name: str):
    """Measure what the machine uses inside the `with` block.

    Args:
        tracker: of `open_tracker`; None gives a reading without numbers.
        name: a new one for each window.

    Yields:
        A dictionary, filled when the block ends: `seconds`, `energy_kwh` and its parts `cpu_kwh`, `gpu_kwh` and
        `ram_kwh`, `power_w` (the average) and `power_source`. The source is `measured` where counters read the CPU,
        and the GPU if there is one, and `estimated` where codecarbon takes a model of the CPU's load. RAM is always
        an estimate. Where codecarbon cannot work all but the seconds are None and the source is `unavailable`.
    """
    reading = dict.fromkeys(NOTHING) | {"power_source": "unavailable"}
    start = time.perf_counter()
    with _task(tracker, name) as used:
        yield reading
    reading["seconds"] = time.perf_counter() - start
    if data := used.get("data"):
        reading |= {
            "energy_kwh": data.energy_consumed,
            "cpu_kwh": data.cpu_energy, "gpu_kwh": data.gpu_energy, "ram_kwh": data.ram_energy,
            "power_w": data.energy_consumed * JOULES_PER_KWH / data.duration,
            "power_source": _source(tracker),
        }


@contextmanager
def _task(tracker, name: str):
    used = {}
    if tracker is None:
        yield used
        return
    tracker.start_task(name)
    try:
        yield used
    finally:
        used["data"] = tracker.stop_task(name)


def _source(tracker) -> str:
    modes = [part._mode for part in tracker._hardware if type(part).__name__ == "CPU"]
    return "measured" if modes and set(modes) <= MEASURING_MODES else "estimated"
