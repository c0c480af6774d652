"""The readers under test: a target takes bytes, writes them as files, reads those, and expects the project's errors.

The first byte says which reader of the target gets the rest; SEPARATOR stands between the files of one input. "Sealed"
readers first put right what a stranger can put right too: sizes and checksums.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml

from albef_ds.config import Config, ConfigError, load_config
from albef_ds.data import pack_sources, task_entries
from albef_ds.data.annotations import AnnotationError, read_pairs
from albef_ds.data.images import ImageError, decode_image
from albef_ds.data.refcoco import convert_refcoco
from albef_ds.data.shard_check import check, contact_sheet
from albef_ds.data.shard_folder import LocalFolder
from albef_ds.data.shard_format import Manifest, ShardError, checksum, parse_sample
from albef_ds.data.shards import ShardSet
from albef_ds.model.weight_files import WeightsError, read_state_dict
from albef_ds.training.checkpoint_files import read_tensors
from albef_ds.training.checkpoint_manifest import CheckpointError, parse_manifest, verify
from albef_ds.training.ds_config import DeepSpeedConfigError, load_deepspeed_config
from tests.fuzz.guard import guarded

SEPARATOR = b"\n<next file>\n"
MAX_PIXELS = 4_000_000  # decoding what is allowed takes time and memory too

Reader = Callable[[bytes, Path], None]


def files(data: bytes, folder: Path, *names: str) -> list[Path]:
    """Writes the parts of an input under these names; those that are missing are empty."""
    parts = [*data.split(SEPARATOR), *[b""] * len(names)]
    paths = [folder / name for name in names]
    for path, part in zip(paths, parts, strict=False):
        path.write_bytes(part)
    return paths


# -- annotations -------------------------------------------------------------------------------------------------------


def _pairs(data: bytes, folder: Path) -> None:
    for pair in read_pairs(files(data, folder, "pairs.json")):
        assert pair.captions and all(caption.strip() for caption in pair.captions)


def _entries(parse, data: bytes, folder: Path) -> None:
    for entry in task_entries.read_entries(files(data, folder, "entries.json"), parse(), {}):
        assert isinstance(entry.text, str) and all(isinstance(image, str) for image in entry.images)


def _refcoco(data: bytes, folder: Path) -> None:
    _, _, found = files(data, folder, "refs(unc).p", "instances.json", "found.json")
    convert_refcoco(folder, folder / "out", detections=found if found.stat().st_size else None)


def _list_to_pack(suffix: str, data: bytes, folder: Path) -> None:
    for entry in pack_sources.read_entries(*files(data, folder, f"list{suffix}")):
        assert bool(entry.fault) != bool(entry.captions)


ANNOTATIONS: tuple[Reader, ...] = (
    _pairs,
    functools.partial(_entries, task_entries.captions_by_id),
    functools.partial(_entries, task_entries.phrases),
    functools.partial(_entries, task_entries.questions),
    functools.partial(_entries, functools.partial(task_entries.questions, answered=False)),
    functools.partial(_entries, task_entries.hypotheses),
    functools.partial(_entries, functools.partial(task_entries.statements, labelled=False)),
    functools.partial(_entries, task_entries.referring),
    _refcoco,
    functools.partial(_list_to_pack, ".json"),
    functools.partial(_list_to_pack, ".jsonl"),
    functools.partial(_list_to_pack, ".tsv"),
)

# -- shards ------------------------------------------------------------------------------------------------------------


def _manifest_of_shards(data: bytes, folder: Path) -> None:
    assert Manifest.from_json(data, "manifest").samples >= 0


def _shards(sealed: bool, data: bytes, folder: Path) -> None:
    manifest, index, tar = files(data, folder, "manifest.json", "shard-000000.idx", "shard-000000.tar")
    if sealed:
        facts = {"bytes": tar.stat().st_size, "sha256": _sha256(tar), "index_sha256": _sha256(index)}
        _put_right(manifest, lambda raw: raw["shards"][0].update(facts))
    for how in ("skip", "fatal"):
        with suppress(ShardError):
            shards = ShardSet([LocalFolder(str(folder))], on_bad_shard=how)
            for i in {*range(min(8, len(shards))), len(shards) - 1}:
                with suppress(ImageError):
                    sample = shards[i]
                    decode_image(sample.image, MAX_PIXELS, key=sample.key)
    with suppress(ShardError):
        _, faults = check(folder, decode=True)
        assert all(isinstance(fault, str) for fault in faults)
    contact_sheet(folder, folder / "sheet.html", count=4)


def _sample(data: bytes, folder: Path) -> None:
    text, _, image = data.partition(SEPARATOR)
    with suppress(ValueError, TypeError, KeyError, RecursionError, UnicodeError):
        raw = json.loads(text)
        raw["crc32"] = checksum(image, raw["captions"])
        text = json.dumps(raw).encode()
    try:
        sample = parse_sample(image, text)
    except ValueError:
        return
    assert isinstance(sample.key, str) and sample.captions and all(isinstance(c, str) for c in sample.captions)


def _image(data: bytes, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow remarks on damaged TIFF
        assert decode_image(data, MAX_PIXELS).mode == "RGB"


SHARDS: tuple[Reader, ...] = (
    _manifest_of_shards,
    functools.partial(_shards, False),
    functools.partial(_shards, True),
    _sample,
    _image,
)

# -- checkpoints -------------------------------------------------------------------------------------------------------


def _manifest_of_checkpoint(data: bytes, folder: Path) -> None:
    manifest = parse_manifest(data, "manifest")
    assert parse_manifest(manifest.to_json().encode(), "again").to_json() == manifest.to_json()  # NaN equals nothing


def _checkpoint(data: bytes, folder: Path) -> None:
    manifest, state = files(data, folder, "manifest.json", "a.pt")
    facts = {"a.pt": {"size": state.stat().st_size, "sha256": _sha256(state)}}
    _put_right(manifest, lambda raw: raw["files"].update(facts))
    if "a.pt" in verify(folder).files:
        _count(read_tensors(state))


def _tensors(data: bytes, folder: Path) -> None:
    _count(read_tensors(*files(data, folder, "a.pt")))


def _weights(name: str, data: bytes, folder: Path) -> None:
    _count(read_state_dict(*files(data, folder, name)))


def _archive(data: bytes, folder: Path) -> None:
    """A sound archive around any pickle: otherwise its checksums would turn nearly every change away."""
    pickled, *storages = data.split(SEPARATOR)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", b"little")
        for number, content in enumerate(storages):
            archive.writestr(f"a/data/{number}", content)
        archive.writestr("a/version", b"3\n")
    (path,) = files(b"", folder, "a.pth")
    path.write_bytes(buffer.getvalue())
    with suppress(CheckpointError):
        _count(read_tensors(path))
    _count(read_state_dict(path))


def _count(value, depth: int = 0) -> int:
    """Elements of the tensors in it."""
    if depth > 50:
        return 0
    if hasattr(value, "numel"):
        return value.numel()
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(_count(child, depth + 1) for child in list(children)[:100])


CHECKPOINTS: tuple[Reader, ...] = (
    _manifest_of_checkpoint,
    _checkpoint,
    _tensors,
    functools.partial(_weights, "a.pth"),
    functools.partial(_weights, "a.safetensors"),
    _archive,
)

# -- configuration -----------------------------------------------------------------------------------------------------


def _recipe(data: bytes, folder: Path) -> None:
    recipe, overrides = files(data, folder, "recipe.yaml", "overrides")
    _check_written(load_config(recipe, overrides.read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]))


def _overrides(data: bytes, folder: Path) -> None:
    _check_written(load_config("demo", data.decode("utf-8", "surrogateescape").split("\n")))


def _check_written(config: Config) -> None:
    """What a run writes of its configuration is what it had."""
    try:
        written = config.to_yaml()
    except UnicodeError:  # half a surrogate pair
        return
    again = Config.model_validate(yaml.safe_load(written))
    assert again == config or "nan" in written


def _deepspeed(data: bytes, folder: Path) -> None:
    assert isinstance(load_deepspeed_config(*files(data, folder, "deepspeed.json")), dict)


CONFIGURATION: tuple[Reader, ...] = (_recipe, _overrides, _deepspeed)

# ----------------------------------------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[tuple[Reader, ...], tuple[type[Exception], ...]]] = {
    "annotations": (ANNOTATIONS, (AnnotationError,)),
    "shards": (SHARDS, (ShardError, ImageError)),
    "checkpoints": (CHECKPOINTS, (CheckpointError, WeightsError)),
    "configuration": (CONFIGURATION, (ConfigError, DeepSpeedConfigError)),
}


def run(target: str, data: bytes, folder: Path) -> bool:
    """Reads one input; whether it was accepted. Raises whatever is no error of that reader's own, and Misdeed.

    folder: empty, this call's own.
    """
    readers, own_errors = TARGETS[target]
    reader = readers[data[0] % len(readers)] if data else readers[0]
    try:
        with guarded(folder):
            try:
                reader(data[1:], folder)
                return True
            except own_errors as error:
                assert str(error).strip(), "an error that says nothing"
                return False
    finally:
        _empty(folder)


def _empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def _put_right(manifest: Path, change: Callable[[dict], None]) -> None:
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raw = json.loads(manifest.read_bytes())
        change(raw)
        manifest.write_text(json.dumps(raw))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
