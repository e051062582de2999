"""How many of timm's transformer variants can be pruned: vitopt beside torch-pruning's example for timm models.

    python benchmarks/beside_torch_pruning.py --ratio 0.5 [--only REGEX]

Every variant of variants.yaml is tried three times, each time in a process of its own with a limit of time and memory
(torch-pruning's tracing runs for ever on some models):

vitopt     must pass all of compatibility.py: proven against the original with the removed channels zeroed, fused and
           unfused, saved and loaded, exported, trained.
published  examples/timm_models/prune_timm_models.py of github.com/VainF/Torch-Pruning at e80127d (version 1.6.1;
           copyright (c) 2022 Gongfan Fang, MIT licence): what it does between building the model and counting it.
mended     the same with its two crashes mended (the forward that it puts into attentions lacks timm's `is_causal`; its
           num_heads has no entry for attentions of other classes), and the classifier ignored wherever it is.

The last two pass if the pruned model gives finite outputs of the same shape, has fewer parameters and MACs (by
torch-pruning's own count) and can be trained. That they compute the right thing is not asked of them. Where the
published flow runs into a limit, the mended one is not tried: it traces the model in the same way.
"""

import argparse
import multiprocessing
import os
import re
import time
import traceback
import warnings
from pathlib import Path

import compatibility
import psutil
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from compatibility import first
from timm.layers import set_fused_attn
from timm.models.vision_transformer import Attention, maybe_add_mask
from torch import nn

SECONDS, GIGABYTES = 30, 6  # that one attempt may take


def attempt_ours(variant, ratio):
    """What failed, and whether something of the attention was cut."""
    model, images = compatibility.build(variant)
    result = {"failed": {}, "has_attention": compatibility.has_attention(model)}
    try:
        found = compatibility.attempt(model, images, ratio=ratio)
        compatibility.use(found["pruned"], images, export=True)
    except Exception as error:
        return result | {"failed": {"vitopt": reason(error)}}
    cut = {change["kind"] for change in found["changes"]["axes"].values() if change["after"] < change["before"]}
    return result | {"attention_cut": bool(cut & {"heads", "head_dim"})}


def attempt_theirs(variant, ratio, mended):
    """The checks that failed, by name."""
    set_fused_attn(False)  # the example sets TIMM_FUSED_ATTN=0
    model, x = compatibility.build(variant)
    with torch.no_grad():
        shape = first(model(x)).shape
    try:
        counts = prune_as_example(model, x[:1], ratio, mended)
    except Exception as error:
        return {"failed": {"prune": reason(error)}}
    result = {"macs": round(counts[1][0] / counts[0][0], 4), "params": round(counts[1][1] / counts[0][1], 4)}
    failed = result["failed"] = {name: f"{result[name]} of before" for name in ("params", "macs") if result[name] >= 1}
    for name, check in {"output": lambda: check_output(model, x, shape),
                        "train": lambda: check_train(model, x, shape)}.items():
        try:
            check()
        except Exception as error:
            failed[name] = reason(error)
    return result


def prune_as_example(model, example_inputs, ratio, mended=True, counting=True):
    """What torch-pruning's example does with a model; (MACs, parameters) of before and after."""
    model(example_inputs)
    ignored_layers = []
    if hasattr(model, "head"):
        if isinstance(model.head, nn.Linear):
            ignored_layers.append(model.head)
        else:
            linears = [m for m in model.head.modules() if isinstance(m, nn.Linear)]
            ignored_layers += linears[-1:]
    if mended:
        classifier = model.get_classifier()
        for part in classifier if isinstance(classifier, (tuple, list)) else [classifier]:
            ignored_layers += [m for m in part.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    num_heads = {m.qkv: m.num_heads for m in model.modules() if isinstance(m, Attention)}
    before = tp.utils.count_ops_and_params(model, example_inputs) if counting else None
    pruner = tp.pruner.BasePruner(
        model, example_inputs, global_pruning=False, importance=tp.importance.GroupMagnitudeImportance(),
        iterative_steps=1, pruning_ratio=ratio, pruning_ratio_dict={}, num_heads=num_heads,
        ignored_layers=ignored_layers, round_to=8)
    for group in pruner.step(interactive=True):
        group.prune()
    for m in model.modules():
        if hasattr(m, "num_heads") and hasattr(m, "qkv"):
            if mended and m.qkv not in num_heads:
                continue
            m.forward = (mended_forward if mended else published_forward).__get__(m, Attention)
            m.num_heads = num_heads[m.qkv]
            m.head_dim = m.qkv.out_features // (3 * m.num_heads)
        elif hasattr(m, "num_heads") and hasattr(m, "qkv_proj") and not mended:
            m.num_heads = num_heads[m.qqkv_projkv]  # as published
    model(example_inputs)
    return before, tp.utils.count_ops_and_params(model, example_inputs) if counting else None


def published_forward(self, x, attn_mask=None):
    """The example's forward of an attention."""
    B, N, C = x.shape
    qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = self.q_norm(q), self.k_norm(k)
    if self.fused_attn:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask,
                                           dropout_p=self.attn_drop.p if self.training else 0.)
    else:
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = maybe_add_mask(attn, attn_mask)
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = attn @ v
    x = x.transpose(1, 2).reshape(B, N, -1)
    x = self.norm(x)
    x = self.proj(x)
    return self.proj_drop(x)


def mended_forward(self, x, attn_mask=None, is_causal=False):
    assert not is_causal
    return published_forward(self, x, attn_mask)


def check_output(model, x, shape):
    with torch.no_grad():
        output = first(model.eval()(x))
    assert output.shape == shape, f"output {tuple(output.shape)} instead of {tuple(shape)}"
    assert output.isfinite().all(), "output not finite"


def check_train(model, x, shape):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    output = model(x)
    outputs = output if isinstance(output, (tuple, list)) else [output]
    sum(part.float().square().mean() for part in outputs).backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    optimizer.step()
    check_output(model, x, shape)


ATTEMPTS = {
    "vitopt": attempt_ours,
    "published": lambda *args: attempt_theirs(*args, mended=False),
    "mended": lambda *args: attempt_theirs(*args, mended=True),
}


def reason(error):
    """An exception in one line, with the innermost place where it happened."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:240]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def child(queue, way, *args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # torch-pruning prints
    try:
        queue.put(ATTEMPTS[way](*args))
    except BaseException as error:
        queue.put({"failed": {"attempt": reason(error)}})


def attempt(context, way, *args):
    """One attempt in a process of its own."""
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, way, *args))
    process.start()
    start, why = time.monotonic(), None
    while process.is_alive() and queue.empty() and why is None:
        time.sleep(0.02)
        try:
            used = psutil.Process(process.pid).memory_info().rss / 2 ** 30
        except psutil.NoSuchProcess:
            used = 0
        if time.monotonic() - start > SECONDS:
            why = f"runs for more than {SECONDS} s"
        elif used > GIGABYTES:
            why = f"takes more than {GIGABYTES} GB"
    if why is None:
        try:
            return queue.get(timeout=5)
        except Exception:
            why = f"died with exit code {process.exitcode}"
        finally:
            process.join(5)
    process.kill()
    process.join()
    return {"failed": {"limit": why}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--only", default=".", help="a regular expression for 'family variant model'")
    parser.add_argument("--ways", nargs="+", choices=ATTEMPTS, default=list(ATTEMPTS))
    args = parser.parse_args()
    variants = [variant for variant in compatibility.variants()["variants"]
                if re.search(args.only, "{family} {variant} {name}".format(**variant))]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "torch_pruning", "compatibility"])
    rows = []
    for variant in variants:
        row = {}
        for way in args.ways:
            limit = way == "mended" and row.get("published", {"failed": {}})["failed"].get("limit")
            row[way] = {"failed": {"limit": limit}} if limit else attempt(context, way, variant, args.ratio)
            print("{family}, {variant}, {name}".format(**variant), way, row[way]["failed"] or "passes", flush=True)
        rows.append(row)
    print(f"\nOf {len(rows)} variants at ratio {args.ratio}, timm {timm.__version__}, torch {torch.__version__}:")
    for way in args.ways:
        print(f"  {way}: {sum(not row[way]['failed'] for row in rows)}")
    if "vitopt" in args.ways:
        with_attention = [row["vitopt"] for row in rows if row["vitopt"].get("has_attention")]
        print(f"  vitopt, the attention too: {sum(row.get('attention_cut', False) for row in with_attention)} of the "
              f"{len(with_attention)} that have one")


if __name__ == "__main__":
    main()
