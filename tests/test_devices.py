from contextlib import nullcontext

import pytest
import torch
from torch import distributed, multiprocessing

import vitopt
from vitopt import devices
from vitopt.errors import InputError
from vitopt.recipe import Recipe

SMALL = {"name": "vit_base_patch16_224", "num_classes": 10, "img_size": 16, "patch_size": 8, "embed_dim": 32,
         "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


@pytest.mark.parametrize("said, launched, hardware, expected", [
    (None, None, True, "bf16"), (None, None, False, "no"), (None, "fp16", True, "fp16"), ("fp32", "bf16", True, "no"),
    ("bf16", None, False, "bf16"), (None, "no", True, "bf16")])
def test_precision_is_the_recipes_else_the_launchers_else_the_machines(monkeypatch, said, launched, hardware, expected):
    monkeypatch.setattr(devices, "has_bf16", lambda: hardware)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    train = {"epochs": 1, "batch_size": 32, "lr": 0.002} | ({"precision": said} if said else {})
    section = Recipe.model_validate({"model": {"name": "x"}, "data": {"name": "digits"}, "train": train}).train
    assert devices.precision(section) == expected and devices.precision(None) == "no"


def cut(rank, file, seed):
    distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(seed * rank)
    model = vitopt.create_model(**SMALL)
    with pytest.raises(InputError, match="processes would cut different") if seed else nullcontext():
        vitopt.prune(model, 0.5)
    assert (model.blocks[0].mlp.fc1.out_features < 64) == (not seed)  # refused, it is as it was
    distributed.destroy_process_group()


@pytest.mark.parametrize("seed", [0, 1])
def test_processes_that_would_prune_differently_stop(tmp_path, seed):
    multiprocessing.spawn(cut, (str(tmp_path / "meeting"), seed), nprocs=2)
