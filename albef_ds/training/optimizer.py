"""The optimiser and its parameter groups: AdamW as the reference has it (optim/optim_factory.py), or Muon."""

from __future__ import annotations

import re

import torch
from torch import nn

from albef_ds import optional
from albef_ds.config import ConfigError, OptimizerConfig
from albef_ds.training.muon import Muon

_IN_A_BLOCK = re.compile(r"\.(blocks|layer)\.\d+\.")  # names of vision's and BERT's blocks


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


def muon_groups(module: nn.Module, config: OptimizerConfig) -> list[dict]:
    """parameter_groups without the matrices of the transformers' blocks, which are a third group: Muon's."""
    names = {id(p): name for name, p in module.named_parameters()}
    plain, decay = parameter_groups(module, config.weight_decay)
    matrices = [p for p in decay["params"] if p.ndim == 2 and _IN_A_BLOCK.search(names[id(p)])]
    taken = {id(p) for p in matrices}
    rest = {**decay, "params": [p for p in decay["params"] if id(p) not in taken]}
    third = {"params": matrices, "weight_decay": config.weight_decay, "lr_ratio": config.muon_lr_ratio, "muon": True}
    return [group for group in (plain, rest, third) if group["params"]]


def build_optimizer(module: nn.Module, config: OptimizerConfig, fused: str = "torch") -> torch.optim.Optimizer:
    """AdamW, one pass over parameter, gradient and moments: PyTorch's, on the GPU as on the CPU, or NVIDIA apex's.

    With `optimizer.name: muon` the blocks' matrices are updated by Muon, and the rest by PyTorch's AdamW.

    Args:
        fused: "torch", or "apex" (`optimizer.fused`), which is never chosen by itself and has not been measured.

    Raises:
        ConfigError: apex is asked for where it is not usable, or beside Muon; says why.
    """
    if config.name == "muon":
        if fused != "torch":
            raise ConfigError(f"optimizer.fused is {fused}, optimizer.name muon: Muon has PyTorch's AdamW beside it")
        options = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
        return Muon(muon_groups(module, config), fused=True, **options)
    groups = parameter_groups(module, config.weight_decay)
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if fused == "apex":
        return _apex_adam()(groups, adam_w_mode=True, **options)
    if fused != "torch":
        raise ConfigError(f"optimizer.fused: expected torch or apex, got {fused!r}")
    return torch.optim.AdamW(groups, fused=True, **options)


def _apex_adam() -> type[torch.optim.Optimizer]:
    found = optional.find("apex")
    if not found.available:
        raise ConfigError(f"optimizer.fused is apex: {found.reason}; or set optimizer.fused=torch")
    if not torch.cuda.is_available():
        raise ConfigError("optimizer.fused is apex, which runs on a GPU only, and there is none: set it to torch")
    from apex.optimizers import FusedAdam

    return FusedAdam
