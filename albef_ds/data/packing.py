"""Packs lists of images and captions into shuffled shards: once for all, so that training reads what is sound.

First all lists are read and their entries written to one file; a permutation of them says which goes to which shard.
Every shard is then a job of its own: it depends on the plan alone and appears complete, by rename, or not at all. So
any number of processes share the work, and a killed run goes on with the shards that lack.
Memory: 16 bytes an entry, and a few images a process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from albef_ds.data.annotations import AnnotationError
from albef_ds.data.files import write_atomically
from albef_ds.data.images import MAX_PIXELS, ImageError
from albef_ds.data.pack_sources import read_entries
from albef_ds.data.shard_format import MANIFEST, REJECTS, Manifest, ShardInfo, index_text, sample_json
from albef_ds.data.shard_writer import HashedTar, sound_jpeg
from albef_ds.folder_lock import OWNER, FolderLock
from albef_ds.processes import die_with_parent

_WORK, _IDENTITY = ".packing", "identity.json"  # in OUT, until all is done
_LONGEST_CAPTION = 10_000  # characters; training reads the first 30 words


@dataclass(frozen=True)
class PackSettings:
    """What the result depends on beside the sources."""

    samples_per_shard: int = 5000
    shorter_side: int | None = None  # pixels; larger images are reduced to it
    quality: int = 92  # of JPEG files that have to be written anew
    max_pixels: int = MAX_PIXELS
    seed: int = 0
    image_root: str | None = None
    columns: tuple[str, str] = ("image", "caption")

    def __post_init__(self):
        for name in ("samples_per_shard", "max_pixels", "quality"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.max_pixels > MAX_PIXELS:
            raise ValueError(f"max_pixels is {self.max_pixels}: at most {MAX_PIXELS}, Pillow's limit")
        if self.shorter_side is not None and self.shorter_side < 16:
            raise ValueError(f"shorter_side is {self.shorter_side}: expected at least 16 pixels")


def pack(
    sources: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    settings: PackSettings = PackSettings(),
    workers: int = 1,
    progress=None,
) -> Manifest:
    """Packs `sources` (see `pack_sources`) into the folder `out`; returns what its manifest says.

    workers: processes; 1: in this one. progress: called with (shards done, shards) after each.

    Called again with the same arguments it goes on where it was interrupted, or returns at once.
    Raises AnnotationError where a source cannot be read or nothing at all can be packed, FileExistsError where `out`
    holds something else, FolderError where another process packs into it, RuntimeError where a process was killed.
    """
    out = Path(out)
    identity = {"sources": [_identity(source) for source in sources], "settings": asdict(settings)}
    identity = json.loads(json.dumps(identity))
    work = out / _WORK
    if (out / MANIFEST).exists():
        return _finished(out, identity)
    _check_claim(out, work, identity)
    with FolderLock(work):
        _check_claim(out, work, identity)  # now that nobody else writes there
        write_atomically(work / _IDENTITY, json.dumps(identity))
        if not (out / MANIFEST).exists():  # another process may have packed it meanwhile
            _plan(sources, work, settings)
            shards = _count(work, settings)
            _pack_all(out, range(shards), workers, progress)
            _finish(out, shards, identity)
        for path in work.iterdir():  # but for the lock, which ends itself
            if path.name != OWNER:
                path.unlink()
    with contextlib.suppress(OSError):  # another process has just entered: it will find all done
        work.rmdir()
    return _finished(out, identity)


def _identity(source) -> dict:
    try:
        found = os.stat(source)
    except OSError as error:
        raise AnnotationError(f"{source} cannot be read: {error.strerror}; check the path") from error
    path = os.path.abspath(source)
    if stat.S_ISDIR(found.st_mode):
        return {"path": path}
    return {"path": path, "size": found.st_size, "modified": found.st_mtime_ns}


def _finished(out: Path, identity: dict) -> Manifest:
    manifest = Manifest.from_json((out / MANIFEST).read_bytes(), str(out / MANIFEST))
    if manifest.settings != identity:
        raise FileExistsError(
            f"{out} holds shards of other sources or settings (see {MANIFEST}); delete it or choose another folder"
        )
    return manifest


def _check_claim(out: Path, work: Path, identity: dict) -> None:
    """That the folder is free, or this packing's already. Raises FileExistsError."""
    known = work / _IDENTITY
    if known.exists():
        if json.loads(known.read_text()) != identity:
            raise FileExistsError(
                f"{out} holds an unfinished packing of other sources or settings; delete it or choose another folder"
            )
        return
    if out.exists() and any(p.name != _WORK for p in out.iterdir()) and not (out / MANIFEST).exists():
        raise FileExistsError(f"{out} is not empty; choose another folder")


# -- the plan ----------------------------------------------------------------------------------------------------------


def _plan(sources: Sequence, work: Path, settings: PackSettings) -> None:
    """entries.jsonl with a usable entry a line, order.npy with where each begins, shuffled, and rejects.jsonl."""
    if (work / "order.npy").exists():
        return
    starts, at = [], 0
    blocks: list[np.ndarray] = []
    with open(work / "entries.jsonl", "wb") as entries, open(work / REJECTS, "w", encoding="ascii") as rejects:
        for source in sources:
            for entry in read_entries(source, settings.image_root, settings.columns):
                if entry.fault:
                    rejects.write(_reject_line(entry.key, entry.source, entry.fault))
                    continue
                captions = [caption[:_LONGEST_CAPTION] for caption in entry.captions]
                record = {"image": entry.image, "key": entry.key, "captions": captions, "source": entry.source}
                starts.append(at)
                at += entries.write(json.dumps(record).encode("ascii") + b"\n")
                if len(starts) == 1 << 20:
                    blocks.append(np.array(starts, dtype=np.int64))
                    starts = []
    order = np.concatenate([*blocks, np.array(starts, dtype=np.int64)])
    if not order.size:
        first = next(iter(Path(work / REJECTS).read_text().splitlines()), "the lists are empty")
        raise AnnotationError(f"nothing to pack in {', '.join(map(str, sources))}: {first}")
    np.random.default_rng(settings.seed).shuffle(order)
    with open(work / ".order.tmp", "wb") as file:
        np.save(file, order)
    os.replace(work / ".order.tmp", work / "order.npy")


def _count(work: Path, settings: PackSettings) -> int:
    return -(-np.load(work / "order.npy", mmap_mode="r").size // settings.samples_per_shard)


def _reject_line(key: str, source: str, reason: str) -> str:
    return json.dumps({"key": key, "source": source, "reason": reason}) + "\n"


# -- the shards --------------------------------------------------------------------------------------------------------


def _pack_all(out: Path, shards: range, workers: int, progress) -> None:
    todo = [shard for shard in shards if not _record(out, shard).exists()]
    done = len(shards) - len(todo)
    if progress:
        progress(done, len(shards))
    for _ in _each_done(out, todo, workers):
        done += 1
        if progress:
            progress(done, len(shards))


def _each_done(out: Path, todo: list[int], workers: int) -> Iterator[None]:
    if workers <= 1:
        for shard in todo:
            pack_shard(out, shard)
            yield
        return
    arguments = {"mp_context": get_context("spawn"), "initializer": die_with_parent, "initargs": (os.getpid(),)}
    with ProcessPoolExecutor(workers, **arguments) as pool:
        try:
            running, waiting = set(), iter(todo)
            while True:
                while len(running) < 2 * workers and (shard := next(waiting, None)) is not None:
                    running.add(pool.submit(pack_shard, out, shard))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for job in finished:
                    job.result()
                    yield
        except BrokenProcessPool:
            raise RuntimeError(
                f"packing {out}: a process was killed, by lack of memory perhaps; run the same command again to go on, "
                "with fewer --workers or a lower --max-pixels"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _record(out: Path, shard: int) -> Path:
    return out / _WORK / f"shard-{shard:06d}.json"


def pack_shard(out: Path, shard: int) -> None:
    """Writes one shard, its index and, last, the record that both are complete."""
    work, name = out / _WORK, f"shard-{shard:06d}"
    settings = json.loads((work / _IDENTITY).read_text())["settings"]
    size = settings["samples_per_shard"]
    offsets = np.load(work / "order.npy", mmap_mode="r")[shard * size : (shard + 1) * size]
    rows, rejects = [], []
    with open(work / "entries.jsonl", "rb") as entries, open(work / f"{name}.tar.tmp", "wb") as file:
        tar = HashedTar(file)
        for offset in offsets:
            entries.seek(int(offset))
            entry = json.loads(entries.readline())
            try:
                image = sound_jpeg(entry["image"], entry["key"], settings)
            except ImageError as error:
                rejects.append((entry["key"], entry["source"], error.reason))
                continue
            text, number = sample_json(entry["key"], entry["captions"], image), f"{len(rows):06d}"
            rows.append((tar.add(f"{number}.jpg", image), len(image), tar.add(f"{number}.json", text), len(text)))
        tar.close()
    index = index_text(rows)
    write_atomically(out / f"{name}.idx", index)
    os.replace(work / f"{name}.tar.tmp", out / f"{name}.tar")
    info = ShardInfo(name, len(rows), tar.size, tar.sha256, hashlib.sha256(index.encode()).hexdigest())
    write_atomically(_record(out, shard), json.dumps({"shard": asdict(info), "rejects": rejects}))


# -- the end -----------------------------------------------------------------------------------------------------------


def _finish(out: Path, shards: int, identity: dict) -> None:
    infos, rejected = [], 0
    with open(out / _WORK / "all_rejects", "w", encoding="ascii") as rejects:
        for line in open(out / _WORK / REJECTS, encoding="ascii"):
            rejects.write(line)
            rejected += 1
        for shard in range(shards):
            record = json.loads(_record(out, shard).read_text())
            infos.append(ShardInfo(**record["shard"]))
            for reject in record["rejects"]:
                rejects.write(_reject_line(*reject))
                rejected += 1
    os.replace(out / _WORK / "all_rejects", out / REJECTS)
    samples, size = sum(info.samples for info in infos), sum(info.bytes for info in infos)
    if not samples:
        raise AnnotationError(f"no image could be packed: all {rejected} were rejected, see {out / REJECTS}")
    names = tuple(os.path.basename(source["path"]) for source in identity["sources"])
    manifest = Manifest(samples, rejected, size, tuple(infos), identity, names)
    write_atomically(out / MANIFEST, manifest.to_json())
