"""Weights from elsewhere: the reference's ALBEF checkpoints (read and written), timm's ViT, Hugging Face's BERT.

Nothing is unpickled but tensors and plain containers (`weights_only=True`), and whatever could not be loaded is said.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from albef_ds.model.albef import ALBEF
from albef_ds.model.queue import FeatureQueue
from albef_ds.model.teacher import PARTS, Teacher
from albef_ds.model.vision import fit_position_embeddings

log = logging.getLogger(__name__)

STATE_KEYS = {"image_queue", "text_queue", "queue_ptr"}
# Entries of the reference's checkpoints that hold no weight of their own: the decoder is tied to the word embeddings.
TIED = {
    "text_encoder.cls.predictions.decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight",
    "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias",
}
POSITION_IDS = "text_encoder.bert.embeddings.position_ids"


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names it and says what was expected."""


# -- reading files -----------------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """A .pth/.bin/.pt (bare or under "model"/"state_dict") or .safetensors file, on the CPU.

    Raises:
        WeightsError: not there, not a weights file, or one that would run code when unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path}: not a file of plain tensors ({reason}). Nothing was executed; save it again as a state dict"
        ) from None
    for key in ("model", "state_dict", "module"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise WeightsError(f"{path}: holds no named tensors; expected a state dict, or one under the key 'model'")
    return tensors


# -- the reference's checkpoints ---------------------------------------------------------------------------------------


def load_reference(
    state: Mapping[str, Tensor], student: ALBEF, teacher: Teacher, queue: FeatureQueue, source: str
) -> None:
    """Puts a reference checkpoint into student, teacher and queues.

    The position embeddings are resampled to this model's image size. Without momentum copies the teacher starts as the
    student; without queues, or with queues of another length, ours stay as they are. Both are logged.

    Raises:
        WeightsError: weights of the student are missing, unknown or of another shape: another model's checkpoint.
    """
    state = {k.removeprefix("module."): v for k, v in state.items()}
    _load_part(student, _untie(state), source, ignore=lambda key: _is_teacher(key) or key in STATE_KEYS)
    if any(_is_teacher(key) for key in state):
        theirs = {_student_name(k): v for k, v in state.items() if _is_teacher(k)}
        _load_part(teacher, _untie(theirs), source)
    else:
        log.warning("%s: no momentum copies: the teacher starts as a copy of the student", source)
        teacher.copy_from(student)
    _load_queue(state, queue, source)


def to_reference(
    student: ALBEF, teacher: Teacher | None = None, queue: FeatureQueue | None = None
) -> dict[str, Tensor]:
    """The state dict as the reference writes it: its names, temperature of no dimension, queues [D, M]."""
    state = _named_as_reference(student.state_dict())
    state["temp"] = state["temp"].reshape(())
    if teacher is not None:
        for key, value in _named_as_reference(teacher.state_dict()).items():
            state[_teacher_name(key)] = value
    if queue is not None:
        state["image_queue"] = queue.image.float().t().contiguous()
        state["text_queue"] = queue.text.float().t().contiguous()
        state["queue_ptr"] = queue.pointer.clone()
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _named_as_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    positions = state["text_encoder.bert.embeddings.position_embeddings.weight"].shape[0]
    state[POSITION_IDS] = torch.arange(positions).expand(1, -1)
    for tied, owner in TIED.items():
        state[tied] = state[owner]
    return state


def _untie(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    drop = {*TIED, POSITION_IDS}
    state = {k: v for k, v in state.items() if k not in drop}
    if "temp" in state:
        state["temp"] = state["temp"].reshape(1)
    return state


def _is_teacher(key: str) -> bool:
    return key.split(".", 1)[0] in {f"{part}_m" for part in PARTS}


def _student_name(key: str) -> str:
    part, rest = key.split(".", 1)
    return f"{part.removesuffix('_m')}.{rest}"


def _teacher_name(key: str) -> str:
    part, rest = key.split(".", 1)
    return f"{part}_m.{rest}"


def _load_part(module: ALBEF | Teacher, state: Mapping[str, Tensor], source: str, ignore=lambda key: False) -> None:
    state = fit_position_embeddings(state, module.visual_encoder, "visual_encoder.")
    expected = module.state_dict()
    state = {k: v for k, v in state.items() if not ignore(k)}
    wrong = [
        f"{k} is {tuple(v.shape)}, the model has {tuple(expected[k].shape)}"
        for k, v in state.items()
        if k in expected and v.shape != expected[k].shape
    ]
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    if missing or unknown or wrong:
        parts = [f"missing: {_few(missing)}"] * bool(missing) + [f"unknown: {_few(unknown)}"] * bool(unknown)
        parts += [f"wrong shape: {_few(wrong)}"] * bool(wrong)
        raise WeightsError(
            f"{source}: not a checkpoint of this model ({'; '.join(parts)}). Check model.* in the recipe against it"
        )
    module.load_state_dict(state)


def _load_queue(state: Mapping[str, Tensor], queue: FeatureQueue, source: str) -> None:
    if not STATE_KEYS <= state.keys():
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


# -- single-modality weights to start from -----------------------------------------------------------------------------


def load_timm(student: ALBEF, name: str) -> None:
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


def load_bert(student: ALBEF, name: str) -> None:
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
            log.warning("%s: %s: %s", source, what, _few(names))
    unused = sorted(state.keys() - expected.keys())
    if unused:
        log.warning("%s: in the file but not in this model: %s", source, _few(unused))


def _few(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
