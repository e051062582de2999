"""Whole blocks: which may go, and what each does to its input."""

import torch
from torch import nn
from torch.nn import functional as F

from vitopt.errors import InputError
from vitopt.model import blocks


def influence(model: nn.Module, batches, example_inputs: torch.Tensor) -> dict[str, float]:
    """How far each removable block turns its tokens: the mean of 1 − cos(input, output) (ShortGPT, 2024).

    Measured on the calibration batches, or on the example inputs where there are none.

    Raises:
        InputError: the model has no block that keeps the shape of what it is given.
    """
    found, counts, hooks = {}, {}, []

    def record(name):
        def hook(module, args, output):
            if not isinstance(output, torch.Tensor) or not args or args[0].shape != output.shape:
                return
            dim = 1 if output.dim() == 4 and output.shape[1] > output.shape[-1] else -1
            value = 1 - F.cosine_similarity(args[0].float(), output.float(), dim=dim).mean().item()
            found[name] = found.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + 1
        return hook

    for name, module in blocks(model):
        hooks.append(module.register_forward_hook(record(name)))
    try:
        with torch.no_grad():
            for images in ([example_inputs] if batches is None else (images for images, _ in batches)):
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) < 2:
        raise InputError(f"prune.axes: depth: {model.architecture['name']} has no blocks that can go: leave depth out")
    return {name: value / counts[name] for name, value in found.items()}
