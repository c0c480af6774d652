"""Images as people name them: files, folders, pictures in memory; and whatever of them cannot be used, by name."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from albef_ds.data.images import ImageError, decode_image

Picture = str | Path | Image.Image
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif"}


def listed(images: Picture | Sequence[Picture]) -> list[Picture]:
    """One image, several, or a folder, which stands for the images in it and below it, by name.

    Raises:
        ImageError: a folder without an image.
    """
    if isinstance(images, str | Path | Image.Image):
        images = [images]
    found: list[Picture] = []
    for image in images:
        if isinstance(image, str | Path) and Path(image).is_dir():
            inside = images_in(Path(image))
            if not inside:
                raise ImageError(str(image), f"no image in this folder ({', '.join(sorted(SUFFIXES))})")
            found += inside
        else:
            found.append(image)
    return found


def images_in(folder: Path) -> list[Path]:
    """Files with an image's suffix; links that lead out of the folder are left out."""
    root = folder.resolve()
    files = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p for p in files if p.resolve().is_relative_to(root))


def opened(image: Picture) -> Image.Image:
    """RGB, 8 bits. Raises ImageError."""
    if not isinstance(image, Image.Image):
        return decode_image(image)
    if not image.mode.startswith("I"):
        return image if image.mode == "RGB" else image.convert("RGB")
    file = io.BytesIO()  # more than 8 bits: what the same image gives as a file
    image.save(file, "PNG")
    return decode_image(file.getvalue())


@dataclass
class Readable:
    """Goes through images batch by batch; `faults` grows by those that cannot be read, which are left out."""

    images: Sequence[Picture]
    batch_size: int
    faults: list[ImageError] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[list[Picture], list[Image.Image]]]:
        """Batches of what was given and what it shows."""
        given, shown = [], []
        for image in self.images:
            try:
                shown.append(opened(image))
            except ImageError as error:
                self.faults.append(error)
                continue
            given.append(image)
            if len(given) == self.batch_size:
                yield given, shown
                given, shown = [], []
        if given:
            yield given, shown
