"""How much accuracy each layer costs when it alone is cut: a table, a heat map, and ratios for a recipe."""

import copy
from pathlib import Path

import matplotlib
import pandas as pd
import yaml

from vitopt import data, devices, model as models, pruning, training
from vitopt.errors import InputError
from vitopt.pruning import channels, importance as scoring
from vitopt.recipe import Augment, Prune, read

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def measure(folder: Path, ratios: list[float], images: int, importance: str, max_loss: float) -> str:
    """Cut each axis of each layer of a run's model by itself, on copies, and measure what is left of its accuracy.

    Accuracy is that on the run's validation images, never on its test images. Nothing is trained.

    Args:
        folder: a finished run.
        ratios: shares of the layer's channels removed.
        images: at most so many validation images.
        importance: how channels are ranked; see `recipe.Prune`.
        max_loss: percentage points that a layer may cost, for the ratios that are proposed.

    Returns:
        What was written, and the proposed `ratio` of a recipe's `prune` section.

    Raises:
        InputError: the folder holds no finished run, or its data are not there.
    """
    model = models.load(folder)
    recipes, problems = read([str(folder / "recipe.yaml")], [])
    if problems:
        raise InputError(*problems)
    section = next(iter(recipes.values())).data
    accelerator = devices.make_accelerator()
    splits = data.load(section, model.architecture["input"], Augment())
    model.to(accelerator.device)
    whole, count = training.evaluate(model, splits.validation, splits, accelerator, images)
    axes, _ = pruning.find_axes(model, Prune(ratio=0.5), models.example_input(model))
    scores = scoring.scores(model, axes, importance, training.calibration(splits, accelerator))
    accuracies = {}
    for axis in axes:
        sizes = {ratio: max(1, round(axis.size * (1 - ratio))) for ratio in ratios}
        accuracies[axis.name] = {
            ratio: _accuracy_without(model, axes, axis, scores, size, splits, accelerator, images)
            for ratio, size in sizes.items() if size < axis.size}
    table = pd.DataFrame(accuracies).T.reindex(columns=ratios)
    table.index.name, table.columns.name = "axis", "ratio"
    table.to_csv(folder / "sensitivity.csv")
    _plot(whole - table, folder / "sensitivity.png")
    proposed = {}
    for name, left in table.iterrows():
        if bearable := [ratio for ratio in ratios if whole - left[ratio] <= max_loss]:
            proposed[name] = max(bearable)
    text = (f"accuracy {whole:.2f} % on {count} validation images; written: {folder / 'sensitivity.csv'}, "
            f"{folder / 'sensitivity.png'}\n{(whole - table).round(2).to_string()}\n"
            f"percentage points lost by each layer alone. Ratios that cost at most {max_loss:g} of them each:\n")
    return text + yaml.safe_dump({"prune": {"ratio": proposed}}, sort_keys=False).rstrip()


def _accuracy_without(model, axes, axis, scores, size, splits, accelerator, images) -> float:
    smaller = copy.deepcopy(model)
    channels.cut(smaller, axes, {axis.name: pruning.strongest(scores[axis.name], size)})
    return training.evaluate(smaller, splits.validation, splits, accelerator, images)[0]


def _plot(loss: pd.DataFrame, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(2 + len(loss.columns), 1 + 0.3 * len(loss)), layout="constrained")
    picture = axes.imshow(loss.to_numpy(), aspect="auto", cmap="Reds", vmin=0)
    axes.set_xticks(range(len(loss.columns)), loss.columns)
    axes.set_yticks(range(len(loss)), loss.index)
    for row, (_, values) in enumerate(loss.iterrows()):
        for column, value in enumerate(values):
            if pd.notna(value):
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
                          color="white" if value > 0.6 * loss.max().max() else "black")
    axes.set(xlabel="Share of the layer's channels removed", title="Accuracy lost (percentage points), no training")
    figure.colorbar(picture)
    figure.savefig(path, dpi=150)
    plt.close(figure)
