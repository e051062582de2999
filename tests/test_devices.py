import pytest

from vitopt import devices
from vitopt.recipe import Recipe


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
