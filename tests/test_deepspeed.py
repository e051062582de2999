"""ZeRO 1, 2 and 3 for real, on the CPU over gloo: the same training as without DeepSpeed, the same folder after it."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from test_checkpoints import result
from torch.testing import assert_close

ROOT = Path(__file__).parent.parent
EPOCHS = 12
CASES = ("taught, with projections", "in parts, without an average")


def launch(config, processes, case, folder, epochs=4):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    alone = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    words = ["accelerate", "launch", "--config_file", ROOT / config, "--num_processes", str(processes),
             ROOT / "tests" / "test_checkpoints.py", case, folder, str(epochs)]
    return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=alone | {"PATH": path, "PYTHONPATH": str(ROOT)})


def finished(*words):
    process = launch(*words)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    return words[3]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The folder of as many processes without DeepSpeed."""
    return functools.cache(lambda case, processes: finished(
        "accelerate_config.yaml", processes, case, tmp_path_factory.mktemp("without")))


@pytest.mark.parametrize("case, zero, processes", [
    (CASES[0], 1, 2), (CASES[0], 2, 1), (CASES[0], 3, 2), (CASES[1], 2, 2), (CASES[1], 3, 2)])
def test_zero_trains_as_no_deepspeed_does_and_writes_the_same_folder(without, tmp_path, case, zero, processes):
    folder = finished(f"recipes/deepspeed_zero{zero}.yaml", processes, case, tmp_path)
    (_, _, expected), (_, _, history) = result(without(case, processes)), result(folder)
    assert [row["lr"] for row in history] == [row["lr"] for row in expected]
    assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (folder, without(case, processes)))
    assert weights.keys() == others.keys()
    for name in weights:
        assert_close(weights[name], others[name], atol=2e-3, rtol=1e-2)
    said, expected = ((path / "model" / "model.json").read_text() for path in (folder, without(case, processes)))
    assert said == expected


@pytest.mark.parametrize("zero", [1, 3])
def test_a_killed_run_of_shards_goes_on_bit_identical(tmp_path, zero):
    config, case = f"recipes/deepspeed_zero{zero}.yaml", CASES[0]
    whole = finished(config, 2, case, tmp_path / "whole", EPOCHS)
    process = launch(config, 2, case, tmp_path / "killed", EPOCHS)
    while not list((tmp_path / "killed").glob(".row.checkpoints/0*")) and process.poll() is None:
        time.sleep(0.01)
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "history.json").exists()
    assert result(finished(config, 2, case, tmp_path / "killed", EPOCHS)) == result(whole)
