import copy
import json
import os
import resource
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitopt
from vitopt import architecture as architectures, model as models
from vitopt.errors import InputError
from vitopt.recipe import Model

HUGE = 10 ** 12


@pytest.fixture(scope="module")
def timm_is_warm():
    """What timm and torch load at the first model is no model's time or memory."""
    models.build(Model(name="vit_tiny_patch16_224"), 2, device="meta")


@pytest.fixture
def load_changed(tiny, tmp_path, timm_is_warm):
    """Loads a small model whose model.json was changed, in how many seconds and bytes, and why it was refused."""
    def load(change):
        models.save(tiny(), tmp_path)
        architecture = copy.deepcopy(tiny().architecture)
        change(architecture)
        (tmp_path / "model.json").write_text(json.dumps(architecture))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        with pytest.raises(InputError) as refusal:
            vitopt.load(tmp_path)
        seconds = time.perf_counter() - start
        return str(refusal.value), seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return load


def put(*path, value):
    def change(architecture):
        for key in path[:-1]:
            architecture = architecture[key]
        architecture[path[-1]] = value
    change.__name__ = f"{'.'.join(map(str, path))}={str(value)[:30]}"
    return change


SIZES = [
    *(put("kwargs", key, value=value)
      for value in (HUGE, 10 ** 9, 10 ** 6, 10 ** 5, -HUGE, 1e300, [HUGE], [[10 ** 6] * 3] * 9)
      for key in ("embed_dim", "depth", "img_size", "num_classes", "num_heads", "mlp_ratio", "in_chans", "reg_tokens")),
    put("kwargs", "window_size", value=10 ** 5), put("kwargs", "depth", value=10 ** 400),
    put("widths", "blocks.0.attn", "head_dim", value=HUGE), put("widths", "blocks.0.mlp", "hidden_features", value=-1),
    put("widths", "", "embed_dim", value=HUGE), put("input", "channels", value=HUGE), put("input", "height", value=0),
    put("input", "width", value=2 ** 20 + 1),
    put("input", value={"channels": 1, "height": 2 ** 15, "width": 2 ** 15, "mean": [0.5], "std": [0.5],
                        "interpolation": "bicubic", "crop_pct": 1.0}), put("input", "mean", value=[0.5] * 10 ** 5),
    put("kwargs", "embed_dim", value=2 ** 16), put("kwargs", "img_size", value=2 ** 17),
]
NAMES = [
    *(put("name", value=name) for name in (
        "hf-hub:timm/vit_tiny_patch16_224", "hf_hub:a/b", "local-dir:/tmp", "/tmp/a", "../vit_base_patch16_224",
        "os.system", "", 3, None, ["resnet18"], "tiny_vit_21m_512", "swin_tiny_patch4_window7_224")),
    *(put("kwargs", key, value=value) for key, value in (
        ("pretrained", True), ("pretrained_cfg", {"file": "/etc/passwd"}), ("cache_dir", "/tmp"), ("no_jit", True),
        ("pretrained_cfg_overlay", {"file": "a.pth"}), ("checkpoint_path", "a.pth"), ("scriptable", True),
        ("exportable", True), ("features_only", True), ("feature_cls", "fx"), ("pruned", True),
        ("pretrained_filter_fn", "exec"),
        ("model_cfg", {}), ("norm_layer", "os.system"), ("block_fn", "torch.load"), ("act_layer", "__import__"))),
    *(put("removed_blocks", value=names) for names in (
        [""], ["head"], ["x.__class__"], ["blocks.__class__"], ["blocks.0.__class__"], ["blocks"], ["blocks.9"],
        ["blocks.0.mlp"], [3], "blocks.0", ["blocks.0"])),
    put("kwargs", value=[]), put("widths", value={"blocks.0.attn": 3}), put("widths", value=None),
    put("input", value={}),
]


@pytest.mark.parametrize("change", SIZES + NAMES, ids=lambda change: change.__name__)
def test_what_asks_for_too_much_or_for_more_than_building_is_refused_at_once_and_without_memory(load_changed, change):
    reason, seconds, memory = load_changed(change)
    assert "\n" not in reason and len(reason) < 700
    assert seconds < 3 and memory < 2 ** 27, (reason, seconds, memory)


@pytest.mark.parametrize("change", [put("kwargs", "embed_dim", value=HUGE), put("input", "channels", value=HUGE)],
                         ids=lambda change: change.__name__)
def test_a_million_million_channels_are_refused_in_milliseconds(load_changed, change):
    assert min(load_changed(change)[1] for _ in range(5)) < 0.02


def test_a_loop_as_long_as_an_argument_says_is_ended(monkeypatch, tmp_path, timm_is_warm):
    model = vitopt.create_model("tiny_vit_5m_224", num_classes=2, img_size=64, embed_dims=[8, 8, 8, 8],
                                depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_sizes=[2, 2, 2, 2])
    vitopt.save(model, tmp_path)
    vitopt.load(tmp_path)
    architecture = json.loads((tmp_path / "model.json").read_text())
    architecture["kwargs"]["window_sizes"] = [2, 64, 2, 2]
    (tmp_path / "model.json").write_text(json.dumps(architecture))
    monkeypatch.setattr(models, "CALLS_A_TENSOR", 15_000)
    with pytest.raises(InputError, match="takes far longer than a file of this size can be worth"):
        vitopt.load(tmp_path)


def test_building_that_takes_far_more_than_the_file_holds_is_refused(tiny, tmp_path):
    model = tiny()
    models.save(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    architecture = json.loads((tmp_path / "model.json").read_text())
    architecture["kwargs"]["embed_dim"] = 2 ** 14  # as if all but 32 channels had been cut
    (tmp_path / "model.json").write_text(json.dumps(architecture))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="it takes .* bytes before its cuts, and after them"):
        vitopt.load(tmp_path)


@pytest.mark.parametrize("harm, reason", [
    (lambda weights: weights | {"more": torch.zeros(1)}, "'more' is in only one of them"),
    (lambda weights: {name: tensor for name, tensor in weights.items() if name != "norm.bias"}, "'norm.bias' is in"),
    (lambda weights: weights | {"head.bias": torch.zeros(11)}, "head.bias is F32 [11]"),
    (lambda weights: weights | {"head.bias": torch.zeros(10, 1)}, "head.bias is F32 [10, 1]"),
    (lambda weights: weights | {"head.bias": torch.zeros(0)}, "head.bias is F32 [0]"),
    (lambda weights: weights | {"head.bias": torch.zeros(10).long()}, "head.bias is I64 [10]"),
    (lambda weights: weights | {"blocks.0.attn.qkv.weight": torch.zeros(95, 32)}, "widths.blocks.0.attn"),
])
def test_weights_of_other_names_shapes_and_kinds_are_refused_by_name(tiny, tmp_path, harm, reason):
    models.save(tiny(), tmp_path)
    save_file(harm(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(InputError) as refusal:
        vitopt.load(tmp_path)
    assert reason in str(refusal.value)


def test_widths_that_are_not_those_of_the_weights_are_refused(tiny, tmp_path):
    model = tiny()
    vitopt.prune(model, 0.4, importance="l2")
    model.architecture["widths"]["blocks.0.attn"]["num_heads"] = 1
    models.save(model, tmp_path)
    with pytest.raises(InputError, match="widths.blocks.0.attn"):
        vitopt.load(tmp_path)


@pytest.mark.parametrize("content", [
    "", "3", "null", "[]", "{}", "[" * 10 ** 6, '{"a":' * 10 ** 6, "NaN", '{"name": 1e999}', "9" * 10 ** 5, "\ud800",
    '{"name": "' + "a" * 2 ** 24 + '"}'], ids=lambda content: content[:9] + str(len(content)))
def test_a_model_json_that_is_none_is_refused(tiny, tmp_path, content):
    models.save(tiny(), tmp_path)
    (tmp_path / "model.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(InputError, match=str(tmp_path)):
        vitopt.load(tmp_path)


@pytest.mark.parametrize("file", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("place", ["pipe", "/dev/zero"])
def test_a_file_without_end_is_not_read(tiny, tmp_path, file, place):
    models.save(tiny(), tmp_path)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file) if place == "pipe" else (tmp_path / file).symlink_to(place)
    with pytest.raises(InputError, match=f"{file} is no regular file"):
        vitopt.load(tmp_path)


def test_the_random_numbers_after_loading_are_those_of_building(tiny, tmp_path):
    model = tiny()
    models.save(model, tmp_path)
    torch.manual_seed(5)
    vitopt.load(tmp_path)
    after = torch.rand(3)
    torch.manual_seed(5)
    models.build(Model(name=model.architecture["name"], **{
        key: value for key, value in model.architecture["kwargs"].items() if key != "num_classes"}), 10)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("kwargs", [{"features_only": True}, {"depth": 10 ** 9}, {"drop_rate": float("nan")},
                                    {"norm_layer": object()}])
def test_arguments_with_which_no_model_could_be_loaded_are_refused_before_it_is_built(kwargs):
    problems = models.check(Model(name="vit_tiny_patch16_224", **kwargs))
    assert len(problems) == 1 and problems[0].startswith(f"model.{next(iter(kwargs))}: ")


def test_what_is_saved_can_be_loaded_or_is_not_saved(tiny, tmp_path):
    model = tiny()
    model.architecture["input"]["mean"] = [float("nan")]
    with pytest.raises(InputError, match="could not be loaded again"):
        models.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_model_whose_blocks_and_widths_were_cut_passes_the_check(tiny, tmp_path):
    model = tiny(depth=4)
    vitopt.prune(model, {"depth": 0.25, "hidden": 0.5, "embed": 0.25})
    models.save(model, tmp_path)
    images = models.example_input(model, 2)
    assert torch.equal(vitopt.load(tmp_path)(images), model(images))
    architectures.check(json.loads(json.dumps(model.architecture)))


def test_a_profiler_at_work_is_left_alone(tiny, tmp_path):
    import cProfile
    models.save(tiny(), tmp_path)
    with cProfile.Profile():
        vitopt.load(tmp_path)
