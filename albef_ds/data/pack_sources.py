"""Lists of image files and captions in the forms they come in, read entry by entry: nothing is held in memory.

FILE.json      the reference's list of {"image": path, "caption": text or [texts]}
FILE.jsonl     one such object a line
FILE.tsv       path and caption, with or without a header line
FILE.parquet   a column of paths and one of captions (text or list of texts)
FOLDER         every image file with a text file of the same name: one caption a line
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from albef_ds.data.annotations import AnnotationError, strings_of

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif"))
_CHUNK = 1 << 20
_LONGEST_ENTRY = 64 << 20  # characters; a list whose entry does not end before is no such list


@dataclass(frozen=True)
class Entry:
    """One image to pack. `fault` says why it cannot be; it then has no captions."""

    key: str  # the path as written
    image: str  # the path to open
    captions: tuple[str, ...]
    source: str  # "FILE, entry 12", for messages
    fault: str = ""


class _Fault(str):
    """What is wrong with an entry; a plain string is an entry that holds nothing but a string."""


def read_entries(
    source: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    columns: tuple[str, str] = ("image", "caption"),
) -> Iterator[Entry]:
    """The entries of one file or folder, in its order, unusable ones with their `fault`.

    image_root: what relative paths are relative to; None: the folder of the list.
    columns: names of the path's and the caption's column in TSV and Parquet.
    Raises AnnotationError where the source as a whole cannot be read.
    """
    path = Path(source)
    root = os.path.abspath(image_root if image_root is not None else path if path.is_dir() else path.parent)
    readers = {".json": _json_list, ".jsonl": _json_lines, ".tsv": _tsv, ".parquet": _parquet}
    if path.is_dir():
        rows = _folder(path)
    elif path.suffix.lower() in readers:
        rows = readers[path.suffix.lower()](path, columns)
    else:
        raise AnnotationError(f"{path}: expected a folder or a file ending in {', '.join(readers)}")
    try:
        for i, row in enumerate(rows):
            yield _entry(row, root, f"{path}, entry {i}", f"{path.name}#{i}")
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read: {error.strerror or error}; check the path") from error


def _entry(row, root: str, source: str, fallback: str) -> Entry:
    if isinstance(row, _Fault):
        return Entry(fallback, "", (), source, row)
    strings, fault = strings_of(row)
    if not strings:
        return Entry(fallback, "", (), source, fault)
    key, *captions = strings
    if not fault and "\x00" in key:
        fault = "the path holds a NUL character"
    if not fault and key.startswith(("http://", "https://", "s3://", "gs://")):
        fault = "the image is a URL: download it first (e.g. with img2dataset) and list the files"
    return Entry(key, os.path.join(root, key), () if fault else tuple(captions), source, fault)


def _json_list(path: Path, columns) -> Iterator[dict]:
    """The elements of a top-level JSON list, decoded one at a time."""
    with open(path, encoding="utf-8-sig") as file:
        stream = _JsonStream(path, file)
        first = stream.take()
        if first != "[":
            lines = "; JSON Lines end in .jsonl" if first == "{" else ""
            raise AnnotationError(f'{path} holds no list: expected [{{"image": …, "caption": …}}, …]{lines}')
        if stream.peek() == "]":
            return
        while True:
            yield stream.value()
            mark = stream.take()
            if mark == "]":
                return
            if mark != ",":
                raise AnnotationError(
                    f"{path} is not valid JSON: expected , or ] between entries and found {mark!r}"
                    if mark
                    else f"{path} is not valid JSON: it ends within the list; was it cut short?"
                )


class _JsonStream:
    """JSON text of any length, a chunk of it in memory."""

    def __init__(self, path: Path, file):
        self._path, self._file = path, file
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self) -> str:
        found = self.peek()
        self._at += 1
        return found

    def value(self):
        self.peek()
        while True:
            problem = "it ends within the list; was it cut short?"
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text):  # a number at the very end may go on in the next chunk
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                problem = error.msg  # or the entry goes on in the next chunk
            except RecursionError:
                raise AnnotationError(f"{self._path} is not valid JSON: nested too deeply") from None
            if len(self._text) - self._at > _LONGEST_ENTRY or not self._more():
                raise AnnotationError(f"{self._path} is not valid JSON: {problem}")

    def _more(self) -> bool:
        try:
            read = self._file.read(_CHUNK)
        except UnicodeDecodeError as error:
            raise AnnotationError(f"{self._path} is not UTF-8 text: {error.reason}") from error
        self._text, self._at = self._text[self._at :] + read, 0
        return bool(read)


def _json_lines(path: Path, columns) -> Iterator[dict | _Fault]:
    for text in _lines(path):
        if isinstance(text, UnicodeDecodeError):
            yield _Fault(f"not UTF-8 text: {text.reason}")
        elif text.strip():
            try:
                yield json.loads(text)
            except (ValueError, RecursionError) as error:
                yield _Fault(f"not valid JSON: {error}")


def _tsv(path: Path, columns: tuple[str, str]) -> Iterator[dict | _Fault]:
    at = None
    for text in _lines(path):
        if isinstance(text, UnicodeDecodeError):
            yield _Fault(f"not UTF-8 text: {text.reason}")
            continue
        cells = text.rstrip("\r\n").split("\t")
        if at is None:
            has_header = set(columns) <= set(cells)
            at = (cells.index(columns[0]), cells.index(columns[1])) if has_header else (0, 1)
            if has_header:
                continue
        if len(cells) <= max(at):
            yield _Fault(f"{len(cells)} columns: expected a path and a caption with a tab between")
        else:
            yield {"image": cells[at[0]], "caption": cells[at[1]]}


def _lines(path: Path) -> Iterator[str | UnicodeDecodeError]:
    with open(path, "rb") as file:
        for line in file:
            try:
                yield line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
            except UnicodeDecodeError as error:
                yield error


def _parquet(path: Path, columns: tuple[str, str]) -> Iterator[dict]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise AnnotationError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise AnnotationError(
                    f"{path} has no column {' or '.join(missing)}, it has {', '.join(file.schema_arrow.names)}; "
                    "name them with --columns PATH,CAPTION"
                )
            for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
                for row in batch.to_pylist():
                    yield {"image": row[columns[0]], "caption": row[columns[1]]}
    except arrow.ArrowException as error:
        raise AnnotationError(f"{path} is not a sound Parquet file: {error}") from error


def _folder(folder: Path) -> Iterator[dict | _Fault]:
    """Image files below `folder`, in the order of their names, with the lines of the .txt file beside each."""
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in IMAGE_SUFFIXES:
                continue
            image = os.path.relpath(os.path.join(where, name), folder)
            try:
                text = Path(where, stem + ".txt").read_text(encoding="utf-8-sig")
                yield {"image": image, "caption": text.splitlines()}
            except FileNotFoundError:
                yield _Fault(f"{image}: no file {stem}.txt with captions beside it")
            except UnicodeDecodeError as error:
                yield _Fault(f"{image}: {stem}.txt is not UTF-8 text: {error.reason}")
