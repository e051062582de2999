"""That a cut was right: the pruned model against the original with the removed channels zeroed.

A wrong layout (heads in the wrong order, a scale of another head_dim, a table cut along the wrong axis) gives a model
that runs and trains; only this comparison tells.
"""

import copy

import torch
from torch import nn

from vitopt import layouts, model as models
from vitopt.pruning import channels
from vitopt.pruning.channels import EMBED, HIDDEN, Axis


def difference(original: nn.Module, pruned: nn.Module, changes: dict, images: torch.Tensor) -> float:
    """The largest difference of the outputs, relative to the largest output of the zeroed original.

    Args:
        original: the model before the cut, with the same weights. pruned: after it, without training or repair.
        changes: what `prune` returned.
        images: (batch, channels, height, width).
    """
    return distance(reference(original, changes, images), pruned, images)


def reference(original: nn.Module, changes: dict, images: torch.Tensor) -> nn.Module:
    """The original with what `changes` removed zeroed.

    Where a norm runs over channels that were removed, it is taken over the others alone: the pruned model cannot do
    otherwise, and all else is still compared.
    """
    kinds = {change["kind"] for change in changes["axes"].values()}
    axes = channels.attention_axes(original)[0]
    axes += channels.hidden_axes(original, images[:1]) if HIDDEN in kinds else []
    axes += [channels.embed_axis(original, images[:1])] if EMBED in kinds else []
    axes = {axis.name: axis for axis in axes}
    kept = {name: torch.tensor(change["kept"]) for name, change in changes["axes"].items() if change.get("kept")}
    zeroed = zero(original, [axes[name] for name in kept], kept)
    models.skip_blocks(zeroed, changes["axes"].get("depth", {}).get("removed", []))
    return zeroed.eval()


@torch.no_grad()
def distance(expected: nn.Module, got: nn.Module, images: torch.Tensor) -> float:
    """The largest difference of two models' outputs, relative to the largest output of the first."""
    expected, got = _first(expected(images)), _first(got.eval()(images))
    return ((got - expected).abs().max() / expected.abs().max()).item()


def zero(original: nn.Module, axes: list[Axis], kept: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of a model with the removed channels zeroed, and its norms over them restricted to the kept ones."""
    zeroed = copy.deepcopy(original)
    tensors = dict(zeroed.named_parameters()) | dict(zeroed.named_buffers())
    with torch.no_grad():
        for (name, dim), keep in channels.kept_indices(original, axes, kept).items():
            gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
            gone[keep] = False
            owner = zeroed.get_submodule(name.rpartition(".")[0])
            if name.endswith(".weight") and tensors[name].dim() == 1 and not isinstance(
                    owner, nn.modules.batchnorm._BatchNorm) and "Norm" in type(owner).__name__:
                owner.register_forward_hook(_restricted(copy.deepcopy(owner), keep))
            tensors[name].index_fill_(dim, torch.nonzero(gone).flatten(), 0)
    return zeroed


def _restricted(norm: nn.Module, keep: torch.Tensor):
    """A hook that computes a norm over some of its channels and leaves the others zero."""
    width = len(norm.weight)
    for name in layouts.channel_tensors(norm):
        tensor = getattr(norm, name)[keep]
        setattr(norm, name, nn.Parameter(tensor) if isinstance(getattr(norm, name), nn.Parameter) else tensor)
    layouts.fit(norm)

    def hook(module, args, output):
        channel = args[0].dim() - 1 if args[0].shape[-1] == width else 1
        part = norm(args[0].index_select(channel, keep))
        return torch.zeros_like(output).index_copy(channel, keep, part)

    return hook


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
