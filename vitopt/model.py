"""Building a timm model, what its blocks are, and keeping it in a folder without a pickle."""

import difflib
import inspect
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import nn

from vitopt import architecture as architectures, files, layouts
from vitopt.errors import InputError, one_line
from vitopt.recipe import Model


def build(section: Model, num_classes: int | None, device: str = "cpu") -> nn.Module:
    """Build the model of a recipe's `model` section.

    Args:
        section: which timm model, its keyword arguments and its first weights.
        num_classes: outputs of the head; None for those that the weights have.
        device: "meta" gives the shapes alone, without memory, weights or time.

    Raises:
        InputError: the weights cannot be had or do not fit.
    """
    kwargs = {"in_chans": 3, **section.model_extra} | ({"num_classes": num_classes} if num_classes else {})
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
        if num_classes and model.num_classes != num_classes:
            model.reset_classifier(num_classes)
        kwargs["num_classes"] = model.num_classes
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
    if wrong := architectures.wrong_arguments(section.model_extra):
        return problems + [f"model.{problem}" for problem in wrong]
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


def describe_timm(model: nn.Module, example_inputs: torch.Tensor | None = None) -> None:
    """Give a model that timm built its `architecture`, as far as timm tells; a model of vitopt has its own.

    Raises:
        InputError: this is no model of timm's.
    """
    if hasattr(model, "architecture"):
        return
    config = getattr(model, "pretrained_cfg", None) or {}
    if not config.get("architecture"):
        raise InputError(f"{type(model).__name__} is no model of timm's (it has no pretrained_cfg): make it by "
                         "timm.create_model")
    channels, height, width = example_inputs.shape[1:] if example_inputs is not None else config["input_size"]
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if example_inputs is None and built_for:
        height, width = to_2tuple(built_for)
    model.architecture = {
        "name": config["architecture"],
        "kwargs": {"num_classes": model.num_classes, "in_chans": channels},
        "input": {
            "channels": channels, "height": height, "width": width,
            "mean": _per_channel(config["mean"], channels), "std": _per_channel(config["std"], channels),
            "interpolation": config["interpolation"], "crop_pct": config["crop_pct"],
        },
        "widths": widths(model),
    }


def widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """Inner widths by module name, in the order of the model: of attentions num_heads, head_dim (of q and k) and, where
    it differs, v_head_dim; of MLPs hidden_features."""
    found = {"": {"embed_dim": model.embed_dim}} if isinstance(getattr(model, "embed_dim", None), int) else {}
    for name, module in model.named_modules():
        layout = layouts.find(module)
        if layout:
            sizes = layouts.widths(module, layout)
            width = {field: sizes[letter] for field, letter in WIDTHS.items() if letter in sizes}
            if width.get("head_dim") == width.get("v_head_dim"):
                width.pop("v_head_dim", None)
            found[name] = width
        elif isinstance(getattr(module, "fc2", None), nn.Linear):
            found[name] = {"hidden_features": module.fc2.in_features}
    return found


WIDTHS = {"num_heads": "h", "head_dim": "k", "v_head_dim": "v", "hidden_features": "f"}


def set_embed_dim(model: nn.Module, before: int, after: int) -> None:
    """What timm's columnar models say of their embedding width, beside the shapes of their weights."""
    for module in model.modules():
        for name in ("embed_dim", "num_features", "head_hidden_size"):
            if getattr(module, name, None) == before and not isinstance(module, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, after)


class Skip(nn.Module):
    """Stands where a block was removed: passes on what it is given."""

    def forward(self, x, *args, **kwargs):
        return x


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost blocks: members of a list or sequence that are called so."""
    def descend(name, module):
        in_list = isinstance(module, (nn.Sequential, nn.ModuleList))
        for path, child in module.named_children():
            full = f"{name}.{path}".strip(".")
            if in_list and "Block" in type(child).__name__:
                yield full, child
            else:
                yield from descend(full, child)

    return list(descend("", model))


def skip_blocks(model: nn.Module, names: list[str]) -> None:
    """Put `Skip` in the place of these modules."""
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Skip())


def _rebuild(architecture: dict, state_dict: dict[str, torch.Tensor]) -> nn.Module:
    """Build the model that `architecture` describes, with these weights that fit it, in eval mode."""
    model = _before_cuts(architecture)
    _resize(model, architecture["widths"], {name: tensor.shape for name, tensor in state_dict.items()})
    model.load_state_dict(state_dict)
    model.architecture = architecture
    return model.eval()


def _refuse_misfits(architecture: dict, found: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Compare an architecture with what a file of weights holds, on the meta device, where nothing takes memory.

    Args:
        found: by name, dtype and shape.

    Raises:
        ValueError: they do not fit, or the model would be out of all proportion to the file. timm raises what it likes.
    """
    shapes = {name: torch.Size(shape) for name, (_, shape) in found.items()}
    tensors = len(found) + 20 * len(architecture.get("removed_blocks", []))
    with torch.device("meta"), _at_most(min(MOST_CALLS, 10 ** 6 + CALLS_A_TENSOR * tensors), 100 + 2 * tensors):
        model = _before_cuts(architecture)
        ours = model.state_dict()
        if ours.keys() != found.keys():
            raise ValueError(f"{min(ours.keys() ^ found.keys())!r} is in only one of them")
        for name, (dtype, shape) in found.items():
            before = ours[name]
            cut = len(shape) == before.dim() and all(0 < new <= old for new, old in zip(shape, before.shape))
            if not (cut or shape == before.shape) or ("F" in dtype) != before.is_floating_point():
                raise ValueError(f"{name} is {dtype} {list(shape)}, of {before.dtype} {list(before.shape)} before cuts")
        for key, dim in (("classifier", 0), ("first_conv", 1)):  # what comes out and goes in is never cut
            layers = model.pretrained_cfg.get(key) or []
            for weight in [f"{layer}.weight" for layer in ([layers] if isinstance(layers, str) else layers)]:
                if weight in ours and shapes[weight][dim:dim + 1] != ours[weight].shape[dim:dim + 1]:
                    raise ValueError(f"{weight} is {list(shapes[weight])}, of {list(ours[weight].shape)} before cuts")
        held = sum(shape.numel() * ours[name].element_size() for name, shape in shapes.items())
        takes = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
        if takes > 2 ** 28 + LARGEST_CUT * held:
            raise ValueError(f"it takes {takes:,} bytes before its cuts, and after them {held:,}")
        _resize(model, architecture["widths"], shapes)
        if misfits := [name for name, tensor in model.state_dict().items() if tensor.shape != shapes[name]]:
            raise ValueError(f"{misfits[0]} cannot be cut to {list(shapes[misfits[0]])}")


LARGEST_CUT = 100  # how many times as much memory a model may have taken before: a tenth of every width is left
# TinyViT walks in Python through the pairs of a window's positions, others need a few thousand calls for a tensor.
CALLS_A_TENSOR, MOST_CALLS = 200_000, 10 ** 8


@contextmanager
def _at_most(calls: int, parameters: int):
    """End what runs within by a ValueError after so many calls of functions or so many parameters: timm's loops are as
    long as an argument says. Where a profiler is at work, it is left alone."""
    register = nn.Module.register_parameter.__code__

    def count(frame, event, argument):
        nonlocal calls, parameters
        calls -= 1
        parameters -= event == "call" and frame.f_code is register
        if calls < 0 or parameters < 0:
            raise ValueError("building it takes far longer than a file of this size can be worth")

    if sys.getprofile() is not None:
        yield
        return
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def _before_cuts(architecture: dict) -> nn.Module:
    """timm's model of an architecture, in its own widths, without the blocks that were removed.

    Raises:
        ValueError: there are no such blocks. timm raises what it likes.
    """
    kwargs = {key: _with_numbers(value) for key, value in architecture["kwargs"].items()}
    model = timm.create_model(architecture["name"], **kwargs)
    removed = architecture.get("removed_blocks", [])
    if unknown := sorted(set(removed) - dict(blocks(model)).keys()):
        raise ValueError(f"removed_blocks: {unknown[0]!r} is no block")
    skip_blocks(model, removed)
    return model


def _with_numbers(value):
    """JSON has no numbers for keys, and timm takes dictionaries of window sizes."""
    return {int(key) if str(key).isdigit() else key: item for key, item in value.items()} if isinstance(
        value, dict) else value


def _resize(model: nn.Module, saved: dict[str, dict[str, int]], shapes: dict[str, torch.Size]) -> None:
    """Give a new model the widths of a saved one, with empty weights; the caller loads them."""
    fresh = {name: (layout, layouts.widths(module, layout)) for name, module in model.named_modules()
             if (layout := layouts.find(module))}
    resized = False
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in shapes and tensor.shape != shapes[name]:
            _replace(model, name, tensor.new_empty(shapes[name]))
            resized = True
    if not resized:
        return
    if "embed_dim" in saved.get("", {}):
        set_embed_dim(model, model.embed_dim, saved[""]["embed_dim"])
    for name, (layout, before) in fresh.items():
        module, after = model.get_submodule(name), dict(before)
        width = saved.get(name, {})
        width = {"v_head_dim": width["head_dim"]} | width if "head_dim" in width else width
        after |= {letter: width[field] for field, letter in WIDTHS.items() if field in width and letter in before}
        for member in layouts.members(module, layout):  # buffers that are not saved
            path = ".".join(filter(None, (name, member.path, member.tensor)))
            if path not in shapes:
                tensor = getattr(member.owner(module), member.tensor)
                shape = list(tensor.shape)
                shape[member.dim] = layouts.length(member.expression, after)
                _replace(model, path, tensor.new_zeros(shape))
            elif layouts.length(member.expression, after) != shapes[path][member.dim]:
                raise ValueError(f"widths.{name}: {saved.get(name)} is not what {path} has")
        layouts.follow(module, before, after)


def _replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, name = name.rpartition(".")
    owner = model.get_submodule(owner)
    is_parameter = isinstance(getattr(owner, name), nn.Parameter)
    setattr(owner, name, nn.Parameter(tensor) if is_parameter else tensor)
    layouts.fit(owner)


def save(model: nn.Module, folder: str | Path) -> None:
    """Write model.safetensors and model.json into a folder.

    Raises:
        InputError: the model cannot be built again from what is known of it.
        OSError: it cannot be written, such as for want of space.
    """
    folder = Path(folder)
    describe_timm(model)
    _refuse_unknown_arguments(model)
    content = json.dumps(model.architecture, indent=2) + "\n"
    try:
        architectures.check(json.loads(content))
    except ValueError as error:
        raise InputError(f"this model could not be loaded again ({one_line(error, 300)}): make it with other "
                         "arguments") from error
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, model.state_dict(), model.architecture)


def write(folder: Path, weights: dict[str, torch.Tensor], architecture: dict) -> None:
    """Write what `load` reads, into a folder that is there.

    Raises:
        OSError: it cannot be written, such as for want of space.
    """
    write_tensors(folder / "model.safetensors", weights)
    (folder / "model.json").write_text(json.dumps(architecture, indent=2) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors by name, from any device.

    Raises:
        OSError: they cannot be written, such as for want of space.
    """
    # cloned, for some models hold one tensor under several names and safetensors refuses that
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(own, file)
    except SafetensorError as error:
        raise OSError(None, str(error), str(file)) from error


def _refuse_unknown_arguments(model: nn.Module) -> None:
    """timm does not keep the arguments that a model was made with: without them another one would be built."""
    architecture = model.architecture
    with torch.device("meta"):
        again = _before_cuts(architecture)
    ours = {name: tensor.dim() for name, tensor in model.state_dict().items()}
    theirs = {name: tensor.dim() for name, tensor in again.state_dict().items()}
    if ours != theirs:
        name = min(ours.keys() ^ theirs.keys(), default=next(iter(ours)))
        raise InputError(f"{architecture['name']} was made with arguments that timm does not keep ({name} differs "
                         "without them): make it by vitopt.create_model with the same arguments")


def load(folder: str | Path) -> nn.Module:
    """Load a model that `save` wrote, on the CPU and in eval mode.

    Nothing in the folder is executed. Memory is taken once the architecture, and the names, dtypes and shapes of the
    weights, are known to fit one another.

    Raises:
        InputError: the folder holds no such model, or one that is cut short or does not fit.
    """
    folder = Path(folder)
    try:
        architecture = architectures.read(folder / "model.json")
        with files.open_tensors(folder / "model.safetensors") as (file, found):
            try:
                _refuse_misfits(architecture, found)
                return _rebuild(architecture, {name: file.get_tensor(name) for name in found})
            except Exception as error:  # whatever timm makes of arguments that make no sense
                reason = one_line(f"{type(error).__name__}: {error}", 300)
                raise InputError(f"{folder}: the weights do not fit the architecture ({reason}): timm "
                                 f"{timm.__version__} may differ from the version that saved them") from error
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{folder}: holds no model ({Path(error.filename or folder).name} is missing): "
                         "give the folder of a finished run") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its model cannot be read ({one_line(error, 300)}): make this run again with "
                         "--force") from error
