"""Checkpoints of the reference, of pre-training and of every fine-tuning task, read and written.

The modules here carry the reference's names, with one exception: its fine-tuning tasks call the text encoder's layers
`text_encoder.encoder...`, its pre-training `text_encoder.bert.encoder...`, which is what ours are always called. Where
a task starts from another task's checkpoint, its weights are arranged as the reference arranges them: the answer
decoder starts as the fusion layers (VQA.py), the paired layers of NLVR2 as two of each (Pretrain_nlvr.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from albef_ds.model.queue import FeatureQueue
from albef_ds.model.teacher import Momentum
from albef_ds.model.vision import fit_position_embeddings
from albef_ds.model.weight_files import WeightsError, few

log = logging.getLogger(__name__)

State = dict[str, Tensor]

QUEUE_KEYS = {"image_queue", "text_queue", "queue_ptr"}
IDS_KEY = "idx_queue"
ENCODER, DECODER = "text_encoder", "text_decoder"
HEADS = ("cls_head", "ta_head")  # of one task alone: they start at random where another task's weights are taken
# Parts that some task of the reference has: a checkpoint may hold them for nothing.
PARTS = {"visual_encoder", "vision_proj", ENCODER, "text_proj", "temp", "itm_head", DECODER, *HEADS}


# -- reading -----------------------------------------------------------------------------------------------------------


def load_reference(
    state: Mapping[str, Tensor],
    student: nn.Module,
    teacher: Momentum | None,
    queue: FeatureQueue | None,
    source: str,
) -> None:
    """Puts a reference checkpoint, of this task or of one that comes before it, into student, teacher and queues.

    The position embeddings are resampled to this model's image size. The teacher starts as the student, after the
    student is loaded (the reference's NLVR.py copies before), and takes what momentum copies there are. Without queues,
    or with queues of another length, ours stay as they are. All of it is logged.

    Raises:
        WeightsError: weights of the student are missing, unknown or of another shape: another model's checkpoint.
    """
    state = _canonical({k.removeprefix("module."): v for k, v in state.items()})
    mine, momentum = {}, {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part.removesuffix("_m") in PARTS and part.endswith("_m"):
            momentum[f"{part.removesuffix('_m')}.{rest}"] = value
        elif part not in QUEUE_KEYS and part != IDS_KEY:
            mine[key] = value
    for part in _load(student, _arranged(mine, student), source, fresh=HEADS):
        log.warning("%s: no %s of this task: it starts at random", source, part)
    if teacher is not None:
        teacher.copy_from(student)
        momentum = _arranged(momentum, teacher)
        absent = tuple(p for p in teacher.PARTS if not any(k.startswith(f"{p}.") for k in momentum))
        if absent:
            log.warning("%s: no momentum copy of %s: it starts as a copy of the student's", source, ", ".join(absent))
        _load(teacher, momentum, source, fresh=(*HEADS, *absent))
    if queue is not None:
        _load_queue(state, queue, source)


def _canonical(state: State) -> State:
    """Our names: the encoder's layers always under `bert.`, nothing that holds no weight of its own."""
    renamed = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part.removesuffix("_m") == ENCODER and rest.split(".", 1)[0] in ("embeddings", "encoder"):
            key = f"{part}.bert.{rest}"
        # The head's decoder is tied to the word embeddings, the positions are 0, 1, 2, ...
        if ".cls.predictions.decoder." not in key and not key.endswith(".position_ids"):
            renamed[key] = value.reshape(1) if key == "temp" else value
    return renamed


def _arranged(state: State, module: nn.Module) -> State:
    """A state dict for `module` out of one for pre-training, or out of its own."""
    if not state:
        return state
    state = fit_position_embeddings(state, module.visual_encoder, "visual_encoder.")
    first_fusion = module.text_encoder.config.fusion_layer
    if hasattr(module, DECODER) and not any(k.startswith(f"{DECODER}.") for k in state):
        state |= _decoder_from_fusion_layers(state, first_fusion)
    paired = len(module.text_encoder.bert.encoder.layer)
    if paired > module.text_encoder.config.layers and _depth(state) == module.text_encoder.config.layers:
        state = _each_fusion_layer_twice(state, first_fusion)
    return state


def _decoder_from_fusion_layers(state: State, first_fusion: int) -> State:
    decoder = {}
    for key, value in state.items():
        if key.startswith(f"{ENCODER}."):
            name, layer = key.replace(ENCODER, DECODER, 1), _layer_of(key)
            if layer is None:
                decoder[name] = value
            elif layer >= first_fusion:
                decoder[_with_layer(name, layer - first_fusion)] = value
    return decoder


def _each_fusion_layer_twice(state: State, first_fusion: int) -> State:
    paired = {}
    for key, value in state.items():
        layer = _layer_of(key) if key.startswith(f"{ENCODER}.") else None
        if layer is None or layer < first_fusion:
            paired[key] = value
        else:
            for side in (0, 1):
                paired[_with_layer(key, first_fusion + 2 * (layer - first_fusion) + side)] = value
    return paired


def _layer_of(key: str) -> int | None:
    """The layer's number in `text_encoder.bert.encoder.layer.N...`."""
    parts = key.split(".")
    return int(parts[4]) if parts[1:4] == ["bert", "encoder", "layer"] else None


def _with_layer(key: str, layer: int) -> str:
    parts = key.split(".")
    return ".".join([*parts[:4], str(layer), *parts[5:]])


def _depth(state: State) -> int:
    layers = [_layer_of(key) for key in state if key.startswith(f"{ENCODER}.")]
    return 1 + max((layer for layer in layers if layer is not None), default=-1)


def _load(module: nn.Module, state: State, source: str, fresh: tuple[str, ...]) -> list[str]:
    """Loads all of a module; parts in `fresh` may be missing, or another task's, and then stay as they are: these are
    returned."""
    expected = module.state_dict()
    parts = {key.split(".", 1)[0] for key in expected}
    foreign = PARTS - parts | ({f"{ENCODER}.cls"} if not hasattr(module.text_encoder, "cls") else set())
    state = {k: v for k, v in state.items() if k.split(".", 1)[0] not in foreign and not k.startswith(tuple(foreign))}
    kept = []
    for part in fresh:
        theirs = {k: v.shape for k, v in state.items() if k.startswith(f"{part}.")}
        ours = {k: v.shape for k, v in expected.items() if k.startswith(f"{part}.")}
        if ours and theirs != ours:
            kept.append(part)
            state = {k: v for k, v in state.items() if k not in theirs} | {k: expected[k] for k in ours}
    wrong = [
        f"{k} is {tuple(v.shape)}, the model has {tuple(expected[k].shape)}"
        for k, v in state.items()
        if k in expected and v.shape != expected[k].shape
    ]
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    if missing or unknown or wrong:
        faults = [f"missing: {few(missing)}"] * bool(missing) + [f"unknown: {few(unknown)}"] * bool(unknown)
        faults += [f"wrong shape: {few(wrong)}"] * bool(wrong)
        raise WeightsError(
            f"{source}: not a checkpoint of this model ({'; '.join(faults)}). Check model.* in the recipe against it"
        )
    module.load_state_dict(state)
    return kept


def _load_queue(state: State, queue: FeatureQueue, source: str) -> None:
    if not QUEUE_KEYS <= state.keys():
        log.warning("%s: no queues: they start as random unit vectors", source)
        return
    image, text = (state[key].t() for key in ("image_queue", "text_queue"))
    if image.shape != queue.image.shape:
        log.warning(
            "%s: its queues are %s, this run's %s: they start as random unit vectors",
            source,
            tuple(image.shape),
            tuple(queue.image.shape),
        )
        return
    with torch.no_grad():
        queue.image.copy_(image)
        queue.text.copy_(text)
        queue.pointer.copy_(state["queue_ptr"].reshape(1) % queue.length)
        if queue.ids is not None and IDS_KEY in state:
            queue.ids.copy_(state[IDS_KEY].reshape(-1))


# -- writing -----------------------------------------------------------------------------------------------------------


def to_reference(student: nn.Module, teacher: Momentum | None = None, queue: FeatureQueue | None = None) -> State:
    """The state dict as the reference writes it: its names, temperature of no dimension, queues [D, M]."""
    state = _named_as_reference(student)
    if "temp" in state:
        state["temp"] = state["temp"].reshape(())
    if teacher is not None:
        for key, value in _named_as_reference(teacher).items():
            part, rest = key.split(".", 1)
            state[f"{part}_m.{rest}"] = value
    if queue is not None:
        state["image_queue"] = queue.image.float().t().contiguous()
        state["text_queue"] = queue.text.float().t().contiguous()
        state["queue_ptr"] = queue.pointer.clone()
        if queue.ids is not None:
            state[IDS_KEY] = queue.ids.reshape(1, -1)
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _named_as_reference(module: nn.Module) -> State:
    state = dict(module.state_dict())
    for part in (ENCODER, DECODER):
        if not hasattr(module, part):
            continue
        embeddings = f"{part}.bert.embeddings"
        positions = state[f"{embeddings}.position_embeddings.weight"].shape[0]
        state[f"{embeddings}.position_ids"] = torch.arange(positions).expand(1, -1)
        head = f"{part}.cls.predictions"
        if f"{head}.bias" in state:
            state[f"{head}.decoder.weight"] = state[f"{embeddings}.word_embeddings.weight"]
            state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    if not hasattr(module.text_encoder, "cls"):
        state = {k.replace(f"{ENCODER}.bert.", f"{ENCODER}.", 1): v for k, v in state.items()}
    return state
