"""What differs between timm's attention classes, as data, and how a class is freed from its embedding width.

A layout says where each channel of an attention lives. Widths are letters:

    h  heads (of keys and values)         k  head dim of q and k        f  hidden features of an MLP in the same module
    r  query heads of each of these       v  head dim of v              p  what only travels along

and a dimension of a weight is written as timm lays it out in memory: `hK+hk+hv` is a fused qkv, its rows first all of
q, head by head, then k, then v; `h(K+k+v)` keeps q, k and v of a head together; `vh` runs through the heads fastest.
The capital marks the query, which alone is scaled. Where a layout is wrong, a pruned model still runs: what proves it
is the comparison with the original whose removed channels are zeroed (tests/test_coverage.py).
"""

import ast
import functools
import inspect
import linecache
import math
import sys
import textwrap
import types
from dataclasses import dataclass, field, replace
from typing import Callable

import torch
from torch import nn


@dataclass(frozen=True)
class Layout:
    """How one attention class lays out its channels; names are paths below the module, absent ones are skipped.

    rows: layers whose output channels these are (with their norms), path to expression; `*` stands for each head.
    columns: layers whose input channels these are.
    tensors: parameters and buffers that are no layer's, path to one expression a dimension, `.` for one left alone.
    given: widths that neither num_heads nor the shapes tell, letter to function of the module.
    whole_heads: head dims cannot be told apart (a norm, a rotation, a softmax runs over them): heads go whole.
    tied: q, k and v are one tensor in forward, so that k and v lose equally many.
    fixed: letters that cannot change.
    query_readers: parameters that q meets beside k, and that must not feel its scale.
    unless: why an instance cannot be pruned, or None.
    """

    rows: dict[str, str]
    columns: dict[str, str]
    tensors: dict[str, str] = field(default_factory=dict)
    given: dict[str, Callable[[nn.Module], int]] = field(default_factory=dict)
    whole_heads: bool = False
    tied: bool = True
    fixed: str = ""
    query_readers: tuple[str, ...] = ()
    unless: Callable[[nn.Module], str | None] = lambda module: None


QKV = {"qkv": "hK+hk+hv"}
PROJ = {"proj": "hv"}
HEAD_FIRST = {"qkv": "h(K+k+v)"}
OUTER_Q = "its queries come from outside the block"
NO_PROJ = "it has no output projection"


def _maxxvit(module):
    return Layout(HEAD_FIRST if module.head_first else QKV, PROJ)


def _conv_attention(module):
    return Layout({"pwise": "h(K+k+v)"}, {"upsampling" if isinstance(module.o_proj, nn.Identity) else "o_proj": "hv"})


def _sam(module):
    return Layout(QKV, PROJ, {"rel_pos_h": ". k", "rel_pos_w": ". k"}, query_readers=("rel_pos_h", "rel_pos_w"),
                  whole_heads=module.rope is not None)


LAYOUTS: dict[str, Layout | Callable[[nn.Module], Layout]] = {
    "timm.layers.attention.Attention": Layout(QKV | {"gate": "hv", "norm": "hv"}, PROJ),
    "timm.layers.attention.AttentionRope": Layout(
        QKV | {"q_proj": "hrK", "k_proj": "hk", "v_proj": "hv", "gate": "hrv", "norm": "hrv"}, {"proj": "hrv"},
        given={"h": lambda m: m.num_kv_heads, "r": lambda m: m.num_kv_groups}, whole_heads=True),
    "timm.layers.attention2d.Attention2d": _maxxvit,
    "timm.layers.attention2d.MultiQueryAttention2d": Layout(
        {"query.proj": "hK", "key.proj": "k", "value.proj": "v"}, {"output.proj": "hv"}, tied=False),
    "timm.layers.attention_pool.AttentionPoolLatent": Layout(
        {"q": "hK", "kv": "hk+hv"}, PROJ,
        unless=lambda m: NO_PROJ if isinstance(m.proj, nn.Identity) else
        "its latent is the query" if isinstance(m.q, nn.Identity) else None),
    "timm.layers.attention_pool2d.AttentionPool2d": Layout(
        QKV | {"q": "hK", "k": "hk", "v": "hv"}, PROJ,
        unless=lambda m: NO_PROJ if isinstance(m.proj, nn.Identity) else None),
    "timm.layers.attention_pool2d.RotAttentionPool2d": Layout(
        QKV | {"q": "hK", "k": "hk", "v": "hv"}, PROJ, whole_heads=True,
        unless=lambda m: NO_PROJ if isinstance(m.proj, nn.Identity) else None),
    "timm.layers.diff_attention.DiffAttention": Layout(
        {"qkv": "h2K+h2k+hv", "norm": "hv"}, PROJ, whole_heads=True),
    "timm.layers.mlp.GatedMlp": Layout(
        {"fc1": "f+f", "gate.norm": "f"}, {"fc2": "f"}, given={"h": lambda m: 1}),
    "timm.models.beit.Attention": Layout(
        QKV, PROJ, {"q_bias": "hK", "k_bias": "hk", "v_bias": "hv", "relative_position_bias_table": ". h"}),
    "timm.models.cait.ClassAttn": Layout({"q": "hK", "k": "hk", "v": "hv"}, PROJ),
    "timm.models.cait.TalkingHeadAttn": Layout(
        QKV | {"proj_l": "h", "proj_w": "h"}, PROJ | {"proj_l": "h", "proj_w": "h"}),
    "timm.models.coat.FactorAttnConvRelPosEnc": Layout(
        QKV, PROJ, whole_heads=True, unless=lambda m: "its position encoding is shared by the blocks of a stage"),
    "timm.models.convit.GPSA": Layout(
        {"qk": "hK+hk", "v": "hv", "pos_proj": "h"}, PROJ, {"gating_param": "h"}),
    "timm.models.convit.MHSA": Layout(QKV, PROJ),
    "timm.models.cpubone.ConvAttention": _conv_attention,
    "timm.models.crossvit.CrossAttention": Layout({"wq": "hK", "wk": "hk", "wv": "hv"}, PROJ),
    "timm.models.davit.ChannelAttention": Layout(QKV, PROJ, whole_heads=True),
    "timm.models.davit.ChannelAttentionV2": Layout(QKV, PROJ, given={"h": lambda m: m.groups}, whole_heads=True),
    "timm.models.davit.WindowAttention": Layout(QKV, PROJ),
    "timm.models.edgenext.CrossCovarianceAttn": Layout(QKV, PROJ, {"temperature": "h . ."}, whole_heads=True),
    "timm.models.efficientformer.Attention": Layout(HEAD_FIRST, PROJ, {"attention_biases": "h ."}, tied=False),
    "timm.models.efficientformer_v2.Attention2d": Layout(
        {"q": "hK", "k": "hk", "v": "hv", "v_local": "hv", "talking_head1": "h", "talking_head2": "h"},
        PROJ | {"talking_head1": "h", "talking_head2": "h"}, {"attention_biases": "h ."}, tied=False),
    "timm.models.efficientformer_v2.Attention2dDownsample": Layout(
        {"q.proj": "hK", "k": "hk", "v": "hv", "v_local": "hv"}, PROJ, {"attention_biases": "h ."}, tied=False),
    "timm.models.efficientvit_mit.LiteMLA": Layout(
        {"qkv": "h(K+k+v)", "aggreg.0": "h(K+k+v)", "aggreg.1": "h(K+k+v)", "aggreg.2": "h(K+k+v)"},
        {"proj": "phv"}, given={"h": lambda m: _out(m.qkv) // (3 * m.dim), "p": lambda m: 1 + len(m.aggreg)},
        whole_heads=True),
    "timm.models.efficientvit_msra.CascadedGroupAttention": Layout(
        {"qkvs.*": "K+k+v", "dws.*": "K"}, {}, given={"v": lambda m: m.val_dim}, fixed="hv", tied=False),
    "timm.models.eva.EvaAttention": Layout(
        QKV | {"q_proj": "hK", "k_proj": "hk", "v_proj": "hv", "gate": "hv", "norm": "hv"}, PROJ,
        {"q_bias": "hK", "k_bias": "hk", "v_bias": "hv"}, whole_heads=True),
    "timm.models.fastvit.Attention": Layout(QKV, PROJ),
    "timm.models.gcvit.WindowAttentionGlobal": Layout(
        QKV, PROJ, unless=lambda m: OUTER_Q if m.use_global else None),
    "timm.models.gemma4_vit.Gemma4Attention": Layout(
        {"q_proj": "hrK", "k_proj": "hk", "v_proj": "hv"}, {"o_proj": "hrv"},
        given={"h": lambda m: m.num_kv_heads, "r": lambda m: m.num_kv_groups}, whole_heads=True),
    "timm.models.hiera.MaskUnitAttention": Layout(QKV, PROJ, given={"h": lambda m: m.heads}),
    "timm.models.hieradet_sam2.MultiScaleAttention": Layout(QKV, PROJ),
    "timm.models.levit.Attention": Layout(HEAD_FIRST, PROJ, {"attention_biases": "h ."}, tied=False),
    "timm.models.levit.AttentionDownsample": Layout(
        {"kv": "h(k+v)", "q.ln": "hK"}, PROJ, {"attention_biases": "h ."}, tied=False),
    "timm.models.lowformer.ConvAttention": _conv_attention,
    "timm.models.maxxvit.Attention2d": _maxxvit,
    "timm.models.maxxvit.AttentionCl": _maxxvit,
    "timm.models.metaformer.Attention": Layout(QKV, PROJ),
    "timm.models.mobilevit.LinearSelfAttention": Layout(
        {"qkv_proj": "p+v+v"}, {"out_proj": "v"}, given={"h": lambda m: 1, "p": lambda m: 1}),
    "timm.models.mvitv2.MultiScaleAttention": Layout(
        QKV, PROJ, whole_heads=True,
        unless=lambda m: "its pooling is not shared by the heads" if m.unshared else None),
    "timm.models.nest.Attention": Layout(QKV, {"proj": "vh"}),
    "timm.models.nextvit.EfficientAttention": Layout({"q": "hK", "k": "hk", "v": "hv"}, PROJ),
    "timm.models.pvt_v2.Attention": Layout({"q": "hK", "kv": "hk+hv"}, PROJ),
    "timm.models.shvit.SHSA": Layout(
        {"qkv": "K+k+v"}, {}, given={"h": lambda m: 1, "v": lambda m: m.pdim}, fixed="hv", tied=False),
    "timm.models.swiftformer.EfficientAdditiveAttention": Layout(
        {"to_query": "v", "to_key": "v", "proj": "v"}, {"proj": "v", "final": "v"}, {"w_g": "v ."},
        given={"h": lambda m: 1}),
    "timm.models.swin_transformer.WindowAttention": Layout(QKV, PROJ, {"relative_position_bias_table": ". h"}),
    "timm.models.swin_transformer_v2.WindowAttention": Layout(
        QKV | {"cpb_mlp.2": "h"}, PROJ,
        {"q_bias": "hK", "k_bias": "hk", "v_bias": "hv", "logit_scale": "h . ."}, whole_heads=True),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": Layout(
        QKV | {"meta_mlp.fc2": "h"}, PROJ, {"logit_scale": "h"}, whole_heads=True),
    "timm.models.tiny_vit.Attention": Layout(HEAD_FIRST, PROJ, {"attention_biases": "h ."}, tied=False),
    "timm.models.tnt.Attention": Layout({"qk": "hK+hk", "v": "hv"}, PROJ, tied=False),
    "timm.models.twins.GlobalSubSampleAttn": Layout({"q": "hK", "kv": "hk+hv"}, PROJ),
    "timm.models.twins.LocallyGroupedAttn": Layout(QKV, PROJ),
    "timm.models.visformer.Attention": Layout(QKV, PROJ),
    "timm.models.vision_transformer.DiffParallelScalingBlock": Layout(
        {"in_proj": "f+h2K+h2k+hv"}, {"out_proj": "hv+f"}, {"mlp_bias": "f"},
        given={"f": lambda m: m.in_split[0]}, whole_heads=True),
    "timm.models.vision_transformer.ParallelScalingBlock": Layout(
        {"in_proj": "f+hK+hk+hv"}, {"out_proj": "hv+f", "attn_out_proj": "hv", "mlp_out_proj": "f"},
        {"mlp_bias": "f"}, given={"f": lambda m: m.in_split[0]}),
    "timm.models.vision_transformer_relpos.RelPosAttention": Layout(QKV, PROJ),
    "timm.models.vision_transformer_sam.Attention": _sam,
    "timm.models.volo.Attention": Layout(QKV, PROJ),
    "timm.models.volo.ClassAttention": Layout({"q": "hK", "kv": "hk+hv"}, PROJ),
    "timm.models.volo.OutlookAttention": Layout(
        {"v": "hv", "attn": "hp"}, PROJ, given={"p": lambda m: m.kernel_size ** 4}),
    "timm.models.xcit.XCA": Layout(QKV, PROJ, {"temperature": "h . ."}, whole_heads=True),
}

# timm's modules of relative positions, as many of the classes above hold one: rows, tensors
POSITIONS = {
    "RelPosBias": ({}, {"rel_pos.relative_position_bias_table": ". h"}),
    "RelPosBiasTf": ({}, {"rel_pos.relative_position_bias_table": "h . ."}),
    "RelPosMlp": ({"rel_pos.mlp.fc2": "h"}, {}),
}

# What timm's forward passes read beside the shapes of the weights. An attribute follows where it was this product.
ATTRIBUTES = {
    "num_heads": "hr", "heads": "h", "groups": "h", "num_kv_heads": "h",
    "head_dim": "k", "dim_head": "k", "key_dim": "k", "qk_dim": "k", "val_dim": "v", "value_dim": "v", "d": "v",
    "attn_dim": "hrv", "attention_dim": "hv", "kv_dim": "hv", "key_attn_dim": "hk", "val_attn_dim": "hv", "dh": "hv",
    "dim_out": "hv", "out_dim": "hv", "o_proj_inpdim": "hv", "embed_dim": "v",
}


def find(module: nn.Module) -> Layout | None:
    """The layout of an attention, or None where the module's class is none that is known."""
    kind = getattr(type(module), "timm_class", type(module))
    layout = LAYOUTS.get(f"{kind.__module__}.{kind.__qualname__}")
    if layout is not None and not isinstance(layout, Layout):
        layout = layout(module)
    if layout and (positions := getattr(module, "rel_pos", None)) is not None:
        rows, tensors = POSITIONS.get(type(positions).__name__, ({}, {}))
        layout = replace(layout, rows=layout.rows | rows, tensors=layout.tensors | tensors,
                         fixed=layout.fixed + "h" * (type(positions).__name__ not in POSITIONS))
    if layout and any(not isinstance(getattr(module, norm, None), (nn.Identity, type(None)))
                      for norm in ("q_norm", "k_norm", "sub_norm")):
        layout = replace(layout, whole_heads=True)
    return layout


def _out(layer: nn.Module) -> int:
    """Output channels of a layer and its norm."""
    return next(len(parameter) for parameter in layer.parameters())


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor of an attention: `path` of its owner below the attention, its name there."""

    path: str
    tensor: str
    dim: int
    expression: str
    head: int | None = None  # which head alone it belongs to
    reads: bool = False  # it takes these channels in

    def owner(self, module: nn.Module) -> nn.Module:
        return module.get_submodule(self.path)


def members(module: nn.Module, layout: Layout) -> list[Member]:
    """Every dimension of a weight that a layout speaks of."""
    found = []
    for path, expression in layout.rows.items():
        heads = range(len(module.get_submodule(path[:-2]))) if path.endswith(".*") else [None]
        for head in heads:
            for name, leaf in _leaves(module, path.replace("*", str(head))):
                found += [Member(name, tensor, 0, expression, head) for tensor in channel_tensors(leaf)]
    for path, expression in layout.columns.items():
        for name, leaf in _leaves(module, path)[:1]:
            found.append(Member(name, "weight", 0 if isinstance(leaf, nn.ConvTranspose2d) else 1, expression,
                                reads=True))
    for path, expressions in layout.tensors.items():
        owner, _, tensor = path.rpartition(".")
        if getattr(module.get_submodule(owner), tensor, None) is not None:
            found += [Member(owner, tensor, dim, expression)
                      for dim, expression in enumerate(expressions.split()) if expression != "."]
    return found


def _leaves(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The layers with weights at or below a path, none where it leads nowhere."""
    try:
        top = module.get_submodule(path)
    except AttributeError:
        return []
    if top is None:
        return []
    return [(f"{path}.{name}".rstrip("."), leaf) for name, leaf in top.named_modules()
            if next(leaf.parameters(recurse=False), None) is not None]


def channel_tensors(leaf: nn.Module) -> list[str]:
    """The tensors of a layer that have one entry for each of its output channels."""
    tensors = dict(leaf.named_parameters(recurse=False)) | dict(leaf.named_buffers(recurse=False))
    return [name for name, tensor in tensors.items() if tensor.dim()]


def widths(module: nn.Module, layout: Layout) -> dict[str, int]:
    """The size of every letter, from num_heads and the shapes of the weights."""
    sizes = {"h": lambda m: m.num_heads, "r": lambda m: 1} | layout.given
    sizes = {letter: size(module) for letter, size in sizes.items()}
    todo = [(member.expression.lower(), getattr(member.owner(module), member.tensor).shape[member.dim])
            for member in members(module, layout)]
    while todo:
        for expression, total in todo:
            unknown = {letter for letter in expression if letter.isalpha()} - set(sizes)
            if len(unknown) < 2:
                break
        else:
            return sizes
        todo.remove((expression, total))
        for letter in unknown:
            without, one = (length(expression, sizes | {letter: size}) for size in (0, 1))
            sizes[letter] = (total - without) // (one - without)
    return sizes


def index(expression: str, sizes: dict[str, int]) -> list[tuple[str, torch.Tensor]]:
    """Where each channel lies along a dimension, one tensor a segment: its letters, and indices shaped by them."""
    leaves, _ = _segments(expression, sizes)
    return leaves


def length(expression: str, sizes: dict[str, int]) -> int:
    """How long a dimension is."""
    return _segments(expression, sizes)[1]


def _segments(expression: str, sizes: dict[str, int]):
    leaves, start = [], 0
    for term in _terms(expression):
        letters, _, inner = term.partition("(")
        parts, length = _segments(inner[:-1], sizes) if inner else ([("", torch.zeros((), dtype=torch.long))], 1)
        shape = [sizes[letter.lower()] if letter.isalpha() else int(letter) for letter in letters]
        outer = torch.arange(math.prod(shape)).view(shape) * length + start
        for names, part in parts:
            leaves.append((letters + names, outer.view(shape + [1] * part.dim()) + part))
        start += math.prod(shape) * length
    return leaves, start


def _terms(expression: str) -> list[str]:
    """Split at each + that is in no parentheses."""
    terms, depth = [""], 0
    for character in expression:
        depth += (character == "(") - (character == ")")
        if character == "+" and not depth:
            terms.append("")
        else:
            terms[-1] += character
    return terms


def follow(module: nn.Module, before: dict[str, int], after: dict[str, int]) -> None:
    """Bring an attention whose weights were cut up to date: its class, and what its forward pass reads.

    Args:
        module: the attention.
        before, after: the size of every letter; k decides the scale of the products.
    """
    module.__class__ = decoupled(type(module))
    if not hasattr(module, "head_dim") and "v" in before:  # what the decoupled forward pass reads
        module.head_dim = before.get("k", before["v"])
    attributes = ATTRIBUTES if "k" in before else ATTRIBUTES | {"head_dim": "v"}
    for name, product in attributes.items():
        old, new = (math.prod(sizes.get(letter, 0) for letter in product) for sizes in (before, after))
        if old and getattr(module, name, None) == old:
            setattr(module, name, new)
    if hasattr(module, "scale") and _takes_scale_from_head_dim(module, before, after):
        module.scale = after["k"] ** -0.5
    if hasattr(module, "in_split"):
        module.in_split = [after["f"], *[after["h"] * after["v"]] * 3]
    positions = getattr(module, "rel_pos", None)
    if positions is not None:
        if hasattr(positions, "num_heads"):
            positions.num_heads = after["h"]
        heads_first = type(positions).__name__ == "RelPosBiasTf"
        shape = positions.bias_shape
        positions.bias_shape = (after["h"], *shape[1:]) if heads_first else (*shape[:-1], after["h"])
    if hasattr(module, "attention_bias_cache"):
        module.attention_bias_cache = {}


def rescale(module: nn.Module, layout: Layout, before: dict[str, int], after: dict[str, int]) -> None:
    """Scale q by √(new / old head_dim), so that the products are those of the model that was trained.

    Fused attention takes its scale from the head_dim that it finds. Where it is a number of the module's, it stays.
    """
    if not _takes_scale_from_head_dim(module, before, after):
        return
    factor = math.sqrt(after["k"] / before["k"])
    with torch.no_grad():
        for member in members(module, layout):
            tensor = getattr(member.owner(module), member.tensor)
            for names, rows in index(member.expression, after):
                if "K" in names:
                    rows = rows.flatten().to(tensor.device)
                    tensor.index_copy_(member.dim, rows, tensor.index_select(member.dim, rows) * factor)
            if member.tensor in layout.query_readers:
                tensor /= factor


def _takes_scale_from_head_dim(module: nn.Module, before: dict[str, int], after: dict[str, int]) -> bool:
    return hasattr(module, "fused_attn") and before.get("k") != after.get("k")


class _Inferred(ast.NodeTransformer):
    """Take head_dim from the module and let reshapes infer the rest, where timm takes them from the embedding width, C.
    """

    def visit_BinOp(self, node):
        if isinstance(node.op, ast.FloorDiv) and ast.unparse(node.left) == "C":
            return ast.parse("self.head_dim", mode="eval").body
        return self.generic_visit(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("reshape", "view"):
            if not any(ast.unparse(argument) == "-1" for argument in node.args):
                node.args = [ast.parse("-1", mode="eval").body if "C" in _names(argument) else argument
                             for argument in node.args]
        return node


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


@functools.cache
def decoupled(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a timm class whose inner width need not be the embedding width; the class itself if it has none.

    About half of timm's attention classes reshape to `C`, the embedding width, or derive head_dim from it. The
    subclass is timm's own source with that size inferred, which is the same wherever nothing was cut.
    """
    if hasattr(kind, "timm_class"):
        return kind
    methods = {}
    for name, method in vars(kind).items():
        if not isinstance(method, types.FunctionType) or name.startswith("__"):
            continue
        source = textwrap.dedent(inspect.getsource(method))
        tree = ast.parse(source)
        inferred = ast.unparse(_Inferred().visit(ast.parse(source)))
        if inferred == ast.unparse(tree):
            continue
        place = f"<{kind.__module__}.{kind.__qualname__}.{name} with inferred widths>"
        linecache.cache[place] = (len(inferred), None, inferred.splitlines(keepends=True), place)
        scope = {}
        exec(compile(inferred, place, "exec"), vars(sys.modules[kind.__module__]), scope)
        methods[name] = scope[name]
    if not methods:
        return kind
    name = f"Decoupled{kind.__qualname__}"
    return type(name, (kind,), methods | {"timm_class": kind, "__module__": __name__})


def fit(leaf: nn.Module) -> None:
    """Bring what a layer says of its widths in line with its weight."""
    weight = getattr(leaf, "weight", None)
    if isinstance(leaf, nn.Linear):
        leaf.out_features, leaf.in_features = weight.shape
    elif isinstance(leaf, nn.ConvTranspose2d):
        if leaf.groups > 1:
            leaf.groups = leaf.groups * weight.shape[0] // leaf.in_channels
        leaf.in_channels, leaf.out_channels = weight.shape[0], weight.shape[1] * leaf.groups
    elif isinstance(leaf, nn.modules.conv._ConvNd):
        if leaf.groups > 1:
            leaf.groups = weight.shape[0] // (leaf.out_channels // leaf.groups)
        leaf.out_channels, leaf.in_channels = weight.shape[0], weight.shape[1] * leaf.groups
    elif hasattr(leaf, "num_features") and hasattr(leaf, "running_mean"):
        leaf.num_features = len(leaf.running_mean if weight is None else weight)
    elif isinstance(leaf, nn.GroupNorm):
        leaf.num_channels = len(weight)
    elif hasattr(leaf, "normalized_shape") and weight is not None:
        leaf.normalized_shape = tuple(weight.shape)
