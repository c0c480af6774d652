"""Weights, pickles and configuration that would run code or unfold without end."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch

from albef_ds.config import ConfigError, load_config
from albef_ds.data.annotations import AnnotationError
from albef_ds.data.refcoco import read_refcoco
from albef_ds.model.weight_files import WeightsError, read_state_dict
from albef_ds.training.ds_config import DeepSpeedConfigError, load_deepspeed_config
from tests.fuzz.guard import guarded
from tests.fuzz.seeds import LAUGHS
from tests.fuzz.targets import run


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


@pytest.mark.parametrize(
    "target, data", [("annotations", b'\x09[ ""r'), ("configuration", b"\x00" + LAUGHS + b"data: *j")]
)
def test_what_fuzzing_found_is_refused(tmp_path, target, data):
    assert not run(target, data, tmp_path)
