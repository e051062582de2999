"""One member of each of timm's transformer families, pruned and proven; benchmarks/compatibility.py does them all."""

import compatibility
import pytest
import timm

VARIANTS = compatibility.variants()
MEMBERS = {variant["family"]: variant for variant in reversed(VARIANTS["variants"])}  # the first of each


@pytest.mark.parametrize("family", sorted(MEMBERS))
def test_a_member_of_the_family_is_pruned_proven_trained_saved_loaded_and_exported(family):
    model, images = compatibility.build(MEMBERS[family])
    found = compatibility.attempt(model, images, ratio=0.5)
    compatibility.use(found["pruned"], images, export=family in ("swin_transformer", "eva", "cait"))
    kinds = {change["kind"] for change in found["changes"]["axes"].values() if change["after"] < change["before"]}
    axes, _ = compatibility.channels.attention_axes(model)
    assert not axes or kinds & {"heads", "head_dim"}  # the attention too, wherever it can be cut


def test_every_module_of_the_installed_timm_is_in_the_matrix_or_known_to_have_no_transformer():
    known = {variant["family"] for variant in VARIANTS["variants"]} | set(VARIANTS["without_transformer"])
    assert set(timm.list_modules()) - known == set()


@pytest.mark.parametrize("name, kwargs", [
    ("vit_tiny_patch16_224", {}), ("beit_base_patch16_224", {}), ("eva02_tiny_patch14_224", {}),
    ("vit_small_patch16_rope_224", {}), ("vit_base_patch16_siglip_224", {}),
])
def test_the_embedding_width_of_columnar_models_is_cut_through_all_their_layers(name, kwargs):
    variant = {"name": name, "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}}
    model, images = compatibility.build(variant | kwargs)
    found = compatibility.attempt(model, images, ratio=0.5, axes=["embed"])
    assert found["changes"]["axes"]["embed"] | {"kept": None} == {
        "kind": "embed", "before": 64, "after": 32, "kept": None}


def test_a_loaded_model_whose_arguments_hold_a_dictionary_is_saved_again(tmp_path):
    model, images = compatibility.build(MEMBERS["coat"])
    compatibility.vitopt.save(model, tmp_path)
    compatibility.vitopt.save(compatibility.vitopt.load(tmp_path), tmp_path)
    assert compatibility.torch.equal(compatibility.vitopt.load(tmp_path)(images), model(images))
