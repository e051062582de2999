import json

import pytest
import yaml

from vitopt import energy, model as models, runs
from vitopt.recipe import InputError

TRAIN = {"epochs": 1, "batch_size": 32, "lr": 0.001}
MEASURED = {"device": "cpu", "device_name": "a machine", "accuracy": 50.0}


@pytest.fixture
def plan(tmp_path):
    """Plans recipes with run folders under tmp_path/out."""
    return lambda *words: runs.plan([*words, f"output={tmp_path / 'out'}"])


@pytest.fixture
def finish(tiny):
    """Writes the run folder of a row as a finished run would, with a small random model."""
    def write(row, **kwargs):
        with runs.writing(row.folder, True):
            folder = runs.unfinished(row.folder)
            models.save(tiny(**kwargs), folder)
            runs.write(folder, row, MEASURED | {"inference": energy.NOTHING}, [], [], energy.NOTHING, 1)
    return write


def test_rows_come_in_the_order_in_which_they_need_one_another(write_recipe, plan, tmp_path):
    rows = plan(write_recipe("a", start="b", distill={"teacher": "c"}, train=TRAIN), write_recipe("b", start="c"),
                write_recipe("c"))
    assert [row.name for row in rows] == ["c", "b", "a"]
    assert rows[2].folder == tmp_path / "out" / "recipes" / "a"
    assert (rows[2].start, rows[2].teachers) == (rows[1].folder, [rows[0].folder])


def test_nothing_is_written_by_planning(write_recipe, plan, tmp_path):
    plan(write_recipe("a"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sections, expected", [
    ({"start": "baseline"}, "start: baseline: there is no finished run in .*: run .*baseline.yaml first"),
    ({"start": "basline"}, "start: basline: there is no finished run in .*: check the name"),
    ({"distill": {"teacher": "baseline"}, "train": TRAIN}, "distill.teacher: baseline: .*baseline.yaml first"),
    ({"start": "/no/such/run"}, "start: run: there is no finished run in /no/such/run"),
])
def test_a_missing_forerunner_is_named_with_the_recipe_to_run_first(write_recipe, plan, sections, expected):
    write_recipe("baseline")
    with pytest.raises(InputError, match=expected):
        plan(write_recipe("row", **sections))


@pytest.mark.parametrize("sections, expected", [
    ({"start": "row"}, "start and teacher go in a circle: row → row"),
    ({"model": {"name": "resnet18"}, "prune": {"ratio": {"heads": 0.3}}}, "prune.axes: heads: resnet18 has no such"),
    ({"prune": {"ratio": 0.3, "axes": ["hidden", "headz"]}}, "prune.axes.1: 'headz' should be"),
    ({"prune": {"target": {"macs": -1}}}, "prune.target.macs: -1"),
    ({"train": TRAIN | {"tracker": "tensorbord"}}, "train.tracker: tensorbord is not installed or unknown"),
    ({"train": TRAIN | {"optimizer": "adamv"}}, "train.optimizer: adamv: timm has no such optimizer"),
    ({"train": TRAIN | {"augment": {"auto_augment": "trivial"}}}, "train.augment.auto_augment: trivial"),
    ({"data": {"name": "folder"}}, "data.root: is missing"),
    ({"data": {"name": "folder", "root": "/no/such"}}, "data.root: /no/such: has no folder train"),
    ({"model": {"name": "vit_bse_patch16_224"}}, "near names: vit_base_patch16_224"),
])
def test_a_row_that_cannot_work_is_refused_before_any_work(write_recipe, plan, sections, expected):
    with pytest.raises(InputError, match=expected):
        plan(write_recipe("row", **sections))


def test_a_teacher_of_other_classes_is_refused_and_one_of_larger_images_is_not(write_recipe, plan, finish, tiny):
    finish(plan(write_recipe("ten"))[0])
    finish(plan(write_recipe("three"))[0], num_classes=3)
    finish(plan(write_recipe("large"))[0], img_size=32)
    with pytest.raises(InputError, match="distill.teacher.1: .*three has 3 classes and data digits has 10"):
        plan(write_recipe("row", distill={"teacher": ["ten", "three"]}, train=TRAIN))
    assert plan(write_recipe("row", distill={"teacher": ["ten", "large"]}, train=TRAIN))


def test_every_problem_of_every_recipe_is_listed_at_once(write_recipe, plan):
    with pytest.raises(InputError) as error:
        plan(write_recipe("a", prune={"ratio": 1.5}), write_recipe("b", start="c"), write_recipe("d", start="a"),
             write_recipe("e", model={"name": "vit_bse_patch16_224"}))
    problems = error.value.problems
    assert [problem.split(":")[0].split("/")[-1] for problem in problems] == ["a.yaml", "b.yaml", "e.yaml"], problems


def test_two_recipes_of_one_run_folder_are_refused(write_recipe, plan, tmp_path):
    first = write_recipe("a")
    other = tmp_path / "other" / "recipes"
    other.mkdir(parents=True)
    (other / "a.yaml").write_text(open(first).read())
    with pytest.raises(InputError, match="writes the same run folder"):
        plan(first, str(other / "a.yaml"))


def test_no_recipe_is_an_error():
    with pytest.raises(InputError, match="no recipe is given"):
        runs.plan([])


def test_a_finished_run_is_kept_while_its_recipe_says_the_same(write_recipe, plan, finish):
    row, = plan(write_recipe("a", train=TRAIN))
    finish(row)
    assert runs.is_finished(row.folder) and runs.differences(row) == []
    runs.refuse_changed([row])


def test_a_changed_recipe_is_refused_with_the_difference(write_recipe, plan, finish):
    row, = plan(write_recipe("a", train=TRAIN))
    finish(row)
    row, = plan(write_recipe("a", train=TRAIN | {"epochs": 9}, prune={"ratio": 0.2}))
    with pytest.raises(InputError) as error:
        runs.refuse_changed([row])
    line, = error.value.problems
    assert "train.epochs: 1 in the finished run, 9 in the recipe" in line and "--force" in line
    assert "prune.ratio: absent in the finished run, 0.2 in the recipe" in line


def test_a_row_whose_forerunner_was_made_again_is_refused(write_recipe, plan, finish):
    base, row = plan(write_recipe("base"), write_recipe("row", start="base"))
    finish(base)
    finish(row)
    runs.refuse_changed([row])
    finish(base, depth=1)
    with pytest.raises(InputError, match="start: its weights are no longer those that this run was made with"):
        runs.refuse_changed([row])


@pytest.mark.parametrize("content", ["", "[", "seed: 0", "provenance"])
def test_a_finished_run_with_a_damaged_recipe_is_not_kept_silently(write_recipe, plan, finish, content):
    row, = plan(write_recipe("a"))
    finish(row)
    (row.folder / "recipe.yaml").write_text(content)
    with pytest.raises(InputError, match="recipe.yaml: .* where it should hold the recipe"):
        runs.refuse_changed([row])


def test_a_run_folder_says_what_made_it(write_recipe, plan, finish):
    row, = plan(write_recipe("a", train=TRAIN))
    finish(row)
    content = yaml.safe_load((row.folder / "recipe.yaml").read_text())
    assert content["train"]["weight_decay"] == 0.05 and content["seed"] == 0  # defaults are written out
    provenance = content["provenance"]
    assert provenance["versions"].keys() == set(runs.LIBRARIES) and provenance["device"] == "cpu"
    assert {file.name for file in row.folder.iterdir()} == {
        "model.safetensors", "model.json", "recipe.yaml", "metrics.json", "history.csv", "energy.csv"}
    assert runs.plan([str(row.folder / "recipe.yaml")])  # it can be run again as it is


def test_a_run_that_fails_leaves_the_former_one_as_it_was(write_recipe, plan, finish):
    row, = plan(write_recipe("a"))
    finish(row)
    before = {file.name: file.read_bytes() for file in row.folder.iterdir()}
    with pytest.raises(KeyboardInterrupt), runs.writing(row.folder, True):
        (runs.unfinished(row.folder) / "metrics.json").write_text("{}")
        raise KeyboardInterrupt
    assert not runs.unfinished(row.folder).exists()
    assert {file.name: file.read_bytes() for file in row.folder.iterdir()} == before


def test_a_kill_between_two_renames_loses_no_run(write_recipe, plan, finish):
    row, = plan(write_recipe("a"))
    finish(row)
    row.folder.rename(row.folder.parent / ".a.replaced")  # where a kill in the midst of `writing` leaves it
    assert runs.is_finished(row.folder) and json.loads((row.folder / "metrics.json").read_text())["accuracy"] == 50.0


def test_weights_that_cannot_be_written_are_an_error_of_the_machine_that_names_the_file(tiny, tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match="model.safetensors"):
        models.save(tiny(), tmp_path)


def test_what_a_killed_run_left_is_thrown_away(write_recipe, plan, finish):
    row, = plan(write_recipe("a"))
    runs.unfinished(row.folder).mkdir(parents=True)
    (runs.unfinished(row.folder) / "rubbish").write_text("x")
    assert not runs.is_finished(row.folder)
    finish(row)
    assert not (row.folder / "rubbish").exists() and not runs.unfinished(row.folder).exists()


def test_a_run_of_a_version_that_knew_fewer_keys_is_kept(write_recipe, plan, finish):
    row, = plan(write_recipe("a", prune={"ratio": 0.3}))
    finish(row)
    resolved = yaml.safe_load((row.folder / "recipe.yaml").read_text())
    del resolved["prune"]["steps"], resolved["prune"]["repair"]
    (row.folder / "recipe.yaml").write_text(yaml.safe_dump(resolved))
    assert runs.differences(row) == []
    resolved["prune"]["repair"] = True
    (row.folder / "recipe.yaml").write_text(yaml.safe_dump(resolved))
    assert runs.differences(row) == ["prune.repair: True in the finished run, False in the recipe"]
