"""Every method gives what the network gives, whatever the batch, and refuses what its kind cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from albef_ds.data.augment import EvalTransform
from albef_ds.data.batch import PackedText
from albef_ds.data.images import ImageError, decode_image
from albef_ds.inference.inputs import images_in, listed, opened
from albef_ds.inference.model import KindError, UseError
from tests.inference.conftest import KINDS, TEXTS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def fused_input(model, readable):
    return [(a, b) for a, b in zip(readable, readable[::-1], strict=True)] if model.task == "nlvr" else readable


@pytest.mark.parametrize("kind", KINDS)
def test_fused_features_do_not_depend_on_the_batch_nor_on_the_neighbours(models, readable, kind):
    model = models[kind]
    images = fused_input(model, readable)
    whole = model.multimodal_features(images, TEXTS)
    assert whole.shape == (5, 64) and whole.dtype == torch.float32
    assert whole.std(0).max() > 1e-3  # the pairs differ
    for size in (1, 3):
        torch.testing.assert_close(model.multimodal_features(images, TEXTS, batch_size=size), whole, **CLOSE)
    alone = torch.cat([model.multimodal_features([i], [t]) for i, t in zip(images, TEXTS, strict=True)])
    torch.testing.assert_close(alone, whole, **CLOSE)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_features_match_and_similarity(models, readable, size):
    model = models["retrieval"]
    images, texts = model.image_features(readable, batch_size=size), model.text_features(TEXTS, batch_size=size)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(5))
    with torch.no_grad():
        pixels = torch.stack([EvalTransform(32)(decode_image(p)) for p in readable])
        expected_images = model.network.encode_image(pixels)[1]
        ids = model.tokenizer.encode(list(TEXTS), 24)  # clean already
        packed = PackedText.from_lists(ids)
        expected_texts = model.network.encode_text(packed)[1]
        embeds, (states, _) = model.network.encode_image(pixels)[0], model.network.encode_text(packed)
        own = torch.arange(5)
        expected_match = model.network.match(states, packed, own, embeds, own).softmax(-1)[:, 1]
    torch.testing.assert_close(images, expected_images, **CLOSE)
    torch.testing.assert_close(texts, expected_texts, **CLOSE)
    torch.testing.assert_close(model.similarity(readable, TEXTS, size), images @ texts.T, **CLOSE)
    torch.testing.assert_close(model.match(readable, TEXTS, size), expected_match, **CLOSE)


@pytest.mark.parametrize("size", [1, 3])
def test_one_image_goes_with_many_texts_and_the_other_way_round(models, readable, size):
    model = models["pretraining"]
    torch.testing.assert_close(model.match(readable[0], TEXTS, size), model.match([readable[0]] * 5, TEXTS), **CLOSE)
    torch.testing.assert_close(model.match(readable, TEXTS[1], size), model.match(readable, [TEXTS[1]] * 5), **CLOSE)
    with pytest.raises(UseError, match="5 images and 2 texts make no pairs"):
        model.match(readable, TEXTS[:2])


def test_texts_are_cleaned_as_in_training_and_cut_where_positions_end(models):
    model = models["pretraining"]
    torch.testing.assert_close(model.text_features("A RED-circle!"), model.text_features("a red circle"))
    assert model.text_features("circle " * 500).shape == (1, 16)


def test_images_come_as_files_folders_and_pictures(models, pictures, readable):
    model = models["pretraining"]
    files = model.image_features(readable)
    torch.testing.assert_close(model.image_features([Image.open(p) for p in readable]), files)
    (pictures / "broken.jpg").rename(pictures / "broken.was")
    try:
        torch.testing.assert_close(model.image_features(pictures), files[[0, 1, 2, 3, 4]])
    finally:
        (pictures / "broken.was").rename(pictures / "broken.jpg")
    assert listed(readable[0]) == [readable[0]]


def test_deep_grey_pictures_are_what_they_are_as_files(readable):
    assert np.array_equal(np.asarray(opened(Image.open(readable[3]))), np.asarray(decode_image(readable[3])))


def test_links_out_of_a_folder_are_not_followed(tmp_path, readable):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.png").symlink_to(readable[0])
    with pytest.raises(ImageError, match="no image in this folder"):
        listed(tmp_path / "in")
    assert images_in(tmp_path / "in") == []


def test_an_unreadable_image_is_named(models, pictures):
    with pytest.raises(ImageError, match="broken.jpg: not an image"):
        models["pretraining"].image_features(pictures)


@pytest.mark.parametrize("answers", [None, ("red", "blue square", "circle", "two")])
def test_answers_do_not_depend_on_the_batch(models, readable, answers):
    model = models["vqa"]
    questions = [text or "what" for text in TEXTS]
    whole = model.answer(readable, questions, answers, k=2)
    assert [len(best) for best in whole] == [2] * 5
    for best in whole:
        assert best[0].probability >= best[1].probability >= 0 and sum(a.probability for a in best) <= 1 + 1e-5
        assert answers is None or {a.text for a in best} <= set(answers)
    for size in (1, 3):
        again = model.answer(readable, questions, answers, k=2, batch_size=size)
        assert [[a.text for a in best] for best in again] == [[a.text for a in best] for best in whole]
        shares = [[a.probability for a in best] for best in whole]
        assert [[a.probability for a in best] for best in again] == [pytest.approx(row, rel=1e-3) for row in shares]


def test_listed_answers_share_one_probability_between_them(models, readable):
    found = models["vqa"].answer(readable[0], "what", ["red", "blue square", "circle"], k=3)[0]
    assert sum(a.probability for a in found) == pytest.approx(1)
    with pytest.raises(UseError, match="need a word each"):
        models["vqa"].answer(readable[0], "what", ["red", ""])


@pytest.mark.parametrize("size", [1, 3])
def test_labels(models, readable, size):
    found = models["entailment"].classify(readable, TEXTS, size)
    assert [set(label.probabilities) for label in found] == [{"contradiction", "neutral", "entailment"}] * 5
    for label in found:
        assert sum(label.probabilities.values()) == pytest.approx(1)
        assert label.label == max(label.probabilities, key=label.probabilities.get)
    pairs = [(readable[0], readable[1]), (readable[1], readable[0])]
    left, right = (label.probabilities["True"] for label in models["nlvr"].classify(pairs, [TEXTS[0]] * 2, size))
    assert abs(left - right) > 1e-5  # which is left matters
    (alone,) = models["nlvr"].classify((readable[1], readable[0]), TEXTS[0])
    assert alone.probabilities["True"] == pytest.approx(right, rel=1e-3)
    with torch.no_grad():  # left images first, then right ones
        pixels = torch.stack([EvalTransform(32)(decode_image(p)) for p in (*readable[:2], *readable[1::-1])])
        text = PackedText.from_lists(models["nlvr"].tokenizer.encode([TEXTS[0]] * 2, 24))
        expected = models["nlvr"].network.classify(pixels, text).softmax(-1)[:, 1].tolist()
    assert [left, right] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UseError, match="two images a sentence"):
        models["nlvr"].classify(readable, TEXTS)


def test_pieces_of_words_are_joined_and_words_have_maps_of_their_own(models, readable):
    model = models["pretraining"]
    heatmap = model.heatmaps(readable[0], "A large redcircle, zqx")
    assert "large" in heatmap.words and "redcircle" in heatmap.words and len(heatmap.words) == 4
    assert heatmap.maps.shape == (4, 4, 4) and heatmap.whole.shape == (4, 4)
    assert (heatmap.maps.flatten(1).amax(1) > 0).all()  # the last layer's would all be zero
    assert len(model.heatmaps(readable[0], "circle", by="itc").words) == 0
    assert not torch.equal(model.heatmaps(readable[0], "circle", layer=3).whole, heatmap.whole)
    for wrong in ({"layer": 1}, {"by": "itc", "layer": 7}, {"by": "x"}):
        with pytest.raises(UseError):
            model.heatmaps(readable[0], "circle", **wrong)


def test_only_what_is_asked_is_computed(models, readable, monkeypatch):
    model = models["pretraining"]

    def never(*_, **__):
        pytest.fail("computed in vain")

    with monkeypatch.context() as patched:
        patched.setattr(model.network.text_encoder, "embed", never)
        model.image_features(readable)
    with monkeypatch.context() as patched:
        patched.setattr(model.network.visual_encoder, "forward_features", never)
        patched.setattr(model.network.text_encoder, "fuse", never)
        model.text_features(TEXTS)


@pytest.mark.parametrize(
    "kind, ask, needed",
    [
        ("vqa", lambda m, i: m.match(i, "a"), "pre-training, retrieval or grounding"),
        ("nlvr", lambda m, i: m.image_features(i), "pre-training, retrieval or grounding"),
        ("entailment", lambda m, i: m.heatmaps(i, "a"), "pre-training, retrieval or grounding"),
        ("pretraining", lambda m, i: m.answer(i, "what"), "use one of VQA"),
        ("retrieval", lambda m, i: m.classify(i, "a"), "visual entailment"),
    ],
)
def test_what_a_kind_cannot_do_it_says_with_who_can(models, readable, kind, ask, needed):
    with pytest.raises(KindError, match=needed):
        ask(models[kind], readable[0])


def test_nothing_to_do_is_refused(models, readable):
    with pytest.raises(UseError, match="at least one text"):
        models["pretraining"].text_features([])
    with pytest.raises(UseError, match="at least one image"):
        models["pretraining"].image_features([])
    with pytest.raises(UseError, match="batch_size"):
        models["pretraining"].image_features(readable, batch_size=0)
