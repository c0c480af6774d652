"""What a checkpoint is, is found out; what is none is refused in words."""

from __future__ import annotations

import logging
import pickle

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file, save_model

import albef_ds
from albef_ds.config import Config
from albef_ds.data.tokenizer import load_tokenizer
from albef_ds.inference.forms import convert
from albef_ds.inference.loading import build_network
from albef_ds.inference.sizes import model_of, with_shared
from albef_ds.inference.stored import read_stored
from albef_ds.model.weight_files import WeightsError, read_state_dict
from albef_ds.tasks.registry import TASKS
from tests.golden_cases import GoldenCase
from tests.inference.conftest import KINDS, small_model, write_checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_kind_and_sizes_are_told_from_a_bare_file(zoo, kind, caplog):
    with caplog.at_level(logging.WARNING):
        stored = read_stored(zoo / f"{kind}.pth")
    expected = small_model(stored.config.model.text.vocab_size)
    assert stored.config.task == kind
    assert stored.config.model.vision == expected.vision
    assert stored.config.model.text == expected.text
    if kind in ("pretraining", "retrieval"):
        assert (stored.config.model.embed_dim, stored.config.model.queue_size) == (16, 8)
    assert "heads" in caplog.text and "width / 64" in caplog.text


@pytest.mark.parametrize("name", ["pretrain", "retrieval", "vqa", "entailment", "nlvr"])
def test_files_of_the_reference_are_recognised_and_loaded(golden, name):
    case = GoldenCase(golden, name)
    stored = read_stored(golden / f"{name}.pth", config=case.model_config())
    assert stored.config.task == case.task
    network = build_network(stored)
    state, expected = network.state_dict(), case.build().model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())


def test_another_number_of_heads_needs_a_configuration(golden):
    with pytest.raises(WeightsError, match="width 32 is no multiple of 64.*pass config"):
        read_stored(golden / "vqa.pth")


def test_a_run_s_folder_says_everything(tmp_path, zoo):
    words = load_tokenizer(zoo / "vocab.txt").vocab_size
    model = small_model(words, width=48, heads=3)  # not to be told from the weights
    write_checkpoint("retrieval", tmp_path / "albef.pth", model)
    settings = {"tokenizer": "elsewhere/run/data/vocab.txt", "sep_token": True}
    (tmp_path / "config.yaml").write_text(Config(task="grounding", model=model, data=settings).to_yaml())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vocab.txt").write_bytes((zoo / "vocab.txt").read_bytes())
    loaded = albef_ds.load(tmp_path, device="cpu")
    assert loaded.task == "grounding" and loaded.config.model.vision.heads == 3
    assert loaded.tokenizer.encode(["a"], 9)[0][-1] == loaded.tokenizer.sep_id


def test_a_run_that_has_not_ended_is_told_what_to_do(tmp_path):
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    with pytest.raises(WeightsError, match="has not written albef.pth.*convert"):
        albef_ds.load(tmp_path)


def test_pretraining_may_be_used_as_what_is_fine_tuned_from_it_but_not_as_what_it_cannot(zoo):
    assert albef_ds.load(zoo / "pretraining.pth", task="grounding").task == "grounding"
    with pytest.raises(WeightsError, match="a checkpoint of pretraining, which cannot be used as one of vqa"):
        albef_ds.load(zoo / "pretraining.pth", task="vqa")


def test_a_prefix_of_distributed_training_is_taken_off(zoo, tmp_path):
    state = read_state_dict(zoo / "vqa.pth")
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "x.pth")
    assert read_stored(tmp_path / "x.pth").state.keys() == state.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_that_left_out_shared_tensors_load(kind, zoo, tmp_path):
    config = read_stored(zoo / f"{kind}.pth").config
    network = build_network(read_stored(zoo / f"{kind}.pth"))
    save_model(network, tmp_path / "shared.safetensors")  # of tensors with two names it keeps one
    state = with_shared(read_state_dict(tmp_path / "shared.safetensors"))
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "whole.safetensors")
    again = build_network(read_stored(tmp_path / "shared.safetensors")).state_dict()
    assert all(torch.equal(again[k], v) for k, v in network.state_dict().items())
    assert read_stored(tmp_path / "whole.safetensors").config.model.text == config.model.text


def test_a_word_embedding_kept_as_the_head_s_decoder_is_found(zoo):
    state = read_state_dict(zoo / "pretraining.pth")
    name = "text_encoder.bert.embeddings.word_embeddings.weight"
    words = state.pop(name)
    assert torch.equal(with_shared(state)[name], words)


def test_a_name_of_the_hub_is_asked_for_there(zoo, tmp_path, monkeypatch):
    folder = convert(zoo / "vqa.pth", tmp_path / "vqa")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    assert albef_ds.load("somebody/albef-vqa", device="cpu").task == "vqa"
    assert asked == ["somebody/albef-vqa"]


def test_no_such_name_on_the_hub(monkeypatch):
    def refuse(name, **_):
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(WeightsError, match="somebody/nothing: no such file or folder here.*no connection"):
        albef_ds.load("somebody/nothing")


def test_a_path_that_is_not_there_is_never_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for name in ("runs/a/b", "./run", "/nowhere/run", "runs/albef.pth", "model", "/nowhere", "~/nowhere"):
        with pytest.raises(WeightsError, match="no such file or folder"):
            albef_ds.load(name)


def test_files_that_are_no_checkpoint_are_named(tmp_path, zoo):
    torch.save({"layer1.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="other.pth: no checkpoint of ALBEF.*found layer1"):
        albef_ds.load(tmp_path / "other.pth")
    with open(tmp_path / "code.pth", "wb") as file:
        pickle.dump({"model": print}, file)
    with pytest.raises(WeightsError, match="code.pth.*Nothing was executed"):
        albef_ds.load(tmp_path / "code.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="bad.safetensors: not a safetensors file"):
        albef_ds.load(tmp_path / "bad.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="neither a checkpoint nor a run"):
        albef_ds.load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WeightsError, match="model_type 'bert'; expected 'albef'"):
        albef_ds.load(tmp_path / "empty")
    state = read_state_dict(zoo / "retrieval.pth")
    torch.save({k: v for k, v in state.items() if "pos_embed" not in k}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match="pos_embed is missing"):
        albef_ds.load(tmp_path / "part.pth")
    torch.save({k: v for k, v in state.items() if "itm_head" not in k}, tmp_path / "headless.pth")
    with pytest.raises(WeightsError, match="no head to tell its task by"):
        albef_ds.load(tmp_path / "headless.pth")


def test_text_assignment_answers_nothing(tmp_path):
    write_checkpoint("text_assignment", tmp_path / "ta.pth", small_model(40))
    with pytest.raises(WeightsError, match="only prepares for NLVR2"):
        albef_ds.load(tmp_path / "ta.pth")


def test_vocabularies_unknown_or_of_another_model(zoo, tmp_path):
    (tmp_path / "vqa.pth").write_bytes((zoo / "vqa.pth").read_bytes())
    with pytest.raises(WeightsError, match="its vocabulary is not known.*pass tokenizer"):
        albef_ds.load(tmp_path / "vqa.pth")
    words = (zoo / "vocab.txt").read_text()
    (tmp_path / "vocab.txt").write_text(words + "".join(f"more{i}\n" for i in range(9)))
    with pytest.raises(WeightsError, match="another model's"):
        albef_ds.load(tmp_path / "vqa.pth")
    assert albef_ds.load(tmp_path / "vqa.pth", tokenizer=zoo / "vocab.txt", device="cpu").can("answer")


def test_sizes_of_the_paper_s_model_come_out_as_published():
    words = Config().model.text.model_copy(update={"vocab_size": 30522})
    model = Config().model.model_copy(update={"distill": False, "text": words})
    with torch.device("meta"):  # shapes alone: no memory is taken
        state = TASKS["nlvr"](model).model.state_dict()
    found = model_of(state, "nlvr", "x")
    assert (found.text.layers, found.text.fusion_layer, found.text.heads) == (12, 6, 12)
    assert (found.vision.image_size, found.vision.patch_size) == (256, 16)
    assert (found.vision.layers, found.vision.heads) == (12, 12)
