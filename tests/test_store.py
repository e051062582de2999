from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitopt import data, devices, store, training
from vitopt.checkpoints import Checkpoints
from vitopt.recipe import Recipe

TRAIN = {"epochs": 2, "batch_size": 32, "lr": 0.002, "precision": "fp32", "augment": {"crop": "pad", "mixup": 0.8}}


class Deaf(nn.Module):
    """A teacher that cannot be asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.architecture = model, model.architecture

    def forward(self, images):
        raise AssertionError("the teacher was asked")

    def state_dict(self, *args, **kwargs):
        return self.model.state_dict(*args, **kwargs)


@pytest.fixture
def teach(tiny, tmp_path):
    def run(teacher, seed=0, num_classes=10, **train):
        recipe = Recipe.model_validate({
            "model": {"name": "x"}, "data": {"name": "digits", "limit": 200}, "seed": seed,
            "distill": {"teacher": "t", "store": True}, "train": TRAIN | train})
        accelerator = devices.make_accelerator(recipe.train)
        student = tiny(num_classes=num_classes)
        splits = data.load(recipe.data, student.architecture["input"], recipe.train.augment)
        model, history = training.train(student, recipe, splits, accelerator, [teacher],
                                        saved=Checkpoints(tmp_path / "row", accelerator))
        return model.state_dict(), [row["loss"] for row in history]
    run.files = lambda: sorted(tmp_path.glob(".teacher_logits/*/*"))
    return run


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("classes", [10, 150])
def test_a_second_student_learns_the_same_from_the_store_without_the_teacher(tiny, teach, classes):
    teacher = tiny(num_classes=classes, depth=1)
    first, losses = teach(teacher, num_classes=classes)
    assert len(teach.files()) == 2
    second, again = teach(Deaf(teacher), num_classes=classes)
    assert equal(first, second) and losses == again


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 30}, {"augment": {"crop": "pad", "mixup": 0.4}}])
def test_what_changes_the_views_does_not_read_the_store_of_others(tiny, teach, change):
    teach(tiny())
    with pytest.raises(AssertionError, match="the teacher was asked"):
        teach(Deaf(tiny()), **change)
    other = tiny()
    nn.init.ones_(other.head.bias)
    with pytest.raises(AssertionError, match="the teacher was asked"):
        teach(Deaf(other))


def test_more_epochs_read_what_is_there_and_add_the_rest(tiny, teach):
    teach(tiny())
    before = {file: file.stat().st_mtime_ns for file in teach.files()}
    teach(tiny(), epochs=3)
    assert len(teach.files()) == 3 and all(file.stat().st_mtime_ns == time for file, time in before.items())


def cut_short(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path):
    content = bytearray(file.read_bytes())
    content[-50] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [cut_short, flip_a_bit, lambda file: file.write_bytes(b"")])
def test_a_damaged_store_is_recognised_and_made_again(tiny, teach, capsys, harm):
    first, _ = teach(tiny())
    content = teach.files()[0].read_bytes()
    harm(teach.files()[0])
    again, _ = teach(tiny())
    assert f"{teach.files()[0]} is damaged: the teachers are asked again" in capsys.readouterr().out
    assert equal(first, again) and teach.files()[0].read_bytes() == content


@pytest.mark.parametrize("harm", [
    lambda kept: kept | {"count": kept["count"] * 0 + 2 ** 31 - 1},
    lambda kept: kept | {"classes": kept["classes"] + 60},
    lambda kept: kept | {"classes": kept["classes"] - 60}, lambda kept: kept | {"classes": kept["classes"].long()},
    lambda kept: kept | {"logits": kept["logits"][:, :, :1].contiguous()}, lambda kept: {"logits": kept["logits"]},
    lambda kept: kept | {"logits": kept["logits"].float()}, lambda kept: kept | {"more": torch.zeros(1)},
])
def test_a_store_with_a_right_checksum_and_other_contents_is_made_again(tiny, teach, capsys, harm):
    first, _ = teach(tiny(num_classes=150, depth=1), num_classes=150)
    changed = harm(load_file(teach.files()[0]))
    save_file(changed, teach.files()[0], {"sha256": store._checksum(changed)})
    again, _ = teach(tiny(num_classes=150, depth=1), num_classes=150)
    assert f"{teach.files()[0]} is damaged: the teachers are asked again" in capsys.readouterr().out
    assert equal(first, again)


def test_of_many_classes_the_most_probable_are_kept_and_the_rest_shares_what_is_left():
    torch.manual_seed(0)
    logits = 4 * torch.randn(6, 1000)
    kept = store._spread(store._condensed(logits)).softmax(-1)
    expected = logits.softmax(-1)
    top = expected.topk(100).indices
    torch.testing.assert_close(kept.gather(1, top), expected.gather(1, top), rtol=5e-3, atol=1e-6)
    rest = kept.scatter(1, top, 0.0)
    torch.testing.assert_close(rest.sum(-1), 1 - expected.gather(1, top).sum(-1), rtol=1e-2, atol=1e-4)
    assert all(len(row[row > 0].unique()) == 1 for row in rest)
