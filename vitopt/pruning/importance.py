"""How much each channel matters: scores of shape (groups, size) for each axis.

Magnitudes mean nothing across layers of different scale, so the average of each layer is 1; scores in units of the loss
(taylor, hessian) are compared as they are.
"""

from itertools import islice
from typing import Iterable

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from vitopt.errors import InputError
from vitopt.pruning.channels import Axis, Entry

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]

NEED_DATA = ("taylor", "hessian", "activation", "gates")
IN_UNITS_OF_THE_LOSS = ("taylor", "hessian")
GATE_EPOCHS, GATE_BATCH_SIZE, GATE_LR, GATE_PENALTY = 3, 32, 0.01, 1.0


def scores(model: nn.Module, axes: list[Axis], importance: str, batches: Batches | None) -> dict[str, torch.Tensor]:
    """Score every channel of every axis, the same on all processes.

    Args:
        model: in eval mode, on the device of the batches.
        importance: l1, l2: Σ|w| and Σw² of the channel's weights, mean over the layers that it runs through.
            taylor: |Σ w · ∂L/∂w|, the first-order change of the loss without the channel (Molchanov et al., CVPR 2019).
            hessian: the mean over batches of (Σ w · ∂L/∂w)², the Fisher diagonal of a gate on the channel (Theis et
            al., 2018). activation: the channel's root mean square times the norm of the weights that read it (Wanda,
            ICLR 2024). gates: the size of a gate on each channel, learned with an L1 penalty (network slimming, ICCV
            2017). random: uniform.
        batches: images (batch, channels, height, width) and class indices (batch,); this process's share.

    Raises:
        InputError: data are needed and there are none, or they do not fit the model.
    """
    if importance in NEED_DATA and batches is None:
        raise InputError(f"prune.importance: {importance} needs calibration images: give calibration=batches of images "
                         "and labels, or take l2")
    if importance in ("l1", "l2"):
        power = int(importance[1])
        found = _over_weights(model, axes, lambda name, weight: weight.abs() ** power)
    elif importance == "random":
        generator = torch.Generator().manual_seed(0)
        found = {axis.name: torch.rand(axis.groups, axis.size, generator=generator) for axis in axes}
    elif importance == "gates":
        found = _learn_gates(model, axes, batches)
    elif importance == "activation":
        found = _activations(model, axes, batches)
    else:
        found = _from_gradients(model, axes, batches, squared=importance == "hessian")
    if importance in NEED_DATA:
        found = {name: _mean_over_processes(score) for name, score in found.items()}
    found = {name: score.float().cpu() for name, score in found.items()}
    return found if importance in IN_UNITS_OF_THE_LOSS else {
        axis.name: _normalised(axis, found[axis.name]) for axis in axes}


def _normalised(axis: Axis, score: torch.Tensor) -> torch.Tensor:
    """Average 1 over the layer; q with k and v, which are layers apart, each by itself."""
    halves = score.chunk(len(axis.letter)) if axis.groups > 1 else [score]
    return torch.cat([half / half.mean().clamp_min(1e-12) for half in halves])


def _weights(axis: Axis, tensors: dict[str, torch.Tensor]) -> list[Entry]:
    """The entries that are weights of layers, which scores speak of; biases and norms follow."""
    return [entry for entry in axis.entries if tensors[entry.tensor].dim() > 1] or axis.entries


def _over_weights(model, axes, value, signed=False) -> dict[str, torch.Tensor]:
    """Sum a value of each weight over each channel's weights, and average over the tensors that it runs through."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    sums, found = {}, {}
    for axis in axes:
        total, count = torch.zeros(axis.groups, axis.size), torch.zeros(axis.groups, 1)
        for entry in _weights(axis, tensors):
            key = entry.tensor, entry.dim
            if key not in sums:
                values = value(entry.tensor, tensors[entry.tensor].detach())
                sums[key] = values.float().movedim(entry.dim, 0).flatten(1).sum(1).cpu()
            groups = slice(entry.first, entry.first + entry.index.shape[0])
            part = sums[key][entry.index].sum(-1)
            total[groups] += part.abs() if signed else part
            count[groups] += 1
        found[axis.name] = total / count.clamp_min(1)
    return found


def _from_gradients(model, axes, batches, squared) -> dict[str, torch.Tensor]:
    def contribution(name, weight):
        gradient = gradients.get(name)
        return weight * gradient if gradient is not None else torch.zeros_like(weight)

    model.zero_grad(set_to_none=True)
    total, images = {}, 0
    for batch, targets in batches:
        F.cross_entropy(logits(model, batch), targets, reduction="sum").backward()
        images += len(targets)
        if squared:
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            for name, score in _over_weights(model, axes, contribution, signed=True).items():
                total[name] = total.get(name, 0) + score ** 2
            model.zero_grad(set_to_none=True)
    if not images:
        raise InputError("calibration: holds no images: give at least one batch")
    if not squared:
        gradients = {name: parameter.grad / images for name, parameter in model.named_parameters()
                     if parameter.grad is not None}
        gradients = {name: _mean_over_processes(gradient) for name, gradient in gradients.items()}
        total = _over_weights(model, axes, contribution, signed=True)
        images = 1
    model.zero_grad(set_to_none=True)
    return {name: score / images for name, score in total.items()}


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the model says of a batch.

    Raises:
        InputError: the images do not fit the model.
    """
    try:
        output = model(images)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"calibration: images of shape {tuple(images.shape)} do not fit the model "
                         f"({' '.join(str(error).split())[:200]}): give it batches of its own input size") from error
    return output[0] if isinstance(output, tuple) else output


def _activations(model, axes, batches) -> dict[str, torch.Tensor]:
    """Σ over the layers that read a channel of its RMS times the norm of their weights; of q and k, which none reads,
    the product of their RMS."""
    tensors = dict(model.named_parameters())
    wanted = {entry.tensor.rpartition(".")[0] for axis in axes for entry in axis.entries if _is_weight(tensors, entry)}
    squares, counts = {}, {}

    def record(name):
        def hook(module, args, output):
            for side, values in (("in", args[0]), ("out", output)):
                channel = 1 if isinstance(module, nn.modules.conv._ConvNd) else values.dim() - 1
                values = values.detach().float().movedim(channel, 0).flatten(1)
                squares[name, side] = squares.get((name, side), 0) + values.pow(2).sum(1).cpu()
                counts[name, side] = counts.get((name, side), 0) + values.shape[1]
        return hook

    hooks = [model.get_submodule(name).register_forward_hook(record(name)) for name in wanted]
    try:
        with torch.no_grad():
            for images, _ in batches:
                logits(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    rms = {key: (value / counts[key]).sqrt() for key, value in squares.items()}
    found = {}
    for axis in axes:
        total = torch.zeros(axis.groups, axis.size)
        product = torch.ones(axis.groups, axis.size)
        for entry in _weights(axis, tensors):
            groups = slice(entry.first, entry.first + entry.index.shape[0])
            name = entry.tensor.rpartition(".")[0]
            if entry.reads and (name, "in") in rms:
                norm = tensors[entry.tensor].detach().float().movedim(entry.dim, 0).flatten(1).norm(dim=1).cpu()
                total[groups] += (rms[name, "in"] * norm)[entry.index].mean(-1)
            elif not entry.reads:
                # BEiT and EVA multiply by q's weight themselves: no output is seen, the weight's own size stands in
                seen = rms.get((name, "out"))
                if seen is None:
                    seen = tensors[entry.tensor].detach().float().movedim(entry.dim, 0).flatten(1).norm(dim=1).cpu()
                product[groups] *= seen[entry.index].mean(-1)
        found[axis.name] = torch.where(total > 0, total, product)
    return found


def _is_weight(tensors: dict[str, torch.Tensor], entry: Entry) -> bool:
    return entry.tensor.endswith(".weight") and tensors[entry.tensor].dim() > 1


class _Gate(nn.Module):
    """Multiplies one dimension of a weight by gates, each at its channel's indices."""

    def __init__(self, uses: list[tuple[nn.Parameter, slice, torch.Tensor]], length: int, dim: int, dims: int):
        super().__init__()
        self.uses, self.length = uses, length
        self.shape = [-1 if place == dim else 1 for place in range(dims)]

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        factor = torch.ones(self.length, device=weight.device, dtype=weight.dtype)
        for gate, groups, index in self.uses:
            factor = factor.index_copy(0, index.flatten(), gate[groups].unsqueeze(-1).expand(index.shape).flatten())
        return weight * factor.view(self.shape)


def _learn_gates(model, axes, batches) -> dict[str, torch.Tensor]:
    """Train a gate on each channel, beginning at 1, then fold the gates into the weights.

    A channel that a layer reads has its gate on that layer's weights; one of q and k on the rows of q. The weights are
    frozen meanwhile. The L1 penalty pulls each gate as strongly as the loss at first pulls the average one.
    """
    tensors = dict(model.named_parameters())
    device = next(model.parameters()).device
    trained = {name for name, parameter in tensors.items() if parameter.requires_grad}
    model.requires_grad_(False)
    gates, uses, parametrized = {}, {}, []
    for axis in axes:
        gates[axis.name] = nn.Parameter(torch.ones(axis.groups, axis.size, device=device))
        done = torch.zeros(axis.groups, dtype=torch.bool)
        for entry in sorted(axis.entries, key=lambda entry: not entry.reads):  # those who read come first
            groups = slice(entry.first, entry.first + entry.index.shape[0])
            if (done[groups].all() and not entry.reads) or not (entry.reads or entry.query or axis.kind == "hidden"):
                continue
            done[groups] = True
            uses.setdefault((entry.tensor, entry.dim), []).append((gates[axis.name], groups, entry.index.to(device)))
    for (tensor, dim), used in uses.items():
        owner, _, name = tensor.rpartition(".")
        gate = _Gate(used, tensors[tensor].shape[dim], dim, tensors[tensor].dim())
        parametrize.register_parametrization(model.get_submodule(owner), name, gate)
        parametrized.append((model.get_submodule(owner), name))
    optimizer = torch.optim.Adam(gates.values(), lr=GATE_LR)
    penalty, steps = None, _least_over_processes(sum(1 for _ in _in_parts(batches, GATE_BATCH_SIZE)))
    try:
        for _ in range(GATE_EPOCHS):
            for images, targets in islice(_in_parts(batches, GATE_BATCH_SIZE), steps):
                optimizer.zero_grad()
                F.cross_entropy(logits(model, images), targets).backward()
                felt = [gate for gate in gates.values() if gate.grad is not None]
                for gate in felt:
                    gate.grad = _mean_over_processes(gate.grad)
                if penalty is None:  # of the size of what the loss says of an average gate
                    penalty = GATE_PENALTY * torch.cat([gate.grad.abs().flatten() for gate in felt]).mean()
                for gate in felt:
                    gate.grad += penalty * gate.detach().sign()
                optimizer.step()
    finally:
        for module, name in parametrized:
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    return {name: gate.detach().abs() for name, gate in gates.items()}


def _in_parts(batches: Batches, size: int):
    for images, targets in batches:
        yield from zip(images.split(size), targets.split(size))


def _least_over_processes(count: int) -> int:
    """The least number that a process has: steps that exchange gradients must be as many on all."""
    counts = [count]
    if distributed.is_available() and distributed.is_initialized():
        counts = [None] * distributed.get_world_size()
        distributed.all_gather_object(counts, count)
    return min(counts)


def _mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(tensor)
        tensor /= distributed.get_world_size()
    return tensor
