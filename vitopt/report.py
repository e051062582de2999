"""Run folders to two tables, plots and one page."""

import base64
import json
import statistics
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import pandas as pd
import yaml
from pydantic import ValidationError
from scipy.stats import t as student_t

from vitopt import files
from vitopt.errors import InputError
from vitopt.recipe import Recipe, read_yaml

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402


@dataclass(frozen=True)
class Column:
    key: str  # in metrics.json
    title: str
    digits: int
    scale: float = 1.0
    from_power: bool = False  # then `power_source` says whether it was measured


COLUMNS = [
    Column("accuracy", "Accuracy (%)", 2),
    Column("latency_ms", "Latency (ms)", 2),
    Column("images_per_second", "Speed (images/s)", 0),
    Column("model_size_mb", "Size (MB)", 2),
    Column("peak_memory_mb", "Memory (MB)", 1),
    Column("macs", "MACs (M)", 2, scale=1e-6),
    Column("params", "Parameters (M)", 3, scale=1e-6),
    Column("power_w", "Power (W)", 1, from_power=True),
    Column("energy_j_per_1k_images", "Energy (J/1000 images)", 2, from_power=True),
]
LONGEST = 2 ** 24  # bytes of a JSON file of a run
INTERVALS = ("±: the 95 % interval of the mean by Student's t, and so the bars in the plots; the bands of the learning "
             "curves reach from the lowest to the highest seed.")


def write(folder: str | Path) -> str:
    """Write report.md, report.csv, report.html and the plots of all finished runs in a folder.

    Returns:
        The table and the names of the files, as text for a terminal.

    Raises:
        InputError: no finished run is there, or one cannot be read.
    """
    folder = Path(folder)
    rows = read(folder)
    plots = {
        "accuracy_macs.png": ("Accuracy against MACs", _plot_tradeoff(rows, "macs", "MACs of one image (M)", 1e-6)),
        "accuracy_latency.png": (
            "Accuracy against latency", _plot_tradeoff(rows, "latency_ms", "Latency of one image (ms)", 1.0)),
        "widths.png": ("Inner widths by block", _plot_widths(rows)),
        "learning_curves.png": ("Learning curves", _plot_history(rows)),
    }
    for name, (_, figure) in plots.items():
        figure.savefig(folder / name, dpi=130)
        plt.close(figure)
    titles = {name: title for name, (title, _) in plots.items()}
    values, changes, notes = _values(rows), _changes(rows), _notes(rows)
    pd.DataFrame([{"row": name, "seed": seed} | run["metrics"] for name, row in rows.items()
                  for seed, run in row["runs"].items()]).to_csv(folder / "report.csv", index=False)
    (folder / "report.md").write_text(_markdown(folder.name, values, changes, notes, titles), encoding="utf-8")
    (folder / "report.html").write_text(_page(folder, values, changes, notes, titles), encoding="utf-8")
    with pd.option_context("display.width", None, "display.max_columns", None):
        table = values.to_string()
    return "\n".join(["", table, *notes, "",
                      f"page:   {folder / 'report.html'}", f"tables: {folder / 'report.md'}, {folder / 'report.csv'}",
                      f"plots:  {', '.join(str(folder / name) for name in plots)}"])


def read(folder: Path) -> dict[str, dict]:
    """All finished runs in a folder by row name, each with `metrics`, their means where there are several seeds, and
    `runs`: by seed its `metrics`, `recipe`, `model` and `history`. `several` says whether its recipe lists seeds.

    The row named baseline comes first, then those that begin with a model and have no teacher, then by name.
    """
    rows = {}
    seeds = [path for path in folder.glob("[!.]*/seed_*/metrics.json")
             if path.parent.name.removeprefix("seed_").isdigit()]
    for metrics in sorted([*folder.glob("[!.]*/metrics.json"), *seeds]):
        run = metrics.parent
        try:
            content = {
                "metrics": files.read_json(metrics, LONGEST),
                "recipe": read_yaml(run / "recipe.yaml"),
                "model": files.read_json(run / "model.json", LONGEST),
            }
            if wrong := [name for name, part in content.items() if not isinstance(part, dict)]:
                raise ValueError(f"{wrong[0]} holds no keys")
            if missing := [column.key for column in COLUMNS if column.key not in content["metrics"]]:
                raise ValueError(f"metrics.json has no {missing[0]}")
            content["history"] = pd.read_csv(run / "history.csv")
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{run}: this run cannot be read ({error}): make it again with --force") from error
        several = run.parent != folder
        row = rows.setdefault(run.parent.name if several else run.name, {"runs": {}, "several": several})
        if row["several"] != several:
            raise InputError(f"{run}: lies in a finished run of a single seed: make the row again with --force")
        row["runs"][content["recipe"].get("seed", 0)] = content
    for row in rows.values():
        row["runs"] = dict(sorted(row["runs"].items()))
        row["metrics"] = _means([run["metrics"] for run in row["runs"].values()])
    if not rows:
        raise InputError(f"{folder}: holds no finished run: give the folder that holds the run folders, "
                         "such as runs/digits")

    def place(name):
        recipe = next(iter(rows[name]["runs"].values()))["recipe"]
        return name != "baseline", "start" in recipe or "distill" in recipe, name
    return {name: rows[name] for name in sorted(rows, key=place)}


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def _means(metrics: list[dict]) -> dict:
    """The means over runs of what the table shows; None where a run does not know. Anything else is the first run's."""
    means = dict(metrics[0])
    for column in COLUMNS:
        values = [run[column.key] for run in metrics]
        means[column.key] = None if None in values else statistics.fmean(values)
    unsure = [run["power_source"] for run in metrics if run["power_source"] != "measured"]
    return means | {"power_source": unsure[0] if unsure else "measured"}


def _each(row: dict, key: str) -> list[float]:
    return [run["metrics"][key] for run in row["runs"].values()]


def _values(rows: dict[str, dict]) -> pd.DataFrame:
    """The metrics of each row as text; what nothing on the machine measured says so in its cell."""
    def cell(row, column):
        mean = row["metrics"][column.key]
        if mean is None:
            return "–"

        def text(value):
            return f"{value * column.scale:,.{column.digits}f}"
        values = _each(row, column.key)
        differ = len(set(map(text, values))) > 1
        shown = f"{text(mean)} ± {text(interval(values))}" if differ else text(mean)
        return f"{shown} (est.)" if column.from_power and row["metrics"]["power_source"] != "measured" else shown
    return _table(rows, cell)


def _changes(rows: dict[str, dict]) -> pd.DataFrame:
    """The change of each metric against the first row, in percent of the first row's."""
    base = next(iter(rows.values()))["metrics"]

    def cell(row, column):
        metrics = row["metrics"]
        value, reference = metrics[column.key], base[column.key]
        if value is None or not reference:
            return "–"
        text = f"{100 * (value / reference - 1):+.1f} %"
        sources = metrics["power_source"], base["power_source"]
        return f"{text} (est.)" if column.from_power and sources != ("measured", "measured") else text
    return _table(rows, cell)


def _table(rows: dict[str, dict], cell) -> pd.DataFrame:
    return pd.DataFrame({column.title: [cell(row, column) for row in rows.values()] for column in COLUMNS},
                        index=pd.Index(rows, name="Row"))


def _notes(rows: dict[str, dict]) -> list[str]:
    """How the numbers were measured, and on what."""
    how = {}
    for name, row in rows.items():
        said = {}
        for seed, run in row["runs"].items():
            metrics = run["metrics"]
            text = (f"{metrics['device_name']}, {metrics['precision']}, eager; latency of one image on one CPU thread; "
                    f"speed, memory, power and energy at batch size {metrics['batch_size']} on "
                    f"{metrics['threads']} CPU threads; accuracy on {metrics['test_images']} test images")
            said.setdefault(text, []).append(f"{name} (seed {seed})")
        for text, names in said.items():
            how.setdefault(text, []).extend([name] if len(said) == 1 else names)
    notes = [f"Measured on {text}." if len(how) == 1 else f"{', '.join(names)}: measured on {text}."
             for text, names in how.items()]
    if any(row["metrics"]["power_source"] == "estimated" for row in rows.values()):
        notes.append("(est.): nothing on the machine measures this power; codecarbon estimates it from the load.")
    return notes + _seed_notes(rows) + _no_faster(rows)


def _seed_notes(rows: dict[str, dict]) -> list[str]:
    """Over which seeds the rows are means, which seeds are missing, and where more differs than the seed."""
    notes, over, intervals = [], {}, False
    for name, row in rows.items():
        if not row["several"]:
            continue
        recipes = {seed: run["recipe"] for seed, run in row["runs"].items()}
        wanted = {seed for recipe in recipes.values() for seed in (recipe.get("provenance") or {}).get("seeds", [])}
        missing = ", ".join(map(str, sorted(wanted - recipes.keys())))
        seeds = f"{len(recipes)} seeds" if len(recipes) > 1 else "1 seed"
        over.setdefault(f"{seeds} ({', '.join(map(str, recipes))}" + (f"; missing: {missing})" if missing else ")"),
                        []).append(name)
        intervals = intervals or len(recipes) > 1
        if len({json.dumps(_but_seed(recipe), sort_keys=True, default=str) for recipe in recipes.values()}) > 1:
            notes.append(f"Warning: the seeds of {name} were made by different recipes: make them again with --force.")
    means = "; ".join(f"{', '.join(names)}: mean over {seeds}" for seeds, names in over.items())
    return ([f"{means}."] if over else []) + ([INTERVALS] if intervals else []) + notes


def _but_seed(recipe: dict) -> dict:
    content = recipe | {"seed": 0, "provenance": None}
    with suppress(ValidationError):  # writes out the defaults that an older vitopt did not know
        return Recipe.model_validate(content).model_dump()
    return content


def _no_faster(rows: dict[str, dict]) -> list[str]:
    """Warnings of rows whose fewer MACs than the first row's did not make them faster on the same machine."""
    base, *others = (row["metrics"] for row in rows.values())
    warnings = []
    for name, metrics in zip(list(rows)[1:], others):
        same = metrics["device_name"] == base["device_name"] and metrics["macs"] < base["macs"]
        slower = [title for title, less in (
            ("one image", metrics["latency_ms"] >= base["latency_ms"]),
            ("a batch", metrics["images_per_second"] <= base["images_per_second"])) if less]
        if same and slower:
            warnings.append(f"Warning: {name} has {100 * (1 - metrics['macs'] / base['macs']):.0f} % fewer MACs than "
                            f"{next(iter(rows))} and is not faster on {' nor on '.join(slower)}: align its widths, or "
                            "measure on a quiet machine.")
    return warnings


def _plot_tradeoff(rows: dict[str, dict], key: str, label: str, scale: float) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for position, (name, row) in enumerate(rows.items()):
        x, y = row["metrics"][key] * scale, row["metrics"]["accuracy"]
        axes.scatter(x, y, s=70, label=name, color=f"C{position}")
        if len(row["runs"]) > 1:
            axes.errorbar(x, y, interval(_each(row, "accuracy")), interval(_each(row, key)) * scale, fmt="none",
                          capsize=3, color=f"C{position}")
    axes.set(xlabel=label, ylabel="Test accuracy (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


def _plot_widths(rows: dict[str, dict]) -> plt.Figure:
    figure, panels = plt.subplots(2, 1, figsize=(9, 6), layout="constrained")
    for axes, kind, title in (
            (panels[0], "head_dim", "Attention: num_heads × head_dim"),
            (panels[1], "hidden_features", "MLP: hidden features")):
        for position, (name, row) in enumerate(rows.items()):
            widths = pd.DataFrame([
                [width.get("num_heads", 1) * width[kind] for width in run["model"]["widths"].values() if kind in width]
                for run in row["runs"].values()]).mean()
            offset = (position - (len(rows) - 1) / 2) * 0.8 / len(rows)
            axes.bar([block + offset for block in range(len(widths))], widths, 0.8 / len(rows), color=f"C{position}",
                     label=name)
        axes.set(title=title, xlabel="Block", ylabel="Channels")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _plot_history(rows: dict[str, dict]) -> plt.Figure:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, title in (
            (panels[0], "validation_accuracy", "Validation accuracy (%)"), (panels[1], "loss", "Training loss")):
        for position, (name, row) in enumerate(rows.items()):
            seeds = pd.concat([run["history"] for run in row["runs"].values()]).groupby("epoch")[key]
            mean, color = seeds.mean(), f"C{position}"
            if len(mean):
                axes.plot(mean.index, mean, marker="." if len(mean) < 40 else None, color=color, label=name)
            if len(row["runs"]) > 1:
                axes.fill_between(mean.index, seeds.min(), seeds.max(), color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel="Epoch", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper")
    else:
        figure.suptitle("No row here was trained")
    return figure


def _markdown(name: str, values: pd.DataFrame, changes: pd.DataFrame, notes: list[str], plots: dict[str, str]) -> str:
    def table(frame):
        lines = [["Row", *frame.columns], ["---"] + ["---:"] * len(frame.columns)]
        lines += [[row, *cells] for row, cells in zip(frame.index, frame.values.tolist())]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts = [f"# {name}", table(values), *notes, f"## {_change_title(values)}", table(changes), "## Plots"]
    parts += [f"![{title}]({file})" for file, title in plots.items()]
    return "\n\n".join(parts) + "\n"


def _change_title(values: pd.DataFrame) -> str:
    return f"Change against {values.index[0]}, in percent of its value"


def _page(folder: Path, values: pd.DataFrame, changes: pd.DataFrame, notes: list[str], plots: dict[str, str]) -> str:
    """One HTML file that needs no other."""
    def table(frame):
        return frame.rename_axis(None).to_html(border=0, escape=True)

    def picture(file, title):
        encoded = base64.b64encode((folder / file).read_bytes()).decode()
        image = f'<img alt="{title}" src="data:image/png;base64,{encoded}">'
        return f"<figure><figcaption>{title}</figcaption>{image}</figure>"
    style = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .35em .8em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; }
tbody th { text-align: left; }
figure { margin: 2em 0; } figcaption { font-weight: 600; } img { max-width: 100%; }
"""
    name = escape(folder.name)
    parts = [f"<h1>{name}</h1>", f'<div class="wide">{table(values)}</div>']
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    parts += [f"<h2>{escape(_change_title(values))}</h2>", f'<div class="wide">{table(changes)}</div>']
    parts += [picture(file, title) for file, title in plots.items()]
    return (f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>vitopt: {name}</title>'
            f"<style>{style}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n")
