"""What a model.json may say, checked as plain data before timm sees any of it.

Every model of vitopt carries `architecture`, a plain dictionary that says how to build it again:

    name      timm's name
    kwargs    timm's keyword arguments, num_classes and in_chans among them
    input     channels, height, width, mean, std, interpolation, crop_pct
    widths    by module: num_heads, head_dim, v_head_dim of an attention, hidden_features of an MLP
    removed_blocks  the blocks that pruning removed, if any
    classes   the names of the classes, in the order of the outputs (once they are known)
"""

import inspect
import math
import re
from pathlib import Path
from typing import Annotated, Any

import timm
from pydantic import ConfigDict, Field, ValidationError
from timm.models import build_model_with_cfg

from vitopt import files
from vitopt.recipe import Section

LONGEST = 2 ** 23  # bytes of a model.json; the names of 100,000 classes fit
LARGEST = 2 ** 20  # a width or a side of an image
LARGEST_INPUT = 2 ** 28  # numbers of one image
# What the numbers of one argument come to: timm makes lists as long as a model is deep before it makes a block, and
# walks through the pairs of a window's positions.
LARGEST_ARGUMENT, LARGEST_WINDOW, LARGEST_OUTPUT = 2 ** 17, 2 ** 8, 2 ** 24

# What timm's builders take for themselves: it makes them download, read files, or give something else than a model.
RESERVED = {"pruned", "features_only", "feature_cls", "kwargs", *inspect.signature(timm.create_model).parameters,
            *inspect.signature(build_model_with_cfg).parameters}

Size = Annotated[int, Field(ge=1, le=LARGEST)]


class _Input(Section):
    channels: Size
    height: Size
    width: Size
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float | None


class _Architecture(Section):
    model_config = ConfigDict(extra="ignore")

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    kwargs: dict[str, Any]
    input: _Input
    widths: dict[str, dict[str, Size]]
    removed_blocks: list[str] = []
    classes: list[str] = []


def read(path: Path) -> dict:
    """The architecture that a model.json holds.

    Raises:
        OSError: it cannot be read. ValueError: it is no such file.
    """
    content = files.read_json(path, LONGEST)
    check(content)
    return content


def check(content) -> None:
    """Whether this is an architecture, as JSON gives it: the keys above, of sizes that a model can have, and a model
    and arguments with which timm only builds.

    Raises:
        ValueError: it is none, with the first thing that is wrong.
    """
    try:
        found = _Architecture.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise ValueError(f"model.json: {place[:100]!r}: {problem['msg']}") from None
    size = found.input
    if not len(size.mean) == len(size.std) == size.channels:
        raise ValueError(f"model.json: input: {len(size.mean)} means and {len(size.std)} stds of {size.channels} "
                         "channels")
    if math.prod((size.channels, size.height, size.width)) > LARGEST_INPUT:
        raise ValueError(f"model.json: input: an image of {size.channels} × {size.height} × {size.width} numbers")
    for key in ("num_classes", "in_chans"):
        if type(found.kwargs.get(key)) is not int or found.kwargs[key] < 0:
            raise ValueError(f"model.json: kwargs.{key}: {found.kwargs.get(key)!r} is no number of outputs or channels")
    if problems := wrong_arguments(found.kwargs):
        raise ValueError(f"model.json: kwargs.{problems[0]}")
    if not timm.is_model(found.name):
        raise ValueError(f"timm {timm.__version__} has no model {found.name[:100]}")


def wrong_arguments(kwargs: dict) -> list[str]:
    """Which arguments for timm are not plain data that shapes a model, each problem as `key: what is wrong`."""
    problems = []
    for key, value in kwargs.items():
        most = LARGEST_WINDOW if "window" in key else LARGEST_OUTPUT if key == "num_classes" else LARGEST_ARGUMENT
        try:
            if key in RESERVED:
                problems.append(f"{key}: is no argument of a model, timm's builder takes it for itself: leave it out")
            elif not _total(value) <= most:  # NaN is not
                problems.append(f"{key}: its numbers come to more than {most:,}: take smaller ones")
        except (TypeError, RecursionError) as error:
            problems.append(f"{re.sub(r'[^ -~]', '?', key)[:100]}: {error}: give numbers, text, lists or dictionaries")
    return problems


def _total(value) -> float:
    """What the numbers in a value come to.

    Raises:
        TypeError: it holds something else than JSON can say.
    """
    if value is None or isinstance(value, (str, bool)):
        return 0
    if isinstance(value, (int, float)):
        return abs(value)
    if isinstance(value, dict):
        return sum(map(_total, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_total, value))
    raise TypeError(f"{type(value).__name__} is no plain data")
