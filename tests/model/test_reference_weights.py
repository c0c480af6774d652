"""The reference's checkpoints go in and come out; stock timm and Hugging Face models read ours by name."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
import torch.nn.functional as F

from albef_ds.model.reference_weights import load_reference, to_reference
from albef_ds.model.single_modality import load_bert, load_timm
from albef_ds.model.weight_files import WeightsError, read_state_dict
from albef_ds.tasks.pretraining import Pretraining
from tests.golden_cases import GOLDEN, GoldenCase
from tests.tiny import tiny_batch, tiny_model


@pytest.fixture
def recorded() -> dict[str, torch.Tensor]:
    return read_state_dict(GOLDEN / "pretrain.pth")


def loaded(state, **changes) -> Pretraining:
    task = Pretraining(GoldenCase(GOLDEN, "pretrain").model_config(**changes))
    load_reference(state, task.model, task.teacher, task.queue, "a checkpoint")
    return task


def test_a_reference_checkpoint_goes_in_and_comes_out_equal(recorded, tmp_path):
    task = loaded(recorded)
    torch.save({"model": to_reference(task.model, task.teacher, task.queue), "epoch": 0}, tmp_path / "out.pth")
    written = read_state_dict(tmp_path / "out.pth")
    assert written.keys() == recorded.keys()
    for name, value in recorded.items():
        assert written[name].dtype == value.dtype and torch.equal(written[name], value), name


def test_a_stripped_checkpoint_makes_the_teacher_a_copy_and_says_so(recorded, caplog):
    queues = {"image_queue", "text_queue", "queue_ptr"}
    stripped = {k: v for k, v in recorded.items() if "_m." not in k and k not in queues}
    with caplog.at_level(logging.WARNING):
        task = loaded(stripped)
    assert "no momentum copies" in caplog.text and "no queues" in caplog.text
    assert all(torch.equal(p, task.model.get_parameter(n)) for n, p in task.teacher.named_parameters())


def test_queues_of_another_length_are_left_and_named(recorded, caplog):
    with caplog.at_level(logging.WARNING):
        task = loaded(recorded, queue_size=10)
    assert "(48, 16), this run's (10, 16)" in caplog.text
    torch.testing.assert_close(task.queue.image.norm(dim=1), torch.ones(10))


def test_a_prefix_of_ddp_is_taken_off(recorded):
    task = loaded({f"module.{k}": v for k, v in recorded.items()})
    assert torch.equal(task.model.itm_head.weight, recorded["itm_head.weight"])


def test_another_models_checkpoint_is_refused_with_names(recorded):
    small = Pretraining(tiny_model())
    with pytest.raises(
        WeightsError, match="not a checkpoint of this model .*cls_token is \\(1, 1, 32\\), the model has \\(1, 1, 24\\)"
    ):
        load_reference(recorded, small.model, small.teacher, small.queue, "wrong.pth")
    with pytest.raises(WeightsError, match="missing: itm_head.weight"):
        loaded({k: v for k, v in recorded.items() if k != "itm_head.weight"})


def test_position_embeddings_fit_another_image_size(recorded):
    config = GoldenCase(GOLDEN, "pretrain").model_config()
    task = loaded(recorded, vision=config.vision.model_copy(update={"image_size": 80}))
    assert task.model.visual_encoder.pos_embed.shape == (1, 26, 32)
    assert task.teacher.visual_encoder.pos_embed.shape == (1, 26, 32)


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "bad.pth"
    torch.save({"model": Bomb()}, path)
    with pytest.raises(WeightsError, match="Nothing was executed"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightsError):
        read_state_dict(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("contents", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, contents):
    path = tmp_path / "x.pth"
    path.write_bytes(contents)
    with pytest.raises(WeightsError, match="x.pth"):
        read_state_dict(path)
    with pytest.raises(WeightsError, match="no such weights file"):
        read_state_dict(tmp_path / "absent.pth")


def stock_vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0).eval()


def stock_bert(layers: int):
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(hidden_size=24, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=40)
    config = BertConfig(vocab_size=61, max_position_embeddings=16, **sizes)
    return BertForMaskedLM(config).eval()


def test_our_checkpoint_read_by_name_gives_equal_features_in_stock_models(tmp_path):
    torch.manual_seed(0)
    task = Pretraining(tiny_model()).eval()
    torch.save({"model": to_reference(task.model, task.teacher, task.queue)}, tmp_path / "albef.pth")
    state = read_state_dict(tmp_path / "albef.pth")
    batch = tiny_batch(4)
    vit, bert = stock_vit(), stock_bert(layers=1)  # BERT's text layers only: it knows no cross-attention
    vit.load_state_dict(
        {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
    )
    named = {k.removeprefix("text_encoder."): v for k, v in state.items() if k.startswith("text_encoder.")}
    missing, _ = bert.load_state_dict(named, strict=False)
    assert not [k for k in missing if not k.startswith("cls.predictions.decoder")]

    image_embeds, image_feat = task.model.encode_image(batch.images)
    text_embeds, text_feat = task.model.encode_text(batch.text)
    theirs = vit.forward_features(batch.images)
    torch.testing.assert_close(image_embeds, theirs, atol=1e-5, rtol=1e-5)
    projected = F.linear(theirs[:, 0], state["vision_proj.weight"], state["vision_proj.bias"])
    torch.testing.assert_close(image_feat, F.normalize(projected, dim=-1), atol=1e-5, rtol=1e-5)
    starts = batch.text.cu_seqlens.tolist()
    for i, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        hidden = bert.bert(batch.text.input_ids[None, start:end]).last_hidden_state[0]
        torch.testing.assert_close(text_embeds[start:end], hidden, atol=1e-5, rtol=1e-5)
        projected = F.linear(hidden[0], state["text_proj.weight"], state["text_proj.bias"])
        torch.testing.assert_close(text_feat[i], F.normalize(projected, dim=-1), atol=1e-5, rtol=1e-5)


def test_starting_from_a_local_timm_file_and_a_local_bert_folder(tmp_path, caplog):
    torch.manual_seed(0)
    vit, bert = stock_vit(), stock_bert(layers=3)
    torch.save({"model": vit.state_dict() | {"head.weight": torch.zeros(5, 24)}}, tmp_path / "vit.pth")
    bert.save_pretrained(tmp_path / "bert")
    model = Pretraining(tiny_model()).model
    with caplog.at_level(logging.WARNING):
        load_timm(model, str(tmp_path / "vit.pth"))
        load_bert(model, str(tmp_path / "bert"))
    assert torch.equal(model.visual_encoder.blocks[1].mlp.fc2.weight, vit.blocks[1].mlp.fc2.weight)
    for layer in range(3):
        mine = model.text_encoder.bert.encoder.layer[layer].attention.self.query.weight
        assert torch.equal(mine, bert.bert.encoder.layer[layer].attention.self.query.weight)
    assert torch.equal(
        model.text_encoder.cls.predictions.transform.dense.weight, bert.cls.predictions.transform.dense.weight
    )
    # What was not loaded is said, by name.
    assert "NOT loaded, stay random" in caplog.text and "crossattention" in caplog.text
    assert "in the file but not in this model: head.weight" in caplog.text


def test_weights_that_fit_nowhere_are_refused(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="not one of its 1 tensors fits"):
        load_timm(Pretraining(tiny_model()).model, str(tmp_path / "x.pth"))
    with pytest.raises(WeightsError, match="model.text.weights: /nowhere"):
        load_bert(Pretraining(tiny_model()).model, "/nowhere/at/all")
