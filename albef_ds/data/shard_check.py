"""Verifies packed shards, and shows what is in them."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from albef_ds.data.images import ImageError, decode_image
from albef_ds.data.shard_folder import LocalFolder, ShardFolder
from albef_ds.data.shard_format import Manifest, ShardError, ShardInfo, parse_index, parse_sample
from albef_ds.data.shards import ShardSet, read_manifest

_CHUNK = 4 << 20


def check(folder: str | Path, decode: bool = False, workers: int = 1, progress=None) -> tuple[Manifest, list[str]]:
    """(manifest, what is wrong, one line for each fault). decode: also every image, which takes as long as packing.

    Raises ShardError where there is no readable manifest.
    """
    source = LocalFolder(str(folder))
    manifest = read_manifest(source)
    faults: list[str] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:  # hashing and decoding leave Python's lock
        for done, found in enumerate(pool.map(lambda info: list(_faults(source, info, decode)), manifest.shards), 1):
            faults += found
            if progress:
                progress(done, len(manifest.shards))
    return manifest, faults


def _faults(folder: ShardFolder, info: ShardInfo, decode: bool) -> Iterator[str]:
    tar, index = f"{info.name}.tar", f"{info.name}.idx"
    try:
        size = folder.size(tar)
        if size != info.bytes:
            yield f"{folder.name_of(tar)}: {size:,} bytes instead of {info.bytes:,}"
        elif _sha256(Path(folder.location, tar)) != info.sha256:
            yield f"{folder.name_of(tar)}: contents have changed (sha256 differs)"
            decode = True  # which samples?
    except (ShardError, OSError) as error:
        yield str(error)
        return
    try:
        text = folder.read(index)
        rows = parse_index(text.decode("ascii"), info)
        if hashlib.sha256(text).hexdigest() != info.index_sha256:
            raise ValueError("contents have changed (sha256 differs)")
    except ShardError as error:
        yield str(error)
        return
    except ValueError as error:
        yield f"{folder.name_of(index)}: {error}"
        return
    for number, row in enumerate(rows if decode else ()):
        fault = _sample_fault(folder, info, row)
        if fault:
            yield f"{folder.name_of(tar)}, sample {number}: {fault}"


def _sample_fault(folder: ShardFolder, info: ShardInfo, row: np.ndarray) -> str | None:
    start, size, text_start, text_size = (int(n) for n in row)
    try:
        data = folder.read_at(f"{info.name}.tar", start, text_start + text_size - start, info.bytes, info.sha256)
        decode_image(parse_sample(data[:size], data[text_start - start :]).image)
    except ShardError:
        return "lies beyond the end of the shard"
    except ImageError as error:
        return error.reason
    except ValueError as error:
        return str(error)
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def contact_sheet(folder: str | Path, out: str | Path, count: int = 40, seed: int = 0, side: int = 192) -> Path:
    """Writes an HTML page of `count` samples drawn at random, captions beside them; needs no other file."""
    shards = ShardSet([LocalFolder(str(folder))], on_bad_shard="skip")
    chosen = np.random.default_rng(seed).choice(len(shards), size=min(count, len(shards)), replace=False)
    cards = "\n".join(_card(shards, int(i), side) for i in sorted(chosen))
    manifest = shards.manifests[0]
    title = f"{manifest.samples:,} samples in {len(manifest.shards):,} shards, {manifest.rejected:,} rejected"
    page = _PAGE.format(name=html.escape(str(folder)), title=html.escape(title), side=side, cards=cards)
    out = Path(out)
    out.write_text(page, encoding="utf-8", errors="replace")  # captions may hold half a surrogate pair
    return out


def _card(shards: ShardSet, index: int, side: int) -> str:
    try:
        sample = shards[index]
        image = decode_image(sample.image, key=sample.key)
    except ImageError as error:
        return f'<figure class="bad"><figcaption>{html.escape(str(error))}</figcaption></figure>'
    size = f"{image.width} x {image.height}"
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    captions = "".join(f"<li>{html.escape(caption[:500])}</li>" for caption in sample.captions[:10])
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{data}">'
        f"<figcaption><ul>{captions}</ul><small>{html.escape(sample.key)}, {size}</small></figcaption></figure>"
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({side}px, 1fr)); gap: 1.2rem; }}
figure {{ margin: 0; }} img {{ max-width: 100%; border-radius: 4px; }}
ul {{ margin: .3rem 0; padding-left: 1.1rem; }} small {{ color: #777; overflow-wrap: anywhere; }}
.bad {{ color: #a00; }}
</style>
<h1>{name}</h1><p>{title}</p>
<main>
{cards}
</main></html>
"""
