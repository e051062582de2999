import json
import re

import pandas as pd
import pytest
import yaml
from PIL import Image

from vitopt import report
from vitopt.recipe import InputError

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
