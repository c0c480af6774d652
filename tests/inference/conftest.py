"""A small checkpoint of every kind in the reference's form, random but lively, with its vocabulary beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import albef_ds
import albef_ds.inference.model
from albef_ds.config import ModelConfig, TextConfig, VisionConfig
from albef_ds.data.tokenizer import load_tokenizer, train_wordpiece
from albef_ds.model.reference_weights import to_reference
from albef_ds.tasks.registry import TASKS

KINDS = ("pretraining", "retrieval", "vqa", "entailment", "nlvr")
TEXTS = (
    "a red circle",
    "two blue squares and a very small green triangle above a large redcircle",
    "circle",
    "what is left of the green square",
    "",
)


def small_model(vocabulary: int, **vision) -> ModelConfig:
    """Widths of 64 a head, as in the paper: they can be told from the weights."""
    return ModelConfig(
        vision=VisionConfig(**{"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "heads": 1} | vision),
        text=TextConfig(
            vocab_size=vocabulary, width=64, layers=4, fusion_layer=2, heads=1, mlp_width=96, max_positions=24
        ),
        embed_dim=16,
        queue_size=8,
    )


def write_checkpoint(kind: str, path: Path, model: ModelConfig, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    task = TASKS[kind](model)
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that inputs make a difference
        if task.teacher is not None:
            task.teacher.copy_from(task.model)
            for parameter in task.teacher.parameters():
                parameter.add_(0.01)  # a teacher of its own
    torch.save({"model": to_reference(task.model, task.teacher, getattr(task, "queue", None)), "epoch": 3}, path)
    return path


def draw(colour: str, shape: str, size: int = 40) -> Image.Image:
    image = Image.new("RGB", (size + 8, size), "white")
    box = (6, 6, size - 10, size - 6)
    getattr(ImageDraw.Draw(image), "ellipse" if shape == "circle" else "rectangle")(box, fill=colour)
    return image


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Path:
    """A folder of KIND.pth and vocab.txt."""
    folder = tmp_path_factory.mktemp("zoo")
    train_wordpiece([text for text in TEXTS if text] * 3, 120, folder / "vocab.txt")
    words = load_tokenizer(folder / "vocab.txt").vocab_size
    for seed, kind in enumerate(KINDS):
        write_checkpoint(kind, folder / f"{kind}.pth", small_model(words), seed)
    return folder


@pytest.fixture(scope="session")
def models(zoo) -> dict[str, albef_ds.inference.model.Albef]:
    return {kind: albef_ds.load(zoo / f"{kind}.pth", device="cpu") for kind in KINDS}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of five images, one of them deeper, and of one file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for name, colour, shape in (
        ("a.png", "red", "circle"),
        ("b.jpg", "blue", "square"),
        ("more/c.png", "green", "circle"),
        ("d.webp", "black", "square"),
    ):
        draw(colour, shape).save(folder / name)
    noise = np.random.default_rng(0).integers(0, 65535, (20, 30), dtype=np.uint16)
    Image.fromarray(noise).save(folder / "e.png")
    (folder / "broken.jpg").write_bytes(b"no image at all")
    (folder / "notes.txt").write_text("no image, and does not say so")
    return folder


@pytest.fixture(scope="session")
def readable(pictures) -> list[Path]:
    return [pictures / name for name in ("a.png", "b.jpg", "d.webp", "e.png", "more/c.png")]
