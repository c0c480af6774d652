"""A checkpoint as it lies somewhere, read but not yet built: weights, what they are of, and whose tokens they know.

Three forms: a run's folder, a file in the reference's form (.pth, .safetensors), and a folder, or a repository of the
hub, in Hugging Face's form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from albef_ds.config import Config, ModelConfig, load_config
from albef_ds.inference.sizes import model_of, plain_names, task_of, with_shared
from albef_ds.model.weight_files import WeightsError, read_state_dict

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # in Hugging Face's form
RUN_FILE, RUN_WEIGHTS = "config.yaml", "albef.pth"
HUB_FILES = [CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json", "vocab.txt", "README.md"]
BERT_WORDS = 30522  # of bert-base-uncased, the reference's vocabulary
VOCABULARIES = ("tokenizer.json", "vocab.txt")
# Grounding has retrieval's network, and pre-training's is that and a head more.
USABLE_AS = {"pretraining": ("pretraining", "retrieval", "grounding"), "retrieval": ("retrieval", "grounding")}


@dataclass(frozen=True)
class Stored:
    """name: of the source, for messages; tokenizer: a folder, a file or a name, as load_tokenizer takes it; None: not
    known. metrics: what a run's summary.json says; {} where it says nothing."""

    name: str
    state: Mapping[str, Tensor]  # the reference's names
    config: Config
    tokenizer: str | None
    metrics: Mapping


def read_stored(
    source: str | Path, task: str | None = None, config: Config | ModelConfig | str | Path | None = None
) -> Stored:
    """Finds out which form `source` has, and reads it.

    Args:
        task: of the checkpoint; None: what its folder or its weights say.
        config: of the checkpoint, or the recipe that it was trained with; None: what its folder says, or the shapes of
            its weights.

    Raises:
        WeightsError: there is nothing, or nothing of ALBEF's.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        stored = _folder(path)
    elif path.is_file():
        stored = _file(path, config)
    else:
        stored = _folder(_from_hub(str(source)), name=str(source))
    return replace(stored, config=_chosen(stored, task, config))


def _chosen(stored: Stored, task: str | None, config) -> Config:
    if isinstance(config, str | Path):
        config = load_config(config)
    if isinstance(config, ModelConfig):
        config = stored.config.model_copy(update={"model": config})
    config = config or stored.config
    found = task_of(stored.state, stored.name)
    usable = USABLE_AS.get(found, (found,))
    task = task or (config.task if config.task in usable else found)
    if task not in usable:
        raise WeightsError(f"{stored.name}: a checkpoint of {found}, which cannot be used as one of {task}")
    return standalone(config.model_copy(update={"task": task}), stored.state)


def standalone(config: Config, state: Mapping[str, Tensor]) -> Config:
    """Its vocabulary's size filled in, and no other weights to start from."""
    vocabulary = config.model.text.vocab_size
    if vocabulary is None:
        key = next(k for k in state if k.startswith("text_encoder.") and k.endswith("word_embeddings.weight"))
        vocabulary = state[key].shape[0]
    text = config.model.text.model_copy(update={"vocab_size": vocabulary, "weights": None})
    vision = config.model.vision.model_copy(update={"weights": None})
    model = config.model.model_copy(update={"text": text, "vision": vision, "weights": None})
    return config.model_copy(update={"model": model})


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return with_shared(plain_names(read_state_dict(path)))
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file: {_first(error)}") from None


# -- the three forms ---------------------------------------------------------------------------------------------------


def _file(path: Path, config) -> Stored:
    name = str(path)
    state = read_weights(path)
    task = task_of(state, name)
    inferred = Config(task=task) if config is not None else Config(task=task, model=model_of(state, task, name))
    beside = next((path.parent / v for v in VOCABULARIES if (path.parent / v).is_file()), None)
    words = next(v.shape[0] for k, v in state.items() if k.endswith("embeddings.word_embeddings.weight"))
    tokenizer = str(beside) if beside else inferred.data.tokenizer if words == BERT_WORDS else None
    return Stored(name, state, inferred, tokenizer, {})


def _folder(path: Path, name: str | None = None) -> Stored:
    name = name or str(path)
    if (path / CONFIG_FILE).is_file():
        return _hugging_face(path, name)
    if (path / RUN_FILE).is_file():
        return _run(path, name)
    raise WeightsError(
        f"{name}: neither a checkpoint nor a run ({RUN_FILE} and {RUN_WEIGHTS}), nor a model in Hugging Face's form "
        f"({CONFIG_FILE} and {WEIGHTS_FILE})"
    )


def _run(path: Path, name: str) -> Stored:
    if not (path / RUN_WEIGHTS).is_file():
        raise WeightsError(
            f"{name}: the run has not written {RUN_WEIGHTS}, which it does at its end; of its newest checkpoint "
            f"`python -m albef_ds convert {name} OUT.pth` makes such a file"
        )
    try:
        config = Config.model_validate(yaml.safe_load((path / RUN_FILE).read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path / RUN_FILE}: not the configuration of a run: {_first(error)}") from None
    state = read_weights(path / RUN_WEIGHTS)
    return Stored(name, state, config, tokenizer_of_run(path, config), _metrics(path / "summary.json"))


def tokenizer_of_run(path: Path, config: Config) -> str:
    """As the recipe says it; a relative path was meant from where the run was started, which may not be here."""
    named = Path(config.data.tokenizer)
    if named.exists() or not named.suffix:
        return config.data.tokenizer
    candidates = [path / named.name, path / "data" / named.name]
    return next((str(c) for c in candidates if c.is_file()), config.data.tokenizer)


def _hugging_face(path: Path, name: str) -> Stored:
    try:
        content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = content.get("model_type") if isinstance(content, dict) else None
        if kind != "albef":
            raise WeightsError(
                f"{name}: {CONFIG_FILE} is of model_type {kind!r}; expected 'albef', as convert writes it"
            )
        config = Config.model_validate({k: content[k] for k in ("task", "model", "data", "evaluation") if k in content})
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{name}: {CONFIG_FILE} cannot be used: {_first(error)}") from None
    tokenizer = str(path) if any((path / v).is_file() for v in VOCABULARIES) else None
    metrics = content.get("metrics")
    state = read_weights(path / WEIGHTS_FILE)
    return Stored(name, state, config, tokenizer, metrics if isinstance(metrics, dict) else {})


def _from_hub(name: str) -> Path:
    path = Path(name)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.suffix in (".pth", ".pt"):
        raise WeightsError(
            f"{name}: no such file or folder; expected a run's folder, a .pth or .safetensors file, a folder in "
            "Hugging Face's form, or owner/name of the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # no network, no such name, no right to it: each raises something else
        raise WeightsError(
            f"{name}: no such file or folder here, and the Hugging Face hub gave none ({type(error).__name__}: "
            f"{_first(error)})"
        ) from error


def _metrics(path: Path) -> dict:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    kept = (
        {k: v for k, v in summary.items() if isinstance(v, dict) and k != "losses"} if isinstance(summary, dict) else {}
    )
    return kept | {k: summary[k] for k in ("steps", "samples") if kept and k in summary}


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:3]) if lines else type(error).__name__
