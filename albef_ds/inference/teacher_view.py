"""Momentum distillation looked at, as in figure 2 of the paper: what the teacher would put for a masked word, and which
texts it holds for true of an image, and which images of a text, beside what the data says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from albef_ds.data.annotations import read_pairs
from albef_ds.data.augment import EvalTransform
from albef_ds.data.batch import PackedText
from albef_ds.data.captions import clean_caption
from albef_ds.data.images import ImageError, decode_image
from albef_ds.data.tokenizer import CaptionTokenizer
from albef_ds.inference.explain import LONGEST, shown
from albef_ds.inference.loading import build_network, tokenizer_for
from albef_ds.inference.model import MAX_TOKENS, MAX_WORDS, KindError, UseError
from albef_ds.inference.stored import read_stored
from albef_ds.model.albef import at_least_fp32, text_spans
from albef_ds.model.packing import FusionPlan
from albef_ds.model.reference_weights import load_reference
from albef_ds.model.teacher import Teacher
from albef_ds.model.weight_files import few

TOP = 5


@dataclass(frozen=True)
class Example:
    image: Path
    caption: str  # as the data has it


@dataclass(frozen=True)
class Target:
    """A pseudo-target: a word, a caption, or an image's path, and the teacher's probability for it."""

    what: str
    probability: float


@dataclass(frozen=True)
class View:
    """What the teacher says of one pair."""

    image: str
    caption: str
    masked: str  # the caption with [MASK]
    word: str  # what stood there
    words: tuple[Target, ...]  # the top 5, best first
    texts: tuple[Target, ...]  # for the image
    images: tuple[Target, ...]  # for the text

    def plain(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class LoadedTeacher:
    network: Teacher
    temperature: float
    tokenizer: CaptionTokenizer
    transform: EvalTransform
    max_tokens: int
    device: torch.device

    def computing(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def load_teacher(source: str | Path, *, config=None, tokenizer=None, device=None) -> LoadedTeacher:
    """The momentum copies of a pre-training checkpoint; arguments as for `load`.

    Raises:
        KindError: a checkpoint of another task, or one without them.
    """
    stored = read_stored(source, config=config)
    if stored.config.task != "pretraining":
        raise KindError(f"{stored.name}: a checkpoint of {stored.config.task}: only pre-training distils masked words")
    absent = [part for part in Teacher.PARTS if not any(key.startswith(f"{part}_m.") for key in stored.state)]
    if absent:
        raise KindError(f"{stored.name}: has no momentum copy of {few(absent)}: convert it with its teacher")
    student = build_network(stored)
    teacher = Teacher(student, stored.config.model.momentum, dropout=False)
    load_reference(stored.state, student, teacher, None, stored.name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return LoadedTeacher(
        network=teacher.to(device).eval(),
        temperature=student.temp.item(),
        tokenizer=tokenizer_for(stored, tokenizer),
        transform=EvalTransform(stored.config.model.vision.image_size),
        max_tokens=min(MAX_TOKENS, stored.config.model.text.max_positions),
        device=device,
    )


def read_examples(
    data: str | Path, image_root: str | Path | None = None, most: int = 256
) -> tuple[list[Example], list[ImageError]]:
    """The first `most` readable pairs of an annotation file, the first caption of each, and the images left out.

    Raises ImageError where not one can be read, AnnotationError where the file is none.
    """
    examples, faults = [], []
    for pair in read_pairs(data, image_root):
        if len(examples) == most:
            break
        try:
            decode_image(pair.image)
        except ImageError as error:
            faults.append(error)
            continue
        examples.append(Example(Path(pair.image), pair.captions[0]))
    if not examples:
        raise ImageError(str(data), f"not one image can be read, e.g. {faults[0]}")
    return examples, faults


@torch.no_grad()
def pseudo_targets(
    teacher: LoadedTeacher, examples: Sequence[Example], pairs: int, word: str | None = None, batch_size: int = 32
) -> list[View]:
    """The teacher's view of the first `pairs` examples that have a word to mask, among all examples.

    Args:
        word: what is masked in captions that have it; of the others, and None: what the teacher is least sure of.
    """
    with teacher.computing():
        image_feat, text_feat = _features(teacher, examples, batch_size)
        sims = image_feat @ text_feat.T / teacher.temperature
        views = []
        for place, example in enumerate(examples):
            if len(views) == pairs:
                break
            masked = _masked(teacher, example, word)
            if masked is not None:
                texts = _top(sims[place].softmax(-1), [e.caption for e in examples])
                images = _top(sims[:, place].softmax(-1), [str(e.image) for e in examples])
                views.append(View(str(example.image), example.caption, *masked, texts, images))
    if not views:
        raise UseError("no caption has a word to mask")
    return views


def _features(teacher: LoadedTeacher, examples: Sequence[Example], size: int) -> tuple[Tensor, Tensor]:
    images, texts = [], []
    for start in range(0, len(examples), size):
        block = examples[start : start + size]
        images.append(teacher.network.encode_image(_pixels(teacher, block))[1])
        ids = teacher.tokenizer.encode([clean_caption(e.caption, MAX_WORDS) for e in block], teacher.max_tokens)
        texts.append(teacher.network.encode_text(PackedText.from_lists(ids).to(teacher.device))[1])
    return torch.cat(images).float(), torch.cat(texts).float()


def _pixels(teacher: LoadedTeacher, examples: Sequence[Example]) -> Tensor:
    return torch.stack([teacher.transform(decode_image(e.image)) for e in examples]).to(teacher.device)


def _maskable(teacher: LoadedTeacher, ids: list[int], word: str | None) -> list[int]:
    """Places of words of one token: of `word` where it is there, else of all. A word of several pieces would need
    several masks, and the teacher is asked about one token."""
    pieces = [teacher.tokenizer.tokenizer.id_to_token(i) for i in ids]
    end = len(ids) - teacher.tokenizer.sep_token
    pieces = pieces[:end] + [""]
    whole = [i for i in range(1, end) if not pieces[i].startswith("##") and not pieces[i + 1].startswith("##")]
    return [i for i in whole if word is not None and pieces[i] == word.lower()][:1] or whole


def _masked(teacher: LoadedTeacher, example: Example, word: str | None) -> tuple[str, str, tuple[Target, ...]] | None:
    """The caption with one [MASK], the word there, and the teacher's words for it; None without a word to mask. Of
    several the one that the teacher is least sure of: there is most to see."""
    tokenizer, network = teacher.tokenizer, teacher.network
    ids = tokenizer.encode([clean_caption(example.caption, MAX_WORDS)], teacher.max_tokens)[0]
    places = _maskable(teacher, ids, word)
    if not places:
        return None
    variants = [[*ids[:place], tokenizer.mask_id, *ids[place + 1 :]] for place in places]
    text = PackedText.from_lists(variants).to(teacher.device)
    embeds, _ = network.encode_image(_pixels(teacher, [example]))
    spans, own = text_spans(text), torch.arange(len(variants), device=teacher.device)
    plan = FusionPlan.build(spans, own, torch.zeros_like(own), 1)
    hidden = network.text_encoder.encode(text.input_ids, text.position_ids, spans)
    rows = plan.first + torch.tensor(places, device=teacher.device)
    fused = network.text_encoder.fuse(plan.gather(hidden), plan, embeds, rows)
    shares = at_least_fp32(network.text_encoder.predict_tokens(fused)).softmax(-1)  # [places, V]
    least_sure = int(torch.special.entr(shares).sum(-1).argmax())
    name = tokenizer.tokenizer.id_to_token
    best = shares[least_sure].topk(min(TOP, shares.shape[1]))
    words = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    masked = " ".join(name(i) for i in variants[least_sure][1:] if i != tokenizer.sep_id).replace(" ##", "")
    return masked, name(ids[places[least_sure]]), tuple(Target(name(i) or f"[{i}]", share) for i, share in words)


def _top(shares: Tensor, names: Sequence[str]) -> tuple[Target, ...]:
    best = shares.topk(min(TOP, shares.numel()))
    return tuple(Target(names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True))


# -- the picture -------------------------------------------------------------------------------------------------------


def draw(views: Sequence[View], out: str | Path) -> Path:
    """A PNG: a row for each pair, with its image, the words, the texts, and the images that the teacher prefers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = Path(out)
    figure = Figure(figsize=(15, 2.3 * len(views) + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(views), 3 + TOP, width_ratios=[1.1, 1.1, 2.6, *[0.8] * TOP])
    for row, view in enumerate(views):
        head = row == 0
        axes = figure.add_subplot(grid[row, 0])
        axes.imshow(_picture(view.image))
        _plain(axes, shown(view.masked, 34))
        _list(figure.add_subplot(grid[row, 1]), "the masked word" * head, view.words, 18, view.word)
        _list(figure.add_subplot(grid[row, 2]), "texts for the image" * head, view.texts, 52, view.caption)
        for column, target in enumerate(view.images):
            axes = figure.add_subplot(grid[row, 3 + column])
            axes.imshow(_picture(target.what))
            own = " ✓" * (target.what == view.image)
            title = "images for the text\n" if head and column == 0 else "\n" * head
            _plain(axes, f"{title}{target.probability:.1%}{own}")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return out


def _list(axes, title: str, targets: Sequence[Target], longest: int, own: str) -> None:
    _plain(axes, title)
    for line, target in enumerate(targets):
        mark = "✓ " if target.what == own else ""
        text = f"{target.probability:6.1%}  {mark}{shown(target.what, longest)}"
        axes.text(
            0, 0.9 - 0.18 * line, text, fontsize=8, va="top", parse_math=False, color="#00734f" if mark else "#1d2329"
        )


def _plain(axes, title: str) -> None:
    axes.set_title(title, fontsize=8, parse_math=False)
    axes.set_axis_off()


def _picture(path: str) -> Image.Image:
    image = decode_image(path)
    image.thumbnail((LONGEST // 2, LONGEST // 2))
    return image
