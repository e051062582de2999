"""Energy and power: the only door to codecarbon."""

import logging
import os
import socket
import time
from contextlib import contextmanager

os.environ.setdefault("CODECARBON_LOG_LEVEL", "error")  # read when codecarbon is imported
from codecarbon import OfflineEmissionsTracker  # noqa: E402

MEASURING_MODES = {"intel_rapl", "windows_emi", "intel_power_gadget"}  # otherwise codecarbon guesses from the load
JOULES_PER_KWH = 3.6e6
PARTS = ("energy_kwh", "cpu_kwh", "gpu_kwh", "ram_kwh")
HOST = socket.gethostname()
NOTHING = {"seconds": 0.0} | dict.fromkeys(PARTS, 0.0) | {"power_w": None, "power_source": "nothing ran"}


def open_tracker(gpus: list[int]):
    """Begin to follow the power of the whole machine and of these GPUs, as torch counts them; None where it fails."""
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    tracker = OfflineEmissionsTracker(
        country_iso_code="USA",  # sets the carbon of a kWh, which is not reported; offline asks nothing of a network
        output_methods=[], measure_power_secs=1, log_level="critical", tracking_mode="machine",
        allow_multiple_runs=True, gpu_ids=_nvml_indices(gpus))
    try:
        tracker.start_task("first")  # codecarbon's first window reads low: thrown away
        tracker.stop_task("first")
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
def window(tracker, name: str, before: dict | None = None):
    """Measure what the machine uses inside the `with` block.

    Args:
        tracker: of `open_tracker`; None gives a reading without numbers.
        name: a new one for each window.
        before: what an earlier window of the same work has read, to which this one adds.

    Yields:
        A `Reading`, complete when the block ends.
    """
    reading = Reading(tracker, name, before)
    try:
        yield reading
    finally:
        reading.stop()


class Reading(dict):
    """`host`, `seconds`, `energy_kwh` and its parts `cpu_kwh`, `gpu_kwh` and `ram_kwh`, `power_w` (the average) and
    `power_source`.

    The source is `measured` where counters read the CPU, and the GPU if there is one, and `estimated` where codecarbon
    takes a model of the CPU's load. RAM is always an estimate. Where codecarbon cannot work all but the seconds are
    None and the source is `unavailable`.
    """

    def __init__(self, tracker, name: str, before: dict | None):
        super().__init__((before or NOTHING | {"power_source": None}) | {"host": HOST})
        self.tracker, self.name, self.laps = tracker, name, 0
        self._start()

    def lap(self) -> None:
        """Bring the reading up to now, and go on."""
        self.stop()
        self._start()

    def _start(self) -> None:
        self.laps += 1
        if self.tracker is not None:
            self.tracker.start_task(f"{self.name} {self.laps}")
        self.start = time.perf_counter()

    def stop(self) -> None:
        used = None if self.tracker is None else self.tracker.stop_task(f"{self.name} {self.laps}")
        self["seconds"] += time.perf_counter() - self.start
        if used is None or self["energy_kwh"] is None:
            self |= dict.fromkeys(PARTS) | {"power_w": None, "power_source": "unavailable"}
            return
        for part, value in zip(PARTS, (used.energy_consumed, used.cpu_energy, used.gpu_energy, used.ram_energy)):
            self[part] += value
        source = _source(self.tracker)
        self["power_w"] = self["energy_kwh"] * JOULES_PER_KWH / self["seconds"]
        self["power_source"] = source if self["power_source"] in (None, source) else "estimated"


def total(readings: list[dict]) -> dict:
    """What all machines together have used: seconds of the longest, energy of all.

    Two launches on one host both read its whole CPU and memory, but GPUs of their own: only these add up there.
    """
    hosts = {}
    for reading in readings:
        hosts.setdefault(reading["host"], []).append(reading)
    result = {"seconds": max(reading["seconds"] for reading in readings)}
    if any(reading["energy_kwh"] is None for reading in readings):
        return result | dict.fromkeys(PARTS) | {"power_w": None, "power_source": "unavailable"}
    result |= {part: sum(of(reading[part] for reading in own) for own in hosts.values())
               for part, of in (("cpu_kwh", max), ("gpu_kwh", sum), ("ram_kwh", max))}
    result["energy_kwh"] = sum(result.values()) - result["seconds"]
    sources = {reading["power_source"] for reading in readings}
    return result | {"power_w": result["energy_kwh"] * JOULES_PER_KWH / result["seconds"],
                     "power_source": sources.pop() if len(sources) == 1 else "estimated"}


def _source(tracker) -> str:
    modes = [part._mode for part in tracker._hardware if type(part).__name__ == "CPU"]
    return "measured" if modes and set(modes) <= MEASURING_MODES else "estimated"
