import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vitopt
from vitopt import model as models, pruning
from vitopt.errors import InputError
from vitopt.recipe import Model, Prune

VIT = {"name": "vit_base_patch16_224"}


@pytest.mark.parametrize("section, expected", [
    ({"name": "vit_bse_patch16_224"}, ["model.name: vit_bse_patch16_224", "near names: vit_base_patch16_224"]),
    (VIT | {"embed_dimm": 64}, ["model.embed_dimm", "did you mean embed_dim?"]),
    (VIT | {"pretraned": True}, ["model.pretraned", "did you mean pretrained?"]),
    (VIT | {"img_size": 30, "patch_size": 8}, ["model.img_size: 30", "patch size 8", "24 or 32"]),
    (VIT | {"embed_dim": 65}, ["embed_dim=65", "divisible by num_heads"]),
    (VIT | {"depth": "six"}, ["depth=six"]),
    ({"name": "vit_base_patch16_224.augrag"}, ["has no such weights", "vit_base_patch16_224.augreg_in1k"]),
    (VIT | {"checkpoint": "absent.pth"}, ["model.checkpoint: absent.pth: there is no such file"]),
])
def test_an_impossible_model_is_named_with_its_cure_before_it_is_built(section, expected):
    problems = models.check(Model(**section))
    assert len(problems) == 1, problems
    assert all(part in problems[0] for part in expected), problems


def test_several_mistakes_in_one_model_are_listed_at_once():
    problems = models.check(Model(**VIT, embed_dimm=64, dept=2, img_size=30, patch_size=8))
    assert [problem.split(":")[0] for problem in problems] == ["model.embed_dimm", "model.dept", "model.img_size"]


@pytest.mark.parametrize("section", [
    VIT, {"name": "swin_tiny_patch4_window7_224"}, {"name": "resnet18", "img_size": 64},
    {"name": "vit_small_patch16_224", "img_size": 64}, {"name": "eva02_tiny_patch14_224"},
])
def test_models_of_any_family_pass_the_check(section):
    assert models.check(Model(**section)) == []


def test_a_model_for_any_size_takes_the_image_size_it_is_told():
    model = models.build(Model(name="resnet18", img_size=64), 10, device="meta")
    assert models.example_input(model).shape == (1, 3, 64, 64)


def test_a_saved_model_gives_bit_identical_outputs_in_a_fresh_process(tiny, tmp_path):
    model = tiny()
    pruning.prune(model, Prune(ratio=0.4, importance="l2"))
    models.save(model, tmp_path)
    images = models.example_input(model, 3)
    save_file({"images": images, "logits": model(images).detach()}, tmp_path / "expected.safetensors")
    code = (
        "import sys, torch, vitopt; from safetensors.torch import load_file\n"
        "expected = load_file(sys.argv[1] + '/expected.safetensors')\n"
        "with torch.no_grad(): logits = vitopt.load(sys.argv[1])(expected['images'])\n"
        "sys.exit(0 if torch.equal(logits, expected['logits']) else 'the outputs differ')")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_loaded_model_can_be_pruned_and_saved_again(tiny, tmp_path):
    model = tiny()
    pruning.prune(model, Prune(ratio=0.2, importance="l2"))
    for step in (tmp_path / "a", tmp_path / "b"):
        step.mkdir()
    models.save(model, tmp_path / "a")
    again = vitopt.load(tmp_path / "a")
    pruning.prune(again, Prune(ratio=0.3, importance="l2"))
    models.save(again, tmp_path / "b")
    images = models.example_input(model, 2)
    assert torch.equal(vitopt.load(tmp_path / "b")(images), again(images))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoil(path):
    path.write_text("{")


@pytest.mark.parametrize("file, harm", [
    ("model.safetensors", cut), ("model.safetensors", spoil), ("model.json", spoil),
    ("model.json", Path.unlink), ("model.safetensors", Path.unlink),
])
def test_a_damaged_run_is_an_error_that_names_its_folder(tiny, tmp_path, file, harm):
    models.save(tiny(), tmp_path)
    harm(tmp_path / file)
    with pytest.raises(InputError, match=str(tmp_path)):
        vitopt.load(tmp_path)


def test_weights_of_another_architecture_are_refused(tiny, tmp_path):
    models.save(tiny(), tmp_path)
    save_file(tiny(depth=1).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="do not fit"):
        vitopt.load(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_local_checkpoint_keeps_its_head_where_the_classes_agree(tiny, tmp_path, suffix):
    model, path = tiny(), tmp_path / f"weights.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    kwargs = {key: value for key, value in model.architecture["kwargs"].items() if key != "num_classes"}
    loaded = models.build(Model(name=model.architecture["name"], checkpoint=str(path), **kwargs), 10).eval()
    images = models.example_input(model, 2)
    assert torch.equal(loaded(images), model(images))


def test_a_local_checkpoint_gets_a_new_head_for_other_classes_and_keeps_the_rest(tiny, tmp_path):
    model, path = tiny(), tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    kwargs = {key: value for key, value in model.architecture["kwargs"].items() if key != "num_classes"}
    loaded = models.build(Model(name=model.architecture["name"], checkpoint=str(path), **kwargs), 3).eval()
    images = models.example_input(model, 2)
    assert loaded(images).shape == (2, 3)
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_up_at_random(tiny, tmp_path):
    model, path = tiny(), tmp_path / "weights.safetensors"
    state_dict = model.state_dict()
    del state_dict["blocks.1.mlp.fc1.weight"], state_dict["head.weight"], state_dict["head.bias"]
    save_file(state_dict, path)
    kwargs = {key: value for key, value in model.architecture["kwargs"].items() if key != "num_classes"}
    with pytest.raises(InputError, match="model.checkpoint: .*blocks.1.mlp.fc1.weight"):
        models.build(Model(name=model.architecture["name"], checkpoint=str(path), **kwargs), 10)


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_a_checkpoint_that_is_no_weights_is_refused(tmp_path, content):
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="cannot be loaded"):
            models.build(Model(**VIT, checkpoint=str(tmp_path / name)), 10)


def test_loading_a_checkpoint_executes_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    buffer = io.BytesIO()
    torch.save({"x": Attack()}, buffer, pickle_module=pickle)
    (tmp_path / "a.pth").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="cannot be loaded"):
        models.build(Model(**VIT, checkpoint=str(tmp_path / "a.pth")), 10)
    assert not (tmp_path / "executed").exists()


def test_pretrained_weights_without_a_network_are_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="model.pretrained: true: .*connect to the Hugging Face Hub"):
        models.build(Model(name="vit_tiny_patch16_224", pretrained=True), 10)
