import importlib

import pytest
import timm
import torch
from torch import nn

from vitopt import layouts


def segments(expression, **sizes):
    return [(names, index.tolist()) for names, index in layouts.index(expression, sizes)]


def test_expressions_say_where_each_channel_lies():
    assert segments("hK+hk+hv", h=2, k=1, v=2) == [
        ("hK", [[0], [1]]), ("hk", [[2], [3]]), ("hv", [[4, 5], [6, 7]])]
    assert segments("h(K+k+v)", h=2, k=1, v=2) == [
        ("hK", [[0], [4]]), ("hk", [[1], [5]]), ("hv", [[2, 3], [6, 7]])]
    assert segments("vh", h=2, v=3) == [("vh", [[0, 1], [2, 3], [4, 5]])]
    assert segments("f+h2k", f=2, h=1, k=2) == [("f", [0, 1]), ("h2k", [[[2, 3], [4, 5]]])]
    assert layouts.length("f+h2K+h2k+hv", {"f": 7, "h": 3, "k": 2, "v": 4}) == 7 + 12 + 12 + 12


@pytest.mark.parametrize("name", sorted(layouts.LAYOUTS))
def test_every_layout_is_of_a_class_that_the_installed_timm_has(name):
    module, _, kind = name.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), kind), nn.Module)


def test_widths_are_read_off_the_weights():
    from timm.models.levit import Attention
    attention = Attention(dim=32, key_dim=4, num_heads=2, attn_ratio=3, resolution=(4, 4))
    assert layouts.widths(attention, layouts.find(attention)) == {"h": 2, "r": 1, "k": 4, "v": 12}


@pytest.mark.parametrize("name", ["cait_xxs24_224", "swinv2_tiny_window8_256", "twins_svt_small", "nest_tiny"])
def test_a_decoupled_class_computes_what_timms_computes(name):
    model = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(1, *model.default_cfg["input_size"])
    expected = model(images)
    changed = 0
    for module in list(model.modules()):
        if layout := layouts.find(module):
            sizes, kind = layouts.widths(module, layout), type(module)
            layouts.follow(module, sizes, sizes)
            assert layouts.find(module) is not None and isinstance(module, kind)
            changed += type(module) is not kind
    assert changed and torch.equal(model(images), expected)


def test_a_class_that_knows_its_own_inner_width_stays_timms():
    from timm.layers import Attention
    assert layouts.decoupled(Attention) is Attention
