"""Examples are shown with their pictures, heat maps and boxes; what cannot be drawn is said beside the rest."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from albef_ds.evaluation.examples import Example
from albef_ds.evaluation.retrieval import FoundCaption, RetrievalExample
from albef_ds.training.report import write_report
from albef_ds.training.report_pictures import FOUND, THUMBNAIL, TRUE, annotated
from tests.training.html_page import Page

ATTACK = '<script>alert("x")</script><i>'
GREY = (128, 128, 128)
HOT_CORNER = ((0.0, 0.0), (0.0, 3.0))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "pictures" / 'a"onload="b<i>.png'
    path.parent.mkdir()
    Image.new("RGB", (80, 40), GREY).save(path)
    return str(path)


def shown(tmp_path, *samples):
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    page = Page(write_report(run, samples=samples).read_text())
    page.assert_harmless()
    return page


def share(image, colour):
    """Of the pixels that have about this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(np.asarray(image, int) - wanted).max(-1) < 12).mean()


def test_found_expected_and_which_is_right(tmp_path, picture):
    page = shown(
        tmp_path,
        Example((picture,), "how many stars?", "two (91%)", "two", True),
        Example((picture,), "what colour?", "red (40%)", "blue", False),
        Example((picture,), "who knows?", "nobody (10%)", None, None),
    )
    text = page.text
    assert "how many stars? found: two (91%) ✓ expected: two" in text
    assert "what colour? found: red (40%) ✗ expected: blue" in text
    assert "who knows? found: nobody (10%)" in text and text.count("expected:") == 2
    assert "true box" not in text  # no key to what is not there


def test_two_images_stand_side_by_side_and_an_unreadable_one_leaves_the_other(tmp_path, picture):
    page = shown(tmp_path, Example((picture, picture), "equal", "True", "True", True))
    assert len(page.photographs) == 2
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    for bad, reason in (
        ("gone.jpg", "does not exist"),
        ("broken.jpg", "cannot be decoded"),
        ("nul\0.jpg", "null byte"),
    ):
        page = shown(tmp_path, Example((str(tmp_path / bad), picture), "equal", "True", "True", True))
        assert len(page.photographs) == 1 and reason in page.text and "equal" in page.text


def test_both_kinds_are_remembered(tmp_path, picture):
    samples = [
        RetrievalExample(picture, ("its own",), (FoundCaption("another", 0.1, -0.3, False),)),
        Example((picture, picture), "said", "found", None, None),
        Example((picture,), "phrase", "region", None, True, HOT_CORNER, (1, 2, 3.5, 4), (5.25, 6, 7, 8)),
    ]
    shown(tmp_path, *samples)
    first = (tmp_path / "run" / "report.html").read_text()
    assert write_report(tmp_path / "run").read_text() == first
    assert {"another", "said", "phrase"} <= set(Page(first).texts)


@pytest.mark.parametrize(
    "change",
    [
        {"images": 3},
        {"text": None},
        {"right": "yes"},
        {"heatmap": [[1, "x"]]},
        {"heatmap": 3},
        {"true_box": [1, 2, 3]},
        {"found_box": "four"},
        {"true_box": [1, 2, 3, None]},
    ],
)
def test_a_remembered_example_of_another_form_is_left_out_and_counted(tmp_path, picture, change):
    good = Example((picture,), "good", "region", None, True, HOT_CORNER, (1, 2, 3, 4), (1, 2, 3, 4))
    shown(tmp_path, good, good)
    file = tmp_path / "run" / "examples.json"
    entries = json.loads(file.read_text())
    entries[0].update(change)
    file.write_text(json.dumps(entries))
    page = Page(write_report(tmp_path / "run").read_text())
    assert "1 of 2 test images cannot be read" in page.text and page.texts.count("good") == 1


def test_texts_and_file_names_cannot_act_as_markup(tmp_path, picture):
    page = shown(tmp_path, Example((picture, f"{ATTACK}.jpg"), ATTACK, ATTACK, ATTACK, False))
    assert page.text.count(ATTACK) == 3 and "onload" in page.text + str(page.tags)


def test_heat_is_drawn_where_it_is_and_the_picture_shows_through():
    drawn = annotated(Image.new("RGB", (80, 40), GREY), HOT_CORNER)
    pixels = np.asarray(drawn.image, int)
    assert drawn.faults == () and drawn.image.size == (THUMBNAIL, THUMBNAIL // 2)
    hot, cold = pixels[-5, -5], pixels[5, 5]
    assert hot[0] > 180 and hot[2] < 110  # yellow
    assert cold[2] > cold[0] + 10 and np.abs(cold - GREY[0]).max() < 50  # bluish, still grey


@pytest.mark.parametrize(
    ("heatmap", "fault"),
    [
        (((0.0,) * 3,) * 3, "zero everywhere"),
        (((-1.0, -2.0), (-3.0, 0.0)), "zero everywhere"),
        (((math.nan, 1.0), (1.0, 1.0)), "no numbers"),
        (((math.inf, 1.0), (1.0, 1.0)), "no numbers"),
        (((1.0, 2.0), (1.0,)), "no table"),
        ((), "no table"),
    ],
)
def test_a_heat_map_that_shows_nothing_leaves_the_picture_as_it_is(tmp_path, picture, heatmap, fault):
    drawn = annotated(Image.new("RGB", (80, 40), GREY), heatmap)
    assert len(drawn.faults) == 1 and fault in drawn.faults[0]
    assert (np.asarray(drawn.image) == GREY).all()
    page = shown(tmp_path, Example((picture,), "phrase", "region", None, False, heatmap))
    assert fault in page.text and len(page.photographs) == 1


def test_boxes_lie_where_they_are_in_the_enlarged_picture():
    drawn = annotated(Image.new("RGB", (80, 40), GREY), None, (20, 10, 40, 20), None)
    pixels = np.asarray(drawn.image, int)
    assert drawn.faults == ()
    green = np.argwhere(np.abs(pixels - [0x00, 0x9E, 0x73]).max(-1) < 12)
    (top, left), (bottom, right) = green.min(0), green.max(0)
    assert np.abs(np.array([left, top, right, bottom]) - [80, 40, 240, 120]).max() <= 3
    assert (pixels[80, 160] == GREY).all()  # nothing within


def test_the_found_box_is_dashed_and_the_true_one_is_not():
    both = annotated(Image.new("RGB", (80, 40), GREY), None, (20, 10, 40, 20), (20, 10, 40, 20)).image
    assert share(both, TRUE) > 0.003 and share(both, FOUND) > 0.003  # the true one is seen between the dashes
    solid = share(annotated(Image.new("RGB", (80, 40), GREY), None, (20, 10, 40, 20)).image, TRUE)
    dashed = share(annotated(Image.new("RGB", (80, 40), GREY), None, None, (20, 10, 40, 20)).image, FOUND)
    assert 0.4 * solid < dashed < 0.7 * solid


@pytest.mark.parametrize(
    ("box", "fault", "seen"),
    [
        ((60, 20, 100, 100), "reaches beyond", True),
        ((-10, -10, 30, 30), "reaches beyond", True),
        ((-1e308, -1e308, math.inf, 1e308), "is none", False),
        ((0, 0, 1e308, 1e308), "reaches beyond", True),
        ((80, 0, 5, 5), "outside the image of 80 x 40", False),
        ((-9, 0, 5, 5), "outside the image", False),
        ((0, 0, -5, 5), "is none", False),
        ((math.nan, 0, 5, 5), "is none", False),
        ((1, 2, 3), "no four numbers", False),
        ((0, 0, 80, 40), None, True),
        ((5, 5, 0, 0), None, True),
    ],
)
def test_boxes_beyond_the_image_are_cut_off_and_said(tmp_path, picture, box, fault, seen):
    drawn = annotated(Image.new("RGB", (80, 40), GREY), None, box)
    assert (len(drawn.faults) == 1 and fault in drawn.faults[0]) if fault else drawn.faults == ()
    assert (share(drawn.image, TRUE) > 0) == seen
    if len(box) == 4:
        page = shown(tmp_path, Example((picture,), "phrase", "region", None, False, None, box))
        assert (fault or "phrase") in page.text and len(page.photographs) == 1


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-200, 200)
boxes = st.none() | st.tuples(numbers, numbers, numbers, numbers)
heatmaps = st.none() | st.lists(st.lists(numbers, max_size=3), max_size=3)


@settings(max_examples=80, deadline=None)
@given(st.tuples(st.integers(1, 700), st.integers(1, 700)), heatmaps, boxes, boxes)
def test_whatever_is_to_be_drawn_a_picture_comes_out(size, heatmap, true_box, found_box):
    image = annotated(Image.new("RGB", size, GREY), heatmap, true_box, found_box).image
    assert max(image.size) == THUMBNAIL and image.mode == "RGB"
