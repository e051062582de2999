"""What can be pruned of every structural variant of timm's transformers, each proven on a tiny model.

    python benchmarks/compatibility.py                 # writes docs/compatibility.md, about half an hour on two cores
    python benchmarks/compatibility.py --only '^swin'  # prints those rows alone

Every cell is a run: the pruned model is compared with the original whose removed channels are zeroed, fused and
unfused. With the default axes, at ratios 0.3 and 0.5, it is also saved, loaded, trained one step and exported.
"""

import argparse
import copy
import multiprocessing
import os
import re
import tempfile
import warnings
from pathlib import Path

import timm
import torch
import yaml

import vitopt
from vitopt import model as models
from vitopt.pruning import channels, proof

HERE = Path(__file__).parent
LIMIT = 1e-5  # relative difference in float32
AXES = ["heads", "head_dim", "hidden", "embed", "depth"]


def variants() -> dict:
    """`variants`, each with family, variant, name, kwargs and perhaps input; and the families `without_transformer`."""
    return yaml.safe_load((HERE / "variants.yaml").read_text(encoding="utf-8"))


def build(variant: dict) -> tuple[torch.nn.Module, torch.Tensor]:
    """A variant's tiny model, every weight of it at work, and two images."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 10} | (variant.get("kwargs") or {})
    model = timm.create_model(variant["name"], **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what timm begins with zero or one must count too
            if parameter.dim() <= 1 or parameter.std() < 1e-4:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    size = variant.get("input") or kwargs.get("img_size") or model.default_cfg["input_size"][-1]
    height, width = size if isinstance(size, list) else (size, size)
    images = torch.randn(2, 3, height, width)
    models.describe_timm(model, images)
    model.architecture["kwargs"] = {"in_chans": 3} | kwargs
    return model, images


def attempt(original: torch.nn.Module, images: torch.Tensor, **options) -> dict:
    """Prune a copy and compare it with the zeroed original, fused and unfused.

    Returns:
        `changes` of `vitopt.prune`, the `pruned` model and its relative `difference`.

    Raises:
        InputError: it cannot be pruned so. AssertionError: it can, and something is wrong.
    """
    pruned = copy.deepcopy(original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changes = vitopt.prune(pruned, example_inputs=images, **options)
    assert changes["params"]["after"] < changes["params"]["before"], "no smaller"
    difference, zeroed = 0.0, proof.reference(original, changes, images)
    for fused in (True, False):
        with attention(zeroed, fused), attention(pruned, fused):
            difference = max(difference, proof.distance(zeroed, pruned, images))
    assert difference < LIMIT, f"differs by {difference:.1e} from the zeroed original"
    return {"changes": changes, "pruned": pruned, "difference": difference}


def use(pruned: torch.nn.Module, images: torch.Tensor, export: bool) -> None:
    """What a user does with a pruned model: save, load, export, train.

    Raises:
        AssertionError: one of these goes wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        vitopt.save(pruned, folder)
        loaded = vitopt.load(folder)
    with torch.no_grad():
        expected = first(pruned(images))
        assert torch.equal(first(loaded(images)), expected), "another output after loading"
        if export:
            exported = torch.export.export(loaded, (images,)).module()
            torch.testing.assert_close(first(exported(images)), expected, rtol=1e-4, atol=1e-4)
    first(loaded.train()(images)).square().mean().backward()
    torch.optim.SGD(loaded.parameters(), lr=1e-6).step()
    with torch.no_grad():
        assert first(loaded.eval()(images)).isfinite().all(), "not finite after a step"


class attention:
    """Within it, every attention of a model is fused, or none is."""

    def __init__(self, model: torch.nn.Module, fused: bool):
        self.modules = {module: module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
        self.fused = fused

    def __enter__(self):
        for module in self.modules:
            module.fused_attn = self.fused

    def __exit__(self, *error):
        for module, own in self.modules.items():
            module.fused_attn = own


def first(output) -> torch.Tensor:
    """A model with two heads gives a pair in training."""
    return output[0] if isinstance(output, tuple) else output


def has_attention(model: torch.nn.Module) -> bool:
    axes, left = channels.attention_axes(model)
    return any(axis.kind in ("heads", "head_dim") for axis in axes) or bool(left)


def row(variant: dict) -> dict[str, str]:
    """One line of the matrix: how many layers were cut, by axis."""
    model, images = build(variant)
    cells, worst, attended = {}, 0.0, []
    for ratio in (0.3, 0.5):
        try:
            found = attempt(model, images, ratio=ratio)
            use(found["pruned"], images, export=ratio == 0.5)
            cells["default"], worst = "✓", max(worst, found["difference"])
            attended.append(any(change["kind"] in ("heads", "head_dim") for change in _cut(found)))
        except Exception as error:  # whatever goes wrong is what this page is to show
            cells["default"] = f"✗ {ratio}: {' '.join(str(error).split())[:80]}"
            break
    for axis in AXES:
        try:
            found = attempt(model, images, ratio=0.5, axes=[axis])
            cells[axis] = f"✓ {len(_cut(found))}" if axis not in ("embed", "depth") else "✓"
            worst = max(worst, found["difference"])
        except ValueError:
            cells[axis] = "–"
        except Exception as error:
            cells[axis] = f"✗ {' '.join(str(error).split())[:80]}"
    return {"family": variant["family"], "variant": variant["variant"], "model": variant["name"],
            "attention": "yes" if has_attention(model) else "no", "attended": all(attended) and bool(attended),
            **cells, "difference": f"{worst:.0e}"}


def _cut(found: dict) -> list[dict]:
    return [change for change in found["changes"]["axes"].values() if change["after"] < change["before"]]


def table(rows: list[dict[str, str]]) -> str:
    header = ["family", "variant", "model", "default", *AXES, "difference"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row[column] for column in header) + " |" for row in rows])


def page(rows: list[dict[str, str]]) -> str:
    smaller = [row for row in rows if row["default"] == "✓"]
    with_attention = [row for row in rows if row["attention"] == "yes"]
    attended = [row for row in with_attention if row["attended"]]
    return f"""# What can be pruned

Written by `python benchmarks/compatibility.py` with timm {timm.__version__}, torch {torch.__version__}, on tiny models
of {len(rows)} structural variants in {len({row['family'] for row in rows})} of timm's model families.

- **{len(smaller)} of {len(rows)}** are made smaller in their attention, MLPs or convolutional expansions,
- **{len(attended)} of {len(with_attention)}** that have attention are made smaller in their attention.

`default` is `vitopt.prune(model, ratio)` at ratios 0.3 and 0.5: the pruned model equals the original with the removed
channels zeroed, fused and unfused, is saved and loaded bit-identical, takes a training step and, at 0.5, is exported
by `torch.export` with equal outputs. The other columns are one axis each at ratio 0.5, compared in the same way: ✓ with
the number of layers cut, – where the axis cannot be cut, which `vitopt inspect MODEL` explains. The last column is the
largest difference of the row, relative to the largest output.

`heads` are whole heads; `head_dim` dims of every head; `hidden` hidden features of MLPs and expansions of convolutional
blocks; `embed` the embedding width of columnar models; `depth` whole blocks. Where a norm, a rotation or a softmax runs
over the dims of a head (qk-norm, RoPE, cosine and channel attention), heads go whole. Where a norm runs over channels
that are cut (an inner norm, the embedding width), the comparison lets the original's norm see the kept channels alone:
such a cut is no zeroing, and costs more accuracy before training than its size suggests.

{table(rows)}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=".", help="a regular expression for 'family variant model'")
    args = parser.parse_args()
    chosen = [variant for variant in variants()["variants"]
              if re.search(args.only, "{family} {variant} {name}".format(**variant))]
    rows = []
    # one thread each: the models are so small that a second one would mostly wait
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), torch.set_num_threads, [1]) as pool:
        for found in pool.imap(row, chosen):
            rows.append(found)
            print(found, flush=True)
    if args.only == ".":
        (HERE.parent / "docs" / "compatibility.md").write_text(page(rows), encoding="utf-8")
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
