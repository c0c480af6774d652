import json

import pytest

from albef_ds.data.dali_pipeline import dali_available
from benchmarks import loader, loader_rivals

SMALL = ["--device", "cpu", "--size", "32", "--batch", "4", "--workers", "1", "--rounds", "1", "--batches", "2"]


def test_it_compares_what_is_installed_and_writes_json(tmp_path, capsys):
    assert loader.main([*SMALL, "--images", "12", "--json", "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out.json").read_text())
    names = [row["loader"] for row in result["loaders"]]
    assert "pillow, workers" in names and ("dali (cpu)" in names) == dali_available()
    assert all(row["images/s"] > 0 and row["CPU ms/image"] >= 0 for row in result["loaders"])
    assert {"resize, PyTorch", "RandAugment, Pillow", "read from the shard"} <= {s["stage"] for s in result["stages"]}
    assert (result["readers"] is not None) == dali_available() and result["waiting"] is None
    text = loader.report(result)
    assert "pillow, workers" in text and "not measured (--step-ms)" in text


def test_the_rivals_operations_do_what_ours_do():
    """Within what torchvision's other rounding and edges allow: the comparison is of the same work."""
    import numpy as np
    import torch

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
    import time

    def start():
        while True:
            time.sleep(waits)
            yield 0

    share = loader.waiting(start, step_ms=20, steps=5)
    assert share < 0.1 if not waits else 0.3 < share < 0.7
