"""The embedded data set: pictures of coloured shapes and captions about them, made on the spot from a seed.

What the demo trains on. Real JPEG files and the reference's JSON, so that it takes the same way as real data.
"""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from albef_ds.data.shapes_scene import (
    BACKGROUND_COLOURS,
    COLOURS,
    SHAPES,
    SIZES,
    TASK_WORDS,
    Scene,
    draw_scene,
    full_caption,
    partial_caption,
    varied_caption,
)
from albef_ds.data.tokenizer import train_wordpiece
from albef_ds.data.whole_folder import is_made_from, whole_folder

VERSION = 2  # of what the arguments mean; a change of scenes, captions, rendering or vocabulary raises it
_DRAWS = 1  # the version whose random numbers these are: 2 changed the vocabulary, but no scene and no caption
_TRAIN, _TEST = 0, 1
_OVERSAMPLE = 4  # masks are drawn this much larger and reduced: smooth edges


@dataclass(frozen=True)
class ShapesWorld:
    """Where the parts of a written data set are."""

    root: Path
    train: Path  # pre-training JSON, image paths relative to it
    test: Path  # retrieval JSON for evaluation, one caption an image
    scenes: Path  # JSON Lines: image, split, captions, which of them are noise, and the scene
    vocab: Path  # WordPiece vocabulary of the captions and of the tasks derived from the scenes
    meta: Path  # the arguments; written last

    @classmethod
    def at(cls, root: str | os.PathLike) -> ShapesWorld:
        root = Path(root)
        names = ("train.json", "test.json", "scenes.jsonl", "vocab.txt", "meta.json")
        return cls(root, *(root / name for name in names))


@dataclass(frozen=True)
class _Arguments:
    images: int
    test_images: int
    seed: int
    noise: float
    size: int
    captions_per_image: int
    vocab_size: int
    version: int = VERSION

    def __post_init__(self):
        for name, low in (("images", 1), ("test_images", 1), ("seed", 0), ("size", 32), ("captions_per_image", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least {low}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise is {self.noise}: expected a share from 0 to 1")
        if self.test_images > 2000:
            raise ValueError(f"test_images is {self.test_images}: at most 2000 scenes are told apart by their captions")


def write_shapes_world(
    out: str | os.PathLike,
    images: int = 8000,
    test_images: int = 256,
    seed: int = 0,
    noise: float = 0.1,
    size: int = 96,
    captions_per_image: int = 2,
    vocab_size: int = 384,
) -> ShapesWorld:
    """Writes a data set of `images` training pictures and `test_images` test pictures, `size` pixels wide and high.

    noise: share of the training captions that are wrong (another scene's) or partial, half and half.

    The same arguments give the same bytes (with the same Pillow). Test captions are free of noise, and each is true of
    one test picture only; no training scene holds the same objects as a test scene. The folder appears complete or not
    at all. Where `out` already holds this data set it returns at once.
    Raises FileExistsError where `out` holds something else, ValueError where an argument is out of range.
    """
    arguments = _Arguments(images, test_images, seed, noise, size, captions_per_image, vocab_size)
    world = ShapesWorld.at(out)

    def is_written() -> bool:
        return is_made_from(world.meta, asdict(arguments), "the shapes world of these arguments")

    if is_written():
        return world
    with whole_folder(world.root, is_written) as temporary:
        _write(ShapesWorld.at(temporary), arguments)
    return world


def _write(world: ShapesWorld, arguments: _Arguments) -> None:
    (world.root / "images").mkdir(parents=True)
    test = list(_test_scenes(arguments))
    train = list(_train_scenes(arguments, {scene.contents for scene in test}))
    train_captions = [_train_captions(arguments, train, i) for i in range(len(train))]
    test_captions = [[(full_caption(s, _rng(arguments, _TEST, 2, i)), False)] for i, s in enumerate(test)]

    entries: dict[str, list[dict]] = {"train": [], "test": []}
    with open(world.scenes, "w", encoding="utf-8", newline="\n") as scenes_file:
        for split, scenes, captions in (("train", train, train_captions), ("test", test, test_captions)):
            for i, (scene, said) in enumerate(zip(scenes, captions, strict=True)):
                image = f"images/{split}_{i:06d}.jpg"
                (world.root / image).write_bytes(to_jpeg(render(scene)))
                texts = [text for text, _ in said]
                entries[split].append({"image": image, "caption": texts})
                record = {"image": image, "split": split, "captions": texts, "noise": [noisy for _, noisy in said]}
                scenes_file.write(json.dumps({**record, "scene": scene.to_dict()}) + "\n")
    write_list(world.train, entries["train"])
    write_list(world.test, entries["test"])
    said = [text for captions in (*train_captions, *test_captions) for text, _ in captions]
    words = [*TASK_WORDS, *COLOURS, *SHAPES, *SIZES, *BACKGROUND_COLOURS]
    train_wordpiece([*said, *words], arguments.vocab_size, world.vocab)
    world.meta.write_text(json.dumps(asdict(arguments), indent=1) + "\n", encoding="utf-8")


def write_list(path: Path, entries: list[dict]) -> None:
    """A JSON list with an entry a line: readable with `head`."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")


def _rng(arguments: _Arguments, *stream: int) -> np.random.Generator:
    return np.random.default_rng((_DRAWS, arguments.seed, *stream))


def _test_scenes(arguments: _Arguments) -> Iterator[Scene]:
    """Scenes of which none has all the objects of another, so that a caption fits one of them only."""
    rng = _rng(arguments, _TEST, 1)
    taken: list[frozenset] = []
    while len(taken) < arguments.test_images:
        scene = draw_scene(rng, arguments.size)
        if any(scene.contents <= other or other <= scene.contents for other in taken):
            continue
        taken.append(scene.contents)
        yield scene


def _train_scenes(arguments: _Arguments, held_out: set[frozenset]) -> Iterator[Scene]:
    rng = _rng(arguments, _TRAIN, 1)
    for _ in range(arguments.images):
        scene = draw_scene(rng, arguments.size)
        while scene.contents in held_out:
            scene = draw_scene(rng, arguments.size)
        yield scene


def _train_captions(arguments: _Arguments, scenes: list[Scene], i: int) -> list[tuple[str, bool]]:
    """(caption, whether it is noise) for scene i."""
    rng = _rng(arguments, _TRAIN, 2, i)
    captions = []
    for _ in range(arguments.captions_per_image):
        if rng.random() >= arguments.noise:
            captions.append((varied_caption(scenes[i], rng), False))
        elif rng.random() < 0.5 and len(scenes) > 1:
            other = scenes[(i + int(rng.integers(1, len(scenes)))) % len(scenes)]
            captions.append((varied_caption(other, rng), True))
        else:
            captions.append((partial_caption(scenes[i], rng), True))
    return captions


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of `scene.image_size` pixels: the same pixels for the same scene."""
    rng = np.random.default_rng(scene.texture_seed)
    image = Image.fromarray(_background(scene, rng))
    for thing in scene.objects:
        tint = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-15, 16, size=3), 0, 255)
        left, top, right, _ = thing.box
        image.paste(tuple(int(v) for v in tint), (left, top), _mask(thing.shape, right - left))
    return image


def to_jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """[S, S, 3] uint8: the colour plus a brightness pattern [S, S]."""
    size = scene.image_size
    angle = rng.uniform(0, 2 * np.pi)
    along = np.linspace(-0.5, 0.5, size)
    across = np.cos(angle) * along[None, :] + np.sin(angle) * along[:, None]  # -0.7 to 0.7 along one direction
    if scene.background_kind == "shaded":
        pattern = 70 * across
    elif scene.background_kind == "striped":
        pattern = 22 * np.sign(np.sin(2 * np.pi * rng.uniform(5, 9) * across))
    elif scene.background_kind == "noisy":
        pattern = rng.normal(0, 22, size=(size, size))
    else:
        pattern = np.zeros((size, size))
    colour = np.array(BACKGROUND_COLOURS[scene.background_colour]) + rng.integers(-10, 11, size=3)
    return np.clip(colour + pattern[:, :, None], 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=512)
def _mask(shape: str, side: int) -> Image.Image:
    """How much of each pixel of a box the shape covers, as an 8-bit image."""
    big = side * _OVERSAMPLE
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, big, big), fill=255)
    elif shape == "triangle":
        draw.polygon([(big / 2, 0), (big - 1, big - 1), (0, big - 1)], fill=255)
    else:
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 0.22, 0.5) * big  # ten corners, outer and inner by turns
        xs, ys = big / 2 + radii * np.sin(angles), big / 2 - radii * np.cos(angles)
        draw.polygon(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=255)
    return mask.reduce(_OVERSAMPLE)
