"""The page of the downstream tasks compares their runs, and says what of them is missing."""

import json
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

import albef_ds.downstream as downstream
from albef_ds.data.shapes_world import write_shapes_world
from albef_ds.evaluation.examples import Example
from albef_ds.training.downstream_report import bar_chart, write_downstream_report
from albef_ds.training.report_examples import remember
from tests.training.html_page import Page

ATTACK = '"><script>alert(1)</script><i>'


def row(task, start, score):
    extra = {"steps": 600, "samples_per_s": 131.4, "seconds": 245.0, "run": f"{task}_{start}"}
    return {"task": task, "start": start, "measure": f"measure of {task}", "score": score, **extra}


@pytest.fixture
def output(tmp_path):
    """Two tasks, each from both starts."""
    folder, picture = tmp_path / "downstream", tmp_path / "picture.png"
    Image.new("RGB", (30, 30), (9, 99, 199)).save(picture)
    rows = [row("vqa", "pretrained", 71.2), row("vqa", "scratch", 40.4), row("nlvr", "scratch", 51.6)]
    rows.append(row("nlvr", "pretrained", 66.6))
    for entry in rows:
        run = folder / entry["run"]
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"task: {entry['task']}\n")
        (run / "summary.json").write_text(json.dumps({"steps": 600, entry["task"]: {"accuracy": entry["score"]}}))
        (run / "metrics.jsonl").write_text('{"step": 1, "losses": {"itc": 2.0}}\n{"step": 2, "losses": {"itc": 1.0}}\n')
        remember(run / "examples.json", [Example((str(picture),), f"question of {run.name}", "yes", "yes", True)])
    (folder / "downstream.json").write_text(json.dumps(rows))
    return folder


def page(output):
    path = write_downstream_report(output)
    assert path == output / "report.html"
    found = Page(path.read_text())
    found.assert_harmless()
    return found


def bars_of(chart):
    """The widths of the bars, then of the key's squares; and all texts. Nothing may reach beyond the chart's edge."""
    root = ElementTree.fromstring(chart)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    boxes = [(float(e.get("x")), float(e.get("width"))) for e in root.iter() if e.tag.endswith("rect")]
    assert max(x + width for x, width in boxes) < float(root.get("viewBox").split()[2])
    return [width for _, width in boxes], texts


def test_all_rows_are_compared_and_the_pretrained_runs_shown(output):
    found = page(output)
    assert {"71.2", "40.4", "51.6", "66.6", "measure of vqa", "0:04:05", "131", "nlvr_scratch"} <= set(found.texts)
    assert {"vqa, pretrained", "nlvr, pretrained", "Visual question answering"} <= set(found.texts)
    assert {"71.2 %", "66.6 %", "question of vqa_pretrained", "question of nlvr_pretrained"} <= set(found.texts)
    assert "question of vqa_scratch" not in found.text and found.texts.count("Losses") == 2
    assert "missing" not in found.text
    targets = {attrs["href"][1:] for tag, attrs in found.tags if tag == "a"}
    assert targets == {attrs["id"] for _, attrs in found.tags if "id" in attrs}


def test_bars_are_as_long_as_the_scores():
    rows = [row("a", "pretrained", 80.0), row("a", "scratch", 20), row("b", "scratch", 120)]
    widths, texts = bars_of(bar_chart(rows))
    assert widths[:3] == pytest.approx([4 * widths[1], widths[1], 5 * widths[1]], rel=0.01)  # no more than 100 percent
    assert texts == ["a", "80.0", "20.0", "b", "120.0", "pretrained", "scratch"]
    widths, texts = bars_of(bar_chart([row("a", "pretrained", None), row("a", "scratch", -3)]))
    assert widths[:2] == [0, 0] and texts[1:3] == ["–", "-3.0"]


def test_a_task_that_was_only_trained_from_scratch_is_shown_as_that(output):
    (output / "downstream.json").write_text(json.dumps([row("vqa", "scratch", 40.4)]))
    found = page(output)
    assert "vqa, scratch" in found.texts and "question of vqa_scratch" in found.texts


def test_a_run_that_is_gone_or_damaged_leaves_a_gap(output):
    shutil.rmtree(output / "vqa_pretrained")
    (output / "nlvr_pretrained" / "summary.json").write_text("{")
    (output / "nlvr_pretrained" / "metrics.jsonl").unlink()
    found = page(output)
    assert "folder of the run is missing: vqa_pretrained" in found.text and "71.2" in found.texts
    assert "summary.json cannot be read" in found.text and "metrics.jsonl is missing" in found.text
    assert "question of nlvr_pretrained" in found.texts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "downstream.json is missing"),
        ("[{", "downstream.json cannot be read"),
        ("{}", "holds no list"),
        ("[]", "no task has been run"),
        ('[3, {"task": 4}, {"task": "vqa"}]', "2 of 3 rows name no task"),
    ],
)
def test_a_list_of_rows_that_is_none_is_said_to_be(output, content, said):
    (output / "downstream.json").unlink()
    if content is not None:
        (output / "downstream.json").write_text(content)
    assert said in page(output).text


def test_rows_cannot_act_as_markup_nor_lead_out_of_the_folder(output):
    (output.parent / "elsewhere").mkdir()
    (output.parent / "elsewhere" / "summary.json").write_text('{"vqa": {"accuracy": 12.3}}')
    rows = [{key: ATTACK for key in row("", "", 0)}]
    rows += [
        {**row(f"t{i}", "pretrained", 1), "run": run} for i, run in enumerate(["../elsewhere", "..", "", None, "\0"])
    ]
    (output / "downstream.json").write_text(json.dumps(rows))
    found = page(output)
    assert ATTACK in found.texts and "12.3" not in found.text
    assert found.text.count("folder of the run is missing") == len(rows)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        write_downstream_report(tmp_path / "nowhere")


def test_downstream_ends_with_the_page(tmp_path, monkeypatch, capsys):
    demo = tmp_path / "demo"
    write_shapes_world(demo / "data", 12, 4, seed=0, size=32)
    (demo / "albef.pth").touch()

    def launch(recipe, settings):
        folder = tmp_path / next(s.split("=", 1)[1] for s in settings if s.startswith("output_dir="))
        folder.mkdir(parents=True)
        summary = {"steps": 3, "seconds": 1.5, "samples_per_s": 2.0, "vqa": {"accuracy": 43.2, "questions": 4}}
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0

    monkeypatch.setattr(downstream, "launch", launch)
    assert downstream.downstream(demo, tmp_path / "out", tasks=["vqa"]) == 0
    report = tmp_path / "out" / "report.html"
    assert f"report: {report}" in capsys.readouterr().out
    assert "43.2" in Page(report.read_text()).texts
