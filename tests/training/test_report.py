"""The report shows what a run left behind, whatever of it there is, and lets no text of it act as markup."""

import base64
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image

from albef_ds.evaluation.retrieval import FoundCaption, RetrievalExample
from albef_ds.training.curves import MOST_POINTS, panels
from albef_ds.training.monitor import Monitor
from albef_ds.training.report import write_report
from tests.training.html_page import Page

ATTACK = '<script>alert("x")</script>&<img src=x onerror=y>'
METRICS = {
    "itc": {"tr@1": 45.3, "tr@5": 80.0, "tr@10": 99.0, "ir@1": 44.1, "ir@5": 79.0, "ir@10": 98.0, "mean": 74.2},
    "itm": {"tr@1": 81.7, "tr@5": 97.0, "tr@10": 100.0, "ir@1": 82.9, "ir@5": 96.0, "ir@10": 99.5, "mean": 92.8},
    **{"images": 256, "texts": 257, "k_test": 64},
}


@pytest.fixture
def run(tmp_path):
    """The folder of a short run, written by the real monitor."""
    folder = tmp_path / "run"
    monitor = Monitor(folder, rank=0, total_steps=20, samples_per_step=4, log_every=2, progress=False)
    for step in range(1, 21):
        values = {"lr": 1e-3, "temperature": torch.tensor([0.07]), "mi_bound_i2t": 0.1 * step, "own_measure": 1.0}
        monitor.log(step, {"itc": torch.tensor(5.0 / step), "mlm": torch.tensor(1.0)}, values)
    monitor.rejected([(f"{ATTACK}.jpg", "truncated")])
    summary = monitor.close() | {"retrieval": METRICS}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("task: pretraining\noptimizer: {lr: 0.0001}\nnote: '<i>&'\n")
    return folder


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / 'a"onload="b.png'
    Image.new("RGB", (900, 300), (200, 30, 30)).save(path)
    found = (FoundCaption(ATTACK, 0.3, 2.5, False), FoundCaption("a red box", 0.4, 1.25, True))
    return [RetrievalExample(str(path), ("a red box", "a missed <i>caption"), found)]


def test_a_whole_run_is_shown(run, samples):
    path = write_report(run, samples=samples)
    assert path == run / "report.html"
    page = Page(path.read_text())
    text = " ".join(page.texts)
    assert "missing" not in text
    assert {"81.7 %", "82.9 %", "45.3", "44.1", "99.5"} <= set(page.texts)  # headline and table
    assert "256 images, 257 texts, k_test 64" in text
    assert "optimizer.lr" in page.texts and "0.0001" in page.texts and "<i>&" in page.texts
    assert "Rejected samples: 1" in page.texts
    for title in ("Losses", "Learning rate", "Temperature", "Mutual information", "Samples per second", "own_measure"):
        assert title in page.texts
    assert "Alpha" not in page.texts  # was not logged


def test_ranked_captions_mark_the_right_one_and_name_the_missed(run, samples):
    html = write_report(run, samples=samples).read_text()
    items = re.findall(r'<li class="(\w+)">(.*?)</li>', html)
    assert [kind for kind, _ in items] == ["other", "right"]
    assert items[1][1].startswith("a red box <b>✓</b>") and "ITM +1.25, ITC +0.400" in items[1][1]
    assert "Not among them:</p><ul><li>a missed &lt;i&gt;caption</li></ul>" in html


def test_texts_cannot_act_as_markup(run, samples):
    html = write_report(run, samples=samples).read_text()
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "i", "iframe", "link"}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert html.count("<script>") == 0 and ATTACK in page.texts and f"{ATTACK}.jpg" in page.texts
    assert "default-src 'none'" in html


def test_nothing_is_loaded_from_outside_and_pictures_are_whole(run, samples):
    html = write_report(run, samples=samples).read_text()
    assert "http:" not in html and "https:" not in html and "url(" not in html
    kinds = [kind for kind, _ in Page(html).images]
    assert kinds.count("data:image/jpeg;base64") == 1
    assert kinds.count("data:image/svg+xml;base64") == len(kinds) - 1 >= 6
    for kind, content in Page(html).images:
        content = base64.b64decode(content)
        if "svg" in kind:
            assert ElementTree.fromstring(content).tag.endswith("svg")
        else:
            (run / "picture.jpg").write_bytes(content)
            assert Image.open(run / "picture.jpg").size == (320, 107)


def test_an_empty_folder_gives_a_report_that_says_what_is_missing(tmp_path):
    text = " ".join(Page(write_report(tmp_path).read_text()).texts)
    for name in ("config.yaml is missing", "summary.json is missing", "metrics.jsonl is missing", "No test images"):
        assert name in text


def test_broken_files_are_named_and_the_rest_is_shown(run, samples):
    (run / "config.yaml").write_text("a: [1")
    (run / "summary.json").write_text("[1]")
    (run / "metrics.jsonl").write_text('{"step": 2, "losses": {"itc": 1.5}}\n{"step": 4, "losses": {"itc": nul')
    samples[0] = RetrievalExample(str(run / "gone.jpg"), samples[0].captions, samples[0].found)
    page = Page(write_report(run, samples=samples).read_text())
    text = " ".join(page.texts)
    assert "config.yaml cannot be read" in text and "summary.json holds no mapping" in text
    assert "the file does not exist: gone.jpg" in text and "a red box" in text
    assert "Losses" in page.texts


def test_a_report_made_again_remembers_its_test_images(run, samples):
    first = write_report(run, samples=samples).read_text()
    assert write_report(run).read_text() == first
    (run / "examples.json").write_text('[{"image": 3}]')
    assert "No test images" in write_report(run).read_text()


def test_examples_remembered_before_there_were_two_kinds_are_still_read(run, samples):
    first = write_report(run, samples=samples).read_text()
    entries = json.loads((run / "examples.json").read_text())
    assert [entry.pop("kind") for entry in entries] == ["retrieval"]
    (run / "examples.json").write_text(json.dumps(entries))
    assert write_report(run).read_text() == first


def test_one_damaged_example_does_not_take_the_others_with_it(run, samples):
    (run / "metrics.jsonl").unlink()  # curves take their time
    write_report(run, samples=samples)
    entries = json.loads((run / "examples.json").read_text())
    (run / "examples.json").write_text(json.dumps([{"kind": "a new one"}, 7, *entries]))
    text = " ".join(Page(write_report(run).read_text()).texts)
    assert "examples.json: 2 of 3 test images cannot be read" in text and "a red box" in text
    for broken in ("{", '{"a": 1}', "[" * 100_000):
        (run / "examples.json").write_text(broken)
        assert "examples.json cannot be read" in write_report(run).read_text()


def test_numbers_that_are_none_are_left_out_of_the_headline(run):
    strange = {"steps": "many", "seconds": math.inf, "samples_per_s": math.nan, "mfu": True, "memory_gib": 10**400}
    (run / "summary.json").write_text(json.dumps(strange | {"retrieval": 3}))
    html = write_report(run).read_text()
    assert 'no mapping under "retrieval"' in html.replace("&quot;", '"')
    headline = html[html.index('class="tiles"') : html.index("</section>")]
    assert "total loss" in headline and not {"nan", "inf", "time", "memory"} & set(re.findall(r"\w+", headline))


def test_captions_that_are_no_valid_text_do_not_stop_it(run, samples):
    found = (FoundCaption("half a pair \ud83d", 0.1, 0.2, False),)
    html = write_report(run, samples=[RetrievalExample(samples[0].image, (r"$\frac$",), found)]).read_text()
    assert "half a pair ?" in html


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        write_report(tmp_path / "nowhere")


def test_curves_skip_what_is_no_number_and_keep_both_ends_of_long_ones():
    lines = [
        {
            "step": s,
            "losses": {"itc": s / 7, "x": None},
            "lr": None,
            "mi_bound_a": 1,
            "b": "text",
            "c": True,
            "d": math.inf,
        }
        for s in range(1500)
    ]
    losses, information = panels(lines)
    curve = losses.curves["itc"]
    assert set(losses.curves) == {"itc"} and set(information.curves) == {"mi_bound_a"}
    assert len(curve) <= MOST_POINTS + 1
    assert curve[0] == (0, 0.0) and curve[-1] == (1499, 1499 / 7)
    assert panels([]) == []


def test_names_that_matplotlib_would_interpret_are_drawn_as_they_are(run):
    line = {"step": 1, "losses": {"_hidden": 1.0, "$\\frac$": 2.0}}
    (run / "metrics.jsonl").write_text(json.dumps(line))
    pictures = [base64.b64decode(c).decode() for kind, c in Page(write_report(run).read_text()).images if "svg" in kind]
    assert "hidden" in pictures[0] and "\\frac" in pictures[0]
