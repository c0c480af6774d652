"""The reference's image encoder (models/vit.py): pre-norm ViT, attention written out, weights in timm's names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albef_ds.config import VisionConfig


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, sdpa: bool):
        super().__init__()
        self.heads, self.sdpa = heads, sdpa
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, W]
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.sdpa:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = torch.matmul(q, k.transpose(2, 3)) * (width // self.heads) ** -0.5
            mixed = torch.matmul(scores.softmax(dim=3), v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig, sdpa: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads, sdpa)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, R, R] -> [B, patches, W]
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionEncoder(nn.Module):
    """[B, 3, R, R] to [B, 1 + patches, W], [CLS] first."""

    def __init__(self, config: VisionConfig, sdpa: bool = False):
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, config.width))
        self.blocks = nn.ModuleList(Block(config, sdpa) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
