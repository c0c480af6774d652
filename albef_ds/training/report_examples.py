"""Test images in a report, with what the model said of them; remembered in examples.json, so that a report can be made
again without the model."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from PIL import Image

from albef_ds.data.files import write_atomically
from albef_ds.data.images import ImageError, decode_image
from albef_ds.evaluation.examples import BoxOf, Example
from albef_ds.evaluation.retrieval import FoundCaption, RetrievalExample
from albef_ds.training.report_page import data_uri, gap, section
from albef_ds.training.report_pictures import annotated, reduced

AnyExample = Example | RetrievalExample

RETRIEVAL_NOTE = (
    "The captions found for test images among all texts of the test set, best first; ✓ marks those of the image."
)
NOTE = "What the model said of test images; ✓ right, ✗ wrong."


def remember(path: Path, samples: Sequence[AnyExample]) -> None:
    """Writes examples.json; `kind` tells the two kinds apart."""
    entries = [{"kind": "retrieval" if isinstance(s, RetrievalExample) else "example", **asdict(s)} for s in samples]
    write_atomically(path, json.dumps(entries, indent=1))


def remembered(path: Path, gaps: list[str]) -> list[AnyExample]:
    """What examples.json holds, [] where there is none; entries that are not of its form are left out, and counted in
    `gaps`. Entries without a kind are of retrieval: there was no other once."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError("it holds no list")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        gaps.append(f"{path.name} cannot be read ({str(error).splitlines()[0]}): no test images from it.")
        return []
    samples = []
    for entry in entries:
        try:
            samples.append(_sample(entry))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    if len(samples) < len(entries):
        gaps.append(f"{path.name}: {len(entries) - len(samples)} of {len(entries)} test images cannot be read.")
    return samples


def examples_section(samples: Sequence[AnyExample], title: str = "Test images") -> str:
    """One card an example; "" where there are none."""
    found = [s for s in samples if isinstance(s, RetrievalExample)]
    others = [s for s in samples if isinstance(s, Example)]
    parts = []
    if found:
        parts.append(f"<p>{RETRIEVAL_NOTE}</p>{_cards(map(_retrieval_card, found))}")
    if others:
        double = any(len(s.images) > 1 for s in others)
        parts.append(f"<p>{NOTE}{_keys(others)}</p>{_cards(map(_card, others), ' double' if double else '')}")
    return section(title, "".join(parts)) if parts else ""


def _cards(cards, kind: str = "") -> str:
    return f'<div class="cards{kind}">{"".join(cards)}</div>'


def _keys(samples: Sequence[Example]) -> str:
    """What lines and colours mean, of those that are there."""
    keys = []
    if any(s.true_box is not None for s in samples):
        keys.append(("key", "the true box"))
    if any(s.found_box is not None for s in samples):
        keys.append(("key found", "the box found"))
    if any(s.heatmap is not None for s in samples):
        keys.append(("key heat", "how much the text looks there, from nothing to most"))
    named = "".join(f'<span><span class="{kind}"></span>{text}</span>' for kind, text in keys)
    return f'<span class="keys">{named}</span>' if keys else ""


def _retrieval_card(sample: RetrievalExample) -> str:
    found = "".join(
        f'<li class="{"right" if f.right else "other"}">{escape(f.caption)}{" <b>✓</b>" if f.right else ""}'
        f"<small>ITM {f.itm:+.2f}, ITC {f.itc:+.3f}</small></li>"
        for f in sample.found
    )
    missed = [c for c in sample.captions if not any(f.right and f.caption == c for f in sample.found)]
    own = "".join(f"<li>{escape(caption)}</li>" for caption in missed)
    own = f'<p class="own">Not among them:</p><ul>{own}</ul>' if own else ""
    return f'<article><div class="pictures">{_picture(sample.image)[0]}</div><div><ol>{found}</ol>{own}</div></article>'


def _card(sample: Example) -> str:
    pictures, faults = [], []
    for place, path in enumerate(sample.images):
        picture, wrong = _picture(path, sample if place == 0 else None)
        pictures.append(picture)
        faults += wrong
    kind, mark = {True: ("right", " ✓"), False: ("wrong", " ✗"), None: ("", "")}[sample.right]
    lines = [f'<p class="answer {kind}">found: <b>{escape(sample.found)}{mark}</b></p>']
    if sample.expected is not None:
        lines.append(f'<p class="answer">expected: <b>{escape(sample.expected)}</b></p>')
    text = f'<p class="says">{escape(sample.text)}</p>{"".join(lines)}{"".join(map(gap, faults))}'
    return f'<article><div class="pictures">{"".join(pictures)}</div><div>{text}</div></article>'


def _picture(path: str, sample: Example | None = None) -> tuple[str, tuple[str, ...]]:
    """The picture, with what `sample` lays over it, or why there is none; and what could not be laid over it."""
    name = Path(path).name
    try:
        image = decode_image(path)
    except ImageError as error:
        return gap(f"{error.reason}: {name}"), ()
    if sample is None or (sample.heatmap, sample.true_box, sample.found_box) == (None, None, None):
        return _img(reduced(image), name), ()
    drawn = annotated(image, sample.heatmap, sample.true_box, sample.found_box)
    return _img(drawn.image, name), drawn.faults


def _img(image: Image.Image, name: str) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return f'<img alt="{escape(name)}" src="{data_uri("image/jpeg", file.getvalue())}">'


# -- examples.json: written by us, perhaps damaged since -----------------------------------------------------------


def _sample(entry: Mapping) -> AnyExample:
    kind = entry.get("kind", "retrieval") if isinstance(entry, dict) else None
    if kind == "retrieval":
        found = tuple(
            FoundCaption(_text(f["caption"]), float(f["itc"]), float(f["itm"]), bool(f["right"]))
            for f in entry["found"]
        )
        return RetrievalExample(_text(entry["image"]), tuple(map(_text, entry["captions"])), found)
    if kind != "example":
        raise ValueError(f"kind {kind!r}")
    right = entry["right"]
    if right not in (True, False, None):
        raise TypeError("right is neither true, false nor null")
    return Example(
        tuple(map(_text, entry["images"])),
        _text(entry["text"]),
        _text(entry["found"]),
        None if entry["expected"] is None else _text(entry["expected"]),
        None if right is None else bool(right),
        None if entry.get("heatmap") is None else tuple(tuple(map(float, row)) for row in entry["heatmap"]),
        _box(entry.get("true_box")),
        _box(entry.get("found_box")),
    )


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _box(values) -> BoxOf | None:
    if values is None:
        return None
    x, y, width, height = map(float, values)
    return x, y, width, height
