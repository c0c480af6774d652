"""ALBEF's text networks put together from Hugging Face's BERT, padded and with plain attention: what the packed ones in
albef_ds.model must agree with. Weights go over by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, BertModel

from albef_ds.config import TextConfig
from albef_ds.data.batch import PackedText


def bert_config(text: TextConfig, layers: int, cross: bool = False) -> BertConfig:
    return BertConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        num_hidden_layers=layers,
        num_attention_heads=text.heads,
        intermediate_size=text.mlp_width,
        max_position_embeddings=text.max_positions,
        layer_norm_eps=text.layer_norm_eps,
        is_decoder=cross,  # Hugging Face has cross-attention in decoders alone
        add_cross_attention=cross,
        use_cache=False,
        attn_implementation="eager",
    )


class PlainEncoder(nn.Module):
    """Text layers, then fusion layers; fusion layer i looks at image i % (number of images)."""

    def __init__(self, text: TextConfig, fusion_depth: int):
        super().__init__()
        self.text = BertModel(bert_config(text, text.fusion_layer), add_pooling_layer=False)
        self.fusion = BertModel(bert_config(text, fusion_depth, cross=True), add_pooling_layer=False).encoder

    @classmethod
    def like(cls, encoder) -> PlainEncoder:
        """With the weights of our TextEncoder or PairTextEncoder."""
        first = encoder.config.fusion_layer
        plain = cls(encoder.config, len(encoder.bert.encoder.layer) - first)
        state = {key.removeprefix("bert."): value for key, value in encoder.state_dict().items()}
        text, fusion = {}, {}
        for key, value in state.items():
            if key.startswith("encoder.layer.") and int(key.split(".")[2]) >= first:
                _, _, number, rest = key.split(".", 3)
                fusion[f"layer.{int(number) - first}.{rest}"] = value
            elif not key.startswith("cls."):
                text[key] = value
        load_by_name(plain.text, text)
        load_by_name(plain.fusion, fusion)
        return plain.eval().to(next(encoder.parameters()).dtype)

    def forward(self, text: PackedText, *images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, S, W], one or more a text. Hidden states [B, L, W] and the mask [B, L]."""
        ids, mask = padded(text)
        hidden = self.text(ids, attention_mask=mask).last_hidden_state
        hides = hidden_places(mask, hidden.dtype)
        for i, layer in enumerate(self.fusion.layer):
            hidden = layer(hidden, hides, encoder_hidden_states=images[i % len(images)])
        return hidden, mask


def plain_decoder(decoder) -> BertLMHeadModel:
    """With the weights of our AnswerDecoder."""
    layers = len(decoder.bert.encoder.layer)
    plain = BertLMHeadModel(bert_config(decoder.config, layers, cross=True))
    load_by_name(plain, decoder.state_dict())
    return plain.eval().to(next(decoder.parameters()).dtype)


def load_by_name(module: nn.Module, state: dict[str, Tensor]) -> None:
    """All of ours is taken; of theirs nothing stays but what is tied and the position numbers."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert not [key for key in missing if not key.startswith("cls.predictions.decoder.")], missing
    if "cls.predictions.bias" in state:
        head = module.cls.predictions.decoder
        with torch.no_grad():
            head.bias.copy_(state["cls.predictions.bias"])
            head.weight.copy_(state["bert.embeddings.word_embeddings.weight"])


def padded(text: PackedText) -> tuple[Tensor, Tensor]:
    """Ids and 0/1 mask [B, L]."""
    rows = text.input_ids.split(text.cu_seqlens.diff().tolist())
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


def hidden_places(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L] to what is added to attention scores, [B, 1, 1, L]."""
    return (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
