"""Where fuzzing starts: valid files of every form, made here and now, and the classic attacks on each.

`seeds(target)` gives (number of the reader, input) pairs; the first byte of an input is that number.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

import albef_ds
from albef_ds.data.shard_format import Manifest, ShardInfo, index_text, sample_json
from albef_ds.data.shard_writer import HashedTar
from albef_ds.training.checkpoint_manifest import config_hash
from tests.fuzz.targets import SEPARATOR

HOME = Path(albef_ds.__file__).parent


class Bomb:
    """Runs a command where it is unpickled by a reader that trusts pickles."""

    def __reduce__(self):
        return (os.system, ("true",))


def seeds(target: str) -> list[bytes]:
    made = {
        "annotations": _annotations,
        "shards": _shards,
        "checkpoints": _checkpoints,
        "configuration": _configuration,
    }
    return [bytes([number]) + content for number, content in made[target]()]


def words(target: str) -> list[bytes]:
    """What the readers look for: names and marks that mutation alone would hardly come upon."""
    found = {word for seed in seeds(target) for word in re.findall(rb"[A-Za-z_.0-9]{3,24}", seed)}
    marks = (SEPARATOR, b"\xed\xa0\x80", b"\xff", b"NaN", b"Infinity", b"1e999", b"-1", b"9" * 20, b"../", b"[[[[")
    yaml_marks = (
        b"!!python/object/apply:os.system",
        b"&a ",
        b"*a",
        b"<<: ",
        b"2001-99-99",
        b"1:60",
        b"? ",
        b"!!binary",
    )
    return sorted(found)[:400] + [*marks, *yaml_marks]


def _json(value) -> bytes:
    return json.dumps(value).encode()


def image_bytes(form: str = "JPEG", side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(buffer, form)
    return buffer.getvalue()


def _annotations() -> list[tuple[int, bytes]]:
    pair = {"image": "a/b.jpg", "caption": ["a red dog", "ein Hund é"]}
    question = {"image": "a.jpg", "dataset": "vqa", "question": "how many?", "question_id": 7}
    box = {"image": "a.jpg", "text": "left man", "ref_id": 3, "box": [1, 2, 3.5, 4], "width": 9, "height": 8}
    refs = [
        {"ref_id": 1, "ann_id": 5, "image_id": 7, "split": "val", "sentences": [{"sent": "left man"}]},
        {"ref_id": 2, "ann_id": 5, "image_id": 7, "split": "train", "sentences": [{"sent": "dog"}, {"sent": " "}]},
    ]
    instances = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [{"id": 5, "bbox": [1, 2, 3.5, 4]}],
    }
    found = {"7": [[1, 2, 3, 4, 0.9], [5, 6, 7, 8, 0.5]]}
    plain = [
        [pair, {"image": "c.png", "caption": "one"}],
        [{"image": "a.jpg", "caption": "a dog", "image_id": "x1"}, {"image": "a.jpg", "caption": "b", "image_id": 2}],
        [{"image": "a/b.jpg", "text": "left man"}],
        [{**question, "answer": ["2", "two", "2"]}, {**question, "dataset": "vg", "answer": "red"}],
        [question],
        [{"image": "123", "sentence": "a dog runs", "label": "neutral"}],
        [{"images": ["a.png", "b.png"], "sentence": "both", "label": "True"}],
        [{**box, "split": "testA", "proposals": [[0, 0, 1, 1], [2, 2, 3, 3]]}, box],
    ]
    made = [(number, _json(entries)) for number, entries in enumerate(plain)]
    for protocol in (0, 2, 4):
        made.append((8, SEPARATOR.join((pickle.dumps(refs, protocol), _json(instances), _json(found)))))
        made.append((8, SEPARATOR.join((pickle.dumps([Bomb()], protocol), _json(instances), b""))))
    made.append((8, SEPARATOR.join((b"(lp0\n(dp1\nS'sent'\nS'caf\\xe9'\nsa.", _json(instances), b""))))
    lines = b"\n".join(map(_json, ([pair, {"image": "s3://x", "caption": "y"}])))
    return [*made, (9, _json([pair])), (10, lines), (11, b"image\tcaption\na.jpg\ta dog\n"), (11, b"a.jpg\tb\n")]


def _shards() -> list[tuple[int, bytes]]:
    tar_file, rows = io.BytesIO(), []
    tar = HashedTar(_Synced(tar_file))
    for number in range(2):
        image, captions = image_bytes(), [f"caption {number}", "é"]
        text = sample_json(f"{number}.jpg", captions, image)
        start = tar.add(f"{number:06d}.jpg", image)
        rows.append((start, len(image), tar.add(f"{number:06d}.json", text), len(text)))
    tar.close()
    index = index_text(rows).encode()
    info = ShardInfo("shard-000000", 2, tar.size, tar.sha256, hashlib.sha256(index).hexdigest())
    manifest = Manifest(2, 1, tar.size, (info,), {"quality": 90}, ("a.json",)).to_json().encode()
    folder = SEPARATOR.join((manifest, index, tar_file.getvalue()))
    sample = sample_json("a.jpg", ["a dog"], image) + SEPARATOR + image
    pictures = [(4, image_bytes(form)) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    return [(0, manifest), (1, folder), (2, folder), (3, sample), *pictures]


class _Synced:
    """A file in memory; HashedTar asks for its descriptor to wait for the disk."""

    def __init__(self, buffer: io.BytesIO):
        self.write, self.flush = buffer.write, buffer.flush
        self.fileno = lambda: _Synced.nowhere.fileno()

    nowhere = open(__file__, "rb")  # noqa: SIM115


def _checkpoints() -> list[tuple[int, bytes]]:
    state = {"module": {"a": torch.arange(6.0), "b": torch.ones(2, 2).half()}, "step": 3, "names": ["x", ("y", None)]}
    config = {"train": {"seed": 1}}
    entry = {"size": 1, "sha256": "0" * 64}
    manifest = _json(
        {
            **{
                "schema": 2,
                "step": 7,
                "world_size": 2,
                "identity": {"task": "pretraining"},
                "versions": {"torch": "2"},
            },
            **{"files": {"a.pt": entry}, "config": config, "config_sha256": config_hash(config)},
        }
    )
    new, old = _saved(state), _saved(state, _use_new_zipfile_serialization=False)
    tensors = safetensors_bytes({"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)})
    return [
        (0, manifest),
        (1, manifest + SEPARATOR + new),
        (2, new),
        (3, new),
        (3, old),
        (3, _saved(state["module"])),
        (3, pickle.dumps(Bomb())),
        (3, _saved({"x": Bomb()}, _use_new_zipfile_serialization=False)),
        (4, tensors),
        (5, _insides(new)),
        (5, _insides(_saved({"model": {"a": torch.arange(3.0)}, "x": Bomb()}))),
    ]


def _insides(saved: bytes) -> bytes:
    """The pickle and the storages of PyTorch's archive."""
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        content = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    return SEPARATOR.join((content["data.pkl"], *(content[f"data/{i}"] for i in range(9) if f"data/{i}" in content)))


def _saved(state, **how) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **how)
    return buffer.getvalue()


LAUGHS = b"a: &a [x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n" % (c, c, *[c - 1] * 8) for c in range(ord("b"), ord("k"))
)


def _configuration() -> list[tuple[int, bytes]]:
    recipes = [(0, path.read_bytes()) for path in sorted((HOME / "configs").glob("*.yaml"))]
    machines = HOME.parent / "ds_configs"
    deepspeed = [(2, path.read_bytes()) for path in sorted(machines.glob("*.json"))]
    overrides = [
        b"optimizer.lr=1e-4\ntrain.max_steps=null",
        b"data.train=[a.json, b.json]\ndata.image_roots={vqa: x}\ndata.weights=[1.0]",
        b"model.vision.layers=3\nmodel.options.mixgen=0.25\ncheckpoint.on_error=stop",
    ]
    attacks = [
        b"task: !!python/object/apply:os.system ['true']\n",
        b"task: !!python/name:os.system\n",
        LAUGHS + b"data: {train: *j}\n",
        b"a: &a {x: 1}\nb: &b {<<: [*a, *a, *a]}\nmodel: {<<: [*b, *b, *b]}\n",
        b"data: &d {train: [a.json], image_roots: *d}\n",
    ]
    return [
        *recipes,
        (0, b"task: pretraining\n" + SEPARATOR + b"optimizer.lr=1\n"),
        *((0, attack) for attack in attacks),
        *((1, text) for text in overrides),
        (1, b"task=!!python/object/apply:os.system ['true']"),
        *deepspeed,
    ]
