"""AdamW and its parameter groups, as the reference has them (optim/optim_factory.py)."""

from __future__ import annotations

import torch
from torch import nn

from albef_ds.config import OptimizerConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """No decay for biases and one-dimensional parameters; decay for all else.

    The temperature decays too: in the reference it has no dimension at all, and so is not one-dimensional; ours has the
    shape [1] only because DeepSpeed cannot hold a parameter without a dimension.
    """
    decay, no_decay = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_temperature = name.rsplit(".", 1)[-1] == "temp"
        plain = (parameter.ndim == 1 or name.endswith(".bias")) and not is_temperature
        (no_decay if plain else decay).append(parameter)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """PyTorch's AdamW, fused: one pass over parameter, gradient and moments, on the GPU as on the CPU."""
    groups = parameter_groups(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
