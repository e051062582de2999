"""Runs that are stopped and go on. A test kills `python tests/test_checkpoints.py CASE FOLDER [EPOCHS]`."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from sklearn.datasets import load_digits

from vitopt import checkpoints, data, devices, model as models, training
from vitopt.checkpoints import Checkpoints
from vitopt.errors import InputError, Stopped, errors_as_lines
from vitopt.recipe import Model, Recipe

MODEL = {"name": "vit_base_patch16_224", "img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 32, "depth": 2,
         "num_heads": 2, "mlp_ratio": 2.0, "drop_path_rate": 0.2, "proj_drop_rate": 0.1}
TRAIN = {"batch_size": 32, "lr": 0.002, "ema_decay": 0.9, "clip_grad": 1.0, "precision": "fp32",
         "checkpoint_minutes": 0.002, "augment": {"crop": "pad", "padding": 1, "random_erasing": 0.25, "mixup": 0.8,
                                                  "cutmix": 1.0, "mixup_off_epochs": 1}}
STREAMED = {"crop": "resized", "auto_augment": "augmix-m5-w2", "mixup": 0.8, "repeats": 2}
CASES = {
    "augmented, with an average of the weights": {},
    "taught, with projections": {"distill": {"teacher": "t", "features": {}, "relations": {}, "attention": {}}},
    "with stored logits": {"distill": {"teacher": "t", "store": True}},
    "in parts, without an average": {"train": TRAIN | {"ema_decay": None, "accumulate": 2}},
    "images through workers": {"data": {"name": "folder", "limit": 300, "workers": 2},
                               "train": TRAIN | {"augment": STREAMED, "accumulate": 2, "optimizer": "lion"}},
}


def run(case, folder, epochs=4):
    """Train as a row does, with checkpoints; its weights and history go to folder/model and folder/history.json."""
    sections = {"data": {"name": "digits", "limit": 300}, "train": TRAIN} | CASES[case]
    if sections["data"]["name"] == "folder":
        sections["data"] = sections["data"] | {"root": str(folder.parent / "images")}
    sections["train"] = sections["train"] | {"epochs": epochs}
    recipe = Recipe.model_validate({"model": MODEL} | sections)
    accelerator = devices.make_accelerator(recipe.train)
    set_seed(0)
    model, teachers = models.build(Model(**MODEL), 10), []
    if recipe.distill:
        teachers = [models.build(Model(**MODEL | {"embed_dim": 48}), 10)]
    splits = data.load(recipe.data, model.architecture["input"], recipe.train.augment)
    saved = Checkpoints(folder / "row", accelerator)
    model = saved.open() or model
    model, history = training.train(model, recipe, splits, accelerator, teachers, saved=saved)
    if accelerator.is_main_process:
        models.save(model, folder / "model")
        (folder / "history.json").write_text(json.dumps(history))


def result(folder):
    history = json.loads((folder / "history.json").read_text())
    stores = {file.name: file.read_bytes() for file in folder.glob(".teacher_logits/*/*")}
    return (folder / "model" / "model.safetensors").read_bytes(), stores, [
        {key: row[key] for key in ("epoch", "loss", "validation_accuracy", "lr")} for row in history]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder in which digits lie as files; runs go beside them."""
    folder = tmp_path_factory.mktemp("killed")
    digits = load_digits()
    for number, (image, target) in enumerate(zip(digits.images[:700], digits.target)):
        file = folder / "images" / ("train" if number < 500 else "test") / str(target) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).resize((24, 24)).save(file)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_any_moment_and_started_again_ends_bit_identical(images, case):
    whole, killed = images / f"{case}, whole", images / case
    run(case, whole)
    chance, kills = random.Random(case), 0
    while not (killed / "history.json").exists():
        process = subprocess.Popen([sys.executable, __file__, case, str(killed)], text=True, stdout=subprocess.PIPE)
        if kills < 3:
            for line in process.stdout:  # the setting up is over
                if "images, decoded" in line:
                    break
            time.sleep(chance.uniform(0.1, 1.5))
            process.send_signal(signal.SIGKILL)
            kills += 1
        printed = process.communicate()[0]
        assert kills < 3 or process.returncode in (0, -signal.SIGKILL), printed
    assert result(killed) == result(whole)
    assert list(killed.glob(".teacher_logits/*/*")) or not CASES[case].get("distill", {}).get("store")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_run_those_that_decode_images_too_stops_it_as_cleanly(images, number):
    case, whole, stopped = "images through workers", images / f"whole {number}", images / f"stopped {number}"
    run(case, whole, 12)
    words = [sys.executable, __file__, case, str(stopped), "12"]
    process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    for line in process.stdout:
        if "epoch 1/" in line:
            break
    os.killpg(process.pid, number)
    printed = process.communicate()[0]
    assert process.returncode == 75 and "Traceback" not in printed, printed
    assert subprocess.run(words, capture_output=True).returncode == 0
    assert result(stopped) == result(whole)


class Killed(Exception):
    pass


@pytest.fixture
def train(tiny, tmp_path, monkeypatch):
    """Trains a row that is stopped after so many steps, if it is told to be, with a checkpoint after each."""
    def call(steps=None, error=Killed, where=tmp_path, **options):
        recipe = Recipe.model_validate({"model": {"name": "x"}, "data": {"name": "digits", "limit": 100},
                                        "train": TRAIN | {"checkpoint_minutes": 0.0, "epochs": 3} | options})
        accelerator = devices.make_accelerator(recipe.train)
        splits = data.load(recipe.data, tiny().architecture["input"], recipe.train.augment)
        saved, done, keep = Checkpoints(where / "row", accelerator, "recipe"), [], training._State.keep

        def kept(state, saved):
            keep(state, saved)
            done.append(state.step)
            if state.step == steps:
                raise error
        monkeypatch.setattr(training._State, "keep", kept)
        try:
            model = saved.open() or tiny()
            model, history = training.train(model, recipe, splits, accelerator, saved=saved)
        finally:
            monkeypatch.setattr(training._State, "keep", keep)
        return model.state_dict(), [row["loss"] for row in history], done
    return call


def same(first, second):
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    return all(torch.equal(first[0][name], second[0][name]) for name in first[0])


@pytest.mark.parametrize("steps", range(1, 7))
def test_after_every_step_a_run_can_be_stopped_and_goes_on_as_if_it_had_not(train, tmp_path, steps):
    whole = train(where=tmp_path / "whole")
    assert whole[2] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(Killed):
        train(steps)
    again = train()
    assert same(whole, again) and again[2] == list(range(steps + 1, 7))


def test_the_newest_two_checkpoints_are_kept_with_checksums_that_sha256sum_reads(train, tmp_path):
    train()
    folders = sorted((tmp_path / ".row.checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["000_000000005", "000_000000006"]
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "sha256"], cwd=folders[1], capture_output=True)
    assert checked.returncode == 0
    assert {file.name for file in folders[1].iterdir()} == {*checkpoints.FILES, "sha256"}
    assert models.load(folders[1])(torch.zeros(1, 1, 16, 16)).shape == (1, 10)  # the best epoch so far can be tried


def test_checkpoints_come_after_the_epochs_and_the_minutes_that_the_recipe_says(train, tmp_path):
    assert train(checkpoint_minutes=1000.0)[2] == [6]
    assert train(checkpoint_minutes=1000.0, checkpoint_epochs=1, where=tmp_path / "b")[2] == [2, 4, 6]
    assert train(checkpoint_minutes=1000.0, checkpoint_epochs=2, where=tmp_path / "c")[2] == [4, 6]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("name", (*checkpoints.FILES, "sha256"))
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(train, tmp_path, capsys, damage, name):
    whole = train(where=tmp_path / "whole")
    with pytest.raises(Killed):
        train(4)
    damage(tmp_path / ".row.checkpoints" / "000_000000004" / name)
    capsys.readouterr()
    again = train()
    printed = capsys.readouterr().out
    assert "000_000000004 is damaged" in printed and "going on after step 3 of 6" in printed
    assert same(whole, again) and again[2] == [4, 5, 6]


@pytest.mark.parametrize("name, content", [
    ("state.json", "[]"), ("state.json", "{"), ("state.json", '{"cuts": 0}'), ("pruned.json", "{}"),
    ("state.json", '{"cuts": 0, "step": "x", "history": 3, "first_loss": {}, "best_accuracy": [], "has_best": true}')])
def test_a_strange_state_with_right_checksums_ends_in_one_line(train, tmp_path, name, content):
    with pytest.raises(Killed):
        train(1)
    folder, = (tmp_path / ".row.checkpoints").iterdir()
    (folder / name).write_text(content)
    digests = subprocess.run(["sha256sum", *checkpoints.FILES], cwd=folder, capture_output=True, check=True).stdout
    (folder / "sha256").write_bytes(digests)
    with pytest.raises(InputError, match="000_000000001.*: remove the folder"):
        train()


def test_where_no_checkpoint_is_whole_the_run_begins_anew(train, tmp_path, capsys):
    with pytest.raises(Killed):
        train(4)
    for folder in (tmp_path / ".row.checkpoints").iterdir():
        flip(folder / "state.safetensors")
    assert train()[2] == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out.count("is damaged") == 2


def test_a_checkpoint_that_cannot_be_written_leaves_those_before_it(train, tmp_path, monkeypatch):
    write = models.write_tensors

    def full(file, tensors):
        if file.name == "state.safetensors" and "000_000000003" in {path.name for path in file.parent.parent.iterdir()}:
            raise OSError(28, "No space left on device", str(file))
        write(file, tensors)
    monkeypatch.setattr(models, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        train()
    assert sorted(path.name for path in (tmp_path / ".row.checkpoints").iterdir()) == ["000_000000002", "000_000000003"]
    monkeypatch.setattr(models, "write_tensors", write)
    assert train()[2] == [4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_keeps_its_state_and_stops(train, tmp_path, monkeypatch, number):
    whole = train(where=tmp_path / "whole")
    step = training._step

    def signalled(*args):
        signal.raise_signal(number)
        return step(*args)
    before = signal.getsignal(number)
    monkeypatch.setattr(training, "_step", signalled)
    with pytest.raises(Stopped, match="stopped after step 1, whose state is kept in .*: give the same command again"):
        train(checkpoint_minutes=1000.0)
    assert signal.getsignal(number) == before
    monkeypatch.setattr(training, "_step", step)
    again = train(checkpoint_minutes=1000.0)
    assert same(whole, again)


def test_a_signal_that_comes_again_after_a_while_is_obeyed_at_once(monkeypatch):
    now = iter((0.0, 1.0, 9.0, 9.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with pytest.raises(Stopped, match="at once"), checkpoints.listening():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a launcher repeats what the terminal has sent
        signal.raise_signal(signal.SIGTERM)


def test_a_training_that_diverges_keeps_no_checkpoint_to_diverge_from_again(train, tmp_path):
    with pytest.raises(InputError, match=re.escape("train.lr")):
        train(lr=1e30, optimizer="sgd", epochs=9, warmup_ratio=0.0)
    assert not list(tmp_path.glob(".row.checkpoints/*"))


@pytest.mark.parametrize("value", [
    {}, {"a": torch.ones(2), 1: [torch.zeros(()), {"b": (1, None, 2.5)}]}, [True, "x"]])
def test_what_is_taken_apart_for_json_comes_together_again(value):
    tensors = {}
    text = json.dumps(checkpoints.apart(value, "x", tensors))
    again = checkpoints.together(json.loads(text), tensors)
    assert json.dumps(checkpoints.apart(again, "x", {})) == text
    if isinstance(value, dict) and value:
        assert torch.equal(again["a"], torch.ones(2)) and again[1][1]["b"] == [1, None, 2.5]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with errors_as_lines():
        run(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
