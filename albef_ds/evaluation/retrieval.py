"""Image-text retrieval both ways: ranked by ITC, then the best candidates ranked again by ITM (paper section 4.1).

What is computed is what the reference's Retrieval.py computes; how differs. A pair's ITM score is the same whether
an image asks for its texts or a text for its images, so each pair that either direction wants is scored once. Pairs
are scored with the image: the rank that encoded an image keeps its embeddings, in host memory, and no other rank ever
sees them; an image's cross-attention keys and values are computed once for all texts that want it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from albef_ds.evaluation.ahead import NAMED, EvaluationError
from albef_ds.evaluation.encoding import EncodedImages, EncodedTexts, progress
from albef_ds.evaluation.recall import first_right, ordered, recall, reranked
from albef_ds.evaluation.sharding import Ranks

MAX_TOKENS = 30  # of a test caption, as in the reference's evaluation


@dataclass(frozen=True)
class RetrievalSet:
    """N images and, for each, the texts that describe it."""

    images: Sequence[str]  # [N] paths
    captions: Sequence[Sequence[str]]  # [N] of at least one raw caption

    def __post_init__(self) -> None:
        if len(self.images) != len(self.captions):
            raise EvaluationError(f"{len(self.images)} images, but captions for {len(self.captions)}")
        if not self.images:
            raise EvaluationError("a retrieval set needs at least one image")
        for image, captions in zip(self.images, self.captions, strict=True):
            if isinstance(captions, str) or not captions:
                raise EvaluationError(f"{image}: expected a list of one or more captions, got {captions!r}")


@dataclass(frozen=True)
class FoundCaption:
    """A candidate for an image."""

    caption: str
    itc: float  # cosine similarity
    itm: float  # logit of "these match"
    right: bool


@dataclass(frozen=True)
class RetrievalExample:
    """A test image and the captions found for it, best first after ranking again."""

    image: str
    captions: tuple[str, ...]  # its own
    found: tuple[FoundCaption, ...]


@dataclass(frozen=True)
class RetrievalResult:
    """Recall in percent: `metrics["itc"]["tr@1"]`, "ir@5", "tr_mean", "mean", ...; the same under "itm"."""

    metrics: dict
    examples: list[RetrievalExample]


@torch.no_grad()
def evaluate_retrieval(
    model,
    pairs: RetrievalSet,
    *,
    transform: Callable,
    tokenizer,
    device: torch.device | str,
    k_test: int,
    max_tokens: int = MAX_TOKENS,
    image_batch: int = 64,
    text_batch: int = 256,
    pair_batch: int = 1024,
    workers: int = 4,
    embed_dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    examples: int = 6,
    found: int = 5,
) -> RetrievalResult:
    """Evaluates on all ranks of the current process group together; every rank gets the result.

    Args:
        model: with encode_image, encode_text and match (albef_ds.model.albef.ALBEF).
        transform: PIL image to [3, R, R].
        tokenizer: with encode(captions, max_tokens) to lists of ids.
        k_test: candidates of each query that ITM ranks again; the others stay behind them. At most all there are.
        image_batch, text_batch, pair_batch: sizes of a forward pass. They bound the memory of the device, beside the
            embeddings of all texts, which stay there.
        embed_dtype: what embeddings are kept in between; float16 halves them.
        autocast: compute in this type; None: as the parameters are.
        examples, found: images, and captions for each, that the result shows.

    Raises:
        EvaluationError: images that cannot be read, named (a set with holes gives other numbers); NaN from the model.
    """
    if k_test < 1:
        raise EvaluationError(f"k_test is {k_test}; expected at least 1")
    device, ranks = torch.device(device), Ranks.current()
    with _evaluating(model, device, autocast) as model:
        texts = EncodedTexts.encode(model, pairs, tokenizer, max_tokens, text_batch, ranks, device, embed_dtype)
        images = EncodedImages.encode(model, pairs.images, transform, image_batch, workers, ranks, device, embed_dtype)
        return _rank(model, pairs, images, texts, k_test, pair_batch, device, examples, found)


def evaluate_recipe(model, config, tokenizer, device: torch.device, file: str) -> RetrievalResult:
    """Evaluates on a test set with a recipe's settings, and bf16 arithmetic on a GPU, as in training."""
    from albef_ds.data.annotations import read_pairs
    from albef_ds.data.augment import EvalTransform

    annotations = read_pairs(file, config.data.image_root)
    if annotations.rejected:
        reasons = "; ".join(reason for _, reason in annotations.rejected[:NAMED])
        raise EvaluationError(f"{len(annotations.rejected)} entries of the test set cannot be used: {reasons}")
    return evaluate_retrieval(
        model,
        RetrievalSet([a.image for a in annotations], [a.captions for a in annotations]),
        transform=EvalTransform(config.model.vision.image_size),
        tokenizer=tokenizer,
        device=device,
        k_test=config.evaluation.k_test,
        max_tokens=min(MAX_TOKENS, config.model.text.max_positions),
        workers=max(config.data.workers, 1),
        autocast=torch.bfloat16 if device.type == "cuda" else None,
    )


def _rank(model, pairs, images, texts, k_test, pair_batch, device, examples, found) -> RetrievalResult:
    ranks = images.batches.ranks
    num_images, num_texts = len(pairs.images), len(texts.captions)
    k_texts = min(k_test, num_texts)
    image_of = texts.image_of.to(device)
    wanted, image_places = _texts_ask(images, texts, min(k_test, num_images))

    # Images ask for texts; then every pair of this rank's images that either side wants is scored.
    wanted_scores = torch.zeros(wanted.shape)
    itc_places, itm_places = torch.zeros(num_images), torch.zeros(num_images)
    broken = False
    shown, picked = [], set(torch.linspace(0, num_images - 1, min(examples, num_images)).long().tolist())
    for batch in progress(images.batches.mine, "matching", ranks):
        rows = torch.tensor(images.batches.rows(batch))
        sims = images.feats[rows.to(device)] @ texts.feats.T
        order = ordered(sims)
        candidates = order[:, :k_texts].cpu()  # [b, k]
        place = first_right(image_of[order] == rows.to(device)[:, None]).cpu()

        asking, position = ((wanted >= rows[0]) & (wanted <= rows[-1])).nonzero(as_tuple=True)
        from_images = rows[:, None] * num_texts + candidates
        from_texts = wanted[asking, position] * num_texts + asking
        keys = torch.cat([from_images.flatten(), from_texts]).unique()  # a pair is image * num_texts + text; sorted
        scores = _match(model, images.embeds[batch], texts, keys // num_texts - rows[0], keys % num_texts, pair_batch)
        broken |= not bool(scores.isfinite().all())
        wanted_scores[asking, position] = scores[torch.searchsorted(keys, from_texts)]
        scores = scores[torch.searchsorted(keys, from_images)]

        itc_places[rows] = place.float()
        itm_places[rows] = reranked(texts.image_of[candidates] == rows[:, None], place, scores).float()
        for row in picked & set(rows.tolist()):
            at = row - int(rows[0])
            shown.append((row, _example(pairs, texts, row, candidates[at], sims[at], scores[at], found)))

    if any(ranks.all_objects(broken)):  # all ranks fail together
        raise EvaluationError("the model's matching scores hold NaN or infinity; the weights are probably broken")
    itc_places, itm_places = ranks.sum(itc_places, device), ranks.sum(itm_places, device)
    wanted_scores = ranks.sum(wanted_scores, device)
    again = reranked(wanted == texts.image_of[:, None], image_places, wanted_scores)
    metrics = {
        "itc": recall(itc_places, image_places),
        "itm": recall(itm_places, again),
        "images": num_images,
        "texts": num_texts,
        "k_test": k_test,
    }
    shown = sorted((s for part in ranks.all_objects(shown) for s in part), key=lambda s: s[0])
    return RetrievalResult(metrics, [example for _, example in shown])


def _texts_ask(images: EncodedImages, texts: EncodedTexts, k: int) -> tuple[Tensor, Tensor]:
    """For each text its k best images by ITC, best first [M, k], and the place of the right one [M]; on the host."""
    device = texts.feats.device
    best, places = {}, {}
    for batch in texts.batches.mine:
        rows = torch.tensor(texts.batches.rows(batch))
        order = ordered(texts.feats[rows.to(device)] @ images.feats.T)
        best[batch] = order[:, :k].contiguous()
        places[batch] = first_right(order == texts.image_of[rows, None].to(device))
    empty = {"dtype": torch.int64, "device": device}
    best = texts.batches.share(best, lambda rows: torch.empty(len(rows), k, **empty), device)
    places = texts.batches.share(places, lambda rows: torch.empty(len(rows), **empty), device)
    return best.cpu(), places.cpu()


def _match(
    model, image_embeds: Tensor, texts: EncodedTexts, image_index: Tensor, text_index: Tensor, size: int
) -> Tensor:
    """ITM scores [P] of pairs sorted by image (host)."""
    device = texts.embeds.device
    scores = []
    for start in range(0, len(text_index), size):
        images, text = image_index[start : start + size], text_index[start : start + size]
        used, text = text.unique(return_inverse=True)
        first, last = int(images[0]), int(images[-1])
        embeds, packed = texts.select(used)
        logits = model.match(
            embeds,
            packed,
            text.to(device),
            image_embeds[first : last + 1].to(device).float(),
            (images - first).to(device),
        )
        scores.append(logits[:, 1].float())
    return torch.cat(scores).cpu()


def _example(pairs, texts: EncodedTexts, image: int, candidates: Tensor, sims: Tensor, scores: Tensor, count: int):
    best = candidates[ordered(scores[None])[0, :count]]
    itm = dict(zip(candidates.tolist(), scores.tolist(), strict=True))
    return RetrievalExample(
        image=str(pairs.images[image]),
        captions=tuple(pairs.captions[image]),
        found=tuple(
            FoundCaption(texts.captions[t], sims[t].item(), itm[t], int(texts.image_of[t]) == image)
            for t in best.tolist()
        ),
    )


@contextmanager
def _evaluating(model, device: torch.device, autocast: torch.dtype | None) -> Iterator[SimpleNamespace]:
    """The model's three functions without dropout; autocast is for them alone, similarities stay in fp32."""

    def under(function):
        def call(*args):
            with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                return function(*args)

        return call

    training = model.training
    model.eval()
    try:
        yield SimpleNamespace(
            **{name: under(getattr(model, name)) for name in ("encode_image", "encode_text", "match")}
        )
    finally:
        model.train(training)
