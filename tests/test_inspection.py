import subprocess
import sys

import pytest

from vitopt import metrics, model as models
from vitopt.errors import InputError
from vitopt.inspection import inspect
from vitopt.recipe import Model, Prune, sections

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 10}


def test_parts_blocks_axes_and_what_a_ratio_leaves_are_printed():
    text = inspect(Model(name="vit_tiny_patch16_224", **TINY), Prune(ratio=0.5))
    model = models.build(Model(name="vit_tiny_patch16_224", **TINY), 10)
    assert f"{metrics.count_params(model):,} parameters, {metrics.count_macs(model):,} MACs" in text
    for line in ("    blocks.0.attn … blocks.2.attn (3 layers): 4 x 16 channels", "  embed: 64 channels",
                 "    blocks.0.mlp … blocks.2.mlp (3 layers): 256 channels", "  depth: 3 blocks, blocks.0 … blocks.2",
                 "  blocks.0.mlp.hidden … blocks.2.mlp.hidden (3 layers): 128 of 256"):
        assert line in text.splitlines()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_the_parts_add_up_to_the_whole_and_match_the_closed_form(name):
    model = models.build(Model(name=name), 10)
    parts = metrics.by_part(model)
    assert sum(part["params"] for part in parts.values()) == metrics.count_params(model)
    assert sum(part["macs"] for part in parts.values()) == metrics.count_macs(model)
    if name.startswith("vit"):
        tokens, width, depth = 197, 192, 12
        assert parts["attention"]["macs"] == depth * (4 * tokens * width ** 2 + 2 * tokens ** 2 * width)
        assert parts["MLP"]["macs"] == depth * 8 * tokens * width ** 2
        assert parts["head"] == {"params": 10 * width + 10, "macs": 10 * width}


def test_what_cannot_be_cut_is_named_with_the_reason():
    text = inspect(Model(name="vit_small_patch16_rope_mixed_224", **TINY))
    assert "blocks.0.attn … blocks.2.attn (3): AttentionRope: its heads share one table" in text
    assert "embed: resnet18 has no single embedding width" in inspect(Model(name="resnet18"))


@pytest.mark.parametrize("words, said", [
    (["vit_tny_patch16_224"], "error: model.name: vit_tny_patch16_224: timm"),
    (["vit_tiny_patch16_224", "depht=2"], "error: model.depht: vit_tiny_patch16_224 takes no such argument; did you"),
    (["vit_tiny_patch16_224", "prune.ratio=1.5"], "error: prune.ratio: 1.5 is no share between 0 and 1"),
    (["vit_tiny_patch16_224", "prune.target.macs=0.0001"], "error: prune.target.macs"),
    (["vit_tiny_patch16_224", "ratio"], "error: ratio: is no key=value"),
])
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(words, said):
    process = subprocess.run([sys.executable, "-m", "vitopt", "inspect", *words], capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith(said) and len(process.stderr.splitlines()) == 1


def test_options_are_read_as_yaml_for_the_model_and_its_pruning():
    assert sections(["img_size=96", "prune.target.macs=0.6", "prune.axes=[heads, hidden]"]) == (
        {"img_size": 96}, {"target": {"macs": 0.6}, "axes": ["heads", "hidden"]})
    with pytest.raises(InputError, match="x=: is no|is not YAML"):
        sections(["prune.ratio={"])
