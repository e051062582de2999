"""Structural pruning of attention and MLP inner widths: the only door to torch_pruning.

A *prunable channel* is one of an attention's num_heads · head_dim inner channels or one of an MLP's hidden features.
torch-pruning's dependency graph says which layers a channel runs through, and its importances score them; what it
does not know about attention is here:

- Heads stay equally wide, because timm reshapes to (num_heads, head_dim). So an attention loses one channel of every
  head at a time, in each head the one that matters least there.
- A channel of q is tied to the same channel of k, a channel of v to the same input of proj, and the two pairs not to
  each other: they are chosen apart.
- The model was trained with the scale of its old head_dim. Fused attention takes its scale from the new one. Scaling
  q by √(new / old) keeps the product, so that the pruned model computes what the original computes with the removed
  channels zeroed, fused or not.
"""

import math
import warnings

import torch
import torch_pruning as tp
from timm.layers import Attention, Mlp
from torch import nn

from vitopt import model as models
from vitopt.recipe import InputError, Prune

# Magnitudes mean nothing across layers of different scale, so each layer's average is 1; Taylor scores are all in
# units of the loss and are compared as they are.
IMPORTANCES = {
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1, normalizer="mean"),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer="mean"),
    "taylor": lambda: tp.importance.GroupTaylorImportance(normalizer=None, multivariable=True),
}


def prune(model: nn.Module, section: Prune) -> dict[str, dict[str, int]]:
    """Remove a share of the model's prunable channels, in place, by one global ranking.

    Args:
        model: a model of vitopt (`model.architecture` is brought up to date), with the gradients of a loss where
            importance is taylor (`training.accumulate_gradients`).
        section: `ratio`, the share of all prunable channels removed, and `importance`.

    Returns:
        For each pruned module its number of inner channels `before` and `after`.

    Raises:
        InputError: nothing can be removed, or not so much; the model is as it was.
    """
    attentions, mlps = models.attentions(model), models.mlps(model)
    if not attentions and not mlps:
        raise InputError(unprunable(model))
    if section.importance == "taylor" and all(parameter.grad is None for parameter in model.parameters()):
        raise InputError("prune.importance: taylor: the model has no gradients: call training.accumulate_gradients "
                         "first, or take l2")
    if left := models.other_attentions(model):
        kinds = ", ".join(sorted({type(module).__name__ for module in left.values()}))
        warnings.warn(f"prune: these attentions ({kinds}) cannot be pruned yet and keep their width: {', '.join(left)}",
                      stacklevel=2)
    importance = IMPORTANCES[section.importance]()
    graph = _trace(model)
    scores = {name: _attention_scores(graph, attention, importance) for name, attention in attentions.items()}
    scores |= {name: _mlp_scores(graph, mlp, importance) for name, mlp in mlps.items()}
    removed_units = _rank(scores, section.ratio)
    changes = {}
    for name, count in removed_units.items():
        if name in attentions:
            before, after = _cut_attention(graph, attentions[name], scores[name], count)
        else:
            before, after = _cut_mlp(graph, mlps[name], scores[name], count)
        changes[name] = {"before": before, "after": after}
    model.zero_grad(set_to_none=True)
    model.architecture["widths"] = models.widths(model)
    return changes


def unprunable(model: nn.Module) -> str:
    """Why no channel of this model can be removed."""
    kinds = sorted({type(module).__name__ for module in models.other_attentions(model).values()})
    return (f"prune: {model.architecture['name']} has no attention or MLP that can be pruned yet"
            f" (its attention: {', '.join(kinds) or 'none'}): take a model of timm's vision_transformer or deit family")


def _trace(model: nn.Module) -> tp.DependencyGraph:
    unwrapped = [(parameter, parameter.dim() - 1) for parameter in model.parameters(recurse=False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces each parameter that is no layer's; none of them is cut here
        return tp.DependencyGraph().build_dependency(
            model.eval(), models.example_input(model), unwrapped_parameters=unwrapped)


def _attention_scores(graph: tp.DependencyGraph, attention: Attention, importance) -> torch.Tensor:
    """Scores of the two chosen pairs, (q with k) and (v with proj): (2, num_heads, head_dim)."""
    width = attention.attn_dim
    group = graph.get_pruning_group(attention.proj, tp.prune_linear_in_channels, list(range(width)))
    proj = next(item for item in group if item.dep.target.module is attention.proj)
    qkv = next(item for item in group if item.dep.target.module is attention.qkv)
    q, k, v = (_part(qkv, start, start + width) for start in (0, width, 2 * width))
    return torch.stack([importance([q, k]), importance([v, proj])]).view(2, attention.num_heads, attention.head_dim)


def _part(item, start: int, stop: int):
    """The part of a group's item whose indices lie in [start, stop)."""
    pairs = [(index, root) for index, root in zip(item.idxs, item.root_idxs) if start <= index < stop]
    part = type(item)(item.dep, [index for index, _ in pairs])
    part.root_idxs = [root for _, root in pairs]
    return part


def _mlp_scores(graph: tp.DependencyGraph, mlp: Mlp, importance) -> torch.Tensor:
    """Scores of the hidden features: (hidden_features,)."""
    return importance(graph.get_pruning_group(mlp.fc1, tp.prune_linear_out_channels, range(mlp.fc1.out_features)))


def _rank(scores: dict[str, torch.Tensor], ratio: float) -> dict[str, int]:
    """How many units each module loses when all are ranked together: head dims of an attention, hidden of an MLP.

    A head dim stands for one channel of every head, with their average score. The least units go first until the
    share of channels is reached; a head dim that would go past it is passed over for the next hidden feature. Every
    module keeps at least one unit.

    Raises:
        InputError: the ratio asks for less than one unit or for more than all that may go.
    """
    units, total = [], 0
    for name, score in scores.items():
        if score.dim() == 3:
            channels = score.shape[1]
            ranked = score.sort(dim=-1).values.mean(dim=(0, 1))
        else:
            channels = 1
            ranked = score.sort().values
        total += channels * len(ranked)
        units += [(value, name, channels) for value in ranked[:-1].tolist()]
    budget = round(ratio * total)
    removed = dict.fromkeys(scores, 0)
    for _, name, channels in sorted(units, key=lambda unit: unit[0]):
        if channels <= budget:
            removed[name] += 1
            budget -= channels
    if not any(removed.values()):
        raise InputError(f"prune.ratio: {ratio} removes less than one channel of this model: take a larger one")
    removable = sum(channels for _, _, channels in units)
    if removable < round(ratio * total):
        raise InputError(f"prune.ratio: {ratio} is more than this model can lose, for every layer keeps a channel (of "
                         f"each head): take {math.floor(100 * removable / total) / 100} or less")
    return removed


def _cut_attention(graph: tp.DependencyGraph, attention: Attention, scores: torch.Tensor, count: int):
    """Remove the `count` least channels of each head; the inner width before and after."""
    before, old = attention.attn_dim, attention.head_dim
    if count:
        heads = torch.arange(attention.num_heads, device=scores.device).unsqueeze(1) * old
        qk, v = (heads + pair.argsort(dim=-1)[:, :count] for pair in scores)
        qk, v = sorted(qk.flatten().tolist()), sorted(v.flatten().tolist())
        group = graph.get_pruning_group(attention.proj, tp.prune_linear_in_channels, v)
        for position, item in enumerate(group):
            if item.dep.target.module is attention.qkv:
                group[position] = type(item)(
                    item.dep, qk + [before + index for index in qk] + [2 * before + index for index in v])
        group.prune()
        models.set_head_dim(attention, old - count)
        with torch.no_grad():
            factor = math.sqrt(attention.head_dim / old)
            for parameter in filter(lambda p: p is not None, (attention.qkv.weight, attention.qkv.bias)):
                parameter[:attention.attn_dim] *= factor
    return before, attention.attn_dim


def _cut_mlp(graph: tp.DependencyGraph, mlp: Mlp, scores: torch.Tensor, count: int):
    """Remove the `count` least hidden features; their number before and after."""
    before = mlp.fc1.out_features
    if count:
        least = sorted(scores.argsort()[:count].tolist())
        graph.get_pruning_group(mlp.fc1, tp.prune_linear_out_channels, least).prune()
    return before, mlp.fc1.out_features
