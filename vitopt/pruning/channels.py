"""The prunable widths of a model, and what removing a channel removes: the only door to torch_pruning.

Attentions are described by `vitopt.layouts`; every other inner width (the hidden features of an MLP, the expansion of a
convolutional block) and the embedding width are found by torch-pruning's dependency graph.
"""

import copy
import warnings
from dataclasses import dataclass, field, replace

import torch
import torch_pruning as tp
from torch import nn

from vitopt import layouts, model as models
from vitopt.errors import InputError

HEADS, HEAD_DIM, HIDDEN, EMBED = "heads", "head_dim", "hidden", "embed"


@dataclass
class Entry:
    """Where the channels of an axis lie along one dimension of one tensor.

    index: (groups, size, n): group `first + g` finds its channel u at the indices index[g, u].
    reads: the tensor is the weight of a layer that takes the channel in.
    query: these are rows of a query.
    """

    tensor: str
    dim: int
    index: torch.Tensor
    first: int = 0
    reads: bool = False
    query: bool = False


@dataclass
class Axis:
    """A width that can be cut. Groups choose their channels apart, but all lose equally many.

    An attention's head_dim has a group for each head's q and k, and one for each head's v: `size` channels each. What
    stays of `size` is a multiple of `step`.
    """

    module: str
    kind: str
    letter: str
    size: int
    groups: int
    entries: list[Entry] = field(default_factory=list)
    step: int = 1

    @property
    def name(self) -> str:
        width = {"k": "qk_dim", "v": "v_dim"}.get(self.letter, self.kind)
        return f"{self.module}.{width}".strip(".")

    @property
    def structure(self) -> tuple:
        """What two axes have in common that are built alike (Isomorphic Pruning, ECCV 2024): all but their place."""
        return (self.kind, self.letter, self.size, self.groups, *sorted(
            (entry.tensor.removeprefix(self.module), entry.dim) for entry in self.entries))

    @property
    def channels(self) -> int:
        """Inner channels that go with one unit: a head's dims, one dim of every head, one hidden feature."""
        width = max(entry.index.shape[2] for entry in self.entries)
        if self.kind == HEADS:
            return width
        return max(self.groups // len(self.letter), width) if self.kind == HEAD_DIM else 1


def attention_axes(model: nn.Module) -> tuple[list[Axis], dict[str, str]]:
    """The axes of every attention, and for those (or those axes) that have none: module name to the reason."""
    axes, left = [], {}
    shared = _shared_positions(model)
    for name, module in model.named_modules():
        layout = layouts.find(module)
        if layout is None:
            if looks_like_attention(module) and not any(layouts.find(part) for part in module.modules()):
                left[name] = f"{type(module).__name__} is no attention that vitopt knows"
            continue
        if reason := layout.unless(module):
            left[name] = f"{type(module).__name__}: {reason}"
            continue
        found = _axes_of(name, module, layout)
        if shared and getattr(module, "rel_pos", None) is None:
            found = [axis for axis in found if axis.kind != HEADS]
        if not found:
            left[name] = f"{type(module).__name__}: " + (
                "its heads share one table of positions and cannot be cut apart" if shared else "it has one head")
        axes += found
    return axes, left


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a module of no known layout computes attention, by its name and what it holds."""
    name = type(module).__name__
    holds = any(hasattr(module, attribute) for attribute in ("num_heads", "qkv", "heads", "to_query"))
    return holds and ("Attention" in name or "Attn" in name) or name == "LambdaLayer"


def _shared_positions(model: nn.Module) -> bool:
    """Whether all blocks read one table of positions, or one rotation, with one column a head."""
    return any(getattr(model, name, None) is not None for name in ("shared_rel_pos", "rel_pos_bias")) or any(
        type(module).__name__ == "RotaryEmbeddingMixed" for module in model.modules())


def _axes_of(name: str, module: nn.Module, layout: layouts.Layout) -> list[Axis]:
    sizes = layouts.widths(module, layout)
    members = layouts.members(module, layout)
    letters = {letter for member in members for letter in member.expression.lower() if letter.isalpha()}
    axes = []
    if "h" in letters and "h" not in layout.fixed and sizes["h"] > 1:
        axes.append(_axis(name, HEADS, "h", sizes, members, 1))
    if not layout.whole_heads:
        dims = [letter for letter in "kv" if letter in letters - set(layout.fixed) and sizes[letter] > 1]
        groups = {letter: _groups(letter, sizes, members) for letter in dims}
        if layout.tied and len(dims) == 2 and sizes["k"] == sizes["v"]:
            axis = _axis(name, HEAD_DIM, "k", sizes, members, groups["k"])
            values = _axis(name, HEAD_DIM, "v", sizes, members, groups["v"])
            axis.letter = "kv"
            axis.entries += [replace(entry, first=entry.first + axis.groups) for entry in values.entries]
            axis.groups += values.groups
            axes.append(axis)
        elif not layout.tied or dims == ["v"]:
            axes += [_axis(name, HEAD_DIM, letter, sizes, members, groups[letter]) for letter in dims]
    if "f" in letters:
        axes.append(_axis(name, HIDDEN, "f", sizes, members, 1))
    return axes


def _groups(letter: str, sizes: dict[str, int], members: list[layouts.Member]) -> int:
    """Heads choose apart, unless one tensor holds a channel for all of them or runs through the heads fastest."""
    segments = [(member, names.lower()) for member in members
                for names, _ in layouts.index(member.expression, sizes) if letter in names.lower()]
    together = any(member.head is None and "h" not in names[:names.index(letter)] for member, names in segments)
    return 1 if together else sizes["h"]


def _axis(name: str, kind: str, letter: str, sizes: dict[str, int], members: list[layouts.Member], groups: int) -> Axis:
    axis = Axis(name, kind, letter, sizes[letter], groups)
    for member in members:
        tensor = ".".join(filter(None, (name, member.path, member.tensor)))
        for names, index in layouts.index(member.expression, sizes):
            query, names = "K" in names, names.lower()
            if letter not in names:
                continue
            index = index.movedim(names.index(letter), 0)
            names = letter + names.replace(letter, "")
            if letter != "h" and groups > 1 and "h" in names:
                index, first = index.movedim(names.index("h"), 0).reshape(groups, sizes[letter], -1), 0
            else:
                index, first = index.reshape(1, sizes[letter], -1), member.head or 0
            axis.entries.append(Entry(tensor, member.dim, index, first, member.reads, query))
    return axis


LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def hidden_axes(model: nn.Module, example_inputs: torch.Tensor) -> list[Axis]:
    """The inner widths outside attention: hidden features of MLPs, expansions of convolutional blocks.

    Each largest part of the model without attention is traced by itself. There an inner width is a set of channels that
    reaches neither the part's input nor its output, and that no residual stream carries.
    """
    axes, done = [], set()
    for name, (part, inputs) in _parts(model, example_inputs).items():
        names = {layer: f"{name}.{path}".strip(".") for path, layer in part.named_modules()}
        graph = trace(part, inputs)
        for layer in [layer for layer in part.modules() if isinstance(layer, LAYERS) and layer in graph.module2node]:
            if names[layer] in done or _is_depthwise(layer):
                continue
            found = _inner_width(graph, graph.module2node[layer], names)
            if found is None:
                continue
            done |= {names[reader] for reader in found}
            axis = _hidden_axis(graph, layer, names, {axis.module for axis in axes})
            if axis is not None:
                axes.append(axis)
    return axes


def trace(model: nn.Module, example_inputs) -> tp.DependencyGraph:
    """torch-pruning's graph of a model, in eval mode."""
    known = (*LAYERS, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    inside = {id(parameter) for module in model.modules() if isinstance(module, known)
              for parameter in module.parameters(recurse=False)}
    unwrapped = [(parameter, max(parameter.dim() - 1, 0)) for parameter in model.parameters()
                 if id(parameter) not in inside]
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # it announces each parameter that is no layer's
        return tp.DependencyGraph().build_dependency(
            model, example_inputs, unwrapped_parameters=unwrapped, verbose=False,
            forward_fn=lambda model, images: model(images.clone().requires_grad_().clone()))


def _parts(model: nn.Module, example_inputs: torch.Tensor) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """The largest parts without attention that map one tensor to one tensor, with an input each."""
    seen, calls = {}, {}

    def record(module, args, kwargs, output):
        tensors = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and isinstance(
            output, torch.Tensor)
        seen[module] = (args[0].detach(), output.shape) if tensors else None
        calls[module] = calls.get(module, 0) + 1

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    parts = {}

    def descend(name, module):
        weights = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
        if len(weights) < 2:
            return
        attention = any(layouts.find(layer) or looks_like_attention(layer) for layer in module.modules())
        if attention or seen.get(module) is None or module is model or any(calls.get(w, 0) != 1 for w in weights):
            for path, child in module.named_children():
                descend(f"{name}.{path}".strip("."), child)
        else:
            parts[name] = (module, seen[module][0][:1])

    descend("", model)
    return parts


def _is_depthwise(layer: nn.Module) -> bool:
    return getattr(layer, "groups", 1) > 1


def _inner_width(graph: tp.DependencyGraph, consumer, names: dict[nn.Module, str]):
    """The layers that read the channels which a layer reads.

    None where those channels reach the input or the output, where they are a residual stream, or run through a grouped
    convolution or norm.
    """
    makers, readers, seen = [], [consumer], set()
    todo = list(consumer.inputs)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        if len(seen) > 32:
            return None
        module = node.module
        if isinstance(module, LAYERS) and not _is_depthwise(module):
            makers.append(node)
            todo += [out for out in node.outputs if not _reads(out)]
            readers += [out for out in node.outputs if _reads(out)]
            seen.add(node)
            continue
        if getattr(module, "groups", 1) not in (1, getattr(module, "out_channels", 1)):
            return None
        if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            return None
        if isinstance(module, tp.ops._SplitOp) and len(set(module.split_sizes or [])) > 1:
            return None  # its parts are of different kinds
        if node.type == tp.ops.OPTYPE.PARAMETER:
            seen.add(node)
            todo += [out for out in node.outputs if not _reads(out)]
            continue
        if not node.inputs and "Clone" not in repr(module):
            continue  # a weight on its way to a product
        if not node.inputs or not node.outputs:
            return None
        seen.add(node)
        for other in node.outputs:
            (readers if _reads(other) else todo).append(other)
        todo += node.inputs
    parents = sorted({names[node.module].rpartition(".")[0] for node in makers}, key=len)
    if not makers or any(not parent.startswith(parents[0]) for parent in parents):
        return None
    if len(parents) > 1 and parents[-1].count(".") - parents[0].count(".") > 1:
        return None
    return {node.module for node in readers}


def _reads(node) -> bool:
    return isinstance(node.module, LAYERS) and not _is_depthwise(node.module)


def _hidden_axis(graph: tp.DependencyGraph, reader: nn.Module, names: dict[nn.Module, str],
                 taken: set[str]) -> Axis | None:
    size = reader.in_features if isinstance(reader, nn.Linear) else reader.in_channels
    pruner = graph.get_pruner_of_module(reader)
    group = graph.get_pruning_group(reader, pruner.prune_in_channels, list(range(size)))
    entries = entries_of(graph, group, names, size)
    if entries is None or size < 2:
        return None
    name = names[next(item.dep.target.module for item in group
                      if isinstance(item.dep.target.module, LAYERS) and item.dep.target.module is not reader)]
    module = name.rpartition(".")[0]
    return Axis(name if module in taken else module, HIDDEN, "f", size, 1, entries)


def entries_of(graph: tp.DependencyGraph, group, names: dict[nn.Module, str], size: int) -> list[Entry] | None:
    """What a group of torch-pruning removes, by the channel of its root; None where channels are torn apart."""
    parameters = {id(parameter): f"{names[module]}.{name}".strip(".") for module in names
                  for name, parameter in module.named_parameters(recurse=False)}
    entries = []
    for item in group:
        module, handler, reads = item.dep.target.module, item.dep.handler, False
        index = [[] for _ in range(size)]
        for position, root in zip(item.idxs, item.root_idxs):
            index[root].append(position)
        if isinstance(module, nn.Parameter):
            dims = [dim for dim, length in enumerate(module.shape) if length == len(item.idxs)]
            dims = [(parameters[id(module)], dim) for dim in dims[-1:]]
        elif isinstance(module, LAYERS):
            reads = graph.is_in_channel_pruning_fn(handler) and not _is_depthwise(module)
            if reads:
                dims = [(f"{names[module]}.weight", 0 if isinstance(module, nn.ConvTranspose2d) else 1)]
            else:
                dims = [(f"{names[module]}.{name}", 0) for name in layouts.channel_tensors(module)]
        elif module in names:
            dims = [(f"{names[module]}.{name}", 0) for name in layouts.channel_tensors(module)]
        else:
            continue
        lengths = {module.shape[dim] if isinstance(module, nn.Parameter) else
                   getattr(module, tensor.rpartition(".")[2]).shape[dim] for tensor, dim in dims}
        if lengths - {len(item.idxs)} or len({len(found) for found in index}) != 1:
            return None
        entries += [Entry(tensor, dim, torch.tensor(index).unsqueeze(0), reads=reads) for tensor, dim in dims]
    return entries


def embed_axis(model: nn.Module, example_inputs: torch.Tensor) -> Axis:
    """The embedding width of a columnar model: the channels of the residual stream, wherever they go.

    Raises:
        InputError: the model has several widths, or its output is the stream itself.
    """
    name, width = model.architecture["name"], getattr(model, "embed_dim", None)
    traced = _with_merged_biases(model)
    start = next((part.proj for part in (getattr(traced, "patch_embed", None), getattr(traced, "embeds", None))
                  if isinstance(getattr(part, "proj", None), LAYERS)), None)
    if not isinstance(width, int) or start is None or not hasattr(model, "blocks"):
        raise InputError(f"prune.axes: embed: {name} has no single embedding width: leave embed out")
    if not model.num_classes:
        raise InputError(f"prune.axes: embed: {name} has no head, its output is the embedding: give it num_classes")
    graph = trace(traced, example_inputs[:1])
    names = {module: path for path, module in traced.named_modules()}
    pruner = graph.get_pruner_of_module(start)
    entries = entries_of(graph, graph.get_pruning_group(start, pruner.prune_out_channels, list(range(width))), names,
                         width)
    if entries is None:
        raise InputError(f"prune.axes: embed: the embedding width of {name} cannot be followed through all of its "
                         "layers: leave embed out")
    return Axis("", EMBED, "c", width, 1, entries)


def _with_merged_biases(model: nn.Module) -> nn.Module:
    """A copy of a model whose attentions call their qkv, instead of its weight with biases of their own."""
    merged = copy.deepcopy(model)
    for module in merged.modules():
        if getattr(module, "q_bias", None) is not None:
            module.qkv.bias = nn.Parameter(torch.cat([module.q_bias, module.k_bias, module.v_bias]).detach())
            module.q_bias = None
    return merged


def cut(model: nn.Module, axes: list[Axis], kept: dict[str, torch.Tensor]) -> None:
    """Remove from each axis what is not kept.

    Args:
        kept: by axis name, the kept channels of each group, ascending: (groups, channels kept).
    """
    whole = any(axis.kind == EMBED and axis.name in kept for axis in axes)
    before = _attention_widths(model, None if whole else axes)
    for (tensor, dim), keep in kept_indices(model, axes, kept).items():
        owner, _, name = tensor.rpartition(".")
        owner = model.get_submodule(owner)
        old = getattr(owner, name)
        new = old.data.index_select(dim, keep.to(old.device)).contiguous()
        setattr(owner, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        layouts.fit(owner)
    for name, sizes in before.items():
        module, after = model.get_submodule(name), dict(sizes)
        for axis in axes:
            if axis.module == name and axis.name in kept:
                after |= {letter: kept[axis.name].shape[1] for letter in axis.letter}
        layouts.follow(module, sizes, after)
        layouts.rescale(module, layouts.find(module), sizes, after)
    for axis in axes:
        if axis.kind == EMBED and axis.name in kept:
            models.set_embed_dim(model, axis.size, kept[axis.name].shape[1])


def _attention_widths(model: nn.Module, axes: list[Axis] | None) -> dict[str, dict[str, int]]:
    """The widths of the attentions of some axes, or of all."""
    names = dict.fromkeys(axis.module for axis in axes) if axes is not None else dict(model.named_modules())
    found = {name: layouts.find(model.get_submodule(name)) for name in names}
    return {name: layouts.widths(model.get_submodule(name), layout) for name, layout in found.items() if layout}


def kept_indices(model: nn.Module, axes: list[Axis], kept: dict[str, torch.Tensor]):
    """By tensor and dimension, the indices that stay."""
    removed = {}
    for axis in axes:
        if axis.name not in kept:
            continue
        gone = torch.ones(axis.groups, axis.size, dtype=torch.bool)
        gone.scatter_(1, kept[axis.name], False)
        for entry in axis.entries:
            groups = entry.index.shape[0]
            indices = entry.index[gone[entry.first:entry.first + groups]]
            removed.setdefault((entry.tensor, entry.dim), []).append(indices.flatten())
    indices = {}
    for (tensor, dim), parts in removed.items():
        owner, _, name = tensor.rpartition(".")
        stays = torch.ones(getattr(model.get_submodule(owner), name).shape[dim], dtype=torch.bool)
        stays[torch.cat(parts)] = False
        indices[tensor, dim] = torch.nonzero(stays).flatten()
    return indices
