"""Packed shards as one sequence of samples, read by their place in the index: any order is as good as any other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from albef_ds.data.annotations import Annotation
from albef_ds.data.images import ImageError
from albef_ds.data.shard_folder import ShardFolder
from albef_ds.data.shard_format import MANIFEST, Manifest, ShardError, ShardInfo, parse_index, parse_sample


class ShardSet(Sequence):
    """The samples of several packed data sets, one after another, each an `Annotation` with the image's bytes.

    Indexes are read shard by shard when they are first needed: 32 bytes a sample, and no wait at the start.

    on_bad_shard: "fatal": a shard that is missing, cut short or changed raises ShardError, at once where a look at the
    file tells, else when it is read. "skip": its samples raise ImageError, so that a loader puts others in their place;
    the numbering, and with it the order of training, is the manifests' in either case.
    """

    def __init__(self, folders: Sequence[ShardFolder], on_bad_shard: Literal["fatal", "skip"] = "fatal"):
        if not folders:
            raise ShardError("no folder of shards given: expected at least one")
        self.folders = tuple(folders)
        self.manifests = tuple(read_manifest(folder) for folder in folders)
        self._fatal = on_bad_shard == "fatal"
        self._shards: list[tuple[ShardFolder, ShardInfo]] = [
            (folder, info) for folder, manifest in zip(folders, self.manifests, strict=True) for info in manifest.shards
        ]
        self._ends = np.cumsum([info.samples for _, info in self._shards])
        self._indexes: dict[int, np.ndarray] = {}
        if self._fatal:
            self.check_sizes()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def corpora(self) -> tuple[tuple[int, ...], ...]:
        """Of each folder the number of samples of each of its shards."""
        return tuple(tuple(info.samples for info in manifest.shards) for manifest in self.manifests)

    def check_sizes(self) -> None:
        """Raises ShardError for the first local shard that is not there or has another size than the manifest says."""
        for folder, info in self._shards:
            size = folder.size(f"{info.name}.tar")
            if size is not None and size != info.bytes:
                raise ShardError(
                    f"{folder.name_of(info.name)}.tar: {size:,} bytes instead of {info.bytes:,}; restore it "
                    "(albef_ds data check names all such), or set data.on_bad_shard=skip"
                )

    def __getitem__(self, index: int) -> Annotation:
        """Raises ImageError where the sample cannot be had and loading goes on without it, else ShardError."""
        i = int(index)
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        folder, info = self._shards[shard]
        try:
            rows = self._index(shard)
        except ShardError as error:
            raise self._unusable(error, folder.name_of(f"{info.name}.tar")) from error
        number = i - int(self._ends[shard]) + info.samples
        start, size, text_start, text_size = (int(n) for n in rows[number])
        try:
            data = folder.read_at(f"{info.name}.tar", start, text_start + text_size - start, info.bytes, info.sha256)
        except ShardError as error:
            raise self._unusable(error, folder.name_of(f"{info.name}.tar")) from error
        try:
            sample = parse_sample(data[:size], data[text_start - start :])
        except ValueError as error:
            key = f"{folder.name_of(info.name)}.tar, sample {number}"
            raise self._unusable(ShardError(f"{key}: {error}"), key) from error
        return Annotation(sample.image, sample.captions, sample.key)

    def _unusable(self, error: ShardError, key: str) -> Exception:
        if self._fatal:
            return ShardError(f"{error}; restore it, or set data.on_bad_shard=skip to go on without")
        return ImageError(key, str(error).removeprefix(f"{key}: "))

    def _index(self, shard: int) -> np.ndarray:
        if shard not in self._indexes:
            folder, info = self._shards[shard]
            name = f"{info.name}.idx"
            data = folder.read(name)
            if hashlib.sha256(data).hexdigest() != info.index_sha256:
                raise ShardError(f"{folder.name_of(name)}: contents have changed (sha256 differs)")
            try:
                self._indexes[shard] = parse_index(data.decode("ascii"), info)
            except ValueError as error:
                raise ShardError(f"{folder.name_of(name)}: {error}") from None
        return self._indexes[shard]


def read_manifest(folder: ShardFolder) -> Manifest:
    """Raises ShardError where there is none, or none that this version understands."""
    name = folder.name_of(MANIFEST)
    try:
        text = folder.read(MANIFEST)
    except ShardError as error:
        raise ShardError(f"{error}; expected a folder made by `albef_ds data pack`, complete") from error
    manifest = Manifest.from_json(text, name)
    if not manifest.samples:
        raise ShardError(f"{name}: no samples")
    return manifest
