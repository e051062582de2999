"""What a recipe may say, and reading it strictly.

A recipe is a YAML file; its stem names a row of the table. A section that is present happens. Whatever is wrong
in any of the files given is said at once, each mistake with its file, key, value and cure.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vitopt import files
from vitopt.errors import InputError, one_line

LONGEST = 100_000  # bytes of a recipe
MOST_VALUES, DEEPEST = 10_000, 30  # of a recipe with every alias written out


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """A timm model. Every other key of this section is a keyword argument of timm's model (img_size, depth, …)."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="a model name of timm, such as vit_small_patch16_224")
    pretrained: bool = Field(False, description="true to begin with timm's weights from the Hugging Face Hub")
    checkpoint: str | None = Field(None, description="a local .safetensors or .pth file of weights for this model")

    @model_validator(mode="after")
    def _one_source(self):
        if self.pretrained and self.checkpoint:
            raise ValueError("pretrained and checkpoint both name the first weights: keep one")
        return self


KNOWN_DATA = Literal["digits", "cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "folder", "wds", "hfds"]
ON_HUB = Annotated[str, Field(pattern="^hfds/.")]


class SplitNames(Section):
    """Which splits of a data set are meant; of WebDataset also which shards, such as train-{0000..0015}.tar|50000."""

    train: str | None = Field(None, description="a split, or shards such as train-{0000..0015}.tar")
    validation: str | None = Field(None, description="a split or shards; without it some of train are held out")
    test: str | None = Field(None, description="a split, or shards such as test-{0000..0003}.tar")


class Data(Section):
    name: str = Field(
        description="digits (comes with scikit-learn), a data set of torchvision, folder, wds (WebDataset shards), "
                    "hfds/<name> (of the Hugging Face Hub) or hfds (its library's files in a folder)")
    root: str | None = Field(
        None, description="an image folder with train/<class>/*.jpg and test/<class>/*.jpg; the folder or URL of "
                          "shards; without these, where downloads are kept")
    splits: SplitNames | None = Field(None, description="of wds and hfds, where they are not called train and test")
    num_classes: int | None = Field(None, ge=2, description="of wds and hfds, where nothing tells, such as 100")
    validation: float = Field(
        0.1, gt=0, le=0.5, description="share of the training images (of wds: of its shards) held out to choose the "
                                       "best epoch, such as 0.1")
    limit: int | None = Field(
        None, ge=2, description="at most so many training images, and as many test images, for a quick try")
    workers: int | None = Field(
        None, ge=0, description="processes that decode images beside each training process, such as 4")

    @field_validator("name", mode="before", json_schema_input_type=KNOWN_DATA | ON_HUB)
    @classmethod
    def _known(cls, value):
        known = get_args(KNOWN_DATA)
        if value not in known and not (isinstance(value, str) and re.match("hfds/.", value)):
            raise ValueError(f"{value!r} should be {', '.join(map(repr, known))} or hfds/<name>")
        return value

    @model_validator(mode="after")
    def _keys_fit(self):
        if self.name in ("wds", "hfds") and not self.root:
            raise ValueError(f"root: is missing: {self.name} needs the folder of the "
                             f"{'shards, or its URL' if self.name == 'wds' else 'files'}")
        if self.name == "wds" and self.limit:
            raise ValueError("limit: a stream is read as a whole: leave it out, or name fewer shards in splits")
        if self.name != "wds" and not self.name.startswith("hfds"):
            for key in ("splits", "num_classes"):
                if getattr(self, key):
                    raise ValueError(f"{key}: {self.name} knows its own: leave it out")
        return self


class Target(Section):
    macs: float | None = Field(None, gt=0, description="multiply-accumulates of one image, or a share such as 0.6")
    params: float | None = Field(None, gt=0, description="parameters, such as 5.0e+6, or a share such as 0.6")
    latency_ms: float | None = Field(None, gt=0, description="milliseconds a batch, such as 3.0")
    batch_size: int = Field(1, ge=1, description="images a batch, for latency_ms")

    @model_validator(mode="after")
    def _one(self):
        if sum(value is not None for value in (self.macs, self.params, self.latency_ms)) != 1:
            raise ValueError("give exactly one of macs, params and latency_ms")
        return self


class Prune(Section):
    ratio: float | dict[str, float] | None = Field(
        None, description="share of the prunable channels removed, between 0 and 1, such as 0.4; or one for each axis, "
                          "such as {heads: 0.25, hidden: 0.5}, or for layers by name, such as {blocks.0.*: 0.1}")
    target: Target | None = Field(None, description="instead of a ratio, what shall be left, such as {macs: 0.6}")
    axes: list[Literal["heads", "head_dim", "hidden", "embed", "depth"]] | None = Field(
        None, description="what may go; without it head dims (or heads, where they go whole) and hidden features")
    importance: Literal["l1", "l2", "taylor", "hessian", "activation", "gates", "random"] | None = Field(
        None, description="how channels are ranked: taylor (the loss on training images) where there are images, l2 "
                          "(magnitude) where there are none")
    ranking: Literal["global", "local", "isomorphic"] = Field(
        "global", description="global: all layers together; local: each by itself; isomorphic: those built alike")
    align: int | None = Field(
        None, ge=1, description="widths become multiples of it, such as 64; 1 for none; without it what the device "
                                "likes")
    steps: int = Field(1, ge=1, description="cuts in which it goes, with training between them, such as 3")
    step_epochs: int = Field(1, ge=1, description="epochs of training after each of these cuts but the last")
    repair: bool = Field(
        False, description="true to solve the layers that read what is left again, by least squares on training images")

    @field_validator("ratio", mode="before")
    @classmethod
    def _shares(cls, value):
        for share in value.values() if isinstance(value, dict) else [value]:
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
                raise ValueError(f"{share!r} is no share between 0 and 1, such as 0.4")
        return value

    @model_validator(mode="after")
    def _one_measure(self):
        if (self.ratio is None) == (self.target is None):
            raise ValueError("give exactly one of ratio and target")
        if self.ratio == {}:
            raise ValueError("ratio: names nothing: give an axis such as hidden: 0.5")
        if self.steps > 1 and self.target and self.target.latency_ms:
            raise ValueError("steps: a latency is no share that several cuts can divide: take macs, or one step")
        return self


class Teacher(Section):
    """A run, or a timm model; every other key is a keyword argument of timm's model."""

    model_config = ConfigDict(extra="allow")

    run: str | None = Field(None, description="the row beside this one, or the path of a run folder")
    name: str | None = Field(None, description="a model name of timm, such as deit3_small_patch16_224")
    pretrained: bool = Field(False, description="true for timm's weights from the Hugging Face Hub")
    checkpoint: str | None = Field(None, description="a local .safetensors or .pth file of weights for this model")
    weight: float = Field(1.0, gt=0, description="its share among several teachers, such as 2.0")

    @model_validator(mode="after")
    def _one_kind(self):
        if (self.run is None) == (self.name is None):
            raise ValueError("give exactly one of run (a former run) and name (a model of timm)")
        more = sorted({*self.model_extra, *(self.model_fields_set & {"pretrained", "checkpoint"})})
        if self.run and more:
            raise ValueError(f"a run takes no {', '.join(more)}: its folder says all")
        if self.name and self.pretrained == bool(self.checkpoint):
            raise ValueError(f"{self.name} knows nothing yet: give pretrained: true or a checkpoint")
        return self

    @property
    def model(self) -> Model:
        """The section of a timm model."""
        return Model(name=self.name, pretrained=self.pretrained, checkpoint=self.checkpoint, **self.model_extra)


class Logits(Section):
    loss: Literal["kl", "hard", "dkd", "dist", "standardized"] = Field(
        "kl", description="kl (Hinton), hard (the teacher's first class, DeiT), dkd, dist or standardized")
    temperature: float = Field(4.0, gt=0, description="softens both outputs, above 0, such as 4.0")
    weight: float = Field(
        0.7, gt=0, le=1, description="the teacher's share of the loss, above 0 and at most 1, such as 0.7")


class Layers(Section):
    layers: dict[str, str] | list[str] | None = Field(
        None, description="which of the student's layers, such as [blocks.5] or {blocks.5: blocks.11} with the "
                          "teacher's; without it every block")
    weight: float = Field(10.0, gt=0, description="what its loss is multiplied by, such as 10.0")

    @field_validator("layers", mode="before", json_schema_input_type=str | dict[str, str] | list[str] | None)
    @classmethod
    def _names(cls, value):
        value = [value] if isinstance(value, str) else value
        names = [*value, *value.values()] if isinstance(value, dict) else value
        if names is not None and not (isinstance(names, list) and names and all(isinstance(x, str) for x in names)):
            raise ValueError(f"{value!r} names no layers: give [blocks.5], or {{blocks.5: blocks.11}}")
        return value


class Relations(Section):
    weight: float = Field(1.0, gt=0, description="what its loss is multiplied by, such as 1.0")


class Distill(Section):
    teacher: list[Teacher] = Field(
        description="a row beside this one, the path of a run folder, a timm model such as "
                    "{name: …, pretrained: true}, or a list of such")
    logits: Logits | None = Field(Logits(), description="what the student learns of the outputs; null for nothing")
    features: Layers | None = Field(None, description="match what layers give, of the first teacher")
    attention: Layers | None = Field(None, description="match the attention maps of the first teacher")
    relations: Relations | None = Field(None, description="match distances and angles between images (RKD)")
    store: bool = Field(
        False, description="true to keep the teachers' outputs on disk, so that another student costs none of their "
                           "time")

    @field_validator("teacher", mode="before", json_schema_input_type=str | Teacher | list[str | Teacher])
    @classmethod
    def _as_list(cls, value):
        teachers = value if isinstance(value, list) else [value]
        if not teachers:
            raise ValueError("names none: give a row, a run folder or a timm model")
        if wrong := [teacher for teacher in teachers if not isinstance(teacher, (str, dict))]:
            raise ValueError(f"{wrong[0]!r} is no teacher: give a row, a run folder or {{name: …, pretrained: true}}")
        return [{"run": teacher} if isinstance(teacher, str) else teacher for teacher in teachers]

    @model_validator(mode="after")
    def _something_to_learn(self):
        live = [name for name in ("features", "attention", "relations") if getattr(self, name)]
        if not (self.logits or live):
            raise ValueError("teaches nothing: give one of logits, features, attention and relations")
        if self.store and live:
            raise ValueError(f"store keeps outputs alone, and {live[0]} needs the teacher itself: leave one out")
        return self


class Augment(Section):
    crop: Literal["pad", "resized"] | None = Field(
        None, description="pad: shift by up to `padding` pixels; resized: timm's random resized crop")
    padding: int = Field(4, ge=1, description="pixels, for crop: pad")
    scale: float = Field(0.08, gt=0, lt=1, description="least share of the area kept, for crop: resized")
    hflip: float = Field(0.0, ge=0, le=1, description="probability of a horizontal flip, such as 0.5")
    auto_augment: str | None = Field(None, description="a policy of timm, such as rand-m9-mstd0.5-inc1")
    random_erasing: float = Field(0.0, ge=0, le=1, description="probability, such as 0.25")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup, 0 for none, such as 0.8")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix, 0 for none, such as 1.0")
    mixup_off_epochs: int = Field(0, ge=0, description="the last epochs, without mixup and CutMix, such as 10")
    repeats: int = Field(1, ge=1, description="views of one image in a batch (repeated augmentation), such as 3")


class Train(Section):
    epochs: int = Field(ge=1, description="a whole number, such as 100")
    batch_size: int = Field(ge=1, description="images a step over all processes together, such as 128")
    lr: float = Field(gt=0, description="the highest learning rate, such as 5.0e-4")
    optimizer: str = Field("adamw", description="an optimizer of timm, such as adamw")
    weight_decay: float = Field(0.05, ge=0, description="such as 0.05")
    warmup_ratio: float = Field(
        0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises, before its cosine")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="the learning rate of each layer as a share of the next one's, such as 0.75")
    clip_grad: float | None = Field(None, gt=0, description="largest norm of the gradient, such as 1.0")
    accumulate: int = Field(1, ge=1, description="parts in which a batch is computed, where it does not fit, such as 4")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="such as 0.1")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep an exponential moving average of the weights, such as 0.9998")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="of matrix products; without it bf16 where the machine has it, or what the launcher says")
    compile: bool = Field(False, description="true for torch.compile")
    checkpoint_minutes: float = Field(
        10.0, ge=0, description="after how long the state of the training is kept again, such as 10.0; 0 for each step")
    checkpoint_epochs: int | None = Field(None, ge=1, description="after how many epochs too, such as 1")
    augment: Augment = Augment()
    tracker: str | None = Field(None, description="a tracker of accelerate that is installed, such as tensorboard")


Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[list[Seed], Field(min_length=1, json_schema_extra={"uniqueItems": True})]


class Recipe(Section):
    """One row of the table."""

    start: str | None = Field(
        None, description="the row beside this one, or the path of the run folder, that this row begins with")
    model: Model | None = Field(None, description="the timm model that this row begins with")
    data: Data = Field(description="the images")
    prune: Prune | None = Field(None, description="what is cut before training")
    distill: Distill | None = Field(None, description="who teaches")
    train: Train | None = Field(None, description="how long and how it trains")
    seed: Seed | Seeds = Field(0, description="a whole number, or several for a mean and its interval: [0, 1, 2]")
    provenance: dict[str, Any] | None = Field(None, description="written by a run; not read")

    @field_validator("seed", mode="before")
    @classmethod
    def _whole_numbers(cls, value):
        seeds = value if isinstance(value, list) else [value]
        for position, seed in enumerate(seeds):
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise ValueError(f"{seed!r} is no whole number from 0 on: write 0, or [0, 1, 2] for several seeds")
            if seed in seeds[:position]:
                raise ValueError(f"{seed} is there twice: keep one, each seed is one run")
        if not seeds:
            raise ValueError("[] names no seed: write 0, or [0, 1, 2] for several seeds")
        return value

    @model_validator(mode="after")
    def _sections_fit(self):
        if (self.start is None) == (self.model is None):
            raise ValueError("begin with exactly one of start (a former run) and model (a new one)")
        if self.distill and not self.train:
            raise ValueError("distill needs a train section: add one")
        if self.prune and self.prune.steps > 1 and not self.train:
            raise ValueError("prune.steps needs a train section, for the training between the cuts: add one")
        if self.data.name == "wds" and self.train and self.train.augment.repeats > 1:
            raise ValueError("train.augment.repeats: a stream gives each image once an epoch: leave it out")
        return self


def read(paths: list[str], overrides: list[str]) -> tuple[dict[Path, Recipe], list[str]]:
    """Read recipes strictly.

    Args:
        paths: YAML files, one a row.
        overrides: `section.key=value` each, the value as YAML. Given to every recipe that has the section.

    Returns:
        The recipes that could be read, by file, and every problem found in the others.
    """
    recipes, problems, contents = {}, [], {}
    for path in dict.fromkeys(map(Path, paths)):
        try:
            contents[path] = read_yaml(path)
            if not isinstance(contents[path], dict):
                problems.append(f"{path}: holds no recipe: write sections such as model, data and train")
                del contents[path]
        except FileNotFoundError:
            problems.append(f"{path}: there is no such file: check the path")
        except (OSError, ValueError) as error:
            problems.append(f"{path}: cannot be read ({error}): give a YAML file")
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1
            problems.append(f"{path}: line {line}: not YAML, {one_line(error.problem)}: mend this line")
        except yaml.YAMLError as error:
            problems.append(f"{path}: not YAML ({one_line(error)}): mend it")
    for override in overrides:
        problems += _override(contents, override)
    for path, content in contents.items():
        try:
            recipes[path] = Recipe.model_validate(content)
        except ValidationError as error:
            problems += [f"{path}: {one_line(_explain(problem))}" for problem in error.errors()]
    return recipes, problems


def sections(options: list[str]) -> tuple[dict, dict]:
    """Keyword arguments of a model, and of its pruning, from `key=value` and `prune.key=value`, the values as YAML.

    Raises:
        InputError: what is no such pair.
    """
    model, prune = {}, {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise InputError(f"{option}: is no key=value: write it as img_size=96 or prune.ratio=0.4")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            raise InputError(f"{one_line(option)}: {one_line(text)} is not YAML: write key=value, such as "
                             "prune.ratio=0.4") from None
        place = model
        if key.startswith("prune."):
            place, (*path, key) = prune, key.removeprefix("prune.").split(".")
            for part in path:
                place = place.setdefault(part, {})
        place[key] = value
    return model, prune


def section(kind: type[Section], options: dict[str, Any], place: str) -> Section:
    """A section of a recipe from keyword arguments.

    Raises:
        InputError: a keyword or a value that does not exist, each problem as in a recipe.
    """
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        problems = [problem | {"loc": (place, *problem["loc"])} for problem in error.errors()]
        raise InputError(*(one_line(_explain(problem)) for problem in problems)) from None


def read_yaml(path: Path):
    """What a YAML file says, as plain data.

    Raises:
        OSError, ValueError: it cannot be read. yaml.YAMLError: it is no YAML, or far more than a recipe can be.
    """
    return parse_yaml(files.read(path, LONGEST))


def parse_yaml(text: str):
    """What a YAML text says, as plain data.

    Raises:
        yaml.YAMLError: it is no YAML, or far more than a recipe can be.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # PyYAML's own, of dates that there are not, numbers without digits and the like
        raise yaml.YAMLError(f"a value is not of the kind it is marked or written as: {error}") from None


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here the second is an error. So is what a few lines can
    blow up: an alias stands for all that its anchor holds, and is counted so."""

    def fetch_flow_collection_start(self, token):
        if self.flow_level > DEEPEST:  # PyYAML would look for the end of each as a key, for seconds
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            values, depth = _size(node, {})
            if values > MOST_VALUES or depth > DEEPEST:
                raise yaml.YAMLError(f"with its aliases written out it is more than {MOST_VALUES:,} values, or nested "
                                     f"more than {DEEPEST} deep")
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a list or dictionary is no key", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node of YAML stands for, and how deep they are nested.

    Raises:
        yaml.YAMLError: a number has more digits than any can mean; Python would compute for seconds.
    """
    if node.tag.endswith(":int") and len(node.value) > 100:
        raise yaml.MarkedYAMLError(problem="a number of more than 100 digits", problem_mark=node.start_mark)
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1, 0  # for an alias inside of its own anchor
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        sizes = [_size(part, known) for part in nodes]
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    return known[id(node)]


def batch_problems(train: Train, num_processes: int) -> list[str]:
    """What is wrong with a batch size over so many processes."""
    size, parts = train.batch_size, num_processes * train.accumulate
    if size % parts:
        among = f"{num_processes} processes" + (f" of {train.accumulate} parts each" if train.accumulate > 1 else "")
        return [f"train.batch_size: {size} does not divide among {among}: take a multiple of {parts}"]
    if (train.augment.mixup or train.augment.cutmix) and size // num_processes % 2:
        return [f"train.batch_size: {size}: mixup and CutMix pair the {size // num_processes} images of each process: "
                f"take a multiple of {2 * num_processes}"]
    return []


def _override(contents: dict[Path, dict], override: str) -> list[str]:
    """Set one `section.key=value` in every content that has the section; the problems, if any."""
    key, _, text = override.partition("=")
    *sections, last = key.split(".")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return [f"{one_line(override)}: {one_line(text)} is not YAML: write section.key=value, such as train.epochs=3"]
    met = False
    for content in contents.values():
        place = content
        for depth, section in enumerate(sections):
            # a part of a section that stands in the recipe may be added (train.augment.hflip), a section may not
            place = place.setdefault(section, {}) if depth else place.get(section)
            if not isinstance(place, dict):
                break
        else:
            place[last] = value
            met = True
    if contents and not met:
        return [f"{override}: no recipe given has the section {'.'.join(sections)}: check the key"]
    return []


def _explain(problem: dict) -> str:
    """One line for one of pydantic's errors: key, value, what is wrong, cure."""
    place = problem["loc"]
    key, value, kind = ".".join(map(str, place)), problem["input"], problem["type"]
    if kind == "value_error":
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}"
    if kind == "extra_forbidden":
        known = list(_section(place[:-1]).model_fields)
        deeper = [name for name in known if place[-1] in getattr(_section((*place[:-1], name)), "model_fields", {})]
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        return f"{key}: unknown key; " + (
            f"it belongs in {deeper[0]}" if deeper else
            f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}")
    section = _section(place[:-1])
    field = section.model_fields.get(place[-1]) if section and place and isinstance(place[-1], str) else None
    meaning = f": {field.description}" if field else ""
    if kind == "missing":
        return f"{key}: is missing{meaning}"
    if isinstance(value, str) and kind in ("float_type", "int_type") and _is_number(value):
        return f"{key}: {value} is read as text by YAML: write {_as_yaml_number(value, kind)}"
    said = problem["msg"].replace("Input should be", "should be")
    return f"{key}: {value!r} {said}{meaning}" if said.startswith("should") else f"{key}: {value!r}: {said}{meaning}"


def _section(place: tuple) -> type[BaseModel] | None:
    """The section of a recipe at this place, such as ("train", "augment")."""
    section = Recipe
    for name in place:
        field = section.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            return None
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None:
            return None
    return section


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _as_yaml_number(text: str, kind: str) -> str:
    """A spelling of this number that PyYAML reads as one: it wants a dot and a signed exponent."""
    if kind == "int_type":
        return f"{float(text):.0f}"
    mantissa, exponent, power = text.strip().lower().partition("e")
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return mantissa + (f"{exponent}{int(power):+d}" if exponent else "")
