"""The image encoder: timm's vision transformer, its attention replaced by ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.layers.attention import Attention
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from albef_ds.config import VisionConfig
from albef_ds.model.attention import self_attention
from albef_ds.model.spans import Spans


class ImageAttention(Attention):
    """timm's attention module (same parameters, same names) on `albef_ds.model.attention`."""

    backend = "auto"

    def forward(self, x: Tensor, attn_mask=None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("the image encoder attends to all patches: it takes no mask")
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch * length, 3, self.num_heads, self.head_dim)
        dropout = self.attn_drop.p if self.training else 0.0
        out = self_attention(qkv, Spans.equal(batch, length, x.device), dropout, self.backend)
        return self.proj_drop(self.proj(out.reshape(batch, length, -1)))


class PatchDrop(nn.Module):
    """Leaves out a random share of each image's patches while training, as FLIP does (Li et al., CVPR 2023).

    It stands behind the position embedding, so the patches that stay know where they are. [CLS] stays; every image
    keeps the same number. What runs without gradients sees all patches: the momentum teacher and evaluation.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:  # [B, 1 + P, W] -> [B, 1 + kept, W]
        if not (self.training and torch.is_grad_enabled()):
            return x
        batch, length, width = x.shape
        kept = max(1, round((length - 1) * (1 - self.share)))
        order = torch.rand(batch, length - 1, device=x.device).argsort(dim=1)
        index = torch.nn.functional.pad(order[:, :kept] + 1, (1, 0))  # [CLS], which is row 0, first
        return x.gather(1, index[:, :, None].expand(-1, -1, width))


def build_vision_encoder(config: VisionConfig, backend: str = "auto", token_drop: float = 0.0) -> VisionTransformer:
    """[B, 3, R, R] images to [B, 1 + patches, width] embeddings, [CLS] first, through `forward_features`.

    Args:
        token_drop: share of the patches that training leaves out (PatchDrop).
    """
    if config.image_size % config.patch_size:
        raise ValueError(
            f"model.vision.image_size {config.image_size} is not a multiple of patch_size {config.patch_size}"
        )
    encoder = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        num_classes=0,
        attn_layer=ImageAttention,
    )
    for module in encoder.modules():
        if isinstance(module, ImageAttention):
            module.backend = backend
    if token_drop:
        encoder.patch_drop = PatchDrop(token_drop)
    return encoder


def fit_position_embeddings(
    state: Mapping[str, Tensor], encoder: VisionTransformer, prefix: str = ""
) -> dict[str, Tensor]:
    """Resamples `pos_embed` of a state dict to the encoder's number of patches, as the reference does (models/vit.py:
    bicubic, no antialiasing; [CLS] kept). All else is passed on as it is."""
    state = dict(state)
    key = f"{prefix}pos_embed"
    if key in state and state[key].shape[1] != encoder.pos_embed.shape[1]:
        state[key] = resample_abs_pos_embed(
            state[key].to(torch.float32), list(encoder.patch_embed.grid_size), antialias=False
        )
    return state
