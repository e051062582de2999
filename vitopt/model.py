"""Building a timm model, and what its blocks are.

Every model of vitopt carries `architecture`, a plain dictionary that says how to build it again:

    name      timm's name
    kwargs    timm's keyword arguments, num_classes and in_chans among them
    input     channels, height, width, mean, std, interpolation, crop_pct
    widths    by module: num_heads and head_dim of an attention, hidden_features of an MLP
    classes   the names of the classes, in the order of the outputs (once they are known)
"""

import difflib
import inspect
import json
import re
import sys
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.layers import Attention, Mlp, to_2tuple
from torch import nn

from vitopt.recipe import InputError, Model


def build(section: Model, num_classes: int, device: str = "cpu") -> nn.Module:
    """Build the model of a recipe's `model` section.

    Args:
        section: which timm model, its keyword arguments and its first weights.
        num_classes: outputs of the head.
        device: "meta" gives the shapes alone, without memory, weights or time.

    Raises:
        InputError: the weights cannot be had or do not fit.
    """
    kwargs = {"in_chans": 3, **section.model_extra, "num_classes": num_classes}
    img_size = kwargs.get("img_size")
    weights = device != "meta" and (section.pretrained or section.checkpoint)
    try:
        given = _first_weights(section) if weights else {}
        with torch.device(device):
            try:
                model = timm.create_model(section.name, **kwargs | given)
            except TypeError as error:
                if "unexpected keyword argument 'img_size'" not in str(error):
                    raise
                del kwargs["img_size"]  # a model for any size: img_size only says which images it is given
                model = timm.create_model(section.name, **kwargs | given)
        if model.num_classes != num_classes:
            model.reset_classifier(num_classes)
    except Exception as error:
        if not weights:
            raise
        source = f"model.checkpoint: {section.checkpoint}" if section.checkpoint else "model.pretrained: true"
        cure = ("give a whole .safetensors or .pth file of this architecture" if section.checkpoint
                else "connect to the Hugging Face Hub, or give model.checkpoint")
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{source}: the weights of {section.name} cannot be loaded ({reason}): {cure}") from error
    config = resolve_model_data_config(model)
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = to_2tuple(built_for or img_size or config["input_size"][-2:])
    channels = kwargs["in_chans"]
    model.architecture = {
        "name": section.name,
        "kwargs": kwargs,
        "input": {
            "channels": channels, "height": height, "width": width,
            "mean": _per_channel(config["mean"], channels), "std": _per_channel(config["std"], channels),
            "interpolation": config["interpolation"],
            # weights from elsewhere expect timm's centre crop; a model trained here sees whole images
            "crop_pct": config["crop_pct"] if weights else 1.0,
        },
        "widths": widths(model),
    }
    return model


def _first_weights(section: Model) -> dict:
    """timm's arguments that load a section's first weights.

    timm drops a checkpoint's head whenever the number of classes is not that of its own pretrained weights, and then
    forgives every other missing weight too. So a checkpoint is loaded strictly, with the head that it holds.
    """
    if section.pretrained:
        return {"pretrained": True}
    state_dict = timm.models.load_state_dict(section.checkpoint)
    classifier = timm.models.get_pretrained_cfg(section.name).classifier
    heads = [classifier] if isinstance(classifier, str) else list(classifier or [])
    num_classes = next((len(state_dict[f"{head}.weight"]) for head in heads if f"{head}.weight" in state_dict), 0)
    overlay = {"file": section.checkpoint, "num_classes": num_classes, "custom_load": False}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": num_classes}


def check(section: Model) -> list[str]:
    """What is wrong with a recipe's `model` section, each problem as `key: value: what; cure`."""
    base = section.name.partition(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        return [f"model.name: {section.name}: timm {timm.__version__} has no such model; "
                + (f"near names: {', '.join(near)}" if near else "timm.list_models() names all")]
    problems = []
    with_weights = timm.list_pretrained(base + ".*")
    if section.name != base and section.name not in with_weights or section.pretrained and not with_weights:
        problems.append(f"model.name: {section.name}: timm {timm.__version__} has no such weights; "
                        f"for {base} it has: {', '.join(with_weights) or 'none'}")
    if section.checkpoint and not Path(section.checkpoint).is_file():
        problems.append(f"model.checkpoint: {section.checkpoint}: there is no such file: check the path")
    kwargs = dict(section.model_extra)
    while True:
        try:
            model = build(Model(name=base, **kwargs), num_classes=2, device="meta")
        except TypeError as error:
            unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
            if not unknown or unknown[2] not in kwargs:
                return problems + [_unbuildable(section, error)]
            del kwargs[unknown[2]]  # once more without it, to find the other mistakes too
            accepted = inspect.signature(getattr(sys.modules[timm.models.model_entrypoint(base).__module__],
                                                 unknown[1])).parameters
            near = difflib.get_close_matches(unknown[2], [*accepted, "pretrained", "checkpoint"], n=1)
            problems.append(f"model.{unknown[2]}: {section.name} takes no such argument; "
                            + (f"did you mean {near[0]}?" if near else f"it takes {', '.join(accepted)}"))
        except (AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
            return problems + [_unbuildable(section, error)]
        else:
            return problems + _undivided(model)


def _unbuildable(section: Model, error: Exception) -> str:
    given = ", ".join(f"{key}={value}" for key, value in section.model_extra.items()) or "no arguments"
    return f"model: {section.name} cannot be built with {given}: {' '.join(str(error).split())}: mend these values"


def _undivided(model: nn.Module) -> list[str]:
    """An image whose sides are no multiples of the patch: timm would fail in the first forward pass."""
    embed = getattr(model, "patch_embed", None)
    image, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if not image or not patch or getattr(embed, "dynamic_img_pad", False):
        return []
    if all(side % part == 0 for side, part in zip(image, patch)):
        return []
    side, part = image[0], patch[0]
    return [f"model.img_size: {side} is not a multiple of the patch size {part}: "
            f"take {side // part * part or part} or {(side // part + 1) * part}"]


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    """timm gives mean and std for RGB; other numbers of channels take their average."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def num_classes(model: nn.Module) -> int:
    return model.architecture["kwargs"]["num_classes"]


def example_input(model: nn.Module, batch_size: int = 1) -> torch.Tensor:
    """Noise of the shape that the model takes: (batch_size, channels, height, width), on the model's device."""
    size = model.architecture["input"]
    return torch.randn(batch_size, size["channels"], size["height"], size["width"],
                       device=next(model.parameters()).device)


def attentions(model: nn.Module) -> dict[str, Attention]:
    """The attentions whose head_dim can change: timm's `Attention` where no norm spans the inner width."""
    return {
        name: module for name, module in model.named_modules()
        if type(module) is Attention and module.gate is None
        and all(isinstance(norm, nn.Identity) for norm in (module.q_norm, module.k_norm, module.norm))
    }


def other_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions that are none of `attentions`: their widths cannot change yet."""
    known = attentions(model)
    return {name: module for name, module in model.named_modules()
            if "Attention" in type(module).__name__ and hasattr(module, "num_heads") and name not in known}


def mlps(model: nn.Module) -> dict[str, Mlp]:
    """The MLPs whose hidden width can change: timm's `Mlp` of two linear layers without a norm between."""
    return {
        name: module for name, module in model.named_modules()
        if type(module) is Mlp and isinstance(module.fc1, nn.Linear) and isinstance(module.norm, nn.Identity)
    }


def widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """Inner widths by module name, in the order of the model."""
    found = {name: {"num_heads": attention.num_heads, "head_dim": attention.head_dim}
             for name, attention in attentions(model).items()}
    found |= {name: {"hidden_features": mlp.fc1.out_features} for name, mlp in mlps(model).items()}
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def set_head_dim(attention: Attention, head_dim: int) -> None:
    """Set what timm's attention reads beside the shapes of its weights."""
    attention.head_dim = head_dim
    attention.attn_dim = attention.num_heads * head_dim
    attention.scale = head_dim ** -0.5


def rebuild(architecture: dict, state_dict: dict[str, torch.Tensor]) -> nn.Module:
    """Build the model that `architecture` describes, with these weights, in eval mode.

    Raises:
        InputError: the weights do not fit the architecture.
    """
    try:
        model = timm.create_model(architecture["name"], **architecture["kwargs"])
        for name, width in architecture["widths"].items():
            module = model.get_submodule(name)
            if "head_dim" in width:
                set_head_dim(module, width["head_dim"])
                _resize(module.qkv, out_features=3 * module.attn_dim)
                _resize(module.proj, in_features=module.attn_dim)
            else:
                _resize(module.fc1, out_features=width["hidden_features"])
                _resize(module.fc2, in_features=width["hidden_features"])
        model.load_state_dict(state_dict)
    except (RuntimeError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the weights do not fit the architecture ({reason}): "
                         f"timm {timm.__version__} may differ from the version that saved them") from error
    model.architecture = architecture
    return model.eval()


def _resize(layer: nn.Linear, in_features: int | None = None, out_features: int | None = None) -> None:
    """Give a linear layer new, empty weights of another width; the caller loads them."""
    layer.in_features, layer.out_features = in_features or layer.in_features, out_features or layer.out_features
    layer.weight = nn.Parameter(layer.weight.new_empty(layer.out_features, layer.in_features))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(layer.out_features))


def save(model: nn.Module, folder: Path) -> None:
    """Write model.safetensors and model.json into a folder.

    Raises:
        OSError: it cannot be written, such as for want of space.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(weights, folder / "model.safetensors")
    except SafetensorError as error:
        raise OSError(None, str(error), str(folder / "model.safetensors")) from error
    (folder / "model.json").write_text(json.dumps(model.architecture, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path) -> nn.Module:
    """Load a model that `save` wrote, on the CPU and in eval mode. Nothing in the folder is executed.

    Raises:
        InputError: the folder holds no such model, or one that is cut short or does not fit.
    """
    folder = Path(folder)
    try:
        architecture = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        state_dict = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise InputError(f"{folder}: holds no model ({Path(error.filename or folder).name} is missing): "
                         "give the folder of a finished run") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: its model cannot be read ({error}): make this run again with --force") from error
    try:
        return rebuild(architecture, state_dict)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
