"""Between the three forms no bit changes, and what a model says stays the same."""

from __future__ import annotations

import json
import stat

import pytest
import torch
import yaml

import albef_ds
from albef_ds.config import Config
from albef_ds.data.tokenizer import load_tokenizer
from albef_ds.inference.forms import convert, save
from albef_ds.inference.model_card import model_card, plain
from albef_ds.model.reference_weights import load_reference, to_reference
from albef_ds.model.weight_files import WeightsError, read_state_dict
from albef_ds.tasks.registry import TASKS
from albef_ds.training.checkpoint_files import write_tensors
from albef_ds.training.checkpoint_manifest import MANIFEST, Manifest
from albef_ds.training.restore import MODEL_FILE
from tests.inference.conftest import KINDS, small_model


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == v.dtype and a[k].shape == v.shape and torch.equal(a[k], v) for k, v in b.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_through_all_forms_no_bit_changes(kind, zoo, tmp_path, readable):
    folder = convert(zoo / f"{kind}.pth", tmp_path / "folder")
    file = convert(folder, tmp_path / "again" / "x.safetensors")
    back = convert(file, tmp_path / "x.pth")
    original = read_state_dict(zoo / f"{kind}.pth")
    assert any("_m." in key for key in original) and original.get("temp", torch.ones(())).ndim == 0
    for written in (folder / "model.safetensors", file, back):
        assert same(read_state_dict(written), original)
    images = [(readable[0], readable[1])] if kind == "nlvr" else readable[:1]
    texts = [
        albef_ds.load(source, tokenizer=vocabulary, device="cpu").multimodal_features(images, ["a red circle"])
        for source, vocabulary in ((zoo / f"{kind}.pth", None), (folder, None), (back, zoo / "vocab.txt"))
    ]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_what_is_written_a_training_run_can_start_from(zoo, tmp_path):
    folder = convert(zoo / "pretraining.pth", tmp_path / "folder")
    config = albef_ds.load(folder, device="cpu").config
    task = TASKS["pretraining"](config.model)
    load_reference(read_state_dict(folder / "model.safetensors"), task.model, task.teacher, task.queue, "x")
    assert torch.equal(task.queue.image.t(), read_state_dict(zoo / "pretraining.pth")["image_queue"])


def test_the_teacher_may_stay_behind(zoo, tmp_path):
    out = convert(zoo / "retrieval.pth", tmp_path / "x.pth", with_teacher=False)
    kept = read_state_dict(out)
    assert kept and not [k for k in kept if k.split(".")[0].endswith("_m") or "queue" in k]


def test_a_run_becomes_a_folder_with_its_settings_and_numbers_but_not_its_paths(zoo, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    model = small_model(load_tokenizer(zoo / "vocab.txt").vocab_size)
    (run / "albef.pth").write_bytes((zoo / "vqa.pth").read_bytes())
    data = {"tokenizer": str(zoo / "vocab.txt"), "sep_token": True, "train": ["/secret/place.json"], "max_tokens": 19}
    recipe = Config(task="vqa", model=model, data=data, output_dir="/secret/out", evaluation={"k_test": 7})
    (run / "config.yaml").write_text(recipe.to_yaml())
    summary = {"steps": 9, "losses": {"answers": 1.0}, "vqa": {"accuracy": 71.25, "per_answer_type": {"yes/no": 80}}}
    (run / "summary.json").write_text(json.dumps(summary))
    folder = convert(run, tmp_path / "vqa|<model>", licence="cc-by-4.0")
    loaded = albef_ds.load(folder, device="cpu")
    assert loaded.config.task == "vqa" and loaded.tokenizer.sep_token
    assert loaded.config.data.max_tokens == 19 and loaded.config.evaluation.k_test == 7
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-4.0"
    assert (
        "| vqa accuracy | 71.25 |" in card and "albef_ds.load" in card and "answers" not in card.split("## Results")[1]
    )
    assert "# vqa\\|&lt;model>" in card
    everything = card + (folder / "config.json").read_text()
    assert "secret" not in everything and str(tmp_path) not in everything
    assert json.loads((folder / "config.json").read_text())["model_type"] == "albef"
    again = convert(folder, tmp_path / "twice")
    assert "| vqa accuracy | 71.25 |" in (again / "README.md").read_text()


def test_a_run_that_has_not_ended_becomes_a_folder_too(zoo, tmp_path):
    run = tmp_path / "run"
    step = run / "checkpoints" / "step_00000004"
    step.mkdir(parents=True)
    model = small_model(load_tokenizer(zoo / "vocab.txt").vocab_size)
    task = TASKS["retrieval"](model)
    entry = write_tensors({"module": task.state_dict()}, step / MODEL_FILE)
    config = Config(task="retrieval", model=model, data={"tokenizer": "gone/vocab.txt", "max_tokens": 17})
    (run / "config.yaml").write_text(config.to_yaml())
    (run / "vocab.txt").write_bytes((zoo / "vocab.txt").read_bytes())
    identity = {"task": "retrieval", "model": model.model_dump(mode="json")}
    files = {MODEL_FILE: entry}
    manifest = Manifest(schema=2, step=4, world_size=1, identity=identity, versions={}, files=files)
    (step / MANIFEST).write_text(manifest.to_json())
    for source in (run, run / "checkpoints", step):
        folder = convert(source, tmp_path / f"from_{source.name}")
        assert same(read_state_dict(folder / "model.safetensors"), to_reference(task.model, task.teacher, task.queue))
        assert albef_ds.load(folder, device="cpu").config.data.max_tokens == 17
    convert(run, tmp_path / "x.pth")
    assert same(read_state_dict(tmp_path / "x.pth"), read_state_dict(folder / "model.safetensors"))


def test_the_tokenizer_travels_with_the_folder(zoo, tmp_path):
    folder = convert(zoo / "entailment.pth", tmp_path / "x")
    assert (folder / "vocab.txt").read_text() == (zoo / "vocab.txt").read_text()
    texts = ["a Red circlé, redcirclesquare!", "[MASK] xyz"]
    ours, theirs = load_tokenizer(folder), load_tokenizer(zoo / "vocab.txt")
    assert ours.encode(texts, 30) == theirs.encode(texts, 30)
    ids = ours.encode(texts[:1], 30)[0]
    assert ours.decode(ids) == theirs.decode(ids)


def test_everybody_may_read_what_was_written(zoo, tmp_path):
    folder = convert(zoo / "entailment.pth", tmp_path / "x")
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in ("config.json", "model.safetensors", "vocab.txt")}
    assert len(modes) == 1


def test_a_loaded_model_can_be_saved(models, tmp_path):
    for out in ("a.pth", "b.safetensors", "c"):
        save(models["nlvr"], tmp_path / out)
    a, b, c = (read_state_dict(tmp_path / name) for name in ("a.pth", "b.safetensors", "c/model.safetensors"))
    assert same(a, b) and same(a, c)


def test_what_is_in_the_way_stays(zoo, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        convert(zoo / "vqa.pth", tmp_path)
    with pytest.raises(WeightsError, match="expected .pth"):
        convert(zoo / "vqa.pth", tmp_path / "x.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("kind", [*KINDS, "grounding"])
def test_every_kind_has_a_card(kind):
    card = model_card("x", Config(task=kind, model=small_model(30)), {}, "unknown", False)
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "albef_ds" and "None are known." in card


def test_names_make_no_markup():
    assert plain("a_b [x](y) <b>\n# `c`") == "a\\_b \\[x\\](y) &lt;b> \\# \\`c\\`"
