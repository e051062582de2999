import json

import pandas as pd
import pytest
import torch
import yaml

from vitopt import __main__ as command, model as models
from vitopt.recipe import Recipe


@pytest.fixture
def run(tiny, tmp_path):
    """A run folder of digits with a model that was trained on nothing."""
    folder = tmp_path / "run"
    model = tiny()
    with torch.no_grad():  # the second block's MLP does nothing: cutting it costs nothing
        model.blocks[1].mlp.fc2.weight.zero_()
    models.save(model, folder)
    recipe = {"model": {"name": "vit_base_patch16_224"}, "data": {"name": "digits"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def sensitivity(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["vitopt", "sensitivity", *map(str, words)])
    command.main()


def test_each_layer_is_cut_by_itself_and_the_ratios_it_bears_are_a_recipe(run, monkeypatch, capsys):
    sensitivity(monkeypatch, run, "--ratios", 0.25, 0.5, "--importance", "l2", "--max-loss", 0)
    table = pd.read_csv(run / "sensitivity.csv", index_col="axis")
    assert list(table.index) == ["blocks.0.attn.head_dim", "blocks.1.attn.head_dim",
                                 "blocks.0.mlp.hidden", "blocks.1.mlp.hidden"]
    printed = capsys.readouterr().out
    whole = float(printed.split("accuracy ")[1].split()[0])
    assert table.loc["blocks.1.mlp.hidden"].tolist() == pytest.approx([whole, whole], abs=0.01)
    assert table.loc["blocks.0.mlp.hidden"].tolist() != [whole, whole]
    proposed = yaml.safe_load(printed[printed.index("prune:"):])
    assert proposed["prune"]["ratio"]["blocks.1.mlp.hidden"] == 0.5
    Recipe.model_validate({"start": "run", "data": {"name": "digits"}} | proposed)
    assert (run / "sensitivity.png").stat().st_size > 10_000
    assert json.loads((run / "model.json").read_text())["widths"]["blocks.1.mlp"] == {"hidden_features": 64}


@pytest.mark.parametrize("words, said", [
    (["--ratios", 1.5], "prune.ratio: 1.5 is no share"), (["--importance", "l3"], "prune.importance: 'l3'"),
])
def test_a_mistake_is_one_line(run, monkeypatch, capsys, words, said):
    with pytest.raises(SystemExit) as end:
        sensitivity(monkeypatch, run, *words)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_folder_without_a_run_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        sensitivity(monkeypatch, tmp_path)
    assert f"{tmp_path}: holds no model" in capsys.readouterr().err
