import socket
import time

import pytest

from vitopt import energy


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_window_reads_energy_that_is_power_times_time_and_asks_no_network(no_network):
    tracker = energy.open_tracker([])
    with energy.window(tracker, "busy") as reading:
        end = time.perf_counter() + 2.5
        while time.perf_counter() < end:
            pass
    assert 2.5 <= reading["seconds"] < 30
    assert reading["energy_kwh"] == pytest.approx(reading["cpu_kwh"] + reading["gpu_kwh"] + reading["ram_kwh"])
    assert 1 < reading["power_w"] < 5000
    assert reading["energy_kwh"] * 3.6e6 == pytest.approx(reading["power_w"] * reading["seconds"], rel=0.3)
    assert reading["power_source"] in ("measured", "estimated")


def test_windows_of_one_tracker_do_not_add_up():
    tracker = energy.open_tracker([])
    readings = []
    for name in ("a", "b"):
        with energy.window(tracker, name) as reading:
            time.sleep(1.5)
        readings.append(reading)
    assert readings[1]["energy_kwh"] == pytest.approx(readings[0]["energy_kwh"], rel=0.5)


def test_without_codecarbon_the_time_is_known_and_the_rest_says_unavailable(monkeypatch):
    class Husk:  # what its constructor leaves when it has swallowed an error
        def __init__(self, **kwargs):
            pass
    monkeypatch.setattr(energy, "OfflineEmissionsTracker", Husk)
    tracker = energy.open_tracker([])
    assert tracker is None
    with energy.window(tracker, "x") as reading:
        time.sleep(0.01)
    assert reading["seconds"] >= 0.01 and reading["energy_kwh"] is None and reading["power_source"] == "unavailable"


@pytest.mark.parametrize("modes, source", [
    (["intel_rapl"], "measured"), (["cpu_load"], "estimated"), (["constant"], "estimated"), ([], "estimated")])
def test_power_is_called_measured_only_where_a_counter_reads_it(modes, source):
    class CPU:
        def __init__(self, mode):
            self._mode = mode

    class Tracker:
        _hardware = [CPU(mode) for mode in modes]
    assert energy._source(Tracker) == source


@pytest.mark.parametrize("visible, gpus, expected", [
    (None, [0, 1], [0, 1]), ("2,3", [0, 1], [2, 3]), ("3", [0], [3]), ("", [], None), ("GPU-1a2b", [0], [0])])
def test_gpus_are_named_as_nvml_counts_them(monkeypatch, visible, gpus, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert energy._nvml_indices(gpus) == expected


def test_a_reading_goes_on_where_an_earlier_one_ended():
    class Tracker:
        _hardware = ()

        def start_task(self, name):
            pass

        def stop_task(self, name):
            return type("Used", (), {"energy_consumed": 6.0, "cpu_energy": 1.0, "gpu_energy": 2.0, "ram_energy": 3.0})
    with energy.window(Tracker(), "x") as reading:
        reading.lap()
    assert [reading[part] for part in energy.PARTS] == [12.0, 2.0, 4.0, 6.0]
    with energy.window(Tracker(), "y", dict(reading)) as more:
        pass
    assert more["energy_kwh"] == 18.0 and more["seconds"] > reading["seconds"] and more["power_source"] == "estimated"


def test_machines_add_up_and_what_two_launches_share_on_one_host_counts_once():
    def reading(host, cpu, gpu, ram, seconds, source="measured"):
        return {"host": host, "seconds": seconds, "cpu_kwh": cpu, "gpu_kwh": gpu, "ram_kwh": ram,
                "energy_kwh": cpu + gpu + ram, "power_source": source}
    both = energy.total([reading("a", 1.0, 10.0, 0.5, 3600.0), reading("b", 2.0, 20.0, 0.25, 1800.0)])
    assert (both["cpu_kwh"], both["gpu_kwh"], both["ram_kwh"], both["energy_kwh"]) == (3.0, 30.0, 0.75, 33.75)
    assert both["seconds"] == 3600.0 and both["power_w"] == pytest.approx(33750) and both["power_source"] == "measured"
    shared = energy.total([reading("a", 1.0, 10.0, 0.5, 3600.0), reading("a", 1.5, 20.0, 0.25, 3600.0, "estimated")])
    assert (shared["cpu_kwh"], shared["gpu_kwh"], shared["ram_kwh"]) == (1.5, 30.0, 0.5)
    assert shared["power_source"] == "estimated"
    without = energy.total([reading("a", 1.0, 1.0, 1.0, 1.0), energy.NOTHING | {"host": "b", "energy_kwh": None}])
    assert without["energy_kwh"] is None and without["power_source"] == "unavailable"
