import json
import time

import pytest
import torch

from albef_ds.data.dali_pipeline import dali_available
from benchmarks import feeding, loader, loader_rivals, measure, workload

SMALL = ["--device", "cpu", "--size", "32", "--batch", "4", "--workers", "1", "--rounds", "1", "--batches", "2"]


def test_it_compares_what_is_installed_and_writes_json(tmp_path, capsys):
    assert loader.main([*SMALL, "--images", "12", "--json", "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out.json").read_text())
    names = [row["loader"] for row in result["loaders"]]
    assert "pillow, workers" in names and ("dali (cpu)" in names) == dali_available()
    assert all(row["images/s"] > 0 and row["CPU ms/image"] >= 0 for row in result["loaders"])
    assert {"resize, PyTorch", "RandAugment, Pillow", "read from the shard"} <= {s["stage"] for s in result["stages"]}
    assert (result["readers"] is not None) == dali_available() and result["waiting"] is result["feeding"] is None
    assert (result["decoding"] is not None) == dali_available()
    head, *rows = measure.read_rows(tmp_path / "out.jsonl")
    assert head["settings"] == result["settings"]
    turns = [row for row in rows if row["lane"] == "loaders" and "round" in row]
    assert sorted(row["loader"] for row in turns) == sorted(names)
    text = loader.report(result)
    assert "pillow, workers" in text and "waiting: not measured (--step-ms)" in text


def test_a_training_step_is_fed_in_turns_with_one_that_is_not(tmp_path, capsys):
    asked = [*SMALL, "--rounds", "2", "--images", "12", "--feed-step", "--preset", "tiny", "--lanes", "feeding"]
    assert loader.main([*asked, "--out", str(tmp_path)]) == 0
    alone, *fed = json.loads((tmp_path / "loader.json").read_text())["feeding"]
    assert alone["loader"] == feeding.RESIDENT and len(alone["seconds"]) == 2
    assert {row["loader"] for row in fed} == {"pillow, workers"} | ({"dali (cpu)"} if dali_available() else set())
    for row in fed:
        ratios = [slow / fast for slow, fast in zip(row["seconds"], alone["seconds"], strict=True)]
        assert row["lost"]["median"] == pytest.approx(1 - 2 / sum(ratios)) and 0 <= row["waits"] <= 1
    text = capsys.readouterr().out
    assert "| none: one resident batch |" in text and "loaders: not measured (--lanes)" in text


def test_what_a_slow_loader_costs_is_measured(monkeypatch):
    config, ended, stepped_on, build = workload.preset("tiny"), [], [], feeding.contenders.build
    batch = workload.captions_batch(config, "histogram", 2)

    def start(seconds):
        def batches():
            try:
                while True:
                    time.sleep(seconds)
                    yield batch
            finally:
                ended.append(seconds)

        return batches

    def broken():
        yield batch
        raise OSError("the disk is gone")

    def built(*given):
        step = build(*given)
        step.set_batch = stepped_on.append
        return step

    monkeypatch.setattr(feeding.contenders, "build", built)
    starts = {"slow": start(0.05), "quick": start(0.0), "broken": broken}
    rows = [*feeding.feed_step(starts, config, torch.device("cpu"), batch=2, rounds=3, steps=3)]
    costs = {row["loader"]: row["lost"]["median"] for row in rows if "lost" in row}
    assert set(costs) == {"slow", "quick"} and costs["slow"] > max(0.4, costs["quick"])
    assert [row for row in rows if "error" in row] == [{"loader": "broken", "error": "OSError: the disk is gone"}]
    turns, a_turn = 3, feeding.RUN_IN + 3
    assert len(stepped_on) == 2 * turns * a_turn + turns + 1  # fed every step; the resident one set every turn
    assert ended.count(0.0) == turns  # every turn ends its loader: none works while another is timed
    waits = {row["loader"]: row["waits"] for row in rows if "lost" in row}
    assert waits["slow"] > 0.4 > waits["quick"]


def test_a_lane_that_fails_has_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    seen = []

    def bad():
        yield {"loader": "a", "round": 1, "images/s": 5.0}
        seen.extend(measure.read_rows(tmp_path / "loader.jsonl"))  # what a kill at this moment would leave
        raise RuntimeError("CUDA error: no kernel image")

    def good():
        yield {"stage": "b", "CPU ms/image": 1.0, "images/s of a core": 1000.0}

    monkeypatch.setattr(loader, "lanes", lambda *_: {"loaders": bad, "stages": good})
    assert loader.main([*SMALL, "--images", "8", "--out", str(tmp_path)]) == 1
    assert seen[-1] == {"lane": "loaders", "loader": "a", "round": 1, "images/s": 5.0}
    result = json.loads((tmp_path / "loader.json").read_text())
    assert result["loaders"] == [{"error": "RuntimeError: CUDA error: no kernel image"}]
    assert [row["stage"] for row in result["stages"]] == ["b"]
    assert "loaders: all of it failed: RuntimeError: CUDA error" in capsys.readouterr().out


def test_a_contender_that_fails_leaves_the_others_their_numbers():
    def endless():
        while True:
            yield 0

    def broken():
        yield from range(7)
        raise ValueError("no more")

    starts = {"broken": broken, "one": endless, "two": endless}
    rows = [*loader.compare(starts, batch=1, rounds=2, batches=5)]
    assert [row for row in rows if "error" in row] == [{"loader": "broken", "error": "ValueError: no more"}]
    last = [row for row in rows if "rounds" in row]
    assert [row["loader"] for row in last] == ["one", "two"] and "first is faster" in last[1]


@pytest.mark.skipif(not dali_available(), reason="NVIDIA DALI is not installed")
def test_on_a_gpu_its_decoder_is_measured_with_other_shares_of_the_hardware(monkeypatch):
    told = []
    monkeypatch.setattr(loader_rivals, "decoded", lambda *given: told.append(given[-2:]))
    starts = loader.decoders(None, loader.parse(SMALL), torch.device("cuda", 0))
    for start in starts.values():
        start()
    devices, shares = zip(*told, strict=True)
    assert [device.type for device in devices] == ["cuda", "cuda", "cuda", "cpu"] and shares[:3] == (0.65, 1.0, 0.0)


@pytest.mark.parametrize("there", [["coffee.png"], []])
def test_photographs_are_those_on_the_disk_and_never_downloaded(tmp_path, monkeypatch, there):
    from types import SimpleNamespace

    from PIL import Image

    (tmp_path / "data").mkdir()
    for name in there:
        Image.new("RGB", (64, 48)).save(tmp_path / "data" / name)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(loader_rivals.importlib.util, "find_spec", lambda name: spec)
    pictures, told = loader_rivals._photographs()
    assert told == ("scikit-image: coffee" if there else "none (smooth noise)") and pictures[0].mode == "RGB"


def test_the_rivals_operations_do_what_ours_do():
    """Within what torchvision's other rounding and edges allow: the comparison is of the same work."""
    import numpy as np

    from albef_ds.data.augment import OPS
    from tests.data.test_augment import photo

    image = photo(64, 64)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for name in ("AutoContrast", "Equalize", "Brightness", "Sharpness", "TranslateX", "TranslateY", "Identity"):
        got = loader_rivals._V2_OPS[name](tensor, 1).permute(1, 2, 0).numpy().astype(int)
        expected = np.asarray(OPS[name](image, -1 if name.startswith("Translate") else 1)).astype(int)
        assert np.abs(got - expected)[8:-8, 8:-8].max() <= 2, name


@pytest.mark.parametrize("waits", [0.0, 0.02])
def test_waiting_is_measured(waits):
    def start():
        while True:
            time.sleep(waits)
            yield 0

    share = loader.waiting(start, step_ms=20, steps=5)
    assert share < 0.1 if not waits else 0.3 < share < 0.7
