"""What a complete checkpoint says of itself: its manifest, which is read as if a stranger had written it.

manifest.json is the last file of a checkpoint to be written; a folder without one is no checkpoint. It names every file
with its size and sha256, so that damage is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from albef_ds.data.files import open_ordinary

MANIFEST = "manifest.json"
SCHEMA = 2
READABLE = (1, 2)  # 1 had neither the configuration nor its hash

_MAX_MANIFEST_BYTES = 64 << 20  # a file of 100,000 ranks' entries has some 20 MB
_MAX_DEPTH = 32
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message names the folder and the file."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class FileEntry(_Part):
    """One file as it was written."""

    size: int = Field(ge=0, lt=1 << 50)  # bytes
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Part):
    """Everything that is known of a checkpoint without opening its tensors."""

    schema_: Annotated[int, Field(alias="schema")]
    step: int = Field(ge=0, lt=1 << 50)  # optimiser steps done
    world_size: int = Field(ge=1, le=1 << 20)  # ranks that wrote it
    identity: dict[str, Any]  # what a run that resumes from it must share
    versions: dict[str, str]
    files: dict[str, FileEntry] = Field(max_length=1 << 20)
    config: dict[str, Any] | None = None  # the whole resolved recipe
    config_sha256: str | None = None

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> str:
        return json.dumps(self.model_dump(by_alias=True), indent=1)


def config_hash(config: Mapping) -> str:
    """sha256 of a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Raises CheckpointError where there is none, or none that this version understands."""
    path = Path(folder) / MANIFEST
    try:
        with open(path, "rb", opener=open_ordinary) as file:
            text = file.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no complete checkpoint ({MANIFEST} is missing)") from None
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable: {error.strerror or error}") from None
    return parse_manifest(text, path)


def parse_manifest(text: bytes, source: str | Path) -> Manifest:
    """Bytes from anywhere to a checked manifest; raises CheckpointError naming `source` and what is wrong."""
    if len(text) > _MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{source}: larger than {_MAX_MANIFEST_BYTES:,} bytes: not a manifest")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, numbers of too many digits
        raise CheckpointError(f"{source}: unreadable: {str(error)[:200]}") from None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if type(schema) is int and schema > SCHEMA:
        raise CheckpointError(
            f"{source}: written by a newer version of albef_ds (schema {schema}, this version knows up to {SCHEMA}): "
            "install that version"
        )
    if type(schema) is not int or schema not in READABLE:
        raise CheckpointError(f"{source}: not a manifest of schema {SCHEMA}")
    if _deeper_than(raw, _MAX_DEPTH):
        raise CheckpointError(f"{source}: nested more than {_MAX_DEPTH} deep: not a manifest")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        raise CheckpointError(f"{source}: {where}: {first['msg']}") from None
    for name in manifest.files:
        if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST:
            raise CheckpointError(f"{source}: names a file {name[:200]!r}; expected plain names within its folder")
    if manifest.config is not None and manifest.config_sha256 != config_hash(manifest.config):
        raise CheckpointError(f"{source}: its configuration has changed (config_sha256 differs)")
    return manifest


def verify(folder: str | Path) -> Manifest:
    """Checks size and sha256 of every file; returns the manifest, raises CheckpointError naming the first bad file."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = Path(folder) / name
        check_size(path, expected)
        try:
            found = sha256_of(path)
        except OSError as error:
            raise CheckpointError(f"{path}: unreadable: {error.strerror or error}") from None
        if found != expected.sha256:
            raise CheckpointError(f"{path}: contents have changed (sha256 is {found}, expected {expected.sha256})")
    return manifest


def check_size(path: Path, expected: FileEntry) -> None:
    """Raises CheckpointError unless `path` is an ordinary file (no link) of the expected size."""
    try:
        found = path.lstat()
    except OSError:
        raise CheckpointError(f"{path}: missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not an ordinary file; links are not followed: put the file itself there")
    if found.st_size != expected.size:
        raise CheckpointError(f"{path}: {found.st_size} bytes instead of {expected.size}")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(4 << 20):
            digest.update(block)
    return digest.hexdigest()


def differences(theirs: Any, ours: Any, prefix: str = "") -> list[str]:
    """Where two nested mappings differ, as "key.sub was …, is …"."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [d for k in keys for d in differences(theirs.get(k), ours.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if theirs == ours else [f"{prefix} was {theirs!r}, is {ours!r}"]


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return True
