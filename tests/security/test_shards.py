"""Shards, their indices and manifests, made by someone who means harm."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from albef_ds.data.images import ImageError
from albef_ds.data.packing import PackSettings, pack
from albef_ds.data.shard_check import check, contact_sheet
from albef_ds.data.shard_folder import LocalFolder
from albef_ds.data.shard_format import MANIFEST, ShardError, index_text, sample_json
from albef_ds.data.shards import ShardSet
from tests.data.damaged import encoded, photo
from tests.fuzz.guard import guarded


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
