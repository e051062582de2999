"""Training batches do not depend on how many processes share them, nor on what came before."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitopt import batches, data
from vitopt.errors import InputError
from vitopt.recipe import Augment, Data, Train

GREY = {"channels": 1, "height": 16, "width": 16, "mean": [0.5], "std": [0.5], "interpolation": "bicubic",
        "crop_pct": 1.0}
AUGMENT = {"crop": "pad", "hflip": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5}


def process(index=0, count=1):
    return SimpleNamespace(process_index=index, num_processes=count, device=torch.device("cpu"))


@pytest.fixture(params=["in memory", "streamed", "streamed by workers"])
def splits(request, monkeypatch):
    def load(augment, limit=100):
        if request.param != "in memory":
            monkeypatch.setattr(data, "MEMORY_BYTES", 0)
        workers = 2 if request.param == "streamed by workers" else 0
        return data.load(Data(name="digits", limit=limit, workers=workers), GREY, Augment(**augment))
    return load


def augmented(splits, process=process(), seed=0, batch_size=16, epochs=3, **augment):
    section = Train(epochs=epochs, batch_size=batch_size, lr=1.0, augment=Augment(**augment))
    return batches.Augmented(splits, section, 10, seed, process)


@pytest.mark.parametrize("mix", [{}, {"mixup": 0.8, "cutmix": 1.0}])
def test_two_processes_together_see_what_one_sees(splits, mix):
    loaded = splits(AUGMENT)
    whole = list(augmented(loaded, **AUGMENT, **mix).epoch(2))
    shares = [list(augmented(loaded, process(index, 2), **AUGMENT, **mix).epoch(2)) for index in (0, 1)]
    assert len(whole) == len(shares[0]) == 5
    for batch, *parts in zip(whole, *shares):
        assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(16))
        for part in parts:
            assert torch.equal(part.images, batch.images[part.rows])
            assert torch.equal(part.labels, batch.labels[part.rows])
            torch.testing.assert_close(part.targets, batch.targets[part.rows])


def test_an_epoch_can_be_made_again_from_any_step(splits):
    loaded = splits(AUGMENT)
    former = list(augmented(loaded, **AUGMENT, mixup=0.8).epoch(3))
    again = augmented(loaded, **AUGMENT, mixup=0.8)
    for _ in again.epoch(1):
        pass
    for batch, other in zip(former[2:], again.epoch(3, first_step=2), strict=True):
        assert torch.equal(batch.images, other.images) and torch.equal(batch.targets, other.targets)


def test_epochs_and_seeds_differ_and_an_epoch_shows_each_image_at_most_once(splits):
    loaded = splits(AUGMENT)
    first, second = (torch.cat([batch.images for batch in augmented(loaded, **AUGMENT).epoch(n)]) for n in (1, 2))
    other = torch.cat([batch.images for batch in augmented(loaded, seed=1, **AUGMENT).epoch(1)])
    assert not torch.equal(first, second) and not torch.equal(first, other)
    loaded = splits({})
    images = torch.cat([batch.images for batch in augmented(loaded).epoch(1)]).flatten(1)
    known = torch.stack([loaded.calibration[index][0] for index in range(len(loaded.calibration))]).flatten(1)
    nearest = torch.cdist(images, known).argmin(dim=1)
    torch.testing.assert_close(images, known[nearest], atol=1e-5, rtol=0)
    assert len(images) == 80 and len(set(nearest.tolist())) == 80


def test_repeated_augmentation_shows_an_image_several_times_in_a_batch_each_time_otherwise(splits):
    loaded = splits(AUGMENT)
    for batch in augmented(loaded, **AUGMENT, repeats=4).epoch(1):
        groups = batch.images.view(4, 4, -1)
        assert (batch.labels.view(4, 4) == batch.labels.view(4, 4)[:, :1]).all()
        assert all(not torch.equal(group[0], group[1]) for group in groups)


def test_the_last_epochs_are_not_mixed(splits):
    loader = augmented(splits({}), mixup=0.8, mixup_off_epochs=1)
    assert all(batch.targets.shape == (16, 10) for batch in loader.epoch(2))
    assert all(torch.equal(batch.targets, batch.labels) for batch in loader.epoch(3))


def test_processes_share_the_plain_images_so_that_each_is_seen_once(splits):
    loaded = splits({})
    shares = [list(batches.Plain(loaded.test, 0, process(index, 3), 8, limit=50)) for index in range(3)]
    seen = torch.cat([images for share in shares for images, _ in share])
    expected = torch.stack([loaded.test[index][0] for index in range(50)])
    assert len(seen) == 50 and len(seen.flatten(1).unique(dim=0)) == len(expected.flatten(1).unique(dim=0))
    order = torch.cat([torch.arange(index, 50, 3) for index in range(3)])
    torch.testing.assert_close(seen, expected[order], atol=1e-5, rtol=0)


def test_images_in_memory_are_those_that_stream(monkeypatch):
    loaded = data.load(Data(name="digits", limit=100), GREY, Augment())
    monkeypatch.setattr(data, "MEMORY_BYTES", 0)
    streamed = data.load(Data(name="digits", limit=100), GREY, Augment())
    assert loaded.train.pixels is not None and streamed.train.pixels is None
    for one, other in zip(augmented(loaded).epoch(1), augmented(streamed).epoch(1), strict=True):
        torch.testing.assert_close(one.images, other.images, atol=1e-5, rtol=0)
        assert torch.equal(one.labels, other.labels)


@pytest.fixture(params=[0, 2], ids=["streamed", "streamed by workers"])
def folder(request, tmp_path, monkeypatch):
    """Splits of an image folder too large for memory: 120 training images and 120 for the test, and their files."""
    monkeypatch.setattr(data, "MEMORY_BYTES", 0)
    digits = data._digits()
    for number, (image, target) in enumerate(digits[:480]):
        split = "test" if number % 4 == 0 else "train"
        (tmp_path / split / f"{target % 2}").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / split / f"{target % 2}" / f"{number}.png")
    section = Data(name="folder", root=str(tmp_path), validation=0.5, workers=request.param)

    def load():
        splits = data.load(section, GREY, Augment(**AUGMENT))
        return splits, lambda part, position: Path(getattr(splits, part).path(position))
    return load


def test_a_corrupt_training_image_is_replaced_by_the_next_on_any_number_of_processes(folder, capsys):
    splits, path = folder()
    assert len(splits.train) == 180
    whole = [list(augmented(splits, **AUGMENT, mixup=0.8).epoch(number)) for number in (1, 2)]
    order = augmented(splits, **AUGMENT)._order(2).tolist()
    path("train", 17).write_bytes(b"")
    loader = augmented(splits, **AUGMENT, mixup=0.8)
    again = [list(loader.epoch(number)) for number in (1, 2)]
    said = capsys.readouterr().out
    assert said.startswith("  left out: 1 of the 180 training images do not decode") and said.count("\n") == 1
    assert [len(batch.images) for batch in again[1]] == [16] * 11
    step, row = divmod(order.index(17), 16)
    for number, (batch, other) in enumerate(zip(whole[1], again[1])):
        assert torch.equal(batch.labels[torch.arange(16) != row], other.labels[torch.arange(16) != row])
        assert (number == step) or torch.equal(batch.images, other.images)
    if step < 11:
        assert again[1][step].labels[row] == splits.train.targets[18]
        shares = [list(augmented(splits, process(index, 2), **AUGMENT, mixup=0.8).epoch(2, step)) for index in (0, 1)]
        for part in (shares[0][0], shares[1][0]):
            assert torch.equal(part.images, again[1][step].images[part.rows])


def test_evaluation_leaves_a_corrupt_image_out_and_counts_every_other_once(folder, capsys, monkeypatch):
    splits, path = folder()
    path("test", 11).write_bytes(b"")
    shares = [list(batches.Plain(splits.test, splits.workers, process(index, 2), 8)) for index in (0, 1)]
    assert "left out: 1 of the 120 test images do not decode" in capsys.readouterr().out
    seen = torch.cat([images for share in shares for images, _ in share])
    order = [position for index in (0, 1) for position in range(index, 120, 2) if position != 11]
    torch.testing.assert_close(seen, torch.stack([splits.test[position][0] for position in order]))
    monkeypatch.setattr(data, "MEMORY_BYTES", 10 ** 9)
    kept, _ = folder()  # decoded once in memory: the same images
    images, labels = zip(*batches.Plain(kept.test, 0, process(), 8))
    order = [position for position in range(120) if position != 11]
    torch.testing.assert_close(torch.cat(images), torch.stack([splits.test[position][0] for position in order]))
    assert torch.equal(torch.cat(labels), splits.test.targets[order])


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("count", [3, 120])
def test_more_than_one_in_a_hundred_corrupt_images_end_training_and_evaluation(folder, part, count):
    splits, path = folder()
    for position in range(count):
        path(part, position).write_bytes(b"")
    with pytest.raises(InputError, match=f"of the {len(getattr(splits, part))} {part}.*more than 1 %: mend or remove"):
        if part == "train":
            list(augmented(splits, **AUGMENT).epoch(1))
        else:
            list(batches.Plain(splits.test, splits.workers, process(), 8))


def test_what_one_process_cannot_decode_counts_on_all(folder, monkeypatch, capsys):
    splits, _ = folder()
    elsewhere = {"far.png": "empty"}
    monkeypatch.setattr(batches, "distributed", SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2,
        all_gather_object=lambda everywhere, own: everywhere.__setitem__(slice(None), [own, elsewhere])))
    assert len(list(batches.Plain(splits.test, splits.workers, process(0, 2), 8))) == 8
    assert "left out: 1 of the 120 test images do not decode: far.png (empty)" in capsys.readouterr().out
    elsewhere["away.png"] = "empty"
    with pytest.raises(InputError, match="2 of the 120 test images do not decode: away.png, far.png"):
        list(batches.Plain(splits.test, splits.workers, process(0, 2), 8))


@pytest.mark.parametrize("augment, size, kept", [
    ({"crop": "pad"}, 16, True), ({"auto_augment": "augmix-m5-w4-d2"}, 16, False),
    ({"crop": "resized"}, 16, True), ({"crop": "resized"}, 4, False)])  # digits have 8 pixels a side
def test_images_stay_in_memory_where_their_augmentation_can_start_from_what_is_kept(augment, size, kept):
    splits = data.load(Data(name="digits", limit=100), GREY | {"height": size, "width": size}, Augment(**augment))
    assert (splits.train.pixels is not None) == kept


def test_a_changed_image_file_is_read_again(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(6):
                Image.fromarray(np.full((16, 16), 40 * index, np.uint8)).save(tmp_path / split / name / f"{index}.png")
    section = Data(name="folder", root=str(tmp_path))
    first = data.load(section, GREY)
    assert data.load(section, GREY).test.pixels is first.test.pixels
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / "test" / "a" / "0.png")
    assert data.load(section, GREY).test.pixels[0].float().mean() == 255
