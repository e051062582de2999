"""Structural pruning of any timm vision transformer: what is cut, how much of it, and what that left.

A *prunable channel* is one of an attention's num_heads · head_dim inner channels, one of the hidden features of an MLP
or of a convolutional block, or one of the embedding width. The pruned model computes what the original computes with
the removed channels zeroed, fused or not; where a normalisation runs over them, that norm sees the others alone.
"""

import copy
import fnmatch
import warnings
from typing import Callable

import torch
from torch import distributed, nn

from vitopt import layouts, metrics, model as models
from vitopt.errors import InputError
from vitopt.pruning import channels, depth, importance as scoring, repair
from vitopt.pruning.channels import EMBED, HEAD_DIM, HEADS, HIDDEN, Axis
from vitopt.recipe import Prune

DEPTH = "depth"
KINDS = {HEADS, HEAD_DIM, HIDDEN, EMBED, DEPTH}
TOLERANCE = 0.01  # of a target


def prune(model: nn.Module, section: Prune, calibration: scoring.Batches | None = None,
          example_inputs: torch.Tensor | None = None) -> dict:
    """Cut a model as a recipe's `prune` section says, in place.

    Args:
        model: any timm model, or one of vitopt (`model.architecture` is brought up to date).
        section: what, how much and by which ranking; see `recipe.Prune`.
        calibration: batches of images (batch, channels, height, width) and class indices (batch,), this process's
            share; what needs data needs it.
        example_inputs: one batch of the model's input, where its default_cfg does not tell.

    Returns:
        `axes`: by axis what was `before`, `after`, its `kind` and the `kept` indices of each group; an axis of which
        nothing went is there too. `params` and `macs`: each `before` and `after`. `asked` and `achieved`.

    Raises:
        InputError: nothing can be removed, or not so much, or the target is out of reach; the model is as it was.
    """
    models.describe_timm(model, example_inputs)
    if section.steps > 1:
        raise InputError(f"prune.steps: {section.steps} means training between the cuts: give recipes/run.py a recipe")
    if section.repair and calibration is None:
        raise InputError("prune.repair: true needs calibration images: give calibration=batches of images and labels")
    inputs = models.example_input(model) if example_inputs is None else example_inputs
    model.eval()
    axes, left = find_axes(model, section, inputs)
    before = _counts(model)
    name = section.importance or ("l2" if calibration is None else "taylor")
    weights = copy.deepcopy(model.state_dict()) if name == "gates" else None  # learning gates changes them
    scores = scoring.scores(model, axes, name, calibration)
    try:
        kept, whole, blocks, gone = _plan(model, section, axes, scores, calibration, inputs, before)
        after = _measured(model, axes, kept, gone, _counts)
    except InputError:
        if weights is not None:
            model.load_state_dict(weights)
        raise
    _refuse_disagreement(kept, gone)
    _warn_of_what_stays(whole, left)
    original = copy.deepcopy(model) if section.repair else None
    channels.cut(model, axes, kept)
    models.skip_blocks(model, gone)
    if section.repair:
        repair.solve(original, model, [axis for axis in axes if axis.name in kept], calibration)
    model.zero_grad(set_to_none=True)
    _record(model, axes, kept, gone)
    return {
        "axes": {axis.name: _change(axis, kept) for axis in axes} | ({DEPTH: {
            "kind": DEPTH, "before": len(blocks), "after": len(blocks) - len(gone), "removed": gone}} if gone else {}),
        "importance": name, "asked": section.ratio or section.target.model_dump(exclude_none=True),
        "achieved": _achieved(section, axes, kept, before, after),
        **{count: {"before": before[count], "after": after[count]} for count in before},
    }


def _plan(model: nn.Module, section: Prune, axes: list[Axis], scores: dict[str, torch.Tensor], calibration, inputs,
          before: dict[str, int]):
    """The channels that stay of each axis of which some go, the axes that stay whole, all blocks and those that go.

    Raises:
        InputError: nothing can be removed, or not so much, or the target is out of reach.
    """
    blocks = depth.influence(model, calibration, inputs) if _asks_for_depth(section) else {}
    if section.target:
        ratio, kept, gone = _solve(model, section, axes, scores, blocks, before)
    else:
        ratio = section.ratio
        kept, gone = _choose(section, axes, scores, blocks, ratio)
    whole = [axis.name for axis in axes if axis.name in kept and kept[axis.name].shape[1] == axis.size]
    kept = {name: keep for name, keep in kept.items() if name not in whole}
    if not kept and not gone:
        raise InputError(f"prune.ratio: {ratio} removes less than one channel of this model"
                         f"{_smallest_step(axes)}: take a larger one")
    return kept, whole, blocks, gone


def _refuse_disagreement(kept: dict[str, torch.Tensor], gone: list[str]) -> None:
    """Raise InputError on all processes where they have not chosen alike."""
    if not distributed.is_available() or not distributed.is_initialized():
        return
    choices = [None] * distributed.get_world_size()
    distributed.all_gather_object(choices, ({name: keep.tolist() for name, keep in kept.items()}, gone))
    if any(choice != choices[0] for choice in choices):
        raise InputError("prune: the processes would cut different channels, for their models or images differ: start "
                         "them from the same files, or take importance: l2")


def steps(model: nn.Module, section: Prune | None) -> list[Prune]:
    """The cuts, one after another, that come to what a section with `steps` asks: each takes the same share of what the
    one before has left. None without a section."""
    if section is None:
        return []
    count = section.steps
    if count == 1:
        return [section]

    def less(ratio):
        return 1 - (1 - ratio) ** (1 / count)

    if section.target:
        kind, wanted, _ = _target(section, before := _counts(model))
        share = min(wanted / before[kind], 0.999) ** (1 / count)
        change = {"target": section.target.model_copy(update={kind: share})}
    elif isinstance(section.ratio, dict):
        change = {"ratio": {key: less(ratio) for key, ratio in section.ratio.items()}}
    else:
        change = {"ratio": less(section.ratio)}
    return [section.model_copy(update=change | {"steps": 1})] * count


def find_axes(model: nn.Module, section: Prune, example_inputs: torch.Tensor) -> tuple[list[Axis], dict[str, str]]:
    """The axes that a section speaks of, and by module what has none and why.

    Without `axes`, an attention loses head dims, or whole heads where its head dims cannot be told apart, and every MLP
    and convolutional block hidden features.

    Raises:
        InputError: the model has none of them, or not one that is named.
    """
    wanted = set(section.axes or ()) | (_ratios(section).keys() & KINDS)
    by_default = not wanted or bool(_ratios(section).keys() - KINDS)  # a number, or layers by name
    found, left = channels.attention_axes(model)
    if by_default or HIDDEN in wanted:
        found += channels.hidden_axes(model, example_inputs)
    if EMBED in wanted:
        found.append(channels.embed_axis(model, example_inputs))
    for kind in sorted(wanted - {axis.kind for axis in found} - {DEPTH}):
        raise InputError(f"prune.axes: {kind}: {model.architecture['name']} has no such axis that can be cut"
                         f"{_reasons(left)}: it has {', '.join(sorted({axis.kind for axis in found})) or 'none'}")
    with_dims = {axis.module for axis in found if axis.kind == HEAD_DIM}
    axes = [axis for axis in found if axis.kind in wanted
            or by_default and (axis.kind != HEADS or axis.module not in with_dims)]
    device = next(model.parameters()).device
    for axis in axes:
        axis.step = 1 if axis.kind == HEADS else section.align or _step(axis, device)
    if not axes and DEPTH not in wanted:
        raise InputError(f"prune: {model.architecture['name']} has no attention, MLP or convolutional block that can "
                         f"be pruned{_reasons(left)}: take a vision transformer")
    return axes, left


def _reasons(left: dict[str, str]) -> str:
    return f" ({'; '.join(sorted(set(left.values())))})" if left else ""


def _ratios(section: Prune) -> dict[str, float]:
    return section.ratio if isinstance(section.ratio, dict) else {}


def _asks_for_depth(section: Prune) -> bool:
    return DEPTH in (section.axes or ()) or DEPTH in _ratios(section)


def _choose(section: Prune, axes: list[Axis], scores: dict[str, torch.Tensor], blocks: dict[str, float], ratio,
            at_most: bool = False) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The kept channels of each axis, and the blocks that go, at a ratio (or one for each axis or layer)."""
    share = ratio.get(DEPTH, 0) if isinstance(ratio, dict) else ratio
    gone = sorted(sorted(blocks, key=blocks.get)[:round(share * len(blocks))])
    staying = [axis for axis in axes if not any(f"{axis.module}.".startswith(f"{block}.") for block in gone)]
    kept = {}
    for share, pool in _pools(section, staying, ratio):
        for axis, size in zip(pool, _rank(pool, scores, share, at_most)):
            kept[axis.name] = strongest(scores[axis.name], _aligned(axis, size))
    return kept, gone


def _pools(section: Prune, axes: list[Axis], ratio) -> list[tuple[float, list[Axis]]]:
    """Which axes are ranked together, and the share that they lose together."""
    if isinstance(ratio, dict):
        pools = {}
        for axis in axes:
            keys = [key for key in ratio if key == axis.kind or fnmatch.fnmatchcase(axis.module, key)
                    or fnmatch.fnmatchcase(axis.name, key)]
            if keys:
                pools.setdefault(keys[-1], []).append(axis)
        for key in ratio.keys() - pools.keys() - {DEPTH}:
            example = axes[0].module if axes else "blocks.0.*"
            raise InputError(f"prune.ratio.{key}: names no axis and no layer of this model: take heads, head_dim, "
                             f"hidden, embed, depth or a pattern of names such as {example}")
        pools = [(ratio[key], pool) for key, pool in pools.items()]
    else:
        pools = [(ratio, axes)]
    split = {}
    for number, (share, pool) in enumerate(pools):
        for axis in pool:
            # A head is the average of its dims, and averages differ less than single channels: among these it would
            # never be the least. The embedding width is read by every layer.
            apart = axis.kind if axis.kind in (HEADS, EMBED) else None
            key = {"global": (number, apart), "local": axis.name, "isomorphic": (number, axis.structure)}
            split.setdefault(key[section.ranking], (share, []))[1].append(axis)
    return list(split.values())


def _rank(axes: list[Axis], scores: dict[str, torch.Tensor], ratio: float, at_most: bool) -> list[int]:
    """How many units each axis keeps when all are ranked together.

    A unit of several groups (a dim of every head) has their average score. The least units go first until the share
    of channels is reached; a unit that would go past it is passed over, a head only where that comes nearer. Every
    axis keeps at least one.

    Raises:
        InputError: the ratio asks for more than all that may go, and not for at most that.
    """
    units, total = [], 0
    for axis in axes:
        ranked = scores[axis.name].sort(dim=-1).values.mean(dim=0).tolist()
        total += axis.channels * axis.size
        units += [(value, position, axis) for position, value in enumerate(ranked[:-1])]
    budget = round(ratio * total)
    removable = sum(axis.channels for _, _, axis in units)
    if at_most:
        budget = min(budget, removable)
    elif removable < budget:
        raise InputError(f"prune.ratio: {ratio} is more than these layers can lose, for every layer keeps a channel "
                         f"(of each head): take {int(100 * removable / total) / 100} or less")
    sizes = {axis.name: axis.size for axis in axes}  # in the order of the axes
    for _, _, axis in sorted(units, key=lambda unit: unit[0]):
        if axis.channels <= budget or axis.kind == HEADS and axis.channels <= 2 * budget:
            sizes[axis.name] -= 1
            budget -= axis.channels
    return list(sizes.values())


def _aligned(axis: Axis, size: int) -> int:
    """The nearest multiple of the axis's step, at least one of them, at most what is there."""
    if size == axis.size:
        return size
    return max(min(axis.step, axis.size), min(axis.size, round(size / axis.step) * axis.step))


def _step(axis: Axis, device: torch.device) -> int:
    """The multiples that the kernels of a device like.

    Head dims go in 8, as every fast attention kernel wants. Other widths go in 8, and where they are wide enough not to
    miss it in 32, or on a GPU in 64, the 128 bytes of 16-bit numbers that its matrix units take at once (NVIDIA, Matrix
    Multiplication Background User's Guide, section 4). Layers that are narrow themselves go in finer steps.
    """
    steps = {1024: 64 if device.type == "cuda" else 32, 512: 32, 32: 8, 16: 4, 0: 1}
    if axis.kind == HEAD_DIM:
        steps = {32: 8, 16: 4, 0: 1}
    return next(step for least, step in steps.items() if axis.size >= least)


def strongest(score: torch.Tensor, size: int) -> torch.Tensor:
    """The channels of each group with the highest scores, ascending."""
    return score.argsort(dim=-1, stable=True)[:, score.shape[1] - size:].sort(dim=-1).values


def _smallest_step(axes: list[Axis]) -> str:
    return "" if not axes else f" (its layers go in steps of {min(axis.channels for axis in axes)} channels, aligned)"


def _solve(model: nn.Module, section: Prune, axes, scores, blocks, before: dict[str, int]):
    """The ratio at which copies of the model meet the target, by bisection.

    Raises:
        InputError: it is out of reach, with the nearest that can be had.
    """
    kind, wanted, measure = _target(section, before)
    shape = model
    if kind != "latency_ms" and (without_weights := _without_weights(model, before)):
        shape, measure = without_weights, {"macs": metrics.macs_of_shapes, "params": metrics.count_params}[kind]

    if wanted >= (now := measure(shape)):
        raise InputError(f"prune.target.{kind}: {_plain(wanted)} is no less than the {_plain(now)} that the model has: "
                         "ask for less")

    def attempt(ratio):
        kept, gone = _choose(section, axes, scores, blocks, ratio, at_most=True)
        return _measured(shape, axes, kept, gone, measure), ratio, kept, gone

    low, high = 0.0, 0.999
    best = least = attempt(high)
    if least[0] > wanted * (1 + TOLERANCE):
        raise InputError(f"prune.target.{kind}: {_plain(wanted)} is out of reach: with as much removed as can be "
                         f"it is {_plain(least[0])}: take that or more, or more axes")
    for _ in range(14):
        tried = attempt((low + high) / 2)
        if abs(tried[0] - wanted) < abs(best[0] - wanted):
            best = tried
        if abs(best[0] / wanted - 1) < TOLERANCE / 4:
            break
        low, high = (low, tried[1]) if tried[0] < wanted else (tried[1], high)
    if abs(best[0] / wanted - 1) > TOLERANCE:
        warnings.warn(f"prune.target.{kind}: {_plain(wanted)} was asked; {_plain(best[0])} is the nearest that aligned "
                      "widths allow: align: 1 comes nearer", stacklevel=3)
    return best[1:]


def _target(section: Prune, before: dict[str, int]) -> tuple[str, float, Callable]:
    target = section.target
    if target.latency_ms:
        return "latency_ms", target.latency_ms, lambda model: metrics.quick_latency_ms(model, target.batch_size)
    kind = "macs" if target.macs else "params"
    wanted = getattr(target, kind)
    count = {"macs": metrics.count_macs, "params": metrics.count_params}[kind]
    return kind, wanted * before[kind] if wanted < 1 else wanted, count


def _without_weights(model: nn.Module, before: dict[str, int]) -> nn.Module | None:
    """A copy that has shapes alone, which is counted in a fraction of the time; None where it counts otherwise."""
    shape = copy.deepcopy(model).to("meta")
    try:
        return shape if metrics.macs_of_shapes(shape) == before["macs"] else None
    except (RuntimeError, NotImplementedError, AssertionError):  # an operation that the meta device does not have
        return None


def _plain(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _counts(model: nn.Module) -> dict[str, int]:
    return {"params": metrics.count_params(model), "macs": metrics.count_macs(model)}


def _measured(model: nn.Module, axes: list[Axis], kept: dict[str, torch.Tensor], gone: list[str], measure: Callable):
    """What a copy of the model is once it is cut: the model itself stays whole, also if that fails.

    Raises:
        InputError: the model does not run without these channels.
    """
    smaller = copy.deepcopy(model)
    try:
        channels.cut(smaller, axes, kept)
        models.skip_blocks(smaller, gone)
        return measure(smaller)  # counting MACs runs it
    except (RuntimeError, AssertionError, ValueError) as error:
        kinds = ", ".join(sorted({axis.kind for axis in axes if axis.name in kept}))
        raise InputError(f"prune: {model.architecture['name']} does not run with {kinds} cut "
                         f"({' '.join(str(error).split())[:200]}): name other axes") from error


def _change(axis: Axis, kept: dict[str, torch.Tensor]) -> dict:
    keep = kept.get(axis.name)
    return {"kind": axis.kind, "before": axis.size * axis.channels,
            "after": axis.channels * (axis.size if keep is None else keep.shape[1]),
            "kept": None if keep is None else keep.tolist()}


def _achieved(section: Prune, axes: list[Axis], kept: dict[str, torch.Tensor], before, after):
    if section.target:
        kind = next(iter(section.target.model_dump(exclude_none=True)))
        return {kind: after[kind]} if kind in after else None
    total = sum(axis.channels * axis.size for axis in axes)
    gone = sum(axis.channels * (axis.size - kept[axis.name].shape[1]) for axis in axes if axis.name in kept)
    return gone / total if total else 0.0


def _warn_of_what_stays(whole: list[str], left: dict[str, str]) -> None:
    for reason in dict.fromkeys(left.values()):
        names = [name for name, other in left.items() if other == reason]
        warnings.warn(f"prune: {', '.join(names)} keep their width: {reason}", stacklevel=3)
    if whole:
        warnings.warn(f"prune: nothing goes from {', '.join(whole)} at this ratio", stacklevel=3)


def _record(model: nn.Module, axes: list[Axis], kept: dict[str, torch.Tensor], gone: list[str]) -> None:
    """Bring `model.architecture` up to date: the widths of what was cut, and the blocks that went."""
    architecture = model.architecture
    architecture["widths"] = models.widths(model) | {
        axis.module: architecture["widths"].get(axis.module, {}) | {"hidden_features": kept[axis.name].shape[1]}
        for axis in axes if axis.kind == HIDDEN and axis.name in kept and axis.letter == "f"
        and layouts.find(model.get_submodule(axis.module)) is None}
    if gone:
        architecture["removed_blocks"] = sorted({*architecture.get("removed_blocks", []), *gone})
