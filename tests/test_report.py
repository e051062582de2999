import json
import re

import pandas as pd
import pytest
import scipy.stats
import yaml
from PIL import Image

from vitopt import report
from vitopt.errors import InputError

METRICS = {"accuracy": 98.0, "latency_ms": 2.0, "images_per_second": 4000.0, "model_size_mb": 0.8,
           "peak_memory_mb": 10.0, "macs": 4_000_000, "params": 200_000, "power_w": 30.0,
           "energy_j_per_1k_images": 5.0, "power_source": "measured", "device_name": "a <fast> machine", "threads": 2,
           "precision": "float32", "batch_size": 64, "test_images": 360}
WIDTHS = {"blocks.0.attn": {"num_heads": 4, "head_dim": 16}, "blocks.0.mlp": {"hidden_features": 128}}


@pytest.fixture
def folder(tmp_path):
    """Three finished runs and one unfinished."""
    for name, recipe, change, epochs in (
            ("tiny", {"model": {}, "distill": {}}, {"accuracy": 97.0, "macs": 1_000_000}, 3),
            ("baseline", {"model": {}}, {}, 3),
            ("pruned", {"start": "baseline"}, {"accuracy": 49.0, "latency_ms": 1.5, "params": 150_000}, 0)):
        run = tmp_path / "table" / name
        run.mkdir(parents=True)
        (run / "metrics.json").write_text(json.dumps(METRICS | change))
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (run / "model.json").write_text(json.dumps({"widths": WIDTHS}))
        columns = {"epoch": range(1, epochs + 1), "loss": [0.1] * epochs, "validation_accuracy": [90.0] * epochs}
        pd.DataFrame(columns).to_csv(run / "history.csv", index=False)
    (tmp_path / "table" / ".other.unfinished").mkdir()
    return tmp_path / "table"


@pytest.fixture
def seeds(folder):
    """Writes runs of several seeds of a row into the folder, each with what it changes in the metrics."""
    def write(name, changes, listed=None, **recipe):
        for seed, change in changes.items():
            run = folder / name / f"seed_{seed}"
            run.mkdir(parents=True)
            (run / "metrics.json").write_text(json.dumps(METRICS | change))
            provenance = {"seeds": listed or list(changes)}
            (run / "recipe.yaml").write_text(yaml.safe_dump(
                {"start": "baseline", "seed": seed, "provenance": provenance} | recipe))
            (run / "model.json").write_text(json.dumps({"widths": WIDTHS}))
            columns = {"epoch": [1, 2], "loss": [0.5, 0.1 * seed], "validation_accuracy": [90.0, 90.0 + seed]}
            pd.DataFrame(columns).to_csv(run / "history.csv", index=False)
    return write


def cells(markdown, title):
    """The table under a heading of the report, by row name."""
    lines = markdown.split(title)[1].split("|\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[0], {row[0]: row[1:] for row in rows[2:]}


def test_the_tables_show_each_row_and_its_change_in_percent(folder):
    report.write(folder)
    text = (folder / "report.md").read_text()
    titles, values = cells(text, "# table")
    assert [title.split(" (")[0] for title in titles] == [
        "Row", "Accuracy", "Latency", "Speed", "Size", "Memory", "MACs", "Parameters", "Power", "Energy"]
    assert list(values) == ["baseline", "pruned", "tiny"]
    assert values["baseline"] == ["98.00", "2.00", "4,000", "0.80", "10.0", "4.00", "0.200", "30.0", "5.00"]
    _, changes = cells(text, "## Change against baseline")
    assert changes["pruned"][:2] == ["-50.0 %", "-25.0 %"] and changes["pruned"][6] == "-25.0 %"
    assert changes["tiny"][5] == "-75.0 %" and set(changes["baseline"]) == {"+0.0 %"}


def test_the_csv_holds_the_full_numbers(folder):
    report.write(folder)
    table = pd.read_csv(folder / "report.csv", index_col="row")
    assert table.loc["pruned", "params"] == 150_000 and table.loc["tiny", "power_source"] == "measured"


def test_what_was_not_measured_is_marked_in_every_place_it_is_shown(folder):
    run = folder / "pruned" / "metrics.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"power_source": "estimated"}))
    terminal = report.write(folder)
    markdown, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for text in (terminal, markdown, page):
        assert len(re.findall(r"30\.0 \(est\.\)", text)) == 1 and len(re.findall(r"5\.00 \(est\.\)", text)) == 1
        assert "nothing on the machine measures this power" in text
    assert markdown.count("+0.0 % (est.)") == page.count("+0.0 % (est.)") == 2


def test_a_machine_that_knows_no_power_leaves_the_cell_empty(folder):
    run = folder / "tiny" / "metrics.json"
    unknown = {"power_w": None, "energy_j_per_1k_images": None, "power_source": "unavailable"}
    run.write_text(json.dumps(json.loads(run.read_text()) | unknown))
    report.write(folder)
    _, values = cells((folder / "report.md").read_text(), "# table")
    assert values["tiny"][-2:] == ["–", "–"]


def test_the_page_needs_no_other_file_and_quotes_what_it_shows(folder):
    report.write(folder)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page) and "a &lt;fast&gt; machine" in page


def test_four_plots_are_written(folder):
    report.write(folder)
    for name in ("accuracy_macs", "accuracy_latency", "widths", "learning_curves"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) >= 400 and len(image.convert("L").getcolors()) > 10


def test_rows_measured_on_different_machines_are_told_apart(folder):
    run = folder / "tiny" / "metrics.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"device_name": "another"}))
    terminal = report.write(folder)
    assert "baseline, pruned: measured on a <fast> machine" in terminal and "tiny: measured on another" in terminal


@pytest.mark.parametrize("name, content", [
    ("metrics.json", "[1]"), ("metrics.json", "{}"), ("recipe.yaml", "- a"), ("model.json", "3"),
    ("metrics.json", '{"accuracy": NaN}'), ("recipe.yaml", "a: &a [*a]"), ("history.csv", "")])
def test_a_run_that_holds_something_else_is_a_clear_error(folder, name, content):
    (folder / "tiny" / name).write_text(content)
    with pytest.raises(InputError, match="tiny: this run cannot be read"):
        report.write(folder)


def test_a_folder_without_runs_and_a_damaged_run_are_clear_errors(folder, tmp_path):
    with pytest.raises(InputError, match="holds no finished run"):
        report.write(tmp_path)
    (folder / "tiny" / "metrics.json").write_text("{")
    with pytest.raises(InputError, match="tiny: this run cannot be read"):
        report.write(folder)


def test_a_row_whose_fewer_macs_did_not_make_it_faster_is_warned_of(folder):
    said = "Warning: tiny has 75 % fewer MACs than baseline and is not faster on one image nor on a batch"
    assert said in report.write(folder) and said in (folder / "report.md").read_text()
    path = folder / "tiny" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latency_ms": 1.0, "images_per_second": 9000.0}))
    assert "Warning" not in report.write(folder)


SPREAD = {0: {"accuracy": 96.0, "macs": 2_000_000, "power_w": 10.0, "images_per_second": 1000.0},
          1: {"accuracy": 97.0, "macs": 2_000_001, "power_w": 20.0, "images_per_second": 2000.0},
          10: {"accuracy": 98.0, "macs": 2_000_002, "power_w": 30.0, "images_per_second": 3000.0}}


def test_seeds_are_one_row_of_means_with_intervals_where_they_differ(folder, seeds):
    seeds("several", SPREAD)
    (folder / "several" / "seed_0_old").mkdir()
    (folder / "several" / "seed_0_old" / "metrics.json").write_text("not a seed")
    terminal = report.write(folder)
    _, values = cells((folder / "report.md").read_text(), "# table")
    assert list(values) == ["baseline", "pruned", "several", "tiny"] and "different recipes" not in terminal
    half = 4.302653 / 3 ** 0.5  # Student's t of 2 degrees of freedom; the standard deviation is 1, 10 or 1000
    assert values["several"] == [f"97.00 ± {half:.2f}", "2.00", f"2,000 ± {1000 * half:,.0f}", "0.80", "10.0", "2.00",
                                 "0.200", f"20.0 ± {10 * half:.1f}", "5.00"]
    assert values["baseline"] == ["98.00", "2.00", "4,000", "0.80", "10.0", "4.00", "0.200", "30.0", "5.00"]
    _, changes = cells((folder / "report.md").read_text(), "## Change against baseline")
    assert changes["several"][0] == f"{100 * (97 / 98 - 1):+.1f} %" and changes["several"][5] == "-50.0 %"
    for text in (terminal, (folder / "report.md").read_text(), (folder / "report.html").read_text()):
        assert f"97.00 ± {half:.2f}" in text and "several: mean over 3 seeds (0, 1, 10)." in text
        assert "±: the 95 % interval of the mean by Student" in text


@pytest.mark.parametrize("values", [[1.0, 2.0], [95.3, 95.9, 94.1, 95.0, 97.2]])
def test_the_interval_is_that_of_the_t_distribution(values):
    low, high = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=scipy.stats.sem(values))
    assert report.interval(values) == pytest.approx((high - low) / 2)


def test_rows_of_different_numbers_of_seeds_stand_in_one_table_and_missing_seeds_are_said(folder, seeds):
    seeds("several", SPREAD)
    seeds("two", {4: {}, 3: {"accuracy": 90.0}}, listed=[3, 4, 5, 6])
    seeds("one", {0: {}}, listed=[0, 1])
    terminal = report.write(folder)
    assert ("one: mean over 1 seed (0; missing: 1); several: mean over 3 seeds (0, 1, 10); "
            "two: mean over 2 seeds (3, 4; missing: 5, 6).") in terminal
    _, values = cells((folder / "report.md").read_text(), "# table")
    assert values["one"] == values["baseline"] and values["two"][0] == "94.00 ± 50.82"  # 12.706 · 4


def test_a_table_without_lists_of_seeds_says_nothing_of_seeds(folder):
    terminal = report.write(folder)
    assert "±" not in terminal + (folder / "report.md").read_text() and "seed" not in terminal


def test_the_csv_holds_the_figures_of_every_seed(folder, seeds):
    seeds("several", SPREAD)
    report.write(folder)
    table = pd.read_csv(folder / "report.csv").set_index(["row", "seed"])
    assert list(table.index) == [("baseline", 0), ("pruned", 0), ("several", 0), ("several", 1), ("several", 10),
                                 ("tiny", 0)]
    assert table.loc["several", "accuracy"].tolist() == [96.0, 97.0, 98.0]
    assert table.loc[("several", 1), "macs"] == 2_000_001


def test_the_plots_show_means_with_error_bars_and_a_band_of_the_seeds(folder, seeds):
    seeds("several", SPREAD)
    rows = report.read(folder)
    axes, = report._plot_tradeoff(rows, "images_per_second", "", 1.0).axes
    bars, = axes.containers  # one row has several seeds
    (x, y), = [points.get_offsets()[0] for points in axes.collections if points.get_label() == "several"]
    assert bars.has_xerr and bars.has_yerr and (x, y) == (2000.0, 97.0)
    (low, high), = [line.get_segments()[0][:, 1] for line in bars[2] if line.get_segments()[0][0, 0] == x]
    assert (high - low) / 2 == pytest.approx(4.302653 / 3 ** 0.5) and (low + high) / 2 == pytest.approx(97.0)
    panel = report._plot_history(rows).axes[0]
    line, = [line for line in panel.lines if line.get_label() == "several"]
    assert line.get_ydata().tolist() == pytest.approx([90.0, 90 + 11 / 3])
    band, = panel.collections
    assert band.get_paths()[0].get_extents().bounds[1::2] == (90.0, 10.0)  # from the lowest seed, so high


def test_the_widths_are_means_over_the_seeds(folder, seeds):
    seeds("several", {0: {}, 1: {}})
    narrow = {"blocks.0.attn": {"num_heads": 2, "head_dim": 16}, "blocks.0.mlp": {"hidden_features": 64}}
    (folder / "several" / "seed_1" / "model.json").write_text(json.dumps({"widths": narrow}))
    heads, hidden = report._plot_widths(report.read(folder)).axes
    for axes, mean in ((heads, 48), (hidden, 96)):
        bar, = [bars[0] for bars in axes.containers if bars.get_label() == "several"]
        assert bar.get_height() == mean


def test_a_warning_of_a_row_that_is_no_faster_goes_by_the_means(folder, seeds):
    fast = {"latency_ms": 1.0, "images_per_second": 9000.0, "macs": 2_000_000}
    seeds("mostly", {0: fast, 1: fast, 2: {"macs": 2_000_000}})
    assert "Warning: mostly" not in report.write(folder)
    seeds("seldom", {0: fast | {"latency_ms": 1.9}, 1: {"macs": 2_000_000, "latency_ms": 2.2}})
    assert "Warning: seldom has 50 % fewer MACs than baseline and is not faster on one image:" in report.write(folder)


def test_what_one_seed_alone_lacks_is_not_hidden_by_the_mean(folder, seeds):
    seeds("several", {0: {}, 1: {"power_source": "estimated", "power_w": 40.0, "device_name": "another"},
                      2: {"energy_j_per_1k_images": None}})
    terminal = report.write(folder)
    _, values = cells((folder / "report.md").read_text(), "# table")
    assert values["several"][-2].endswith("(est.)") and values["several"][-1] == "–"
    assert "several (seed 1): measured on another" in terminal
    assert "several (seed 0), several (seed 2), tiny: measured on a <fast> machine" in terminal


def test_seeds_of_different_recipes_are_warned_of_and_a_folder_of_both_kinds_is_an_error(folder, seeds):
    seeds("several", {0: {}}, listed=[0, 1], train={"epochs": 1})
    seeds("several", {1: {}}, listed=[1], train={"epochs": 2})
    assert "Warning: the seeds of several were made by different recipes" in report.write(folder)
    seeds("tiny", {0: {}})
    with pytest.raises(InputError, match="seed_0: lies in a finished run of a single seed: .*--force"):
        report.write(folder)
