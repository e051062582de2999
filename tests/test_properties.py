"""Whatever is asked of whatever small model: a valid smaller one, or a refusal and the model as it was."""

import copy
import tempfile
import warnings
from pathlib import Path

import compatibility
import torch
from hypothesis import HealthCheck, event, given, settings, strategies as some
from hypothesis.configuration import set_hypothesis_home_dir

import vitopt
from vitopt import metrics, model as models
from vitopt.errors import InputError
from vitopt.pruning import proof
from vitopt.recipe import Model

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # nothing of it stays in the repository
LIMIT = 1e-4  # relative difference in float32
TRIED = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@some.composite
def vits(draw):
    """The `model` section of a small Vision Transformer, and its number of classes."""
    heads, head_dim = draw(some.integers(1, 4)), draw(some.integers(1, 12))
    kwargs = {"img_size": 16, "in_chans": draw(some.sampled_from([1, 3])), "embed_dim": heads * head_dim,
              "num_heads": heads, "depth": draw(some.integers(1, 3)), "patch_size": draw(some.sampled_from([4, 8, 16])),
              "mlp_ratio": draw(some.sampled_from([0.5, 1.0, 2.0, 3.3, 4.0])),
              "qkv_bias": draw(some.booleans()), "qk_norm": draw(some.booleans()),
              "reg_tokens": draw(some.integers(0, 3)), "init_values": draw(some.sampled_from([None, 1e-5, 0.5])),
              "pre_norm": draw(some.booleans()), "final_norm": draw(some.booleans())}
    if draw(some.booleans()):
        kwargs |= {"class_token": False, "global_pool": draw(some.sampled_from(["avg", "max", "avgmax", "map"]))}
    return {"name": "vit_base_patch16_224", **kwargs}, draw(some.integers(1, 5))


VARIANTS = [variant for variant in compatibility.variants()["variants"] if variant["family"] in (
    "beit", "cait", "convit", "deit", "efficientvit_msra", "eva", "levit", "metaformer", "mlp_mixer", "nest", "pvt_v2",
    "swin_transformer", "swin_transformer_v2", "tiny_vit", "twins", "vision_transformer", "vision_transformer_relpos",
    "xcit")]


@some.composite
def requests(draw):
    """What `vitopt.prune` is asked."""
    share = some.floats(0.001, 0.999)
    kinds = some.sampled_from(["heads", "head_dim", "hidden", "embed", "depth"])
    asked = draw(some.one_of(
        share.map(lambda ratio: {"ratio": ratio}), some.floats(0.05, 0.8).map(lambda ratio: {"ratio": ratio}),
        some.dictionaries(some.one_of(kinds, some.sampled_from(["blocks.0.*", "*.attn", "*mlp*", "nothing"])), share,
                          min_size=1, max_size=3).map(lambda ratio: {"ratio": ratio}),
        some.tuples(some.sampled_from(["macs", "params"]), some.one_of(share, some.floats(1, 10 ** 5))).map(
            lambda target: {"target": dict([target])})))
    if draw(some.booleans()):
        asked["axes"] = draw(some.lists(kinds, min_size=1, max_size=3, unique=True))
    return asked | {"importance": draw(some.sampled_from(["l1", "l2", "random"])),
                    "ranking": draw(some.sampled_from(["global", "local", "isomorphic"])),
                    "align": draw(some.sampled_from([None, 1, 2, 3, 8, 1000]))}


def built(section, num_classes):
    torch.manual_seed(0)
    model = models.build(Model(**section), num_classes).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what timm begins with zero or one must count too
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, models.example_input(model, 2)


def pruned_or_as_it_was(model, images, request):
    original, before = copy.deepcopy(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = compatibility.first(model(images))
        try:
            changes = vitopt.prune(model, example_inputs=images, **request)
        except InputError as error:
            event("refused")
            assert all(problem and "\n" not in problem for problem in error.problems)
            after = model.state_dict()
            assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
            assert torch.equal(compatibility.first(model(images)), expected)
            assert model.architecture == original.architecture
            return
        event("pruned")
        is_smaller(original, model, changes, images, expected.shape)


def is_smaller(original, model, changes, images, shape):
    got = compatibility.first(model(images))
    assert got.shape == shape and got.isfinite().all()
    assert changes["params"]["after"] == metrics.count_params(model) < changes["params"]["before"]
    assert changes["macs"]["after"] == metrics.count_macs(model) <= changes["macs"]["before"]
    for name, axis in changes["axes"].items():
        assert 0 <= axis["after"] <= axis["before"], name
        assert (axis["after"] < axis["before"]) == bool(axis.get("kept") or axis.get("removed")), name
    assert proof.difference(original, model, changes, images) < LIMIT
    with tempfile.TemporaryDirectory() as folder:
        vitopt.save(model, folder)
        loaded = vitopt.load(folder)
    assert torch.equal(compatibility.first(loaded(images)), got)
    assert models.widths(loaded) == models.widths(model)


@settings(TRIED, max_examples=70)
@given(vits(), requests())
def test_a_vision_transformer_is_pruned_validly_or_left_as_it_was(vit, request):
    pruned_or_as_it_was(*built(*vit), request)


@settings(TRIED, max_examples=40)
@given(some.sampled_from(VARIANTS), requests())
def test_a_model_of_any_family_is_pruned_validly_or_left_as_it_was(variant, request):
    pruned_or_as_it_was(*compatibility.build(variant), request)


@settings(TRIED, max_examples=15)
@given(vits(), requests(), requests())
def test_a_model_that_was_pruned_and_loaded_is_pruned_validly_again(vit, first, second):
    model, images = built(*vit)
    pruned_or_as_it_was(model, images, first)
    with tempfile.TemporaryDirectory() as folder:
        vitopt.save(model, folder)
        loaded = vitopt.load(folder)
    pruned_or_as_it_was(loaded, images, second)
