import functools
import http.server
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from albef_ds.data.images import ImageError
from albef_ds.data.packing import PackSettings, pack
from albef_ds.data.shard_folder import CachedFolder, LocalFolder, open_folder
from albef_ds.data.shard_format import ShardError
from albef_ds.data.shards import ShardSet


@pytest.fixture(scope="module")
def packed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack([world.train], out, PackSettings(samples_per_shard=9))
    return out


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


@pytest.fixture
def server(packed):
    """The shards over HTTP on loopback; counts what is asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=str(packed))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_samples_are_the_lists_with_the_images_bytes(packed, annotations):
    shards = ShardSet([LocalFolder(str(packed))])
    expected = {a.key: a for a in annotations}
    assert len(shards) == 60 and shards.corpora == ((9, 9, 9, 9, 9, 9, 6),)
    for sample in shards:
        listed = expected.pop(sample.key)
        assert sample.captions == listed.captions
        with open(listed.image, "rb") as file:
            assert sample.image == file.read()
    assert not expected


def test_several_folders_follow_each_other(packed):
    one, two = ShardSet([LocalFolder(str(packed))]), ShardSet([LocalFolder(str(packed))] * 2)
    assert len(two) == 120 and two[60 + 7] == one[7] and two[7] == one[7]
    with pytest.raises(IndexError):
        two[120]


def test_threads_and_copies_read_the_same(packed):
    shards = ShardSet([LocalFolder(str(packed))])
    alone = [shards[i] for i in range(60)]
    shards.folders[0]._files.clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shards.__getitem__, [*range(60)] * 5)) == alone * 5
    assert pickle.loads(pickle.dumps(shards))[3] == alone[3]


def test_few_files_are_open_at_a_time(packed, monkeypatch):
    monkeypatch.setattr("albef_ds.data.shard_folder._OPEN_FILES", 2)
    shards = ShardSet([LocalFolder(str(packed))])
    assert len({shards[i].key for i in range(60)}) == 60 and len(shards.folders[0]._files) == 2


DAMAGE = {
    "missing": (lambda path, data: path.unlink(), "shard-000002.tar: missing"),
    "cut short": (lambda path, data: path.write_bytes(data[:-3000]), "shard-000002.tar: .* bytes instead of"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_shard_that_is_missing_or_cut_short_is_named_at_the_start(copy, kind):
    path = copy / "shard-000002.tar"
    damage, message = DAMAGE[kind]
    damage(path, path.read_bytes())
    with pytest.raises(ShardError, match=message):
        ShardSet([LocalFolder(str(copy))])
    shards = ShardSet([LocalFolder(str(copy))], on_bad_shard="skip")
    assert len(shards) == 60  # the order of the others stays as it was
    faults = {}
    for i in range(60):
        try:
            assert shards[i].image
        except ImageError as error:
            faults[i] = error
    assert set(faults) <= set(range(18, 27)) and 26 in faults
    assert len({e.key for e in faults.values()}) == 1 and faults[26].key.endswith("shard-000002.tar")
    assert faults[26].reason in ("missing", "cut short")


def test_a_flipped_bit_is_found_where_it_is_read(copy):
    path = copy / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[900] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard-000001.tar, sample 0: .*crc32 differs.*on_bad_shard=skip"):
        ShardSet([LocalFolder(str(copy))])[9]
    shards = ShardSet([LocalFolder(str(copy))], on_bad_shard="skip")
    with pytest.raises(ImageError, match="shard-000001.tar, sample 0"):
        shards[9]
    assert shards[10].image


def test_a_changed_index_is_not_believed(copy):
    path = copy / "shard-000000.idx"
    path.write_text(path.read_text().replace("jpg 512 ", "jpg 513 "))
    with pytest.raises(ShardError, match="shard-000000.idx: contents have changed"):
        ShardSet([LocalFolder(str(copy))])[0]
    with pytest.raises(ImageError, match="shard-000000.idx: contents have changed"):
        ShardSet([LocalFolder(str(copy))], on_bad_shard="skip")[0]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "missing; expected a folder made by"),
        ("{", "not a manifest"),
        ("[]", "schema None"),
        ('{"schema": 2}', "reads 1"),
    ],
)
def test_without_a_manifest_there_is_nothing(copy, text, message):
    (copy / "manifest.json").unlink()
    if text is not None:
        (copy / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=message):
        ShardSet([LocalFolder(str(copy))], on_bad_shard="skip")


# -- URLs --------------------------------------------------------------------------------------------------------------


def held(cache):
    return sum(p.stat().st_size for p in cache.iterdir())


def test_over_http_the_samples_are_the_same_and_the_cache_stays_small(server, packed, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec's HTTP needs aiohttp")
    url, asked = server
    sizes = [p.stat().st_size for p in packed.glob("*.tar")]
    room = 3 * max(sizes)
    shards = ShardSet([open_folder(url, tmp_path, room)])
    local = ShardSet([LocalFolder(str(packed))])
    for i in range(60):
        assert shards[i] == local[i]
        assert held(tmp_path) <= room
    fetched = [path for path in asked if path.endswith(".tar")]
    assert len(fetched) == len(set(fetched)) == len(sizes)  # in their order each is fetched once
    assert shards[0] == local[0] and shards.folders[0].fetched == len(sizes) + 1  # had to go, came again
    assert shards[0] == local[0] and shards.folders[0].fetched == len(sizes) + 1
    assert {p.suffix for p in tmp_path.iterdir() if not p.name.startswith(".")} == {".tar"}


def test_two_readers_of_a_cache_fetch_a_shard_once(server, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec's HTTP needs aiohttp")
    url, asked = server
    readers = [ShardSet([open_folder(url, tmp_path, 1 << 30)]) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda shards: [shards[i].key for i in range(60)], readers))
    assert len([path for path in asked if path.endswith(".tar")]) == 7


def test_what_is_wrong_over_http_is_named(server, packed, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec's HTTP needs aiohttp")
    url, _ = server
    with pytest.raises(ShardError, match="set data.cache_dir"):
        open_folder(url)
    with pytest.raises(ShardError, match="nowhere/manifest.json: missing"):
        ShardSet([open_folder(f"{url}/nowhere", tmp_path)])
    with pytest.raises(ShardError, match="do not fit a cache of 1,000"):
        ShardSet([open_folder(url, tmp_path, 1000)])[0]
    with pytest.raises(ShardError, match="127.0.0.1:9/manifest.json: .*its server cannot be reached"):
        ShardSet([open_folder("http://127.0.0.1:9", tmp_path)])
    folder = open_folder(url, tmp_path)
    with pytest.raises(ShardError, match="shard-000000.tar: contents have changed"):
        folder.fetch("shard-000000.tar", (packed / "shard-000000.tar").stat().st_size, "0" * 64)
    with pytest.raises(ShardError, match="bytes instead of 999,999,999"):
        folder.fetch("shard-000000.tar", 999_999_999, "0" * 64)
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]  # nothing half is left


def test_memory_and_other_schemes_go_the_same_way(packed, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(packed), "/bucket", recursive=True)
    try:
        folder = open_folder("memory://bucket", tmp_path)
        assert isinstance(folder, CachedFolder)
        assert ShardSet([folder])[5] == ShardSet([LocalFolder(str(packed))])[5]
    finally:
        memory.rm("/bucket", recursive=True)
