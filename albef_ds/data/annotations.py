"""Reads the reference's JSON of image-caption pairs, and keeps millions of them in three arrays."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


class AnnotationError(ValueError):
    """An annotation file that is missing, is no such file, or holds no usable entry."""


@dataclass(frozen=True)
class Annotation:
    """One image and its captions."""

    image: str | bytes  # path to open, or from shards the file's contents
    captions: tuple[str, ...]  # at least one, raw
    key: str  # the path as written in the annotation file, for logs


@dataclass(frozen=True, eq=False)
class Annotations(Sequence):
    """Pairs in the order of their files; made by `read_pairs`.

    The strings lie in one byte buffer: 14 million Python objects would be copied into every forked loader worker as
    soon as it counts references to them.
    """

    buffer: np.ndarray  # [bytes] uint8, the strings one after another
    string_ends: np.ndarray  # [strings + 1] int64, where each begins and ends in `buffer`
    entry_ends: np.ndarray  # [entries + 1] int64, an entry's strings: its key, then its captions
    roots: tuple[str, ...]  # of each file: the folder of its relative paths
    root_ends: np.ndarray  # [files] int64, the entries of file i end there
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (key, reason) of unusable entries

    def __len__(self) -> int:
        return self.entry_ends.size - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"annotation {i} of {len(self)}")
        i %= len(self)
        key, *captions = (self._string(s) for s in range(self.entry_ends[i], self.entry_ends[i + 1]))
        root = self.roots[int(np.searchsorted(self.root_ends, i, side="right"))]
        return Annotation(os.path.join(root, key), tuple(captions), key)

    def _string(self, s: int) -> str:
        return self.buffer[self.string_ends[s] : self.string_ends[s + 1]].tobytes().decode("utf-8", "surrogatepass")


def read_pairs(
    files: str | os.PathLike | Iterable[str | os.PathLike], image_root: str | os.PathLike | None = None
) -> Annotations:
    """Reads files of `[{"image": path, "caption": text or [texts]}, …]`: pre-training, or retrieval for evaluation.

    files: one path or several; their entries follow each other.
    image_root: what relative image paths are relative to; None: the folder of the annotation file.

    An entry without an image path or without any text is left out and listed in `.rejected`; other fields are ignored.
    Raises AnnotationError where a file is missing or is not such a list, or where no entry at all is usable.
    """
    paths = [Path(f) for f in ([files] if isinstance(files, str | os.PathLike) else files)]
    if not paths:
        raise AnnotationError("no annotation file given: expected at least one path")
    buffer = bytearray()
    string_ends, entry_ends, root_ends = array("q", [0]), array("q", [0]), array("q")
    rejected: list[tuple[str, str]] = []
    for path in paths:
        for i, entry in enumerate(load_list(path)):
            strings, fault = strings_of(entry)
            if fault:
                key = strings[0] if strings else f"{path.name}#{i}"
                rejected.append((key, f"{path}, entry {i}: {fault}"))
                continue
            for string in strings:
                # JSON may hold half a surrogate pair, which plain UTF-8 refuses.
                buffer += string.encode("utf-8", "surrogatepass")
                string_ends.append(len(buffer))
            entry_ends.append(len(string_ends) - 1)
        root_ends.append(len(entry_ends) - 1)
    if len(entry_ends) == 1:
        names = ", ".join(map(str, paths))
        reasons = "; ".join(reason for _, reason in rejected[:3]) or "the list is empty"
        raise AnnotationError(
            f'no usable entry in {names}: expected {{"image": path, "caption": text}} entries; found: {reasons}'
        )
    roots = tuple(os.path.abspath(path.parent if image_root is None else image_root) for path in paths)
    return Annotations(
        buffer=np.frombuffer(buffer, dtype=np.uint8),
        string_ends=np.frombuffer(string_ends, dtype=np.int64),
        entry_ends=np.frombuffer(entry_ends, dtype=np.int64),
        roots=roots,
        root_ends=np.frombuffer(root_ends, dtype=np.int64),
        rejected=rejected,
    )


def load_list(path: Path) -> list:
    """The list in a JSON file; AnnotationError says what is wrong with another one."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        lines = "; JSON Lines are not read, make it one list" if error.msg == "Extra data" else ""
        raise AnnotationError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}{lines}"
        ) from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond what Python reads
        raise AnnotationError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, list):
        raise AnnotationError(
            f'{path} holds {kind_of(content)} at its top level: expected a list of {{"image": …, "caption": …}}'
        )
    return content


def strings_of(entry) -> tuple[list[str], str]:
    """(key and captions, "") of an entry, or (key if it has one, what is wrong with it)."""
    if not isinstance(entry, dict):
        return [], f"expected an object, found {kind_of(entry)}"
    image = entry.get("image")
    if not isinstance(image, str) or not image:
        return [], '"image" is missing' if image is None else f'"image" is {kind_of(image)}: expected a path'
    caption = entry.get("caption")
    captions = caption if isinstance(caption, list) else [caption]
    usable = [c for c in captions if isinstance(c, str) and c.strip()]
    if usable:
        return [image, *usable], ""
    if caption is None:
        return [image], '"caption" is missing'
    return [image], f'"caption" is {kind_of(caption)} without any text'


def kind_of(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
