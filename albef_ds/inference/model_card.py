"""README.md of a model in Hugging Face's form: what it is, how it is used, what it reached."""

from __future__ import annotations

from collections.abc import Mapping

from albef_ds.config import Config

TASKS = {
    "pretraining": ("pre-trained: aligns, matches and finds images and texts", "image-text-to-text"),
    "retrieval": ("fine-tuned for image-text retrieval", "zero-shot-image-classification"),
    "grounding": ("fine-tuned for visual grounding", "zero-shot-object-detection"),
    "vqa": ("fine-tuned to answer questions about images", "visual-question-answering"),
    "entailment": ("fine-tuned for visual entailment", "image-text-to-text"),
    "nlvr": ("fine-tuned to judge a sentence about two images (NLVR2)", "image-text-to-text"),
}

USE = {
    "align": (
        'model.similarity(["a.jpg", "b.jpg"], ["a dog on a beach"])  # [2, 1] cosines\n'
        'model.match("a.jpg", ["a dog on a beach", "a cat"])         # [2] probabilities\n'
        'model.heatmaps("a.jpg", "a dog on a beach")                 # where each word is'
    ),
    "answer": 'model.answer("a.jpg", "what is on the beach?", k=3)',
    "classify": 'model.classify("a.jpg", "a dog is on a beach")',
    "pair": 'model.classify([("left.jpg", "right.jpg")], ["both images show a dog"])',
}


def model_card(title: str, config: Config, metrics: Mapping, licence: str, momentum: bool) -> str:
    """Markdown.

    Args:
        licence: of the weights, by the hub's names; "unknown" where nobody said.
        momentum: whether the file holds the teacher's weights too.
    """
    what, pipeline = TASKS[config.task]
    vision, text = config.model.vision, config.model.text
    use = {"vqa": "answer", "entailment": "classify", "nlvr": "pair"}.get(config.task, "align")
    teacher = " The momentum teacher's weights, and its queues where there are any, are in the file too." * momentum
    return f"""---
license: {licence}
library_name: albef_ds
pipeline_tag: {pipeline}
tags:
- albef
- vision-language
---

# {plain(title)}

ALBEF (*Align before Fuse*, NeurIPS 2021), {what}.

- image encoder: ViT, {vision.layers} layers of width {vision.width}, {vision.image_size} pixels square in patches of
  {vision.patch_size}
- text and fusion encoder: BERT, {text.layers} layers of width {text.width}, from layer {text.fusion_layer} on with
  cross-attention to the image; {text.vocab_size:,} words
- `model.safetensors` has the names of the reference implementation (salesforce/ALBEF).{teacher}

## Use

```python
import albef_ds

model = albef_ds.load("PATH OR OWNER/NAME OF THIS FOLDER")
{USE[use]}
```

`python -m albef_ds convert FOLDER model.pth` gives the file that the reference's code loads.

## Results

{results(metrics)}

## Licence

Weights: {licence}. The code that loads them, albef_ds: Apache-2.0.
"""


def results(metrics: Mapping) -> str:
    rows = [f"| {plain(name)} | {value:.4g} |" for name, value in _numbers(metrics)]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else "None are known."


def _numbers(metrics: Mapping, prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{key}", value))
    return found


def plain(text: str) -> str:
    """Without what Markdown or HTML would make something of; names of folders are anybody's."""
    return "".join(
        f"\\{c}" if c in "\\`*_[]#|" else {"<": "&lt;", "&": "&amp;"}.get(c, c) for c in " ".join(text.split())
    )
