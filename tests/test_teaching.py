import copy

import pytest
import torch
from torch import nn

from vitopt import batches, data, devices, distillation, model as models, pruning, runs, teaching, training
from vitopt.errors import InputError
from vitopt.recipe import Distill, Model, Prune, Recipe

CPU = torch.device("cpu")
TRAIN = {"epochs": 2, "batch_size": 32, "lr": 0.002, "precision": "fp32", "augment": {"crop": "pad", "mixup": 0.8}}


@pytest.fixture
def accelerator():
    return devices.make_accelerator(Recipe.model_validate(
        {"model": {"name": "x"}, "data": {"name": "digits"}, "train": TRAIN}).train)


def section(**keys):
    return Distill.model_validate({"teacher": "t"} | keys)


def batch_for(model, count=8):
    torch.manual_seed(1)
    images, labels = models.example_input(model, count), torch.arange(count) % models.num_classes(model)
    return batches.Batch(images, labels, labels, torch.arange(count))


def loss_of(lesson, batch, accelerator):
    return lesson.loss(lesson.network(batch.images), batch, nn.CrossEntropyLoss(), lesson.hear(batch, accelerator))


def pruned(model, **options):
    """A copy without some channels, and which of the original's it has kept."""
    smaller = copy.deepcopy(model)
    cuts = [pruning.prune(smaller, Prune(importance="l2", align=1, **options))]
    return smaller.eval(), runs._composed(cuts, {})


@pytest.mark.parametrize("loss, expected", [
    ("kl", lambda s, t, y: distillation.kl_divergence(s, t, 2.0)),
    ("hard", lambda s, t, y: distillation.hard_label(s, t)),
    ("dkd", lambda s, t, y: distillation.decoupled(s, t, y, 2.0)),
    ("dist", lambda s, t, y: distillation.dist(s, t, 2.0)),
    ("standardized", lambda s, t, y: distillation.standardized(s, t, 2.0)),
])
def test_the_loss_is_the_recipes_mixture_of_labels_and_teacher(tiny, accelerator, loss, expected):
    student, teacher = tiny(), tiny(depth=3)
    batch = batch_for(student)
    distill = section(logits={"loss": loss, "temperature": 2.0, "weight": 0.25})
    lesson = teaching.Teaching(distill, [teacher], student, CPU)
    logits = student(batch.images)
    by_hand = (0.75 * nn.functional.cross_entropy(logits, batch.labels)
               + 0.25 * expected(logits, teacher(batch.images), batch.labels))
    torch.testing.assert_close(loss_of(lesson, batch, accelerator), by_hand)


def test_several_teachers_speak_with_the_weights_they_are_given(tiny, accelerator):
    first, second = tiny(), tiny(depth=1)
    student = tiny(depth=3)
    batch = batch_for(student)
    distill = section(teacher=[{"run": "a", "weight": 3.0}, "b"])
    told, _ = teaching.Teaching(distill, [first, second], student, CPU).hear(batch, accelerator)
    torch.testing.assert_close(told, 0.75 * first(batch.images) + 0.25 * second(batch.images))


def test_a_teacher_sees_the_images_in_its_own_size_channels_and_normalisation(tiny):
    student, teacher = tiny(), tiny(img_size=32, in_chans=3)
    student.architecture["input"] |= {"mean": [0.2], "std": [0.4]}
    teacher.architecture["input"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    lesson = teaching.Teaching(section(), [teacher], student, CPU)
    grey = torch.full((2, 1, 16, 16), 0.6)
    seen = lesson._as_seen_by(0, (grey - 0.2) / 0.4)
    assert seen.shape == (2, 3, 32, 32)
    expected = (0.6 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.6, 0.7])
    torch.testing.assert_close(seen, expected.view(1, 3, 1, 1).expand_as(seen))


def test_teachers_are_frozen_in_eval_mode_and_no_gradient_reaches_them(tiny, accelerator):
    student, teacher = tiny(), tiny().train()
    distill = section(features={}, attention={}, relations={})
    lesson = teaching.Teaching(distill, [teacher], student, CPU)
    loss_of(lesson, batch_for(student), accelerator).backward()
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_pruned_student_is_compared_with_the_very_channels_that_it_has_kept(tiny, accelerator):
    teacher = tiny(embed_dim=64)
    student, kept = pruned(teacher, ratio={"hidden": 0.5, "blocks.1.*": 0.2})
    distill = section(logits=None, features={"layers": ["blocks.0.mlp.act"]})
    batch = batch_for(teacher)

    def distance(kept):
        lesson = teaching.Teaching(distill, [teacher], student, CPU, kept)
        with torch.no_grad():
            outputs = lesson.network(batch.images)
            told = lesson.hear(batch, accelerator)
            return (lesson.loss(outputs, batch, lambda *_: 0.0, told).item(), *lesson.network.projections)

    assert distance(kept) == (pytest.approx(0, abs=1e-9),)  # what comes before this layer was not cut
    error, projection = distance({})
    assert error > 0.1 and projection.linear.weight.shape[::-1] == student.blocks[0].mlp.fc1.weight.shape[:1] + (
        teacher.blocks[0].mlp.fc1.out_features,)


def test_a_student_without_some_heads_is_compared_with_the_maps_of_those_it_has_kept(tiny, accelerator):
    teacher = tiny(embed_dim=64, num_heads=8)
    student, kept = pruned(teacher, ratio={"heads": 0.5})
    distill = section(logits=None, attention={"layers": ["blocks.0.attn"]})
    batch = batch_for(teacher)

    def divergence(kept):
        lesson = teaching.Teaching(distill, [teacher], student, CPU, kept)
        with torch.no_grad():
            outputs = lesson.network(batch.images)
            return lesson.loss(outputs, batch, lambda *_: 0.0, lesson.hear(batch, accelerator)).item()

    assert divergence(kept) == pytest.approx(0, abs=1e-6)
    assert divergence({}) > 1e-4


def test_a_cut_embedding_is_compared_with_the_channels_that_it_has_kept(tiny):
    teacher = tiny(embed_dim=64)
    student, kept = pruned(teacher, ratio={"embed": 0.5})
    lesson = teaching.Teaching(section(features={}), [teacher], student, CPU, kept)
    assert len(lesson.network.projections) == 0
    assert all(torch.equal(lesson.kept["features", f"blocks.{n}"], kept["embed"][0]) for n in (0, 1))


def test_layers_pair_by_depth_where_the_models_differ_and_by_name_where_they_do_not(tiny):
    shallow, deep = tiny(depth=2), tiny(depth=6)
    pairs = teaching.Teaching(section(features={}), [deep], shallow, CPU).pairs
    assert pairs == [("features", "blocks.0", "blocks.2"), ("features", "blocks.1", "blocks.5")]
    pairs = teaching.Teaching(section(attention={}), [shallow], deep, CPU).pairs
    assert [pair[2] for pair in pairs] == ["blocks.0.attn"] * 3 + ["blocks.1.attn"] * 3
    without, _ = pruned(deep, ratio={"depth": 0.34})
    pairs = teaching.Teaching(section(features={}), [deep], without, CPU).pairs
    removed = without.architecture["removed_blocks"]
    assert [pair[1] for pair in pairs] == [pair[2] for pair in pairs] == [
        name for n in range(6) if (name := f"blocks.{n}") not in removed] and len(removed) == 2
    pairs = teaching.Teaching(section(features={"layers": {"blocks.1": "blocks.4.mlp"}}), [deep], shallow, CPU).pairs
    assert pairs == [("features", "blocks.1", "blocks.4.mlp")]


@pytest.mark.parametrize("keys, expected", [
    ({"features": {"layers": ["blocks.7"]}}, "distill.features.layers: blocks.7: the student has no such layer: .*s.0"),
    ({"features": {"layers": {"blocks.0": "stages.0"}}}, "distill.features.layers: stages.0: the teacher has no such"),
    ({"attention": {"layers": ["blocks.0"]}}, "distill.attention.layers: blocks.0: the student has no such layer"),
    ({"features": {"layers": ["head"]}}, "head of the student gives no features: name other layers"),
])
def test_layers_that_cannot_be_compared_are_named(tiny, keys, expected):
    with pytest.raises(InputError, match=expected):
        teaching.Teaching(section(**keys), [tiny()], tiny(), CPU)


def test_a_hierarchical_teacher_of_another_grid_teaches_a_columnar_student(tiny, accelerator):
    teacher = models.build(Model(name="swin_tiny_patch4_window7_224", img_size=32, in_chans=1, embed_dim=16,
                                 window_size=4, depths=(1, 1), num_heads=(1, 2)), 10)
    student = tiny()
    lesson = teaching.Teaching(section(features={}, relations={}), [teacher], student, CPU)
    loss = loss_of(lesson, batch_for(student), accelerator)
    loss.backward()
    assert loss.isfinite() and all(projection.linear.weight.grad.abs().sum() > 0
                                   for projection in lesson.network.projections)


def test_a_distillation_token_learns_from_the_teacher_and_the_class_token_from_the_labels(accelerator, tiny):
    student = models.build(Model(name="deit_tiny_distilled_patch16_224", img_size=16, patch_size=8, in_chans=1,
                                 embed_dim=32, depth=1, num_heads=2), 10).train()
    teacher = tiny()
    batch = batch_for(student)
    lesson = teaching.Teaching(section(logits={"loss": "hard", "weight": 0.5}), [teacher], student, CPU)
    logits, token = student(batch.images)
    by_hand = (nn.functional.cross_entropy(logits, batch.labels)
               + nn.functional.cross_entropy(token, teacher(lesson._as_seen_by(0, batch.images)).argmax(-1))) / 2
    torch.testing.assert_close(loss_of(lesson, batch, accelerator), by_hand)
    assert isinstance(student.eval()(batch.images), torch.Tensor)


@pytest.mark.parametrize("keys", [
    {"features": {}}, {"attention": {"weight": 2.0}, "logits": None}, {"relations": {}, "features": {"weight": 0.5}},
    {"logits": {"loss": "dkd", "weight": 0.5}, "attention": {}, "features": {"layers": ["blocks.0.mlp"]}}])
def test_training_listens_and_leaves_nothing_behind(tiny, keys):
    recipe = Recipe.model_validate({"model": {"name": "x"}, "data": {"name": "digits", "limit": 300},
                                    "distill": {"teacher": "t"} | keys,
                                    "train": TRAIN | {"epochs": 6, "ema_decay": 0.9, "accumulate": 2,
                                                      "precision": "bf16"}})
    accelerator = devices.make_accelerator(recipe.train)
    student, teacher = tiny(embed_dim=16), tiny()
    names = list(student.state_dict())
    splits = data.load(recipe.data, student.architecture["input"], recipe.train.augment)
    trained, history = training.train(student, recipe, splits, accelerator, [teacher])
    assert history[-1]["loss"] < history[0]["loss"]
    assert trained is student and list(trained.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trained.modules())
    assert all(module.fused_attn for module in trained.modules() if hasattr(module, "fused_attn"))
