"""Entries to pixels and tokens, samples to batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from albef_ds.data.annotations import Annotation
from albef_ds.data.augment import EvalTransform, TrainTransform
from albef_ds.data.batch import LabelledBatch, PairBatch, QuestionBatch
from albef_ds.data.captions import clean_caption, clean_question
from albef_ds.data.images import ImageError
from albef_ds.data.task_entries import CaptionEntry, LabelledEntry, QuestionEntry
from albef_ds.data.task_samples import CaptionedSamples, LabelledSamples, PairSamples, QuestionSamples, answer_ids
from albef_ds.data.tokenizer import load_tokenizer

COLOURS = ["red", "green", "blue", "white", "black"]


@pytest.fixture
def folder(tmp_path):
    for colour in COLOURS:
        Image.new("RGB", (20, 12), colour).save(tmp_path / f"{colour}.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    return tmp_path


def loaded(samples, *index: int) -> list:
    return [samples.load(i, np.random.default_rng(0)) for i in index]


def texts_of(packed, tokenizer) -> list[str]:
    return [tokenizer.decode(ids.tolist()) for ids in packed.input_ids.split(packed.cu_seqlens.diff().tolist())]


def test_pairs_carry_their_ids(folder, tokenizer):
    entries = [CaptionEntry((f"{c}.png",), str(folder), f"A {c.upper()} circle!", i % 2) for i, c in enumerate(COLOURS)]
    samples = PairSamples(entries, tokenizer, EvalTransform(8))
    chosen = loaded(samples, 2, 0, 1)
    batch = samples.collate(chosen, keys=tuple(sample.key for sample in chosen), rejected=())
    assert isinstance(batch, PairBatch) and batch.keys == ("blue.png", "red.png", "green.png")
    assert batch.ids.tolist() == [0, 0, 1] and batch.ids.dtype == torch.int64
    assert texts_of(batch.text, tokenizer) == ["a blue circle", "a red circle", "a green circle"]
    assert batch.images.shape == (3, 3, 8, 8)
    assert [int(image.mean((1, 2)).argmax()) for image in batch.images] == [2, 0, 1]


def test_two_images_a_text_come_left_ones_first(folder, tokenizer):
    names = [("red", "green"), ("blue", "red"), ("green", "blue")]
    entries = [
        LabelledEntry((f"{a}.png", f"{b}.png"), str(folder), "a circle", i % 2) for i, (a, b) in enumerate(names)
    ]
    samples = LabelledSamples(entries, tokenizer, EvalTransform(8))
    chosen = loaded(samples, 0, 1, 2)
    batch = samples.collate(chosen)
    assert isinstance(batch, LabelledBatch) and batch.labels.tolist() == [0, 1, 0]
    hottest = [COLOURS[int(image.mean((1, 2)).argmax())] for image in batch.images]
    assert hottest == [left for left, _ in names] + [right for _, right in names]
    assert chosen[1].key == "blue.png red.png"


def test_an_unreadable_image_is_named_before_anything_is_drawn(folder, tokenizer):
    entries = [LabelledEntry(("red.png", "broken.png"), str(folder), "a circle", 0)]
    rng = np.random.default_rng(7)
    with pytest.raises(ImageError, match="broken.png: not an image"):
        LabelledSamples(entries, tokenizer, TrainTransform(8)).load(0, rng)
    assert rng.random() == np.random.default_rng(7).random()


def test_questions_bring_their_answers_weights_and_counts(folder, tokenizer):
    entries = [
        QuestionEntry(("red.png",), str(folder), "What colour?", 7, ("red", "a red circle", "dark"), (0.5, 0.25, 0.25)),
        QuestionEntry(("blue.png",), str(folder), "What shape?", 8, ("circle",), (0.5,)),
    ]
    samples = QuestionSamples(entries, tokenizer, EvalTransform(8))
    batch = samples.collate(loaded(samples, 1, 0))
    assert isinstance(batch, QuestionBatch)
    assert texts_of(batch.answers, tokenizer)[:3] == ["circle", "red", "a red circle"]
    assert batch.weights.tolist() == [0.5, 0.5, 0.25, 0.25]
    lengths = batch.answers.cu_seqlens.diff().tolist()
    assert batch.cu_questions.tolist() == [0, lengths[0], sum(lengths)] and batch.longest == sum(lengths[1:])


def test_questions_are_cleaned_less_than_captions(folder, tokenizer):
    raw = "What's  this/that?  "
    [sample] = loaded(
        QuestionSamples([QuestionEntry(("red.png",), str(folder), raw, 0, (), ())], tokenizer, EvalTransform(8)), 0
    )
    assert sample.ids == tokenizer.encode([clean_question(raw)], 30)[0]
    assert clean_question(raw) == "whats  this that" and clean_caption(raw) == "whats this that"
    assert clean_question("one two three", 2) == "one two"


@settings(max_examples=60, deadline=None)
@given(
    answers=st.lists(st.text(max_size=12) | st.sampled_from(["a red circle", "blue"]), min_size=1, max_size=5),
    longest=st.integers(2, 9),
    sep=st.booleans(),
)
def test_every_answer_begins_with_cls_and_ends_with_one_sep(answers, longest, sep, world):
    tokenizer = load_tokenizer(world.vocab, sep)
    for ids, without in zip(
        answer_ids(tokenizer, answers, longest), load_tokenizer(world.vocab).encode(answers, longest), strict=True
    ):
        assert ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id
        assert ids[: len(without)][: longest - 1] == without[: longest - 1]
        assert len(ids) <= longest + (not sep)


def test_long_texts_are_cut_by_words_and_tokens(folder, tokenizer):
    entry = CaptionEntry(("red.png",), str(folder), "red " * 100, 0)
    for words, tokens, expected in ((30, 50, 31), (30, 10, 10), (3, 10, 4)):
        [sample] = loaded(PairSamples([entry], tokenizer, EvalTransform(8), words, tokens), 0)
        assert len(sample.ids) == expected


def test_text_assignment_draws_one_of_an_images_captions(folder, tokenizer):
    captions = ("a red circle", "a blue circle", "a green circle")
    samples = CaptionedSamples([Annotation(str(folder / "red.png"), captions, "red.png")], tokenizer, EvalTransform(8))
    drawn = [samples.load(0, np.random.default_rng(seed)) for seed in range(30)]
    assert {sample.entry.text for sample in drawn} == set(captions)
    again = [samples.load(0, np.random.default_rng(seed)) for seed in range(30)]
    assert [sample.entry.text for sample in again] == [sample.entry.text for sample in drawn]
    batch = samples.collate(drawn[:2])
    assert isinstance(batch, PairBatch) and drawn[0].key == "red.png"


def test_without_a_crop_the_whole_image_stays_where_it_is():
    """Grounding's training: what a phrase calls left must stay left, and in the image."""
    image = Image.new("RGB", (64, 32), "black")
    image.paste((255, 255, 255), (0, 0, 32, 32))  # the left half
    whole = TrainTransform(16, scale=None, horizontal_flip=False, randaugment=False)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        assert torch.equal(whole(image, rng), EvalTransform(16)(image))
        assert rng.random() == np.random.default_rng(seed).random()  # nothing was drawn
    mirrored = TrainTransform(16, scale=None, horizontal_flip=True, randaugment=False)
    seen = {bool(mirrored(image, np.random.default_rng(seed))[0, 8, 2] > 0) for seed in range(20)}
    assert seen == {True, False}
    drawn = TrainTransform(16, scale=None).draw(64, 32, np.random.default_rng(0))
    assert drawn.crop == (0, 0, 64, 32)
