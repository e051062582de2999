"""What a student learns from its teachers while it trains: which outputs and layers are compared, and by which loss.

A teacher is frozen, in eval mode, and sees the view that the student sees (Beyer et al., Knowledge distillation: a good
teacher is patient and consistent, CVPR 2022), at its own image size and normalisation.
"""

import fnmatch

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from vitopt import batches, devices, distillation, model as models
from vitopt.errors import InputError
from vitopt.pruning import depth
from vitopt.recipe import Distill, Layers
from vitopt.store import Store


class Listener:
    """What layers of a model give in its latest forward pass, by (kind, name), until it is closed."""

    def __init__(self, model: nn.Module, features=(), maps=(), embedding: bool = False):
        self.heard, self.fused = {}, {}
        self.hooks = [model.get_submodule(name).register_forward_hook(self._output(("features", name)))
                      for name in features]
        for name in maps:
            attention = model.get_submodule(name)
            self.fused[attention] = attention.fused_attn
            attention.fused_attn = False  # a fused attention never has its map
            self.hooks.append(attention.attn_drop.register_forward_pre_hook(self._input(("attention", name))))
        if embedding:
            classifier = model.get_classifier()
            classifier = classifier[0] if isinstance(classifier, (tuple, list)) else classifier
            self.hooks.append(classifier.register_forward_pre_hook(self._input(("embedding", ""))))

    def _output(self, key):
        return lambda module, args, output: self.heard.__setitem__(key, output)

    def _input(self, key):
        return lambda module, args: self.heard.__setitem__(key, args[0])

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()
        for attention, fused in self.fused.items():
            attention.fused_attn = fused


class Student(nn.Module):
    """A model that also gives what its listener hears, some of it projected to the teacher's width.

    The projections are trained with the model, and left behind with this class.
    """

    def __init__(self, model: nn.Module, listener: Listener, projections: dict[str, nn.Module]):
        super().__init__()
        self.model, self.listener = model, listener
        self.names = list(projections)
        self.projections = nn.ModuleList(projections.values())

    def forward(self, images):
        logits = self.model(images)
        heard = dict(self.listener.heard)
        self.listener.heard.clear()
        for name, projection in zip(self.names, self.projections):
            heard["features", name] = projection(heard["features", name])
        return logits, heard


class Teaching:
    """The teachers of one training.

    Args:
        distill: the recipe's section.
        teachers: models of vitopt, one for each of its teachers.
        student: what is trained.
        kept: by axis, which channels of the first teacher the student has kept, (groups, channels), where it descends
            from it.
        store: keeps outputs, or None.

    Raises:
        InputError: layers that are not there or cannot be compared.
    """

    def __init__(self, distill: Distill, teachers: list[nn.Module], student: nn.Module, device: torch.device,
                 kept: dict[str, torch.Tensor] | None = None, store: Store | None = None):
        self.distill, self.store = distill, store
        self.teachers = [teacher.to(device).eval().requires_grad_(False) for teacher in teachers]
        total = sum(section.weight for section in distill.teacher)
        self.shares = [section.weight / total for section in distill.teacher]
        self.sizes = [teacher.architecture["input"] for teacher in teachers]
        self.size = student.architecture["input"]
        self.student = student
        if hasattr(student, "set_distilled_training"):
            # in training mode it then gives its distillation token's logits too
            student.set_distilled_training(distill.logits is not None)
        first, both = teachers[0], (student, teachers[0])
        features, maps = check(distill, *both)
        self.pairs = [(kind, *pair) for kind, pairs in (("features", features), ("attention", maps))
                      for pair in pairs.items()]
        relations = bool(distill.relations)
        self.listens = bool(self.pairs or relations)
        self.network = student
        if self.listens:
            ours = Listener(student, features, maps, relations)
            self.listener = Listener(first, features.values(), maps.values(), relations)
            self.kept, projections = self._match(ours, student, device, kept or {})
            self.network = Student(student, ours, projections).to(device)

    def close(self) -> None:
        """Leave the models as they were."""
        if hasattr(self.student, "set_distilled_training"):
            self.student.set_distilled_training(False)
        if self.listens:
            self.listener.close()
            self.network.listener.close()

    def _match(self, ours, student, device, kept):
        """Which of the teacher's channels or heads each compared layer has, and projections where that is unknown."""
        student.to(device).eval()
        images = models.example_input(student, 2)
        with torch.no_grad():
            student(images)
            self.teachers[0](self._as_seen_by(0, images))
        found, projections = {}, {}
        for kind, name, theirs in self.pairs:
            key = f"distill.{kind}.layers"
            a, b = ours.heard.get((kind, name)), self.listener.heard.get((kind, theirs))
            for model, layer, tensor in (("student", name, a), ("teacher", theirs, b)):
                if not isinstance(tensor, torch.Tensor) or tensor.dim() < 3:
                    raise InputError(f"{key}: {layer} of the {model} gives no {kind}: name other layers")
            if kind == "attention":
                if a.shape[-2:] != b.shape[-2:]:
                    raise InputError(f"{key}: {name} looks at {a.shape[-1]} tokens and {theirs} of the teacher at "
                                     f"{b.shape[-1]}: take a teacher of the same tokens, or features")
                index = kept.get(f"{name}.heads")
                if index is not None and index.shape[1] == a.shape[1] and index.max() < b.shape[1]:
                    found[kind, name] = index[0].to(device)
                continue
            a, b = _channels_last(a, student), _channels_last(b, self.teachers[0])
            _same_positions(a, b, student, self.teachers[0], f"{key}: {name} and {theirs}")
            if a.shape[-1] != b.shape[-1]:
                index = _kept_channels(kept, name, a.shape[-1])
                if index is not None and index.max() < b.shape[-1]:
                    found[kind, name] = index.to(device)
                else:
                    projections[name] = _Projection(a.shape[-1], b.shape[-1], student)
        ours.heard.clear()
        return found, projections

    def _as_seen_by(self, number: int, images: torch.Tensor) -> torch.Tensor:
        """The student's images at a teacher's size, channels and normalisation."""
        ours, theirs = self.size, self.sizes[number]
        if all(ours[key] == theirs[key] for key in ("channels", "height", "width", "mean", "std")):
            return images
        images = images * _column(ours["std"], images) + _column(ours["mean"], images)
        if theirs["channels"] != ours["channels"]:
            images = images.mean(dim=1, keepdim=True).expand(-1, theirs["channels"], -1, -1)
        if (theirs["height"], theirs["width"]) != (ours["height"], ours["width"]):
            images = F.interpolate(images, (theirs["height"], theirs["width"]), mode="bicubic", antialias=True)
        return (images - _column(theirs["mean"], images)) / _column(theirs["std"], images)

    @torch.no_grad()
    def hear(self, batch: batches.Batch, accelerator: Accelerator) -> tuple[torch.Tensor, dict]:
        """What the teachers say of a batch: logits (rows, classes), averaged by their weights, and what is overheard of
        the first."""
        if self.store and (stored := self.store.read(batch.rows)) is not None:
            return stored.to(batch.images.device), {}
        with devices.autocast(accelerator):
            logits = sum(share * teacher(self._as_seen_by(number, batch.images)).float()
                         for number, (teacher, share) in enumerate(zip(self.teachers, self.shares)))
        return (self.store.add(logits) if self.store else logits), dict(self.listener.heard) if self.listens else {}

    def loss(self, outputs, batch: batches.Batch, label_loss: nn.Module,
             heard: tuple[torch.Tensor, dict]) -> torch.Tensor:
        """(1 − w) · label_loss + w · loss of the logits + Σ weight · loss of what else is compared."""
        outputs, ours = outputs if self.listens else (outputs, {})
        logits, token = outputs if isinstance(outputs, (tuple, list)) else (outputs, outputs)
        told, theirs = heard
        distill = self.distill
        loss = label_loss(logits, batch.targets)
        if distill.logits:
            weight = distill.logits.weight
            loss = (1 - weight) * loss + weight * logits_loss(distill.logits, token, told, batch.targets)
        for kind, name, other in self.pairs:
            section = distill.features if kind == "features" else distill.attention
            share = section.weight / sum(pair[0] == kind for pair in self.pairs)
            loss = loss + share * self._distance(kind, name, ours[kind, name], theirs[kind, other])
        if distill.relations:
            loss = loss + distill.relations.weight * distillation.relational(
                _pooled(ours["embedding", ""]), _pooled(theirs["embedding", ""]))
        return loss

    def _distance(self, kind, name, ours, theirs):
        index = self.kept.get((kind, name))
        if kind == "attention":
            return distillation.attention_divergence(ours, theirs if index is None else theirs[:, index])
        student, teacher = self.student, self.teachers[0]
        ours, theirs = _same_positions(_channels_last(ours, student), _channels_last(theirs, teacher), student, teacher,
                                       name)
        return distillation.feature_distance(ours, theirs if index is None else theirs[..., index])


def logits_loss(section, logits: torch.Tensor, told: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss that a recipe names, of (rows, classes) each."""
    temperature = section.temperature
    return {
        "kl": lambda: distillation.kl_divergence(logits, told, temperature),
        "hard": lambda: distillation.hard_label(logits, told),
        "dkd": lambda: distillation.decoupled(logits, told, targets, temperature),
        "dist": lambda: distillation.dist(logits, told, temperature),
        "standardized": lambda: distillation.standardized(logits, told, temperature),
    }[section.loss]()


class _Projection(nn.Module):
    """A linear map of the channels, wherever they are."""

    def __init__(self, before: int, after: int, model: nn.Module):
        super().__init__()
        self.linear = nn.Linear(before, after)
        self.channels_first = not _is_channels_last(model)

    def forward(self, x):
        if x.dim() == 4 and self.channels_first:
            return self.linear(x.movedim(1, -1)).movedim(-1, 1)
        return self.linear(x)


def check(distill: Distill, student: nn.Module, teacher: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """The layers whose features, and those whose attention maps are compared: the student's, each with the teacher's.

    Raises:
        InputError: layers that are not there.
    """
    return (_pairs(distill.features, student, teacher, _blocks, "features") if distill.features else {},
            _pairs(distill.attention, student, teacher, _attentions, "attention") if distill.attention else {})


def _pairs(section: Layers, student: nn.Module, teacher: nn.Module, candidates, kind: str) -> dict[str, str]:
    """The student's layers that are compared, each with the teacher's."""
    ours, theirs = ([*candidates(model)] for model in (student, teacher))
    if isinstance(section.layers, dict):
        pairs = section.layers
    elif section.layers:
        known = [name for name, _ in student.named_modules() if name]
        matching = {layer: fnmatch.filter(known, layer) or [layer] for layer in section.layers}
        pairs = {name: name for names in matching.values() for name in names}
    elif not ours or not theirs:
        raise InputError(f"distill.{kind}: no layers are known to compare here: name them in layers")
    elif student.architecture.get("removed_blocks") and set(ours) <= set(theirs):
        pairs = {name: name for name in ours}
    else:  # by depth: of fewer layers each is compared with the last of its share of the others
        pairs = {name: theirs[-(-(place + 1) * len(theirs) // len(ours)) - 1] for place, name in enumerate(ours)}
    for key, model, names in (("student", student, pairs), ("teacher", teacher, pairs.values())):
        known = dict(model.named_modules())
        for name in names:
            if name not in known or kind == "attention" and not hasattr(known[name], "attn_drop"):
                raise InputError(f"distill.{kind}.layers: {name}: the {key} has no such layer: it has "
                                 f"{', '.join([*candidates(model)][:4])} …")
    return pairs


def _blocks(model: nn.Module) -> list[str]:
    return [name for name, _ in depth.blocks(model)]


def _attentions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules()
            if hasattr(module, "fused_attn") and hasattr(module, "attn_drop")]


def _kept_channels(kept: dict[str, torch.Tensor], layer: str, width: int) -> torch.Tensor | None:
    """Which of the teacher's channels a layer of that width has: those of its MLP, or of the embedding."""
    for name, index in kept.items():
        module, _, kind = name.rpartition(".")
        inside = kind == "hidden" and f"{layer}.".startswith(f"{module}.") and layer != module or name == "embed"
        if inside and index.shape == (1, width):
            return index[0]
    return None


def _is_channels_last(model: nn.Module) -> bool:
    return str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")


def _channels_last(features: torch.Tensor, model: nn.Module) -> torch.Tensor:
    return features.movedim(1, -1) if features.dim() == 4 and not _is_channels_last(model) else features


def _same_positions(ours, theirs, student, teacher, place):
    """Features (batch, …, channels) at the same positions: the finer of two grids is averaged down to the coarser."""
    if ours.shape[1:-1] == theirs.shape[1:-1]:
        return ours, theirs
    grids = [_grid(features, model) for features, model in ((ours, student), (theirs, teacher))]
    if None in [grid if grid is None else 0 for grid in grids]:
        raise InputError(f"{place}: {tuple(ours.shape[1:-1])} and {tuple(theirs.shape[1:-1])} positions cannot be "
                         "compared: name other layers")
    size = [min(sides) for sides in zip(*(grid.shape[-2:] for grid in grids))]
    return tuple(F.adaptive_avg_pool2d(grid, size).movedim(1, -1) for grid in grids)


def _grid(features: torch.Tensor, model: nn.Module) -> torch.Tensor | None:
    """(batch, channels, height, width) of features with their channels last; class tokens and the like are left out."""
    if features.dim() == 4:
        return features.movedim(-1, 1)
    tokens = features[:, getattr(model, "num_prefix_tokens", 0):]
    side = round(tokens.shape[1] ** 0.5)
    return tokens.movedim(-1, 1).unflatten(-1, (side, side)) if side * side == tokens.shape[1] else None


def _pooled(embedding: torch.Tensor) -> torch.Tensor:
    return embedding.flatten(2).mean(-1) if embedding.dim() > 2 else embedding


def _column(values: list[float], images: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)
