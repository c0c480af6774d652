"""The command line, as people and machines use it."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from albef_ds.__main__ import main
from albef_ds.inference.explain import overlay, shown
from albef_ds.inference.search import ImageIndex
from albef_ds.inference.teacher_view import Example, load_teacher, pseudo_targets
from albef_ds.model.weight_files import read_state_dict
from tests.inference.conftest import draw


def said(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_answer(zoo, pictures, models, capsys):
    command = ["answer", str(zoo / "vqa.pth"), str(pictures), "--question", "what?", "--device", "cpu", "--json"]
    assert main([*command, "--top", "2"]) == 0
    result = said(capsys)
    assert len(result["results"]) == 5 and [len(r["answers"]) for r in result["results"]] == [2] * 5
    assert [fault["image"].endswith("broken.jpg") for fault in result["left_out"]] == [True]
    (best,) = models["vqa"].answer(pictures / "a.png", "what?")[0]
    assert result["results"][0]["answers"][0]["probability"] == pytest.approx(best.probability, rel=1e-3)


def test_answers_from_a_list(zoo, readable, tmp_path, capsys):
    (tmp_path / "answers.json").write_text('["red", "circle"]')
    answers = ["--answers", str(tmp_path / "answers.json")]
    assert main(["answer", str(zoo / "vqa.pth"), str(readable[0]), "--question", "what", *answers]) == 0
    assert capsys.readouterr().out.split(": ")[1].split()[0] in ("red", "circle")


def test_match_names_what_it_cannot_read_and_goes_on(zoo, pictures, models, capsys):
    images = [str(pictures / "broken.jpg"), str(pictures / "a.png"), str(pictures / "no\x1bsuch.png")]
    texts = ["a red circle", "two squares"]
    assert main(["match", str(zoo / "retrieval.pth"), *images, "--text", *texts, "--json"]) == 0
    captured = capsys.readouterr()
    (result,) = json.loads(captured.out)["results"]
    expected = models["retrieval"].match(pictures / "a.png", texts).tolist()
    assert list(result["match"].values()) == pytest.approx(expected, rel=1e-3)
    assert "left out" in captured.err and "broken.jpg" in captured.err
    assert "\x1b" not in captured.err and "no\\x1bsuch.png" in captured.err


def test_where_no_image_can_be_read_the_status_is_1(zoo, pictures, tmp_path, capsys):
    assert main(["match", str(zoo / "retrieval.pth"), str(pictures / "broken.jpg"), "--text", "a"]) == 1
    assert main(["search", str(zoo / "retrieval.pth"), str(tmp_path), "--text", "a"]) == 1
    assert "no image in this folder" in capsys.readouterr().err


def test_classify_labels_every_sentence_about_every_image(zoo, pictures, models, capsys):
    texts = ["a red circle", "two squares"]
    command = ["classify", str(zoo / "entailment.pth"), "--image", str(pictures), "--text", *texts, "--batch", "2"]
    assert main([*command, "--json"]) == 0
    result = said(capsys)
    assert [r["image"].rsplit("/", 1)[1] for r in result["results"][::2]] == [
        "a.png",
        "b.jpg",
        "d.webp",
        "e.png",
        "c.png",
    ]
    assert [r["text"] for r in result["results"]] == texts * 5
    assert [fault["image"].endswith("broken.jpg") for fault in result["left_out"]] == [True]
    expected = models["entailment"].classify([pictures / "b.jpg"], texts)
    for found, label in zip(result["results"][2:4], expected, strict=True):
        assert set(found["probabilities"]) == {"contradiction", "neutral", "entailment"}
        assert found["probabilities"] == pytest.approx(label.probabilities, rel=1e-3)
        assert found["label"] == label.label
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 10 and lines[2].startswith(f"{expected[0].label} ") and lines[2].endswith("b.jpg: a red circle")
    )
    shares = [float(part.split()[1].rstrip("%")) for part in lines[2].split("  ")[0].split(", ")]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2)


def test_classify_takes_two_images_for_nlvr2(zoo, pictures, readable, models, capsys):
    left, right, texts = readable[0], readable[1], ["a red circle", "two squares"]
    command = ["classify", str(zoo / "nlvr.pth"), "--text", *texts, "--json", "--batch", "1", "--image"]
    assert main([*command, str(left), str(right)]) == 0
    results = said(capsys)["results"]
    assert [r["text"] for r in results] == texts and all(r["images"] == [str(left), str(right)] for r in results)
    for found, label in zip(results, models["nlvr"].classify((left, right), texts), strict=True):
        assert found["probabilities"] == pytest.approx(label.probabilities, rel=1e-3) and found["label"] == label.label
    for images, got in (([str(left)], 1), ([str(pictures)], 6)):
        assert main([*command, *images]) == 2
        assert f"two images, --image LEFT RIGHT; got {got}" in capsys.readouterr().err
    assert main([*command, str(left), str(pictures / "broken.jpg")]) == 1
    captured = capsys.readouterr()
    assert "broken.jpg" in captured.err and json.loads(captured.out)["results"] == []


def test_a_model_without_a_classifier_labels_nothing(zoo, readable, capsys):
    assert main(["classify", str(zoo / "retrieval.pth"), "--image", str(readable[0]), "--text", "a"]) == 2
    assert "use one of visual entailment (one image) or NLVR2 (two)" in capsys.readouterr().err


def test_search_by_text_and_by_image(zoo, pictures, models, capsys):
    command = ["search", str(zoo / "pretraining.pth"), str(pictures), "--json", "--top", "3"]
    assert main([*command, "--text", "a red circle", "--batch", "2"]) == 0
    found = said(capsys)["results"]
    index = ImageIndex.build(models["pretraining"], pictures)
    expected = (index.features @ models["pretraining"].text_features("a red circle")[0]).topk(3)
    assert [f["image"] for f in found] == [str(index.images[i]) for i in expected.indices]
    assert [f["similarity"] for f in found] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert main([*command, "--image", str(pictures / "d.webp")]) == 0
    best = said(capsys)["results"][0]
    assert best["image"].endswith("d.webp") and best["similarity"] == pytest.approx(1)


def test_explain_writes_a_sheet_whatever_the_text(zoo, pictures, tmp_path, capsys):
    text = "a $\\frac{x$ red_circle \x07 ☃"
    out = tmp_path / "deep" / "sheet.png"
    command = ["explain", str(zoo / "retrieval.pth"), "--text", text, "--json"]
    assert main([*command, str(pictures / "a.png"), "--out", str(out)]) == 0
    (result,) = said(capsys)["results"]
    assert {"a", "red"} <= {word["word"] for word in result["words"]} and len(result["whole"]) == 4
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 200
    assert main([*command, str(pictures), "--out", str(tmp_path / "all")]) == 0
    assert len(list((tmp_path / "all").glob("*.png"))) == 5
    assert main([*command, str(pictures), "--out", str(out)]) == 2
    assert "several images need a folder" in capsys.readouterr().err


def test_two_images_of_one_name_get_a_sheet_each(zoo, pictures, tmp_path):
    draw("red", "square").save(tmp_path / "a.png")
    images = [str(pictures / "a.png"), str(tmp_path / "a.png")]
    out = tmp_path / "sheets"
    assert main(["explain", str(zoo / "retrieval.pth"), *images, "--text", "a", "--by", "itc", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "a_2.png"]


def test_an_overlay_is_brightest_where_the_heat_is():
    heat = torch.zeros(4, 4)
    heat[0, 3] = 2.0
    picture = overlay(Image.new("RGB", (40, 40), "gray"), heat).convert("L")
    assert picture.getpixel((38, 1)) > picture.getpixel((5, 35)) + 50
    overlay(Image.new("RGB", (8, 8)), torch.zeros(2, 2))  # no heat anywhere is no fault


def test_lines_can_be_shown():
    assert shown("a\n\tb \x1b[31m \ud800", 99) == "a b \\x1b[31m \\ud800"
    assert shown("abcdef", 4) == "abc…"


def test_another_kind_of_checkpoint_is_refused_in_words(zoo, readable, capsys):
    assert main(["answer", str(zoo / "retrieval.pth"), str(readable[0]), "--question", "what"]) == 2
    assert "use one of VQA" in capsys.readouterr().err


def test_convert_takes_every_form(zoo, tmp_path, capsys):
    folder, back = str(tmp_path / "folder"), str(tmp_path / "back.safetensors")
    assert main(["convert", str(zoo / "vqa.pth"), folder, "--licence", "mit"]) == 0
    assert main(["convert", folder, back, "--without-teacher"]) == 0
    assert "license: mit" in (tmp_path / "folder" / "README.md").read_text()
    kept, whole = read_state_dict(back), read_state_dict(zoo / "vqa.pth")
    assert kept and all(torch.equal(v, whole[k]) for k, v in kept.items()) and not [k for k in kept if "_m." in k]
    capsys.readouterr()
    assert main(["convert", str(zoo / "vqa.pth"), folder]) == 2
    assert "not empty" in capsys.readouterr().err


# -- pseudo-targets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def annotations(pictures, tmp_path):
    entries = [
        {"image": "a.png", "caption": ["a red circle", "another"]},
        {"image": "broken.jpg", "caption": "two squares"},
        {"image": "b.jpg", "caption": "two blue squares"},
        {"image": "d.webp", "caption": "?!"},
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    return tmp_path / "pairs.json"


def test_pseudo_targets_are_the_teacher_s(zoo, pictures, annotations, tmp_path, capsys):
    command = ["pseudo-targets", str(zoo / "pretraining.pth"), "--data", str(annotations), "--word", "RED", "--json"]
    assert main([*command, "--image-root", str(pictures), "--out", str(tmp_path / "x.png")]) == 0
    result = said(capsys)
    assert [fault["image"].endswith("broken.jpg") for fault in result["left_out"]] == [True]
    first, second = result["results"]  # the third has no word to mask, but is a candidate
    assert (first["masked"], first["word"]) == ("a [MASK] circle", "red")
    assert second["masked"].count("[MASK]") == 1 and len(second["words"]) == 5
    assert len(first["texts"]) == len(first["images"]) == 3
    for part in ("texts", "images"):
        assert sum(t["probability"] for t in first[part]) == pytest.approx(1, abs=1e-4)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"


def test_words_and_similarities_come_from_the_momentum_copies(zoo, readable):
    """As the network gives them for one masked caption, unpacked; the student would give others."""
    from albef_ds.data.augment import EvalTransform
    from albef_ds.data.batch import PackedText
    from albef_ds.data.images import decode_image
    from albef_ds.model.albef import text_spans
    from albef_ds.model.packing import FusionPlan

    teacher = load_teacher(zoo / "pretraining.pth", device="cpu")
    examples = [Example(readable[0], "a red circle"), Example(readable[1], "two blue squares")]
    view = pseudo_targets(teacher, examples, 1, "red")[0]
    tokenizer, network = teacher.tokenizer, teacher.network
    ids = tokenizer.encode(["a red circle"], 24)[0]
    text = PackedText.from_lists([[*ids[:2], tokenizer.mask_id, *ids[3:]]])
    with torch.no_grad():
        embeds, image = network.encode_image(EvalTransform(32)(decode_image(readable[0]))[None])
        hidden, _ = network.encode_text(text)
        fused = network.text_encoder.fuse(hidden, FusionPlan.aligned(text_spans(text)), embeds, torch.tensor([2]))
        shares = network.text_encoder.predict_tokens(fused)[0].softmax(-1)
    assert view.words[0].probability == pytest.approx(shares.max().item(), rel=1e-3)
    state = read_state_dict(zoo / "pretraining.pth")
    assert torch.equal(network.vision_proj.weight, state["vision_proj_m.weight"])
    assert not torch.equal(network.vision_proj.weight, state["vision_proj.weight"])


def test_a_checkpoint_without_a_teacher_has_no_pseudo_targets(zoo, annotations, tmp_path, capsys):
    assert main(["convert", str(zoo / "pretraining.pth"), str(zoo / "bare.pth"), "--without-teacher"]) == 0
    rest = ["--data", str(annotations), "--out", str(tmp_path / "x.png")]
    assert main(["pseudo-targets", str(zoo / "bare.pth"), *rest]) == 2
    assert "has no momentum copy" in capsys.readouterr().err
    assert main(["pseudo-targets", str(zoo / "retrieval.pth"), *rest]) == 2
    assert "only pre-training distils masked words" in capsys.readouterr().err
