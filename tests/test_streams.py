"""Data that do not lie in an image folder: WebDataset shards and data sets of the Hugging Face library, made here."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from test_story import LAUNCH, MODEL, RUN, command

from vitopt import batches, data, streams
from vitopt.errors import InputError
from vitopt.recipe import Augment, Data, Recipe, Train, read

GREY = {"channels": 1, "height": 16, "width": 16, "mean": [0.5], "std": [0.5], "interpolation": "bicubic",
        "crop_pct": 1.0}
TRAIN, TEST = [20, 33, 7, 50, 11, 40], [7, 1, 22]  # images in the shards
AUGMENT = {"crop": "pad", "hflip": 0.5, "random_erasing": 0.5}


def numbered(number):
    """An image that shows its number, left half and right half."""
    pixels = np.full((16, 16), number % 200, np.uint8)
    pixels[:, :8] = number // 200
    return Image.fromarray(pixels)


def numbers(images):
    """The numbers of images (batch, 1, 16, 16) that were not augmented."""
    pixels = ((images + 1) / 2 * 255).round().int()
    return (200 * pixels[:, 0, 8, 2] + pixels[:, 0, 8, 13]).tolist()


def write_shard(path, images, start=0):
    """A shard of (image, class) pairs, as PNG and .cls."""
    with tarfile.open(path, "w") as file:
        for number, (image, target) in enumerate(images, start):
            png = io.BytesIO()
            image.save(png, "png")
            for suffix, content in (("png", png.getvalue()), ("cls", b"%d" % target)):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def write_split(folder, name, lengths, start):
    """Shards of numbered images; what timm's _info.json says of them."""
    files = [f"{name}-{index:04d}.tar" for index in range(len(lengths))]
    for file, length in zip(files, lengths):
        write_shard(folder / file, [(numbered(number), number % 3) for number in range(start, start + length)], start)
        start += length
    return {"name": name, "num_samples": sum(lengths), "filenames": files, "shard_lengths": lengths}


def change_info(folder, change):
    info = json.loads((folder / "_info.json").read_text())
    change(info)
    (folder / "_info.json").write_text(json.dumps(info))


@pytest.fixture
def shards(tmp_path):
    """A WebDataset of three classes: training images 0 to 160, test images 200 to 229."""
    splits = {"train": write_split(tmp_path, "train", TRAIN, 0), "test": write_split(tmp_path, "test", TEST, 200)}
    (tmp_path / "_info.json").write_text(json.dumps({"num_classes": 3, "splits": splits}))
    return tmp_path


def load(folder, augment=Augment(), **keys):
    return data.load(Data.model_validate({"name": "wds", "root": str(folder)} | keys), GREY, augment)


def process(index=0, count=1):
    return SimpleNamespace(process_index=index, num_processes=count, device=torch.device("cpu"))


def augmented(splits, share=process(), seed=0, batch_size=16, **augment):
    section = Train(epochs=3, batch_size=batch_size, lr=1.0, augment=Augment(**augment))
    return batches.Augmented(splits, section, 3, seed, share)


def every(splits, processes):
    """What each process reads of the test images."""
    return [list(batches.Plain(splits.test, splits.workers, process(index, processes), 4))
            for index in range(processes)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 5])  # also more readers than shards
def test_evaluation_sees_each_image_once_over_processes_and_workers(shards, processes, workers):
    shares = every(load(shards, workers=workers), processes)
    seen = [number for share in shares for images, _ in share for number in numbers(images)]
    assert sorted(seen) == list(range(200, 230))
    for share in shares:
        for images, targets in share:
            assert targets.tolist() == [number % 3 for number in numbers(images)] and len(targets) <= 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_of_training_gives_whole_batches_and_no_image_twice(shards, processes, workers):
    splits = load(shards, workers=workers)
    known = {number for shard in splits.train.shards for number in shard_numbers(shards, shard)}
    epochs = []
    for epoch in (1, 2):
        shares = [list(augmented(splits, process(index, processes)).epoch(epoch)) for index in range(processes)]
        assert [len(share) for share in shares] == processes * [len(splits.train) // 16]
        assert all(len(batch.images) == 16 // processes for share in shares for batch in share)
        seen = [number for share in shares for batch in share for number in numbers(batch.images)]
        assert len(set(seen)) == len(seen) and set(seen) <= known
        labels = [label for share in shares for batch in share for label in batch.labels.tolist()]
        assert labels == [number % 3 for number in seen]
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    again = [batch for index in range(processes) for batch in augmented(splits, process(index, processes)).epoch(1)]
    other = [batch for index in range(processes) for batch in augmented(splits, process(index, processes), 1).epoch(1)]
    assert [number for batch in again for number in numbers(batch.images)] == epochs[0]
    assert [number for batch in other for number in numbers(batch.images)] != epochs[0]


def shard_numbers(folder, shard):
    with tarfile.open(shard.path) as file:
        return [int(name[:5]) for name in file.getnames() if name.endswith("png")]


def test_processes_read_shards_of_their_own_but_for_one_at_the_border(shards):
    splits = load(shards, workers=0)
    seen = [{number for batch in augmented(splits, process(index, 2)).epoch(1) for number in numbers(batch.images)}
            for index in (0, 1)]
    both = [shard for shard in splits.train.shards if all(share & set(shard_numbers(shards, shard)) for share in seen)]
    assert len(both) <= 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [1, 4])
def test_an_epoch_can_begin_at_any_step_with_the_same_views(shards, workers, first, monkeypatch):
    splits = load(shards, Augment(**AUGMENT), workers=workers)
    for index in (0, 1):
        whole = list(augmented(splits, process(index, 2), **AUGMENT, mixup=0.8).epoch(2))
        rest = list(augmented(splits, process(index, 2), **AUGMENT, mixup=0.8).epoch(2, first))
        assert len(rest) == len(whole) - first
        for batch, other in zip(whole[first:], rest, strict=True):
            assert torch.equal(batch.images, other.images) and torch.equal(batch.targets, other.targets)
    assert batch.targets.shape == (8, 3)
    if workers == 0:  # what was given already is not decoded
        decoded = []
        monkeypatch.setattr(streams.Stream, "decode", lambda self, sample: decoded.append(sample) or (numbered(0), 0))
        list(augmented(splits, **AUGMENT).epoch(1, len(splits.train) // 16 - 1))
        assert len(decoded) == 16


def test_validation_holds_out_whole_shards_the_same_each_time(shards):
    splits = load(shards, workers=0)
    held_out = [shard.path for shard in splits.validation.shards]
    assert len(held_out) == 1 and len(splits.train.shards) == 5
    assert not set(held_out) & {shard.path for shard in splits.train.shards}
    assert [shard.path for shard in load(shards, workers=0).validation.shards] == held_out
    assert len(load(shards, validation=0.5).validation.shards) == 3
    assert splits.classes == ["0", "1", "2"] and data.num_classes(Data(name="wds", root=str(shards))) == 3


def test_a_validation_split_beside_train_and_test_is_used_and_alone_it_is_the_test(shards):
    change_info(shards, lambda info: info["splits"].update(validation=write_split(shards, "validation", [5, 4], 300)))
    splits = load(shards, workers=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (161, 9, 30)
    change_info(shards, lambda info: info["splits"].pop("test"))
    splits = load(shards, workers=0)
    assert len(splits.test) == 9 and len(splits.train) + len(splits.validation) == 161


def test_shards_can_be_named_without_info_and_are_counted(shards):
    (shards / "_info.json").unlink()
    named = {"train": "train-{0000..0003}.tar", "test": "test-{0000..0002}.tar|30", "validation": "train-0005.tar"}
    section = {"splits": named, "num_classes": 3, "workers": 0}
    splits = load(shards, **section)
    assert [shard.length for shard in splits.train.shards] == TRAIN[:4]
    assert (len(splits.validation), len(splits.test)) == (40, 30)
    assert sorted(number for share in every(splits, 2) for images, _ in share for number in numbers(images)) == list(
        range(200, 230))
    with pytest.raises(InputError, match="data.splits.test: .* has 31 samples as it says and 30 in its shards"):
        load(shards, **section | {"splits": named | {"test": "test-{0000..0002}.tar|31"}})
    with pytest.raises(InputError, match="data.num_classes: is missing, and no _info.json of .* tells: give it"):
        load(shards, **section | {"num_classes": None})


def test_calibration_images_are_the_first_of_the_training_shards_in_order(shards):
    splits = load(shards, Augment(**AUGMENT), workers=0)
    expected = [number for shard in splits.train.shards for number in shard_numbers(shards, shard)][:32]
    for _ in range(2):
        shares = [batches.Plain(splits.calibration, 0, process(index, 2), 8, limit=32) for index in (0, 1)]
        assert [number for share in shares for images, _ in share for number in numbers(images)] == expected


def test_the_fingerprint_tells_other_shards_and_other_numbers_of_readers_apart(shards, monkeypatch):
    first = data.fingerprint(load(shards, workers=0).train)
    assert data.fingerprint(load(shards, workers=0).train) == first
    assert data.fingerprint(load(shards, workers=2).train) != first
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert data.fingerprint(load(shards, workers=0).train) != first
    monkeypatch.delenv("WORLD_SIZE")
    path = Path(load(shards, workers=0).train.shards[0].path)
    path.write_bytes(path.read_bytes() + bytes(512))
    assert data.fingerprint(load(shards, workers=0).train) != first


def damage(folder, number):
    """Make one image undecodable; shards keep their number of samples."""
    for path in folder.glob("*.tar"):
        content = path.read_bytes()
        with tarfile.open(path) as file:
            for member in file:
                if member.name == f"{number:05d}.png":
                    start = member.offset_data
                    path.write_bytes(content[:start] + bytes(20) + content[start + 20:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_of_a_stream_is_replaced_in_training_and_left_out_of_evaluation(shards, workers, capsys):
    splits = load(shards, workers=workers)
    whole = list(augmented(splits).epoch(1))
    step, row = 4, 9
    number = numbers(whole[step].images)[row]
    damage(shards, number)
    again = list(augmented(splits).epoch(1))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"  left out: 1 of the {len(splits.train)} training images do")
    assert f".tar: {number:05d} (cannot identify image file" in said
    for index, (batch, other) in enumerate(zip(whole, again, strict=True)):
        same = torch.tensor([(index, place) != (step, row) for place in range(16)])
        assert torch.equal(batch.images[same], other.images[same]) and len(other.images) == 16
    lanes = max(1, workers)
    after = row + 1 if row < 15 else 0
    assert numbers(again[step].images)[row] == numbers(whole[step + (row == 15) * lanes].images)[after]
    rest = list(augmented(splits).epoch(1, step))
    assert all(torch.equal(batch.images, other.images) for batch, other in zip(again[step:], rest, strict=True))
    change_info(shards, lambda info: info["splits"].update(test=write_split(shards, "test", [60, 60], 200)))
    splits = load(shards, workers=workers)
    damage(shards, 230)
    seen = [number for share in every(splits, 2) for images, _ in share for number in numbers(images)]
    assert sorted(seen) == [number for number in range(200, 320) if number != 230]
    damage(shards, 231)
    with pytest.raises(InputError, match="2 of the 120 test images do not decode.* more than 1 %: mend or remove them"):
        every(splits, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_without_any_image_that_decodes_are_an_error_at_once(shards, workers, monkeypatch):
    monkeypatch.setattr(streams, "IMAGE_KEYS", "tif")
    splits = load(shards, workers=workers)
    for read_it in (lambda: every(splits, 1), lambda: list(augmented(splits).epoch(1))):
        with pytest.raises(InputError, match="images do not decode: .* which is more than 1 %"):
            read_it()


def cut_in_a_file(path):
    path.write_bytes(path.read_bytes()[:5 * 512 + 100])


def cut_between_files(path):
    path.write_bytes(path.read_bytes()[:8 * 512])


def no_tar(path):
    path.write_bytes(b"<html>404</html>" * 100)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm, said", [
    (cut_in_a_file, "cannot be read (unexpected end of data): mend it"), (no_tar, "cannot be read ("),
    (cut_between_files, "holds 2 samples and _info.json says 7: write"), (empty, "cannot be read (empty file"),
    (Path.unlink, "cannot be read (No such file or directory): mend it")])
def test_a_shard_that_cannot_be_read_is_named_in_training_and_evaluation(shards, harm, said):
    splits = load(shards, workers=0)
    for path in (shards / "test-0000.tar", shards / "train-0002.tar"):
        harm(path)
        with pytest.raises(InputError) as error:
            every(splits, 1) if path.stem.startswith("test") else list(augmented(splits).epoch(1))
        assert f"{path}: this shard {said}" in error.value.problems[0]


@pytest.mark.parametrize("harm", [cut_in_a_file, cut_between_files, no_tar, empty, Path.unlink])
def test_a_shard_that_must_be_counted_and_cannot_be_read_is_named_before_training(shards, harm):
    (shards / "_info.json").unlink()
    harm(shards / "test-0002.tar")
    with pytest.raises(InputError, match="test-0002.tar: this shard (cannot be read|is missing)"):
        load(shards, splits={"train": "train-{0000..0005}.tar", "test": "test-{0000..0002}.tar"}, num_classes=3)


@pytest.mark.parametrize("harm, said", [
    (lambda folder: (folder / "_info.json").unlink(), "has no _info.json that tells the shards of train"),
    (lambda folder: (folder / "_info.json").write_text("{"), "has no _info.json that tells the shards of train"),
    (lambda folder: change_info(folder, lambda info: info["splits"]["train"].pop("shard_lengths")),
     "has no _info.json"),
    (lambda folder: change_info(folder, lambda info: info["splits"].pop("test")), "data.splits.test: is missing"),
    (lambda folder: change_info(folder, lambda info: info.update(num_classes=2)), "of class 2 and there are 2"),
    (lambda folder: change_info(folder, lambda info: info.update(classes=["a"])), "names 1 classes: mend one of them"),
    (lambda folder: change_info(folder, lambda info: info["splits"]["test"].update(num_samples=31)),
     "data.splits.test: test: has 31 samples as it says and 30 in its shards"),
    (lambda folder: change_info(folder, lambda info: info["splits"]["train"].update(
        filenames=["train-0000.tar"], shard_lengths=[20], num_samples=20)), "is a single shard, of which none can be"),
    (lambda folder: (folder / "test-0002.tar").unlink(), "test-0002.tar: this shard is missing: bring it"),
    (lambda folder: folder.rename(folder.with_name("elsewhere")), "there is no such folder"),
])
def test_what_info_does_not_tell_is_one_line(shards, harm, said):
    harm(shards)
    with pytest.raises(InputError) as error:
        every(load(shards, workers=0), 1)
    assert len(error.value.problems) == 1 and said in error.value.problems[0] and "\n" not in error.value.problems[0]


def test_shards_behind_a_url_that_cannot_be_reached_are_one_line_too(shards):
    with pytest.raises(InputError, match="data.root: pipe:false .*: has no _info.json"):
        load("pipe:false ")
    splits = load(f"pipe:cat {shards}", workers=0)  # webdataset reads what a command prints
    assert sum(len(images) for images, _ in every(splits, 1)[0]) == 30
    (shards / "test-0001.tar").unlink()
    with pytest.raises(InputError, match="test-0001.tar: this shard cannot be read"):
        every(splits, 1)


@pytest.mark.parametrize("section, said", [
    ({"name": "wds"}, "data: root: is missing: wds needs the folder of the shards, or its URL"),
    ({"name": "hfds"}, "data: root: is missing: hfds needs the folder of the files"),
    ({"name": "wds", "root": "x", "limit": 5}, "data: limit: a stream is read as a whole: leave it out"),
    ({"name": "wds", "root": "x", "splits": {"tset": "x"}}, "data.splits.tset: unknown key; did you mean test?"),
    ({"name": "digits", "num_classes": 10}, "data: num_classes: digits knows its own: leave it out"),
    ({"name": "hfds/"}, "data.name: 'hfds/' should be 'digits', "),
])
def test_keys_that_do_not_fit_the_data_are_named(write_recipe, section, said):
    _, problems = read([write_recipe("row", data=section)], [])
    assert len(problems) == 1 and said in problems[0]


def test_a_stream_refuses_repeats_and_a_missing_package_before_any_work(shards, write_recipe, monkeypatch):
    train = {"epochs": 1, "batch_size": 4, "lr": 0.1, "augment": {"repeats": 2}}
    _, problems = read([write_recipe("row", data={"name": "wds", "root": "x"}, train=train)], [])
    assert len(problems) == 1 and "train.augment.repeats: a stream gives each image once an epoch" in problems[0]
    for module, name in ((streams, "webdataset"), (data.hub, "datasets")):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
        section = Data(name="wds" if name == "webdataset" else "hfds", root=str(shards))
        with pytest.raises(InputError, match=f"needs a package that is not installed: pip install {name}"):
            data.num_classes(section)


@pytest.fixture
def recipe(tmp_path):
    """A recipe for the digits as a WebDataset of 4 and 2 shards, and its folder."""
    folder = tmp_path / "digits"
    folder.mkdir()
    bunch = load_digits()
    pairs = [(Image.fromarray((image * 15).astype(np.uint8)), int(target))
             for image, target in zip(bunch.images, bunch.target)]
    for index, (name, first, last) in enumerate([
            ("train-0", 0, 130), ("train-1", 130, 300), ("train-2", 300, 450), ("train-3", 450, 601),
            ("test-0", 601, 700), ("test-1", 700, 812)]):
        write_shard(folder / f"{name}.tar", pairs[first:last], first)
    splits = {name: {"name": name, "num_samples": sum(lengths), "shard_lengths": lengths,
                     "filenames": [f"{name}-{index}.tar" for index in range(len(lengths))]}
              for name, lengths in (("train", [130, 170, 150, 151]), ("test", [99, 112]))}
    (folder / "_info.json").write_text(json.dumps({"classes": list("abcdefghij"), "splits": splits}))
    row = tmp_path / "recipes" / "row.yaml"
    row.parent.mkdir()
    row.write_text(yaml.safe_dump({
        "model": MODEL, "data": {"name": "wds", "root": str(folder), "workers": 1}, "prune": {"ratio": 0.2},
        "train": {"epochs": 1, "batch_size": 32, "lr": 0.002, "precision": "fp32",
                  "augment": {"crop": "pad", "padding": 1, "mixup": 0.8}}}))
    return row, folder


def test_two_processes_make_a_row_of_a_stream_that_has_a_corrupt_image(recipe):
    row, folder = recipe
    damage(folder, 650)
    printed = command(*LAUNCH, "--num_processes", "2", RUN, row, cwd=folder.parent).stdout
    run = folder.parent / "runs" / "recipes" / "row"
    assert json.loads((run / "metrics.json").read_text())["test_images"] == 210
    assert json.loads((run / "model.json").read_text())["classes"] == list("abcdefghij")
    assert printed.count("left out: 1 of the 211 test images do not decode") == 1 and "Traceback" not in printed
    assert "shards, decoded as they are read by 1 workers" in printed
    assert len(pd.read_csv(run / "history.csv")) == 1


def test_two_processes_end_in_one_line_and_soon_where_a_shard_is_cut_short(recipe):
    row, folder = recipe
    cut_in_a_file(folder / "train-1.tar")
    done = command(*LAUNCH, "--num_processes", "2", RUN, row, cwd=folder.parent, check=False)
    last = [line for line in done.stdout.splitlines() if "train-1.tar" in line]
    assert done.returncode and last and "this shard cannot be read (unexpected end of data): mend it" in last[-1]
    assert not (folder.parent / "runs" / "recipes" / "row").exists()


def hub_features(**labels):
    datasets = pytest.importorskip("datasets")
    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(**labels)})


def write_parquet(folder, features, **splits):
    """Splits of numbered images, name=(first number, count), as datasets writes them."""
    import datasets
    folder.mkdir(exist_ok=True)
    image, label = features
    for name, (first, count) in splits.items():
        rows = {image: [numbered(number) for number in range(first, first + count)],
                label: [number % 3 for number in range(first, first + count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}-00000-of-00001.parquet")


def load_hub(folder, **keys):
    return data.load(Data.model_validate({"name": "hfds", "root": str(folder), "workers": 0} | keys), GREY)


def numbers_of(part):
    return sorted(numbers(torch.stack([part[position][0] for position in range(len(part))])))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("memory", [0, 10 ** 9])
def test_parquet_files_are_read_like_an_image_folder(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(data, "MEMORY_BYTES", memory)
    write_parquet(tmp_path / "pets", hub_features(names=["cat", "dog", "emu"]), train=(0, 90), test=(200, 30))
    assert data.num_classes(Data(name="hfds", root=str(tmp_path / "pets"))) == 3
    splits = load_hub(tmp_path / "pets")
    assert splits.classes == ["cat", "dog", "emu"] and len(splits.validation) == 9
    assert sorted(numbers_of(splits.train) + numbers_of(splits.validation)) == list(range(90))
    assert numbers_of(splits.test) == list(range(200, 230))
    images, targets = zip(*[splits.train[position] for position in range(81)])
    assert list(targets) == [number % 3 for number in numbers(torch.stack(images))]
    seen = [number for batch in augmented(splits).epoch(1) for number in numbers(batch.images)]
    assert len(seen) == len(set(seen)) == 80
    assert len(load_hub(tmp_path / "pets", limit=60).test) == 30
    first = data.fingerprint(splits.train)
    assert data.fingerprint(load_hub(tmp_path / "pets").train) == first
    write_parquet(tmp_path / "pets", hub_features(names=["cat", "dog", "emu"]), train=(3, 90))
    assert data.fingerprint(load_hub(tmp_path / "pets").train) != first


def test_a_folder_of_images_is_read_through_the_library_too(tmp_path):
    for number in range(60):
        path = tmp_path / "pets" / ("test" if number % 3 == 0 else "train") / f"c{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        numbered(number).save(path)
    splits = load_hub(tmp_path / "pets")
    assert splits.classes == ["c0", "c1"] and numbers_of(splits.test) == list(range(0, 60, 3))


def test_a_validation_split_is_used_and_a_test_without_labels_is_none(tmp_path):
    import datasets
    features = hub_features(names=["cat", "dog", "emu"])
    write_parquet(tmp_path / "pets", features, train=(0, 30), test=(200, 30), validation=(300, 12))
    splits = load_hub(tmp_path / "pets")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 12, 30)
    unlabelled = datasets.Dataset.from_dict({"image": [numbered(1)] * 5, "label": [-1] * 5}, features=features)
    unlabelled.to_parquet(tmp_path / "pets" / "test-00000-of-00001.parquet")
    splits = load_hub(tmp_path / "pets")
    assert (len(splits.train), len(splits.validation), numbers_of(splits.test)) == (27, 3, list(range(300, 312)))
    with pytest.raises(InputError, match="data.num_classes: 3: .* has images of class -1 in test"):
        load_hub(tmp_path / "pets", splits={"test": "test"})


def test_a_corrupt_image_of_the_library_is_left_out_and_not_another_shown_twice(tmp_path, capsys):
    import datasets
    features = hub_features(names=["cat", "dog", "emu"])
    write_parquet(tmp_path / "pets", features, train=(0, 30))
    pictures = []
    for number in range(200, 320):
        png = io.BytesIO()
        numbered(number).save(png, "png")
        pictures.append({"bytes": b"none" if number == 207 else png.getvalue(), "path": None})
    rows = {"image": pictures, "label": [number % 3 for number in range(200, 320)]}
    test = datasets.Dataset.from_dict(rows, features=features)
    test.to_parquet(tmp_path / "pets" / "test-00000-of-00001.parquet")
    splits = load_hub(tmp_path / "pets")
    assert numbers_of(splits.test) == [number for number in range(200, 320) if number != 207]
    assert "left out: 1 of the 120 test images do not decode: test row 7 (" in capsys.readouterr().out


def test_other_columns_are_found_by_their_kind_and_plain_numbers_need_num_classes(tmp_path):
    import datasets
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(num_classes=3)})
    write_parquet(tmp_path / "pets", features, train=(0, 30), test=(200, 30))
    assert numbers_of(load_hub(tmp_path / "pets").test) == list(range(200, 230))
    for kind in ("int64", "string"):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
        write_parquet(tmp_path / kind, features, train=(0, 30), test=(200, 30))
        with pytest.raises(InputError, match="data.num_classes: is missing, and .* does not tell: give it"):
            load_hub(tmp_path / kind)
    assert load_hub(tmp_path / "int64", num_classes=3).classes == ["0", "1", "2"]
    with pytest.raises(InputError, match="data.num_classes: 2: .* has images of class 2 in train"):
        load_hub(tmp_path / "int64", num_classes=2)
    with pytest.raises(InputError, match="column label of train holds no class numbers: cast it to"):
        load_hub(tmp_path / "string", num_classes=3)


@pytest.mark.parametrize("keys, said", [
    ({"root": "nowhere"}, "data.root: nowhere: there is no such folder"),
    ({"name": "hfds/nobody/nothing", "root": None}, "data.name: hfds/nobody/nothing: nobody/nothing cannot be loaded"),
    ({"splits": {"test": "tset"}}, "data.splits: .* has no split tset, only test, train|only train, test"),
    ({"num_classes": 5}, "data.num_classes: 5: .* has 3: leave it out"),
])
def test_what_cannot_be_loaded_by_the_library_is_one_line(tmp_path, keys, said):
    write_parquet(tmp_path / "pets", hub_features(num_classes=3), train=(0, 30), test=(200, 30))
    with pytest.raises(InputError, match=said) as error:
        load_hub(tmp_path / "pets", **keys)
    assert len(error.value.problems) == 1 and "\n" not in error.value.problems[0]


def test_a_recipe_of_a_stream_is_written_and_read_again():
    recipe = Recipe.model_validate({"model": {"name": "x"}, "data": {"name": "hfds/a/b", "splits": {"test": "val"}}})
    assert Recipe.model_validate(recipe.model_dump(mode="json", exclude_none=True)) == recipe
