import copy

import pytest
import torch
from accelerate.utils import set_seed

from vitopt import data, devices, metrics, model as models, training
from vitopt.checkpoints import Checkpoints
from vitopt.errors import InputError
from vitopt.recipe import Augment, Recipe

TRAIN = {"epochs": 2, "batch_size": 32, "lr": 0.002, "augment": {"crop": "pad", "padding": 1}}


@pytest.fixture(scope="module")
def accelerator():
    return devices.make_accelerator()


def trained(tiny, accelerator, teachers=(), seed=0, limit=200, **sections):
    recipe = Recipe.model_validate({
        "model": {"name": "x"}, "data": {"name": "digits", "limit": limit}, "seed": seed, "train": TRAIN} | sections)
    set_seed(seed)
    model = tiny()
    splits = data.load(recipe.data, model.architecture["input"], recipe.train.augment)
    model, history = training.train(model, recipe, splits, accelerator, teachers)
    return model, history, splits


def test_training_learns_and_keeps_one_line_an_epoch(tiny, accelerator):
    model, history, splits = trained(tiny, accelerator, limit=1000, train=TRAIN | {"epochs": 8})
    assert [row["epoch"] for row in history] == list(range(1, 9))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    accuracy, images = training.evaluate(model, splits.validation, splits, accelerator)
    best = training.chosen_epoch(history)
    assert images == 100 and accuracy == pytest.approx(best["validation_accuracy"]) and accuracy > 40


def test_the_best_epoch_by_validation_is_kept_and_of_equals_the_last():
    history = [{"epoch": n, "validation_accuracy": a} for n, a in enumerate((10.0, 60.0, 60.0, 50.0), start=1)]
    assert training.chosen_epoch(history) == {"best_epoch": 3, "validation_accuracy": 60.0}


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny, accelerator):
    first, second, other = (trained(tiny, accelerator, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_learning_rate_warms_up_and_ends_near_zero(tiny, accelerator):
    _, history, _ = trained(tiny, accelerator, train=TRAIN | {"epochs": 4, "warmup_ratio": 0.5})
    rates = [row["lr"] for row in history]
    assert rates[0] < rates[1] <= 0.002 and rates[3] < rates[2] and rates[3] < 0.1 * 0.002


def test_a_teacher_teaches_and_stays_as_it_is(tiny, accelerator):
    teacher = tiny()
    torch.nn.init.normal_(teacher.head.weight, std=1.0)
    before = copy.deepcopy(teacher.state_dict())
    section = {"distill": {"teacher": "t", "logits": {"weight": 1.0, "temperature": 1.0}}}
    train = TRAIN | {"epochs": 12, "lr": 0.004}
    model, history, splits = trained(tiny, accelerator, [teacher], limit=600, train=train, **section)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    # with all weight on the teacher the student learns its opinions, not the labels
    images = torch.stack([splits.train[index][0] for index in range(100)])
    agreement = (model.eval()(images).argmax(-1) == teacher(images).argmax(-1)).float().mean()
    assert agreement > 0.6


def test_the_moving_average_is_what_is_kept(tiny, accelerator):
    plain, _, _ = trained(tiny, accelerator)
    averaged, _, _ = trained(tiny, accelerator, train=TRAIN | {"ema_decay": 0.9999})
    assert any(not torch.equal(a, b) for a, b in zip(plain.state_dict().values(), averaged.state_dict().values()))


@pytest.mark.parametrize("augment", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_images_train_too(tiny, accelerator, augment):
    _, history, _ = trained(tiny, accelerator, train=TRAIN | {"augment": augment, "clip_grad": 1.0})
    assert torch.tensor([row["loss"] for row in history]).isfinite().all()


def test_a_loss_that_is_no_number_stops_with_the_cure(tiny, accelerator):
    with pytest.raises(InputError, match="train.lr: 1e.30: the loss became nan in epoch .: take a smaller one"):
        trained(tiny, accelerator, train=TRAIN | {"lr": 1e30, "warmup_ratio": 0.0, "optimizer": "sgd"})


def test_a_loss_beyond_bounds_stops_and_the_best_model_so_far_is_kept(tiny, accelerator, tmp_path):
    class Late(torch.nn.Module):
        """A model whose answers grow absurd once it has trained for a while."""
        def __init__(self, model):
            super().__init__()
            self.model, self.architecture, self.steps = model, model.architecture, 0

        def forward(self, images):
            self.steps += self.training
            return self.model(images) * (1 if self.steps <= 15 else float(explodes))

        def state_dict(self, *args, **kwargs):
            return self.model.state_dict(*args, **kwargs)

        def load_state_dict(self, state):
            return self.model.load_state_dict(state)

    for explodes, said in (("nan", "became nan"), (1e4, "grew from [0-9.]+ to [0-9.e+]+")):
        recipe = Recipe.model_validate({"model": {"name": "x"}, "data": {"name": "digits", "limit": 200},
                                        "train": TRAIN | {"epochs": 9}})
        splits = data.load(recipe.data, tiny().architecture["input"], recipe.train.augment)
        with pytest.raises(InputError, match=f"the loss {said} in epoch 4: .*kept in .*row.last_good"):
            training.train(Late(tiny()), recipe, splits, accelerator, saved=Checkpoints(tmp_path / "row", accelerator))
        kept = models.load(tmp_path / "row.last_good")
        assert all(value.isfinite().all() for value in kept.state_dict().values())


def test_a_batch_computed_in_parts_trains_as_the_whole_does(tiny, accelerator):
    whole, first, _ = trained(tiny, accelerator, train=TRAIN | {"precision": "fp32"})
    parts, second, _ = trained(tiny, accelerator, train=TRAIN | {"precision": "fp32", "accumulate": 4})
    assert [row["loss"] for row in first] == pytest.approx([row["loss"] for row in second], rel=1e-5)
    for one, other in zip(whole.state_dict().values(), parts.state_dict().values()):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_layer_decay_teaches_the_first_layers_less(tiny, accelerator):
    def moved(**train):
        start = tiny()
        model, _, _ = trained(tiny, accelerator, train=TRAIN | {"weight_decay": 0.0} | train)
        return [(model.get_submodule(name).weight - start.get_submodule(name).weight).norm().item()
                for name in ("blocks.0.mlp.fc1", "head")]
    (first, last), (plain, head) = moved(layer_decay=0.1), moved()
    assert first < 0.3 * plain and last > 0.5 * head


def test_a_compiled_model_trains_as_an_eager_one_and_is_a_plain_model_after(tiny, accelerator, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # other runs compile too
    section = {"distill": {"teacher": "t", "features": {}, "attention": {}}}
    eager, first, _ = trained(tiny, accelerator, [tiny()], train=TRAIN | {"precision": "fp32"}, **section)
    compiled, second, _ = trained(tiny, accelerator, [tiny()], train=TRAIN | {"precision": "fp32", "compile": True},
                                  **section)
    assert [row["loss"] for row in first] == pytest.approx([row["loss"] for row in second], rel=1e-4)
    assert type(compiled) is type(eager) and list(compiled.state_dict()) == list(eager.state_dict())


def test_a_compiler_that_fails_is_named_in_one_line(tiny, accelerator, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no_compiler")))
    torch._dynamo.reset()
    with pytest.raises(InputError, match="train.compile: true: .*no_compiler.*: mend the compiler, or set it false"):
        trained(tiny, accelerator, train=TRAIN | {"precision": "fp32", "compile": True})


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrix_products_are_in_the_recipes_precision_and_weights_stay_in_32_bits(tiny, precision, dtype):
    seen = set()
    model = tiny()
    model.blocks[0].mlp.fc1.register_forward_hook(
        lambda module, args, output: seen.add((module.training, output.dtype)))
    recipe = Recipe.model_validate({"model": {"name": "x"}, "data": {"name": "digits", "limit": 200},
                                    "train": TRAIN | {"precision": precision}})
    splits = data.load(recipe.data, model.architecture["input"], recipe.train.augment)
    accelerator = devices.make_accelerator(recipe.train)
    model, _ = training.train(model, recipe, splits, accelerator)
    assert seen == {(True, dtype), (False, dtype)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(models.example_input(model)).dtype == torch.float32


def test_a_batch_larger_than_the_data_is_refused(tiny, accelerator):
    with pytest.raises(InputError, match="train.batch_size: 1000 is more than the 180 training images"):
        trained(tiny, accelerator, train=TRAIN | {"batch_size": 1000})


def test_calibration_batches_are_training_images_without_augmentation_the_same_each_time(tiny, accelerator):
    splits = data.load(data.Data(name="digits", limit=100), tiny().architecture["input"], Augment(crop="pad"))
    batches = training.calibration(splits, accelerator)
    expected = torch.stack([splits.calibration[index][0] for index in range(len(splits.calibration))])
    for _ in range(2):
        torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected, atol=1e-5, rtol=0)


def test_accuracy_is_the_share_of_hits_in_percent(accelerator):
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(images.long().flatten(), 4).float()
    images = torch.tensor([float(n % 4) for n in range(10)])
    targets = torch.tensor([n % 4 if n < 7 else (n + 1) % 4 for n in range(10)])
    batches = list(zip(images.split(4), targets.split(4)))
    assert metrics.accuracy(Fixed(), batches, accelerator) == (pytest.approx(70.0), 10)


def test_models_on_meta_need_no_training_to_know_their_classes():
    model = models.build(models.Model(name="vit_tiny_patch16_224"), 7, device="meta")
    assert models.num_classes(model) == 7
