"""A checkpoint from one form to another: the reference's file, Hugging Face's folder, a run. The tensors stay the same
to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from albef_ds.config import Config, ModelConfig, load_config
from albef_ds.data.files import write_atomically
from albef_ds.data.tokenizer import CaptionTokenizer
from albef_ds.inference.loading import tokenizer_for
from albef_ds.inference.model import Albef
from albef_ds.inference.model_card import model_card
from albef_ds.inference.stored import (
    CONFIG_FILE,
    RUN_FILE,
    RUN_WEIGHTS,
    WEIGHTS_FILE,
    Stored,
    read_stored,
    standalone,
    tokenizer_of_run,
)
from albef_ds.model.reference_weights import IDS_KEY, PARTS, QUEUE_KEYS, to_reference
from albef_ds.model.weight_files import WeightsError
from albef_ds.training.checkpoint_manifest import CheckpointError, verify
from albef_ds.training.export import export_checkpoint, load_task, newest_of, reference_state
from albef_ds.training.restore import MODEL_FILE
from albef_ds.training.retention import complete_folders

FILES = (".pth", ".pt", ".bin", ".safetensors")
KEPT_DATA = {"sep_token", "max_words", "max_tokens"}  # of the recipe: what a text has to go through


def convert(
    source: str | Path,
    out: str | Path,
    *,
    with_teacher: bool = True,
    tokenizer: CaptionTokenizer | str | Path | None = None,
    config: Config | ModelConfig | str | Path | None = None,
    licence: str = "unknown",
) -> Path:
    """Writes `source`, whatever its form (see `load`; also RUN/checkpoints/step_…), as `out`.

    Args:
        out: .pth, as the reference has it; .safetensors; or without a suffix, a folder in Hugging Face's form. Of a run
            a file gets the newest checkpoint, a folder what the run wrote at its end, with its metrics, if it did.
        with_teacher: also the momentum copies and the queues, where the source has them.
        tokenizer, config: where the source does not say them, as for `load`.
        licence: of the weights, for the model card.

    Raises:
        WeightsError, CheckpointError: no source that can be used. FileExistsError: the folder has something in it.
    """
    source, out = Path(source), Path(out)
    to_file = out.suffix in FILES
    if out.suffix and not to_file and not out.is_dir():
        raise WeightsError(f"{out}: expected {', '.join(FILES)}, or a name without a suffix for a folder")
    if _is_training(source) and (to_file or not (source / RUN_WEIGHTS).is_file()):
        if to_file:
            return export_checkpoint(source, out, with_teacher=with_teacher)
        stored = _of_training(source)
    else:
        stored = read_stored(source, config=config)
    state = stored.state if with_teacher else without_teacher(stored.state)
    if to_file:
        return write_file(state, out)
    return write_folder(stored, state, out, tokenizer_for(stored, tokenizer), licence)


def save(model: Albef, out: str | Path, licence: str = "unknown") -> Path:
    """A loaded model, as convert writes it; a loaded model has no teacher."""
    stored = Stored(model.name, to_reference(model.network), model.config, None, {})
    out = Path(out)
    if out.suffix in FILES:
        return write_file(stored.state, out)
    return write_folder(stored, stored.state, out, model.tokenizer, licence)


def without_teacher(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    apart = {f"{part}_m" for part in PARTS} | QUEUE_KEYS | {IDS_KEY}
    return {key: value for key, value in state.items() if key.split(".", 1)[0] not in apart}


def write_file(state: Mapping[str, Tensor], out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    # A tensor under two names is stored twice: safetensors allows no sharing.
    state = {key: value.detach().clone().contiguous() for key, value in state.items()}
    if out.suffix == ".safetensors":
        from safetensors.torch import save_file

        part.touch()
        mode = part.stat().st_mode  # save_file lets nobody else read what it writes
        save_file(state, part, metadata={"format": "pt"})
        part.chmod(mode)
    else:
        torch.save({"model": state}, part)
    os.replace(part, out)
    return out


def write_folder(
    stored: Stored, state: Mapping[str, Tensor], out: Path, tokenizer: CaptionTokenizer, licence: str
) -> Path:
    """Hugging Face's form: config.json, model.safetensors, the tokenizer's files, README.md."""
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out}: the folder is not empty; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    config = standalone(stored.config, state)
    write_file(state, out / WEIGHTS_FILE)
    _write_tokenizer(tokenizer, out)
    momentum = any(key.split(".", 1)[0].endswith("_m") for key in state)
    card = model_card(out.name, config, stored.metrics, licence, momentum)
    write_atomically(out / "README.md", card)
    content = {
        "model_type": "albef",
        "architectures": ["ALBEF"],
        "task": config.task,
        "model": config.model.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json", include=KEPT_DATA) | {"sep_token": tokenizer.sep_token},
        "evaluation": config.evaluation.model_dump(mode="json"),
        "metrics": dict(stored.metrics),
    }
    write_atomically(out / CONFIG_FILE, json.dumps(content, indent=2) + "\n")  # last: without it, it is no such folder
    return out


def _write_tokenizer(tokenizer: CaptionTokenizer, out: Path) -> None:
    tokenizer.tokenizer.save(str(out / "tokenizer.json"))
    words = sorted(tokenizer.tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if [place for _, place in words] == list(range(len(words))):
        write_atomically(out / "vocab.txt", "".join(f"{word}\n" for word, _ in words))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    settings |= {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    write_atomically(out / "tokenizer_config.json", json.dumps(settings | {"mask_token": "[MASK]"}, indent=2) + "\n")


def _is_training(source: Path) -> bool:
    """A checkpoint of a run, or a folder that has one."""
    if (source / CONFIG_FILE).is_file():
        return False
    return (source / MODEL_FILE).is_file() or any(complete_folders(f) for f in (source / "checkpoints", source))


def _of_training(source: Path) -> Stored:
    folder = newest_of(source)
    manifest = verify(folder)
    task = load_task(folder, manifest)
    run = next((f for f in (source, *source.resolve().parents[:2]) if (f / RUN_FILE).is_file()), None)
    try:
        if manifest.config is not None:
            config = Config.model_validate(manifest.config)
        elif run is not None:
            config = load_config(run / RUN_FILE)
        else:
            config = Config(task=manifest.identity["task"], model=task.config)
    except ValidationError as error:
        raise CheckpointError(f"{folder}: its configuration is not one that this version knows: {error}") from None
    state = reference_state(task)
    tokenizer = config.data.tokenizer if run is None else tokenizer_of_run(run, config)
    return Stored(str(source), state, standalone(config, state), tokenizer, {})
