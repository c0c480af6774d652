"""Weights of one modality to start from: timm's ViT, Hugging Face's BERT. Whatever could not be loaded is said."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from albef_ds.model.vision import fit_position_embeddings
from albef_ds.model.weight_files import WeightsError, few, read_state_dict

log = logging.getLogger(__name__)


def load_timm(student: nn.Module, name: str) -> None:
    """Image encoder weights: timm's name (`deit_base_patch16_224`) or a local file; the classifier head is left out."""
    if Path(name).exists():
        state = read_state_dict(name)
    else:
        import timm

        try:
            state = timm.create_model(name, pretrained=True).state_dict()
        except Exception as error:  # timm and the hub raise many kinds; all mean the same to the user
            raise WeightsError(
                f"model.vision.weights: {name}: neither a local file nor to be had from timm ({error})"
            ) from error
    state = fit_position_embeddings(state, student.visual_encoder)
    _load_loosely(student.visual_encoder, state, f"image encoder from {name}")


def load_bert(student: nn.Module, name: str) -> None:
    """Text encoder weights: Hugging Face's name (`bert-base-uncased`) or a local folder or file; cross-attention stays
    random, as there is none in BERT."""
    if Path(name).is_file():
        state = read_state_dict(name)
    else:
        from transformers import BertForMaskedLM

        try:
            state = BertForMaskedLM.from_pretrained(name).state_dict()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise WeightsError(
                f"model.text.weights: {name}: neither a local folder nor to be had from the hub ({reason})"
            ) from error
    # Files written before transformers 4 name LayerNorm's parameters gamma and beta, and drop the leading `bert.`.
    state = {
        k.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): v
        for k, v in state.items()
    }
    if not any(k.startswith("bert.") for k in state):
        state = {f"bert.{k}": v for k, v in state.items()}
    _load_loosely(student.text_encoder, state, f"text encoder from {name}")


def _load_loosely(module: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads what fits by name and shape and says loudly what did not."""
    expected = module.state_dict()
    fits = {k: v for k, v in state.items() if k in expected and v.shape == expected[k].shape}
    misshapen = [
        f"{k} {tuple(v.shape)} for {tuple(expected[k].shape)}"
        for k, v in state.items()
        if k in expected and v.shape != expected[k].shape
    ]
    if not fits:
        raise WeightsError(f"{source}: not one of its {len(state)} tensors fits this model by name and shape")
    module.load_state_dict(fits, strict=False)
    left = sorted(expected.keys() - fits.keys())
    log.warning("%s: loaded %d of %d tensors", source, len(fits), len(expected))
    for what, names in (("NOT loaded, stay random", left), ("of another shape", misshapen)):
        if names:
            log.warning("%s: %s: %s", source, what, few(names))
    unused = sorted(state.keys() - expected.keys())
    if unused:
        log.warning("%s: in the file but not in this model: %s", source, few(unused))
