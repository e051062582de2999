import copy

import pytest
import torch
import torch_pruning as tp
from torch.nn import functional as F

import vitopt
from vitopt import metrics, model as models, pruning
from vitopt.errors import InputError
from vitopt.pruning import channels, importance as scoring, proof
from vitopt.recipe import Model, Prune


def batches(model, count=2, images=8):
    """Calibration images that are the same each time."""
    generator = torch.Generator().manual_seed(1)
    size = model.architecture["input"]
    return [(torch.randn(images, size["channels"], size["height"], size["width"], generator=generator),
             torch.randint(0, 10, (images,), generator=generator)) for _ in range(count)]


def axes_of(model, **options):
    options = options if {"ratio", "target"} & options.keys() else options | {"ratio": 0.5}
    return {axis.name: axis for axis in pruning.find_axes(model, Prune(**options), models.example_input(model))[0]}


def fuse(model, fused):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kwargs", [
    {}, {"qkv_bias": False}, {"class_token": False, "global_pool": "avg"}, {"init_values": 0.1}, {"reg_tokens": 2},
    {"num_heads": 4, "embed_dim": 48}, {"qk_norm": True}, {"scale_attn_norm": True}, {"scale_mlp_norm": True},
])
@pytest.mark.parametrize("options", [
    {}, {"axes": ["heads"]}, {"axes": ["hidden"]}, {"axes": ["embed"]}, {"axes": ["depth"]},
    {"axes": ["heads", "hidden", "embed", "depth"]},
])
def test_a_pruned_model_computes_what_the_original_computes_with_the_removed_channels_zeroed(
        tiny, kwargs, options, fused):
    original = tiny(**kwargs)
    pruned = copy.deepcopy(original)
    changes = pruning.prune(pruned, Prune(ratio=0.4, align=1, **options), batches(original))
    fuse(original, fused), fuse(pruned, fused)
    images = models.example_input(original, 4)
    assert proof.difference(original, pruned, changes, images) < 1e-5
    assert (original(images) - pruned(images)).norm() / original(images).norm() > 1e-2  # something that mattered went


def test_the_proof_counts_by_hand_what_zeroing_a_head_and_a_hidden_feature_is(tiny):
    original = tiny()
    pruned = copy.deepcopy(original)
    changes = pruning.prune(pruned, Prune(ratio={"heads": 0.5, "hidden": 0.01}, importance="l2", align=1))
    zeroed = copy.deepcopy(original)
    with torch.no_grad():
        for block, name in zip(zeroed.blocks, ("blocks.0", "blocks.1")):
            kept = changes["axes"][f"{name}.attn.heads"]["kept"]
            if kept:
                block.attn.proj.weight[:, (slice(0, 16), slice(16, 32))[1 - kept[0][0]]] = 0
            kept = changes["axes"][f"{name}.mlp.hidden"]["kept"]
            if kept:
                block.mlp.fc2.weight[:, sorted({*range(64)} - {*kept[0]})] = 0
    images = models.example_input(original, 3)
    torch.testing.assert_close(pruned(images), zeroed(images), rtol=1e-5, atol=1e-5)


def test_the_proof_fails_where_a_head_was_cut_in_the_wrong_order(tiny):
    original = tiny()
    pruned = copy.deepcopy(original)
    changes = pruning.prune(pruned, Prune(ratio=0.4, importance="l2"))
    with torch.no_grad():
        pruned.blocks[0].attn.proj.weight.copy_(pruned.blocks[0].attn.proj.weight.flip(1))
    assert proof.difference(original, pruned, changes, models.example_input(original)) > 1e-3


def test_fused_and_unfused_attention_agree_after_pruning(tiny):
    model = tiny()
    pruning.prune(model, Prune(ratio=0.5, importance="l2"))
    images = models.example_input(model, 4)
    fused = model(images)
    for block in model.blocks:
        assert block.attn.scale == block.attn.head_dim ** -0.5
    fuse(model, False)
    torch.testing.assert_close(model(images), fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.8])
def test_the_ratio_is_the_share_of_channels_that_is_removed(tiny, ratio):
    changes = pruning.prune(tiny(), Prune(ratio=ratio, importance="l2", align=1))
    total = sum(change["before"] for change in changes["axes"].values())
    removed = total - sum(change["after"] for change in changes["axes"].values())
    assert total == 2 * (32 + 64) and removed == round(ratio * total)
    assert changes["asked"] == ratio and changes["achieved"] == pytest.approx(removed / total)


def test_the_global_ranking_takes_more_from_the_weaker_block_and_the_local_one_as_much_from_each(tiny):
    def weak(spread, block):
        # hidden features that differ strongly, so that the weak half is far below the average
        scale = torch.linspace(-spread, 0, 64).exp().unsqueeze(1)
        with torch.no_grad():
            block.mlp.fc1.weight.copy_(torch.ones_like(block.mlp.fc1.weight) * scale)
            block.mlp.fc2.weight.copy_((torch.ones_like(block.mlp.fc2.weight).t() * scale).t())

    after = {}
    for ranking in ("global", "local", "isomorphic"):
        model = tiny()
        weak(3.0, model.blocks[0]), weak(0.0, model.blocks[1])
        changes = pruning.prune(model, Prune(ratio=0.25, importance="l2", ranking=ranking, align=1))
        after[ranking] = [changes["axes"][f"blocks.{block}.mlp.hidden"]["after"] for block in (0, 1)]
        weights = model.blocks[0].mlp.fc1.weight
        assert weights.mean(1).diff().min() >= 0  # what is left are the strong ones, in their order
    assert after == {"global": [pytest.approx(20, abs=12), 64], "local": [48, 48], "isomorphic": [32, 64]}


def test_a_ratio_for_each_axis_or_layer_is_kept_apart(tiny):
    changes = pruning.prune(tiny(), Prune(ratio={"hidden": 0.5, "blocks.1.mlp": 0.25, "blocks.0.attn": 0.5},
                                          importance="l2", align=1))["axes"]
    assert changes["blocks.0.mlp.hidden"]["after"] == 32 and changes["blocks.1.mlp.hidden"]["after"] == 48
    with pytest.raises(InputError, match="prune.ratio.blocks.7: names no axis and no layer of this model"):
        pruning.prune(tiny(), Prune(ratio={"blocks.7": 0.5}, importance="l2"))


def test_magnitude_and_taylor_scores_equal_a_count_by_hand_and_torch_prunings(tiny):
    model = tiny()
    axes = axes_of(model)
    block = model.blocks[0]
    found = scoring.scores(model, list(axes.values()), "l2", None)
    q, k, v = block.attn.qkv.weight.pow(2).sum(1).view(3, 2, 16)
    proj = block.attn.proj.weight.pow(2).sum(0).view(2, 16)
    expected = torch.cat([(q + k) / (q + k).mean(), (v + proj) / (v + proj).mean()])
    torch.testing.assert_close(found["blocks.0.attn.head_dim"], expected)
    hidden = block.mlp.fc1.weight.pow(2).sum(1) + block.mlp.fc2.weight.pow(2).sum(0)
    torch.testing.assert_close(found["blocks.0.mlp.hidden"][0], hidden / hidden.mean())

    found = scoring.scores(model, list(axes.values()), "taylor", batches(model))
    loss = sum(F.cross_entropy(model(images), targets) for images, targets in batches(model)) / 2
    loss.backward()
    q, k, v = (block.attn.qkv.weight * block.attn.qkv.weight.grad).sum(1).abs().view(3, 2, 16)
    torch.testing.assert_close(found["blocks.0.attn.head_dim"][:2], (q + k) / 2)
    graph = channels.trace(block.mlp, torch.randn(1, 4, 32))
    group = graph.get_pruning_group(block.mlp.fc1, tp.prune_linear_out_channels, list(range(64)))
    theirs = tp.importance.GroupTaylorImportance(normalizer=None, multivariable=True)(group)
    torch.testing.assert_close(found["blocks.0.mlp.hidden"][0], theirs)


def test_fisher_and_activation_scores_equal_a_count_by_hand(tiny):
    model = tiny()
    axes = [axes_of(model)["blocks.1.mlp.hidden"]]
    mlp, seen, fisher = model.blocks[1].mlp, [], 0
    hook = mlp.fc2.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    for images, targets in batches(model):
        model.zero_grad()
        F.cross_entropy(model(images), targets, reduction="sum").backward()
        parts = [(mlp.fc1.weight * mlp.fc1.weight.grad).sum(1).abs(),
                 (mlp.fc2.weight * mlp.fc2.weight.grad).sum(0).abs()]
        fisher = fisher + (sum(parts) / 2) ** 2 / 16
    hook.remove()
    torch.testing.assert_close(scoring.scores(model, axes, "hessian", batches(model))["blocks.1.mlp.hidden"][0], fisher)
    expected = torch.cat(seen).flatten(0, 1).pow(2).mean(0).sqrt() * mlp.fc2.weight.norm(dim=0)
    found = scoring.scores(model, axes, "activation", batches(model))["blocks.1.mlp.hidden"][0]
    torch.testing.assert_close(found, expected / expected.mean())


def test_gates_are_learned_folded_into_the_weights_and_leave_no_trace(tiny):
    model = tiny()
    names, before = {name for name, _ in model.named_parameters()}, copy.deepcopy(model)
    axes = list(axes_of(model).values())

    def loss():
        return sum(F.cross_entropy(model(images), targets).item() for images, targets in batches(model))

    start = loss()
    scoring.scores(model, axes, "gates", batches(model) * 10)
    assert loss() < 0.95 * start  # the gates learned, and what they learned is in the weights
    assert {name for name, _ in model.named_parameters()} == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all("Parametrized" not in type(module).__name__ for module in model.modules())
    ratio = model.blocks[1].mlp.fc2.weight / before.blocks[1].mlp.fc2.weight
    torch.testing.assert_close(ratio, ratio[:1].expand(32, 64), rtol=1e-4, atol=1e-4)  # one factor a hidden feature
    assert (ratio[0] - 1).abs().max() > 0.05 and torch.equal(model.head.weight, before.head.weight)


def test_a_target_out_of_reach_leaves_the_model_alone_after_gates_were_learned_too(tiny):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="out of reach"):
        pruning.prune(model, Prune(target={"params": 100}, importance="gates"), batches(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor", "hessian", "activation", "gates", "random"])
@pytest.mark.parametrize("ranking", ["global", "local", "isomorphic"])
def test_every_importance_prunes_with_every_ranking(tiny, importance, ranking):
    model = tiny()
    changes = pruning.prune(model, Prune(ratio=0.5, importance=importance, ranking=ranking), batches(model))
    assert changes["importance"] == importance and changes["macs"]["after"] < changes["macs"]["before"]
    assert model(models.example_input(model)).isfinite().all()


@pytest.mark.parametrize("target", [{"macs": 0.6}, {"params": 0.5}, {"macs": 130_000}, {"params": 12_000}])
def test_a_budget_is_met_within_one_percent_where_widths_need_no_alignment(tiny, target):
    model = tiny(mlp_ratio=4.0, embed_dim=48)
    before = {"macs": metrics.count_macs(model), "params": metrics.count_params(model)}
    kind, wanted = next(iter(target.items()))
    wanted = wanted * before[kind] if wanted < 1 else wanted
    changes = pruning.prune(model, Prune(target=target, importance="l2", align=1))
    after = {"macs": metrics.count_macs(model), "params": metrics.count_params(model)}
    assert after[kind] == pytest.approx(wanted, rel=0.02) and changes["achieved"] == {kind: after[kind]}


def test_a_latency_budget_makes_the_model_faster(tiny, monkeypatch):
    model = tiny()
    # a clock that counts operations: the machine's own would make the test as noisy as it is
    monkeypatch.setattr(metrics, "quick_latency_ms", lambda model, batch_size: metrics.count_macs(model) / 1e5)
    before = metrics.count_macs(model) / 1e5
    pruning.prune(model, Prune(target={"latency_ms": 0.7 * before}, importance="l2", align=1))
    assert metrics.count_macs(model) / 1e5 == pytest.approx(0.7 * before, rel=0.02)


def test_a_budget_out_of_reach_is_an_error_with_the_nearest_and_leaves_the_model_alone(tiny):
    model = tiny()
    params = metrics.count_params(model)
    with pytest.raises(InputError, match=r"prune.target.params: 100 is out of reach: .* it is [\d,]+: take that or"):
        pruning.prune(model, Prune(target={"params": 100}, importance="l2"))
    assert metrics.count_params(model) == params


def test_widths_are_aligned_for_fast_kernels_unless_told_otherwise(tiny):
    wide = {"embed_dim": 64, "mlp_ratio": 8.0}
    model = tiny(**wide)
    pruning.prune(model, Prune(ratio=0.37, importance="l2"))
    assert {block.attn.head_dim % 8 for block in model.blocks} == {0} == {
        block.mlp.fc1.out_features % 32 for block in model.blocks}
    model = tiny(**wide)
    pruning.prune(model, Prune(ratio=0.37, importance="l2", align=1))
    assert any(block.mlp.fc1.out_features % 8 for block in model.blocks)


@pytest.mark.parametrize("device, kind, size, step", [
    ("cpu", "hidden", 3072, 32), ("cuda", "hidden", 3072, 64), ("cuda", "hidden", 512, 32), ("cuda", "head_dim", 64, 8),
    ("cpu", "hidden", 20, 4), ("cpu", "head_dim", 8, 1), ("cuda", "embed", 1024, 64)])
def test_without_align_the_device_and_the_width_say_in_what_steps_a_width_goes(device, kind, size, step):
    assert pruning._step(pruning.Axis("m", kind, "f", size, 1), torch.device(device)) == step


def test_repair_brings_the_output_nearer_to_the_originals(tiny):
    errors = {}
    for repair in (False, True):
        original = tiny()
        model = copy.deepcopy(original)
        data = batches(original, count=4, images=32)
        pruning.prune(model, Prune(ratio=0.4, importance="l2", repair=repair), data)
        images = data[0][0]
        errors[repair] = (model(images) - original(images)).norm().item()
    assert errors[True] < 0.7 * errors[False]


def test_repair_of_one_layer_is_the_least_squares_solution(tiny):
    original = tiny()
    model = copy.deepcopy(original)
    data = batches(original, count=4, images=32)
    kept = pruning.prune(model, Prune(ratio={"blocks.1.mlp": 0.5}, importance="l2", repair=True, align=1), data)
    kept = kept["axes"]["blocks.1.mlp.hidden"]["kept"][0]
    seen = []
    hook = original.blocks[1].mlp.fc2.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for images, _ in data:
            original(images)
    hook.remove()
    inputs = torch.cat([given for given, _ in seen]).flatten(0, 1)[:, kept]
    outputs = torch.cat([said for _, said in seen]).flatten(0, 1)
    with_bias = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    least = (with_bias @ torch.linalg.lstsq(with_bias, outputs).solution - outputs).norm()
    repaired = (model.blocks[1].mlp.fc2(inputs) - outputs).norm()
    untouched = (F.linear(inputs, original.blocks[1].mlp.fc2.weight[:, kept], original.blocks[1].mlp.fc2.bias)
                 - outputs).norm()
    assert least <= repaired < 1.02 * least < 0.8 * untouched


def test_steps_come_to_the_whole_ratio_or_target(tiny):
    model = tiny()
    assert pruning.steps(model, None) == [] and pruning.steps(model, whole := Prune(ratio=0.3)) == [whole]
    cuts = pruning.steps(model, Prune(ratio={"hidden": 0.5}, importance="l2", align=1, steps=2))
    assert [pruning.prune(model, cut)["axes"]["blocks.0.mlp.hidden"]["after"] + model.blocks[1].mlp.fc1.out_features
            for cut in cuts] == [pytest.approx(128 * 0.5 ** 0.5, abs=1), pytest.approx(64, abs=1)]
    for target in ({"macs": 0.6}, {"macs": 0.6 * metrics.count_macs(tiny())}):
        model = tiny()
        for cut in pruning.steps(model, Prune(target=target, importance="l2", align=1, steps=3)):
            pruning.prune(model, cut)
        assert metrics.count_macs(model) == pytest.approx(0.6 * metrics.count_macs(tiny()), rel=0.02)
    with pytest.raises(InputError, match="prune.steps: 2 means training between the cuts"):
        pruning.prune(model, Prune(ratio=0.5, steps=2))


def test_depth_removes_the_blocks_that_change_their_tokens_least(tiny):
    model = tiny(depth=4)
    with torch.no_grad():
        model.blocks[2].attn.proj.weight.mul_(1e-3), model.blocks[2].attn.proj.bias.zero_()
        model.blocks[2].mlp.fc2.weight.mul_(1e-3), model.blocks[2].mlp.fc2.bias.zero_()
    changes = pruning.prune(model, Prune(ratio={"depth": 0.25}), batches(model))
    assert changes["axes"]["depth"]["removed"] == ["blocks.2"] == model.architecture["removed_blocks"]


def test_pruning_makes_fewer_parameters_and_macs_and_the_model_trains_on(tiny):
    model = tiny()
    params, macs = metrics.count_params(model), metrics.count_macs(model)
    changes = pruning.prune(model, Prune(ratio=0.5, importance="l2"))
    assert changes["params"] == {"before": params, "after": metrics.count_params(model)}
    assert changes["macs"] == {"before": macs, "after": metrics.count_macs(model)}
    assert metrics.count_params(model) < 0.7 * params and metrics.count_macs(model) < 0.7 * macs
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    F.cross_entropy(model(models.example_input(model, 8)), torch.arange(8)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert model(models.example_input(model, 2)).isfinite().all()


def test_two_prunings_do_not_disturb_each_other_and_a_pruned_model_can_be_pruned_again(tiny, tmp_path):
    first, second = tiny(), tiny()
    pruning.prune(first, Prune(ratio=0.3, importance="l2"))
    pruning.prune(second, Prune(ratio=0.3, importance="l2"))
    images = models.example_input(first, 2)
    assert torch.equal(first(images), second(images))
    before = copy.deepcopy(first)
    changes = pruning.prune(first, Prune(ratio=0.5, importance="l2", align=1, axes=["heads", "hidden", "embed"]))
    assert proof.difference(before, first, changes, images) < 1e-5
    models.save(first, tmp_path)
    assert torch.equal(models.load(tmp_path)(images), first(images))


@pytest.mark.parametrize("name, kwargs, said", [
    ("vit_srelpos_small_patch16_224", {"img_size": 32, "depth": 2}, "prune.axes: heads: .* has no such axis"),
    ("vit_small_patch16_rope_mixed_224", {"img_size": 32, "depth": 2}, "AttentionRope: its heads share one table"),
])
def test_a_family_that_cannot_lose_an_axis_says_so_by_name_before_anything_is_touched(name, kwargs, said):
    model = models.build(Model(name=name, **kwargs), 10)
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=said):
        pruning.prune(model, Prune(ratio=0.5, axes=["heads", "hidden"], importance="l2"))
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


def test_an_attention_that_keeps_its_width_is_named(tiny):
    model = models.build(Model(name="vit_small_patch16_rope_mixed_224", img_size=32, depth=2), 10)
    with pytest.warns(UserWarning, match="blocks.0.attn, blocks.1.attn keep their width: AttentionRope: its heads"):
        changes = pruning.prune(model, Prune(ratio=0.3, importance="l2"))
    assert list(changes["axes"]) == ["blocks.0.mlp.hidden", "blocks.1.mlp.hidden"]


def test_a_layer_of_which_nothing_goes_is_named(tiny):
    model = tiny()
    with torch.no_grad():  # the second block is far stronger in everything
        model.blocks[1].mlp.fc1.weight.fill_(1.0), model.blocks[1].mlp.fc2.weight.fill_(1.0)
    with pytest.warns(UserWarning, match="prune: nothing goes from blocks.1.mlp.hidden at this ratio"):
        pruning.prune(model, Prune(ratio={"hidden": 0.1}, importance="l2", align=1))


def test_a_ratio_beyond_what_the_layers_may_lose_is_an_error_with_the_largest_possible_one(tiny):
    # every layer keeps one channel (of each head): 2 · (2 + 1) of 2 · (32 + 64) stay, 96.9 % can go
    model = tiny()
    with pytest.raises(InputError, match="prune.ratio: 0.98 is more than these layers can lose.*take 0.96 or less"):
        pruning.prune(model, Prune(ratio=0.98, importance="l2", align=1))
    assert models.widths(model) == model.architecture["widths"] == models.widths(tiny())
    pruning.prune(model, Prune(ratio=0.96, importance="l2", align=1))
    assert min(block.attn.head_dim for block in model.blocks) == 1


@pytest.mark.parametrize("options, said", [
    ({"ratio": 1.5}, "prune.ratio: 1.5 is no share between 0 and 1"),
    ({"ratio": {"hidden": 0}}, "prune.ratio: 0 is no share between 0 and 1"),
    ({}, "prune: give exactly one of ratio and target"),
    ({"ratio": 0.3, "target": {"macs": 0.5}}, "prune: give exactly one of ratio and target"),
    ({"target": {}}, "prune.target: give exactly one of macs, params and latency_ms"),
    ({"target": {"macs": 1e9}}, r"prune.target.macs: 1,000,000,000 is no less than the [\d,]+ that the model has"),
    ({"ratio": 0.3, "axes": ["headz"]}, "prune.axes.0: 'headz' should be"),
    ({"ratio": 0.3, "impotance": "l2"}, "prune.impotance: unknown key; did you mean importance?"),
    ({"ratio": 0.001}, "prune.ratio: 0.001 removes less than one channel"),
    ({"ratio": 0.3, "importance": "taylor"}, "prune.importance: taylor needs calibration images"),
    ({"ratio": 0.3, "repair": True}, "prune.repair: true needs calibration images"),
    ({"ratio": 0.3, "calibration": [(torch.randn(2, 1, 20, 20), torch.tensor([0, 1]))]},
     r"calibration: images of shape \(2, 1, 20, 20\) do not fit the model"),
    ({"ratio": 0.3, "calibration": []}, "calibration: holds no images"),
])
def test_bad_input_from_python_is_one_line_and_leaves_the_model_alone(tiny, options, said):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said) as error:
        vitopt.prune(model, **options)
    assert len(str(error.value).splitlines()) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_timm_made_is_pruned_and_saved_without_vitopts_help(tmp_path):
    import timm
    model = timm.create_model("test_vit", num_classes=7)
    changes = vitopt.prune(model, 0.5)
    assert changes["params"]["after"] < 0.75 * changes["params"]["before"]
    vitopt.save(model, tmp_path)
    images = models.example_input(model, 2)
    assert torch.equal(vitopt.load(tmp_path)(images), model(images))


def test_arguments_that_timm_does_not_keep_are_an_error_that_says_how_to_keep_them(tmp_path):
    import timm
    model = timm.create_model("test_vit", num_classes=7, depth=3)
    vitopt.prune(model, 0.5)
    with pytest.raises(ValueError, match="test_vit was made with arguments that timm does not keep.*create_model"):
        vitopt.save(model, tmp_path)
    kept = vitopt.create_model("test_vit", num_classes=7, depth=3)
    vitopt.save(kept, tmp_path)
