"""The reference's text and fusion encoder (models/xbert.py): BERT over padded texts with additive masks.

Every cross-attention projects the keys and values of its image anew, for each text that looks at it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albef_ds.config import TextConfig


def additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L] of ones and zeros to [B, 1, 1, L] of zeros and -10,000, added to the scores."""
    return (1.0 - attention_mask[:, None, None, :].to(dtype)) * -10000.0


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("position_ids", torch.arange(config.max_positions).expand(1, -1))

    def forward(self, input_ids: Tensor) -> Tensor:  # [B, L] -> [B, L, W]
        words = self.word_embeddings(input_ids) + self.token_type_embeddings(torch.zeros_like(input_ids))
        positions = self.position_embeddings(self.position_ids[:, : input_ids.shape[1]])
        return self.dropout(self.LayerNorm(words + positions))


class SelfAttention(nn.Module):
    """Multi-head attention without its output projection; to `memory` where one is given, else to x itself."""

    def __init__(self, config: TextConfig, key_width: int, sdpa: bool):
        super().__init__()
        self.heads, self.sdpa = config.heads, sdpa
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(key_width, config.width)
        self.value = nn.Linear(key_width, config.width)
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor | None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (
            linear(rows).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear, rows in ((self.query, x), (self.key, source), (self.value, source))
        )
        if self.sdpa:
            dropout = self.dropout.p if self.training else 0.0
            # Nothing of an image is padding: without its mask of zeros faster kernels may be chosen.
            mask = mask.to(q.dtype) if memory is None else None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[3]) + mask
            mixed = torch.matmul(self.dropout(scores.softmax(dim=3)), v)
        return mixed.transpose(1, 2).flatten(2)


class Output(nn.Module):
    def __init__(self, in_width: int, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(in_width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    def __init__(self, config: TextConfig, key_width: int, sdpa: bool):
        super().__init__()
        self.self = SelfAttention(config, key_width, sdpa)
        self.output = Output(config.width, config)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor | None = None) -> Tensor:
        return self.output(self.self(x, mask, memory), x)


class Intermediate(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    def __init__(self, config: TextConfig, image_width: int | None, sdpa: bool):
        super().__init__()
        self.attention = Attention(config, config.width, sdpa)
        if image_width is not None:
            self.crossattention = Attention(config, image_width, sdpa)
        self.intermediate = Intermediate(config)
        self.output = Output(config.mlp_width, config)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor | None, image_mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        if image is not None:
            x = self.crossattention(x, image_mask, image)
        return self.output(self.intermediate(x), x)


class Bert(nn.Module):
    def __init__(self, config: TextConfig, image_width: int, sdpa: bool):
        super().__init__()
        self.fusion_layer = config.fusion_layer
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            Layer(config, image_width if i >= config.fusion_layer else None, sdpa) for i in range(config.layers)
        )

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The text layers: [B, L] to [B, L, W]."""
        x = self.embeddings(input_ids)
        mask = additive_mask(attention_mask, torch.float32)
        for layer in self.encoder.layer[: self.fusion_layer]:
            x = layer(x, mask, None, None)
        return x

    def fuse(self, x: Tensor, attention_mask: Tensor, image: Tensor, image_mask: Tensor) -> Tensor:
        """The fusion layers: text i with image i. [B, L, W], [B, S, Wv] to [B, L, W]."""
        mask, image_mask = additive_mask(attention_mask, torch.float32), additive_mask(image_mask, torch.float32)
        for layer in self.encoder.layer[self.fusion_layer :]:
            x = layer(x, mask, image, image_mask)
        return x


class Predictions(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = nn.Module()
        self.transform.dense = nn.Linear(config.width, config.width)
        self.transform.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.width, config.vocab_size)
        self.decoder.bias = self.bias

    def forward(self, hidden: Tensor) -> Tensor:  # [B, L, W] -> [B, L, V]
        return self.decoder(self.transform.LayerNorm(F.gelu(self.transform.dense(hidden))))


class TextEncoder(nn.Module):
    """BERT with its MLM head, whose decoder shares the word embeddings."""

    def __init__(self, config: TextConfig, image_width: int, sdpa: bool = False):
        super().__init__()
        self.bert = Bert(config, image_width, sdpa)
        self.cls = nn.Module()
        self.cls.predictions = Predictions(config)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def predict(self, input_ids: Tensor, attention_mask: Tensor, image: Tensor, image_mask: Tensor) -> Tensor:
        """All layers and the head, at every position: [B, L, V]."""
        hidden = self.bert.read(input_ids, attention_mask)
        return self.cls.predictions(self.bert.fuse(hidden, attention_mask, image, image_mask))
