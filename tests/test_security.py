"""Files made to do harm, in every place where a stranger's file is read or a stranger's text is shown.

More of them, made at random, in tests/fuzz; weights and checkpoints that would run code in
tests/training/test_checkpoint_files.py, tests/training/test_resume.py and tests/model/test_reference_weights.py.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from albef_ds.config import ConfigError, load_config
from albef_ds.data.annotations import AnnotationError
from albef_ds.data.images import ImageError, decode_image
from albef_ds.data.pack_sources import read_entries
from albef_ds.data.packing import PackSettings, pack
from albef_ds.data.refcoco import read_refcoco
from albef_ds.data.shard_check import check, contact_sheet
from albef_ds.data.shard_folder import LocalFolder
from albef_ds.data.shard_format import MANIFEST, ShardError, index_text, sample_json
from albef_ds.data.shards import ShardSet
from albef_ds.model.weight_files import WeightsError, read_state_dict
from albef_ds.training.ds_config import DeepSpeedConfigError, load_deepspeed_config
from albef_ds.training.monitor import Monitor
from tests.data.damaged import encoded, photo
from tests.fuzz.guard import guarded
from tests.fuzz.seeds import LAUGHS
from tests.fuzz.targets import run
from tests.ranks import run_ranks

# -- images that unpack to gigabytes -----------------------------------------------------------------------------------


def png(width: int, height: int, *others: tuple[bytes, bytes]) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *others, (b"IDAT", zlib.compress(b""))]
    parts = (
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in (*chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def patched(form: str, old: bytes, new: bytes) -> bytes:
    data = encoded(Image.new("RGB", (37, 41)), form)
    assert old in data
    return data.replace(old, new)


SIDE = 60_000
HUGE = {
    "PNG": png(SIDE, SIDE),
    "JPEG": patched("JPEG", struct.pack(">HH", 41, 37), struct.pack(">HH", SIDE, SIDE)),
    "GIF": patched("GIF", struct.pack("<HH", 37, 41), struct.pack("<HH", SIDE, SIDE)),
    "BMP": patched("BMP", struct.pack("<II", 37, 41), struct.pack("<II", SIDE, SIDE)),
    "PPM": b"P6\n60000 60000\n255\n" + bytes(100),
    "TIFF": patched("TIFF", struct.pack("<I", 37), struct.pack("<I", 1 << 30)),
    "JPEG 2000": patched("JPEG2000", struct.pack(">II", 41, 37), struct.pack(">II", SIDE, SIDE)),
    "WebP": patched("WEBP", struct.pack("<HH", 37, 41), struct.pack("<HH", 0x3FFF, 0x3FFF)),
}


@pytest.mark.parametrize("form", HUGE)
def test_an_image_that_claims_billions_of_pixels_is_refused_before_it_takes_memory(tmp_path, form):
    with guarded(tmp_path), pytest.raises(ImageError, match="pixels|dimensions|size"):
        decode_image(HUGE[form], key="bomb")


@functools.cache
def packed_zeros() -> bytes:
    return zlib.compress(bytes(1 << 30), 9)


@pytest.mark.parametrize("name, data", [(b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")])
def test_what_is_packed_beside_the_pixels_is_not_unpacked_without_end(tmp_path, name, data):
    bomb = png(8, 8, (name, data + packed_zeros()))
    assert len(bomb) < 2 << 20
    with guarded(tmp_path), pytest.raises(ImageError):
        decode_image(bomb, key="bomb")


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero")])
def test_an_image_that_is_a_pipe_or_a_device_is_not_waited_for(tmp_path, make):
    make(tmp_path / "a.jpg")
    with guarded(tmp_path), pytest.raises(ImageError, match="not an ordinary file"):
        decode_image(tmp_path / "a.jpg")


def test_grey_of_16_bits_takes_few_bytes_a_pixel(tmp_path):
    grey = Image.new("I;16", (7000, 7000), 40_000)  # 98 MB
    data = encoded(grey, "PNG")
    with guarded(tmp_path):
        assert decode_image(data).getpixel((5, 5)) == (40_000 >> 8,) * 3


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        photo(seed=number).save(source / f"{number}.jpg")
        (source / f"{number}.txt").write_text(f"picture {number}")
    pack([source], tmp_path / "shards", PackSettings())
    return tmp_path / "shards"


def seal(folder: Path, rows: list[tuple[int, int, int, int]]) -> None:
    """What whoever makes a malicious shard would do too: an index, and a manifest with its checksums."""
    from tests.fuzz.targets import _sha256

    tar, index = folder / "shard-000000.tar", folder / "shard-000000.idx"
    index.write_text(index_text(rows))
    raw = json.loads((folder / MANIFEST).read_text())
    raw["shards"][0].update(
        samples=len(rows), bytes=tar.stat().st_size, sha256=_sha256(tar), index_sha256=_sha256(index)
    )
    raw["samples"] = len(rows)
    (folder / MANIFEST).write_text(json.dumps(raw))


def test_a_tar_whose_members_lead_elsewhere_is_read_as_bytes_and_nothing_is_unpacked(packed, tmp_path):
    image, rows = encoded(photo()), []
    text = sample_json("../../escaped.jpg", ["a"], image)
    members = [
        *(("../../escaped", tarfile.REGTYPE, ""), ("/escaped", tarfile.REGTYPE, "")),
        *(("link", tarfile.SYMTYPE, "/etc/passwd"), ("hard", tarfile.LNKTYPE, "/etc/passwd")),
        *(("device", tarfile.CHRTYPE, ""), ("pipe", tarfile.FIFOTYPE, ""), ("folder/", tarfile.DIRTYPE, "")),
    ]
    with tarfile.open(packed / "shard-000000.tar", "w") as tar:
        for name, kind, target in members:
            starts = []
            for content, suffix in ((image, ".jpg"), (text, ".json")):
                member = tarfile.TarInfo(name + suffix)
                member.type, member.linkname, member.size = kind, target, len(content)
                tar.fileobj.write(member.tobuf())
                starts.append(tar.fileobj.tell())
                tar.fileobj.write(content + bytes(-len(content) % 512))
            rows.append((starts[0], len(image), starts[1], len(text)))
    seal(packed, rows)
    before = sorted(tmp_path.rglob("*"))
    with guarded(packed):
        samples = list(ShardSet([LocalFolder(str(packed))]))
        assert check(packed, decode=True)[1] == []
        contact_sheet(packed, packed / "sheet.html")
    assert [s.key for s in samples] == ["../../escaped.jpg"] * len(members)
    assert {s.image for s in samples} == {image}
    assert sorted(tmp_path.rglob("*")) == sorted([*before, packed / "sheet.html"])


@pytest.mark.parametrize("name", [MANIFEST, "shard-000000.idx", "shard-000000.tar"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), Path.mkdir])
def test_a_file_of_a_shard_folder_that_is_a_pipe_a_device_or_a_folder_is_not_waited_for(packed, name, make):
    (packed / name).unlink()
    make(packed / name)
    for how in ("fatal", "skip"):
        with guarded(packed), pytest.raises((ShardError, ImageError), match="not an ordinary file|directory"):
            ShardSet([LocalFolder(str(packed))], on_bad_shard=how)[0]
    if name != MANIFEST:
        with guarded(packed):
            assert "not an ordinary file" in " ".join(check(packed)[1])


def test_links_out_of_a_shard_folder_show_nothing_of_where_they_lead(packed, tmp_path):
    """Links themselves are allowed: large files often lie on another disk."""
    secret = tmp_path / "secret"
    secret.write_text("v1.2 secret words\n" * 2000)
    for name in (MANIFEST, "shard-000000.idx", "shard-000000.tar"):
        kept = (packed / name).read_bytes()
        (packed / name).unlink()
        (packed / name).symlink_to(secret)
        said = []
        for read in (
            lambda: list(ShardSet([LocalFolder(str(packed))], "skip")[0:1]),
            lambda: check(packed, decode=True),
        ):
            try:
                said.append(repr(read()))
            except (ShardError, ImageError, AttributeError, TypeError) as error:
                said.append(str(error))
        assert said and not any("secret words" in text for text in said)
        (packed / name).unlink()
        (packed / name).write_bytes(kept)


@pytest.mark.parametrize(
    "rows",
    [
        [(1 << 62, 1 << 62, 1 << 62, 1 << 62)],  # sums of 64 bits wrap around
        [(0, 10**30, 0, 1)],
        [(512, 1 << 45, 1 << 46, 10)],
    ],
)
@pytest.mark.parametrize("claimed", [None, (1 << 50) - 1])
def test_an_index_cannot_ask_for_memory_that_the_shard_has_not(packed, rows, claimed):
    seal(packed, rows)
    if claimed:  # with on_bad_shard=skip nobody compares it with the file
        raw = json.loads((packed / MANIFEST).read_text())
        raw["shards"][0]["bytes"] = claimed
        (packed / MANIFEST).write_text(json.dumps(raw))
    with guarded(packed), pytest.raises((ImageError), match="outside the shard|cut short"):
        ShardSet([LocalFolder(str(packed))], on_bad_shard="skip")[0]


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 10**30},
        {"samples": 1 << 49},
        {"bytes": 1 << 60},
        {"bytes": True},
        {"sha256": 7},
        {"name": "../shard-000000"},
    ],
)
def test_a_manifest_cannot_claim_what_is_beyond_all_measure(packed, change):
    raw = json.loads((packed / MANIFEST).read_text())
    raw["shards"][0].update(change)
    raw["samples"] = raw["shards"][0]["samples"]
    (packed / MANIFEST).write_text(json.dumps(raw))
    with guarded(packed), pytest.raises(ShardError, match="not a manifest of packed shards"):
        ShardSet([LocalFolder(str(packed))], on_bad_shard="skip")


# -- weights, pickles, configuration -----------------------------------------------------------------------------------


def test_compressed_weights_which_could_unpack_to_any_size_are_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(10_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert (tmp_path / "a.pth").stat().st_size < 1_000_000
    with guarded(tmp_path), pytest.raises(WeightsError, match=r"a\.pth: .*compressed"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\x00\x00\x00\x10.",  # a place in the memo: 2 GB of table
        b"\x80\x05\x96\x00\x00\x00\x40\x00\x00\x00\x00.",  # a byte array of 1 GB; found by fuzzing
        b"\x80\x04\x8e\x00\x00\x00\x40\x00\x00\x00\x00.",  # bytes
        b"\x80\x04\x95\x00\x00\x00\x40\x00\x00\x00\x00].",  # a frame
    ],
)
def test_a_pickle_of_a_few_bytes_takes_no_gigabytes(tmp_path, content):
    (tmp_path / "refs(unc).p").write_bytes(content)
    with guarded(tmp_path), pytest.raises(AnnotationError, match=r"refs\(unc\)\.p"):
        read_refcoco(tmp_path)


def test_a_pickle_that_names_one_long_text_many_times_is_refused(tmp_path):
    import pickle

    text = {"sent": "x" * 100_000}
    ref = {"ref_id": 1, "ann_id": 5, "image_id": 7, "split": "val", "sentences": [text] * 100_000}
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([ref], 2))
    instances = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [{"id": 5, "bbox": [1, 2, 3.5, 4]}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(AnnotationError, match="longer than the whole file"):
        read_refcoco(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("task: !!python/object/apply:os.system ['touch exploded']", "could not determine a constructor"),
        ("task: !!python/name:os.system", "could not determine a constructor"),
        ("task: !!python/object/new:subprocess.Popen [['touch', 'exploded']]", "could not determine a constructor"),
        (f"{LAUGHS.decode()}data: {{train: *j}}", "aliases unfold"),
        ("a: &a {x: 1}\n" + "".join(f"b{i}: &{n} {{<<: [{', '.join([f'*{p}'] * 9)}]}}\n" for i, (p, n) in
         enumerate(zip("abcdefgh", "bcdefghi", strict=True))), "aliases unfold"),
        ("data: &d {train: [a.json], image_roots: *d}", "aliases unfold"),
        ("[" * 5000, "nested too deeply"),
        ("train: {seed: 0x" + "f" * 5000 + "}", "a number of 5,002 digits"),
        ("train: {max_steps: " + "9" * 5000 + "}", "a number of 5,000 digits"),
        ("log: 2001-99-99", "not valid YAML"),
        ("log: !!float ''", "not valid YAML"),
        ("log: \x07", "not valid YAML"),
        ("x: " + "y" * (1 << 20), "more than"),
    ],
)  # fmt: skip
def test_recipes_and_overrides_run_nothing_and_unfold_to_nothing_large(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with guarded(tmp_path), pytest.raises(ConfigError, match=rf"(?s)recipe\.yaml: .*{message}"):
        load_config("recipe.yaml")
    if text.startswith("task: "):
        with guarded(tmp_path), pytest.raises(ConfigError, match=message):
            load_config("demo", [f"task={text[6:]}"])
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b'{"x": ' + b"9" * 5000 + b"}"])
def test_files_that_are_no_text_are_refused_as_configuration(tmp_path, content):
    for name, read, error in (
        ("a.yaml", load_config, ConfigError),
        ("a.json", load_deepspeed_config, DeepSpeedConfigError),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=name):
            read(tmp_path / name)


# -- text that is shown ------------------------------------------------------------------------------------------------

FORMULA = '=HYPERLINK("http://a.example","x")'
HOSTILE = (
    FORMULA,
    "+1+cmd|' /C calc'!A0",
    "<script>alert(1)</script>",
    "a\nstep 9 forged\x1b[2J\u2028\x85.jpg",
    "half \ud83d",
)


def test_hostile_names_stay_one_line_of_json_and_never_reach_tensorboard_or_the_terminal_as_they_are(tmp_path, caplog):
    monitor = Monitor(tmp_path, rank=0, total_steps=2, samples_per_step=1, log_every=1, progress=False)
    with caplog.at_level(logging.WARNING):
        for number, name in enumerate(HOSTILE):
            monitor.rejected_count = 100 * number  # every hundredth is logged
            monitor.rejected([(name, f"{name} cannot be decoded")])
    monitor.log(1, {"itc": torch.tensor(1.0)}, {"lr": 1e-3})
    assert monitor.close()["rejected"] == len(HOSTILE)
    lines = (tmp_path / "rejected.jsonl").read_text(encoding="ascii").splitlines()
    assert [json.loads(line)["key"] for line in lines] == list(HOSTILE)
    events = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert events and not any(word in events for word in (b"HYPERLINK", b"calc", b"script", b"forged"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(HOSTILE) and all(text.isprintable() for text in said)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".csv", ".tsv", ".xlsx")]  # nothing for a spreadsheet


def test_an_entry_that_is_a_text_is_no_entry(tmp_path):
    """Found by fuzzing: a list's own text was taken for the reason of its rejection, an empty one for an image."""
    (tmp_path / "list.json").write_text('["", "sound"]')
    faults = [entry.fault for entry in read_entries(tmp_path / "list.json")]
    assert faults == ["expected an object, found a string"] * 2


# -- what listens ------------------------------------------------------------------------------------------------------


def listening(_: None = None) -> list[str]:
    """Where this process listens while it trains with others."""
    import psutil
    import torch.distributed as dist

    from albef_ds.training.engine import init_distributed
    from albef_ds.training.watchdog import Watchdog

    init_distributed()
    with Watchdog(dead_seconds=20, timeout_minutes=2):
        dist.all_reduce(torch.ones(1))
        found = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
        dist.barrier()
    return found


def test_ranks_of_one_machine_listen_where_no_other_machine_can_reach_them():
    first, second = run_ranks(2, listening)
    assert len(first) >= 3 and len(second) >= 1  # rendezvous, signs of life, Gloo
    assert {*first, *second} <= {"127.0.0.1", "::1"}


# -- found by fuzzing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, data", [("annotations", b'\x09[ ""r'), ("configuration", b"\x00" + LAUGHS + b"data: *j")]
)
def test_what_fuzzing_found_is_refused(tmp_path, target, data):
    assert not run(target, data, tmp_path)
