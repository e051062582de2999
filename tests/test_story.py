"""The way of a user, end to end: recipes/run.py and the vitopt command in processes of their own."""

import hashlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import yaml

import vitopt
from vitopt import energy, metrics, model as models

ROOT = Path(__file__).parent.parent
RUN = str(ROOT / "recipes" / "run.py")
LAUNCH = ["accelerate", "launch", "--config_file", str(ROOT / "accelerate_config.yaml")]
MODEL = {"name": "vit_base_patch16_224", "img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 32, "depth": 2,
         "num_heads": 2, "mlp_ratio": 2.0}
TRAIN = {"epochs": 2, "batch_size": 32, "lr": 0.002, "precision": "fp32",
         "augment": {"crop": "pad", "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0}}
RECIPES = {
    "baseline": {"model": MODEL, "train": TRAIN},
    "pruned": {"start": "baseline", "prune": {"ratio": 0.3}},
    "pruned_kd": {"start": "baseline", "prune": {"ratio": 0.4, "steps": 2, "repair": True},
                  "distill": {"teacher": "baseline", "features": {}, "attention": {"weight": 0.1}},
                  "train": TRAIN | {"tracker": "tensorboard", "ema_decay": 0.9}},
    "taught": {"model": MODEL, "distill": {"teacher": ["baseline", "pruned"], "store": True}, "train": TRAIN},
}


def environment():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | {"PATH": path}


def command(*words, cwd, check=True):
    """Run a command of this environment; its exit code and what it printed."""
    done = subprocess.run([str(word) for word in words], cwd=cwd, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=environment())
    assert not check or done.returncode == 0, done.stdout
    return done


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Four rows made by two processes over gloo, given in the wrong order; 301 images do not halve."""
    folder = tmp_path_factory.mktemp("story")
    (folder / "recipes").mkdir()
    for name, recipe in RECIPES.items():
        (folder / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump({"data": {"name": "digits"}} | recipe))
    paths = [folder / "recipes" / f"{name}.yaml" for name in ("taught", "pruned_kd", "pruned", "baseline")]
    words = [RUN, *paths, "data.limit=301"]
    printed = command(*LAUNCH, "--num_processes", "2", *words, cwd=folder).stdout
    return folder, words, printed


def run_folder(story, name):
    return story[0] / "runs" / "recipes" / name


def test_every_row_is_made_in_order_by_two_processes_and_the_table_is_printed(story):
    _, _, printed = story
    assert printed.startswith("2 process(es) on cpu")
    assert printed.index("\nbaseline:") < min(printed.index("\npruned:"), printed.index("\npruned_kd:"))
    table = printed[printed.index("Accuracy (%)"):]
    assert all(name in table for name in RECIPES) and "report.html" in table and "learning_curves.png" in table
    assert "Traceback" not in printed and "epoch 2/2" in printed


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_folder_is_whole(story, name):
    folder = run_folder(story, name)
    metrics = json.loads((folder / "metrics.json").read_text())
    wanted = ("accuracy latency_ms images_per_second model_size_mb peak_memory_mb macs params power_w "
              "energy_j_per_1k_images train_energy_kwh train_seconds device batch_size power_source")
    assert all(metrics[key] is not None for key in wanted.split())
    assert metrics["test_images"] == 301 and metrics["num_processes"] == 2
    history = pd.read_csv(folder / "history.csv")
    assert list(history.columns) == ["epoch", "loss", "validation_accuracy", "lr", "seconds", "images_per_second"]
    trained = "train" in RECIPES[name]
    assert len(history) == (2 if trained else 0) and (metrics["train_seconds"] > 0) == trained
    assert list(pd.read_csv(folder / "energy.csv")["phase"]) == ["train", "inference"]
    assert not list(folder.rglob("*.pt")) + list(folder.rglob("*.pth")) + list(folder.rglob("*.pkl"))


def test_the_pruned_rows_are_smaller_and_load_as_they_were_saved(story):
    baseline = json.loads((run_folder(story, "baseline") / "metrics.json").read_text())
    for name in ("pruned", "pruned_kd"):
        metrics = json.loads((run_folder(story, name) / "metrics.json").read_text())
        assert metrics["params"] < baseline["params"] and metrics["macs"] < baseline["macs"]
        model = vitopt.load(run_folder(story, name))
        assert sum(parameter.numel() for parameter in model.parameters()) == metrics["params"]
        assert model(models.example_input(model)).shape == (1, 10)
        cuts = json.loads((run_folder(story, name) / "pruned.json").read_text())
        assert len(cuts) == len(metrics["pruned"]) == (2 if name == "pruned_kd" else 1)
        assert cuts[0]["params"]["before"] == baseline["params"] and cuts[-1]["params"]["after"] == metrics["params"]
        assert cuts[-1]["axes"]["blocks.0.mlp.hidden"]["after"] == model.blocks[0].mlp.fc1.out_features


def test_the_test_accuracy_is_that_of_the_saved_model_over_each_image_once(story):
    from vitopt import data
    from vitopt.recipe import Data
    for name in RECIPES:
        model = vitopt.load(run_folder(story, name))
        test = data.load(Data(name="digits", limit=301), model.architecture["input"]).test
        with torch.no_grad():
            hits = [model(image.unsqueeze(0)).argmax().item() == target for image, target in test]
        metrics = json.loads((run_folder(story, name) / "metrics.json").read_text())
        assert metrics["accuracy"] == pytest.approx(100 * sum(hits) / 301, abs=0.34)  # one image may be a near tie


def test_the_tracker_that_the_recipe_names_has_recorded(story):
    assert list(run_folder(story, "pruned_kd").rglob("events.out.tfevents*"))


def test_finished_rows_are_kept_and_said_so(story):
    folder, words, _ = story
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/recipes/*/metrics.json")}
    printed = command(sys.executable, *words, cwd=folder).stdout
    assert printed.count("finished, kept in") == 4
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("runs/recipes/*/metrics.json")}


def test_a_changed_recipe_is_refused_and_nothing_is_touched(story):
    folder, words, _ = story
    done = command(sys.executable, *words, "prune.ratio=0.5", cwd=folder, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    lines = done.stdout.splitlines()
    ratios = ("prune.ratio: 0.4 then, 0.5", "prune.ratio: 0.3 then, 0.5")
    assert len(lines) == 2 and all(ratio in line for ratio, line in zip(ratios, lines))


@pytest.mark.parametrize("words", [
    ["--cpu", "--num_processes", "2"], ["--config_file", "many.yaml"]])
def test_a_launcher_that_starts_fewer_processes_than_it_was_asked_for_is_caught(story, words):
    folder, _, _ = story
    (folder / "many.yaml").write_text("{compute_environment: LOCAL_MACHINE, distributed_type: MULTI_CPU, "
                                      "num_processes: 2, num_machines: 1, machine_rank: 0, mixed_precision: 'no'}")
    done = command("accelerate", "launch", *words, RUN, folder / "recipes" / "baseline.yaml", "output=few", cwd=folder,
                   check=False)
    assert "error: accelerate launch was asked for 2 processes and started 1: give it --config_file" in done.stdout
    assert done.returncode != 0 and not (folder / "few").exists()


def test_a_place_that_cannot_be_written_is_said_before_any_training(story):
    folder, _, _ = story
    (folder / "occupied").write_text("a file")
    words = [sys.executable, RUN, folder / "recipes" / "baseline.yaml", "output=occupied"]
    done = command(*words, cwd=folder, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout and "epoch" not in done.stdout
    assert "error: occupied/recipes/baseline: cannot be written (Not a directory): mend this" in done.stdout


def test_a_mistake_ends_in_one_line_and_exit_code_2(story):
    folder, words, _ = story
    done = command(sys.executable, *words, "train.epocs=3", "output=elsewhere", cwd=folder, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout and not (folder / "elsewhere").exists()
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("train.epocs: unknown key; did you mean epochs?" in line for line in lines)


def test_one_and_two_processes_train_alike(story):
    """The batch is the total over processes: as many steps, the same views, losses equal to rounding."""
    folder, _, _ = story
    recipes = [folder / "recipes" / f"{name}.yaml" for name in ("baseline", "pruned")]
    command(*LAUNCH, RUN, *recipes, "data.limit=301", "output=alone", cwd=folder)
    two = pd.read_csv(run_folder(story, "baseline") / "history.csv")
    one = pd.read_csv(folder / "alone" / "recipes" / "baseline" / "history.csv")
    assert one["lr"].tolist() == two["lr"].tolist()
    assert one["loss"].tolist() == pytest.approx(two["loss"].tolist(), rel=1e-5)
    assert one["validation_accuracy"].tolist() == pytest.approx(two["validation_accuracy"].tolist(), abs=3.4)
    both = [models.load(folder / path / "recipes" / "pruned").architecture["widths"] for path in ("runs", "alone")]
    assert both[0] == both[1]


def test_two_launches_on_the_loopback_address_train_as_two_machines_and_both_are_read(story):
    folder, _, _ = story
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1",
             "--main_process_port", port, RUN, folder / "recipes" / "baseline.yaml", "data.limit=301", "output=far"]
    ranks = [[str(word) for word in [*LAUNCH, "--machine_rank", rank, *words]] for rank in (0, 1)]
    other = subprocess.Popen(ranks[1], cwd=folder, env=environment(),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = command(*ranks[0], cwd=folder).stdout
    assert other.wait() == 0, other.stdout.read()
    assert printed.startswith("2 process(es) on cpu")
    near, far = (pd.read_csv(folder / path / "recipes" / "baseline" / "history.csv") for path in ("runs", "far"))
    assert far["loss"].tolist() == near["loss"].tolist()
    used = pd.read_csv(folder / "far" / "recipes" / "baseline" / "energy.csv")
    assert used["phase"].tolist() == ["train", "train", "inference"]
    numbers = json.loads((folder / "far" / "recipes" / "baseline" / "metrics.json").read_text())
    shared = used[:2]  # one host, whose CPU and memory count once
    assert numbers["train_energy_kwh"] == pytest.approx(shared["cpu_kwh"].max() + shared["ram_kwh"].max())


def test_one_process_replays_the_teachers_outputs_that_two_have_stored(story):
    folder, _, _ = story
    stored = {file: file.stat().st_mtime_ns for file in folder.glob("runs/recipes/.teacher_logits/*/*")}
    assert len(stored) == 2
    two = pd.read_csv(run_folder(story, "taught") / "history.csv")
    command(sys.executable, RUN, folder / "recipes" / "taught.yaml", "data.limit=301", "--force", cwd=folder)
    one = pd.read_csv(run_folder(story, "taught") / "history.csv")
    assert one["loss"].tolist() == pytest.approx(two["loss"].tolist(), rel=1e-5)
    assert stored == {file: file.stat().st_mtime_ns for file in folder.glob("runs/recipes/.teacher_logits/*/*")}


def begin(*words, cwd, until="epoch 2/", **options):
    """Start a command that trains for long, and come back once it has printed this."""
    process = subprocess.Popen([str(word) for word in words], cwd=cwd, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=environment(), **options)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if until in line:
            return process
    raise AssertionError("".join(printed))


def test_a_run_killed_in_training_goes_on_refuses_another_recipe_and_is_replaced_by_force(story):
    folder, _, _ = story
    words = [sys.executable, RUN, folder / "recipes" / "baseline.yaml", "data.limit=301", "output=killed"]
    state, row = folder / "killed" / "recipes" / ".baseline.checkpoints", folder / "killed" / "recipes" / "baseline"
    long = begin(*words, "train.epochs=300", "train.checkpoint_minutes=0.0", cwd=folder)
    second = command(*words, "train.epochs=300", cwd=folder, check=False)
    assert second.returncode == 2 and second.stdout.strip().endswith(
        "error: killed/recipes/baseline: another run is making this row: wait for it, or give output=DIR")
    long.send_signal(signal.SIGKILL)
    long.wait()
    assert not row.exists() and len(list(state.glob("[0-9]*"))) == 2
    other = command(*words, "train.epochs=2", cwd=folder, check=False)
    assert other.returncode == 2 and "under way in killed/recipes/.baseline.checkpoints and differs" in other.stdout
    assert "train.epochs: 300 then, 2 in the recipe" in other.stdout and "--force" in other.stdout
    assert "going on after step" in command(*words, "train.epochs=300", cwd=folder).stdout
    history = pd.read_csv(row / "history.csv")
    assert history["epoch"].tolist() == list(range(1, 301))
    energy_used = pd.read_csv(row / "energy.csv")
    assert energy_used["seconds"][0] > 0.9 * history["seconds"].sum()  # with what came before the kill
    command(*words, "train.epochs=1", "--force", cwd=folder)
    assert len(pd.read_csv(row / "history.csv")) == 1
    assert [path.name for path in (folder / "killed" / "recipes").iterdir() if path.name.startswith(".")] == []


def listen_to_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell makes what it starts in the background deaf to it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_one_line_and_says_start_me_again(story, number):
    folder, _, _ = story
    words = [sys.executable, RUN, folder / "recipes" / "baseline.yaml", "data.limit=301", f"output=stopped_{number}",
             "train.epochs=1000"]
    long = begin(*words, cwd=folder, preexec_fn=listen_to_ctrl_c)
    long.send_signal(number)
    rest = long.stdout.read()
    assert long.wait() == 75 and "Traceback" not in rest
    assert rest.strip().endswith("baseline.checkpoints: give the same command again to go on")


def test_of_two_processes_both_stop_when_one_dies_or_the_launcher_is_told_to_and_both_go_on(story):
    folder, _, _ = story
    words = [*LAUNCH, "--num_processes", "2", RUN, folder / "recipes" / "baseline.yaml", "data.limit=301", "output=two",
             "train.epochs=1000", "train.checkpoint_minutes=0.001"]
    long = begin(*words, cwd=folder, until="epoch 30/")
    children = psutil.Process(long.pid).children(recursive=True)
    ranks = [child for child in children if "run.py" in " ".join(child.cmdline()) and not child.children()]
    start = time.monotonic()
    ranks[-1].kill()
    rest = long.stdout.read()
    assert long.wait() != 0 and time.monotonic() - start < 60
    said = ("stopped: finished rows are kept", "whose state is kept", "error: another process of this run is gone")
    assert sum(line.startswith(said) or said[1] in line for line in rest.splitlines()) == 1, rest
    assert not any(rank.is_running() for rank in ranks)
    long = begin(*words, cwd=folder, until="going on after step")
    assert any("epoch" in line for line in long.stdout)  # it is at work again
    start = time.monotonic()
    long.send_signal(signal.SIGTERM)
    rest = long.stdout.read()
    assert long.wait() != 0 and time.monotonic() - start < 60 and "give the same command again to go on" in rest
    assert list((folder / "two" / "recipes" / ".baseline.checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "recipes").iterdir() if path.is_dir()))
def test_every_shipped_recipe_is_dry_run(folder, tmp_path):
    recipes = sorted((ROOT / "recipes" / folder).glob("*.yaml"))
    assert len(recipes) >= 6
    printed = command(sys.executable, RUN, "--dry-run", *recipes, cwd=tmp_path).stdout
    assert all(f"{path.stem}: " in printed for path in recipes)
    assert "parameters" in printed and "blocks.0.attn" in printed and not list(tmp_path.iterdir())


def test_the_vitopt_command_reports_and_gives_the_schema(story):
    folder, _, _ = story
    (folder / "runs" / "recipes" / "report.html").unlink()
    for face in (["vitopt"], [sys.executable, "-m", "vitopt"]):
        assert "Accuracy (%)" in command(*face, "report", "runs/recipes", cwd=folder).stdout
    assert (folder / "runs" / "recipes" / "report.html").exists()
    schema = json.loads(command("vitopt", "schema", cwd=folder).stdout)
    assert "prune" in schema["properties"]
    done = command("vitopt", "report", "nowhere", cwd=folder, check=False)
    assert done.returncode == 2 and done.stdout.startswith("error: nowhere: holds no finished run")


def test_two_seeds_are_two_runs_a_row_and_one_row_of_the_table(tmp_path, monkeypatch, capsys):
    """In this process and with invented measurements, which would take most of the time."""
    measured = {"images_per_second": 1.0, "model_size_mb": 1.0, "peak_memory_mb": 1.0, "macs": 1,
                "params": 1, "power_w": 1.0, "energy_j_per_1k_images": 1.0, "power_source": "measured", "threads": 1,
                "device": "cpu", "device_name": "a machine", "precision": "float32", "batch_size": 64}
    monkeypatch.setattr(metrics, "measure_apart", lambda folder, _: measured | {
        "inference": energy.NOTHING, "latency_ms": 3.0 if folder.name == ".seed_1.unfinished" else 1.0})
    monkeypatch.chdir(tmp_path)
    pruned = {"start": "baseline", "prune": {"ratio": 0.3, "importance": "l2"}, "train": TRAIN | {"epochs": 1},
              "distill": {"teacher": "baseline", "store": True}}
    for name, recipe in {"pruned": pruned, "baseline": {"model": MODEL, "train": TRAIN}}.items():
        content = {"data": {"name": "digits", "limit": 301}, "seed": [0, 1]} | recipe
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["run.py", "pruned.yaml", "baseline.yaml", *words])
        runpy.run_path(RUN, run_name="__main__")
        return capsys.readouterr().out

    dry = run("--dry-run")
    assert [dry.count(f"{name}: vit_base") for name in ("baseline", "pruned")] == [1, 1] and not Path("runs").exists()
    printed = run()
    table = Path("runs") / tmp_path.name
    found = pd.read_csv(table / "report.csv")
    assert list(zip(found["row"], found["seed"])) == [("baseline", 0), ("baseline", 1), ("pruned", 0), ("pruned", 1)]
    assert printed.count("2.00 ± 12.71") == 2  # Student's t of 1 degree of freedom
    assert "baseline, pruned: mean over 2 seeds (0, 1)." in printed
    assert len(list((table / ".teacher_logits").iterdir())) == 2  # where another row finds them
    weights = [vitopt.load(table / "baseline" / f"seed_{seed}").state_dict()["norm.weight"] for seed in (0, 1)]
    assert not torch.equal(*weights)
    for seed in (0, 1):
        content = yaml.safe_load((table / "pruned" / f"seed_{seed}" / "recipe.yaml").read_text())
        sha256 = hashlib.sha256((table / "baseline" / f"seed_{seed}" / "model.safetensors").read_bytes()).hexdigest()
        assert content["provenance"]["start_sha256"] == content["provenance"]["teacher_sha256"] == sha256
    assert run().count("finished, kept in") == 4
