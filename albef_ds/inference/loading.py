"""From a checkpoint to a model that can be used: `load`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from albef_ds.config import Config, ModelConfig
from albef_ds.data.tokenizer import CaptionTokenizer, load_tokenizer
from albef_ds.inference.model import Albef
from albef_ds.inference.stored import Stored, read_stored
from albef_ds.model.albef import ALBEF
from albef_ds.model.answering import Answering
from albef_ds.model.classifier import Classifier
from albef_ds.model.reference_weights import load_reference
from albef_ds.model.weight_files import WeightsError
from albef_ds.tasks.entailment import Entailment
from albef_ds.tasks.nlvr import NLVR


def load(
    source: str | Path,
    *,
    task: str | None = None,
    config: Config | ModelConfig | str | Path | None = None,
    tokenizer: CaptionTokenizer | str | Path | None = None,
    device: torch.device | str | None = None,
) -> Albef:
    """A trained model. Nothing is unpickled but tensors.

    Args:
        source: a run's folder; a .pth or .safetensors file in the reference's form, of pre-training or of any
            fine-tuning task; or a folder, or a name on the hub, in Hugging Face's form.
        task: None: what the folder says, or the weights themselves.
        config: the sizes of the model, or a recipe with them; None: what the folder says, or the shapes of the weights.
        tokenizer: also a vocab.txt, a folder or a name; None: what lies with the weights, or bert-base-uncased where
            the model has its 30,522 words.
        device: None: a GPU where there is one.

    Raises:
        WeightsError: no such checkpoint, or of another model. TokenizerError: no such vocabulary.
    """
    stored = read_stored(source, task, config)
    network = build_network(stored)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Albef(stored.config, network.to(device), tokenizer_for(stored, tokenizer), device, stored.name)


def build_network(stored: Stored) -> nn.Module:
    """The network of its task with its weights, on the CPU."""
    model = stored.config.model
    build = {
        "pretraining": lambda: ALBEF(model, mlm_head=True),
        "retrieval": lambda: ALBEF(model, mlm_head=False),
        "grounding": lambda: ALBEF(model, mlm_head=False),
        "vqa": lambda: Answering(model),
        "entailment": lambda: Classifier(model, Entailment.classes, Entailment.images_per_text),
        "nlvr": lambda: Classifier(model, NLVR.classes, NLVR.images_per_text),
    }.get(stored.config.task)
    if build is None:
        raise WeightsError(f"{stored.name}: a checkpoint of {stored.config.task} answers nothing by itself")
    network = build()
    load_reference(stored.state, network, None, None, stored.name)
    return network.eval()


def tokenizer_for(stored: Stored, given: CaptionTokenizer | str | Path | None = None) -> CaptionTokenizer:
    """Raises WeightsError where none is known, or where it has words that the model has not."""
    if isinstance(given, CaptionTokenizer):
        tokenizer = given
    elif given is None and stored.tokenizer is None:
        raise WeightsError(
            f"{stored.name}: its vocabulary is not known (it has {stored.config.model.text.vocab_size:,} words): put "
            "vocab.txt or tokenizer.json beside it, or pass tokenizer"
        )
    else:
        tokenizer = load_tokenizer(given or stored.tokenizer, stored.config.data.sep_token)
    words = stored.config.model.text.vocab_size
    if tokenizer.vocab_size > words:
        raise WeightsError(
            f"{stored.name}: the model has {words:,} words, the tokenizer {tokenizer.vocab_size:,}: another model's"
        )
    return tokenizer
