"""What a timm model is made of, what of it can be pruned, and what that would leave, without weights."""

import warnings

from torch import nn

from vitopt import metrics, model as models, pruning
from vitopt.errors import InputError
from vitopt.pruning import channels, depth
from vitopt.pruning.channels import EMBED
from vitopt.recipe import Model, Prune


def inspect(section: Model, prune: Prune | None = None) -> str:
    """Describe a timm model: blocks, parameters and MACs by part, prunable axes, what cannot be cut and why.

    Args:
        section: as in a recipe; weights are not loaded.
        prune: what would be cut; every layer is taken to lose alike, for without weights nothing ranks channels.

    Raises:
        InputError: there is no such model, or it cannot be cut so.
    """
    section = Model(**{"name": section.name.partition(".")[0], **section.model_extra})
    if problems := models.check(section):
        raise InputError(*problems)
    model = models.build(section, section.model_extra.get("num_classes", 1000)).eval()
    size = model.architecture["input"]
    params, macs = metrics.count_params(model), metrics.count_macs(model)
    lines = [f"{section.name}: {params:,} parameters, {macs:,} MACs for an image of {size['channels']} x "
             f"{size['height']} x {size['width']}", "", f"{'part':18}{'parameters':>16}{'MACs':>18}"]
    lines += [f"{part:18}{count['params']:>16,}{count['macs']:>18,}"
              for part, count in metrics.by_part(model).items() if count["params"] or count["macs"]]
    lines += ["", *_axes(model)]
    if prune is not None:
        lines += ["", *_what_is_left(model, prune)]
    return "\n".join(lines)


def _axes(model: nn.Module) -> list[str]:
    inputs = models.example_input(model)
    found, left = channels.attention_axes(model)
    found += channels.hidden_axes(model, inputs)
    whole = []
    for kind, find in ((EMBED, lambda: [channels.embed_axis(model, inputs)]),
                       (pruning.DEPTH, lambda: depth.influence(model, None, inputs))):
        try:
            whole.append((kind, find()))
        except InputError as error:
            left[kind] = str(error).split(": ", 2)[2]
    lines = ["prunable axes"]
    for kind in dict.fromkeys(axis.kind for axis in found):
        lines.append(f"  {kind}")
        runs = []  # layers built alike, one after another
        for axis in (axis for axis in found if axis.kind == kind):
            label = f"{axis.size} x {axis.channels} channels" if axis.channels > 1 else f"{axis.size} channels"
            label += {"k": " of q and k", "v": " of v"}.get(axis.letter, "") if kind == channels.HEAD_DIM else ""
            if runs and runs[-1][1] == label:
                runs[-1][0].append(axis.module)
            else:
                runs.append(([axis.module], label))
        lines += [f"    {modules[0]}{f' … {modules[-1]} ({len(modules)} layers)' if len(modules) > 1 else ''}: {label}"
                  for modules, label in runs]
    for kind, what in whole:
        lines.append(f"  {kind}: {what[0].size} channels" if kind == EMBED else
                     f"  {kind}: {len(what)} blocks, {next(iter(what))} … {list(what)[-1]}")
    if len(lines) == 1:
        lines.append("  none")
    if left:
        lines.append("cannot be cut")
        for reason in dict.fromkeys(left.values()):
            names = [name for name, other in left.items() if other == reason]
            lines.append(f"  {names[0]}{f' … {names[-1]} ({len(names)})' if len(names) > 1 else ''}: {reason}")
    return lines


def _what_is_left(model: nn.Module, section: Prune) -> list[str]:
    section = section.model_copy(update={"importance": "random", "repair": False, "ranking": "local"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        changes = pruning.prune(model, section)
    lines = [f"{section.model_dump(exclude_none=True, include={'ratio', 'target', 'axes', 'align'})} leaves"]
    for count in ("params", "macs"):
        before, after = changes[count]["before"], changes[count]["after"]
        lines.append(f"  {count}: {after:,} of {before:,} ({100 * after / before:.1f} %)")
    alike = {}
    for name, change in changes["axes"].items():
        alike.setdefault((change["kind"], change["before"], change["after"]), []).append(name)
    lines += [f"  {names[0]}{f' … {names[-1]} ({len(names)} layers)' if len(names) > 1 else ''}: {after} of {before}"
              for (_, before, after), names in alike.items()]
    return lines + [f"  warning: {warning.message}" for warning in said]
