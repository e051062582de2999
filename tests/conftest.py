import os

import pytest
import torch
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network; read when timm is imported
torch.set_num_threads(1)  # the models are so small that a second thread would mostly wait

from vitopt import model as models  # noqa: E402
from vitopt.recipe import Model  # noqa: E402

TINY = {"name": "vit_base_patch16_224", "img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 32, "depth": 2,
        "num_heads": 2, "mlp_ratio": 2.0}


@pytest.fixture
def tiny():
    """Builds a small Vision Transformer; every weight is random, also those that timm begins with zero."""
    def build(num_classes=10, **kwargs):
        torch.manual_seed(0)
        model = models.build(Model(**TINY | kwargs), num_classes)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()
    return build


@pytest.fixture
def write_recipe(tmp_path):
    """Writes a recipe for digits, changed by section, into tmp_path/recipes; a section of None is left out."""
    def write(name, **sections):
        recipe = {"model": TINY, "data": {"name": "digits"}} | sections
        if "start" in sections:
            recipe.pop("model")
        folder = tmp_path / "recipes"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
        return str(path)
    return write
