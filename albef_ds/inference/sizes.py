"""What a bare file of weights is: of which task, and of a model of which size. Names and shapes tell all but heads."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping

from pydantic import ValidationError
from torch import Tensor

from albef_ds.config import ModelConfig, TextConfig, VisionConfig
from albef_ds.model.weight_files import WeightsError, few

log = logging.getLogger(__name__)

HEAD_WIDTH = 64  # of every ViT and BERT that the paper uses

State = Mapping[str, Tensor]
_SHARED_BY_TWO = re.compile(r"(text_encoder\S*?\.layer\.)(\d+)(\.crossattention\.self\.(?:key|value)\.\w+)$")


def plain_names(state: State) -> dict[str, Tensor]:
    """Without the prefix that DistributedDataParallel leaves."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def with_shared(state: State) -> dict[str, Tensor]:
    """Both names of a tensor that has two, of which safetensors' save_model keeps one: the word embeddings and the MLM
    head's decoder, and in NLVR2 what the two layers of a pair share."""
    whole = dict(state)
    for key, value in state.items():
        if key.endswith(".cls.predictions.decoder.weight"):
            whole.setdefault(key.replace(".cls.predictions.decoder.", ".bert.embeddings.word_embeddings."), value)
    if "cls_head.2.weight" in state and state["cls_head.2.weight"].shape[0] == 2:
        for key in [k for k in state if _SHARED_BY_TWO.match(k)]:
            prefix, layer, rest = _SHARED_BY_TWO.match(key).groups()
            first = min(_numbers(state, rf"{re.escape(prefix)}(\d+)\.crossattention\."))
            partner = first + ((int(layer) - first) ^ 1)  # layers first and first + 1 are a pair, and so on
            whole.setdefault(f"{prefix}{partner}{rest}", state[key])
    return whole


def task_of(state: State, source: str) -> str:
    """The task by the parts that only it has; grounding is retrieval's network, and is called so.

    Raises:
        WeightsError: no checkpoint of ALBEF, or of a step between tasks that answers nothing.
    """
    parts = {key.split(".", 1)[0] for key in state}
    if not {"visual_encoder", "text_encoder"} <= parts:
        raise WeightsError(
            f"{source}: no checkpoint of ALBEF: expected weights named visual_encoder.… and text_encoder.…, found "
            f"{few(sorted(parts))}"
        )
    if "text_decoder" in parts:
        return "vqa"
    if "ta_head" in parts:
        raise WeightsError(f"{source}: text assignment only prepares for NLVR2: fine-tune from it (recipe nlvr2)")
    if "cls_head.2.weight" in state:
        classes = state["cls_head.2.weight"].shape[0]
        if classes not in (2, 3):
            raise WeightsError(f"{source}: a classifier of {classes} classes; expected 3 (entailment) or 2 (NLVR2)")
        return "entailment" if classes == 3 else "nlvr"
    if "itm_head" in parts:
        return "pretraining" if any(key.startswith("text_encoder.cls.") for key in state) else "retrieval"
    raise WeightsError(
        f"{source}: no head to tell its task by: expected one of itm_head, cls_head, text_decoder among {few(parts)}"
    )


def model_of(state: State, task: str, source: str) -> ModelConfig:
    """The sizes in the shapes of the weights. Heads leave no trace in them: width / 64 is taken, and the log says so.

    Raises:
        WeightsError: a weight that every ALBEF has is missing, or the sizes do not go together.
    """
    try:
        vision, text = _vision(state), _text(state, task)
        changes = {"embed_dim": state["vision_proj.weight"].shape[0]} if "vision_proj.weight" in state else {}
        if "image_queue" in state:
            changes["queue_size"] = state["image_queue"].shape[1]
        config = ModelConfig(vision=vision, text=text, **changes)
    except KeyError as error:
        raise WeightsError(f"{source}: no checkpoint of ALBEF: {error.args[0]} is missing") from None
    except (ValidationError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise WeightsError(f"{source}: its sizes cannot be told from its weights ({reason}): pass config") from None
    log.warning(
        "%s: %s; image encoder of %d layers, width %d, %d pixels; text encoder of %d layers, width %d. Attention heads "
        "leave no trace in weights: taken to be width / %d, %d and %d (pass config where that is wrong)",
        source,
        task,
        *(vision.layers, vision.width, vision.image_size, text.layers, text.width),
        *(HEAD_WIDTH, vision.heads, text.heads),
    )
    return config


def _vision(state: State) -> VisionConfig:
    positions = state["visual_encoder.pos_embed"]  # [1, 1 + patches, W]
    patch, width = state["visual_encoder.patch_embed.proj.weight"].shape[-1], positions.shape[2]
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1:
        raise ValueError(f"{positions.shape[1] - 1} patches make no square")
    return VisionConfig(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        layers=_depth(state, r"visual_encoder\.blocks\.(\d+)\."),
        heads=_heads("image", width),
        mlp_ratio=state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0] / width,
    )


def _text(state: State, task: str) -> TextConfig:
    bert = "text_encoder.bert" if "text_encoder.bert.embeddings.word_embeddings.weight" in state else "text_encoder"
    vocabulary, width = state[f"{bert}.embeddings.word_embeddings.weight"].shape
    layer = rf"{re.escape(bert)}\.encoder\.layer\.(\d+)\."
    crossing = _numbers(state, rf"{layer}crossattention\.")
    if not crossing:
        raise ValueError("no layer of the text encoder looks at an image")
    first, depth = min(crossing), _depth(state, layer)
    return TextConfig(
        vocab_size=vocabulary,
        width=width,
        layers=first + (depth - first) // 2 if task == "nlvr" else depth,  # NLVR2 has every fusion layer twice
        fusion_layer=first,
        heads=_heads("text", width),
        mlp_width=state[f"{bert}.encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_positions=state[f"{bert}.embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=state[f"{bert}.embeddings.token_type_embeddings.weight"].shape[0],
    )


def _heads(which: str, width: int) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(f"the {which} encoder's width {width} is no multiple of {HEAD_WIDTH}: its heads are unknown")
    return width // HEAD_WIDTH


def _numbers(state: State, pattern: str) -> set[int]:
    found = (re.match(pattern, key) for key in state)
    return {int(match[1]) for match in found if match}


def _depth(state: State, pattern: str) -> int:
    return max(_numbers(state, pattern), default=-1) + 1
