import json

import pytest
import torch
import yaml
from accelerate import Accelerator

from vitopt import energy, model as models, runs
from vitopt.errors import InputError

TRAIN = {"epochs": 1, "batch_size": 32, "lr": 0.001}
MEASURED = {"device": "cpu", "device_name": "a machine", "accuracy": 50.0}


def changes(row):
    return runs.differences(row, row.folder / "recipe.yaml")


@pytest.fixture
def plan(tmp_path):
    """Plans recipes with run folders under tmp_path/out."""
    return lambda *words: runs.plan([*words, f"output={tmp_path / 'out'}"])


@pytest.fixture
def finish(tiny):
    """Writes the run folder of a row as a finished run would, with a small random model."""
    def write(row, **kwargs):
        with runs.writing(row, Accelerator(cpu=True)):
            folder = runs.unfinished(row.folder)
            models.save(tiny(**kwargs), folder)
            runs.write(folder, row, MEASURED | {"inference": energy.NOTHING}, [], [], [], 1)
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


def test_a_timm_model_teaches_what_its_weights_know(write_recipe, plan, tiny, tmp_path):
    weights = tmp_path / "three.pth"
    torch.save(tiny(num_classes=3).state_dict(), weights)
    teacher = {"name": "vit_base_patch16_224", "checkpoint": str(weights), "img_size": 16, "patch_size": 8,
               "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    with pytest.raises(InputError, match="distill.teacher: vit_base_patch16_224 has 3 classes and data digits has 10"):
        plan(write_recipe("row", distill={"teacher": teacher}, train=TRAIN))
    row = plan(write_recipe("row", distill={"teacher": teacher, "logits": None, "features": {}}, train=TRAIN))[0]
    assert models.num_classes(runs.teachers(row)[0]) == 3
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="distill.teacher.checkpoint: .*three.pth: the weights .* cannot be loaded"):
        plan(write_recipe("row", distill={"teacher": teacher}, train=TRAIN))


@pytest.mark.parametrize("distill, expected", [
    ({"features": {"layers": ["blocks.9"]}}, "distill.features.layers: blocks.9: the student has no such layer"),
    ({"attention": {"layers": {"blocks.0.attn": "head"}}}, "distill.attention.layers: head: the teacher has no such"),
])
def test_layers_that_are_not_there_are_named_before_any_work(write_recipe, plan, distill, expected):
    with pytest.raises(InputError, match=expected):
        plan(write_recipe("first"), write_recipe("row", distill={"teacher": "first"} | distill, train=TRAIN))


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
    assert runs.is_finished(row.folder) and changes(row) == []
    runs.refuse_changed([row])


def test_a_changed_recipe_is_refused_with_the_difference(write_recipe, plan, finish):
    row, = plan(write_recipe("a", train=TRAIN))
    finish(row)
    row, = plan(write_recipe("a", train=TRAIN | {"epochs": 9}, prune={"ratio": 0.2}))
    with pytest.raises(InputError) as error:
        runs.refuse_changed([row])
    line, = error.value.problems
    assert "train.epochs: 1 then, 9 in the recipe" in line and "--force" in line
    assert "prune.ratio: absent then, 0.2 in the recipe" in line


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
    with pytest.raises(KeyboardInterrupt), runs.writing(row, Accelerator(cpu=True)):
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
    assert changes(row) == []
    resolved["prune"]["repair"] = True
    (row.folder / "recipe.yaml").write_text(yaml.safe_dump(resolved))
    assert changes(row) == ["prune.repair: True then, False in the recipe"]


def test_a_list_of_seeds_makes_a_run_of_each_in_the_order_listed(write_recipe, plan, tmp_path):
    rows = plan(write_recipe("a", seed=[2, 0]))
    assert [(row.name, row.recipe.seed) for row in rows] == [("a/seed_2", 2), ("a/seed_0", 0)]
    assert {row.home for row in rows} == {tmp_path / "out" / "recipes" / "a"}
    assert [row.folder for row in rows] == [rows[0].home / "seed_2", rows[0].home / "seed_0"]
    row, = plan(write_recipe("a", seed=2))
    assert (row.name, row.folder, row.recipe.seed) == ("a", row.home, 2)


def test_each_seed_needs_the_equal_seed_of_its_forerunners_and_comes_after_it(write_recipe, plan):
    rows = plan(write_recipe("b", start="a", distill={"teacher": ["one", "a"]}, train=TRAIN, seed=[0, 1]),
                write_recipe("a", seed=[0, 1]), write_recipe("one", seed=5))
    names = [row.name for row in rows]
    for row in rows[-2:]:
        assert row.name == f"b/seed_{row.recipe.seed}"
        equal = row.home.parent / "a" / f"seed_{row.recipe.seed}"
        assert (row.start, row.teachers) == (equal, [row.home.parent / "one", equal])
        assert names.index(f"a/seed_{row.recipe.seed}") < names.index(row.name)


def test_a_forerunner_that_is_not_given_is_found_on_disk_by_its_seed(write_recipe, plan, finish, tmp_path):
    for row in plan(write_recipe("a", seed=[0, 1])):
        finish(row)
    home = tmp_path / "out" / "recipes" / "a"
    for start in ("a", str(home)):
        assert [row.start.name for row in plan(write_recipe("b", start=start, seed=[1, 0]))] == ["seed_1", "seed_0"]
        row, = plan(write_recipe("b", start=start, seed=1))
        assert row.start == home / "seed_1"
    row, = plan(write_recipe("b", start=str(home / "seed_0"), seed=7))
    assert row.start == home / "seed_0"
    assert {row.name for row in plan(write_recipe("a", seed=[2]), write_recipe("b", start="a", seed=[0, 2]))} == {
        "a/seed_2", "b/seed_0", "b/seed_2"}  # one seed finished, one given
    (home / "seed_0").rename(home / ".seed_0.replaced")  # where a kill between two renames leaves it
    assert plan(write_recipe("b", start="a", seed=0))[0].start == home / "seed_0"


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("seed", [7, [0, 7]])
def test_a_seed_that_the_forerunner_lacks_is_named_with_those_it_has(write_recipe, plan, finish, given, seed):
    base = write_recipe("a", seed=[0, 1])
    for row in [] if given else plan(base):
        finish(row)
    with pytest.raises(InputError) as error:
        plan(*[base] * given, write_recipe("b", start="a", distill={"teacher": "a"}, train=TRAIN, seed=seed))
    assert len(error.value.problems) == 2
    for problem, key in zip(error.value.problems, ("start", "distill.teacher")):
        assert f"b.yaml: {key}: a has no seed_7, only seed 0, 1: " in problem
        assert problem.endswith("out/recipes/a/seed_0")


def test_what_is_wrong_with_every_seed_is_said_once(write_recipe, plan, finish):
    finish(plan(write_recipe("c", seed=[0]))[0])
    with pytest.raises(InputError) as error:
        plan(write_recipe("a", seed=[0, 1, 2], train=TRAIN | {"optimizer": "adamv"}), write_recipe("c", seed=[-1]),
             write_recipe("b", start="c", seed=[0, 1]))
    assert [problem.split(": ")[1] for problem in error.value.problems] == ["seed", "train.optimizer"]
    with pytest.raises(InputError, match="in a circle: a/seed_3 → a/seed_3"):
        plan(write_recipe("a", start="a", seed=[3]))


def test_finished_seeds_are_kept_when_more_are_added_and_refused_when_the_recipe_changes(write_recipe, plan, finish):
    for row in plan(write_recipe("a", seed=[0, 1])):
        finish(row)
    rows = plan(write_recipe("a", seed=[0, 1, 2]))
    runs.refuse_changed(rows)
    assert [runs.is_finished(row.folder) for row in rows] == [True, True, False]
    content = yaml.safe_load((rows[1].folder / "recipe.yaml").read_text())
    assert content["seed"] == 1 and content["provenance"]["seeds"] == [0, 1]
    with pytest.raises(InputError) as error:
        runs.refuse_changed(plan(write_recipe("a", seed=[0, 1, 2], train=TRAIN)))
    assert ["seed_0 is finished and differs" in problem for problem in error.value.problems] == [True, False]


def test_a_row_of_one_seed_and_of_several_are_never_mixed(write_recipe, plan, finish):
    single, = plan(write_recipe("a", seed=0))
    finish(single)
    (single.folder / "logs").mkdir()
    several = plan(write_recipe("a", seed=[0, 1]))
    with pytest.raises(InputError, match="a is finished of a single seed and the recipe lists .*--force") as error:
        runs.refuse_changed(several)
    assert len(error.value.problems) == 1
    with pytest.raises(KeyboardInterrupt), runs.writing(several[0], Accelerator(cpu=True)):
        raise KeyboardInterrupt
    assert runs.is_finished(single.folder) and changes(single) == []  # a failure costs nothing
    finish(several[0])
    assert [path.name for path in single.folder.iterdir()] == ["seed_0"]
    finish(several[1])
    runs.refuse_changed(several)
    with pytest.raises(InputError, match="finished of several seeds and the recipe names a single one: .*--force"):
        runs.refuse_changed([single])
    finish(single)
    assert runs.is_finished(single.folder) and not list(single.folder.glob("*seed*"))
    runs.refuse_changed([single])


def test_a_seed_that_is_written_removes_nothing_from_a_folder_that_is_no_run(write_recipe, plan, finish):
    row, = plan(write_recipe("a", seed=[0]))
    row.home.mkdir(parents=True)
    (row.home / "notes.txt").write_text("mine")
    finish(row)
    assert (row.home / "notes.txt").read_text() == "mine"


def test_which_channels_of_its_teacher_a_row_kept_is_followed_seed_by_seed(write_recipe, plan, finish):
    recipes = [write_recipe("a", seed=[0, 1]), write_recipe("b", start="a", seed=[0, 1]),
               write_recipe("c", start="b", distill={"teacher": "a"}, train=TRAIN, seed=[0, 1])]
    rows = plan(*recipes)
    for row in rows:
        finish(row)
        if row.home.name == "b":
            axes = {"hidden": {"before": 6, "kept": [[row.recipe.seed, 5]]}}
            (row.folder / "pruned.json").write_text(json.dumps([{"axes": axes}]))
    for row in rows[-2:]:
        assert torch.equal(runs.kept_of_teacher(row, [])["hidden"], torch.tensor([[row.recipe.seed, 5]]))


@pytest.mark.parametrize("content", [
    "[", "3", "[3]", '[{"axes": 3}]', '[{"axes": {"hidden": {"before": 4}}}, 3]', "[" * 10 ** 5, *(
        json.dumps([{"axes": {"hidden": {"before": 6, "kept": kept}}}])
        for kept in ([[6]], [[-1]], [[0, 10 ** 12]], [[0.5]], [[]], [], [[0, 1], [0]], [[[0]]], ["a"], [0], {"0": 0}))
], ids=str)
def test_cuts_that_name_no_channels_are_not_followed(write_recipe, plan, finish, content):
    rows = plan(write_recipe("a"), write_recipe("b", start="a"),
                write_recipe("c", start="b", distill={"teacher": "a"}, train=TRAIN))
    for row in rows:
        finish(row)
    (rows[1].folder / "pruned.json").write_text(content[:10 ** 6])
    assert runs.kept_of_teacher(rows[2], []) == {}
    own = [{"axes": {"hidden": {"kept": [[0, 5]]}}}]
    (rows[1].folder / "pruned.json").write_text('[{"axes": {"hidden": {"before": 6, "kept": [[0, 1, 2]]}}}]')
    assert runs.kept_of_teacher(rows[2], own) == {}  # of three channels none is the sixth


BOMB = "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" if n else "k0: &a0 [1]\n" for n in range(30))


@pytest.mark.parametrize("content", [
    "start: a\n", "start: [a]\n", "start: c\n", "start: 3\n", "provenance: 3\n", "[provenance]\n", "3\n", "",
    "{" * 10 ** 4, BOMB, BOMB + "provenance: {}\n", "&a [*a]\n", "provenance: &a {a: *a}\n", "1: 2\nprovenance: {}\n",
    "provenance: {}\ndata: !!binary a\n", "provenance: !!python/object/apply:os.system [true]\n",
], ids=lambda content: content[:20])
def test_a_recipe_of_a_finished_run_that_is_none_differs_in_a_line_and_is_not_followed(
        write_recipe, plan, finish, content):
    rows = plan(write_recipe("a"), write_recipe("b", start="a"),
                write_recipe("c", start="b", distill={"teacher": "a"}, train=TRAIN))
    for row in rows:
        finish(row)
    (rows[1].folder / "recipe.yaml").write_text(content)
    if content != "start: a\n":
        assert runs.kept_of_teacher(rows[2], []) == {}
    differences = changes(rows[1])
    assert differences and all("\n" not in line and len(line) < 500 for line in differences), differences
