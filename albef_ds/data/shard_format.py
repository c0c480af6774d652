"""How a packed data set lies on disk; what `packing` writes, `shards` reads and `shard_check` checks.

    OUT/manifest.json      schema, counts, settings, and of every shard its size and sha256; written last
    OUT/rejects.jsonl      {"key", "source", "reason"} of every entry that was not packed
    OUT/shard-000000.tar   webdataset: NAME.jpg and NAME.json of each sample, NAME its number in the shard
    OUT/shard-000000.idx   where they are in it, in the form of DALI's wds2idx

A sample's JSON: {"key": the path as its list had it, "captions": [texts], "crc32": of the image and the captions}.
Nothing in a shard is ever used as a path.
"""

from __future__ import annotations

import json
import re
import reprlib
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

SCHEMA = 1
MANIFEST, REJECTS = "manifest.json", "rejects.jsonl"
BLOCK = 512  # tar's unit
_SMALLEST_SAMPLE = 4 * BLOCK  # a header and a block of contents, twice
_INDEX_VERSION = "v1.2"
_LARGEST = 1 << 50  # bytes of a shard, and of all; a manifest that says more is none
_SHARD_NAME = re.compile(r"shard-\d{6,}")


class ShardError(RuntimeError):
    """A packed data set, or a shard of it, that is missing or damaged; the message names it."""


@dataclass(frozen=True)
class ShardInfo:
    name: str  # without .tar or .idx
    samples: int
    bytes: int  # of the tar
    sha256: str
    index_sha256: str

    def __post_init__(self):
        # The manifest may come from elsewhere: a name with a slash in it would lead out of the folder.
        if not isinstance(self.name, str) or not _SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"shard name {reprlib.repr(self.name)}: expected shard-000000")
        if not all(type(n) is int and 0 <= n < _LARGEST for n in (self.samples, self.bytes)):
            raise ValueError(f"{self.name}: samples and bytes must be whole numbers below 2^50")
        if self.samples * _SMALLEST_SAMPLE > self.bytes:
            raise ValueError(f"{self.name}: {self.samples:,} samples do not fit {self.bytes:,} bytes")
        if not all(isinstance(text, str) for text in (self.sha256, self.index_sha256)):
            raise ValueError(f"{self.name}: sha256 and index_sha256 must be texts")


@dataclass(frozen=True)
class Manifest:
    samples: int
    rejected: int
    bytes: int
    shards: tuple[ShardInfo, ...]
    settings: dict = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        if not all(type(n) is int and 0 <= n < _LARGEST for n in (self.samples, self.rejected, self.bytes)):
            raise ValueError("samples, rejected and bytes must be whole numbers below 2^50")

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str) -> Manifest:
        """Raises ShardError where it is no manifest, or one of another schema; `name` is what the message calls it."""
        try:
            raw = json.loads(text)
            schema = raw.pop("schema", None) if isinstance(raw, dict) else None
            if type(schema) is not int or schema != SCHEMA:
                raise ShardError(
                    f"{name}: schema {reprlib.repr(schema)}, this version reads {SCHEMA}; pack the data again"
                )
            shards = tuple(ShardInfo(**shard) for shard in raw.pop("shards"))
            manifest = cls(shards=shards, **{**raw, "sources": tuple(raw.get("sources", ()))})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ShardError(f"{name}: not a manifest of packed shards: {str(error)[:200]}") from None
        if manifest.samples != sum(shard.samples for shard in shards):
            raise ShardError(f"{name}: says {manifest.samples} samples, its shards have other numbers in sum")
        return manifest


@dataclass(frozen=True)
class Sample:
    """What a shard holds of one image."""

    key: str
    captions: tuple[str, ...]
    image: bytes


def checksum(image: bytes, captions: Sequence[str]) -> int:
    return zlib.crc32("\n".join(captions).encode("utf-8", "surrogatepass"), zlib.crc32(image))


def sample_json(key: str, captions: Sequence[str], image: bytes) -> bytes:
    return json.dumps({"key": key, "captions": list(captions), "crc32": checksum(image, captions)}).encode("ascii")


def parse_sample(image: bytes, text: bytes) -> Sample:
    """Raises ValueError where the JSON is damaged, or does not belong to the image."""
    try:
        raw = json.loads(text)
        sample = Sample(raw["key"], tuple(raw["captions"]), image)
        if not isinstance(sample.key, str) or not isinstance(raw["captions"], list):
            raise TypeError("expected a text and a list of texts")
        stored = raw["crc32"]
        computed = checksum(image, sample.captions)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its JSON is damaged ({type(error).__name__})") from None
    if stored != computed or not sample.captions:
        raise ValueError("its contents have changed since it was packed (crc32 differs)")
    return sample


def index_text(rows: Sequence[tuple[int, int, int, int]]) -> str:
    """DALI's index of a shard; a row: offset and size of the image, then of the JSON."""
    lines = [f"jpg {a} {b} {i:06d}.jpg json {c} {d} {i:06d}.json" for i, (a, b, c, d) in enumerate(rows)]
    return "\n".join([f"{_INDEX_VERSION} {len(rows)}", *lines]) + "\n"


def parse_index(text: str, info: ShardInfo) -> np.ndarray:
    """[samples, 4] int64: offset and size of each image, then of its JSON. Raises ValueError where it does not fit."""
    header, *lines = text.splitlines()
    if header.split() != [_INDEX_VERSION, str(info.samples)] or len(lines) != info.samples:
        raise ValueError(f"expected {_INDEX_VERSION} with {info.samples} samples")
    cells = [line.split(" ") for line in lines]
    if any(len(c) != 8 or c[0] != "jpg" or c[4] != "json" for c in cells):
        raise ValueError("expected jpg and json of every sample")
    try:
        rows = np.array([(c[1], c[2], c[5], c[6]) for c in cells], dtype=np.int64).reshape(-1, 4)
    except OverflowError:
        raise ValueError("an offset lies outside the shard") from None
    ends = np.stack([rows[:, 0] + rows[:, 1], rows[:, 2] + rows[:, 3]])
    # Each number by itself too: sums of 64 bits wrap around.
    if (rows < 0).any() or (rows > info.bytes).any() or (ends > info.bytes).any() or (rows[:, 2] < ends[0]).any():
        raise ValueError("an offset lies outside the shard")
    return rows
