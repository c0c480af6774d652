"""Reads a DeepSpeed configuration and refuses what DeepSpeed would accept in silence.

DeepSpeed 0.19 passes over top-level keys it does not know, and over some nested ones ("torch_autocast": {"enabld": …}
trains in fp32 without a word). What it knows is not kept in a list here, which would age: its own parser is run on a
dictionary that notes which keys are asked for, and a key nobody asked for is unknown.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.utils import logger as deepspeed_logger
from pydantic import ValidationError

from albef_ds.quiet import only_errors

COMMENT = "_comment"  # JSON has no comments; this top-level key is dropped when reading

AUTO = "auto"  # what Hugging Face's configurations write for "decided elsewhere"
BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
ANY_BATCH = {"train_micro_batch_size_per_gpu": 1}  # DeepSpeed's parser insists on a size
# Numbers of the recipe, not of the machine: given here they would be lost, or win against the recipe, unseen.
RECIPE_DECIDES = {
    "gradient_clipping": "set train.clip in the recipe",
    "optimizer": "set optimizer.* in the recipe",
    "scheduler": "set schedule.* in the recipe",
}
ROUNDED = (
    "would keep parameters in 16 bits, and with them the teacher and the temperature: an average that moves by "
    "0.5 % a step does not move at all there. Use torch_autocast: bf16 arithmetic, fp32 parameters"
)


class DeepSpeedConfigError(ValueError):
    """A DeepSpeed configuration that cannot be used; the message names file, key and remedy."""


def load_deepspeed_config(path: str | Path, *, allow_low_precision_params: bool = False) -> dict:
    """The content of a DeepSpeed JSON file, checked.

    Batch sizes are best left out (the recipe decides them); given ones are compared with the recipe's by the engine.

    Args:
        allow_low_precision_params: let bf16.enabled, fp16.enabled and 16-bit buffers pass; for experiments.

    Raises:
        DeepSpeedConfigError: unreadable file, bad JSON (line and column), unknown or misplaced key, ZeRO stage 3,
            parameters in 16 bits, or a value DeepSpeed's own models refuse.
    """
    path = Path(path)
    config = _read(path)
    config.pop(COMMENT, None)
    for key, remedy in RECIPE_DECIDES.items():
        if config.get(key, AUTO) != AUTO:
            raise DeepSpeedConfigError(f"{path}: remove '{key}' and {remedy}")
    config = {k: v for k, v in config.items() if v != AUTO}
    _check_keys_and_values(path, config)
    _check_stage(path, config)
    if not allow_low_precision_params:
        _check_precision(path, config)
    return config


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DeepSpeedConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DeepSpeedConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        config = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError as error:
        raise DeepSpeedConfigError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    except KeyError as error:
        raise DeepSpeedConfigError(f"{path}: key '{error.args[0]}' occurs twice") from error
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond what Python reads
        raise DeepSpeedConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise DeepSpeedConfigError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _refuse_duplicates(pairs: list) -> dict:
    seen = {}
    for key, value in pairs:
        if key in seen:
            raise KeyError(key)
        seen[key] = value
    return seen


class _Watched(dict):
    """A dictionary that notes which keys were asked for."""

    def __init__(self, items: dict) -> None:
        super().__init__({k: _Watched(v) if isinstance(v, dict) else v for k, v in items.items()})
        self.asked: set[str] = set()

    def __copy__(self) -> _Watched:  # DeepSpeed parses a copy: it takes its notes in our book
        twin = _Watched({})
        dict.update(twin, self.items())
        twin.asked = self.asked
        return twin

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __iter__(self):  # makes Model(**section) ask for each key by name; such models refuse unknown ones themselves
        return super().__iter__()

    def keys(self):
        return self  # so that `key in section.keys()` is noted too


def _check_keys_and_values(path: Path, config: dict) -> None:
    watched = _Watched({k: v for k, v in config.items() if k not in BATCH_SIZES} | ANY_BATCH)
    failure = None
    try:
        with only_errors(deepspeed_logger):  # a check is no news
            DeepSpeedConfig(watched)
    except Exception as error:  # DeepSpeed raises anything here: AssertionError, TypeError, its own and pydantic's
        failure = error
    _refuse_unknown(path, "", config, watched.asked if failure is None else known_top_level_keys())
    if isinstance(failure, ValidationError):
        raise DeepSpeedConfigError(_explain(path, config, failure)) from failure
    if failure is not None:
        raise DeepSpeedConfigError(f"{path}: DeepSpeed refuses it: {failure}") from failure
    for name, section in watched.items():
        # A section of which nothing was asked went into a pydantic model as a whole.
        if isinstance(section, _Watched) and section.asked:
            _refuse_unknown(path, f"{name}.", config[name], section.asked)


def known_top_level_keys() -> set[str]:
    """The keys that the installed DeepSpeed looks for at the top of its configuration."""
    watched = _Watched(ANY_BATCH)
    with only_errors(deepspeed_logger):  # a check is no news
        DeepSpeedConfig(watched)
    return watched.asked


def _refuse_unknown(path: Path, prefix: str, section: dict, known: set[str]) -> None:
    for key in section:
        if key not in known:
            raise DeepSpeedConfigError(
                f"{path}: unknown key '{prefix}{key}', which DeepSpeed would ignore{_suggestion(key, known)}"
            )


def _explain(path: Path, config: dict, error: ValidationError) -> str:
    """DeepSpeed's models name the field but neither the file nor the section."""
    models = {model.__name__: model for model in _models(DeepSpeedConfigModel)}
    lines = []
    for detail in error.errors():
        where = [str(part) for part in detail["loc"]]
        section = next((n for n, s in config.items() if isinstance(s, dict) and where and where[0] in s), None)
        name = ".".join([section, *where] if section else where) or error.title
        hint = ""
        if detail["type"] == "extra_forbidden" and len(where) == 1 and error.title in models:
            hint = _suggestion(where[0], set(models[error.title].model_fields))
        lines.append(f"{path}: '{name}': {detail['msg']}{hint}")
    return "\n".join(lines)


def _models(root: type) -> list[type]:
    return [root] + [model for child in root.__subclasses__() for model in _models(child)]


def _suggestion(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _check_stage(path: Path, config: dict) -> None:
    zero = config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0)) if isinstance(zero, dict) else int(zero)
    if stage > 2:
        raise DeepSpeedConfigError(
            f"{path}: zero_optimization.stage is {stage}; the teacher and the checkpoints are built for stages 0 to 2, "
            "where every rank holds all parameters. For less memory use stage 2 with offload_optimizer, and "
            "activation checkpointing in the recipe"
        )


def _check_precision(path: Path, config: dict) -> None:
    for mode in ("bf16", "bfloat16", "fp16"):
        if config.get(mode, {}).get("enabled"):
            raise DeepSpeedConfigError(f"{path}: {mode}.enabled {ROUNDED}")
    dtype = config.get("data_types", {}).get("buffer_dtype")
    if dtype not in (None, "fp32", "float32", "float", "torch.float32"):
        raise DeepSpeedConfigError(f"{path}: data_types.buffer_dtype '{dtype}' would round the queues; remove it")
