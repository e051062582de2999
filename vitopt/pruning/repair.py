"""After the cut: the layers that read what is left are solved again, so that they say what they said before."""

import torch
from torch import nn

from vitopt.pruning.channels import Axis

RIDGE = 1e-3  # of the mean square of the inputs: keeps the solution tame where channels repeat one another
IMAGES = 512


class _Reached(Exception):
    """The layer has been reached: the rest of the forward pass is not needed."""


@torch.no_grad()
def solve(original: nn.Module, pruned: nn.Module, axes: list[Axis], batches) -> None:
    """Solve every layer that reads cut channels again by least squares, in the order of the forward pass.

    For inputs X (tokens, channels kept) of the pruned model and outputs Y (tokens, out) of the original layer on the
    same images: W, b = argmin ‖X Wᵀ + b − Y‖² + λ‖W − W₀‖², where W₀ is the weight after the cut. The layers before are
    solved already, so each makes good what is left of their error.

    Args:
        original: the model before the cut. pruned: changed in place.
        axes: those that were cut.
        batches: images and labels; about 512 images are used.
    """
    names = dict.fromkeys(entry.tensor.rpartition(".")[0] for axis in axes for entry in axis.entries if entry.reads)
    names = [name for name in names if _is_linear(pruned.get_submodule(name))]
    images, count = [], 0
    for batch, _ in batches:
        images.append(batch)
        count += len(batch)
        if count >= IMAGES:
            break
    order = _order(pruned, names, images[0])
    for name in order:
        _solve_layer(original.get_submodule(name), pruned.get_submodule(name), original, pruned, images)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or isinstance(layer, nn.Conv2d) and layer.groups == 1 and (
        layer.kernel_size == (1, 1) and layer.stride == (1, 1))


def _order(model: nn.Module, names: list[str], images: torch.Tensor) -> list[str]:
    """The layers as the forward pass meets them; those that it does not meet are left out."""
    met, hooks = {}, []
    for name in names:
        hooks.append(model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: met.setdefault(name)))
    model(images[:1])
    for hook in hooks:
        hook.remove()
    return list(met)


def _solve_layer(before: nn.Module, layer: nn.Module, original: nn.Module, pruned: nn.Module, images) -> None:
    gram = cross = None
    for batch in images:
        outputs = _tokens(layer, _at(original, before, batch)[1])
        inputs = _tokens(layer, _at(pruned, layer, batch)[0])
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        gram = inputs.T @ inputs + (0 if gram is None else gram)
        cross = inputs.T @ outputs + (0 if cross is None else cross)
    weight = layer.weight.flatten(1).double()
    bias = layer.bias.double() if layer.bias is not None else weight.new_zeros(len(weight))
    if layer.bias is None:  # there is none to solve for
        gram, cross = gram[:-1, :-1], cross[:-1]
        start = weight
    else:
        start = torch.cat([weight, bias.unsqueeze(1)], dim=1)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + ridge, cross + ridge @ start.T).T
    if layer.bias is not None:
        layer.bias.copy_(solution[:, -1])
        solution = solution[:, :-1]
    layer.weight.copy_(solution.reshape(layer.weight.shape))


def _at(model: nn.Module, layer: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer is given and what it gives, on some images."""
    met = []

    def stop(module, args, output):
        met.append((args[0], output))
        raise _Reached

    hook = layer.register_forward_hook(stop)
    try:
        model(images)
    except _Reached:
        pass
    finally:
        hook.remove()
    return met[0]


def _tokens(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """(tokens, channels), in float64 for the sums."""
    channel = 1 if isinstance(layer, nn.Conv2d) else values.dim() - 1
    return values.movedim(channel, -1).flatten(0, -2).double()
