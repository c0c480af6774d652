"""A trained ALBEF as an object: what it can do depends on what it was trained for, and every method says so.

Texts are cleaned and cut as in the evaluation of the checkpoint's task; images are resized to the model's square.
Arithmetic is bf16 on a GPU, fp32 on a CPU; results are fp32 tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from albef_ds.config import Config
from albef_ds.data.augment import EvalTransform
from albef_ds.data.batch import PackedText
from albef_ds.data.captions import clean_caption, clean_question
from albef_ds.data.task_samples import answer_ids
from albef_ds.data.tokenizer import CaptionTokenizer
from albef_ds.evaluation.answers import rank_answers, write_answers
from albef_ds.evaluation.heatmaps import default_layer, itc_heatmaps, itm_heatmaps
from albef_ds.inference.inputs import Picture, listed, opened
from albef_ds.model.albef import at_least_fp32, text_spans
from albef_ds.model.packing import FusionPlan
from albef_ds.tasks.entailment import LABELS as ENTAILMENT_LABELS
from albef_ds.tasks.nlvr import LABELS as NLVR_LABELS

Pictures = Picture | Sequence[Picture]
PicturePairs = Sequence[tuple[Picture, Picture]]
MAX_WORDS, QUESTION_WORDS, MAX_TOKENS = 30, 50, 30  # as in the reference's evaluations
ALIGNED = ("pretraining", "retrieval", "grounding")
LABELS = {"entailment": ENTAILMENT_LABELS, "nlvr": NLVR_LABELS}


class UseError(ValueError):
    """What was asked makes no sense; the message says what would."""


class KindError(UseError):
    """What was asked needs another kind of checkpoint; the message says which."""


@dataclass(frozen=True)
class Answer:
    text: str
    probability: float  # among the listed answers that were ranked; of the whole text where it was written freely


@dataclass(frozen=True)
class Label:
    label: str
    probabilities: dict[str, float]  # of every label


@dataclass(frozen=True)
class Heatmap:
    """Values as Grad-CAM gives them, 0 or more; g x g patches, row by row from the top left."""

    words: tuple[str, ...]  # none by ITC, which sees the text as a whole
    maps: Tensor  # [len(words), g, g]
    whole: Tensor  # [g, g], of the text
    score: float  # what is explained: matching logit, or similarity / temperature


class Albef:
    """Made by `albef_ds.load`."""

    def __init__(
        self, config: Config, network: nn.Module, tokenizer: CaptionTokenizer, device: torch.device, name: str
    ):
        self.config, self.task, self.name = config, config.task, name
        self.network, self.tokenizer, self.device = network.eval(), tokenizer, device
        self._transform = EvalTransform(config.model.vision.image_size)

    def can(self, what: str) -> bool:
        """what: "align" (features, match, similarity, heatmaps), "answer" or "classify"."""
        kinds = {"align": ALIGNED, "answer": ("vqa",), "classify": tuple(LABELS)}
        return self.task in kinds[what]

    # -- encoders -----------------------------------------------------------------------------------------------------

    def image_features(self, images: Pictures, batch_size: int = 64) -> Tensor:
        """[N, E] of unit length. Raises ImageError where one cannot be read."""
        self._needs("align", "compare images and texts")
        images = listed(images)
        return self._batched(
            len(images), batch_size, lambda rows: self.network.encode_image(self._pixels(images[rows]))[1]
        )

    def text_features(self, texts: str | Sequence[str], batch_size: int = 256) -> Tensor:
        """[N, E] of unit length."""
        self._needs("align", "compare images and texts")
        texts = _texts(texts)
        return self._batched(
            len(texts), batch_size, lambda rows: self.network.encode_text(self._packed(texts[rows]))[1]
        )

    def similarity(self, images: Pictures, texts: str | Sequence[str], batch_size: int = 64) -> Tensor:
        """[N, M] cosines of every image with every text, what ITC was trained on."""
        return self.image_features(images, batch_size) @ self.text_features(texts, batch_size).T

    # -- image and text together --------------------------------------------------------------------------------------

    def multimodal_features(self, images: Pictures | PicturePairs, texts: str | Sequence[str], batch_size: int = 64):
        """[N, W]: the fused [CLS] of each pair, before any head; every kind of checkpoint has it. One image with
        several texts, or one text with several images, are that many pairs."""
        return self._fused(images, texts, batch_size, lambda fused: fused)

    def match(self, images: Pictures, texts: str | Sequence[str], batch_size: int = 64) -> Tensor:
        """[N] the probability that image i and text i belong together (ITM); pairs as in multimodal_features."""
        self._needs("align", "match images and texts")
        return self._fused(images, texts, batch_size, lambda fused: _softmax(self.network.itm_head(fused))[:, 1])

    def classify(self, images: Pictures | PicturePairs, sentences: str | Sequence[str], batch_size: int = 64):
        """A Label for each sentence: about its image (entailment), or about its two images (NLVR2)."""
        self._needs("classify", "label sentences")
        labels = LABELS[self.task]
        shares = self._fused(images, sentences, batch_size, lambda fused: _softmax(self.network.cls_head(fused)))
        return [Label(labels[int(row.argmax())], dict(zip(labels, row.tolist(), strict=True))) for row in shares]

    def answer(
        self,
        images: Pictures,
        questions: str | Sequence[str],
        answers: Sequence[str] | None = None,
        k: int = 1,
        beams: int = 3,
        batch_size: int = 32,
    ) -> list[list[Answer]]:
        """The k best answers to each question, best first.

        Args:
            answers: to choose from; None: they are written by beam search.
        """
        self._needs("answer", "answer questions")
        images, questions = _pairs(listed(images), _texts(questions))
        candidates = None if answers is None else self._candidates(answers)
        found: list[list[Answer]] = []

        def run(rows: slice) -> None:
            question = self.network.read(self._pixels(images[rows]), self._packed(questions[rows]))
            if candidates is None:
                found.extend(self._written(question, k, max(k, beams)))
            else:
                settings = self.config.evaluation
                ranked = rank_answers(
                    self.network, question, candidates, max(k, settings.k_test), settings.first_token_twice
                )
                for chosen, shares in zip(ranked.indices.tolist(), ranked.probabilities.tolist(), strict=True):
                    best = zip(chosen[:k], shares[:k], strict=True)
                    found.append([Answer(answers[i], share) for i, share in best])

        with self._computing():
            for rows in _slices(len(questions), batch_size):
                run(rows)
        return found

    def heatmaps(self, image: Picture, text: str, by: str = "itm", layer: int | None = None) -> Heatmap:
        """Where in the image the text and each of its words is found (albef_ds/evaluation/heatmaps.py).

        Args:
            by: "itm", word by word, or "itc", the text as a whole.
            layer: None: the third fusion layer, but not the last, from which [CLS] alone is read, so that no word's map
                has a gradient (itm); two thirds into the image encoder (itc).
        """
        self._needs("align", "show where a text is found")
        compute = {"itm": itm_heatmaps, "itc": itc_heatmaps}.get(by)
        if compute is None:
            raise UseError(f"by is {by!r}: expected 'itm' or 'itc'")
        if by == "itm" and layer is None and self.config.model.text.layers - self.config.model.text.fusion_layer > 1:
            layer = min(default_layer(self.network), self.config.model.text.layers - 2)
        packed = self._packed([text])
        # In fp32 on a GPU too: one image is quick, and small gradients vanish in bf16.
        try:
            maps = compute(self.network, self._pixels([image]), packed, layer)
        except ValueError as error:  # of the layer
            raise UseError(str(error)) from None
        words: list[list[int]] = [] if maps.words is None else self._words(packed.input_ids.tolist())
        parts = [maps.words[rows].mean(0).cpu().float() for rows in words]
        shape = maps.texts.shape[1:]
        names = self.tokenizer.tokenizer.id_to_token
        spelt = ["".join(names(int(packed.input_ids[row])).removeprefix("##") for row in rows) for rows in words]
        shown = torch.stack(parts) if parts else torch.zeros(0, *shape)
        return Heatmap(tuple(spelt), shown, maps.texts[0].cpu().float(), maps.scores.item())

    # -- how ----------------------------------------------------------------------------------------------------------

    def _needs(self, what: str, words: str) -> None:
        if not self.can(what):
            kinds = {
                "align": "pre-training, retrieval or grounding",
                "answer": "VQA",
                "classify": "visual entailment (one image) or NLVR2 (two)",
            }
            raise KindError(f"{self.name}: a checkpoint of {self.task} cannot {words}: use one of {kinds[what]}")

    def _fused(self, images, texts, batch_size: int, head: Callable[[Tensor], Tensor]) -> Tensor:
        sides = _sides(images, 2 if self.task == "nlvr" else 1)
        texts = _texts(texts)
        alone = len(sides[0]) == 1  # encoded once a batch, whatever the texts
        count = len(_pairs(sides[0], texts)[0])
        texts = texts * count if len(texts) == 1 else texts

        def run(rows: slice) -> Tensor:
            shown = [image for side in sides for image in (side if alone else side[rows])]
            packed = self._packed(texts[rows])
            embeds = self.network.visual_encoder.forward_features(self._pixels(shown))
            spans, pairs = text_spans(packed), torch.arange(packed.num_texts, device=self.device)
            hidden = self.network.text_encoder.encode(packed.input_ids, packed.position_ids, spans)
            plan = FusionPlan.build(spans, pairs, torch.zeros_like(pairs) if alone else pairs, len(shown) // len(sides))
            return head(self.network.text_encoder.fuse(plan.gather(hidden), plan, embeds, plan.first))

        return self._batched(count, batch_size, run)

    def _written(self, question, k: int, beams: int) -> Iterator[list[Answer]]:
        written = write_answers(self.network, question, self.tokenizer.cls_id, self.tokenizer.sep_id, beams)
        for texts, shares in zip(written.ids, written.scores.exp().tolist(), strict=True):
            yield [Answer(self.tokenizer.decode(ids), share) for ids, share in zip(texts[:k], shares[:k], strict=True)]

    def _candidates(self, answers: Sequence[str]) -> PackedText:
        # [SEP] comes after what max_tokens leaves, and has to have a position too.
        ids = answer_ids(self.tokenizer, answers, self.config.model.text.max_positions - 1)
        empty = [answer for answer, tokens in zip(answers, ids, strict=True) if len(tokens) < 3]
        if empty or not ids:
            raise UseError(f"answers to choose from need a word each, got {empty[:3] or 'none'}")
        return PackedText.from_lists(ids).to(self.device)

    def _batched(self, count: int, batch_size: int, run: Callable[[slice], Tensor]) -> Tensor:
        with self._computing():
            return torch.cat([run(rows).float().cpu() for rows in _slices(count, batch_size)])

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            yield

    def _pixels(self, images: Sequence[Picture]) -> Tensor:
        return torch.stack([self._transform(opened(image)) for image in images]).to(self.device)

    def _packed(self, texts: Sequence[str]) -> PackedText:
        positions = self.config.model.text.max_positions
        if self.task == "vqa":
            cleaned, longest = [clean_question(text, QUESTION_WORDS) for text in texts], positions
        else:
            longest = positions if self.can("classify") or self.task == "grounding" else min(MAX_TOKENS, positions)
            cleaned = [clean_caption(text, MAX_WORDS) for text in texts]
        return PackedText.from_lists(self.tokenizer.encode(cleaned, longest)).to(self.device)

    def _words(self, ids: list[int]) -> list[list[int]]:
        """Places of the tokens of each word; special tokens belong to none."""
        words: list[list[int]] = []
        special = {self.tokenizer.cls_id, self.tokenizer.sep_id, self.tokenizer.pad_id}
        for place, token in enumerate(ids):
            if token in special:
                continue
            if words and self.tokenizer.tokenizer.id_to_token(token).startswith("##"):
                words[-1].append(place)
            else:
                words.append([place])
        return words


def _texts(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise UseError("expected at least one text")
    return texts


def _sides(images, count: int) -> list[list[Picture]]:
    """Lists of first images and, where there are two a text, of second ones."""
    if count == 1:
        return [listed(images)]
    if len(images) == 2 and all(isinstance(image, str | Image.Image) or hasattr(image, "parts") for image in images):
        images = [tuple(images)]
    pairs = [tuple(pair) if isinstance(pair, tuple | list) else (pair,) for pair in images]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UseError("NLVR2 is about two images a sentence: pass pairs of images, (left, right)")
    return [[left for left, _ in pairs], [right for _, right in pairs]]


def _pairs(images: list, texts: list) -> tuple[list, list]:
    """As many of the one as of the other; one alone goes with all of the other."""
    if len(images) != len(texts) and 1 not in (len(images), len(texts)):
        raise UseError(f"{len(images)} images and {len(texts)} texts make no pairs: as many of each, or one of either")
    count = len(images) if len(texts) == 1 else len(texts)
    return images * (count // len(images)), texts * (count // len(texts))


def _slices(count: int, size: int) -> Iterator[slice]:
    if size < 1:
        raise UseError(f"batch_size is {size}: expected at least 1")
    if not count:
        raise UseError("expected at least one image")
    for start in range(0, count, size):
        yield slice(start, start + size)


def _softmax(logits: Tensor) -> Tensor:
    return at_least_fp32(logits).softmax(-1)
