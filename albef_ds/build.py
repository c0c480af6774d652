"""A recipe to a task with its starting weights."""

from __future__ import annotations

from albef_ds.config import Config, ConfigError
from albef_ds.model.reference_weights import load_reference
from albef_ds.model.single_modality import load_bert, load_timm
from albef_ds.model.weight_files import read_state_dict
from albef_ds.tasks.registry import task_class
from albef_ds.tasks.task import Task


def build_task(config: Config) -> Task:
    """The task with its starting weights, on the CPU."""
    try:
        task = task_class(config.task)(config.model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.model.vision.weights:
        load_timm(task.model, config.model.vision.weights)
    if config.model.text.weights:
        load_bert(task.model, config.model.text.weights)
    if task.teacher is not None:
        task.teacher.copy_from(task.model)
    if config.model.weights:
        source = config.model.weights
        load_reference(read_state_dict(source), task.model, task.teacher, getattr(task, "queue", None), source)
    if config.train.activation_checkpointing:
        task.model.enable_checkpointing()
    return task


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """Fills in the vocabulary's size from the tokenizer; a model's that is smaller could not embed every token."""
    given = config.model.text.vocab_size
    if given is not None and given < vocab_size:
        raise ConfigError(
            f"model.text.vocab_size {given} is smaller than the vocabulary of {config.data.tokenizer} ({vocab_size}); "
            "leave it out to take the tokenizer's"
        )
    text = config.model.text.model_copy(update={"vocab_size": given or vocab_size})
    return config.model_copy(update={"model": config.model.model_copy(update={"text": text})})
