"""timm's ViT and Hugging Face's BERT, random weights: read by our loaders they give their own models' outputs; and ours
read by theirs do too."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForMaskedLM

from albef_ds.config import VisionConfig
from albef_ds.data.batch import PackedText
from albef_ds.model.albef import text_spans
from albef_ds.model.decoder import AnswerDecoder
from albef_ds.model.packing import FusionPlan
from albef_ds.model.pairs import PairTextEncoder
from albef_ds.model.reference_weights import to_reference
from albef_ds.model.single_modality import load_bert, load_timm
from albef_ds.model.text import TextEncoder
from albef_ds.model.weight_files import WeightsError, read_state_dict
from albef_ds.tasks.pretraining import Pretraining
from tests.plain_bert import PlainEncoder, bert_config, padded, plain_decoder
from tests.tiny import VOCABULARY, tiny_batch, tiny_model

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def stock_vit(size: int = 32):
    torch.manual_seed(1)
    vit = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=size, patch_size=8, embed_dim=24, depth=2, num_heads=2
    )
    return randomised(vit)


def stock_bert(layers: int = 3) -> BertForMaskedLM:
    torch.manual_seed(2)
    return randomised(BertForMaskedLM(bert_config(tiny_model().text, layers)))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter matters: biases and LayerNorms start at 0 and 1, where mistakes do not show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def texts(lengths: list[int], seed: int = 0) -> PackedText:
    return tiny_batch(len(lengths), seed, lengths).text


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [32, 48])
def test_timms_weights_give_timms_embeddings(size, tmp_path):
    vit = stock_vit(size)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    config = VisionConfig(image_size=size, patch_size=8, width=24, layers=2, heads=2)
    model = Pretraining(tiny_model(vision=config)).eval().model
    load_timm(model, str(tmp_path / "vit.pth"))
    images = torch.randn(3, 3, size, size)
    close(model.encode_image(images)[0], vit.forward_features(images))


@torch.no_grad()
@settings(max_examples=10, deadline=None)
@given(lengths=LENGTHS)
def test_berts_weights_give_berts_embeddings_and_words(lengths, tmp_path_factory):
    bert, folder = stock_bert(), tmp_path_factory.mktemp("bert")
    bert.save_pretrained(folder)
    model = Pretraining(tiny_model()).eval().model
    load_bert(model, str(folder))
    text = texts(lengths)
    encoder, spans = model.text_encoder, text_spans(text)
    ids, mask = padded(text)
    states = bert.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    first = encoder.config.fusion_layer
    close(encoder.encode(text.input_ids, text.position_ids, spans), states[first][mask.bool()])
    # The fusion layers without their cross-attention, which BERT does not have, are BERT's further layers.
    hidden = encoder.encode(text.input_ids, text.position_ids, spans)
    for layer in encoder.fusion_layers:
        hidden = layer(hidden, spans)
    close(hidden, states[-1][mask.bool()])
    close(encoder.predict_tokens(hidden), bert(ids, attention_mask=mask).logits[mask.bool()])


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, places=st.integers(1, 9), paired=st.booleans())
def test_fusion_layers_are_berts_with_cross_attention(lengths, places, paired):
    torch.manual_seed(3)
    kind = PairTextEncoder if paired else TextEncoder
    encoder = randomised(kind(tiny_model().text, 24))
    text, images = texts(lengths), torch.randn(2 if paired else 1, len(lengths), places, 24)
    spans = text_spans(text)
    hidden = encoder.encode(text.input_ids, text.position_ids, spans)
    expected, mask = PlainEncoder.like(encoder)(text, *images)
    plan = FusionPlan.aligned(spans)
    close(encoder.fuse(hidden, plan, images.flatten(0, 1), None), expected[mask.bool()])
    close(encoder.fuse(hidden, plan, images.flatten(0, 1), plan.first), expected[:, 0])


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(questions=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1, max_size=5))
def test_the_decoder_is_a_bert_that_writes(questions):
    torch.manual_seed(4)
    decoder = randomised(AnswerDecoder(tiny_model().text))
    answers = texts([length for _, length in questions])
    states = [torch.randn(length, 24) for length, _ in questions]
    asked = texts([length for length, _ in questions])
    spans = text_spans(answers)
    keys = decoder.project_question(torch.cat(states))
    hidden = decoder.decode(answers.input_ids, answers.position_ids, spans, keys, spans, text_spans(asked))
    ids, mask = padded(answers)
    _, question_mask = padded(asked)
    looked_at = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    expected = plain_decoder(decoder)(
        ids, attention_mask=mask, encoder_hidden_states=looked_at, encoder_attention_mask=question_mask
    ).logits
    close(decoder.predict_tokens(hidden), expected[mask.bool()])


def test_our_checkpoint_read_by_name_gives_equal_features_in_stock_models(tmp_path):
    torch.manual_seed(0)
    task = Pretraining(tiny_model()).eval()
    torch.save({"model": to_reference(task.model, task.teacher, task.queue)}, tmp_path / "albef.pth")
    state = read_state_dict(tmp_path / "albef.pth")
    batch = tiny_batch(4)
    vit, bert = stock_vit(), stock_bert(layers=1)  # BERT's text layers only: it knows no cross-attention
    visual = {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
    missing, unexpected = vit.load_state_dict(visual, strict=False)
    assert not unexpected and set(missing) == {"head.weight", "head.bias"}
    named = {k.removeprefix("text_encoder."): v for k, v in state.items() if k.startswith("text_encoder.")}
    missing, _ = bert.load_state_dict(named, strict=False)
    assert not [k for k in missing if not k.startswith("cls.predictions.decoder")]

    image_embeds, image_feat = task.model.encode_image(batch.images)
    text_embeds, text_feat = task.model.encode_text(batch.text)
    theirs = vit.forward_features(batch.images)
    close(image_embeds, theirs)
    projected = F.linear(theirs[:, 0], state["vision_proj.weight"], state["vision_proj.bias"])
    close(image_feat, F.normalize(projected, dim=-1))
    ids, mask = padded(batch.text)
    hidden = bert.bert(ids, attention_mask=mask).last_hidden_state
    close(text_embeds, hidden[mask.bool()])
    projected = F.linear(hidden[:, 0], state["text_proj.weight"], state["text_proj.bias"])
    close(text_feat, F.normalize(projected, dim=-1))


def test_what_a_local_file_and_folder_do_not_hold_is_said(tmp_path, caplog):
    torch.save({"model": stock_vit().state_dict()}, tmp_path / "vit.pth")
    stock_bert().save_pretrained(tmp_path / "bert")
    model = Pretraining(tiny_model()).model
    with caplog.at_level(logging.WARNING):
        load_timm(model, str(tmp_path / "vit.pth"))
        load_bert(model, str(tmp_path / "bert"))
    assert "NOT loaded, stay random" in caplog.text and "crossattention" in caplog.text
    assert "in the file but not in this model: head.bias, head.weight" in caplog.text


def test_berts_of_before_transformers_4_are_read_too(tmp_path):
    bert = stock_bert()
    old = {
        k.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in bert.state_dict().items()
        if k.startswith("bert.")
    }
    torch.save(old, tmp_path / "old.bin")
    model = Pretraining(tiny_model()).model
    load_bert(model, str(tmp_path / "old.bin"))
    expected = bert.bert.encoder.layer[2].attention.output.LayerNorm.weight
    assert torch.equal(model.text_encoder.bert.encoder.layer[2].attention.output.LayerNorm.weight, expected)
    assert model.text_encoder.bert.embeddings.word_embeddings.weight.shape[0] == VOCABULARY


def test_weights_that_fit_nowhere_are_refused(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="not one of its 1 tensors fits"):
        load_timm(Pretraining(tiny_model()).model, str(tmp_path / "x.pth"))
    with pytest.raises(WeightsError, match="model.text.weights: /nowhere"):
        load_bert(Pretraining(tiny_model()).model, "/nowhere/at/all")
