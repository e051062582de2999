import copy

import pytest
import torch
from torch.nn import functional as F

from vitopt import metrics, model as models, pruning
from vitopt.recipe import InputError, Model, Prune


def with_gradients(model):
    torch.manual_seed(1)
    F.cross_entropy(model(models.example_input(model, 8)), torch.arange(8)).backward()
    return model


def kept_channels(before, after, qkv_rows_scaled):
    """Indices of `before`'s rows that are the rows of `after`, in order, found by value."""
    return [next(index for index, row in enumerate(before) if torch.allclose(row * qkv_rows_scaled, wanted))
            for wanted in after]


def zero_what_was_removed(original, pruned):
    """The original with the removed channels zeroed, read off the pruned weights alone."""
    zeroed = copy.deepcopy(original)
    with torch.no_grad():
        for name, attention in models.attentions(pruned).items():
            before = zeroed.get_submodule(name)
            width, left = before.attn_dim, attention.attn_dim
            scale = (attention.head_dim / before.head_dim) ** 0.5
            for part, factor in enumerate((scale, 1.0, 1.0)):
                rows = before.qkv.weight[part * width:(part + 1) * width]
                kept = kept_channels(rows, attention.qkv.weight[part * left:(part + 1) * left], factor)
                heads = torch.tensor(kept) // before.head_dim
                assert heads.bincount().tolist() == [attention.head_dim] * attention.num_heads
                removed = sorted(set(range(width)) - set(kept))
                rows[removed] = 0
                if before.qkv.bias is not None:
                    before.qkv.bias[part * width:(part + 1) * width][removed] = 0
        for name, mlp in models.mlps(pruned).items():
            before = zeroed.get_submodule(name)
            kept = kept_channels(before.fc1.weight, mlp.fc1.weight, 1.0)
            before.fc2.weight[:, sorted(set(range(before.fc1.out_features)) - set(kept))] = 0
    return zeroed


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
@pytest.mark.parametrize("kwargs", [
    {"qkv_bias": True}, {"qkv_bias": False}, {"class_token": False, "global_pool": "avg"}, {"init_values": 0.1},
    {"reg_tokens": 2}, {"num_heads": 4, "embed_dim": 48},
])
def test_a_pruned_model_computes_what_the_original_computes_with_the_removed_channels_zeroed(
        tiny, kwargs, importance, fused):
    original = with_gradients(tiny(**kwargs))
    pruned = copy.deepcopy(original)
    for name, parameter in pruned.named_parameters():
        parameter.grad = original.get_parameter(name).grad
    pruning.prune(pruned, Prune(ratio=0.4, importance=importance))
    zeroed = zero_what_was_removed(original, pruned)
    for model in (pruned, zeroed):
        for attention in models.attentions(model).values():
            attention.fused_attn = fused
    images = models.example_input(original, 4)
    expected, got = zeroed(images), pruned(images)
    assert (got - expected).norm() / expected.norm() < 1e-5
    assert (original(images) - expected).norm() / expected.norm() > 1e-2  # something that mattered was removed


def test_fused_and_unfused_attention_agree_after_pruning(tiny):
    model = tiny()
    pruning.prune(model, Prune(ratio=0.5, importance="l2"))
    images = models.example_input(model, 4)
    fused = model(images)
    for attention in models.attentions(model).values():
        assert attention.scale == attention.head_dim ** -0.5
        attention.fused_attn = False
    torch.testing.assert_close(model(images), fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.8])
def test_the_ratio_is_the_share_of_channels_that_is_removed(tiny, ratio):
    model = tiny()
    changes = pruning.prune(model, Prune(ratio=ratio, importance="l2"))
    total = sum(change["before"] for change in changes.values())
    removed = total - sum(change["after"] for change in changes.values())
    assert total == 2 * (32 + 64) and removed == round(ratio * total)


def test_the_ranking_is_global_and_the_weaker_block_loses_more(tiny):
    model = tiny()
    with torch.no_grad():
        for block, spread in ((model.blocks[0], 3.0), (model.blocks[1], 0.0)):
            # in the first block the hidden features differ strongly, so that its weak half is far below average
            scale = torch.linspace(-spread, 0, 64).exp().unsqueeze(1)
            block.mlp.fc1.weight.copy_(torch.ones_like(block.mlp.fc1.weight) * scale)
            block.mlp.fc2.weight.copy_((torch.ones_like(block.mlp.fc2.weight).t() * scale).t())
    changes = pruning.prune(model, Prune(ratio=0.2, importance="l2"))
    assert changes["blocks.0.mlp"]["after"] < 40 and changes["blocks.1.mlp"]["after"] == 64
    # what is left are the strong ones
    assert model.blocks[0].mlp.fc1.weight.min() > torch.tensor(-1.5).exp()


def test_magnitude_scores_equal_a_count_by_hand(tiny):
    model = tiny()
    block = model.blocks[0]
    graph, importance = pruning._trace(model), pruning.IMPORTANCES["l2"]()
    q, k, v = block.attn.qkv.weight.pow(2).sum(1).view(3, 2, 16)
    proj = block.attn.proj.weight.pow(2).sum(0).view(2, 16)
    expected = torch.stack([(q + k) / (q + k).mean(), (v + proj) / (v + proj).mean()])
    torch.testing.assert_close(pruning._attention_scores(graph, block.attn, importance), expected)
    hidden = block.mlp.fc1.weight.pow(2).sum(1) + block.mlp.fc2.weight.pow(2).sum(0)
    torch.testing.assert_close(pruning._mlp_scores(graph, block.mlp, importance), hidden / hidden.mean())


def test_taylor_scores_equal_a_count_by_hand(tiny):
    model = with_gradients(tiny())
    block = model.blocks[1]
    graph, importance = pruning._trace(model), pruning.IMPORTANCES["taylor"]()
    q, k, v = (block.attn.qkv.weight * block.attn.qkv.weight.grad).sum(1).abs().view(3, 2, 16)
    proj = (block.attn.proj.weight * block.attn.proj.weight.grad).sum(0).abs().view(2, 16)
    expected = torch.stack([(q + k) / 2, (v + proj) / 2])
    torch.testing.assert_close(pruning._attention_scores(graph, block.attn, importance), expected)


def test_pruning_makes_fewer_parameters_and_macs_and_the_model_trains_on(tiny):
    model = tiny()
    params, macs = metrics.count_params(model), metrics.count_macs(model)
    pruning.prune(model, Prune(ratio=0.5, importance="l2"))
    assert metrics.count_params(model) < 0.7 * params and metrics.count_macs(model) < 0.7 * macs
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with_gradients(model)
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert model(models.example_input(model, 2)).isfinite().all()


def test_two_prunings_do_not_disturb_each_other(tiny):
    first, second = tiny(), tiny()
    pruning.prune(first, Prune(ratio=0.3, importance="l2"))
    pruning.prune(second, Prune(ratio=0.3, importance="l2"))
    images = models.example_input(first, 2)
    assert torch.equal(first(images), second(images))


def test_a_model_that_cannot_be_pruned_says_so_by_name_and_stays_as_it_is():
    model = models.build(Model(name="resnet18"), 10)
    before = metrics.count_params(model)
    with pytest.raises(InputError, match="resnet18 has no attention or MLP that can be pruned"):
        pruning.prune(model, Prune(ratio=0.3, importance="l2"))
    assert metrics.count_params(model) == before


@pytest.mark.parametrize("kwargs", [{"qk_norm": True}, {"scale_attn_norm": True}])
def test_an_attention_that_is_left_alone_is_named(tiny, kwargs):
    model = tiny(**kwargs)
    widths = [attention.attn_dim for attention in models.other_attentions(model).values()]
    with pytest.warns(UserWarning, match=r"\(Attention\) cannot be pruned yet and keep their width: blocks.0.attn"):
        changes = pruning.prune(model, Prune(ratio=0.3, importance="l2"))
    assert list(changes) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert [attention.attn_dim for attention in models.other_attentions(model).values()] == widths == [32, 32]


def test_a_ratio_beyond_what_the_layers_may_lose_is_an_error_with_the_largest_possible_one(tiny):
    # every layer keeps one channel (of each head): 2 · (2 + 1) of 2 · (32 + 64) stay, 96.9 % can go
    model = tiny()
    with pytest.raises(InputError, match="prune.ratio: 0.98 is more than this model can lose.*take 0.96 or less"):
        pruning.prune(model, Prune(ratio=0.98, importance="l2"))
    assert models.widths(model) == model.architecture["widths"] == models.widths(tiny())
    pruning.prune(model, Prune(ratio=0.96, importance="l2"))
    assert min(attention.head_dim for attention in models.attentions(model).values()) == 1


def test_a_ratio_that_removes_no_channel_is_an_error(tiny):
    with pytest.raises(InputError, match="prune.ratio: 0.001 removes less than one channel"):
        pruning.prune(tiny(), Prune(ratio=0.001, importance="l2"))


def test_taylor_without_gradients_is_an_error(tiny):
    with pytest.raises(InputError, match="prune.importance: taylor: the model has no gradients"):
        pruning.prune(tiny(), Prune(ratio=0.3))
