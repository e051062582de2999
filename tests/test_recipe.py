import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from vitopt.errors import InputError, Stopped, errors_as_lines
from vitopt.recipe import Recipe, Train, batch_problems, read

TRAIN = {"epochs": 1, "batch_size": 32, "lr": 0.001}
SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*/*.yaml"))


def problems_of(write_recipe, *overrides, **sections):
    _, problems = read([write_recipe("row", **sections)], list(overrides))
    return problems


@pytest.mark.parametrize("sections, expected", [
    ({"prune": {"ratio": 1.5}}, ["prune.ratio: 1.5 is no share between 0 and 1", "such as 0.4"]),
    ({"prune": {"ratio": 0}}, ["prune.ratio: 0 is no share"]),
    ({"prune": {"ratio": 0.4, "importanse": "l1"}}, ["prune.importanse: unknown key; did you mean importance?"]),
    ({"prune": {"ratio": 0.4, "importance": "l3"}}, ["prune.importance: 'l3'", "'l1', 'l2', 'taylor'"]),
    ({"trian": TRAIN}, ["trian: unknown key; did you mean train?"]),
    ({"train": TRAIN | {"lr": "3e-4"}}, ["train.lr: 3e-4 is read as text by YAML: write 3.0e-4"]),
    ({"train": TRAIN | {"epochs": "3"}}, ["train.epochs: 3 is read as text by YAML: write 3"]),
    ({"train": TRAIN | {"epochs": 2.5}}, ["train.epochs: 2.5", "integer"]),
    ({"train": TRAIN | {"lr": float("nan")}}, ["train.lr: nan"]),
    ({"train": {"epochs": 1, "lr": 0.1}}, ["train.batch_size: is missing: images a step"]),
    ({"train": TRAIN | {"augment": {"hflp": 0.5}}}, ["train.augment.hflp: unknown key; did you mean hflip?"]),
    ({"data": {"name": "cifra10"}}, ["data.name: 'cifra10'", "'cifar10'"]),
    ({"distill": {"teacher": "b", "temperature": 4.0}}, ["distill.temperature: unknown key; it belongs in logits"]),
    ({"distill": {"teacher": 3}}, ["distill.teacher: 3 is no teacher: give a row"]),
    ({"distill": {"teacher": []}}, ["distill.teacher: names none: give a row"]),
    ({"distill": {"teacher": {"name": "vit_tiny_patch16_224"}}}, ["knows nothing yet: give pretrained: true"]),
    ({"distill": {"teacher": {"run": "a", "depth": 3}}}, ["distill.teacher.0: a run takes no depth"]),
    ({"distill": {"teacher": "b", "logits": None}}, ["distill: teaches nothing: give one of logits"]),
    ({"distill": {"teacher": "b", "store": True, "features": {}}}, ["store keeps outputs alone, and features needs"]),
    ({"distill": {"teacher": "b", "attention": {"layers": [3]}}}, ["distill.attention.layers: [3] names no layers"]),
    ({"distill": {"teacher": "baseline"}}, ["distill needs a train section"]),
    ({"model": None}, ["exactly one of start", "model"]),
    ({"model": {"name": "vit", "pretrained": True, "checkpoint": "a.pth"}}, ["model: pretrained and checkpoint"]),
    ({"seed": -1}, ["seed: -1 is no whole number from 0 on: write 0, or [0, 1, 2] for several seeds"]),
    ({"seed": "0,1"}, ["seed: '0,1' is no whole number", "write 0, or [0, 1, 2]"]),
    ({"seed": True}, ["seed: True is no whole number"]),
    ({"seed": []}, ["seed: [] names no seed: write 0, or [0, 1, 2]"]),
    ({"seed": [0, 1.5]}, ["seed: 1.5 is no whole number"]),
    ({"seed": [2, 0, 2]}, ["seed: 2 is there twice: keep one"]),
])
def test_a_mistake_is_named_with_file_key_value_and_cure(write_recipe, sections, expected):
    problems = problems_of(write_recipe, **sections)
    assert len(problems) == 1, problems
    assert problems[0].startswith(write_recipe("row")) and "\n" not in problems[0]
    for part in expected:
        assert part in problems[0]


def test_all_mistakes_of_all_files_are_listed_at_once(write_recipe, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: [1\n")
    (tmp_path / "empty.yaml").write_text("")
    paths = [write_recipe("a", prune={"ratio": 2.0}, sed=1), write_recipe("b", data={"name": "x"}),
             str(tmp_path / "broken.yaml"), str(tmp_path / "empty.yaml"), str(tmp_path / "absent.yaml")]
    recipes, problems = read(paths, [])
    assert not recipes
    for path, count in zip(paths, (2, 1, 1, 1, 1)):
        assert sum(problem.startswith(path) for problem in problems) == count, problems


def test_a_key_written_twice_is_an_error_and_not_overwritten(tmp_path):
    path = tmp_path / "row.yaml"
    path.write_text("seed: 1\ndata: {name: digits}\nmodel: {name: vit_tiny_patch16_224}\nseed: 2\n")
    _, problems = read([str(path)], [])
    assert problems == [f"{path}: line 4: not YAML, the key seed is there twice: mend this line"]


def test_an_override_reaches_the_recipes_that_have_the_section_and_creates_none(write_recipe):
    paths = [write_recipe("a", train=TRAIN), write_recipe("b")]
    recipes, problems = read(paths, ["train.epochs=7", "train.augment.hflip=0.5", "seed=3", "data.limit=20"])
    assert not problems
    first, second = recipes.values()
    assert (first.train.epochs, first.train.augment.hflip, first.seed, first.data.limit) == (7, 0.5, 3, 20)
    assert (second.train, second.seed, second.data.limit) == (None, 3, 20)


@pytest.mark.parametrize("override, expected", [
    ("trian.epochs=3", "no recipe given has the section trian"),
    ("train.epochs=[", "is not YAML"),
    ("train.epoch=3", "train.epoch: unknown key; did you mean epochs?"),
    ("train.lr=3e-4", "write 3.0e-4"),
    ("train.lr=high", "train.lr: 'high'"),
])
def test_a_wrong_override_is_an_error(write_recipe, override, expected):
    problems = problems_of(write_recipe, override, train=TRAIN)
    assert len(problems) == 1 and expected in problems[0], problems


@pytest.mark.parametrize("sections, expected", [
    ({"batch_size": 33}, "33 does not divide among 2 processes: take a multiple of 2"),
    ({"batch_size": 34, "augment": {"mixup": 1.0}}, "pair the 17 images of each process: take a multiple of 4"),
])
def test_a_batch_that_does_not_divide_among_the_processes_is_refused(sections, expected):
    problem, = batch_problems(Train(**TRAIN | sections), 2)
    assert expected in problem
    assert batch_problems(Train(**TRAIN | sections), 1) == []


def test_the_schema_accepts_every_shipped_recipe_and_refuses_a_typo():
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert len(SHIPPED) >= 12
    for path in SHIPPED:
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": {"name": "x"}, "data": {"name": "digits"}, "trian": {}}, schema)


@pytest.mark.parametrize("seed, accepted", [
    (3, True), ([0], True), ([2, 0, 1], True), ([], False), ([1, 1], False), ([-1], False), ("0", False)])
def test_the_schema_and_the_reader_agree_on_what_seeds_are(write_recipe, seed, accepted):
    recipe = {"model": {"name": "x"}, "data": {"name": "digits"}, "seed": seed}
    assert jsonschema.Draft202012Validator(Recipe.model_json_schema()).is_valid(recipe) == accepted
    assert (problems_of(write_recipe, seed=seed) == []) == accepted


@pytest.mark.parametrize("section, accepted", [
    ({"name": "hfds/org/pets"}, True), ({"name": "hfds", "root": "pets"}, True),
    ({"name": "wds", "root": "pets", "splits": {"test": "val"}, "num_classes": 37}, True),
    ({"name": "hfds/"}, False), ({"name": "pets"}, False), ({"name": 3}, False),
    ({"name": "wds", "root": "pets", "splits": {"tset": "val"}}, False)])
def test_the_schema_and_the_reader_agree_on_what_data_are(write_recipe, section, accepted):
    recipe = {"model": {"name": "x"}, "data": section}
    assert jsonschema.Draft202012Validator(Recipe.model_json_schema()).is_valid(recipe) == accepted
    assert (problems_of(write_recipe, data=section) == []) == accepted


def test_seeds_can_be_given_on_the_command_line(write_recipe):
    recipes, problems = read([write_recipe("a", seed=7)], ["seed=[0, 1]"])
    assert not problems and next(iter(recipes.values())).seed == [0, 1]


@pytest.mark.parametrize("error, code, line", [
    (InputError("a: 1: wrong: mend", "b: 2: wrong: mend"), 2, "error: a: 1: wrong: mend\nerror: b: 2: wrong: mend\n"),
    (OSError(28, "No space left on device", "/data/x"), 1, "error: /data/x: No space left on device"),
    (KeyboardInterrupt(), 75, "stopped: finished rows are kept; the same command goes on"),
    (Stopped("stopped after step 3"), 75, "stopped after step 3"),
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), 1,
     "error: a process that decodes images is gone (DataLoader worker (pid 3) is killed by signal: Killed.)"),
    (RuntimeError("[/a/pair.cc:5] Connection closed by peer [127.0.0.1]:1. This is"), 1,
     "error: another process of this run is gone (Connection closed by peer [127.0.0.1]:1): what it has printed"),
])
def test_a_command_ends_in_one_line_a_problem_and_its_exit_code(capsys, error, code, line):
    with pytest.raises(SystemExit) as end, errors_as_lines():
        raise error
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(line)


def test_an_unforeseen_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), errors_as_lines():
        1 / 0
