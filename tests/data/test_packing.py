import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from albef_ds.data import packing
from albef_ds.data.annotations import AnnotationError
from albef_ds.data.images import decode_image
from albef_ds.data.jpeg import read_jpeg_header
from albef_ds.data.packing import PackSettings, pack
from albef_ds.data.shard_check import check, contact_sheet
from albef_ds.data.shard_folder import LocalFolder
from albef_ds.data.shards import ShardSet
from tests.data.damaged import CAPTIONS, encoded, header_bomb, photo, unusable, unusual


def write(folder: Path, files: dict[str, bytes], captions=None) -> Path:
    """The files as .jpg, whatever they are, and their list."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / f"{name}.jpg").write_bytes(data)
    entries = [{"image": f"{n}.jpg", "caption": (captions or {}).get(n, f"a picture of {n}")} for n in files]
    (folder / "list.json").write_text(json.dumps(entries))
    return folder / "list.json"


def samples(out):
    return {s.key: s for s in ShardSet([LocalFolder(str(out))])}


def rejects(out):
    return {r["key"]: r for r in map(json.loads, (out / "rejects.jsonl").read_text().splitlines())}


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    folder = tmp_path_factory.mktemp("some")
    return write(folder / "in", {f"p{i:02d}": encoded(photo(seed=i)) for i in range(23)})


def test_sound_files_are_packed_as_they_are_and_shuffled(some, tmp_path):
    manifest = pack([some], tmp_path / "out", PackSettings(samples_per_shard=10))
    assert (manifest.samples, manifest.rejected, [s.samples for s in manifest.shards]) == (23, 0, [10, 10, 3])
    found = ShardSet([LocalFolder(str(tmp_path / "out"))])
    keys = [sample.key for sample in found]
    assert keys != sorted(keys) and sorted(keys) == [f"p{i:02d}.jpg" for i in range(23)]
    for sample in found:
        assert sample.image == (some.parent / sample.key).read_bytes()
        assert sample.captions == (f"a picture of {sample.key[:-4]}",)
    assert not (tmp_path / "out" / ".packing").exists()


def test_the_tars_are_webdatasets_and_the_indexes_dalis(some, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="DALI is not installed")
    pack([some], tmp_path / "out")
    tar = tmp_path / "out" / "shard-000000.tar"
    with tarfile.open(tar) as archive:
        names = archive.getnames()
    assert names[:3] == ["000000.jpg", "000000.json", "000001.jpg"] and len(names) == 46
    with wds2idx.IndexCreator(str(tar), str(tmp_path / "theirs")) as creator:
        creator.verbose = False
        creator.create_index()
    assert (tmp_path / "theirs").read_bytes() == tar.with_suffix(".idx").read_bytes()


def test_every_kind_of_damage_is_listed_with_its_reason(tmp_path):
    missing = [{"image": "nowhere.jpg", "caption": "x"}, {"caption": "no image"}, {"image": "p.jpg", "caption": " "}]
    urls = [{"image": "https://example.org/a.jpg", "caption": "x"}, {"image": "/dev/zero", "caption": "x"}]
    listing = write(tmp_path / "in", {**unusable(), "good": encoded(photo())})
    listing.write_text(json.dumps(json.loads(listing.read_text()) + missing + urls))
    manifest = pack([listing], tmp_path / "out")
    reasons = {key: r["reason"] for key, r in rejects(tmp_path / "out").items()}
    assert manifest.samples == 1 and manifest.rejected == len(reasons) == 11
    assert "too many pixels" in reasons["bomb.jpg"]
    assert "runcated" in reasons["truncated.jpg"]
    assert all("not an image of a known format" in reasons[f"{n}.jpg"] for n in ("empty", "html", "svg", "header_only"))
    assert reasons["nowhere.jpg"] == "the file does not exist"
    assert "is a URL" in reasons["https://example.org/a.jpg"] and reasons["/dev/zero"] == "not a file"
    assert "without any text" in reasons["p.jpg"] and '"image" is missing' in reasons["list.json#8"]
    assert "list.json, entry 0" in rejects(tmp_path / "out")["truncated.jpg"]["source"]


def test_what_a_hardware_decoder_does_not_take_is_written_anew(tmp_path):
    files = unusual()
    pack([write(tmp_path / "in", files)], tmp_path / "out")
    packed = samples(tmp_path / "out")
    assert len(packed) == len(files)
    for name, data in files.items():
        image = packed[f"{name}.jpg"].image
        header = read_jpeg_header(image)
        assert header.plain and (header.width, header.height) == (64, 48)
        assert (image == data) == (name == "exif_rotated")  # sound, and turned by nobody
        before, after = (Image.Image.getdata(decode_image(d).resize((4, 3))) for d in (data, image))
        assert max(abs(a - b) for p, q in zip(before, after, strict=True) for a, b in zip(p, q, strict=True)) < 30


def test_large_images_are_reduced_and_bombs_refused(tmp_path):
    listing = write(
        tmp_path / "in", {"large": encoded(photo(400, 160)), "small": encoded(photo(96, 80)), "b": header_bomb(300)}
    )
    pack([listing], tmp_path / "out", PackSettings(shorter_side=80, max_pixels=70_000))
    packed = samples(tmp_path / "out")
    assert decode_image(packed["large.jpg"].image).size == (200, 80)
    assert packed["small.jpg"].image == (listing.parent / "small.jpg").read_bytes()
    assert "300 x 300 pixels, more than the allowed 70,000" in rejects(tmp_path / "out")["b.jpg"]["reason"]


def test_odd_captions_come_back_as_they_were(tmp_path):
    captions = {**CAPTIONS, "several": ["one", "two", " ", 3]}
    pack([write(tmp_path / "in", {n: encoded(photo()) for n in captions}, captions)], tmp_path / "out")
    packed = {key[:-4]: sample.captions for key, sample in samples(tmp_path / "out").items()}
    assert packed.pop("long") == (CAPTIONS["long"][:10_000],)
    assert packed.pop("several") == ("one", "two")
    assert packed == {n: (c,) for n, c in CAPTIONS.items() if n != "long"}


def test_folders_tsv_jsonl_and_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c", "d", "e"):
        (images / f"{name}.jpg").write_bytes(encoded(photo()))
    (images / "a.txt").write_text("first\nsecond\n")
    (images / "sub" / "c.txt").write_text("a third")
    (images / "d.txt").write_bytes(b"caf\xe9")
    pack([images], tmp_path / "folder")
    assert {k: s.captions for k, s in samples(tmp_path / "folder").items()} == {
        "a.jpg": ("first", "second"),
        "sub/c.jpg": ("a third",),
    }
    reasons = sorted(r["reason"] for r in rejects(tmp_path / "folder").values())
    assert len(reasons) == 3 and "no file b.txt" in reasons[0] and "not UTF-8" in reasons[1]

    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "plain.tsv").write_bytes(b"a.jpg\tone\nb.jpg\nd.jpg\tcaf\xe9\n")
    (lists / "named.tsv").write_text("caption\turl\timage\ntwo\thttp://x\tb.jpg\n")
    (lists / "lines.jsonl").write_text('{"image": "d.jpg", "caption": "three"}\n{"image"\n\n')
    parquet.write_table(
        arrow.table({"image": ["e.jpg", None], "caption": [["four", "five"], ["x"]]}), lists / "l.parquet"
    )
    manifest = pack(sorted(lists.iterdir()), tmp_path / "mixed", PackSettings(image_root=str(images)))
    assert {k: s.captions for k, s in samples(tmp_path / "mixed").items()} == {
        "a.jpg": ("one",),
        "b.jpg": ("two",),
        "d.jpg": ("three",),
        "e.jpg": ("four", "five"),
    }
    assert manifest.rejected == 4

    (lists / "broken.parquet").write_bytes(b"PAR1 nonsense")
    for name, columns, message in (
        ("broken.parquet", ("image", "caption"), "not a sound Parquet file"),
        ("l.parquet", ("path", "caption"), "has no column path, it has image, caption"),
    ):
        with pytest.raises(AnnotationError, match=message):
            pack([lists / name], tmp_path / f"out-{name}", PackSettings(columns=columns))


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"image": "a.jpg", "caption": "x"}', "cut short"),
        ('[{"image": "a.jpg", "caption": "x"', "not valid JSON"),
        ('[{"image": "a.jpg"} {"image": "b"}]', "expected , or ]"),
        ('{"image": "a.jpg"}', r"holds no list.*end in \.jsonl"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "the lists are empty"),
        ("", "holds no list"),
    ],
)
def test_lists_that_are_none(tmp_path, text, message):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(AnnotationError, match=message):
        pack([tmp_path / "list.json"], tmp_path / "out")


def test_a_list_is_read_in_pieces(tmp_path, monkeypatch):
    listing = write(tmp_path / "in", {f"é{i}": encoded(photo(16, 16)) for i in range(9)})
    listing.write_text(json.dumps(json.loads(listing.read_text()), ensure_ascii=False, indent=2), encoding="utf-8-sig")
    monkeypatch.setattr("albef_ds.data.pack_sources._CHUNK", 7)
    pack([listing], tmp_path / "out")
    assert set(samples(tmp_path / "out")) == {f"é{i}.jpg" for i in range(9)}


def test_killed_and_run_again_gives_the_same_bytes(some, tmp_path, monkeypatch):
    settings = PackSettings(samples_per_shard=5)
    whole = pack([some], tmp_path / "whole", settings)
    original, seen = packing.sound_jpeg, []

    def dying(*arguments):
        seen.append(arguments)
        if len(seen) == 13:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(packing, "sound_jpeg", dying)
    with pytest.raises(KeyboardInterrupt):
        pack([some], tmp_path / "again", settings)
    assert not (tmp_path / "again" / "manifest.json").exists()
    assert pack([some], tmp_path / "again", settings) == whole
    assert len(seen) == 13 + 23 - 10  # two shards were complete
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    seen.clear()
    assert pack([some], tmp_path / "again", settings) == whole and not seen


def test_a_killed_process_leaves_what_the_next_one_finishes(tmp_path):
    listing = write(tmp_path / "in", {f"p{i}": encoded(photo(640, 480, i)) for i in range(60)})
    command = [sys.executable, "-m", "tests.data.pack_command", "pack", str(listing), str(tmp_path / "out")]
    command += ["--samples-per-shard", "2", "--workers", "2"]
    running = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out" / ".packing").glob("shard-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    subprocess.run(command, check=True, timeout=120)
    manifest, faults = check(tmp_path / "out", decode=True)
    assert manifest.samples == 60 and not faults
    pack([listing], tmp_path / "alone", PackSettings(samples_per_shard=2))
    assert contents(tmp_path / "alone") == contents(tmp_path / "out")


def test_a_folder_that_holds_something_else_is_left_alone(some, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        pack([some], tmp_path)
    pack([some], tmp_path / "out")
    with pytest.raises(FileExistsError, match="other sources or settings"):
        pack([some], tmp_path / "out", PackSettings(seed=1))
    with pytest.raises(AnnotationError, match="no.json cannot be read"):
        pack([tmp_path / "no.json"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_but_rejects_is_an_error(tmp_path):
    with pytest.raises(AnnotationError, match="no image could be packed: all 6 were rejected"):
        pack([write(tmp_path / "in", unusable())], tmp_path / "out")


def test_check_names_every_fault(some, tmp_path):
    pack([some], tmp_path / "out", PackSettings(samples_per_shard=5))
    assert check(tmp_path / "out", decode=True)[1] == []
    shards = sorted((tmp_path / "out").glob("*.tar"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-5000])
    data = bytearray(shards[2].read_bytes())
    data[700] ^= 4
    shards[2].write_bytes(data)
    index = shards[3].with_suffix(".idx")
    index.write_text(index.read_text().replace("jpg 512", "jpg 999999999"))
    faults = check(tmp_path / "out", workers=2)[1]
    assert "shard-000000.tar: missing" in faults[0]
    assert "shard-000001.tar" in faults[1] and "bytes instead of" in faults[1]
    assert (
        "shard-000002.tar: contents have changed" in faults[2]
        and "shard-000002.tar, sample 0: its contents" in faults[3]
    )
    assert "shard-000003.idx: an offset lies outside" in faults[4] and len(faults) == 5


def test_the_contact_sheet_escapes_captions_and_names(tmp_path):
    listing = write(tmp_path / "in", {n: encoded(photo()) for n in CAPTIONS}, CAPTIONS)
    pack([listing], tmp_path / "out")
    page = contact_sheet(tmp_path / "out", tmp_path / "page.html").read_text()
    assert page.count("<figure>") == len(CAPTIONS)
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quoted&quot;" in page


def test_a_manifest_cannot_lead_out_of_its_folder(some, tmp_path):
    pack([some], tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace("shard-000000", "../shard-000000"))
    with pytest.raises(Exception, match="expected shard-000000"):
        check(tmp_path / "out")
