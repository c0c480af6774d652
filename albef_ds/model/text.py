"""The text and fusion encoder: BERT over packed tokens, in Hugging Face's parameter names.

The first `fusion_layer` layers read the text alone; each of the others also attends to an image. The keys and values of
an image depend on the image only, so they are projected once, for all fusion layers in one matrix product, and every
text that looks at the image shares them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from albef_ds.config import TextConfig
from albef_ds.model.attention import attention
from albef_ds.model.packing import FusionPlan, Rows
from albef_ds.model.spans import Spans


class BertEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:  # [T], [T] -> [T, W]
        embeddings = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(embeddings + self.position_embeddings(position_ids)))


class Projections(nn.Module):
    """query, key and value (the `self` of Hugging Face's BertAttention)."""

    def __init__(self, width: int, key_width: int):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(key_width, width)
        self.value = nn.Linear(key_width, width)


class ResidualOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual)."""

    def __init__(self, in_width: int, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(in_width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertAttention(nn.Module):
    def __init__(self, config: TextConfig, key_width: int, backend: str, causal: bool = False):
        super().__init__()
        self.self = Projections(config.width, key_width)
        self.output = ResidualOutput(config.width, config)
        self.heads = config.heads
        self.dropout_p = config.attention_dropout
        self.backend = backend
        self.causal = causal

    def forward(self, x: Tensor, spans: Spans, keys: Tensor, values: Tensor, key_spans: Spans) -> Tensor:
        """x [T, W] attends to keys and values [S, W]; run i of `spans` to run i of `key_spans`."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.self.query(x), keys, values))
        dropout = self.dropout_p if self.training else 0.0
        out = attention(q, k, v, spans, key_spans, dropout, self.backend, causal=self.causal)
        return self.output(out.flatten(1), x)


class Intermediate(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))  # the exact, erf form, as BERT has it


class BertLayer(nn.Module):
    """Self-attention, in fusion layers cross-attention, feed-forward; each with its residual and LayerNorm."""

    def __init__(self, config: TextConfig, key_width: int | None, backend: str, causal: bool = False):
        super().__init__()
        self.attention = BertAttention(config, config.width, backend, causal)
        if key_width is not None:
            self.crossattention = BertAttention(config, key_width, backend)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.mlp_width, config)

    def forward(
        self,
        x: Tensor,
        spans: Spans,
        image: tuple[Tensor, Tensor] | None = None,
        groups: Spans | None = None,
        image_spans: Spans | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """x [T, W] to [T, W], or to [R, W] where only `rows` are wanted.

        Args:
            image: this layer's keys and values [I * S, W]; None in a text layer.
            groups: run i is the texts that look at image i.
        """
        projections = self.attention.self
        keys, values, text = projections.key(x), projections.value(x), spans
        if rows is not None:
            x, spans, groups = x.index_select(0, rows.index), rows.spans, rows.groups
        x = self.attention(x, spans, keys, values, text)
        if image is not None:
            x = self.crossattention(x, groups, *image, image_spans)
        return self.output(self.intermediate(x), x)


class BertModel(nn.Module):
    def __init__(self, config: TextConfig, layers: list[BertLayer]):
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(layers)


class PredictionHead(nn.Module):
    """The MLM head; its decoder shares the word embeddings' weight, given by the caller."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.transform = nn.Module()
        self.transform.dense = nn.Linear(config.width, config.width)
        self.transform.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:  # [P, W], [V, W] -> [P, V]
        hidden = self.transform.LayerNorm(F.gelu(self.transform.dense(hidden)))
        return F.linear(hidden, word_embeddings, self.bias)


class PackedBert(nn.Module):
    """What the encoder and the answer decoder share: layers over packed tokens [T, W], and cross-attention's keys and
    values projected for all layers at once."""

    def __init__(self, config: TextConfig, layers: list[BertLayer], prediction_head: bool):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, layers)
        if prediction_head:
            self.cls = nn.Module()
            self.cls.predictions = PredictionHead(config)
        self.checkpointing = False
        self.apply(_init)

    def embed(self, input_ids: Tensor, position_ids: Tensor, spans: Spans) -> Tensor:
        if spans.max_length > self.config.max_positions:
            raise ValueError(
                f"a text of {spans.max_length} tokens does not fit model.text.max_positions = "
                f"{self.config.max_positions}; lower data.max_tokens"
            )
        return self.bert.embeddings(input_ids, position_ids)

    def run(self, layer: nn.Module, *inputs) -> Tensor:
        """A layer, its activations recomputed in the backward pass where that is wanted."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def cross(
        self,
        layers: nn.ModuleList,
        hidden: Tensor,
        plan: FusionPlan,
        keys: list[tuple[Tensor, Tensor]],
        key_spans: Spans,
        rows: Tensor | None,
    ) -> Tensor:
        """Layers with cross-attention, the last one for the wanted rows [R] alone; [R, W], in the order of `rows`, or
        all [T, W] where rows is None.

        Args:
            hidden: [T, W] text embeddings, laid out as the plan says.
            keys: every layer's keys and values [K, W]; run i of `key_spans` is what group i of the plan looks at.
        """
        wanted = None if rows is None else plan.select(rows)
        last = len(keys) - 1
        for i, (layer, there) in enumerate(zip(layers, keys, strict=True)):
            only = wanted if i == last else None
            hidden = self.run(layer, hidden, plan.spans, there, plan.groups, key_spans, only)
        return hidden if wanted is None else hidden.index_select(0, wanted.place)

    def predict_tokens(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary [P, V] of hidden states [P, W]."""
        return self.cls.predictions(hidden, self.bert.embeddings.word_embeddings.weight)


class TextEncoder(PackedBert):
    """BERT split into text and fusion layers, with its MLM head. Everything is packed: [T, W], no padding."""

    images_per_text = 1

    def __init__(self, config: TextConfig, image_width: int, backend: str = "auto", mlm_head: bool = True):
        if not 0 < config.fusion_layer < config.layers:
            raise ValueError(
                f"model.text.fusion_layer {config.fusion_layer} must lie between 1 and layers - 1 = {config.layers - 1}"
            )
        text = [BertLayer(config, None, backend) for _ in range(config.fusion_layer)]
        fusion = [BertLayer(config, image_width, backend) for _ in range(self.fusion_depth(config))]
        super().__init__(config, text + fusion, mlm_head)

    @staticmethod
    def fusion_depth(config: TextConfig) -> int:
        return config.layers - config.fusion_layer

    @property
    def text_layers(self) -> nn.ModuleList:
        return self.bert.encoder.layer[: self.config.fusion_layer]

    @property
    def fusion_layers(self) -> nn.ModuleList:
        return self.bert.encoder.layer[self.config.fusion_layer :]

    def encode(self, input_ids: Tensor, position_ids: Tensor, spans: Spans) -> Tensor:
        """The text layers: [T] ids to [T, W] embeddings."""
        hidden = self.embed(input_ids, position_ids, spans)
        for layer in self.text_layers:
            hidden = self.run(layer, hidden, spans)
        return hidden

    def project_image(self, image_embeds: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Spans]:
        """[I, S, Wv] to every fusion layer's keys and values [I * S, W], in one matrix product, and their spans."""
        spans = Spans.equal(image_embeds.shape[0], image_embeds.shape[1], image_embeds.device)
        return project_keys(self.fusion_layers, image_embeds.flatten(0, 1)), spans

    def fuse(self, hidden: Tensor, plan: FusionPlan, image_embeds: Tensor, rows: Tensor | None) -> Tensor:
        """The fusion layers.

        Args:
            hidden: [T, W] text embeddings, laid out as the plan says.
            image_embeds: [I, S, Wv].
            rows: [R] int64, the rows whose result is wanted. The last layer computes these alone. None: all.

        Returns:
            [R, W], in the order of `rows`.
        """
        keys, spans = self.project_image(image_embeds)
        return self.cross(self.fusion_layers, hidden, plan, keys, spans, rows)


def project_keys(layers: Sequence[BertLayer], states: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What cross-attention looks at, [K, Wk], to every layer's keys and values [K, W], in one matrix product."""
    projections = [layer.crossattention.self for layer in layers]
    linears = [linear for p in projections for linear in (p.key, p.value)]
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    parts = F.linear(states, weight, bias).chunk(len(linears), dim=-1)
    return list(zip(parts[::2], parts[1::2], strict=True))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
